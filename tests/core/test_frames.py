"""The frame codec: round trips, damage, limits."""

from __future__ import annotations

from typing import Any

from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import frames
from qdsmirror.core.frames import (
    ENTRIES,
    ENTRY_BYTES,
    GENESIS,
    HEADER_BYTES,
    NUMBERS_END,
    REFRESH_BEGIN,
    REFRESH_END,
    VERIFY,
    VERIFY_ROW,
    VOID,
    WITH_PAYLOAD,
    Entry,
    build_header,
    chain_follows,
    check_body,
    control_payload,
    entries,
    entry_table,
    parse_header,
)
from qdsmirror.errors import CorruptError, LimitError
from qdsmirror.limits import (
    FRAME_ENTRIES_MAX,
    FRAME_PAYLOAD_BYTES_MAX,
    VERIFY_ROWS_MAX,
    ZERO_ENTRY_BYTES_MAX,
)

GENERATION = bytes(range(16))

OFFSETS = st.integers(0, (1 << 62))
ENTRY = st.one_of(
    st.builds(
        lambda offset, kind, payload: Entry(offset, len(payload), kind, payload),
        OFFSETS,
        st.sampled_from(sorted(WITH_PAYLOAD)),
        st.binary(min_size=1, max_size=40),
    ),
    st.builds(
        lambda offset, kind, length: Entry(offset, length, kind, None),
        OFFSETS,
        st.sampled_from([frames.ZEROES, frames.TRIM, frames.REFRESH_ZEROES, frames.ZERO_WRITE]),
        st.integers(1, ZERO_ENTRY_BYTES_MAX),
    ),
)


def row(offset: int, length: int, kind: int) -> bytes:
    return entry_table([Entry(offset, length, kind, None)])


def make(found: list[Entry], previous: bytes = GENESIS, **changes: Any) -> bytes:
    body = [entry_table(found)]
    body += [bytes(e.payload) for e in found if e.payload is not None]
    fields: dict[str, Any] = {
        "kind": ENTRIES,
        "ldsu": 3,
        "generation": GENERATION,
        "sequence": 7,
        "gsn_first": 40,
        "gsn_count": len(found),
        "durable_gsn": 39,
        "time_ns": 5,
        "previous_chain": previous,
        "entry_count": len(found),
        "body": body,
    }
    fields.update(changes)
    header, _ = build_header(**fields)
    return header + b"".join(fields["body"])


ONE = [Entry(4096, 3, frames.WRITE, b"abc"), Entry(0, 4096, frames.TRIM, None)]


