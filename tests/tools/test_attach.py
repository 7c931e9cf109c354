"""qdsattach and qdsdetach, beside nbdkit as the server of an LDSU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest, TestCase

from qdsmirror.config import load_groups
from qdsmirror.errors import DeviceError, UnreachableError
from qdsmirror.paths import Paths
from qdsmirror.tools import attach, attach_fuse, attach_netlink
from qdsmirror.tools.attach_state import Attached, mount_points, read_state
from qdsmirror.tools.status import nbd_uri
from tests.tools.sites import captured, host_root

MOUNTINFO = """\
25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
90 25 7:0 / /mnt/my\\040data rw shared:9 - ext4 /dev/loop0 rw
91 25 259:3 / /mnt/part rw shared:10 - ext4 /dev/loop0p1 rw
92 25 7:10 / /mnt/other rw shared:11 - ext4 /dev/loop10 rw
93 25 0:50 / /run/qds/attach/qds0 rw shared:12 - fuse.nbdfuse nbdfuse rw
"""


class PureTests(TestCase):
    """What is read from the system."""

    def test_mount_points_of_a_device(self) -> None:
        found = list(mount_points(MOUNTINFO, "7:0", "/dev/loop0"))
        self.assertEqual(found, ["/mnt/my data", "/mnt/part"])

    def test_all_mount_points(self) -> None:
        self.assertIn("/run/qds/attach/qds0", list(mount_points(MOUNTINFO)))

    def test_needs_root(self) -> None:
        self.patch(os, "geteuid", lambda: 1000)
        root = str(host_root(self).root)
        for main in (attach.main, attach.detach_main):
            code, _, errors = captured(self, main, "--root", root)
            self.assertEqual(code, 1)
            self.assertIn("needs root", errors)

    def test_missing_programs_are_named(self) -> None:
        self.patch(os, "geteuid", lambda: 0)
        self.patch(shutil, "which", lambda name: None if "nbd" in name else "/bin/x")
        self.patch(attach_netlink, "driver_is_there", lambda: False)
        code, _, errors = captured(self, attach.main, "--root", str(host_root(self).root))
        self.assertEqual(code, 1)
        self.assertIn("nbdfuse, nbdkit", errors)
        self.assertIn("modprobe nbd", errors)

    def test_a_kernel_without_the_driver_is_told_when_it_was_asked_for(self) -> None:
        self.patch(os, "geteuid", lambda: 0)
        self.patch(attach_netlink, "driver_is_there", lambda: False)
        root = str(host_root(self).root)
        code, _, errors = captured(self, attach.main, "--root", root, "--via", "nbd")
        self.assertEqual(code, 1)
        self.assertIn("no nbd driver", errors)

    def test_nothing_attached(self) -> None:
        self.patch(os, "geteuid", lambda: 0)
        self.patch(shutil, "which", lambda name: "/bin/x")
        root = str(host_root(self).root)
        self.assertEqual(captured(self, attach.detach_main, "--root", root), (0, "", ""))
        self.assertEqual(captured(self, attach.detach_main, "--root", root, "qds0")[0], 0)
        self.assertEqual(captured(self, attach.detach_main, "--root", root, "qds7")[0], 2)


class SelectionTests(TestCase):
    """Of three groups the second's file is broken, and the first's device cannot be had."""

    def setUp(self) -> None:
        self.paths = host_root(self, groups=3)
        self.paths.group_config(1).write_text("operation = nonsense\n")
        self.done: list[str] = []
        self.patch(os, "geteuid", lambda: 0)
        self.patch(attach, "_way", lambda wanted: "nbd")
        self.patch(attach, "attach", self.attach)
        self.patch(attach, "detach", lambda paths, name: self.attach(paths, name))

    def attach(self, paths: Paths, name: str, *how: Any) -> Attached:
        if name == "qds0":
            raise DeviceError("qds0: it is mounted")
        self.done.append(name)
        return Attached(name, "", "nbd", 1, "/dev/nbd7", f"/dev/qds/{name}")

    def run_both(self, *argv: str) -> Iterator[tuple[int, str, str]]:
        place = attach.directory(self.paths)
        place.mkdir(exist_ok=True)
        for number in (0, 2):
            (place / f"qds{number}.json").touch()
        for main in (attach.main, attach.detach_main):
            self.done.clear()
            yield captured(self, main, "--root", str(self.paths.root), *argv)

    def test_what_fails_stops_nothing_else(self) -> None:
        for code, output, errors in self.run_both():
            self.assertEqual(self.done, ["qds2"])
            self.assertTrue(output.startswith("qds2: "), output)
            told = errors.splitlines()
            self.assertEqual(told.pop(), "qds0: it is mounted")
            # Without a selection, what is attached is taken away without the configuration.
            self.assertEqual(code, 10 if told else 1)
            for line in told:
                self.assertIn("dsgrp001.cfg", line)
        for code, output, errors in self.run_both("-g", "0", "-g", "1", "-g", "2", "--json"):
            found = json.loads(output)
            self.assertEqual((code, errors, self.done), (10, "", ["qds2"]))
            self.assertEqual(len(found.get("attached") or found["detached"]), 1)
            self.assertEqual([one["code"] for one in found["errors"]], ["configuration", "device"])

    def test_a_good_one_selected(self) -> None:
        for code, _, errors in self.run_both("-g", "2"):
            self.assertEqual((code, self.done), (0, ["qds2"]))
            self.assertTrue(errors.startswith("warning: "), errors)
            self.assertIn("dsgrp001.cfg", errors)

    def test_the_broken_one_selected(self) -> None:
        for code, _, errors in self.run_both("-g", "1"):
            self.assertEqual((code, self.done), (10, []))
            self.assertIn("dsgrp001.cfg", errors)

    def test_an_ldsu_selects_itself_only(self) -> None:
        for main in (attach.main, attach.detach_main):
            _, output, _ = captured(self, main, "--help")
            self.assertIn("only these LDSUs", output)

    def test_nothing_to_stay_for(self) -> None:
        arguments = ["--root", str(self.paths.root), "--foreground", "qds0"]
        self.patch(attach, "_on_signals", lambda: self.fail)
        code, _, errors = captured(self, attach.main, *arguments)
        self.assertEqual(code, 1)
        self.assertIn("qds0: it is mounted", errors)

    def test_at_the_secondary(self) -> None:
        paths = host_root(self, "beta")
        code, _, errors = captured(self, attach.main, "--root", str(paths.root))
        self.assertEqual(code, 10)
        self.assertIn("run this on alpha", errors)


class DeviceTests(TestCase):
    """Real loop devices: what is done where the kernel has no NBD driver."""

    timeout = 300

    def setUp(self) -> None:
        if os.geteuid() != 0:
            raise SkipTest("needs root")
        for program in attach_fuse.PROGRAMS:
            if shutil.which(program) is None:
                raise SkipTest(f"needs {program}")
        for device in ("/dev/fuse", "/dev/loop-control"):
            if not os.path.exists(device):
                raise SkipTest(f"needs {device}")
        self.paths = host_root(self)
        config = load_groups(self.paths)[0]
        self.uri = nbd_uri(self.paths, config, config.ldsus[0])
        self.socket = self.paths.nbd_socket(0)
        self.disk = self.paths.var / "disk"
        with open(self.disk, "xb") as file:
            file.truncate(16 << 20)
        self.serve()
        self.addCleanup(attach.detach, self.paths, "qds0")

    def serve(self) -> None:
        self.socket.unlink(missing_ok=True)
        command = ["nbdkit", "-f", "-U", str(self.socket), "-e", "qds0", "file", str(self.disk)]
        self.server = subprocess.Popen(command)
        self.addCleanup(self.stop, self.server)
        deadline = time.monotonic() + 120
        while not self.is_served():
            self.assertTrue(time.monotonic() < deadline)
            time.sleep(0.01)

    def is_served(self) -> bool:
        # The socket is there before anybody listens.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            return connection.connect_ex(str(self.socket)) == 0

    def stop(self, server: subprocess.Popen[bytes]) -> None:
        if server.poll() is None:
            server.kill()
        server.wait()

    def attached(self) -> Path:
        return Path(attach.attach(self.paths, "qds0", self.uri).device)

    def write(self, device: Path, text: bytes) -> None:
        with open(device, "r+b") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def test_attach_and_detach(self) -> None:
        device = self.attached()
        self.assertEqual(device, self.paths.dev / "qds0")
        self.write(device, b"hello")
        self.assertEqual(self.disk.read_bytes()[:5], b"hello")
        state = read_state(self.paths, "qds0")
        self.assertEqual(attach.attach(self.paths, "qds0", self.uri), state)

        attach.detach(self.paths, "qds0")
        self.assertFalse(device.is_symlink())
        self.assertEqual(os.listdir(self.paths.run / "attach"), [])
        assert state is not None
        self.assertFalse(Path(f"/proc/{state.keeper}/exe").exists())
        attach.detach(self.paths, "qds0")

    def test_server_restarts(self) -> None:
        """I/O waits while the server is away, and goes on with the new one."""
        device = self.attached()
        self.write(device, b"before")
        self.stop(self.server)
        with open("/proc/self/mountinfo") as file:
            self.assertIn(str(self.paths.run / "attach" / "qds0"), file.read())
        writer = subprocess.Popen(
            ["dd", "if=/dev/zero", f"of={device}", "bs=4096", "count=1", "seek=1", "oflag=direct"],
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(self.stop, writer)
        self.serve()
        self.assertEqual(writer.wait(240), 0)

    def test_keeper_killed(self) -> None:
        """A dead keeper is noticed, cleared away and replaced."""
        self.attached()
        state = read_state(self.paths, "qds0")
        assert state is not None
        os.kill(state.keeper, signal.SIGKILL)
        os.waitpid(state.keeper, 0)
        device = self.attached()
        self.write(device, b"again")
        self.assertEqual(self.disk.read_bytes()[:5], b"again")

    def test_mounted(self) -> None:
        for program in ("mkfs.ext4", "mount", "umount"):
            if shutil.which(program) is None:
                raise SkipTest(f"needs {program}")
        device = self.attached()
        place = self.paths.var / "mnt"
        place.mkdir()
        subprocess.run(["mkfs.ext4", "-q", str(device)], check=True)
        subprocess.run(["mount", str(device), str(place)], check=True)
        try:
            error = self.assertRaises(DeviceError, attach.detach, self.paths, "qds0")
            self.assertIn(f"mounted on {place}", str(error))
            (place / "file").write_bytes(b"still there")
        finally:
            subprocess.run(["umount", str(place)], check=True)
        attach.detach(self.paths, "qds0")

    def test_nobody_serves(self) -> None:
        self.stop(self.server)
        self.assertRaises(UnreachableError, self.attached)
        self.assertFalse((self.paths.run / "attach" / "qds0.json").exists())
