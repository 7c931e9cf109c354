"""The dirty bitmap against a naive set of chunks, and its place on a log."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.bitmap import BitmapArea, DirtyBitmap, bitmap_area
from qdsmirror.limits import (
    BITMAP_BITS_MAX,
    BITMAP_BLOCK_BYTES,
    BITMAP_CHUNK_BYTES_MIN,
    GIB,
    KIB,
    MIB,
)

CHUNK = BITMAP_CHUNK_BYTES_MIN


class AreaTests(SynchronousTestCase):
    def test_sizes(self) -> None:
        for ldsu, log, align, size, chunk in (
            (1 * MIB, 150 * KIB, 4096, 4096, CHUNK),
            (256 * MIB, 64 * MIB, 4096, 4096, CHUNK),
            (2 * GIB, 64 * MIB, 4096, 4096, CHUNK),
            (2 * GIB + 1, 64 * MIB, 4096, 8192, CHUNK),
            (64 * GIB, 64 * MIB, 4096, BITMAP_BITS_MAX // 8, CHUNK),
            (64 * GIB + 512, 64 * MIB, 4096, 65536 + 4096, 2 * CHUNK),
            # A small log has a small bitmap of large chunks.
            (64 * GIB, 150 * KIB, 4096, 8192, 16 * CHUNK),
            (1 * MIB, 64 * MIB, 65536, 65536, CHUNK),
        ):
            area = bitmap_area(16384, ldsu, log, align)
            self.assertEqual(area, BitmapArea(16384, size, chunk), (ldsu, log))
            self.assertTrue(area.covers(ldsu))

    def test_what_cannot_be(self) -> None:
        self.assertFalse(BitmapArea(0, 4096, CHUNK).covers(4096 * 8 * CHUNK + 1))
        self.assertFalse(BitmapArea(0, 4096, CHUNK // 2).covers(1))
        self.assertFalse(BitmapArea(0, 4095, CHUNK).covers(1))


class BitmapTests(SynchronousTestCase):
    SIZE = 9000 * CHUNK - 512

    def bitmap(self) -> DirtyBitmap:
        return DirtyBitmap(bitmap_area(0, self.SIZE, GIB, 4096), self.SIZE)

    @settings(max_examples=50)
    @given(
        st.lists(
            st.tuples(
                st.integers(0, SIZE - 1), st.one_of(st.integers(1, 40 * CHUNK), st.just(SIZE))
            ),
            max_size=8,
        )
    )
    def test_like_a_set_of_chunks(self, ranges: list[tuple[int, int]]) -> None:
        bitmap = self.bitmap()
        model: set[int] = set()
        stored = bytearray(bitmap.area.size)
        for offset, wanted in ranges:
            length = min(wanted, self.SIZE - offset)
            new = set(range(offset // CHUNK, (offset + length - 1) // CHUNK + 1))
            blocks = bitmap.mark([(offset, length)])
            self.assertEqual(blocks, sorted({n // (BITMAP_BLOCK_BYTES * 8) for n in new - model}))
            for number in blocks:
                at = number * BITMAP_BLOCK_BYTES
                stored[at : at + BITMAP_BLOCK_BYTES] = bitmap.block(number)
            model |= new
        again = DirtyBitmap(bitmap.area, self.SIZE, bytes(stored))
        for one in (bitmap, again):
            found = {n for n in range(9000) if one.is_marked(n * CHUNK)}
            self.assertEqual(found, model)
            last = 512 if 8999 in model else 0
            self.assertEqual(one.dirty_bytes, len(model) * CHUNK - last)

    def test_clear(self) -> None:
        bitmap = self.bitmap()
        bitmap.mark([(0, self.SIZE)])
        self.assertEqual(bitmap.dirty_bytes, self.SIZE)
        bitmap.clear()
        self.assertEqual(bitmap.dirty_bytes, 0)

    def test_every_short_range(self) -> None:
        for first in range(9):
            for count in range(1, 26):
                bitmap = self.bitmap()
                bitmap.mark([(first * CHUNK, count * CHUNK)])
                found = [n for n in range(40) if bitmap.is_marked(n * CHUNK)]
                self.assertEqual(found, list(range(first, first + count)))
