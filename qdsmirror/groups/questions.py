"""Questions of a driver about its mirror devices, on their way to the secondary and back.

They are asked while the link is up; where it ends before the answer they fail, and whoever asked
asks again when it is back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.internet import defer
from twisted.internet.defer import Deferred

from qdsmirror.core import questions
from qdsmirror.core.questions import Question
from qdsmirror.errors import DegradedError, ProtocolError, QdsError
from qdsmirror.limits import QUESTIONS_MAX

if TYPE_CHECKING:
    from qdsmirror.groups.attachment import Attachment


class Questions:
    """The questions of one group that wait for their answers.

    :param pmd: relays them.
    """

    def __init__(self, pmd: Attachment) -> None:
        self._pmd = pmd
        self._next_id = 1
        self._asked: dict[int, tuple[Question, Deferred[bytes]]] = {}

    @property
    def has_room(self) -> bool:
        """Whether another one may be asked now (BOUND)."""
        return self._pmd.is_connected and len(self._asked) < QUESTIONS_MAX

    def ask(
        self, kind: int, ldsu: int, offset: int, length: int, chunk: int = 0
    ) -> Deferred[bytes]:
        """Ask the secondary; fires with what :attr:`Question.answer_bytes` promises.

        :param kind: ``HASHES`` or ``READ``, and the rest as for :class:`Question`.
        :raises DegradedError: there is no link, it ended, or too much has been asked.
        :raises QdsError: what the secondary says of its mirror device.
        """
        if not self.has_room or self._pmd.end is None:
            return defer.fail(DegradedError("the secondary cannot be asked now"))
        question = Question(self._next_id, kind, ldsu, offset, length, chunk)
        self._next_id = self._next_id % 0xFFFFFFFF + 1
        answered: Deferred[bytes] = Deferred()
        self._asked[question.id] = question, answered
        self._pmd.end.ask(questions.pack_question(question))
        return answered

    def answered(self, payload: bytes) -> None:
        """Take an answer; one to a question that has failed meanwhile is dropped.

        :raises ProtocolError: it is not an answer to what was asked.
        """
        answer = questions.parse_answer(payload)
        if answer.id not in self._asked:
            return
        question, waiting = self._asked.pop(answer.id)
        if answer.error:
            waiting.errback(QdsError(f"the secondary says: {answer.error}"))
        elif len(answer.body) != question.answer_bytes:
            waiting.errback(DegradedError("the secondary's answer is of another length"))
            raise ProtocolError(f"answer of {len(answer.body)} bytes to {question}")
        else:
            waiting.callback(answer.body)

    def fail_all(self, reason: str) -> None:
        """Give up what waits: no answer comes any more."""
        asked, self._asked = self._asked, {}
        for _, waiting in asked.values():
            waiting.errback(DegradedError(f"the secondary did not answer: {reason}"))
