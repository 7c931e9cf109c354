"""The messages between driver and pmd."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import watermark
from qdsmirror.core.records import Point
from qdsmirror.core.watermark import (
    COMMITTED,
    DURABLE,
    GENERATIONS,
    LINK,
    REBASE_KNOWN,
    REFRESH,
    Committed,
    WatermarkParser,
    pack_committed,
    pack_durable,
    pack_json,
    pack_rebase_known,
    parse_committed,
    parse_durable,
    parse_json,
)
from qdsmirror.errors import ProtocolError
from qdsmirror.limits import LDSUS_PER_GROUP_MAX

NUMBER = st.integers(0, (1 << 64) - 1)
INDEX = st.integers(0, (1 << 32) - 1)
CHAIN = st.binary(min_size=16, max_size=16)


class WatermarkTests(SynchronousTestCase):
    @given(
        NUMBER,
        st.lists(st.tuples(INDEX, NUMBER), max_size=5),
        st.tuples(NUMBER, NUMBER, NUMBER),
        st.lists(st.builds(Committed, INDEX, NUMBER, NUMBER, CHAIN), max_size=5),
        st.dictionaries(st.text(), st.integers(), max_size=3),
        st.data(),
    )
    def test_round_trip_in_any_pieces(
        self,
        gsn: int,
        positions: list[tuple[int, int]],
        gsns: tuple[int, int, int],
        ends: list[Committed],
        body: dict[str, int],
        data: st.DataObject,
    ) -> None:
        raw = pack_durable(gsn, positions) + pack_committed(*gsns, ends) + pack_json(LINK, body)
        raw += pack_rebase_known()
        parser = WatermarkParser()
        found = []
        while raw:
            cut = data.draw(st.integers(1, len(raw)))
            found += parser.feed(raw[:cut])
            raw = raw[cut:]
        self.assertEqual([kind for kind, _ in found], [DURABLE, COMMITTED, LINK, REBASE_KNOWN])
        self.assertEqual(parse_durable(found[0][1]), (gsn, positions))
        self.assertEqual(parse_committed(found[1][1]), (*gsns, ends))
        self.assertEqual(parse_json(found[2][1]), body)
        self.assertEqual(found[3][1], b"")

    def test_point(self) -> None:
        self.assertEqual(Committed(0, 4096, 7, bytes(16)).point, Point(7, bytes(16)))

    @settings(max_examples=300)
    @given(st.lists(st.binary(max_size=60), max_size=8))
    def test_arbitrary_bytes(self, pieces: list[bytes]) -> None:
        parser = WatermarkParser()
        try:
            for piece in pieces:
                for kind, payload in parser.feed(piece):
                    self.assertIn(kind, watermark._TYPES)
                    if kind == DURABLE:
                        parse_durable(payload)
                    elif kind == COMMITTED:
                        parse_committed(payload)
                    elif kind in (REFRESH, LINK, GENERATIONS):
                        parse_json(payload)
        except ProtocolError:
            pass

    @settings(max_examples=200)
    @given(st.sampled_from([DURABLE, REFRESH, COMMITTED, LINK]), st.binary(max_size=80))
    def test_arbitrary_payloads(self, kind: int, payload: bytes) -> None:
        parse = {DURABLE: parse_durable, COMMITTED: parse_committed}.get(kind, parse_json)
        try:
            parse(payload)  # type: ignore[operator]
        except ProtocolError:
            pass

    def test_payloads_that_mean_nothing(self) -> None:
        for payload in (b"", b"1234567", bytes(9)):
            with self.assertRaises(ProtocolError):
                parse_durable(payload)
            with self.assertRaises(ProtocolError):
                parse_committed(payload)
        for payload in (b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000):
            with self.assertRaises(ProtocolError):
                parse_json(payload)

    def test_refused_before_it_is_gathered(self) -> None:
        for raw in (
            struct.pack(">BBHI", 0, 0, 0, 0),
            struct.pack(">BBHI", 10, 0, 0, 0),
            struct.pack(">BBHI", DURABLE, 0, 0, (1 << 32) - 1),
        ):
            with self.assertRaises(ProtocolError):
                list(WatermarkParser().feed(raw))

    def test_the_largest_group(self) -> None:
        units = range(LDSUS_PER_GROUP_MAX)
        cut = {str(i): [(1 << 63) - 1, (1 << 63) - 1, bytes(16).hex()] for i in units}
        largest = [
            pack_durable(1, ((i, 1) for i in units)),
            pack_committed(1, 1, 1, (Committed(i, 1, 1, bytes(16)) for i in units)),
            pack_json(REFRESH, {"id": bytes(16).hex(), "cut": {"gsn": 1 << 62, "points": cut}}),
        ]
        for raw in largest:
            self.assertEqual(len(list(WatermarkParser().feed(raw))), 1)
        self.assertLess(max(map(len, largest)), watermark._PAYLOAD_BYTES_MAX)
