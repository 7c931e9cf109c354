"""The dirty bitmap against a naive set of chunks, its place on a log, and damage to it."""

from __future__ import annotations

from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.bitmap import SECTOR_BITS, SECTOR_BYTES, BitmapArea, DirtyBitmap, bitmap_area
from qdsmirror.limits import (
    BITMAP_BLOCK_BYTES,
    BITMAP_CHUNK_BYTES_MIN,
    GIB,
    KIB,
    MIB,
)

CHUNK = BITMAP_CHUNK_BYTES_MIN
BLOCK_BITS = SECTOR_BITS * BITMAP_BLOCK_BYTES // SECTOR_BYTES
LOG = bytes(range(100, 116))


class AreaTests(SynchronousTestCase):
    def test_sizes(self) -> None:
        for ldsu, log, align, size, chunk in (
            (1 * MIB, 150 * KIB, 4096, 4096, CHUNK),
            (256 * MIB, 64 * MIB, 4096, 4096, CHUNK),
            (BLOCK_BITS * CHUNK, 64 * MIB, 4096, 4096, CHUNK),
            (BLOCK_BITS * CHUNK + 1, 64 * MIB, 4096, 8192, CHUNK),
            (64 * GIB, 64 * MIB, 4096, 33 * 4096, CHUNK),
            (64 * GIB + 512, 64 * MIB, 4096, 17 * 4096, 2 * CHUNK),
            # A small log has a small bitmap of large chunks.
            (64 * GIB, 150 * KIB, 4096, 2 * 4096, 32 * CHUNK),
            (1 * MIB, 64 * MIB, 65536, 65536, CHUNK),
            (64 * GIB, 64 * MIB, 65536, 3 * 65536, CHUNK),
        ):
            area = bitmap_area(16384, ldsu, log, align)
            self.assertEqual(area, BitmapArea(16384, size, chunk), (ldsu, log))
            self.assertTrue(area.covers(ldsu))

    def test_what_cannot_be(self) -> None:
        self.assertTrue(BitmapArea(0, 4096, CHUNK).covers(BLOCK_BITS * CHUNK))
        self.assertFalse(BitmapArea(0, 4096, CHUNK).covers(BLOCK_BITS * CHUNK + 1))
        self.assertFalse(BitmapArea(0, 4096, CHUNK // 2).covers(1))
        self.assertFalse(BitmapArea(0, 4095, CHUNK).covers(1))


def content(bitmap: DirtyBitmap) -> bytes:
    """The whole area as it is to be stored."""
    return b"".join(block for _, block in bitmap.blocks(range(bitmap.area.blocks)))


def marks(bitmap: DirtyBitmap, chunks: int) -> set[int]:
    return {number for number in range(chunks) if bitmap.is_marked(number * CHUNK)}


class BitmapTests(SynchronousTestCase):
    CHUNKS = BLOCK_BITS + 9000
    SIZE = CHUNKS * CHUNK - 512

    def bitmap(self) -> DirtyBitmap:
        return DirtyBitmap(bitmap_area(0, self.SIZE, GIB, 4096), self.SIZE, LOG)

    @settings(max_examples=50, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.integers(0, SIZE - 1), st.one_of(st.integers(1, 40 * CHUNK), st.just(SIZE))
            ),
            max_size=6,
        )
    )
    def test_like_a_set_of_chunks(self, ranges: list[tuple[int, int]]) -> None:
        bitmap = self.bitmap()
        model: set[int] = set()
        stored = bytearray(content(bitmap))
        for offset, wanted in ranges:
            length = min(wanted, self.SIZE - offset)
            new = set(range(offset // CHUNK, (offset + length - 1) // CHUNK + 1))
            blocks = bitmap.mark([(offset, length)])
            self.assertEqual(blocks, sorted({n // BLOCK_BITS for n in new - model}))
            for number, block in bitmap.blocks(blocks):
                at = number * BITMAP_BLOCK_BYTES
                stored[at : at + BITMAP_BLOCK_BYTES] = block
            model |= new
        again = DirtyBitmap(bitmap.area, self.SIZE, LOG, bytes(stored))
        for one in (bitmap, again):
            self.assertEqual(marks(one, self.CHUNKS), model)
            self.assertEqual(one.damaged, [])
            last = 512 if self.CHUNKS - 1 in model else 0
            self.assertEqual(one.dirty_bytes(), len(model) * CHUNK - last)

    @given(st.sets(st.integers(0, 40)), st.integers(0, 41 * CHUNK - 512))
    def test_dirty_from_a_byte_on(self, chunks: set[int], first: int) -> None:
        size = 41 * CHUNK - 512
        bitmap = DirtyBitmap(bitmap_area(0, size, GIB, 4096), size, LOG)
        bitmap.mark((number * CHUNK, 1) for number in chunks)
        sectors = [at for at in range(first // 512 * 512, size, 512) if at // CHUNK in chunks]
        found = []
        offset = first
        while (run := bitmap.next_dirty(offset)) is not None:
            start, end = run
            self.assertLessEqual(offset, start)
            self.assertLess(start, end)
            self.assertFalse(end < size and bitmap.is_marked(end))
            found += range(start // 512 * 512, end, 512)
            offset = end
        self.assertEqual(found, sectors)
        dirty = len(sectors) * 512 - (first % 512 if first // CHUNK in chunks else 0)
        self.assertEqual(bitmap.dirty_bytes(first), dirty)
        self.assertEqual(bitmap.dirty_bytes(size), 0)

    @settings(max_examples=50, deadline=None)
    @given(
        st.sets(st.integers(0, CHUNKS - 1), max_size=50),
        st.sets(st.integers(0, CHUNKS - 1), max_size=50),
    )
    def test_keep_what_another_has(self, ours: set[int], other: set[int]) -> None:
        bitmap, young = self.bitmap(), self.bitmap()
        bitmap.mark([(n * CHUNK, 1) for n in ours])
        young.mark([(n * CHUNK, 1) for n in other])
        changed = bitmap.keep(young)
        self.assertEqual(marks(bitmap, self.CHUNKS), ours & other)
        self.assertEqual(marks(young, self.CHUNKS), other)
        self.assertEqual(changed, sorted({n // BLOCK_BITS for n in ours - other}))

    def test_blocks_that_are_marked_already_are_not_given(self) -> None:
        bitmap = self.bitmap()
        self.assertEqual(bitmap.mark([(BLOCK_BITS * CHUNK, 9000 * CHUNK - 512)]), [1])
        self.assertEqual(bitmap.mark([(0, self.SIZE)]), [0])
        self.assertEqual(bitmap.mark([(0, self.SIZE)]), [])

    def test_clear(self) -> None:
        bitmap = self.bitmap()
        bitmap.mark([(0, self.SIZE)])
        self.assertEqual(bitmap.dirty_bytes(), self.SIZE)
        self.assertEqual(bitmap.clear(), [0, 1])
        self.assertEqual(bitmap.dirty_bytes(), 0)
        self.assertEqual(content(bitmap), content(self.bitmap()))

    def test_every_short_range(self) -> None:
        for first in range(9):
            for count in range(1, 26):
                bitmap = self.bitmap()
                bitmap.mark([(first * CHUNK, count * CHUNK)])
                found = [n for n in range(40) if bitmap.is_marked(n * CHUNK)]
                self.assertEqual(found, list(range(first, first + count)))


class DamageTests(SynchronousTestCase):
    """Whatever is not what was stored there last, or was, counts as dirty."""

    #: The fifth sector stands for a few chunks only, those behind it for none.
    CHUNKS = 4 * SECTOR_BITS + 17
    SIZE = CHUNKS * CHUNK - 4096
    AREA = bitmap_area(0, SIZE, GIB, 4096)
    DIRTY = frozenset({0, 7, SECTOR_BITS - 1, 2 * SECTOR_BITS + 5, CHUNKS - 1})

    def setUp(self) -> None:
        self.bitmap = DirtyBitmap(self.AREA, self.SIZE, LOG)
        self.clean = content(self.bitmap)
        self.bitmap.mark((number * CHUNK, 1) for number in self.DIRTY)
        self.stored = content(self.bitmap)
        self.sectors = self.AREA.size // SECTOR_BYTES

    def load(self, stored: bytes, log: bytes = LOG) -> DirtyBitmap:
        return DirtyBitmap(self.AREA, self.SIZE, log, stored)

    def sector(self, number: int, stored: bytes | None = None) -> bytes:
        return (stored or self.stored)[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES]

    def chunks_of(self, sectors: list[int]) -> set[int]:
        of = (range(SECTOR_BITS * n, min(SECTOR_BITS * (n + 1), self.CHUNKS)) for n in sectors)
        return {chunk for chunks in of for chunk in chunks}

    def check(self, stored: bytes, damaged: list[int]) -> None:
        found = self.load(stored)
        self.assertEqual(found.damaged, damaged)
        expected = self.DIRTY | self.chunks_of(damaged)
        self.assertEqual(marks(found, self.CHUNKS), expected)
        short = 4096 if self.CHUNKS - 1 in expected else 0
        self.assertEqual(found.dirty_bytes(), len(expected) * CHUNK - short)
        ranges = [range(first, end) for first, end in found.damaged_ranges]
        told = {n for n in range(self.CHUNKS) if any(n * CHUNK in r for r in ranges)}
        self.assertEqual(told, self.chunks_of(damaged))
        # Stored again it is valid, and still all dirty.
        again = self.load(content(found))
        self.assertEqual((again.damaged, content(again)), ([], content(found)))

    def test_every_bit(self) -> None:
        image = bytearray(self.stored)
        for bit in range(8 * len(image)):
            image[bit // 8] ^= 1 << bit % 8
            number = bit // 8 // SECTOR_BYTES
            found = self.load(bytes(image))
            self.assertEqual(found.damaged, [number], bit)
            if number <= self.CHUNKS // SECTOR_BITS:
                first = number * SECTOR_BITS * CHUNK
                end = min(first + SECTOR_BITS * CHUNK, self.SIZE)
                self.assertEqual(found.damaged_ranges, [(first, end)])
                self.assertTrue(found.is_marked(first) and found.is_marked(end - 1))
            else:
                self.assertEqual(found.damaged_ranges, [])
            image[bit // 8] ^= 1 << bit % 8

    def test_a_bit_of_each_sector(self) -> None:
        for number in range(self.sectors):
            image = bytearray(self.stored)
            image[number * SECTOR_BYTES + 9] ^= 0x80
            self.check(bytes(image), [number])

    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_any_other_bytes(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, self.sectors - 1))
        start = data.draw(st.integers(0, SECTOR_BYTES - 1))
        other = data.draw(st.binary(min_size=1, max_size=SECTOR_BYTES - start))
        at = number * SECTOR_BYTES + start
        stored = self.stored[:at] + other + self.stored[at + len(other) :]
        self.check(stored, [number] if stored != self.stored else [])

    def test_zeroes_are_not_clean(self) -> None:
        for number in range(self.sectors):
            at = number * SECTOR_BYTES
            gone = self.stored[:at] + bytes(SECTOR_BYTES) + self.stored[at + SECTOR_BYTES :]
            self.check(gone, [number])
        self.check(bytes(self.AREA.size), list(range(self.sectors)))

    def test_swapped_sectors(self) -> None:
        # Also two clean ones: their content is the same but for the number.
        for one, two in ((0, 2), (1, 3), (6, 7)):
            pieces = [self.sector(number) for number in range(self.sectors)]
            pieces[one], pieces[two] = pieces[two], pieces[one]
            self.check(b"".join(pieces), [one, two])

    def test_sectors_of_another_log(self) -> None:
        other = content(DirtyBitmap(self.AREA, self.SIZE, bytes(16)))
        for number in range(self.sectors):
            at = number * SECTOR_BYTES
            stale = self.sector(number, other)
            self.check(self.stored[:at] + stale + self.stored[at + SECTOR_BYTES :], [number])
        self.assertEqual(self.load(self.stored, LOG[::-1]).damaged, list(range(self.sectors)))

    def test_torn_between_sectors(self) -> None:
        # Marking, and clearing: each sector is as it was or as it was to be, so all are valid.
        for kept in range(1 << self.sectors):
            torn = b"".join(
                self.sector(number, self.stored if kept >> number & 1 else self.clean)
                for number in range(self.sectors)
            )
            found = self.load(torn)
            self.assertEqual(found.damaged, [])
            there = self.chunks_of([n for n in range(self.sectors) if kept >> n & 1])
            self.assertEqual(
                {number for number in self.DIRTY if found.is_marked(number * CHUNK)},
                self.DIRTY & there,
            )

    def test_the_stored_form(self) -> None:
        sector = self.sector(2)
        self.assertEqual(sector[:8], b"QDSDIRTY")
        self.assertEqual(sector[8:508], b"\x20".ljust(500, b"\0"))
        crc = crc32c(LOG + (2).to_bytes(8, "big") + sector[:508])
        self.assertEqual(sector[508:], crc.to_bytes(4, "big"))
