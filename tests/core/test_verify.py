"""What a VERIFY frame holds, what is reported of one, and what is kept of the differences."""

from __future__ import annotations

import json

from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.frames import NUMBERS_END, VERIFY_ROW
from qdsmirror.core.verify import (
    ZEROES,
    Found,
    Kept,
    Row,
    Verdict,
    joined,
    pack_rows,
    parse_rows,
    rows_of,
)
from qdsmirror.errors import CorruptError, ProtocolError
from qdsmirror.limits import (
    VERIFY_CHUNK_BYTES,
    VERIFY_KEPT_MAX,
    VERIFY_RANGES_MAX,
    VERIFY_ROWS_MAX,
    VERIFY_ZERO_BYTES_MAX,
)

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=20)


class RowTests(SynchronousTestCase):
    def test_round_trip(self) -> None:
        rows = [Row(4096, 512, b"d" * 32), Row(1 << 40, VERIFY_ZERO_BYTES_MAX, ZEROES)]
        self.assertEqual(parse_rows(pack_rows(rows)), rows)
        self.assertEqual(len(pack_rows(rows)), 2 * VERIFY_ROW.size)

    def test_rows_of_a_range(self) -> None:
        length = 2 * VERIFY_CHUNK_BYTES + 512
        digests = [blake3(bytes([n])).digest() for n in range(3)]
        rows = rows_of(8192, length, b"".join(digests))
        self.assertEqual([row.digest for row in rows], digests)
        self.assertEqual([row.length for row in rows], [VERIFY_CHUNK_BYTES] * 2 + [512])
        self.assertEqual(rows[2].offset, 8192 + 2 * VERIFY_CHUNK_BYTES)

    def test_impossible_ranges_are_refused(self) -> None:
        for row in (
            Row(0, 0, b"d" * 32),
            Row(0, VERIFY_CHUNK_BYTES + 1, b"d" * 32),
            Row(0, VERIFY_ZERO_BYTES_MAX + 1, ZEROES),
            Row(NUMBERS_END - 512, 512, b"d" * 32),
        ):
            with self.assertRaises(CorruptError):
                parse_rows(pack_rows([row]))

    def test_one_read_fits_one_frame(self) -> None:
        self.assertLess(VERIFY_ROWS_MAX * VERIFY_ROW.size, 3500)


class VerdictTests(SynchronousTestCase):
    def test_round_trip(self) -> None:
        for verdict in (
            Verdict(7, 0, []),
            Verdict(8, 3, [(0, 512), (4096, 4096)]),
            Verdict(9, 0, [], "a reason"),
            Verdict(9, 0, [], more=True, again=True),
            Verdict(9, 0, [(0, 512)], again=True),
        ):
            self.assertEqual(Verdict.from_json(verdict.to_json()), verdict)

    def test_another_form_is_refused(self) -> None:
        for body in (
            {},
            {"gsn": 1, "differs": []},
            {"gsn": 1, "ldsu": -1, "differs": []},
            {"ldsu": 0, "gsn": "1", "differs": []},
            {"ldsu": 0, "gsn": 1, "differs": [[1]]},
            {"ldsu": 0, "gsn": 1, "differs": [[1, -2]]},
            {"ldsu": 0, "gsn": True, "differs": []},
            {"ldsu": 0, "gsn": 1, "differs": 5},
            {"ldsu": 0, "gsn": 1, "differs": [["a", "b"]]},
            {"ldsu": 0, "gsn": 1, "differs": [], "skipped": 1},
        ):
            with self.assertRaises(ProtocolError):
                Verdict.from_json(body)


class KeptTests(SynchronousTestCase):
    def test_what_was_found_is_told_again(self) -> None:
        kept = Kept(None)
        self.assertEqual(kept.verdicts(5), [])
        kept.add(1, [(4096, 512)])
        kept.add(0, [(0, 512)])
        kept.add(1, [(4608, 512)])
        again = Kept(json.loads(json.dumps(kept.to_json())))
        self.assertEqual(
            again.verdicts(5),
            [
                Verdict(5, 1, [(4096, 1024)], again=True),
                Verdict(5, 0, [(0, 512)], again=True),
            ],
        )

    def test_that_there_is_more_than_can_be_kept(self) -> None:
        kept = Kept(None)
        for number in range(VERIFY_KEPT_MAX + 3):
            kept.add(number % 2, [(number * 1024, 512)])
        self.assertEqual(len(kept.to_json()["ranges"]), VERIFY_KEPT_MAX)
        last = Kept(kept.to_json()).verdicts(5)[-1]
        self.assertEqual(last, Verdict(5, 0, more=True, again=True))


class FoundTests(SynchronousTestCase):
    @given(RANGES)
    def test_joined_is_what_a_set_says(self, ranges: list[tuple[int, int]]) -> None:
        named = {at for offset, length in ranges for at in range(offset, offset + length)}
        found = joined(ranges)
        self.assertEqual(
            [at for offset, length in found for at in range(offset, offset + length)],
            sorted(named),
        )
        for (first, length), (second, _) in zip(found, found[1:], strict=False):
            self.assertLess(first + length, second)

    def test_all_is_counted_and_the_first_ranges_kept(self) -> None:
        found = Found()
        for number in range(3 * VERIFY_RANGES_MAX):
            found.add([(number * 1024, 512)])
            found.settle(number * 1024 + 512)
        self.assertEqual(found.bytes, 3 * VERIFY_RANGES_MAX * 512)
        self.assertEqual(found.ranges, [(n * 1024, 512) for n in range(VERIFY_RANGES_MAX)])

    def test_what_is_not_yet_verified_before_is_counted_apart(self) -> None:
        found = Found(512, [[0, 512]])
        found.add([(4096, 512), (8192, 512)])
        found.settle(8192)
        self.assertEqual((found.bytes, found.total), (1024, 1536))
        self.assertEqual(found.ranges, [(0, 512), (4096, 512)])
        self.assertEqual(found.shown, [(0, 512), (4096, 512), (8192, 512)])
