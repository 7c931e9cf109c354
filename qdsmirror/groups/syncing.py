"""Syncing: an LDSU's frames on their way from appended to durable, and who waits for that.

One sync of the writelog makes durable all that was appended before it: at once if somebody waits,
else in company.  A writelog that has failed commits nothing more: its frames are handed on to be
written past it, and who waits for them is answered once that is safe (rules.md 13).
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from qdsmirror.limits import COMMIT_DELAY_SECONDS, COMMIT_INTERVAL_SECONDS

if TYPE_CHECKING:
    from qdsmirror.core.nbd import Request
    from qdsmirror.groups.framing import UnitFrame
    from qdsmirror.groups.unit import DriverUnit
    from qdsmirror.interfaces import IWorker


class Syncing:
    """The frames of one LDSU that are appended and not yet durable.

    :param worker: syncs the writelog.
    :ivar running: whether a commit is under way.
    :ivar urgent: somebody waits for the next commit.
    """

    def __init__(self, unit: DriverUnit, worker: IWorker) -> None:
        self._unit = unit
        self._worker = worker
        self._appended: deque[UnitFrame] = deque()
        #: Flushes, each with the sequence of the last frame before it.
        self._flushes: deque[tuple[int, Request]] = deque()
        #: Answered once what a failed writelog was to hold is safe.
        self._late: list[Request] = []
        self.running = False
        self.urgent = False
        self._ended_at = 0.0
        self._timer: Any = None

    def take(self, frame: UnitFrame) -> None:
        """Take a frame that was appended; :meth:`go_on` makes it durable."""
        self._appended.append(frame)

    def flush(self, request: Request) -> None:
        """Answer a flush once all that was framed before it is durable."""
        unit = self._unit
        request.state = unit.last_number
        if not (self._appended or unit.appending or unit.log_failed):
            unit.group.answering.give(unit, [request])
            return
        self._flushes.append((unit.framing.sequence - 1, request))
        self.hasten()

    def hasten(self) -> None:
        """Make what is appended durable without waiting for company."""
        self.urgent = True
        self.go_on()

    def go_on(self) -> None:
        """Make what is appended durable: at once if somebody waits, else in company."""
        if self.running or not self._appended or self._unit.log_failed:
            return
        group = self._unit.group
        if self.urgent or group.hurry:
            self.stop()
            self._begin()
        elif self._timer is None:
            reactor = group.runtime.reactor
            since = reactor.seconds() - self._ended_at
            self._timer = reactor.callLater(
                max(COMMIT_DELAY_SECONDS, COMMIT_INTERVAL_SECONDS - since), self._begin_late
            )

    def stop(self) -> None:
        """Wait for company no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin_late(self) -> None:
        self._timer = None
        if not self.running and self._appended and not self._unit.log_failed:
            self._begin()

    def _begin(self) -> None:
        self.running = True
        self.urgent = False
        self._worker.run(self._unit.writelog.sync, partial(self._committed, len(self._appended)))

    def _committed(self, count: int, _result: None, error: BaseException | None) -> None:
        unit = self._unit
        self.running = False
        self._ended_at = unit.group.runtime.reactor.seconds()
        if error is not None:
            unit.fail_log(error)
            unit.group.bypass.poke()
            return
        answers: list[Request] = []
        durable = [self._appended.popleft() for _ in range(count)]
        for frame in durable:
            answers += frame.waiting
            frame.waiting = []
        upto = durable[-1].sequence
        while self._flushes and self._flushes[0][0] <= upto:
            answers.append(self._flushes.popleft()[1])
        unit.became_durable(durable)
        unit.group.answering.give(unit, answers)
        unit.group.became_durable(unit)
        unit.applying.go_on()
        if self._flushes or any(frame.waiting for frame in self._appended):
            self.urgent = True
        self.go_on()

    # -- a failed writelog ----------------------------------------------------------------------

    @property
    def has_frames(self) -> bool:
        """Whether something appended is not durable."""
        return bool(self._appended)

    @property
    def has_late(self) -> bool:
        """Whether answers wait for what a failed writelog was to hold."""
        return bool(self._late)

    def hand_on(self) -> list[UnitFrame]:
        """Give the frames up that the failed writelog was to hold; who waits for them stays."""
        frames = list(self._appended)
        self._appended.clear()
        for frame in frames:
            self._late.extend(frame.waiting)
            frame.waiting = []
        return frames

    def answer_late(self) -> None:
        """Answer what waited for the failed writelog: all of it is safe without."""
        self._unit.group.answering.give(self._unit, self._take_late())

    def drop(self) -> list[Request]:
        """Give who waits, in order, and forget them; the caller answers."""
        waiting = [request for frame in self._appended for request in frame.waiting]
        for frame in self._appended:
            frame.waiting = []
        return [*waiting, *self._take_late()]

    def _take_late(self) -> list[Request]:
        late = [*self._late, *(request for _, request in self._flushes)]
        self._late.clear()
        self._flushes.clear()
        return late
