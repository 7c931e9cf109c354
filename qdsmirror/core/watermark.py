"""The fixed binary messages between a driver and the pmd that is attached to it.

Watermarks change with every frame, so they do not travel as AMP boxes: a message is a type, a
length and a payload.  The driver says what is durable; the pmd says what is committed, and how its
link stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from struct import Struct
from struct import error as StructError
from typing import Any, NamedTuple

from qdsmirror.core.jsontext import dump_json, parse_object
from qdsmirror.core.questions import ANSWER_HEAD_BYTES
from qdsmirror.core.records import Point
from qdsmirror.errors import ProtocolError
from qdsmirror.limits import LDSUS_PER_GROUP_MAX, QUESTION_READ_BYTES_MAX

#: driver → pmd: the group's durable GSN, and per LDSU the position up to which its log is durable.
DURABLE = 1
#: driver → pmd: a JSON object: what a refresh may replace (see man page qdsmirror-architecture(7)).
REFRESH = 2
#: pmd → driver: sent, committed and mirrored GSN, and per LDSU where its committed part ends.
COMMITTED = 3
#: pmd → driver: a JSON object: the link's state, with reason and exit code.
LINK = 4
#: driver → pmd: a JSON object: the generations that frames may be of from now on (rules.md 7).
GENERATIONS = 5
#: driver → pmd, and back: what the pmd relays as it is (:mod:`qdsmirror.core.stream`).
ASK = 6
ANSWER = 7
REPORT = 8
#: driver → pmd: it knows that the secondary's history may be replaced, as a LINK has said.
REBASE_KNOWN = 9
_TYPES = frozenset(
    (DURABLE, REFRESH, COMMITTED, LINK, GENERATIONS, ASK, ANSWER, REPORT, REBASE_KNOWN)
)

_HEADER = Struct(">BBHI")
_GSN = Struct(">Q")
_GSNS = Struct(">QQQ")
_DURABLE = Struct(">IQ")
_COMMITTED = Struct(">IQQ16s")
#: What one LDSU takes in the longest message, a REFRESH with the cut of every LDSU.
_UNIT_BYTES_MAX = 128
_PAYLOAD_BYTES_MAX = max(
    4096 + LDSUS_PER_GROUP_MAX * _UNIT_BYTES_MAX, ANSWER_HEAD_BYTES + QUESTION_READ_BYTES_MAX
)


class Committed(NamedTuple):
    """Where the committed part of an LDSU's log ends: position, next sequence and chain there."""

    ldsu: int
    position: int
    sequence: int
    chain: bytes

    @property
    def point(self) -> Point:
        """Where the LDSU's history stands there."""
        return Point(self.sequence, self.chain)


def pack_durable(gsn: int, positions: Iterable[tuple[int, int]]) -> bytes:
    """Make a DURABLE from (LDSU index, position) pairs."""
    return _message(DURABLE, _GSN.pack(gsn) + b"".join(_DURABLE.pack(*p) for p in positions))


def parse_durable(payload: bytes) -> tuple[int, list[tuple[int, int]]]:
    """Read a DURABLE's payload: the GSN and the pairs.

    :raises ProtocolError: its length is wrong.
    """
    try:
        return _GSN.unpack_from(payload)[0], list(_DURABLE.iter_unpack(payload[_GSN.size :]))
    except StructError as error:
        raise ProtocolError(f"watermark DURABLE of {len(payload)} bytes") from error


def pack_committed(sent: int, committed: int, mirrored: int, ends: Iterable[Committed]) -> bytes:
    """Make a COMMITTED."""
    body = b"".join(_COMMITTED.pack(*end) for end in ends)
    return _message(COMMITTED, _GSNS.pack(sent, committed, mirrored) + body)


def parse_committed(payload: bytes) -> tuple[int, int, int, list[Committed]]:
    """Read a COMMITTED's payload: sent, committed and mirrored GSN, and the ends.

    :raises ProtocolError: its length is wrong.
    """
    try:
        sent, committed, mirrored = _GSNS.unpack_from(payload)
        ends = [Committed(*row) for row in _COMMITTED.iter_unpack(payload[_GSNS.size :])]
    except StructError as error:
        raise ProtocolError(f"watermark COMMITTED of {len(payload)} bytes") from error
    return sent, committed, mirrored, ends


def pack_json(kind: int, body: dict[str, Any]) -> bytes:
    """Make a LINK, REFRESH or GENERATIONS."""
    return _message(kind, dump_json(body))


def pack_relayed(kind: int, payload: bytes) -> bytes:
    """Make an ASK, ANSWER or REPORT."""
    return _message(kind, payload)


def pack_rebase_known() -> bytes:
    """Make a REBASE_KNOWN, which says nothing more."""
    return _message(REBASE_KNOWN, b"")


def parse_json(payload: bytes) -> dict[str, Any]:
    """Read the payload of a LINK, REFRESH, GENERATIONS or REPORT.

    :raises ProtocolError: it is no JSON object.
    """
    return parse_object(payload, "a watermark message")


def _message(kind: int, payload: bytes) -> bytes:
    return _HEADER.pack(kind, 0, 0, len(payload)) + payload


class WatermarkParser:
    """Cuts received bytes into (type, payload) pairs."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Take received bytes and give the messages that are whole now.

        :raises ProtocolError: an unknown type or an absurd length.
        """
        buffer = self._buffer + data if self._buffer else data
        position = 0
        while len(buffer) - position >= _HEADER.size:
            kind, _, _, length = _HEADER.unpack_from(buffer, position)
            if kind not in _TYPES or length > _PAYLOAD_BYTES_MAX:
                raise ProtocolError(f"watermark message of type {kind}, {length} bytes")
            end = position + _HEADER.size + length
            if end > len(buffer):
                break
            yield kind, buffer[position + _HEADER.size : end]
            position = end
        self._buffer = buffer[position:]
