"""The stream that follows the handshake: small messages around frames.

The format is in man page qdsmirror-protocol(7).  A message is a fixed header (type, flags, payload
length) and a payload.  Frames travel as they are in the log; the ACK-requested flag rides on the
last frame of a buffer (patent: "a flag is set in the header requesting an acknowledgment").
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Any, NamedTuple

from qdsmirror.core.frames import Buffer
from qdsmirror.core.questions import ANSWER_HEAD_BYTES
from qdsmirror.errors import LimitError, ProtocolError
from qdsmirror.limits import KIB, QUESTION_READ_BYTES_MAX, STREAM_MESSAGE_BYTES_MAX

FRAME = 1
ACK = 2
PING = 3
BYE = 4
#: A question about the mirror devices, and its answer (:mod:`qdsmirror.core.questions`).
ASK = 5
ANSWER = 6
#: What the secondary tells the driver unasked: a JSON object that names what it is ``about``.
REPORT = 7
#: With several paths, one of these three under a number: it may come twice (core.letters).
LETTER = 8
#: Letters that came, up to a number.
RECEIVED = 9
_RELAYED = frozenset((ASK, ANSWER, REPORT))
_TYPES = frozenset((FRAME, ACK, PING, BYE, *_RELAYED, LETTER, RECEIVED))

#: Flag of a FRAME: answer with an ACK once it is committed.
ACK_REQUESTED = 1
#: Flag of a FRAME: one or more frames, compressed (core.compression).
COMPRESSED = 2

# type flags zero length
_HEADER = Struct(">BBHI")
HEADER_BYTES = _HEADER.size
_ACK = Struct(">QQ")
_SMALL_BYTES_MAX = 64 * KIB
_NUMBER = Struct(">Q")
_ANSWER_BYTES_MAX = QUESTION_READ_BYTES_MAX + ANSWER_HEAD_BYTES
_CAPS = {
    FRAME: STREAM_MESSAGE_BYTES_MAX,
    ANSWER: _ANSWER_BYTES_MAX,
    LETTER: _NUMBER.size + HEADER_BYTES + _ANSWER_BYTES_MAX,
}


class Message(NamedTuple):
    """A whole message.

    :ivar payload: a frame, or what the other constructors of this module packed.
    """

    type: int
    flags: int
    payload: bytes | bytearray | memoryview


class Ack(NamedTuple):
    """What the secondary holds: last GSN durable in its journal, and last on its mirror devices.

    :ivar letters: how many letters it has written before (core.letters).
    """

    committed: int
    mirrored: int
    letters: int = 0


def frame_header(frame_bytes: int, ack_requested: bool) -> bytes:
    """Give the header that goes before a frame."""
    return _HEADER.pack(FRAME, ACK_REQUESTED if ack_requested else 0, 0, frame_bytes)


def pack_frames(frames: Sequence[Buffer], ack: bool) -> bytes:
    """Make the messages of some frames, as they are.

    :param ack: the last one asks for an ACK (patent: the flag).
    """
    pieces: list[Buffer] = []
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        pieces.append(frame_header(len(frame), ack and index == last))
        pieces.append(frame)
    return b"".join(pieces)


def pack_compressed(wrap: bytes, packed: bytes, ack: bool) -> bytes:
    """Make the message of compressed frames.

    :param wrap: what stands before them (core.compression).
    """
    flags = COMPRESSED | (ACK_REQUESTED if ack else 0)
    return _HEADER.pack(FRAME, flags, 0, len(wrap) + len(packed)) + wrap + packed


def pack_ack(committed: int, mirrored: int, letters: int = 0) -> bytes:
    """Make an ACK; see :class:`Ack`."""
    more = _NUMBER.pack(letters) if letters else b""
    return _HEADER.pack(ACK, 0, 0, _ACK.size + len(more)) + _ACK.pack(committed, mirrored) + more


def parse_ack(payload: bytes | bytearray | memoryview) -> Ack:
    """Read an ACK's payload.

    :raises ProtocolError: its length is wrong.
    """
    if len(payload) == _ACK.size:
        return Ack(*_ACK.unpack(payload))
    if len(payload) == _ACK.size + _NUMBER.size:
        return Ack(*_ACK.unpack_from(payload), *_NUMBER.unpack_from(payload, _ACK.size))
    raise ProtocolError(f"ACK of {len(payload)} bytes")


def pack_ping() -> bytes:
    """Make a PING: the peer is alive."""
    return _HEADER.pack(PING, 0, 0, 0)


def pack_bye(reason: str) -> bytes:
    """Make a BYE: an orderly end, with the reason."""
    text = reason.encode()[:1024]
    return _HEADER.pack(BYE, 0, 0, len(text)) + text


def pack_relayed(kind: int, payload: bytes) -> bytes:
    """Make an ASK, ANSWER or REPORT of a payload that the pmd passes on as it is."""
    return _HEADER.pack(kind, 0, 0, len(payload)) + payload


def pack_letter(number: int, message: bytes) -> bytes:
    """Make a LETTER of a packed message."""
    return _HEADER.pack(LETTER, 0, 0, _NUMBER.size + len(message)) + _NUMBER.pack(number) + message


def parse_letter(payload: Buffer) -> tuple[int, Message]:
    """Read a LETTER's payload: its number, and the message in it.

    :raises ProtocolError: it holds no message that letters are for.
    """
    view = memoryview(payload)
    inner = view[_NUMBER.size :]
    if len(inner) < HEADER_BYTES:
        raise ProtocolError(f"LETTER of {len(payload)} bytes")
    kind, flags, _, length = _HEADER.unpack_from(inner)
    if kind not in _RELAYED or length != len(inner) - HEADER_BYTES:
        raise ProtocolError(f"LETTER with {length} bytes of type {kind} in {len(inner)}")
    return _NUMBER.unpack_from(view)[0], Message(kind, flags, inner[HEADER_BYTES:])


def pack_received(number: int) -> bytes:
    """Make a RECEIVED: all letters up to this one have come."""
    return _HEADER.pack(RECEIVED, 0, 0, _NUMBER.size) + _NUMBER.pack(number)


def parse_received(payload: Buffer) -> int:
    """Read a RECEIVED's payload.

    :raises ProtocolError: its length is wrong.
    """
    if len(payload) != _NUMBER.size:
        raise ProtocolError(f"RECEIVED of {len(payload)} bytes")
    return int(_NUMBER.unpack(payload)[0])


def pack_report(report: dict[str, Any]) -> bytes:
    """Make a REPORT.

    :raises LimitError: it is too long to be taken.
    """
    payload = json.dumps(report).encode()
    if len(payload) > _SMALL_BYTES_MAX:
        raise LimitError(f"report of {len(payload)} bytes is over the limit of {_SMALL_BYTES_MAX}")
    return pack_relayed(REPORT, payload)


class MessageParser:
    """Cuts received bytes into messages; never holds more than one message's length.

    A message that arrives in several pieces is gathered in a buffer of exactly its size, so that
    nothing is copied twice.
    """

    def __init__(self) -> None:
        self._head = bytearray()
        self._body: bytearray | None = None
        self._filled = 0
        self._type = 0
        self._flags = 0

    def feed(self, data: bytes) -> Iterator[Message]:
        """Take received bytes and give the messages that are whole now.

        :raises ProtocolError: an unknown type.
        :raises LimitError: a length over the limits, before anything of it is buffered.
        """
        view = memoryview(data)
        position = 0
        end = len(view)
        while True:
            if self._body is None:
                need = HEADER_BYTES - len(self._head)
                if need > end - position:
                    self._head += view[position:]
                    return
                if self._head:
                    self._head += view[position : position + need]
                    raw: bytes | bytearray | memoryview = bytes(self._head)
                    self._head.clear()
                else:
                    raw = view[position : position + need]
                position += need
                length = self._begin(raw)
                if end - position >= length:
                    yield Message(self._type, self._flags, view[position : position + length])
                    position += length
                    continue
                self._body = bytearray(length)
                self._filled = 0
            take = min(len(self._body) - self._filled, end - position)
            self._body[self._filled : self._filled + take] = view[position : position + take]
            self._filled += take
            position += take
            if self._filled < len(self._body):
                return
            body, self._body = self._body, None
            yield Message(self._type, self._flags, body)

    def _begin(self, raw: bytes | bytearray | memoryview) -> int:
        """Check a message's header and give its payload's length."""
        self._type, self._flags, _, length = _HEADER.unpack(raw)
        if self._type not in _TYPES:
            raise ProtocolError(f"stream message of unknown type {self._type}")
        cap = _CAPS.get(self._type, _SMALL_BYTES_MAX)
        if length > cap:
            raise LimitError(f"stream message of {length} bytes is over the limit of {cap}")
        return int(length)
