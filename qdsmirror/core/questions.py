"""Questions that the driver asks the secondary about its mirror devices, and their answers.

The pmd relays both as they are, between the watermark socket and the stream (man page
qdsmirror-protocol(7)), and keeps nothing of them.  They have no place in the order of frames.
"""

from __future__ import annotations

from struct import Struct
from struct import error as StructError
from typing import NamedTuple

from qdsmirror.core.frames import NUMBERS_END, Buffer
from qdsmirror.core.records import Point
from qdsmirror.errors import ProtocolError
from qdsmirror.limits import (
    QUESTION_CHUNK_BYTES_MIN,
    QUESTION_DIGESTS_BYTES_MAX,
    QUESTION_READ_BYTES_MAX,
)

#: The blake3 digest of each chunk of a range, one after the other.
HASHES = 1
#: The bytes of a range.
READ = 2
#: Where the mirror of an LDSU stands (:class:`Standing`).
STANDING = 3
_KINDS = frozenset((HASHES, READ, STANDING))

DIGEST_BYTES = 32

# id kind ldsu offset length chunk
_QUESTION = Struct(">IBIQII")
# id failed
_ANSWER = Struct(">IB")
#: What an answer is longer than what was asked for.
ANSWER_HEAD_BYTES = _ANSWER.size
_ERROR_BYTES_MAX = 1024
# coherent quiet blank zero generation gsn sequence chain
_STANDING = Struct(">BBBx16sQQ16s")


class Question(NamedTuple):
    """One question.

    :ivar id: the answer's.
    :ivar kind: HASHES, READ or STANDING.
    :ivar ldsu: index in the group.
    :ivar offset: first byte; ``length``: bytes; of one LDSU; both 0 of STANDING.
    :ivar chunk: bytes that a digest is of (the last one may be shorter); of HASHES only.
    """

    id: int
    kind: int
    ldsu: int
    offset: int
    length: int
    chunk: int = 0

    @property
    def answer_bytes(self) -> int:
        """How long the answer must be."""
        if self.kind == READ:
            return self.length
        if self.kind == STANDING:
            return _STANDING.size
        return -(-self.length // self.chunk) * DIGEST_BYTES


def pack_question(question: Question) -> bytes:
    """Make a question's payload."""
    return _QUESTION.pack(*question)


def parse_question(payload: Buffer) -> Question:
    """Read a question.

    :raises ProtocolError: it is none, or its answer would be over the limits.
    """
    try:
        question = Question(*_QUESTION.unpack(payload))
    except StructError as error:
        raise ProtocolError(f"question of {len(payload)} bytes") from error
    if question.kind not in _KINDS:
        raise ProtocolError(f"question of unknown kind {question.kind}")
    if question.kind == STANDING and (question.offset or question.length):
        raise ProtocolError("question where a part of an LDSU stands")
    if question.kind == HASHES and question.chunk < QUESTION_CHUNK_BYTES_MIN:
        raise ProtocolError(f"question for hashes of {question.chunk} bytes")
    limit = QUESTION_READ_BYTES_MAX if question.kind == READ else QUESTION_DIGESTS_BYTES_MAX
    if (
        not 0 < question.answer_bytes <= limit
        or question.offset + question.length >= NUMBERS_END
    ):  # fmt: skip
        raise ProtocolError(f"question for {question.length} bytes at {question.offset}")
    return question


class Answer(NamedTuple):
    """What the secondary answers: the ``body`` that was asked for, or an ``error``'s text."""

    id: int
    body: bytes
    error: str = ""


def pack_answer(answer: Answer) -> bytes:
    """Make an answer's payload."""
    if answer.error:
        return _ANSWER.pack(answer.id, 1) + answer.error.encode()[:_ERROR_BYTES_MAX]
    return _ANSWER.pack(answer.id, 0) + answer.body


def parse_answer(payload: Buffer) -> Answer:
    """Read an answer.

    :raises ProtocolError: it is none.
    """
    if len(payload) < _ANSWER.size:
        raise ProtocolError(f"answer of {len(payload)} bytes")
    number, failed = _ANSWER.unpack_from(payload)
    body = bytes(memoryview(payload)[_ANSWER.size :])
    if failed:
        return Answer(number, b"", body.decode(errors="replace") or "unknown error")
    return Answer(number, body)


class Standing(NamedTuple):
    """Where an LDSU's mirror stands, as the secondary answers.

    :ivar coherent: the mirror is usable as of one instant.
    :ivar quiet: all that is committed is on the mirror device.
    :ivar generation: the history's; empty while the secondary has none.
    :ivar gsn: the next number of the group; ``sequence``, ``chain``: the LDSU's place, as in
        :class:`~qdsmirror.core.records.Point`.
    """

    coherent: bool
    quiet: bool
    generation: bytes
    gsn: int
    sequence: int
    chain: bytes

    @property
    def point(self) -> Point:
        """Where the LDSU's history stands."""
        return Point(self.sequence, self.chain)

    @property
    def place(self) -> tuple[bytes, int, Point]:
        """The history and the place in it."""
        return self.generation, self.gsn, self.point


def pack_standing(standing: Standing) -> bytes:
    """Make the body of an answer."""
    coherent, quiet, generation, *place = standing
    return _STANDING.pack(coherent, quiet, not generation, generation, *place)


def parse_standing(body: bytes) -> Standing:
    """Read the body of an answer, of the length that was asked for."""
    coherent, quiet, blank, generation, gsn, sequence, chain = _STANDING.unpack(body)
    history = b"" if blank else generation
    return Standing(bool(coherent), bool(quiet), history, gsn, sequence, chain)
