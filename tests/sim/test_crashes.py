"""Every crash of every sequence of up to three operations."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.sim.runs import PROCESSES, beside, merged
from tests.sim.script import LENGTH_MAX, OPERATIONS, sequences

STATES_MIN = 100_000


class CrashTests(SynchronousTestCase):
    def test_every_crash_of_every_sequence(self) -> None:
        results = beside([["--crashes", str(part), str(PROCESSES)] for part in range(PROCESSES)])
        counts, violations = merged(results)
        states = set().union(*(result["states"] for result in results))
        print(f"{len(states)} distinct crash states: {dict(sorted(counts.items()))}")
        told = [f"{text}: python -m tests.sim --sequence {s}" for s, text in violations.items()]
        self.assertEqual(told, [])
        every = sum(len(OPERATIONS) ** length for length in range(1, LENGTH_MAX + 1))
        # And those that answer synchronously.
        self.assertEqual(counts["sequences"], len(list(sequences())))
        self.assertGreater(counts["sequences"], every)
        self.assertGreaterEqual(len(states), STATES_MIN)
