"""The simulation's disks and workers under the suites of the real ones."""

from __future__ import annotations

from random import Random
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase, TestCase

from tests.sim.disk import Disk, Gone, SimDevice
from tests.sim.process import Fuse, Process, SimWorker, Wire
from tests.storage import test_device, test_worker


class SimDeviceTests(test_device.DeviceContract, TestCase):
    def make(self) -> SimDevice:
        disk = Disk("sim", test_device.SIZE)
        self.addCleanup(disk.discard)
        return SimDevice(disk)


class SimWorkerTests(test_worker.WorkerContract, TestCase):
    def make(self) -> SimWorker:
        return Process("test", Clock(), Random(1)).worker("test")

    async def settle(self, waited: Deferred[Any]) -> Any:
        while self.worker.waiting:
            self.worker.step()
        return await waited


class EndTests(SynchronousTestCase):
    """How processes end."""

    def setUp(self) -> None:
        self.disk = Disk("sim", 8192)
        self.process = Process("test", Clock(), Random(1))
        self.device = self.process.open(self.disk, "data device", 512)
        self.worker = self.process.worker("test")
        self.told: list[Any] = []

    def write(self, data: bytes) -> None:
        def job() -> None:
            self.device.pwritev([data], 0)
            self.device.fdatasync()

        self.worker.run(job, lambda result, error: self.told.append(error))
        self.worker.step()

    def test_fuse_ends_before_or_behind_an_io(self) -> None:
        for left, behind, seen, durable in (
            (0, False, b"\0", b"\0"),
            (0, True, b"x", b"\0"),
            (1, False, b"x", b"\0"),
            (1, True, b"x", b"x"),
        ):
            self.setUp()
            self.process.fuse = Fuse(left, behind, power=False)
            self.write(b"x")
            self.assertIsNotNone(self.process.ended)
            self.assertEqual(self.told, [])
            self.assertEqual(bytes(self.disk.seen[:1]), seen)
            self.assertEqual(bytes(self.disk.durable[:1]), durable)
            self.assertRaises(Gone, self.device.pwritev, [b"y"], 0)

    def test_killed_process_leaves_the_page_cache(self) -> None:
        self.write(b"x")
        self.device.pwritev([b"y"], 0)
        self.process.kill()
        self.assertRaises(OSError, self.device.pwritev, [b"z"], 0)
        again = Process("again", Clock(), Random(1)).open(self.disk, "data device", 512)
        self.assertEqual(again.pread(1, 0), b"y")
        self.disk.power_cut()
        self.assertEqual(again.pread(1, 0), b"x")

    def test_peer_of_a_killed_process_is_told(self) -> None:
        from twisted.internet.protocol import Protocol

        lost: list[Any] = []

        class One(Protocol):
            def connectionLost(self, reason: Any = None) -> None:
                lost.append(reason)

        other = Process("other", Clock(), Random(1))
        wire = Wire(Random(1), local=True)
        wire.join(self.process, One())
        end = wire.join(other, One())
        self.assertFalse(end.ready)
        self.process.kill()
        self.assertTrue(end.ready)
        end.step(1)
        self.assertEqual(len(lost), 1)
        self.assertTrue(end.lost)
