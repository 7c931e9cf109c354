"""Jobs that may end in any order, and results that are taken in the order of the jobs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from qdsmirror.interfaces import IWorker

T = TypeVar("T")


class _Slot(Generic[T]):
    """A result's place in the order.

    :ivar results: the one result, once it is there.
    """

    __slots__ = ("error", "results")

    def __init__(self) -> None:
        self.results: list[T] = []
        self.error: BaseException | None = None


class InOrder(Generic[T]):
    """Has workers do jobs, several at once, and keeps their order.

    :param workers: the jobs are given to them in turn.
    :param take: given each result.
    :param fail: told of a job's error; nothing is taken any more.
    """

    def __init__(
        self,
        workers: Sequence[IWorker],
        take: Callable[[T], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._workers = workers
        self._take = take
        self._fail = fail
        self._slots: deque[_Slot[T]] = deque()
        self._turn = 0
        self._giving = False

    def __len__(self) -> int:
        """Count the results that were not taken yet."""
        return len(self._slots)

    def run(self, job: Callable[[int], T]) -> None:
        """Have a job done; it is called with its worker's number."""
        slot: _Slot[T] = _Slot()
        self._slots.append(slot)
        number = self._turn
        self._turn = (number + 1) % len(self._workers)
        self._workers[number].run(partial(job, number), partial(self._done, slot))

    def put(self, result: T) -> None:
        """Have something taken that needs no job, after what was given before it."""
        slot: _Slot[T] = _Slot()
        slot.results.append(result)
        self._slots.append(slot)
        self._give()

    def forget(self) -> None:
        """Take nothing more of what was given so far."""
        self._slots.clear()

    def _done(self, slot: _Slot[T], result: T | None, error: BaseException | None) -> None:
        slot.error = error
        slot.results.append(result)  # type: ignore[arg-type]
        self._give()

    def _give(self) -> None:
        # What takes a result may give another job, which may be done at once.
        if self._giving:
            return
        self._giving = True
        try:
            while self._slots and self._slots[0].results:
                slot = self._slots.popleft()
                if slot.error is not None:
                    self.forget()
                    self._fail(slot.error)
                    return
                self._take(slot.results[0])
        finally:
            self._giving = False
