"""Every crash of every sequence of up to three operations."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.sim.runs import PROCESSES, beside, merged
from tests.sim.script import LENGTH_MAX, OPERATIONS

STATES_MIN = 100_000


class CrashTests(SynchronousTestCase):
    def test_every_crash_of_every_sequence(self) -> None:
        results = beside([["--crashes", str(part), str(PROCESSES)] for part in range(PROCESSES)])
        counts, violations = merged(results)
        states = set().union(*(result["states"] for result in results))
        print(f"{len(states)} distinct crash states: {dict(sorted(counts.items()))}")
        told = [f"{text}: python -m tests.sim --sequence {s}" for s, text in violations.items()]
        self.assertEqual(told, [])
        operations = len(OPERATIONS)
        self.assertEqual(
            counts["sequences"], sum(operations**length for length in range(1, LENGTH_MAX + 1))
        )
        self.assertGreaterEqual(len(states), STATES_MIN)
