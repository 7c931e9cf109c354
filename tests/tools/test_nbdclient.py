"""The small NBD client, beside nbdkit."""

from __future__ import annotations

import errno
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from twisted.trial.unittest import SkipTest, TestCase

from qdsmirror.errors import ProtocolError, UnreachableError, UsageError
from qdsmirror.tools.nbdclient import NbdAddress, NbdClient


class AddressTests(TestCase):
    """NBD URIs."""

    def test_parse(self) -> None:
        found = NbdAddress.parse("nbd+unix:///qds%200?socket=/run/a%20b/x.nbd")
        self.assertEqual(found, NbdAddress(Path("/run/a b/x.nbd"), "qds 0"))

    def test_others(self) -> None:
        for uri in ("nbd://host/qds0", "nbd+unix:///qds0", "/run/x.nbd"):
            self.assertRaises(UsageError, NbdAddress.parse, uri)

    def test_nobody_there(self) -> None:
        self.assertRaises(UnreachableError, NbdClient.connect, "/tmp/no-such-socket", "qds0")


class ClientTests(TestCase):
    """Every request."""

    timeout = 300

    def setUp(self) -> None:
        if shutil.which("nbdkit") is None:
            raise SkipTest("needs nbdkit")
        place = Path(tempfile.mkdtemp(prefix="qds-", dir="/tmp"))
        self.addCleanup(shutil.rmtree, place)
        self.socket = place / "nbd"
        disk = place / "disk"
        disk.write_bytes(b"\xff" * (1 << 20))
        command = ["nbdkit", "-f", "-U", str(self.socket), "-e", "qds0", "file", str(disk)]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.addCleanup(server.wait)
        self.addCleanup(server.terminate)
        deadline = time.monotonic() + 120
        while not self.is_served():
            self.assertTrue(server.poll() is None and time.monotonic() < deadline)
            time.sleep(0.01)
        self.disk = disk

    def is_served(self) -> bool:
        # The socket is there before anybody listens.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            return connection.connect_ex(str(self.socket)) == 0

    def test_requests(self) -> None:
        with NbdClient.connect(f"nbd+unix:///qds0?socket={self.socket}") as client:
            self.assertEqual(client.size, 1 << 20)
            client.write(4096, b"a" * 8192, fua=True)
            client.write(65536, b"b" * 4096)
            client.zeroes(8192, 4096)
            client.trim(131072, 4096)
            client.flush()
            self.assertEqual(client.read(4096, 8192), b"a" * 4096 + bytes(4096))
        text = self.disk.read_bytes()
        self.assertEqual(text[65536:69632], b"b" * 4096)
        self.assertEqual(text[131072:135168], bytes(4096))
        self.assertEqual(text[:4096], b"\xff" * 4096)

    def test_server_error(self) -> None:
        with NbdClient.connect(self.socket, "qds0") as client:
            error = self.assertRaises(OSError, client.read, 1 << 20, 512)
            self.assertEqual(error.errno, errno.EINVAL)
            self.assertEqual(client.read(0, 4), b"\xff" * 4)

    def test_server_hangs_up(self) -> None:
        """The end in the handshake is a lost connection; nonsense breaks the protocol."""
        for said, kind in ((b"", ConnectionError), (b"SSH-2.0-OpenSSH_9.2\r\n", ProtocolError)):
            ours, its = socket.socketpair()
            with ours, its:
                its.sendall(said)
                its.shutdown(socket.SHUT_WR)
                self.assertRaises(kind, NbdClient, ours, "qds0")

    def test_too_long(self) -> None:
        with NbdClient.connect(self.socket, "qds0") as client:
            self.assertRaises(UsageError, client.read, 0, 1 << 30)
