"""qdsattach by the kernel's NBD driver, with a kernel faked by the bytes of its messages."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.core import ampbox
from qdsmirror.errors import DeviceError, UnreachableError
from qdsmirror.pidfile import running_pid
from qdsmirror.tools import attach, attach_keeper, attach_nbd, attach_netlink
from qdsmirror.tools.attach_keeper import Keeper
from qdsmirror.tools.attach_netlink import KernelNbd
from qdsmirror.tools.attach_state import Attached, read_state, write_state
from tests.tools import nbdkernel
from tests.tools.nbdkernel import FakeKernel, FakeKernelTests, number
from tests.tools.nbdserver import FLAGS, NbdServer
from tests.tools.sites import host_root

__all__ = ["FakeKernelTests"]

REPOSITORY = Path(__file__).resolve().parents[2]
#: Long enough for a keeper that does not wait for the kernel to be too early.
EARLY_SECONDS = 0.2


def uri_of(server: NbdServer) -> str:
    return f"nbd+unix:///qds0?socket={server.path}"


def set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


class NbdTestCase(TestCase):
    timeout = 300

    def setUp(self) -> None:
        self.paths = host_root(self)
        assert self.paths.root is not None
        self.kernel = FakeKernel(self.paths.root)
        self.addCleanup(self.kernel.close)
        self.server = NbdServer(self.paths.nbd_socket(0))
        self.addCleanup(self.server.stop)
        self.uri = uri_of(self.server)
        self.patch(Path, "is_block_device", Path.exists)


class KeeperTests(NbdTestCase):
    """What the keeper does to its device."""

    def setUp(self) -> None:
        super().setUp()
        self.said: list[str] = []
        self.pauses: list[float] = []
        self.between_tries: Any = lambda: None

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.between_tries()

    def keeper(self) -> Keeper:
        kernel = self.kernel.open()
        keeper = Keeper(
            kernel, self.uri, 300, self.said.append, self.pause, lambda: sum(self.pauses)
        )
        self.addCleanup(keeper.close)
        return keeper

    def keep(self, keeper: Keeper) -> None:
        thread = threading.Thread(target=keeper.keep, daemon=True)
        thread.start()
        self.thread = thread
        self.patch(attach_keeper, "NOTICE_SECONDS", attach_keeper.NOTICE_SECONDS)
        self.addCleanup(thread.join, nbdkernel.WAIT_SECONDS)
        self.addCleanup(self.kernel._end, keeper.index)
        # There is no notice to wait for when the test ends.
        self.addCleanup(setattr, attach_keeper, "NOTICE_SECONDS", 0.0)

    def attached(self) -> tuple[Keeper, nbdkernel.FakeDevice]:
        keeper = self.keeper()
        keeper.attach()
        self.keep(keeper)
        return keeper, self.kernel.devices[keeper.index]

    def test_what_the_kernel_is_told(self) -> None:
        _, device = self.attached()
        expected = {
            nbdkernel.SIZE_BYTES: 1 << 20,
            nbdkernel.BLOCK_SIZE_BYTES: 512,
            nbdkernel.TIMEOUT: 0,
            nbdkernel.SERVER_FLAGS: FLAGS,
            nbdkernel.DEAD_CONN_TIMEOUT: 300,
        }
        told = {kind: number(device.told[kind]) for kind in expected}
        self.assertEqual(told, expected)
        self.assertEqual(device.told[nbdkernel.BACKEND_IDENTIFIER].rstrip(b"\0").decode(), self.uri)
        timeout = self.kernel.sys_block / "nbd0" / "queue" / "io_timeout"
        self.assertEqual(timeout.read_text(), "5000")

    def test_a_connection_that_ends_is_replaced(self) -> None:
        _, device = self.attached()
        for taken in (2, 3):
            self.server.hang_up()
            self.kernel.until(lambda taken=taken: device.taken == taken)  # type: ignore[misc]
        self.assertFalse(device.dead)

    def test_it_tries_until_the_server_is_back(self) -> None:
        _, device = self.attached()

        def restart_after_some() -> None:
            if len(self.pauses) == 6:
                self.server.start()

        self.between_tries = restart_after_some
        self.server.stop()
        self.kernel.until(lambda: device.taken == 2)
        self.assertEqual(self.pauses, [0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
        refused = [text for text in self.said if "no NBD server answers" in text]
        self.assertEqual(len(refused), 1, self.said)

    def inflight(self, text: str) -> None:
        (self.kernel.sys_block / "nbd0" / "inflight").write_text(text)

    def test_requests_that_were_under_way_fail_in_the_end(self) -> None:
        self.attached()
        self.inflight("       0        2\n")
        self.server.stop()
        self.thread.join(nbdkernel.WAIT_SECONDS)
        self.assertFalse((self.kernel.sys_block / "nbd0" / "pid").exists())
        self.assertTrue(300 <= sum(self.pauses) <= 301, self.pauses)
        self.assertIn("no connection for 300 s", self.said[-2])

    def test_a_device_without_requests_waits_on(self) -> None:
        """What comes later is failed by the kernel, each request after its own time."""
        _, device = self.attached()
        self.inflight("       0        0\n")

        def go_on() -> None:
            self.inflight("       3        0\n")
            if sum(self.pauses) > 1000 and not self.server.path.exists():
                self.server.start()

        self.between_tries = go_on
        self.server.stop()
        self.kernel.until(lambda: device.taken == 2)
        self.assertGreater(sum(self.pauses), 1000)

    def test_the_kernel_notices_first(self) -> None:
        """Offered before that, the new connection would be dropped without a word."""
        self.patch(attach_keeper, "NOTICE_SECONDS", nbdkernel.WAIT_SECONDS)
        _, device = self.attached()
        self.kernel.may_notice.clear()
        self.server.hang_up()
        threading.Timer(EARLY_SECONDS, self.kernel.may_notice.set).start()
        self.kernel.until(lambda: device.taken == 2)
        self.assertEqual(self.kernel.reconfigured, 1)

    def test_another_export_is_not_handed_over(self) -> None:
        _, device = self.attached()
        self.server.size *= 2

        def restore() -> None:
            self.server.size = 1 << 20

        self.between_tries = restore
        self.server.hang_up()
        self.kernel.until(lambda: device.taken == 2)
        self.assertEqual(self.kernel.reconfigured, 1)
        self.assertIn("is not what", "".join(self.said))

    def test_a_device_without_keeper_is_taken_over_alive(self) -> None:
        first = self.keeper()
        first.attach()
        first.close()  # killed
        device = self.kernel.devices[0]
        second = self.keeper()
        second.adopt(0)
        self.keep(second)
        self.assertEqual(device.taken, 1)
        self.server.hang_up()
        self.kernel.until(lambda: device.taken == 2)

    def test_a_device_without_keeper_is_taken_over_dead(self) -> None:
        first = self.keeper()
        first.attach()
        first.close()
        device = self.kernel.devices[0]
        self.server.hang_up()
        self.kernel.until(lambda: device.dead)
        self.keeper().adopt(0)
        self.assertEqual((device.taken, device.dead), (2, False))

    def test_it_ends_when_the_device_is_disconnected(self) -> None:
        keeper = self.keeper()
        keeper.attach()
        self.keep(keeper)
        with self.kernel.open_closing() as kernel:
            kernel.disconnect(0)
        self.thread.join(nbdkernel.WAIT_SECONDS)
        self.assertFalse(self.thread.is_alive())
        self.assertIn("is disconnected", self.said[-1])

    def test_what_the_kernel_refuses(self) -> None:
        for code, text in ((errno.EPERM, "root only"), (errno.EINVAL, "the kernel refuses")):
            self.kernel.refuses = code
            error = self.assertRaises(DeviceError, self.keeper().attach)
            self.assertIn(text, str(error))
            self.assertIn(os.strerror(code), str(error))

    def test_a_device_that_does_not_come_up_is_given_back(self) -> None:
        self.patch(attach_keeper, "READY_SECONDS", 0.0)
        self.patch(KernelNbd, "is_ready", lambda *_: False)
        self.assertRaises(DeviceError, self.keeper().attach)
        with self.kernel.open_closing() as kernel:
            self.assertFalse(kernel.is_connected(0))

    def test_a_lost_message_counts_as_an_end(self) -> None:
        keeper = self.keeper()
        keeper.attach()
        self.patch(keeper._events, "ended", lambda: None)
        self.assertTrue(keeper._wait_for_end(0.0))


class CommandTests(NbdTestCase):
    """qdsattach and qdsdetach with a keeper that is a process."""

    def setUp(self) -> None:
        super().setUp()
        assert self.paths.root is not None
        self.patch(attach_nbd, "KEEPER", "tests.tools.fake_keeper")
        self.patch(attach_nbd, "refuse_in_use", lambda name, node: None)
        self.patch(attach_netlink, "KernelNbd", self.kernel.open)
        for name, value in (("FAKE_KERNEL", self.paths.root), ("PYTHONPATH", REPOSITORY)):
            self.addCleanup(set_environment, name, os.environ.get(name))
            set_environment(name, str(value))
        self.addCleanup(attach.detach, self.paths, "qds0")

    def attach(self) -> Attached:
        return attach.attach(self.paths, "qds0", self.uri, 60, "nbd")

    def keeper(self) -> int | None:
        return running_pid(self.paths.pid_file("qds0.keeper"))

    def log(self) -> str:
        return self.paths.log_file("qds0.keeper").read_text()

    def test_attach_and_detach(self) -> None:
        state = self.attach()
        node = self.kernel.dev / "nbd0"
        self.assertEqual(state.node, str(node))
        self.assertEqual(os.readlink(state.device), str(node))
        self.assertEqual(state.keeper, self.keeper())
        command = Path(f"/proc/{state.keeper}/cmdline").read_text()
        self.assertIn(f"--root\0{self.paths.root}\0", command)
        self.assertEqual(read_state(self.paths, "qds0"), state)
        self.assertEqual(self.attach(), state)

        attach.detach(self.paths, "qds0")
        self.assertIsNone(self.keeper())
        self.assertFalse((self.kernel.sys_block / "nbd0" / "pid").exists())
        self.assertFalse(Path(state.device).is_symlink())
        self.assertEqual(os.listdir(self.paths.run / "attach"), [])
        self.assertFalse(self.paths.pid_file("qds0.keeper").exists())
        attach.detach(self.paths, "qds0")

    def test_a_killed_keeper_is_replaced_and_the_device_stays(self) -> None:
        first = self.attach()
        os.kill(first.keeper, signal.SIGKILL)
        os.waitpid(first.keeper, 0)
        # The fake kernel was in that process: its device is shown on, as a real one is.
        error = self.assertRaises(DeviceError, self.attach)
        self.assertIn("no new connection", str(error))
        self.assertTrue((self.kernel.sys_block / "nbd0" / "pid").exists())
        self.assertEqual(read_state(self.paths, "qds0").node, "")  # type: ignore[union-attr]

    def test_a_device_that_somebody_else_disconnected_is_made_anew(self) -> None:
        first = self.attach()
        (self.kernel.sys_block / "nbd0" / "pid").unlink()
        second = self.attach()
        self.assertNotEqual(first.keeper, second.keeper)
        self.assertEqual(second.node, str(self.kernel.dev / "nbd1"))

    def test_nobody_serves(self) -> None:
        self.server.stop()
        error = self.assertRaises(UnreachableError, self.attach)
        self.assertIn("no NBD server answers", str(error))
        self.assertIsNone(read_state(self.paths, "qds0"))
        self.assertIsNone(self.keeper())

    def test_one_keeper_for_a_device(self) -> None:
        self.attach()
        command = [sys.executable, "-m", "tests.tools.fake_keeper", "--dead-timeout", "9"]
        command += [*self.paths.arguments(), "qds0", self.uri]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        self.assertEqual(done.returncode, 1, done.stderr)
        told = ampbox.decode_error(json.loads(done.stdout)["error"].encode())
        self.assertIn("already running", str(told))

    def test_in_use(self) -> None:
        state = self.attach()

        def refuse(name: str, node: str) -> None:
            raise DeviceError(f"{name}: {node} is mounted on /mnt")

        self.patch(attach_nbd, "refuse_in_use", refuse)
        self.assertRaises(DeviceError, attach.detach, self.paths, "qds0")
        self.assertEqual(self.keeper(), state.keeper)
        self.assertTrue((self.kernel.sys_block / "nbd0" / "pid").exists())
        self.patch(attach_nbd, "refuse_in_use", lambda name, node: None)

    def test_a_device_that_comes_up_while_it_is_detached(self) -> None:
        """As when qdsattach is interrupted: its keeper may be at any point then."""
        state = Attached("qds0", self.uri, "nbd", 0, "", str(self.paths.dev / "qds0"))
        write_state(self.paths, state)
        keeper = Keeper(self.kernel.open(), self.uri, 60, lambda text: None)
        self.addCleanup(keeper.close)
        self.patch(attach_nbd, "_end_keeper", lambda paths, name: keeper.attach())
        attach.detach(self.paths, "qds0")
        self.assertTrue((self.kernel.sys_block / "nbd0").exists())
        self.assertFalse((self.kernel.sys_block / "nbd0" / "pid").exists())

    def test_a_keeper_that_does_not_start(self) -> None:
        self.patch(attach_nbd, "KEEPER", "tests.tools.no_such_module")
        error = self.assertRaises(DeviceError, self.attach)
        self.assertIn("look into", error.hint)
        self.assertIn("no_such_module", self.log())

    def test_the_kernel_lost_its_driver(self) -> None:
        state = Attached("qds0", self.uri, "nbd", 0, "/dev/nbd0", str(self.paths.dev / "qds0"))
        write_state(self.paths, state)

        def absent() -> KernelNbd:
            raise DeviceError("no driver")

        self.patch(attach_netlink, "KernelNbd", absent)
        attach.detach(self.paths, "qds0")
        self.assertIsNone(read_state(self.paths, "qds0"))


class DriverTests(TestCase):
    """Whether there is a driver."""

    def test_modprobe_is_tried(self) -> None:
        asked: list[list[str]] = []

        class Absent:
            def __init__(self) -> None:
                if not asked:
                    raise DeviceError("no driver")

            def close(self) -> None:
                pass

        def run(command: list[str], **_: Any) -> None:
            asked.append(command)

        self.patch(attach_netlink, "KernelNbd", Absent)
        self.patch(subprocess, "run", run)
        self.patch(shutil, "which", lambda name: None)
        self.assertFalse(attach_netlink.driver_is_there())
        self.patch(shutil, "which", lambda name: "/sbin/" + name)
        self.assertTrue(attach_netlink.driver_is_there())
        self.assertEqual(asked, [["modprobe", "-q", "nbd"]])

    def test_a_family_that_the_kernel_does_not_have(self) -> None:
        """The kernel that runs here is asked, for a name that none has."""
        self.patch(attach_netlink, "FAMILY", "qds-none")
        error = self.assertRaises(DeviceError, KernelNbd)
        self.assertEqual(error.hint, "modprobe nbd")
        self.assertTrue(str(error).endswith(os.strerror(errno.ENOENT)), str(error))
