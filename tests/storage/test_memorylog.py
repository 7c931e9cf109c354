"""A writelog in memory: what stands where, whose memory it is, what a loss leaves."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.config import LdsuConfig
from qdsmirror.core.frames import ENTRY_BYTES
from qdsmirror.core.records import BoundUnit, Cursor, Generation, Point
from qdsmirror.core.superblock import (
    RingMemory,
    Superblock,
    after_loss,
    layout_with_memory,
    pack_slot,
    parse_slot,
)
from qdsmirror.errors import CorruptError, DeviceError, MismatchError
from qdsmirror.limits import KIB, MEMORY_HEADER_BYTES, MIB
from qdsmirror.storage.memory import GroupMemory, absent_memory, make_memory, open_memory_log
from qdsmirror.storage.memorylog import Loss, MemoryLogDevice, loss_of, next_gsn_after
from qdsmirror.storage.superblock import read_superblock
from qdsmirror.storage.writelog import Writelog
from tests.fakes import MemoryDevice, nothing
from tests.groups.world import group_config

SIZE = 16 * MIB
LDSU = LdsuConfig(0, "qds0", "/data", f"memory:{MIB}", "/mirror", "/bitmap")


class MemoryLogCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.durable = MemoryDevice(MIB, path="/bitmap", role="writelog")
        self.memory = MemoryDevice(MIB, path="memory")
        self.device = MemoryLogDevice(self.durable, self.memory)
        Writelog.initialise(
            self.device,
            role="writelog",
            group=0,
            units=[BoundUnit(0, "qds0", SIZE, "/data")],
            generations=[Generation(b"G" * 16, 1)],
        )

    def open(self) -> MemoryLogDevice:
        return open_memory_log(self.durable, LDSU, lambda _ldsu: self.memory)


class DeviceTests(MemoryLogCase):
    def test_the_ring_is_in_memory_and_nothing_else(self) -> None:
        superblock = read_superblock(self.durable)
        ring = superblock.ring
        self.assertEqual(superblock.memory, RingMemory("", 1))
        self.assertEqual((ring.start, ring.size), (MIB + 4 * KIB, MIB - 4 * KIB))
        assert superblock.bitmap is not None
        self.assertLessEqual(superblock.bitmap.start + superblock.bitmap.size, MIB)
        self.assertEqual(self.memory.content(), bytes(MIB))
        self.device.pwritev([b"a" * 512], ring.start)
        self.device.zero(ring.start + 512, 512, unmap=False)
        self.assertEqual(self.memory.content()[4096 : 4096 + 512], b"a" * 512)
        self.assertEqual(self.device.pread(512, ring.start), b"a" * 512)
        self.assertEqual(self.device.pread_nowait(512, ring.start), b"a" * 512)

    def test_a_sync_is_of_the_bitmap_device(self) -> None:
        self.device.pwritev([b"b" * 512], 0)
        self.device.pwritev([b"a" * 512], self.device.start)
        self.device.fdatasync()
        self.assertEqual(self.durable.unsynced, [])
        self.assertEqual(len(self.memory.unsynced), 1)

    def test_a_read_over_the_border(self) -> None:
        """Who looks for a superblock whose first slot is damaged reads as far as there is."""
        self.durable.corrupt(0, bytes(4096))
        self.durable.corrupt(read_superblock_place(self.durable), bytes(4096))
        self.assertRaises(CorruptError, Writelog.open, self.device)

    def test_the_pmd_reads_the_memory_alone(self) -> None:
        log = Writelog(self.open(), read_superblock(self.durable))
        (shared,) = log.open_shared()
        self.addCleanup(os.close, shared.fd)
        self.memory.pwritev([b"x" * 512], MEMORY_HEADER_BYTES)
        found = os.pread(shared.fd, 512, shared.shift + log.ring.start)
        self.assertEqual(found, b"x" * 512)

    def test_another_size_or_kind_is_refused(self) -> None:
        other = replace(LDSU, writelog_device="memory:2M")
        for ldsu, durable in ((other, self.durable), (LDSU, self.plain())):
            error = self.assertRaises(
                MismatchError, open_memory_log, durable, ldsu, lambda _ldsu: MemoryDevice(2 * MIB)
            )
            self.assertIn("qdswlinit --yes", error.hint)

    def plain(self) -> MemoryDevice:
        device = MemoryDevice(MIB, path="/log")
        Writelog.initialise(
            device, role="writelog", group=0, units=[BoundUnit(0, "qds0", SIZE, "/data")]
        )
        return device

    def test_a_bitmap_device_that_grew(self) -> None:
        """What stands where is what it was made with."""
        grown = MemoryDevice(2 * MIB, path="/bitmap", content=self.durable.content())
        device = open_memory_log(grown, LDSU, lambda _ldsu: self.memory)
        self.assertEqual(device.start, MIB)

    def test_a_bitmap_device_too_small(self) -> None:
        self.assertRaises(DeviceError, layout_with_memory, 16 * KIB, MIB, 4096, SIZE)
        _, _, area = layout_with_memory(20 * KIB, MIB, 4096, 1 << 50)
        self.assertTrue(area.covers(1 << 50))

    def test_without_memory_everything_reads_as_unused(self) -> None:
        device = open_memory_log(self.durable, LDSU, None)
        self.assertEqual((device.owner(), device.pread(4, device.start)), ("", bytes(4)))


def read_superblock_place(device: MemoryDevice) -> int:
    return read_superblock(device).slot_bytes


class LossTests(MemoryLogCase):
    def take(self, **changes: object) -> Superblock:
        known = read_superblock(self.durable)
        return replace(known, memory=RingMemory(self.device.take(), 1), **changes)  # type: ignore[arg-type]

    def test_whose_memory(self) -> None:
        superblock = read_superblock(self.durable)
        self.assertEqual(loss_of(self.device, superblock), Loss(taken=False, lost=False))
        mine = self.take()
        self.assertEqual(loss_of(self.device, mine), Loss(taken=True, lost=False))
        self.device.memory = MemoryDevice(MIB)
        self.assertEqual(loss_of(self.device, mine), Loss(taken=False, lost=True))

    def test_taken_anew_it_is_empty(self) -> None:
        mine = self.take()
        self.memory.pwritev([b"x" * 512], 8192)
        self.device.take()
        self.assertEqual(self.memory.content()[4096:], bytes(MIB - 4096))
        self.assertTrue(loss_of(self.device, mine).lost)

    def test_a_damaged_name_is_none(self) -> None:
        mine = self.take()
        for at in (0, 8, 20, 24):
            with self.subTest(at):
                self.memory.corrupt(at, bytes([self.memory.content()[at] ^ 1]))
                self.assertTrue(loss_of(self.device, mine).lost)
                self.memory.corrupt(at, bytes([self.memory.content()[at] ^ 1]))

    def test_left_empty(self) -> None:
        """Only where an orderly stop says that nothing was written since."""
        here = Cursor(8192, 7, {0: Point(3, b"c" * 16)})
        earlier = Cursor(4096, 5, {0: Point(2, b"b" * 16)})
        there = {"tail": here, "applied": here, "head": here}
        for changes, lost in (
            ({**there, "fingerprints": {}}, False),
            ({**there, "fingerprints": None}, True),
            ({**there, "tail": earlier, "fingerprints": {}}, True),
        ):
            mine = self.take(**changes)
            self.device.memory = MemoryDevice(MIB)
            self.assertEqual(loss_of(self.device, mine).lost, lost)
            self.device.memory = self.memory

    def test_a_power_cut_leaves_the_superblock(self) -> None:
        mine = self.take()
        Writelog(self.device, read_superblock(self.durable)).update(both=True, memory=mine.memory)
        self.durable = self.durable.crash(nothing)
        self.memory = MemoryDevice(MIB)
        device = self.open()
        self.assertTrue(loss_of(device, read_superblock(self.durable)).lost)


class AfterLossTests(SynchronousTestCase):
    @given(st.integers(0, 1 << 20), st.integers(0, 63), st.integers(0, 63), st.integers(1, 1 << 40))
    def test_behind_all_that_can_have_been(
        self, turns: int, applied: int, held: int, gsn: int
    ) -> None:
        """Position, sequence and GSN lie above any that the lost log can have reached."""
        slot, ring, area = layout_with_memory(MIB, 260 * KIB, 4096, SIZE)
        at = turns * 4096
        point = Point(turns + 1, b"c" * 16)
        tail = Cursor(at, gsn, {0: point})
        head = Cursor(at + (applied + held) % 64 * 4096, gsn + 5, {0: point})
        superblock = Superblock(
            "writelog", b"L" * 16, 0, (BoundUnit(0, "qds0", SIZE, "/d"),), ring, MIB + 260 * KIB,
            (Generation(b"G" * 16, 1),), tail, tail, head, gsn + 4, True,
            slot_bytes=slot, bitmap=area, memory=RingMemory("ab" * 16, 1),
            refresh={"id": "x"},
        )  # fmt: skip
        following = next_gsn_after([superblock, superblock], ENTRY_BYTES)
        self.assertGreater(following, superblock.durable_gsn + 2 * ring.size // ENTRY_BYTES)
        found = after_loss(superblock, following)
        self.assertGreaterEqual(found.tail.position, tail.position + ring.size)
        places = {c.position for c in (found.tail, found.applied, found.head)}
        self.assertEqual(places, {found.tail.position})
        self.assertGreater(found.head.point(0).sequence, point.sequence + ring.size // 4096)
        self.assertNotEqual(found.head.point(0).chain, point.chain)
        self.assertEqual((found.tail.gsn, found.head.gsn), (gsn, following))
        self.assertEqual((found.coherent, found.refresh), (True, None))
        # It is one that can be stored, and read again.
        self.assertEqual(parse_slot(pack_slot(found, 0), 0, 0), replace(found, counter=0))
        self.assertEqual(after_loss(superblock, following), found)


class HeldTests(SynchronousTestCase):
    def test_parts_of_one_memory(self) -> None:
        group = group_config(2, memory=256 * KIB)
        fd = make_memory(group)
        self.addCleanup(os.close, fd)
        self.assertEqual(os.fstat(fd).st_size, 512 * KIB)
        self.assertEqual(os.fstat(fd).st_blocks * 512, 512 * KIB)
        one, two = map(GroupMemory(group, fd).open, group.ldsus)
        one.pwritev([b"1" * 4096], 256 * KIB - 4096)
        two.pwritev([b"2" * 4096], 0)
        self.assertEqual(os.pread(fd, 8192, 256 * KIB - 4096), b"1" * 4096 + b"2" * 4096)
        self.assertRaises(OSError, one.pwritev, [b"1"], 256 * KIB)
        device = MemoryLogDevice(MemoryDevice(MIB), two)
        shared = device.open_shared()
        self.addCleanup(os.close, shared)
        self.assertRaises(OSError, os.pwrite, shared, b"x", 0)
        self.assertEqual(os.pread(shared, 4, device.shift + device.start), b"2222")
        one.close()
        self.assertEqual(two.pread(4, 0), b"2222")
        two.close()

    def test_mapped_while_it_is_open(self) -> None:
        """So it is locked where the process locks its memory."""
        group = group_config(2, memory=256 * KIB)
        fd = make_memory(group)
        self.addCleanup(os.close, fd)
        one, two = map(GroupMemory(group, fd).open, group.ldsus)
        self.assertEqual(self.mapped(), [(0, 256 * KIB), (256 * KIB, 256 * KIB)])
        two.close()
        self.assertEqual(self.mapped(), [(0, 256 * KIB)])
        one.close()
        one.close()
        self.assertEqual(self.mapped(), [])

    def mapped(self) -> list[tuple[int, int]]:
        """Give offset and length of what is mapped of the group's memory."""
        found = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            if "memfd:dsgrp000" in line:
                addresses, _, offset = line.split()[:3]
                first, last = (int(one, 16) for one in addresses.split("-"))
                found.append((int(offset, 16), last - first))
        return sorted(found)

    def test_none_to_be_had(self) -> None:
        group = group_config(1, memory=256 * KIB)
        error = self.assertRaises(DeviceError, GroupMemory(group, None).open, group.ldsus[0])
        self.assertIn("memory:262144", error.message)

    def test_what_stands_for_it_is_not_written(self) -> None:
        memory = absent_memory(LDSU)
        self.assertEqual(memory.size, MIB)
        self.assertRaises(OSError, memory.pwritev, [b"x"], 0)
        self.assertFalse(Path(memory.path).exists())
