"""One suite for all workers, fakes included; then each one's own ways."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.trial.unittest import TestCase
from zope.interface.verify import verifyObject

from qdsmirror import limits
from qdsmirror.interfaces import IWorker
from qdsmirror.storage.worker import AdaptiveWorker, ReadWorkers, ThreadWorker
from tests.fakes import ImmediateWorker, StepWorker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def job(self, seconds: float, result: Any = None) -> Callable[[], Any]:
        def run() -> Any:
            self.now += seconds
            return result

        return run


class FakeReactor:
    """Keeps what threads call until the test lets it happen."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.called = threading.Semaphore(0)

    def callFromThread(self, function: Callable[..., None], *arguments: Any) -> None:
        self.calls.append((function, arguments))
        self.called.release()

    def turn(self) -> None:
        """Wait for one call from a thread and make it."""
        assert self.called.acquire(timeout=60)
        function, arguments = self.calls.pop(0)
        function(*arguments)


def ask(worker: Any, job: Callable[[], Any]) -> Deferred[Any]:
    """Run a job; give its result, or fail with its error."""
    fired: Deferred[Any] = Deferred()

    def done(result: Any, error: BaseException | None) -> None:
        if error is None:
            fired.callback(result)
        else:
            fired.errback(error)

    worker.run(job, done)
    return fired


class WorkerContract:
    """What every IWorker does."""

    make: Callable[[], Any]
    ordered = True
    assertEqual: Any
    assertIs: Any
    assertTrue: Any
    assertRaises: Any
    assertFailure: Any
    flushLoggedErrors: Any

    def setUp(self) -> None:
        self.worker = self.make()
        self.stopped = False

    async def tearDown(self) -> None:
        if not self.stopped:
            await self.settle(self.worker.stop())

    async def settle(self, waited: Deferred[Any]) -> Any:
        """Let the worker work until this has fired."""
        return await waited

    def test_interface(self) -> None:
        self.assertTrue(verifyObject(IWorker, self.worker))

    async def test_result(self) -> None:
        self.assertEqual(await self.settle(ask(self.worker, lambda: 7)), 7)

    async def test_error(self) -> None:
        class Odd(BaseException):
            pass

        def fail() -> None:
            raise Odd

        for _ in range(2):
            await self.assertFailure(ask_settled(self, fail), Odd)
        self.assertEqual(await self.settle(ask(self.worker, lambda: 7)), 7)

    async def test_done_runs_on_the_reactor_thread(self) -> None:
        threads = []
        fired: Deferred[None] = Deferred()

        def done(_: Any, __: Any) -> None:
            threads.append(threading.current_thread())
            fired.callback(None)

        self.worker.run(lambda: None, done)
        await self.settle(fired)
        self.assertIs(threads[0], threading.current_thread())

    async def test_order(self) -> None:
        ran: list[int] = []
        told: list[int] = []
        last: Deferred[None] = Deferred()

        def give(number: int) -> None:
            def done(_: Any, __: Any) -> None:
                told.append(number)
                if number < 100:
                    give(number + 100)
                if len(told) == 200:
                    last.callback(None)

            self.worker.run(lambda: ran.append(number), done)

        for number in range(100):
            give(number)
        await self.settle(last)
        if self.ordered:
            self.assertEqual(told, ran)
            self.assertEqual([one for one in ran if one < 100], list(range(100)))
            self.assertEqual([one for one in ran if one >= 100], list(range(100, 200)))
        else:
            self.assertEqual(sorted(told), list(range(200)))

    async def test_long_chains_need_no_stack(self) -> None:
        end: Deferred[None] = Deferred()
        left = [3000]

        def done(_: Any, __: Any) -> None:
            left[0] -= 1
            if left[0]:
                self.worker.run(lambda: None, done)
            else:
                end.callback(None)

        self.worker.run(lambda: None, done)
        await self.settle(end)
        self.assertEqual(left, [0])

    async def test_stop_finishes_first(self) -> None:
        told: list[int] = []
        for number in range(50):
            self.worker.run(lambda n=number: n, lambda result, _: told.append(result))
        stops = [self.worker.stop(), self.worker.stop()]
        self.stopped = True
        self.assertRaises(RuntimeError, self.worker.run, lambda: None, lambda *_: None)
        await self.settle(gatherResults(stops))
        self.assertEqual(sorted(told), list(range(50)))
        await self.settle(self.worker.stop())

    async def test_stop_from_done(self) -> None:
        stops: list[Deferred[None]] = []
        told: list[int] = []
        fired: Deferred[None] = Deferred()

        def done(_: Any, __: Any) -> None:
            stops.append(self.worker.stop())
            stops[0].chainDeferred(fired)
            told.append(1)

        self.worker.run(lambda: None, done)
        if not stops:
            self.worker.run(lambda: None, lambda *_: told.append(2))
        self.stopped = True
        await self.settle(fired)
        self.assertEqual(told[0], 1)


