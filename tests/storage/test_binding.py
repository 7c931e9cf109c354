"""How much of a log is read at a start: after an orderly stop, nothing behind its end."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.records import Cursor
from qdsmirror.errors import CorruptError
from qdsmirror.storage.binding import Bound, seal, take_over
from qdsmirror.storage.journal import Mirror
from qdsmirror.storage.recovery import judge, open_units, replay
from qdsmirror.storage.superblock import read_superblock
from qdsmirror.storage.writelog import Writelog
from tests.fakes import MemoryDevice
from tests.storage.logworld import KIB, FrameMaker, append, config, initialise, opener, write

BLOCK = 4096
DATA = 64 * KIB
#: More than one read of a scan.
LOG = 8 * 1024 * KIB


class CountingDevice(MemoryDevice):
    """Counts what is read of it."""

    count = 0

    def pread(self, length: int, offset: int) -> bytes:
        self.count += length
        return super().pread(length, offset)


class StopTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.data = MemoryDevice(DATA)
        self.maker = FrameMaker()

    def filled(self, role: str = "writelog") -> Writelog:
        """Make a log whose frames are all applied, as at an orderly stop."""
        log = initialise(MemoryDevice(LOG), role=role, sizes=(DATA,))
        for _ in range(3):
            append(log, self.maker.make(0, [write(0, b"x" * BLOCK)], durable=self.maker.gsn - 1))
        self.checkpoint(log)
        return log

    def checkpoint(self, log: Writelog) -> None:
        done = Cursor(log.head, self.maker.gsn, dict(self.maker.points))
        log.update(both=True, tail=done, applied=done, head=done, durable_gsn=done.gsn - 1)

    def go_on(self, log: Writelog) -> None:
        """Append two frames, of which the second says that the first is durable."""
        append(log, self.maker.make(0, [write(0, b"y" * BLOCK)], durable=3))
        append(log, self.maker.make(0, [write(0, b"z" * BLOCK)], durable=4), durable=log.head)
        log.sync()

    def recover(self, image: bytes) -> int:
        """Recover a writelog; give how many bytes were read of it."""
        device = CountingDevice(LOG, content=image)
        (unit,) = open_units(config(1), opener({"/log0": device, "/data0": self.data}))
        judge([unit])
        replay(unit)
        return device.count

    def bound(self, log: Writelog) -> list[Bound]:
        return [Bound(log, 0, self.data)]

    def test_nothing_is_read_behind_the_end_after_an_orderly_stop(self) -> None:
        log = self.filled()
        rest = log.ring.size
        self.assertGreater(self.recover(log.device.durable()), rest)
        seal(self.bound(log))
        self.assertLess(self.recover(log.device.durable()), rest // 2)

    def test_the_same_of_a_journal(self) -> None:
        log = self.filled("journal")
        read = []
        for _ in range(2):
            device = CountingDevice(LOG, content=log.device.durable())
            mirror = Mirror.open(config(1), opener({"/journal": device, "/mirror0": self.data}))
            self.assertEqual(mirror.scan().damage, "")
            read.append(device.count)
            seal(self.bound(log))
        self.assertGreater(read[0], log.ring.size)
        self.assertLess(read[1], log.ring.size // 2)

    def test_a_start_ends_that_whatever_slot_is_lost(self) -> None:
        log = self.filled()
        seal(self.bound(log))
        self.assertEqual(take_over(self.bound(log), config(1), self.fail), [])
        start = log.head
        first = log.ring.physical(start).offset
        self.go_on(log)
        for slot in (0, 1):
            device = MemoryDevice(LOG, content=log.device.durable())
            device.corrupt(slot * log.superblock.slot_bytes, bytes(100))
            self.assertIsNone(read_superblock(device).fingerprints)
            # The first frame is durable, as the second one says: damage to it is told.
            device.corrupt(first + 200, b"X")
            with self.assertRaisesRegex(CorruptError, "qds0"):
                self.recover(device.durable())

    def test_a_log_that_ends_elsewhere_is_looked_at(self) -> None:
        log = self.filled()
        seal(self.bound(log))
        # Whoever wrote there.
        self.go_on(log)
        device = CountingDevice(LOG, content=log.device.durable())
        open_units(config(1), opener({"/log0": device, "/data0": self.data}))
        self.assertGreater(device.count, log.ring.size - 4 * BLOCK)
