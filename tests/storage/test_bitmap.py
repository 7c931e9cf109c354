"""The dirty bitmap on a device: after damage or a crash it marks more, never less."""

from __future__ import annotations

import itertools
from random import Random

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.bitmap import SECTOR_BITS, SECTOR_BYTES, BitmapArea, DirtyBitmap
from qdsmirror.core.superblock import SLOT_BYTES
from qdsmirror.errors import CorruptError
from qdsmirror.limits import BITMAP_CHUNK_BYTES_MIN, MIB
from qdsmirror.storage.bitmap import load_bitmap, write_blocks
from qdsmirror.storage.superblock import read_superblock
from qdsmirror.storage.writelog import Writelog
from tests.fakes import MemoryDevice, at_random, nothing
from tests.storage.logworld import LOG, initialise

CHUNK = BITMAP_CHUNK_BYTES_MIN
SECTOR = SECTOR_BITS * CHUNK
#: Of an LDSU with a bitmap of two blocks, of which the last sectors stand for nothing.
SIZE = 9 * SECTOR + 5 * CHUNK
PLACES = range(0, SIZE, 97 * CHUNK)


class PowerCutError(Exception):
    """Nothing more is issued."""


def cut_at_sync(device: MemoryDevice, number: int) -> None:
    """Cut the power in a device's next sync but so many."""
    sync, left = device.fdatasync, itertools.count(number, -1)

    def fdatasync() -> None:
        if not next(left):
            raise PowerCutError
        sync()

    device.fdatasync = fdatasync  # type: ignore[method-assign]


class BitmapTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.device = MemoryDevice(4 * MIB, path="/log0")
        self.log = initialise(self.device, sizes=(SIZE,))
        assert self.log.superblock.bitmap is not None
        self.area: BitmapArea = self.log.superblock.bitmap
        self.bitmap, told = load_bitmap(self.device, self.log.superblock)
        self.assertEqual((told, self.bitmap.dirty_bytes(), self.area.blocks), ("", 0, 2))

    def mark(self, *places: int) -> None:
        """Mark chunks as a direct write does."""
        changed = self.bitmap.mark((place, 1) for place in places)
        write_blocks(self.device, self.area, self.bitmap.blocks(changed))

    def load(self, device: MemoryDevice) -> tuple[DirtyBitmap, str]:
        return load_bitmap(device, self.log.superblock)

    def marked(self, bitmap: DirtyBitmap) -> set[int]:
        return {place for place in PLACES if bitmap.is_marked(place)}

    def stored(self) -> bytes:
        return self.device.pread(self.area.size, self.area.start)

    def test_durable_on_return(self) -> None:
        self.mark(0, 9 * SECTOR)
        self.assertEqual(self.device.unsynced, [])
        bitmap, told = self.load(self.device.crash(nothing))
        self.assertEqual((told, bitmap.dirty_bytes()), ("", 2 * CHUNK))
        self.assertTrue(bitmap.is_marked(0) and bitmap.is_marked(9 * SECTOR))

    def test_a_valid_one_is_not_written(self) -> None:
        self.mark(CHUNK)
        syncs = self.device.syncs
        self.load(self.device)
        self.assertEqual((self.device.syncs, self.device.unsynced), (syncs, []))

    def test_damage_is_told_once_and_written_as_marked(self) -> None:
        self.mark(CHUNK, 8 * SECTOR)
        self.device.corrupt(self.area.start + SECTOR_BYTES + 100, b"\x04")
        bitmap, told = self.load(self.device)
        first = self.area.start + SECTOR_BYTES
        self.assertEqual(
            told,
            f"the dirty bitmap of qds0 on /log0 is damaged (bytes {first} to {first + 511}): bytes "
            f"{SECTOR} to {2 * SECTOR - 1} of the LDSU count as changed; check that device",
        )
        self.assertEqual(bitmap.dirty_bytes(), SECTOR + 2 * CHUNK)
        again, told = self.load(self.device.crash(nothing))
        self.assertEqual((told, again.dirty_bytes()), ("", bitmap.dirty_bytes()))

    def test_what_cannot_be_read_counts_as_changed(self) -> None:
        self.mark(0, 9 * SECTOR)
        self.device.fail("pread")
        self.device.fail("pread")
        bitmap, told = self.load(self.device)
        self.assertIn("is damaged", told)
        # The whole of the first block could not be read, the second one could.
        self.assertEqual(bitmap.dirty_bytes(), 8 * SECTOR + CHUNK)
        again, told = self.load(self.device.crash(nothing))
        self.assertEqual((told, again.dirty_bytes()), ("", bitmap.dirty_bytes()))

    def test_damage_where_nothing_stands(self) -> None:
        self.device.corrupt(self.area.start + self.area.size - 1, b"\0")
        bitmap, told = self.load(self.device)
        self.assertIn("is damaged", told)
        self.assertIn("nothing stood there", told)
        self.assertEqual(bitmap.dirty_bytes(), 0)
        self.assertEqual(self.load(self.device)[1], "")

    def test_a_crash_while_damage_is_mended(self) -> None:
        random = Random(3)
        for _ in range(60):
            self.mark(*PLACES[::5])
            before = self.marked(self.bitmap)
            for number in random.sample(range(16), 3):
                self.device.corrupt(self.area.start + number * SECTOR_BYTES, bytes(SECTOR_BYTES))
            cut_at_sync(self.device, 0)
            with self.assertRaises(PowerCutError):
                self.load(self.device)
            found, _ = self.load(self.device.crash(at_random(random)))
            self.assertLessEqual(before, self.marked(found))
            self.setUp()

    def test_zeroed(self) -> None:
        self.device.zero(self.area.start, self.area.size, False)
        bitmap, told = self.load(self.device)
        self.assertEqual(bitmap.dirty_bytes(), SIZE)
        self.assertIn(f"bytes 0 to {SIZE - 1} of the LDSU count as changed", told)

    def test_initialised_anew(self) -> None:
        # What the log before has left is not taken for this one's, nor the other way round.
        self.mark(0)
        old, old_area = self.log.superblock, self.stored()
        log = initialise(self.device, sizes=(SIZE,), log=LOG[::-1])
        self.assertEqual(load_bitmap(self.device, log.superblock)[0].dirty_bytes(), 0)
        bitmap = DirtyBitmap(self.area, SIZE, old.log, self.stored())
        self.assertEqual(bitmap.dirty_bytes(), SIZE)
        self.device.corrupt(self.area.start, old_area)
        bitmap, told = load_bitmap(self.device, log.superblock)
        self.assertEqual(bitmap.dirty_bytes(), SIZE)
        self.assertTrue(told)

    def test_initialised_beside_every_size_of_slot(self) -> None:
        # Where another size's slot would stand, something of this log's may stand.
        found = set()
        for size in (MIB // 4, 4 * MIB, 8 * MIB, 64 * MIB, 512 * MIB):
            for physical in (4096, 65536) if size > MIB else (4096,):
                device = MemoryDevice(size, path="/log0", physical_block=physical)
                log = initialise(device, sizes=(SIZE,))
                self.assertEqual(load_bitmap(device, log.superblock)[1], "", (size, physical))
                self.assertEqual(read_superblock(device), log.superblock)
                found.add(log.superblock.slot_bytes)
                device.discard()
        self.assertEqual(found, set(SLOT_BYTES[:3]))

    def test_initialised_whole_or_not(self) -> None:
        # A superblock names the area only once that is valid.
        random = Random(5)
        found = 0
        for turn in range(60):
            device = MemoryDevice(4 * MIB, content=b"\xa5" * (4 * MIB))
            cut_at_sync(device, turn % 3)
            with self.assertRaises(PowerCutError):
                initialise(device, sizes=(SIZE,))
            after = device.crash(at_random(random))
            try:
                log = Writelog.open(after)
            except CorruptError:
                continue
            found += 1
            self.assertEqual(load_bitmap(after, log.superblock)[1], "")
        self.assertGreater(found, 20)

    def test_torn_while_marking(self) -> None:
        # One batch over both blocks, cut off before its sync: none of its writes were issued yet.
        random = Random(7)
        for _ in range(100):
            self.mark(*random.sample(PLACES, 20))
            before = self.marked(self.bitmap)
            cut_at_sync(self.device, 0)
            with self.assertRaises(PowerCutError):
                self.mark(*random.sample(PLACES, 20))
            found, told = self.load(self.device.crash(at_random(random)))
            self.assertEqual(told, "")
            self.assertLessEqual(before, self.marked(found))
            self.assertLessEqual(self.marked(found), self.marked(self.bitmap))
            self.setUp()

    def test_torn_while_clearing(self) -> None:
        random = Random(11)
        for _ in range(100):
            self.mark(*random.sample(PLACES, 40))
            before = self.marked(self.bitmap)
            blocks = self.bitmap.blocks(self.bitmap.clear())
            cut_at_sync(self.device, 0)
            with self.assertRaises(PowerCutError):
                write_blocks(self.device, self.area, blocks)
            after = self.device.crash(at_random(random))
            found, told = self.load(after)
            self.assertEqual(told, "")
            self.assertLessEqual(self.marked(found), before)
            # The next time it is cleared whatever stands there.
            write_blocks(after, self.area, found.blocks(found.clear()))
            self.assertEqual(self.load(after)[0].dirty_bytes(), 0)
            self.setUp()
