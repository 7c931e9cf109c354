from __future__ import annotations

import contextlib
import io
import json
import socket
from pathlib import Path
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.tools import hostinfo

ROUTES = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 10.1.2.0
        /24 link UNICAST
Local:
     |-- 10.1.2.3
        /32 host LOCAL
     |-- 10.1.2.255
        /32 link BROADCAST
     |-- 127.0.0.1
        /32 host LOCAL
     |-- 10.1.2.3
        /32 host LOCAL
"""
IPV6 = """\
00000000000000000000000000000001 01 80 10 80       lo
fd000000000000000000000000000007 02 40 00 80     eth0
"""
HOSTS = {"other": "192.0.2.9", "me": "10.1.2.3", "localhost": "127.0.0.1"}


def call(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = hostinfo.main(list(arguments))
    return code, out.getvalue(), err.getvalue()


class HostinfoTests(TestCase):
    def setUp(self) -> None:
        folder = Path(self.mktemp())
        folder.mkdir(parents=True)
        for name, text in (("_IPV4_ROUTES", ROUTES), ("_IPV6_ADDRESSES", IPV6)):
            (folder / name).write_text(text)
            self.patch(hostinfo, name, folder / name)
        self.machine_id = folder / "machine-id"
        self.machine_id.write_text("0123456789abcdef0123456789abcdef\n")
        self.patch(hostinfo, "_MACHINE_ID", self.machine_id)
        self.patch(socket, "gethostname", lambda: "me")
        self.patch(socket, "getfqdn", lambda name: f"{name}.example")
        self.patch(socket, "getaddrinfo", self.getaddrinfo)
        self.patch(socket, "gethostbyaddr", self.gethostbyaddr)

    def getaddrinfo(self, host: str, port: None, **_: Any) -> list[Any]:
        address = HOSTS.get(host, host)
        if not address[0].isdigit():
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(2, 1, 6, f"{host}.example" if host in HOSTS else host, (address, 0))] * 2

    def gethostbyaddr(self, address: str) -> tuple[str, list[str], list[str]]:
        for name, known in HOSTS.items():
            if known == address:
                return name, ["alias"], [address]
        raise socket.herror(1, "Unknown host")

    def found(self, *arguments: str) -> dict[str, Any]:
        code, out, err = call("--json", *arguments)
        self.assertEqual((code, err), (0, ""))
        return json.loads(out)

    def test_this_host(self) -> None:
        found = self.found()
        self.assertEqual(found["names"], ["me", "me.example"])
        self.assertEqual(found["addresses"], ["10.1.2.3", "fd00::7"])
        self.assertRegex(found["host_id"], "^[0-9a-f]{16}$")

    def test_id_stays_hides_the_machine_id_and_differs_between_hosts(self) -> None:
        first = hostinfo.host_id()
        self.assertEqual(first, hostinfo.host_id())
        self.assertNotIn(first, self.machine_id.read_text())
        self.machine_id.write_text("1123456789abcdef0123456789abcdef\n")
        self.assertNotEqual(first, hostinfo.host_id())

    def test_id_without_machine_id(self) -> None:
        for change in (lambda: self.machine_id.write_text(""), self.machine_id.unlink):
            change()
            self.assertRegex(hostinfo.host_id(), "^[0-9a-f]{16}$")

    def test_other_host(self) -> None:
        found = self.found("other")
        self.assertEqual(found["names"], ["other", "other.example", "alias"])
        self.assertEqual(found["addresses"], ["192.0.2.9"])
        self.assertIsNone(found["host_id"])
        self.assertNotIn("host id", call("other")[1])

    def test_this_host_by_name_or_address(self) -> None:
        for host in ("me", "localhost", "10.1.2.3"):
            self.assertEqual(self.found(host)["host_id"], hostinfo.host_id())

    def test_an_address_without_name(self) -> None:
        found = self.found("198.51.100.1")
        self.assertEqual((found["names"], found["addresses"]), ([], ["198.51.100.1"]))

    def test_unknown(self) -> None:
        code, out, err = call("nowhere")
        self.assertEqual((code, out), (1, ""))
        self.assertIn("nowhere has no address", err)

    def test_text(self) -> None:
        code, out, _ = call()
        self.assertEqual(code, 0)
        self.assertIn("addresses:  10.1.2.3 fd00::7\n", out)
        self.assertIn(f"host id:    {hostinfo.host_id()}\n", out)


class RealHostTests(TestCase):
    def test_loopback_is_local(self) -> None:
        if not hostinfo.local_addresses():
            self.fail("no address found in /proc/net")
        self.assertIn("127.0.0.1", hostinfo.local_addresses())
