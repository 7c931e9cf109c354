"""Two hosts as README.md sets them up: network namespaces, default paths, block devices.

Each host is a network namespace with a mount namespace of its own, in which the default
directories are empty at first; nothing is given ``--root``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from twisted.trial.unittest import SkipTest, TestCase

from tests.integration.lab import COMMAND_SECONDS, WAIT_SECONDS, in_thread
from tests.integration.world import FORGET_MOUNTS, need, need_root

PROGRAMS = Path(sys.executable).parent
NETWORK = "10.77.75"
MIB = 1 << 20
SIZE = 16 * MIB
#: Writes (offset, bytes) of standard input through an LDSU of this host.
WRITER = """
import sys
from qdsmirror.tools.nbdclient import NbdClient
with NbdClient.connect(sys.argv[1]) as client:
    client.write(int(sys.argv[2]), sys.stdin.buffer.read())
    client.flush()
"""


class Host:
    """A host that lives as long as its first process.

    :param number: 1 or 2; its address ends in it.
    """

    def __init__(self, test: TestCase, directory: Path, number: int, names: list[str]) -> None:
        self.test = test
        self.number = number
        self.name = names[number - 1]
        self.space = f"qt{os.getpid()}n{number}"
        self.link = f"qt{number}"
        if subprocess.run(["ip", "netns", "add", self.space]).returncode != 0:
            raise SkipTest("network namespaces are not permitted")
        test.addCleanup(subprocess.run, ["ip", "netns", "del", self.space], check=True)
        files = Path("/etc/netns", self.space)
        files.mkdir(parents=True)
        test.addCleanup(shutil.rmtree, files)
        addresses = [f"{NETWORK}.{place} {name}" for place, name in enumerate(names, start=1)]
        (files / "hosts").write_text("\n".join(["127.0.0.1 localhost", *addresses, ""]))
        script = f"{FORGET_MOUNTS} mount -t tmpfs run /run"
        for place in ("/etc/opt", "/var/opt"):
            own = directory / f"host{number}" / place.replace("/", "_")
            own.mkdir(parents=True)
            script += f" && mount --bind {own} {place}"
        self.first = subprocess.Popen(
            ["ip", "netns", "exec", self.space, "sh", "-c", f"{script} && echo up && exec cat"]
            + ["sh", str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        test.addCleanup(self.down)
        assert self.first.stdout is not None
        test.assertEqual(self.first.stdout.readline(), b"up\n")
        self.ip("link", "set", "lo", "up")

    def down(self) -> None:
        """End the daemons in order, then the host."""
        for command in ("killpmds", "killdriver", "killrmds"):
            self.ask(command)
        self.first.communicate()

    def ip(self, *arguments: str) -> None:
        """Run ip(8) in the namespace."""
        subprocess.run(["ip", "-n", self.space, *arguments], check=True)

    def ask(self, *command: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a command of ours on the host."""
        program = str(PROGRAMS / command[0])
        enter = ["nsenter", "-t", str(self.first.pid), "-m", "-n", program]
        return subprocess.run([*enter, *command[1:]], input=data, capture_output=True,
                              timeout=COMMAND_SECONDS)  # fmt: skip

    def run(self, *command: str, data: bytes = b"") -> str:
        """Run a command of ours on the host; it must succeed."""
        done = self.ask(*command, data=data)
        said = done.stdout.decode() + done.stderr.decode()
        self.test.assertEqual(done.returncode, 0, f"{self.name}: {command}: {said}")
        return said

    def put(self, path: str, text: str) -> None:
        """Write a file of the host."""
        self.run("python3", "-c", f"import sys; open({path!r}, 'w').write(sys.stdin.read())",
                 data=text.encode())  # fmt: skip


