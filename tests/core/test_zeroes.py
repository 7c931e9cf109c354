"""A payload of zeroes is told from any other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.zeroes import is_zero


class ZeroTests(SynchronousTestCase):
    def test_lengths(self) -> None:
        for length in (1, 2, 511, 512, 513, 4096, 65535, 65536, 65537, 1 << 20):
            for kind in (bytes, bytearray, lambda n: memoryview(bytes(n))):
                self.assertTrue(is_zero(kind(length)))
        self.assertFalse(is_zero(b""))

    @given(st.integers(1, 200_000), st.data())
    def test_any_byte_counts(self, length: int, data: st.DataObject) -> None:
        content = bytearray(length)
        content[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(1, 255))
        for one in (content, bytes(content), memoryview(content)):
            self.assertFalse(is_zero(one))
