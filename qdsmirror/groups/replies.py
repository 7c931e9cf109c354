"""Answers of the secondary to the driver's questions about its mirror devices.

They tell what the devices hold while frames go on being applied: of each byte, what it was at some
instant between the question and the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from twisted.internet.defer import Deferred

from qdsmirror.core.frames import Buffer
from qdsmirror.core.questions import (
    HASHES,
    STANDING,
    Answer,
    Question,
    Standing,
    pack_answer,
    pack_standing,
    parse_question,
)
from qdsmirror.errors import ProtocolError
from qdsmirror.interfaces import IWorker
from qdsmirror.limits import QUESTIONS_MAX
from qdsmirror.storage.hashing import chunk_digests
from qdsmirror.storage.journal import Mirror


class Replies:
    """Answers questions, in the order in which they come.

    :param worker: reads and hashes; an answer waits for it.
    :param standing: tells where the mirror of an LDSU stands now.
    """

    def __init__(
        self, mirror: Mirror, worker: IWorker, standing: Callable[[int], Standing]
    ) -> None:
        self._mirror = mirror
        self._standing = standing
        self._worker = worker
        self._open = 0

    def take(self, payload: Buffer, answer: Callable[[bytes], None]) -> None:
        """Answer a question.

        :param answer: told the answer's payload.
        :raises ProtocolError: it cannot be asked so, or too much is asked at once.
        """
        question = parse_question(payload)
        devices = self._mirror.devices
        if (
            question.ldsu >= len(devices)
            or question.offset + question.length > devices[question.ldsu].size
        ):
            raise ProtocolError(f"question about what is not mapped: {question}")
        if question.kind == STANDING:
            body = pack_standing(self._standing(question.ldsu))
            answer(pack_answer(Answer(question.id, body)))
            return
        # Those of a session that was lost may still be at work.
        if self._open >= 2 * QUESTIONS_MAX:
            raise ProtocolError("too many questions at once")
        self._open += 1
        self._worker.run(
            partial(self._look, question), partial(self._looked, question, answer)
        )  # fmt: skip

    def _look(self, question: Question) -> bytes:
        device = self._mirror.devices[question.ldsu]
        if question.kind == HASHES:
            body = chunk_digests(device, question.offset, question.length, question.chunk)
        else:
            body = device.pread(question.length, question.offset)
        self._mirror.check_read(question.ldsu)
        return body

    def _looked(
        self,
        question: Question,
        answer: Callable[[bytes], None],
        body: bytes | None,
        error: BaseException | None,
    ) -> None:
        self._open -= 1
        if body is None:
            answer(pack_answer(Answer(question.id, b"", f"mirror device: {error}")))
        else:
            answer(pack_answer(Answer(question.id, body)))

    def stop(self) -> Deferred[None]:
        """Answer what was asked, and end."""
        return self._worker.stop()
