"""The pause before a write is answered: ``writesleep``.

The patent: a sleep value "that the local data storage unit will wait prior to returning control to
applications after an update".  The write is in the writelog by then, and nothing else waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qdsmirror.core.nbd import CMD_FLUSH
from qdsmirror.core.pacing import ALMOST_SECONDS
from qdsmirror.groups.direct import answer_all
from qdsmirror.groups.holdback import WRITESLEEP, Later, parse_knobs

if TYPE_CHECKING:
    from qdsmirror.core.nbd import Request
    from qdsmirror.interfaces import INbdConnection


class DelayedAnswers:
    """Answers that may be given, and wait."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._usec = 0
        self._waiting: deque[tuple[float, Request]] = deque()
        self._later = Later(reactor, self._look)
        self._ended = False

    def set(self, text: str) -> dict[str, int]:
        """Take what a throttle has set: see :func:`parse_knobs`."""
        self._usec = parse_knobs(text, self.status())[WRITESLEEP]
        self._look()
        return self.status()

    def give(self, requests: Sequence[Request]) -> None:
        """Answer requests, writes after the pause."""
        now = self._reactor.seconds()
        if not self._usec or self._ended:
            answer_all(requests, now)
            return
        answer_all([one for one in requests if one.command == CMD_FLUSH], now)
        for request in requests:
            if request.command != CMD_FLUSH:
                # Others may have the room that its payload took.
                request.connection.release(request)
                self._waiting.append((now, request))
        self._look()

    def _look(self) -> None:
        """Answer what has waited long enough."""
        now = self._reactor.seconds()
        pause = 0.0 if self._ended else self._usec / 1e6
        due: list[Request] = []
        while self._waiting and self._waiting[0][0] + pause <= now + ALMOST_SECONDS:
            due.append(self._waiting.popleft()[1])
        if self._waiting:
            self._later.after(self._waiting[0][0] + pause - now)
        else:
            self._later.cancel()
        answer_all(due, now)

    def forget(self, connection: INbdConnection) -> None:
        """Drop the answers of a client that is gone."""
        self._waiting = deque(one for one in self._waiting if one[1].connection is not connection)

    def hurry(self) -> None:
        """Answer all at once that waits: what comes next may not wait for it."""
        waiting, self._waiting = self._waiting, deque()
        answer_all([request for _, request in waiting], self._reactor.seconds())
        self._look()

    def end(self) -> None:
        """Have nothing wait any more: the driver stops."""
        self._ended = True
        self.hurry()

    def status(self) -> dict[str, int]:
        """Give the pause."""
        return {WRITESLEEP: self._usec}
