"""The records of before-images, and how much of a journal they get."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.beforeimage import (
    BLOCK_BYTES,
    ROWS_MAX,
    Image,
    Part,
    Period,
    area_bytes,
    pack_record,
    parse_block,
    record_bytes,
)
from qdsmirror.errors import CorruptError
from qdsmirror.limits import BEFORE_AREA_BYTES_MIN, BEFORE_CHUNK_BYTES, MIB

LOG, PERIOD = b"L" * 16, b"P" * 16
images = st.builds(
    lambda ldsu, offset, data, zeroes: Image(ldsu, offset, len(data), None if zeroes else data),
    st.integers(0, 4095),
    st.integers(0, 1 << 60),
    st.binary(min_size=1, max_size=64),
    st.booleans(),
)


class RecordTests(SynchronousTestCase):
    @given(st.lists(images, min_size=1, max_size=ROWS_MAX), st.integers(0, 1 << 60))
    def test_there_and_back(self, kept: list[Image], number: int) -> None:
        raw = b"".join(pack_record(LOG, PERIOD, number, kept))
        found, table = parse_block(raw[:BLOCK_BYTES], LOG, PERIOD)
        self.assertEqual(found, number)
        self.assertEqual(
            table.parts, [Part(i.ldsu, i.offset, i.length, i.data is not None) for i in kept]
        )
        self.assertEqual(raw[BLOCK_BYTES:], b"".join(i.data or b"" for i in kept))
        self.assertEqual(table.payload_bytes, len(raw) - BLOCK_BYTES)
        whole = record_bytes(kept, 4096)
        self.assertTrue(len(raw) <= whole < len(raw) + 4096 and not whole % 4096)

    def test_of_another_time_or_log_or_damaged(self) -> None:
        raw = pack_record(LOG, PERIOD, 0, [Image(0, 0, 4, b"abcd")])[0]
        for wrong in ((b"x" * 16, PERIOD), (LOG, b"x" * 16)):
            self.assertRaises(CorruptError, parse_block, raw, *wrong)
        for at in (0, 9, 30, 70, 4000, 4095):
            damaged = bytearray(raw)
            damaged[at] ^= 1
            self.assertRaises(CorruptError, parse_block, damaged, LOG, PERIOD)
        self.assertRaises(CorruptError, parse_block, bytes(BLOCK_BYTES), LOG, PERIOD)

    def test_a_period_there_and_back(self) -> None:
        period = Period("ab" * 16, 812, {"id": "x"}, "used up")
        self.assertEqual(Period.from_json(period.to_json()), period)
        self.assertIsNone(Period.from_json(None))
        for wrong in ({"id": "ab"}, {"gsn": -1}, {"lost": 3}, {"bypass": 3}, {"more": 1}):
            with self.assertRaises((ValueError, TypeError)):
                Period.from_json({**period.to_json(), **wrong})


class AreaTests(SynchronousTestCase):
    def test_no_more_than_is_wanted_needed_or_spare(self) -> None:
        self.assertEqual(area_bytes(8 * MIB, [64 * MIB], 32 * MIB, 4096), 8 * MIB)
        self.assertEqual(area_bytes(64 * MIB, [256 * MIB], 32 * MIB, 4096), 32 * MIB)
        needed = 16 * (BEFORE_CHUNK_BYTES + BLOCK_BYTES)
        self.assertEqual(area_bytes(64 * MIB, [MIB], 32 * MIB, 4096), needed)
        self.assertEqual(area_bytes(0, [MIB], 32 * MIB, 4096), 0)
        self.assertEqual(area_bytes(64 * MIB, [MIB], -5, 4096), 0)
        self.assertEqual(area_bytes(64 * MIB, [MIB], BEFORE_AREA_BYTES_MIN - 1, 4096), 0)
