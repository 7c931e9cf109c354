"""The age of the oldest uncommitted entry against the exact one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.lag import SAMPLES_MAX, LagClock


class LagTests(SynchronousTestCase):
    def test_nothing_waits(self) -> None:
        clock = LagClock()
        self.assertEqual(clock.age(0, 0, 5.0), 0.0)
        self.assertEqual(clock.age(0, 3, 5.0), 0.0)
        clock.framed(1, 5.0)
        self.assertEqual(clock.age(1, 1, 9.0), 0.0)

    def test_of_the_entry_after_the_committed_one(self) -> None:
        clock = LagClock()
        for gsn in range(1, 11):
            clock.framed(gsn, float(gsn))
        self.assertEqual(clock.age(0, 10, 20.0), 19.0)
        self.assertEqual(clock.age(4, 10, 20.0), 15.0)
        self.assertEqual(clock.age(9, 10, 20.0), 10.0)
        self.assertEqual(clock.age(10, 10, 20.0), 0.0)
        clock.framed(11, 30.0)
        self.assertEqual(clock.age(10, 11, 31.0), 1.0)

    def test_never_negative(self) -> None:
        clock = LagClock()
        clock.framed(1, 5.0)
        self.assertEqual(clock.age(0, 1, 4.0), 0.0)

    def test_a_long_outage_in_bounded_memory(self) -> None:
        clock = LagClock()
        now = 0.0
        for gsn in range(1, 50_001):
            now = gsn * 0.1
            clock.framed(gsn, now)
            self.assertLessEqual(len(clock._samples), SAMPLES_MAX)
        for committed in range(0, 50_000, 997):
            exact = now - (committed + 1) * 0.1
            age = clock.age(committed, 50_000, now)
            self.assertLess(abs(age - exact), now / SAMPLES_MAX * 4)
        # What is over is forgotten with its coarseness.
        self.assertEqual(clock.age(50_000, 50_000, now), 0.0)
        clock.framed(50_001, now + 1)
        clock.framed(50_002, now + 1.1)
        self.assertAlmostEqual(clock.age(50_001, 50_002, now + 2), 0.9)

    @settings(max_examples=100)
    @given(st.lists(st.tuples(st.floats(0, 2), st.integers(0, 3)), max_size=40))
    def test_never_less_than_the_truth(self, steps: list[tuple[float, int]]) -> None:
        clock = LagClock()
        framed: dict[int, float] = {}
        committed = 0
        now = 0.0
        for pause, acked in steps:
            now += pause
            gsn = len(framed) + 1
            framed[gsn] = now
            clock.framed(gsn, now)
            committed = min(committed + acked, gsn)
            age = clock.age(committed, gsn, now)
            exact = now - framed[committed + 1] if committed < gsn else 0.0
            if committed < gsn:
                self.assertLessEqual(age, exact + 0.05 + 1e-9)
                self.assertGreaterEqual(age, exact - 0.05 - 1e-9)
            else:
                self.assertEqual(age, 0.0)
