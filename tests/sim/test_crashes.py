"""Every crash of sequences of up to three operations, anew by chance where there are too many."""

from __future__ import annotations

from random import SystemRandom

from twisted.trial.unittest import SynchronousTestCase

from tests.sim.runs import PROCESSES, beside, merged
from tests.sim.script import LENGTH_MAX, OPERATIONS, PLAIN, drawn

STATES_MIN = 100_000


class CrashTests(SynchronousTestCase):
    def test_every_crash_of_every_sequence(self) -> None:
        seed = str(SystemRandom().getrandbits(32))
        results = beside(
            [["--crashes", str(part), str(PROCESSES), "--draw", seed] for part in range(PROCESSES)]
        )
        counts, violations = merged(results)
        states = set().union(*(result["states"] for result in results))
        print(
            f"drawn by {seed}: {len(states)} distinct crash states: {dict(sorted(counts.items()))}"
        )
        told = [f"{text}: python -m tests.sim --sequence {s}" for s, text in violations.items()]
        self.assertEqual(told, [])
        self.assertEqual(counts["sequences"], len(list(drawn(int(seed)))))
        every = sum(len(OPERATIONS) ** length for length in range(1, LENGTH_MAX))
        self.assertGreater(counts["sequences"], every + len(PLAIN) ** LENGTH_MAX)
        self.assertGreaterEqual(len(states), STATES_MIN)
