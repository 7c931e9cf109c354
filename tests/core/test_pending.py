"""Read-your-writes against a plain copy of the device."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import frames
from qdsmirror.core.frames import Entry
from qdsmirror.core.pending import GRANULE_SHIFT, PendingIndex, overlay

GRANULE = 1 << GRANULE_SHIFT
SIZE = 70 * GRANULE
OFFSET = st.one_of(
    st.integers(0, SIZE - 1),
    st.integers(0, 69).map(lambda n: n * GRANULE),
    st.integers(1, 69).map(lambda n: n * GRANULE - 1),
)


@st.composite
def batches(draw: st.DrawFn) -> list[Entry]:
    found = []
    for _ in range(draw(st.integers(1, 4))):
        offset = draw(OFFSET)
        if draw(st.booleans()):
            length = min(draw(st.integers(1, 3 * GRANULE)), SIZE - offset)
            payload = bytes([draw(st.integers(1, 255))]) * length
            found.append(Entry(offset, length, frames.WRITE, payload))
        else:
            length = min(draw(st.sampled_from([1, GRANULE, 64 * GRANULE, SIZE])), SIZE - offset)
            found.append(Entry(offset, length, frames.ZEROES, None))
    return found


class PendingTests(SynchronousTestCase):
    @settings(max_examples=60, deadline=None)
    @given(st.lists(batches(), max_size=6), st.data())
    def test_against_a_list(self, added: list[list[Entry]], data: st.DataObject) -> None:
        index = PendingIndex()
        waiting: list[Entry] = []
        batch: list[list[Entry]] = []
        for entries in added:
            index.add(entries)
            waiting += entries
            batch.append(entries)
            if data.draw(st.booleans()):
                oldest = batch.pop(0)
                index.remove(oldest)
                del waiting[: len(oldest)]
            offset = data.draw(OFFSET)
            length = min(data.draw(st.sampled_from([1, 512, GRANULE, SIZE])), SIZE - offset)
            touching = [
                e for e in waiting if e.offset < offset + length and offset < e.offset + e.length
            ]
            found = index.overlapping(offset, length)
            self.assertEqual([id(e) for e in found], [id(e) for e in touching])
            if any(e.length for e in waiting):
                self.assertTrue(index)
        for entries in batch:
            index.remove(entries)
        self.assertFalse(index)
        self.assertEqual(index.overlapping(0, SIZE), [])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(batches(), max_size=4), OFFSET, st.sampled_from([1, 700, GRANULE, 2 * GRANULE]))
    def test_overlay(self, added: list[list[Entry]], offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        index = PendingIndex()
        disk = bytearray(b"\xee" * SIZE)
        base = bytearray(disk[offset : offset + length])
        for entries in added:
            index.add(entries)
            for where, size, _, payload in entries:
                disk[where : where + size] = bytes(size) if payload is None else payload
        overlay(base, offset, index.overlapping(offset, length))
        self.assertEqual(base, disk[offset : offset + length])