class RealWorkerContract(WorkerContract):
    """What the fakes leave out: in a test such an error surfaces where it happens."""

    async def test_a_done_that_fails_is_logged_and_harms_nobody(self) -> None:
        self.worker.run(lambda: None, lambda *_: 1 / 0)
        self.assertEqual(await self.settle(ask(self.worker, lambda: 7)), 7)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)


def ask_settled(test: Any, job: Callable[[], Any]) -> Deferred[Any]:
    return Deferred.fromCoroutine(test.settle(ask(test.worker, job)))


class ThreadWorkerTests(RealWorkerContract, TestCase):
    def make(self) -> ThreadWorker:
        return ThreadWorker(reactor)


class AdaptiveWorkerTests(RealWorkerContract, TestCase):
    def make(self) -> AdaptiveWorker:
        return AdaptiveWorker(reactor)


class WaveringWorkerTests(RealWorkerContract, TestCase):
    """Changes between thread and reactor all the time; order must not suffer."""

    def make(self) -> AdaptiveWorker:
        count = [0]

        def clock() -> float:
            count[0] += 1
            return count[0] * (0.005 if count[0] // 7 % 2 else 0.0009)

        return AdaptiveWorker(reactor, clock=clock, usage=lambda: (clock(), 0))


class ReadWorkersTests(RealWorkerContract, TestCase):
    ordered = False

    def make(self) -> ReadWorkers:
        return ReadWorkers(reactor, 3)


class StepWorkerTests(WorkerContract, TestCase):
    def make(self) -> StepWorker:
        return StepWorker()

    async def settle(self, waited: Deferred[Any]) -> Any:
        while not waited.called and self.worker.step():
            pass
        return await waited

    def test_nothing_happens_unless_stepped(self) -> None:
        ran: list[int] = []
        self.worker.run(lambda: ran.append(1), lambda *_: ran.append(2))
        self.assertEqual(ran, [])
        self.assertTrue(self.worker.step())
        self.assertEqual(ran, [1, 2])
        self.assertFalse(self.worker.step())

    def test_step_all_and_drop(self) -> None:
        ran: list[int] = []
        for number in range(3):
            self.worker.run(lambda n=number: ran.append(n), lambda *_: None)
        self.assertEqual(self.worker.step_all(), 3)
        self.worker.run(lambda: ran.append(9), lambda *_: None)
        self.worker.drop()
        self.assertEqual(self.worker.step_all(), 0)
        self.assertEqual(ran, [0, 1, 2])


class ImmediateWorkerTests(WorkerContract, TestCase):
    def make(self) -> ImmediateWorker:
        return ImmediateWorker()


class BatchTests(TestCase):
    def test_one_call_for_all_that_waited(self) -> None:
        fake = FakeReactor()
        worker = ThreadWorker(fake)
        entered, gate = threading.Event(), threading.Event()
        told: list[int] = []

        def first() -> int:
            entered.set()
            gate.wait(60)
            return 0

        worker.run(first, lambda result, _: told.append(result))
        self.assertTrue(entered.wait(60))
        for number in range(1, 33):
            worker.run(lambda n=number: n, lambda result, _: told.append(result))
        gate.set()
        fake.turn()
        self.assertEqual(told, [0])
        fake.turn()
        self.assertEqual(told, list(range(33)))
        stopped = worker.stop()
        fake.turn()
        self.successResultOf(stopped)
        self.assertEqual(fake.calls, [])

    def test_reads_run_side_by_side(self) -> None:
        fake = FakeReactor()
        workers = ReadWorkers(fake, 3)
        meeting = threading.Barrier(3)
        told: list[int] = []
        for _ in range(3):
            workers.run(lambda: meeting.wait(60), lambda result, _: told.append(result))
        while len(told) < 3:
            fake.turn()
        self.assertEqual(sorted(told), [0, 1, 2])
        stopped = workers.stop()
        for _ in range(3):
            fake.turn()
        self.successResultOf(stopped)


class AdaptingTests(TestCase):
    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.clock = Clock()
        self.preempted = 0.0
        self.waited = 0
        self.worker = AdaptiveWorker(self.reactor, clock=self.clock, usage=self.usage)
        self.told: list[Any] = []

    def tearDown(self) -> None:
        stopped = self.worker.stop()
        self.reactor.turn()
        self.successResultOf(stopped)

    def usage(self) -> tuple[float, int]:
        return self.clock.now - self.preempted, self.waited

    def give(self, seconds: float = 0.0, result: Any = None) -> None:
        self.worker.run(self.clock.job(seconds, result), lambda got, _: self.told.append(got))

    def test_quick_jobs_run_here(self) -> None:
        for number in range(100):
            self.give(0.0001, number)
        self.assertEqual(self.told, list(range(100)))
        self.assertTrue(self.worker.inline)
        self.assertEqual(self.reactor.calls, [])

    def test_a_job_that_lost_its_processor_is_not_slow(self) -> None:
        def preempted() -> None:
            self.clock.now += 0.05
            self.preempted += 0.05

        self.worker.run(preempted, lambda *_: None)
        self.assertTrue(self.worker.inline)

    def test_a_job_that_waited_is(self) -> None:
        def waits() -> None:
            self.clock.now += 0.05
            self.preempted += 0.05
            self.waited += 1

        self.worker.run(waits, lambda *_: None)
        self.assertFalse(self.worker.inline)

    def test_a_slow_job_sends_the_next_to_the_thread_for_a_while(self) -> None:
        self.give(0.0041, 0)
        self.assertFalse(self.worker.inline)
        self.give(0.0, 1)
        self.assertEqual(self.told, [0])
        self.reactor.turn()
        self.assertEqual(self.told, [0, 1])
        self.clock.now += limits.INLINE_RETRY_SECONDS_MIN
        self.assertTrue(self.worker.inline)
        self.give(0.0, 2)
        self.assertEqual(self.told, [0, 1, 2])

    def test_many_middling_jobs_do_too(self) -> None:
        for _ in range(50):
            if not self.worker.inline:
                break
            self.give(0.003)
        self.assertFalse(self.worker.inline)
        self.assertGreater(len(self.told), 3)

    def test_the_while_doubles_up_to_a_bound(self) -> None:
        waits = []
        for _ in range(12):
            self.give(0.005)
            before = self.clock.now
            while not self.worker.inline:
                self.clock.now += limits.INLINE_RETRY_SECONDS_MIN / 2
            waits.append(round(self.clock.now - before, 3))
        expected = [
            min(limits.INLINE_RETRY_SECONDS_MIN * 2**n, limits.INLINE_RETRY_SECONDS_MAX)
            for n in range(12)
        ]
        for wait, wanted in zip(waits, expected, strict=True):
            self.assertApproximates(wait, wanted, limits.INLINE_RETRY_SECONDS_MIN)
        self.clock.now += 2 * limits.INLINE_RETRY_SECONDS_MAX
        self.give(0.005)
        self.clock.now += limits.INLINE_RETRY_SECONDS_MIN
        self.assertTrue(self.worker.inline)

    def test_never_overtakes_the_thread(self) -> None:
        gate = threading.Event()
        self.give(0.005, 0)
        self.worker.run(lambda: gate.wait(60), lambda *_: self.told.append(1))
        self.clock.now += limits.INLINE_RETRY_SECONDS_MIN
        self.assertFalse(self.worker.inline)
        self.give(0.0, 2)
        self.assertEqual(self.told, [0])
        gate.set()
        # Job 2 is in the thread's queue, in the same batch or the next.
        while len(self.told) < 3:
            self.reactor.turn()
        self.assertEqual(self.told, [0, 1, 2])

    def test_finished_but_untold_jobs_are_not_overtaken(self) -> None:
        self.give(0.005, 0)
        self.give(0.0, 1)
        self.assertTrue(self.reactor.called.acquire(timeout=60))
        self.reactor.called.release()
        self.clock.now += limits.INLINE_RETRY_SECONDS_MIN
        self.give(0.0, 2)
        self.assertEqual(self.told, [0])
        self.reactor.turn()
        self.reactor.turn()
        self.assertEqual(self.told, [0, 1, 2])

    def test_the_last_done_of_the_thread_may_go_on_here(self) -> None:
        def more(*_: Any) -> None:
            self.clock.now += limits.INLINE_RETRY_SECONDS_MIN
            self.give(0.0, 1)

        self.give(0.005, 0)
        self.worker.run(lambda: None, more)
        self.reactor.turn()
        self.assertEqual(self.told, [0, 1])

    def test_a_chain_does_not_keep_the_reactor_for_long(self) -> None:
        def again(*_: Any) -> None:
            self.told.append(None)
            if len(self.told) < 10000:
                self.worker.run(self.clock.job(0.0005), again)

        before = self.clock.now
        self.worker.run(self.clock.job(0.0005), again)
        self.assertLess(self.clock.now - before, limits.INLINE_BURST_SECONDS_MAX + 0.001)
        count = len(self.told)
        self.reactor.turn()
        self.assertGreater(len(self.told), count)
        while len(self.told) < 10000:
            self.reactor.turn()
