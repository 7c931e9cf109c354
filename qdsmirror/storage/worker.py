"""Blocking jobs off the reactor thread, and on it where they hardly block (performance.md).

A hop to a thread and back costs more than writing a few pages into the page cache, so an
:class:`AdaptiveWorker` measures and chooses.  Workers never use the reactor's own thread pool.
"""

from __future__ import annotations

import resource
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.logger import Logger
from zope.interface import implementer

from qdsmirror import limits
from qdsmirror.interfaces import IWorker

_T = TypeVar("_T")
_Job = tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]
_Result = tuple[Callable[[Any, BaseException | None], None], Any, BaseException | None]
_log = Logger()

#: Weight of the newest job in the moving average.
_AVERAGE_WEIGHT = 0.125


@implementer(IWorker)
class ThreadWorker:
    """One thread that takes all waiting jobs at once and hands all their results back at once."""

    def __init__(self, reactor: IReactorFromThreads, name: str = "worker") -> None:
        """Start the thread.

        :param name: the thread's name, to be seen in a debugger.
        """
        self._reactor = reactor
        self._waiting: list[_Job] = []
        self._changed = threading.Condition(threading.Lock())
        self._idle = False
        self._stopping = False
        self._stopped: list[Deferred[None]] = []
        self._ended = False
        threading.Thread(target=self._loop, name=name, daemon=True).start()

    def run(
        self, job: Callable[[], _T], done: Callable[[_T | None, BaseException | None], None]
    ) -> None:
        """Run ``job`` in the thread, then ``done`` on the reactor thread; see :class:`IWorker`.

        :raises RuntimeError: the worker was stopped.
        """
        with self._changed:
            if self._stopping:
                raise RuntimeError("a stopped worker takes no jobs")
            self._waiting.append((job, done))
            if self._idle:
                self._idle = False
                self._changed.notify()

    def stop(self) -> Deferred[None]:
        """End the thread after the jobs it has; fires after the last of their ``done`` calls."""
        fired: Deferred[None] = Deferred()
        if self._ended:
            fired.callback(None)
            return fired
        self._stopped.append(fired)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        return fired

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._stopping:
                    self._idle = True
                    self._changed.wait()
                batch, self._waiting = self._waiting, []
            if not batch:
                break
            results = [_perform(job, done) for job, done in batch]
            self._reactor.callFromThread(_deliver, results)
            # Nothing of a batch is kept alive while the thread waits.
            del batch, results
        self._reactor.callFromThread(self._end)

    def _end(self) -> None:
        self._ended = True
        fired, self._stopped = self._stopped, []
        for deferred in fired:
            deferred.callback(None)


