"""The simulation sees every deliberately broken build."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.sim.mutations import MUTATIONS
from tests.sim.runs import PROCESSES, beside, merged

INVARIANTS = {
    "DURABLE", "PREFIX", "NO-AHEAD", "NO-HIDDEN", "TAIL", "COHERENT", "GENERATION", "RECOVER",
    "LOUD", "BOUND", "SYNC",
}  # fmt: skip


class MutationTests(SynchronousTestCase):
    def test_each_invariant_has_one(self) -> None:
        self.assertEqual({mutation.breaks for mutation in MUTATIONS}, INVARIANTS)

    def test_each_is_seen(self) -> None:
        results = beside([["--mutations", str(part), str(PROCESSES)] for part in range(PROCESSES)])
        counts, missed = merged(results)
        print(dict(sorted(counts.items())))
        self.assertEqual(missed, {})
        self.assertEqual(counts["seen"], len(MUTATIONS))
