"""Every crash of sequences of up to three operations, anew by chance where there are too many."""

from __future__ import annotations

from random import SystemRandom
from unittest import mock

from twisted.trial.unittest import SynchronousTestCase

from tests.sim import crashes
from tests.sim.runs import PROCESSES, a_base, beside, merged
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
        self.assertGreater(counts["rolled back"], 0)

    def test_a_crash_while_the_end_of_a_backfresh_is_completed(self) -> None:
        """One superblock says that it has ended: until all do, none may be without that word."""
        always = mock.patch.multiple(crashes, _TWICE=1, _WHOLE=1)
        with always, a_base() as base:
            result = crashes.run(base, [(0, ("power cut", "write", "resumed backfresh"))])
        self.assertEqual(result["violations"], {})
        self.assertGreater(result["counts"]["states within a recovery"], 0)