class HostsTests(TestCase):
    timeout = 1200

    def loop(self, directory: Path, name: str, size: int, *options: str) -> str:
        """Make a block device."""
        path = directory / name
        path.touch()
        os.truncate(path, size)
        command = ["losetup", "--show", "-f", *options, str(path)]
        device = subprocess.check_output(command, text=True).strip()
        self.addCleanup(subprocess.run, ["losetup", "-d", device], check=True)
        return device

    def write(self, offset: int, length: int) -> None:
        """Write through the LDSU; what was written is compared at the end."""
        data = random.Random(offset).randbytes(length)
        uri = "nbd+unix:///qds0?socket=/run/qdsmirror/dsgrp000.nbd"
        self.primary.run("python3", "-P", "-c", WRITER, uri, str(offset), data=data)

    @in_thread
    def test_the_readmes_ten_minutes_an_outage_and_a_takeover(self) -> None:
        need_root()
        need("ip", "nsenter", "losetup", "mount")
        self.directory = directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
        self.addCleanup(shutil.rmtree, directory)
        data = self.loop(directory, "data", SIZE)
        writelog = self.loop(directory, "writelog", 8 * MIB, "--sector-size", "4096")
        mirror = self.loop(directory, "mirror", SIZE)
        journal = self.loop(directory, "journal", 8 * MIB)
        self.set_up(directory)
        group = f"""
            operation = async
            [primary]
            host = {self.primary.name}
            [secondary]
            host = {self.secondary.name}
            journal_device = {journal}
            [ldsus]
              [[qds0]]
              data_device = {data}
              writelog_device = {writelog}
              mirror_device = {mirror}
        """
        for host in (self.primary, self.secondary):
            host.put("/etc/opt/QLIXds/qds.cfg", f"name = {host.name}\n")
            host.put("/etc/opt/QLIXds/dsgrp000.cfg", group)
            self.assertIn("no problems", host.run("qdsconfigtool", "check"))
            host.run("qdswlinit")
        self.secondary.run("launchrmds")
        for command in ("launchdriver", "launchpmds", "launchrefresh"):
            self.primary.run(command)
        self.primary.run("qdsinfo", "--wait", "coherent", "--timeout", str(WAIT_SECONDS))
        self.write(0, 2 * MIB)
        self.check_outage()
        self.check_logs()
        self.take_over()
        with open(data, "rb") as ours, open(mirror, "rb") as theirs:
            self.assertTrue(ours.read() == theirs.read(), "the mirror differs")

    def set_up(self, directory: Path) -> None:
        """Make both hosts, the cable, and what the README has scp copy."""
        names = ["db1.example.com", "dr1.example.com"]
        self.primary = Host(self, directory, 1, names)
        self.secondary = Host(self, directory, 2, names)
        one, two = self.primary, self.secondary
        one.ip("link", "add", one.link, "type", "veth", "peer", "name", two.link, "netns",
               two.space)  # fmt: skip
        one.run("qdsconfigtool", "pki", "--out", str(directory / "pki"), *names)
        for host in (one, two):
            host.ip("addr", "add", f"{NETWORK}.{host.number}/24", "dev", host.link)
            host.ip("link", "set", host.link, "up")
            place = directory / f"host{host.number}" / "_etc_opt" / "QLIXds"
            shutil.copytree(directory / "pki" / host.name, place)

    def check_outage(self) -> None:
        """Pull the cable, write, plug it in; kill the secondary's daemon as well."""
        self.primary.ip("link", "set", self.primary.link, "down")
        self.write(4 * MIB, MIB)
        (group,) = json.loads(self.primary.run("qdsinfo", "--json"))["groups"]
        self.assertGreater(group["lag"]["bytes"], MIB - 1)
        self.assertEqual(self.primary.ask("qdsinfo", "--is", "drained").returncode, 3)
        self.secondary.run("python3", "-c", "import os; "
                           "os.kill(int(open('/run/qdsmirror/qdsrmd.pid').read()), 9)")  # fmt: skip
        # Its child follows it, and may answer until then.
        deadline = time.monotonic() + WAIT_SECONDS
        while "rmd not running" not in (shown := self.secondary.run("qdsinfo")):
            self.assertLess(time.monotonic(), deadline, shown)
        self.primary.ip("link", "set", self.primary.link, "up")
        self.secondary.run("launchrmds")
        self.primary.run("qdsinfo", "--wait", "drained", "--timeout", str(WAIT_SECONDS))
        self.assertIn("already running", self.secondary.run("launchrmds"))

    def check_logs(self) -> None:
        """Every line names the group, or the daemon that speaks of itself."""
        for host in (self.primary, self.secondary):
            logs = (self.directory / f"host{host.number}" / "_var_opt" / "QLIXds").glob("qds*.log")
            lines = "".join(log.read_text() for log in logs).splitlines()
            who = "pmd" if host is self.primary else "rmd"
            self.assertRegex("\n".join(lines), rf" {who}\[\d+\]: dsgrp000: connected")
            for line in lines:
                self.assertRegex(line, r"^\S+ \w+\[\d+\]: .*(dsgrp000|qds(driver|pmd|rmd))")

    def take_over(self) -> None:
        """Lose the primary; make the mirror an ordinary disk."""
        self.write(6 * MIB, MIB)
        self.primary.run("qdsinfo", "--wait", "drained", "--timeout", str(WAIT_SECONDS))
        self.primary.ip("link", "set", self.primary.link, "down")
        self.assertIn("dsgrp000: its rmd runs", self.secondary.ask("qdsrmdreco").stderr.decode())
        self.secondary.run("killrmds")
        self.assertIn("and is coherent", self.secondary.run("qdsrmdreco"))
        self.primary.run("killpmds")
        self.primary.run("killdriver")
