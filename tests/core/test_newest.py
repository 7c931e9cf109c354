"""The newest of every byte, against writing all in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.frames import TRIM, WRITE, Entry
from qdsmirror.core.newest import newest

SIZE = 40


def entry(number: int, offset: int, length: int, zeroes: bool) -> Entry:
    if zeroes:
        return Entry(offset, length, TRIM, None)
    return Entry(offset, length, WRITE, bytes([number + 1]) * length)


def written(entries: list[Entry]) -> list[int]:
    """Write entries in order; -1 stands where nothing was."""
    content = [-1] * SIZE
    for offset, length, _, payload in entries:
        content[offset : offset + length] = payload if payload is not None else [0] * length
    return content


class NewestTests(SynchronousTestCase):
    @given(
        st.lists(
            st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE), st.booleans()), max_size=12
        )
    )
    def test_the_same_content_each_byte_once(self, drawn: list[tuple[int, int, bool]]) -> None:
        entries = [
            entry(number, offset, min(length, SIZE - offset), zeroes)
            for number, (offset, length, zeroes) in enumerate(drawn)
        ]
        found = newest(entries)
        self.assertEqual(written(found), written(entries))
        ranges = [(one.offset, one.offset + one.length) for one in found]
        self.assertTrue(all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False)))
        self.assertTrue(all(first < end for first, end in ranges))

    def test_parts(self) -> None:
        found = newest([entry(0, 0, 10, False), entry(1, 2, 3, True), entry(2, 4, 2, False)])
        self.assertEqual(
            [(one.offset, one.length, one.kind) for one in found],
            [(0, 2, WRITE), (2, 2, TRIM), (4, 2, WRITE), (6, 4, WRITE)],
        )
        self.assertEqual(bytes(found[2].payload or b""), b"\x03\x03")
        self.assertEqual(newest([]), [])
