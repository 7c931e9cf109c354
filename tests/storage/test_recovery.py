"""Opening, judging and replaying a group's devices at the primary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from random import Random

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import frames
from qdsmirror.core.frames import REFRESH, REFRESH_BEGIN, VOID, Entry
from qdsmirror.core.records import Cursor, Generation
from qdsmirror.errors import BrokenError, CorruptError, MismatchError, QdsError
from qdsmirror.storage.recovery import close_units, judge, open_units, replay
from qdsmirror.storage.writelog import Writelog
from tests.fakes import MemoryDevice, at_random, everything
from tests.storage.logworld import (
    KIB,
    OTHER_GENERATION,
    FrameMaker,
    append,
    config,
    initialise,
    opener,
    write,
)

SIZE = 150 * KIB
DATA = 64 * KIB


class Group:
    """A group's writelogs and data devices."""

    def __init__(self, units: int) -> None:
        self.config = config(units)
        self.devices: dict[str, MemoryDevice] = {}
        self.logs: list[Writelog] = []
        self.maker = FrameMaker()
        for index in range(units):
            self.devices[f"/data{index}"] = MemoryDevice(DATA, path=f"/data{index}")
            device = MemoryDevice(SIZE, path=f"/log{index}")
            self.devices[f"/log{index}"] = device
            self.logs.append(
                initialise(device, sizes=(DATA,), first=index, log=bytes([index]) * 16)
            )

    def append(self, ldsu: int, frame: bytes) -> None:
        append(self.logs[ldsu], frame, control=True)

    def sync(self) -> None:
        for log in self.logs:
            log.device.fdatasync()

    def open(self) -> list:  # type: ignore[type-arg]
        return open_units(self.config, opener(self.devices))


class OpenTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.group = Group(2)

    def refuse(self, error: type[QdsError], text: str) -> None:
        with self.assertRaisesRegex(error, text):
            self.group.open()
        for path, device in self.group.devices.items():
            self.assertEqual(device.unsynced, [], f"{path} was written")

    def test_opens(self) -> None:
        units = self.group.open()
        self.assertEqual([u.config.name for u in units], ["qds0", "qds1"])
        self.assertEqual(judge(units).next_gsn, 1)
        close_units(units)
        self.assertTrue(all(device.closed for device in self.group.devices.values()))

    def test_another_group_or_use(self) -> None:
        self.group.config = config(2, number=7)
        self.refuse(MismatchError, "is the writelog of dsgrp000, not the writelog of dsgrp007")
        self.assertTrue(self.group.devices["/log0"].closed)
        self.assertTrue(self.group.devices["/data0"].closed)
        self.group = Group(2)
        initialise(self.group.devices["/log1"], role="journal", sizes=(DATA,))
        self.refuse(MismatchError, "is the journal of dsgrp000, not the writelog")

    def test_logs_swapped_or_renamed(self) -> None:
        devices = self.group.devices
        devices["/log0"], devices["/log1"] = devices["/log1"], devices["/log0"]
        self.refuse(MismatchError, "is the writelog of qds1")
        self.group = Group(2)
        self.group.config = config(2, names={1: "other"})
        self.refuse(MismatchError, "is the writelog of qds1 .LDSU 1 of its group., not of other")

    def test_a_data_device_of_another_size(self) -> None:
        for size in (DATA - 512, DATA + 512):
            self.group = Group(2)
            self.group.devices["/data1"] = MemoryDevice(size)
            self.refuse(MismatchError, f"/data1 has {size} bytes; qds1 was initialised with")

    def test_different_generations(self) -> None:
        initialise(
            self.group.devices["/log1"],
            sizes=(DATA,),
            first=1,
            generations=[Generation(OTHER_GENERATION, 1)],
        )
        self.refuse(BrokenError, "of different generations")
        self.assertTrue(all(device.closed for device in self.group.devices.values()))

    def test_an_error_while_reading_is_no_end(self) -> None:
        self.group.append(0, self.group.maker.make(0, [write(0, b"x")]))
        self.group.sync()
        device = self.group.devices["/log0"]
        pread = device.pread

        def failing(length: int, offset: int) -> bytes:
            if offset >= self.group.logs[0].ring.start:
                raise OSError(5, "EIO")
            return pread(length, offset)

        device.pread = failing  # type: ignore[method-assign]
        with self.assertRaises(OSError):
            self.group.open()
        self.assertTrue(device.closed)


def pieces(count: int) -> Iterator[tuple[bool, ...]]:
    yield from product((False, True), repeat=count)