@implementer(IWorker)
class AdaptiveWorker:
    """Runs jobs on the reactor thread while they are quick, in a thread of its own otherwise.

    A slow job sends those that follow to the thread, at first for a moment, longer each time it
    happens again soon.  Order is always kept: nothing runs inline while the thread has jobs whose
    ``done`` was not called.  To be used from the reactor thread only.
    """

    def __init__(
        self,
        reactor: IReactorFromThreads,
        name: str = "worker",
        clock: Callable[[], float] = time.perf_counter,
        usage: Callable[[], tuple[float, int]] | None = None,
    ) -> None:
        """Start the thread.

        :param clock: gives monotonic seconds.
        :param usage: gives the processor seconds that the calling thread has used, and how often
            it has waited; default: the kernel's account.
        """
        self._usage = usage or _thread_usage
        self._thread = ThreadWorker(reactor, name)
        self._clock = clock
        #: Jobs given to the thread whose ``done`` was not called.
        self._threaded = 0
        self._waiting: deque[_Job] = deque()
        self._running = False
        self._average = 0.0
        self._inline_from = clock()
        self._penalty = 0.0
        self._stopping: Deferred[None] | None = None

    @property
    def inline(self) -> bool:
        """Whether the next job would run on the reactor thread."""
        return not self._threaded and self._clock() >= self._inline_from

    def run(
        self, job: Callable[[], _T], done: Callable[[_T | None, BaseException | None], None]
    ) -> None:
        """Run ``job`` here or in the thread, then ``done``; see :class:`IWorker`.

        :raises RuntimeError: the worker was stopped.
        """
        if self._stopping is not None:
            raise RuntimeError("a stopped worker takes no jobs")
        if self._running:
            # From a ``done`` further up the stack, which goes on with it: no recursion.
            self._waiting.append((job, done))
        elif self._threaded:
            self._hand_over(job, done)
        else:
            self._run_inline(job, done)

    def stop(self) -> Deferred[None]:
        """End the thread after all jobs; fires after the last of their ``done`` calls."""
        first = self._stopping is None
        if self._stopping is None:
            self._stopping = Deferred()
        if first and not self._running:
            self._stop_thread()
        fired: Deferred[None] = Deferred()
        self._stopping.addCallback(_pass_on, fired)
        return fired

    def _run_inline(self, job: Callable[[], Any], done: Callable[..., None]) -> None:
        self._running = True
        clock = self._clock
        begun = now = clock()
        while now >= self._inline_from and now - begun < limits.INLINE_BURST_SECONDS_MAX:
            used, waited = self._usage()
            result = _perform(job, done)
            ended = clock()
            used_after, waited_after = self._usage()
            # On a busy machine a job may be slow without having waited for a device: then the
            # thread would be no quicker, and only its processor time counts.
            blocked = waited_after != waited
            self._judge(ended - now if blocked else used_after - used, ended)
            _deliver((result,))
            if not self._waiting:
                break
            job, done = self._waiting.popleft()
            now = clock()
        else:
            self._hand_over(job, done)
            while self._waiting:
                self._hand_over(*self._waiting.popleft())
        self._running = False
        if self._stopping is not None:
            self._stop_thread()

    def _judge(self, seconds: float, now: float) -> None:
        self._average += (seconds - self._average) * _AVERAGE_WEIGHT
        if (
            seconds <= limits.INLINE_JOB_SECONDS_MAX
            and self._average <= limits.INLINE_AVERAGE_SECONDS_MAX
        ):
            return
        if self._penalty and now - self._inline_from < self._penalty:
            self._penalty = min(2 * self._penalty, limits.INLINE_RETRY_SECONDS_MAX)
        else:
            self._penalty = limits.INLINE_RETRY_SECONDS_MIN
        self._inline_from = now + self._penalty
        self._average = 0.0

    def _hand_over(self, job: Callable[[], Any], done: Callable[..., None]) -> None:
        def delivered(result: Any, error: BaseException | None) -> None:
            self._threaded -= 1
            done(result, error)

        self._threaded += 1
        self._thread.run(job, delivered)

    def _stop_thread(self) -> None:
        assert self._stopping is not None
        self._thread.stop().addCallback(_pass_on, self._stopping)


@implementer(IWorker)
class ReadWorkers:
    """Several threads for jobs that need no order, as reads: each takes the next job."""

    def __init__(self, reactor: IReactorFromThreads, threads: int, name: str = "reads") -> None:
        """Start the threads.

        :param threads: how many jobs run at once.
        """
        self._reactor = reactor
        self._waiting: deque[_Job] = deque()
        self._results: list[_Result] = []
        self._changed = threading.Condition(threading.Lock())
        self._alive = threads
        self._stopping = False
        self._stopped: list[Deferred[None]] = []
        for number in range(threads):
            threading.Thread(target=self._loop, name=f"{name}-{number}", daemon=True).start()

    def run(
        self, job: Callable[[], _T], done: Callable[[_T | None, BaseException | None], None]
    ) -> None:
        """Run ``job`` in one of the threads, then ``done`` on the reactor thread; in any order.

        :raises RuntimeError: the workers were stopped.
        """
        with self._changed:
            if self._stopping:
                raise RuntimeError("a stopped worker takes no jobs")
            self._waiting.append((job, done))
            self._changed.notify()

    def stop(self) -> Deferred[None]:
        """End the threads after all jobs; fires after the last of their ``done`` calls."""
        fired: Deferred[None] = Deferred()
        if not self._alive:
            fired.callback(None)
            return fired
        self._stopped.append(fired)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        return fired

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._stopping:
                    self._changed.wait()
                if not self._waiting:
                    break
                job, done = self._waiting.popleft()
            result = _perform(job, done)
            del job, done
            with self._changed:
                self._results.append(result)
                first = len(self._results) == 1
            del result
            if first:
                self._reactor.callFromThread(self._deliver_all)
        self._reactor.callFromThread(self._end_one)

    def _deliver_all(self) -> None:
        with self._changed:
            results, self._results = self._results, []
        _deliver(results)

    def _end_one(self) -> None:
        self._alive -= 1
        if not self._alive:
            fired, self._stopped = self._stopped, []
            for deferred in fired:
                deferred.callback(None)


def _thread_usage() -> tuple[float, int]:
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_utime + usage.ru_stime, usage.ru_nvcsw


def _perform(job: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> _Result:
    try:
        return done, job(), None
    except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the job's owner
        return done, None, error


def _deliver(results: list[_Result] | tuple[_Result]) -> None:
    for done, result, error in results:
        try:
            done(result, error)
        except Exception:  # noqa: BLE001 - one caller's bug must not silence the others
            _log.failure("a worker's caller failed to take its result")


def _pass_on(_: None, to: Deferred[None]) -> None:
    to.callback(None)