class CodecTests(SynchronousTestCase):
    @given(st.lists(ENTRY, min_size=1, max_size=8), st.binary(min_size=16, max_size=16))
    def test_round_trip(self, found: list[Entry], previous: bytes) -> None:
        raw = make(found, previous)
        header = parse_header(b"xy" + raw, 2)
        self.assertEqual(header.frame_bytes, len(raw))
        self.assertEqual((header.ldsu, header.sequence, header.durable_gsn), (3, 7, 39))
        self.assertEqual((header.gsn_first, header.gsn_last), (40, 39 + len(found)))
        self.assertEqual(header.generation, GENERATION)
        check_body(header, raw)
        self.assertEqual(entries(header, raw), found)
        self.assertTrue(chain_follows(header, raw, previous))
        other = previous[:15] + bytes([previous[15] ^ 1])
        self.assertFalse(chain_follows(header, raw, other))

    def test_control_frames(self) -> None:
        for kind, payload in ((VOID, b""), (REFRESH_BEGIN, GENERATION), (REFRESH_END, GENERATION)):
            raw = make([], kind=kind, gsn_count=1, body=[payload])
            header = parse_header(raw)
            self.assertEqual(control_payload(header, raw), payload)

    def test_body_of_a_control_frame_is_fixed(self) -> None:
        for kind, payload in ((VOID, b"x"), (REFRESH_BEGIN, b"short"), (REFRESH_END, bytes(17))):
            with self.assertRaisesRegex(CorruptError, "no such body"):
                parse_header(make([], kind=kind, gsn_count=1, body=[payload]))
        with self.assertRaisesRegex(CorruptError, "no such body"):
            parse_header(make(ONE, kind=VOID, gsn_count=1))

    def test_a_verify_holds_whole_rows_and_no_more_than_there_may_be(self) -> None:
        for count in (1, VERIFY_ROWS_MAX):
            raw = make([], kind=VERIFY, gsn_count=1, body=[bytes(VERIFY_ROW.size * count)])
            self.assertEqual(
                control_payload(parse_header(raw), raw), bytes(VERIFY_ROW.size * count)
            )
        for length in (0, 1, VERIFY_ROW.size + 1, VERIFY_ROW.size * (VERIFY_ROWS_MAX + 1)):
            with self.assertRaisesRegex(CorruptError, "no such body"):
                parse_header(make([], kind=VERIFY, gsn_count=1, body=[bytes(length)]))

    @given(st.binary(max_size=3 * HEADER_BYTES))
    def test_arbitrary_bytes(self, raw: bytes) -> None:
        with self.assertRaises(CorruptError):
            parse_header(raw)

    @settings(max_examples=300)
    @given(st.binary(min_size=HEADER_BYTES - 14, max_size=HEADER_BYTES - 14), st.integers(0, 8))
    def test_arbitrary_bytes_with_a_right_checksum(self, raw: bytes, kind: int) -> None:
        head = frames.MAGIC + b"\0\1" + raw
        head = head[:10] + bytes([kind]) + head[11 : HEADER_BYTES - 4]
        try:
            header = parse_header(head + crc32c(head).to_bytes(4, "big"))
        except (CorruptError, LimitError):
            return
        self.assertLessEqual(header.entry_count, FRAME_ENTRIES_MAX)
        self.assertLessEqual(header.payload_bytes, FRAME_PAYLOAD_BYTES_MAX)
        self.assertLess(header.gsn_last, NUMBERS_END)

    @settings(max_examples=300)
    @given(st.data())
    def test_arbitrary_body_with_right_checksums(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, 4))
        body = data.draw(st.binary(min_size=count * ENTRY_BYTES, max_size=count * ENTRY_BYTES + 40))
        raw = make([], entry_count=count, gsn_count=count, body=[body])
        header = parse_header(raw)
        check_body(header, raw)
        try:
            found = entries(header, raw)
        except CorruptError:
            return
        payload = sum(len(e.payload) for e in found if e.payload is not None)
        self.assertEqual(payload, header.payload_bytes)
        self.assertTrue(all(e.length == len(e.payload) for e in found if e.payload is not None))

    def test_an_entry_of_no_range(self) -> None:
        for offset, length in ((0, 0), (NUMBERS_END - 512, 512), ((1 << 64) - 512, 512)):
            raw = make([], entry_count=1, gsn_count=1, body=[row(offset, length, frames.TRIM)])
            with self.assertRaisesRegex(CorruptError, f"{length} bytes at {offset}"):
                entries(parse_header(raw), raw)

    def test_every_flipped_bit_is_noticed(self) -> None:
        raw = make(ONE)
        for bit in range(8 * len(raw)):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            with self.assertRaises(CorruptError):
                check_body(parse_header(flipped), flipped)

    def test_truncated(self) -> None:
        raw = make(ONE)
        for length in range(len(raw)):
            with self.assertRaises(CorruptError):
                check_body(parse_header(raw[:length]), raw[:length])

    def test_the_chain_covers_header_body_and_the_past(self) -> None:
        chains = {
            parse_header(raw).chain
            for raw in (
                make(ONE),
                make(ONE, time_ns=6),
                make(ONE, sequence=8),
                make(ONE[:1]),
                make(ONE, previous=bytes(15) + b"\1"),
            )
        }
        self.assertEqual(len(chains), 5)

    def test_limits(self) -> None:
        too_many = FRAME_ENTRIES_MAX + 1
        with self.assertRaises(LimitError):
            parse_header(
                make([], entry_count=too_many, gsn_count=too_many, body=[bytes(16 * too_many)])
            )
        with self.assertRaises(LimitError):
            parse_header(make([], gsn_count=1, body=[bytes(FRAME_PAYLOAD_BYTES_MAX + 1)]))

    def test_numbers(self) -> None:
        for wrong in (
            {"sequence": 0},
            {"sequence": NUMBERS_END},
            {"gsn_first": 0},
            {"gsn_count": 0},
            {"gsn_count": 3},
            {"gsn_first": NUMBERS_END - 1},
            {"kind": 0},
            {"kind": 5},
        ):
            with self.assertRaises(CorruptError, msg=str(wrong)):
                parse_header(make(ONE, **wrong))
        with self.assertRaises(CorruptError):
            parse_header(make([], kind=VOID, gsn_count=NUMBERS_END, body=[]))

    def test_another_version_is_named(self) -> None:
        raw = bytearray(make(ONE)[:HEADER_BYTES])
        raw[9] = 2
        raw[-4:] = crc32c(raw[:-4]).to_bytes(4, "big")
        with self.assertRaisesRegex(CorruptError, "version 2 is unknown here"):
            parse_header(raw)

    def test_entries_that_do_not_fit_their_frame(self) -> None:
        for table in (
            row(0, 4, frames.WRITE),
            row(0, (1 << 32) - 1, frames.WRITE),
            row(0, 0, frames.WRITE),
            row(0, 3, 9),
            row(0, ZERO_ENTRY_BYTES_MAX + 1, frames.ZEROES),
        ):
            raw = make([], entry_count=1, gsn_count=1, body=[table, b"abc"])
            with self.assertRaises(CorruptError):
                entries(parse_header(raw), raw)

    def test_a_zero_entry_is_bounded(self) -> None:
        for more in (0, 1):
            table = row(0, ZERO_ENTRY_BYTES_MAX + more, frames.ZEROES)
            raw = make([], entry_count=1, gsn_count=1, body=[table])
            if more:
                with self.assertRaises(CorruptError):
                    entries(parse_header(raw), raw)
            else:
                self.assertEqual(len(entries(parse_header(raw), raw)), 1)