class SurvivalTests(SynchronousTestCase):
    """Every way in which a power cut may leave the unsynced frames of small groups."""

    def check(self, owners: Sequence[int], kept: Sequence[bool], durable: int) -> None:
        group = Group(max(owners) + 1)
        held = [bytearray(DATA) for _ in group.logs]
        for number, ldsu in enumerate(owners):
            frame = group.maker.make(
                ldsu,
                [write(512 * number, bytes([number + 1]) * 512)],
                durable=min(number, durable),
            )
            group.append(ldsu, frame)
            if number + 1 == durable:
                group.sync()
        # In each log a frame counts if it and all before it are there.
        cut: set[int] = set()
        found: list[int] = []
        for number, ldsu in enumerate(owners):
            there = number < durable or kept[number - durable]
            if not there:
                cut.add(ldsu)
            if ldsu not in cut:
                found.append(number + 1)
                held[ldsu][512 * number : 512 * number + 512] = bytes([number + 1]) * 512
        for index in range(len(group.logs)):
            numbers = [n for n, ldsu in enumerate(owners) if ldsu == index and n >= durable]
            survives = iter([kept[n - durable] for n in numbers])
            path = f"/log{index}"
            group.devices[path] = group.devices[path].crash(
                lambda w, s=survives: [(0, len(w.data))] if next(s) else []  # type: ignore[misc]
            )
        units = group.open()
        plan = judge(units)
        self.assertEqual(plan.next_gsn, max(found, default=0) + 1)
        lost = [g for v in plan.voids for g in range(v.range.first, v.range.end)]
        self.assertEqual(lost, [g for g in range(1, plan.next_gsn) if g not in found])
        for unit, content in zip(units, held, strict=True):
            replay(unit)
            self.assertEqual(unit.device.durable(), content)
        self.record_voids(group, plan.voids, plan.next_gsn, found)

    def record_voids(self, group: Group, voids, next_gsn: int, found) -> None:  # type: ignore[no-untyped-def]
        """Record them one after another; a crash after each is recovered to the same end."""
        units = group.open()
        made = FrameMaker()
        for unit in units:
            unit.writelog.head = unit.reached.position
            made.points[unit.config.index] = unit.reached.point(unit.config.index)
        for void in voids:
            made.gsn = void.range.first
            frame = made.make(void.ldsu, kind=VOID, gsns=void.range.length, durable=next_gsn - 1)
            append(units[void.ldsu].writelog, frame, control=True)
            units[void.ldsu].writelog.device.fdatasync()
            again = judge(group.open())
            self.assertEqual(again.next_gsn, next_gsn)
        self.assertEqual(judge(group.open()).voids, ())

    def test_every_survival(self) -> None:
        for owners in product(range(2), repeat=4):
            if owners[0]:
                continue
            for durable in (0, 1):
                for kept in pieces(4 - durable):
                    self.check(owners, kept, durable)
        for owners in ((0, 1, 2, 0, 1, 2), (0, 1, 2, 1, 2, 0), (2, 1, 0, 2, 2, 0)):
            for kept in pieces(5):
                self.check(owners, kept, 1)

    def test_what_was_durable_and_is_gone_is_refused(self) -> None:
        for lost in range(3):
            group = Group(3)
            for ldsu in (0, 1, 2, 0, 1, 2):
                durable = max(0, group.maker.gsn - 3)
                group.append(ldsu, group.maker.make(ldsu, [write(0, b"x")], durable=durable))
            group.sync()
            log = group.logs[lost]
            group.devices[f"/log{lost}"].corrupt(log.ring.start, bytes(4096))
            with self.assertRaisesRegex(CorruptError, f"GSN {lost + 1} was durable"):
                judge(group.open())

    def test_the_head_in_a_superblock_is_durable(self) -> None:
        group = Group(1)
        group.append(0, group.maker.make(0, [write(0, b"x")]))
        reader = group.logs[0].reader(Cursor())
        list(reader)
        group.logs[0].update(head=reader.cursor)
        group.devices["/log0"].corrupt(group.logs[0].ring.start + 300, b"\xff")
        self.assertEqual(judge(group.open()).next_gsn, 2, "fill is not protected")
        group.devices["/log0"].corrupt(group.logs[0].ring.start + 60, b"\xff")
        with self.assertRaisesRegex(CorruptError, "writelog of qds0: durable up to position 4096"):
            judge(group.open())

    def test_a_superblock_knows_what_another_log_holds_durably(self) -> None:
        group = Group(2)
        for ldsu in (0, 1):
            group.append(ldsu, group.maker.make(ldsu, [write(0, b"x")]))
        group.sync()
        # The power is cut before the other log's superblock says so too.
        group.logs[0].update(both=True, durable_gsn=2)
        self.assertEqual(judge(group.open()).next_gsn, 3)
        group.devices["/log1"].corrupt(group.logs[1].ring.start + 60, b"\xff")
        with self.assertRaisesRegex(CorruptError, "GSN 2 was durable"):
            judge(group.open())

    def test_a_later_record_knows_how_far_its_log_is_durable(self) -> None:
        """Though the group is not: another LDSU's earlier frame keeps its number back."""
        group = Group(2)
        made = [group.maker.make(ldsu, [write(0, b"x")]) for ldsu in (0, 1, 1)]
        append(group.logs[1], made[1])
        append(group.logs[1], made[2], durable=group.logs[1].head)
        group.sync()
        self.assertEqual([v.range.first for v in judge(group.open()).voids], [1])
        group.devices["/log1"].corrupt(group.logs[1].ring.start + 60, b"\xff")
        with self.assertRaisesRegex(CorruptError, "qds1: durable up to position 4096"):
            judge(group.open())

    def test_looks_at_nothing_that_is_applied(self) -> None:
        """What waits only for the secondary costs a start no time (RECOVER)."""
        group = Group(1)
        log = group.logs[0]
        for _ in range(8):
            group.append(0, group.maker.make(0, [write(0, b"x")]))
        reader = log.reader(Cursor())
        applied = [reader.read(4096) for _ in range(6)][-1][-1].end
        log.update(both=True, applied=reader.cursor, head=reader.cursor)
        device = group.devices["/log0"]
        read: list[int] = []
        pread = device.pread

        def watched(length: int, offset: int) -> bytes:
            read.append(offset)
            return pread(length, offset)

        device.pread = watched  # type: ignore[method-assign]
        (unit,) = group.open()
        self.assertEqual([span.first for span in unit.finding.ranges], [7, 8])
        ring = [offset for offset in read if offset >= log.ring.start]
        self.assertEqual(ring[0], log.ring.physical(applied).offset)


class ReplayTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.group = Group(1)
        maker = self.group.maker
        for number in range(6):
            self.group.append(
                0,
                maker.make(
                    0,
                    [
                        write(1024 * number, bytes([number + 1]) * 2048),
                        Entry(512 * number, 512, frames.TRIM, None),
                    ],
                ),
            )
        self.group.append(0, maker.make(0, kind=REFRESH_BEGIN, control=bytes(16)))
        self.group.append(0, maker.make(0, [Entry(0, 512, REFRESH, b"R" * 512)]))
        self.group.sync()
        self.expected = bytearray(DATA)
        for number in range(6):
            self.expected[1024 * number : 1024 * number + 2048] = bytes([number + 1]) * 2048
            self.expected[512 * number : 512 * number + 512] = bytes(512)

    def test_applies_and_syncs(self) -> None:
        (unit,) = self.group.open()
        self.assertEqual(replay(unit), 8)
        # A refresh entry is what the device holds already, and may be older by now.
        self.assertEqual(unit.device.durable(), self.expected)
        self.assertEqual(replay(unit), 8)
        self.assertEqual(unit.device.durable(), self.expected)

    def test_interrupted_at_every_write(self) -> None:
        random = Random(3)
        for stop in range(20):
            group = self.group
            device = group.devices["/data0"]
            left = stop
            pwritev, zero = device.pwritev, device.zero

            def counted(method, *args, device=device):  # type: ignore[no-untyped-def]
                nonlocal left
                if not left:
                    raise OSError(5, "cut")
                left -= 1
                method(*args)

            device.pwritev = lambda *a, m=pwritev: counted(m, *a)  # type: ignore
            device.zero = lambda *a, m=zero: counted(m, *a)  # type: ignore
            (unit,) = group.open()
            try:
                replay(unit)
            except OSError:
                pass
            group.devices["/data0"] = device.crash(at_random(random))
            group.devices["/log0"] = group.devices["/log0"].crash(everything)
            (unit,) = group.open()
            replay(unit)
            self.assertEqual(unit.device.durable(), self.expected)
            group.devices["/data0"] = MemoryDevice(DATA, path="/data0")
            group.devices["/log0"] = group.devices["/log0"].reopen()

    def test_nothing_at_or_below_applied(self) -> None:
        log = self.group.logs[0]
        reader = log.reader(Cursor())
        first = reader.read(4096)
        self.assertEqual(len(first), 1)
        log.update(applied=reader.cursor, head=reader.cursor)
        (unit,) = self.group.open()
        self.assertEqual(replay(unit), 7)
        self.assertEqual(unit.device.durable()[:512], bytes(512))
        self.assertEqual(unit.device.durable()[512:1024], bytes(512))

    def test_a_log_that_changes_meanwhile(self) -> None:
        (unit,) = self.group.open()
        self.group.devices["/log0"].corrupt(self.group.logs[0].ring.start + 8192 + 60, b"\xff")
        with self.assertRaisesRegex(CorruptError, "reads differently than a moment ago"):
            replay(unit)
