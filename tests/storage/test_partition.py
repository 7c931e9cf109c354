"""One device shared by several writelogs."""

from __future__ import annotations

import dataclasses
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.config import GroupConfig
from qdsmirror.core.records import Cursor
from qdsmirror.errors import CorruptError, DeviceError
from qdsmirror.storage.partition import divide
from qdsmirror.storage.recovery import close_units, judge, open_units, replay
from qdsmirror.storage.writelog import Writelog
from tests.fakes import MemoryDevice, nothing
from tests.storage.logworld import KIB, FrameMaker, append, config, initialise, opener, write

BLOCK = 4096
DATA = 16 * KIB
ROLES = ["writelog of qds0", "writelog of qds1", "writelog of qds2"]


class PartitionTests(SynchronousTestCase):
    def test_equal_parts_that_do_not_meet(self) -> None:
        device = MemoryDevice(1000 * KIB, physical_block=16 * KIB)
        parts = divide(device, ROLES)
        self.assertEqual([part.size for part in parts], [320 * KIB] * 3)
        self.assertEqual([part.offset for part in parts], [0, 320 * KIB, 640 * KIB])
        self.assertEqual([part.role for part in parts], ROLES)
        self.assertEqual(parts[1].physical_block, 16 * KIB)
        for number, part in enumerate(parts):
            part.pwritev([bytes([number + 1]) * 512], 0)
            part.pwritev([bytes([number + 1]), bytes([number + 1]) * 511], part.size - 512)
        parts[1].fdatasync()
        self.assertEqual(device.unsynced, [])
        for number, part in enumerate(parts):
            at = part.offset
            self.assertEqual(device.pread(512, at), bytes([number + 1]) * 512)
            self.assertEqual(device.pread(512, at + part.size - 512), bytes([number + 1]) * 512)
            self.assertEqual(part.pread(512, 0), bytes([number + 1]) * 512)
            self.assertEqual(part.pread_nowait(512, 0), bytes([number + 1]) * 512)
        parts[2].zero(0, 512, False)
        self.assertEqual(device.pread(512, 640 * KIB), bytes(512))

    def test_nothing_reaches_beyond_a_part(self) -> None:
        device = MemoryDevice(960 * KIB)
        part = divide(device, ROLES)[1]
        for offset, length in ((-512, 512), (part.size - 512, 1024), (part.size, 512)):
            for call in (
                lambda: part.pread(length, offset),  # noqa: B023
                lambda: part.pread_nowait(length, offset),  # noqa: B023
                lambda: part.pwritev([bytes(length)], offset),  # noqa: B023
                lambda: part.zero(offset, length, True),  # noqa: B023
                lambda: part.extents(offset, length),  # noqa: B023
                lambda: part.hole(offset, length),  # noqa: B023
            ):
                with self.assertRaises(OSError):
                    call()
        self.assertEqual(device.unsynced, [])

    def test_closed_with_the_last(self) -> None:
        device = MemoryDevice(960 * KIB)
        parts = divide(device, ROLES)
        for part in (parts[1], parts[1], parts[0]):
            part.close()
        self.assertFalse(device.closed)
        parts[2].close()
        self.assertTrue(device.closed)

    def test_too_small(self) -> None:
        with self.assertRaisesRegex(DeviceError, "too small for 3 writelogs"):
            divide(MemoryDevice(8 * KIB), ROLES)


class SharedLogTests(SynchronousTestCase):
    """A group of three LDSUs, two of which share a writelog device."""

    def setUp(self) -> None:
        self.shared = MemoryDevice(512 * KIB, path="/log0")
        self.devices = {
            "/log0": self.shared,
            "/log1": MemoryDevice(256 * KIB, path="/log1"),
            **{f"/data{n}": MemoryDevice(DATA, path=f"/data{n}") for n in range(3)},
        }
        first, third = divide(self.shared, ["a", "b"])
        self.logs: list[Writelog] = [
            initialise(first, sizes=(DATA,), first=0, log=b"0" * 16),
            initialise(self.devices["/log1"], sizes=(DATA,), first=1, log=b"1" * 16),
            initialise(third, sizes=(DATA,), first=2, log=b"2" * 16),
        ]
        whole = config(3)
        self.config: GroupConfig = dataclasses.replace(
            whole,
            ldsus=tuple(
                dataclasses.replace(ldsu, writelog_device="/log0" if ldsu.index != 1 else "/log1")
                for ldsu in whole.ldsus
            ),
        )
        self.opened: list[str] = []

    def open(self) -> list[Any]:
        inner = opener(self.devices)

        def told(path: str, **options: Any) -> Any:
            self.opened.append(path)
            return inner(path, **options)

        return open_units(self.config, told)

    def test_each_has_its_own_log(self) -> None:
        maker = FrameMaker()
        for number in range(9):
            frame = maker.make(number % 3, [write(512 * number, bytes([number + 1]) * 512)])
            append(self.logs[number % 3], frame)
        for path in self.devices:
            self.devices[path].fdatasync()
            self.devices[path] = self.devices[path].crash(nothing)
        units = self.open()
        self.assertEqual(self.opened.count("/log0"), 1)
        self.assertEqual(judge(units).next_gsn, 10)
        for unit in units:
            self.assertEqual(replay(unit), 3)
        for number in range(9):
            held = self.devices[f"/data{number % 3}"].durable()
            self.assertEqual(held[512 * number : 512 * number + 512], bytes([number + 1]) * 512)
        shifts = [unit.writelog.open_shared()[0].shift for unit in units]
        self.assertEqual(shifts, [0, 0, 256 * KIB])
        close_units(units)
        self.assertTrue(all(device.closed for device in self.devices.values()))

    def test_an_error_closes_it(self) -> None:
        self.devices["/data2"] = MemoryDevice(DATA + 512)
        with self.assertRaises(Exception):  # noqa: B017
            self.open()
        self.assertTrue(self.devices["/log0"].closed)

    def test_another_division_finds_no_log_or_refuses_it(self) -> None:
        # One more LDSU names the device than when it was initialised.
        self.config = dataclasses.replace(
            self.config,
            ldsus=tuple(
                dataclasses.replace(ldsu, writelog_device="/log0") for ldsu in self.config.ldsus
            ),
        )
        with self.assertRaises((CorruptError, DeviceError)):
            self.open()

    def test_a_full_log_does_not_reach_into_the_other(self) -> None:
        maker = FrameMaker()
        append(self.logs[2], maker.make(2, [write(0, b"x" * 512)]))
        after = self.shared.content()[256 * KIB :]
        while self.logs[0].place(3000) is not None:
            pass
        self.logs[0].head = 0
        for _ in range(200):
            frame = maker.make(0, [write(0, b"y" * 3000)])
            append(self.logs[0], frame)
            at = Cursor(self.logs[0].head, maker.gsn, dict(maker.points))
            self.logs[0].update(tail=at, applied=at, head=at)
        self.assertEqual(self.shared.content()[256 * KIB :], after)
