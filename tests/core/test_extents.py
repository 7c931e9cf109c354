"""Block status against a model with one flag for every byte."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import frames
from qdsmirror.core.extents import allocation
from qdsmirror.core.frames import Entry
from qdsmirror.core.nbd import STATE_HOLE, STATE_ZERO


class AllocationTests(SynchronousTestCase):
    @settings(max_examples=300)
    @given(
        st.integers(0, 50),
        st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=6),
        st.lists(st.tuples(st.integers(0, 120), st.integers(1, 40)), max_size=8),
        st.integers(1, 100),
    )
    def test_against_bytes(
        self,
        offset: int,
        found: list[tuple[int, bool]],
        written: list[tuple[int, int]],
        length: int,
    ) -> None:
        end = offset + length
        pending = [Entry(at, size, frames.ZEROES, None) for at, size in written]
        pending = [e for e in pending if e.offset < end and offset < e.offset + e.length]
        # What the device does not tell counts as data.
        flags = [0] * length
        at = 0
        for size, allocated in found:
            for byte in range(at, min(at + size, length)):
                flags[byte] = 0 if allocated else STATE_HOLE | STATE_ZERO
            at += size
        for e in pending:
            for byte in range(max(e.offset, offset), min(e.offset + e.length, end)):
                flags[byte - offset] = 0
        result = allocation(offset, length, found, pending)
        self.assertEqual([f for size, f in result for _ in range(size)], flags)
        self.assertTrue(all(size > 0 for size, _ in result))
        self.assertTrue(all(a[1] != b[1] for a, b in zip(result, result[1:], strict=False)))

    def test_many_of_both(self) -> None:
        # Each extent looked at once: 4096 extents and 4096 entries take 8192 steps.
        found = [(1024, bool(n % 2)) for n in range(4096)]
        pending = [Entry(1024 * n, 512, frames.WRITE, None) for n in range(4096)]
        result = allocation(0, 4096 * 1024, found, pending)
        self.assertEqual(len(result), 4097)
        self.assertEqual(sum(size for size, flags in result if flags), 2048 * 512)
