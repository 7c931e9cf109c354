"""The stream's messages."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import stream
from qdsmirror.core.stream import (
    ACK,
    ACK_REQUESTED,
    ANSWER,
    ASK,
    BYE,
    FRAME,
    HEADER_BYTES,
    LETTER,
    PING,
    Ack,
    MessageParser,
    frame_header,
    pack_ack,
    pack_bye,
    pack_ping,
    parse_ack,
)
from qdsmirror.errors import LimitError, ProtocolError
from qdsmirror.limits import KIB, MIB, STREAM_MESSAGE_BYTES_MAX

NUMBER = st.integers(0, (1 << 64) - 1)
MESSAGE = st.one_of(
    st.tuples(st.booleans(), st.binary(max_size=50)).map(
        lambda m: (frame_header(len(m[1]), m[0]) + m[1], (FRAME, int(m[0]), m[1]))
    ),
    st.tuples(NUMBER, NUMBER).map(lambda a: (pack_ack(*a), (ACK, 0, struct.pack(">QQ", *a)))),
    st.just((pack_ping(), (PING, 0, b""))),
    st.text(max_size=20).map(lambda t: (pack_bye(t), (BYE, 0, t.encode()))),
)


class StreamTests(SynchronousTestCase):
    @settings(max_examples=200)
    @given(st.lists(MESSAGE, max_size=6), st.data())
    def test_round_trip_in_any_pieces(
        self, messages: list[tuple[bytes, tuple[int, int, bytes]]], data: st.DataObject
    ) -> None:
        raw = b"".join(m[0] for m in messages)
        parser = MessageParser()
        found = []
        while raw:
            cut = data.draw(st.integers(1, len(raw)))
            for kind, flags, payload in parser.feed(raw[:cut]):
                found.append((kind, flags, bytes(payload)))
            raw = raw[cut:]
        self.assertEqual(found, [m[1] for m in messages])

    @given(NUMBER, NUMBER)
    def test_ack(self, committed: int, mirrored: int) -> None:
        (message,) = MessageParser().feed(pack_ack(committed, mirrored))
        self.assertEqual(parse_ack(message.payload), Ack(committed, mirrored))

    def test_ack_of_another_length(self) -> None:
        for length in (0, 15, 17):
            with self.assertRaises(ProtocolError):
                parse_ack(bytes(length))

    def test_the_flag(self) -> None:
        for asked in (False, True):
            (message,) = MessageParser().feed(frame_header(0, asked))
            self.assertEqual(message.flags & ACK_REQUESTED, asked)

    def test_a_reason_is_cut(self) -> None:
        (message,) = MessageParser().feed(pack_bye("ü" * 5000))
        self.assertEqual(len(message.payload), 1024)

    @settings(max_examples=300)
    @given(st.lists(st.binary(max_size=40), max_size=10))
    def test_arbitrary_bytes(self, pieces: list[bytes]) -> None:
        parser = MessageParser()
        taken = given_out = 0
        try:
            for piece in pieces:
                taken += len(piece)
                for message in parser.feed(piece):
                    given_out += HEADER_BYTES + len(message.payload)
                self.assertLessEqual(given_out, taken)
                self.assertLessEqual(len(parser._head), HEADER_BYTES)
                if parser._body is not None:
                    self.assertLessEqual(len(parser._body), STREAM_MESSAGE_BYTES_MAX)
        except (ProtocolError, LimitError):
            pass

    def test_refused_before_anything_is_gathered(self) -> None:
        for kind, length, error in (
            (0, 0, ProtocolError),
            (10, 0, ProtocolError),
            (FRAME, STREAM_MESSAGE_BYTES_MAX + 1, LimitError),
            (FRAME, (1 << 32) - 1, LimitError),
            (ACK, 64 * KIB + 1, LimitError),
            (BYE, STREAM_MESSAGE_BYTES_MAX, LimitError),
            (ASK, 64 * KIB + 1, LimitError),
            (ANSWER, MIB + 6, LimitError),
            (LETTER, MIB + 22, LimitError),
        ):
            parser = MessageParser()
            with self.assertRaises(error):
                list(parser.feed(struct.pack(">BBHI", kind, 0, 0, length)))
            self.assertIsNone(parser._body)

    def test_a_message_in_pieces_is_gathered_once(self) -> None:
        parser = MessageParser()
        head = frame_header(100_000, True)
        self.assertEqual(list(parser.feed(head)), [])
        body = parser._body
        assert body is not None
        self.assertEqual(len(body), 100_000)
        for _ in range(9):
            self.assertEqual(list(parser.feed(bytes(10_000))), [])
            self.assertIs(parser._body, body)
        (message,) = parser.feed(b"\1" * 10_000 + pack_ping()[:3])
        self.assertIs(message.payload, body)
        self.assertEqual(list(parser.feed(pack_ping()[3:])), [stream.Message(PING, 0, b"")])
