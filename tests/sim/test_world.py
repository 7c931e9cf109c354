"""The simulation by seeds: a fixed set, and fresh ones on every run."""

from __future__ import annotations

import os
from random import SystemRandom

from twisted.trial.unittest import SynchronousTestCase

from tests.sim.runs import PROCESSES, a_base, beside, merged
from tests.sim.world import World

#: Seeds that are run every time, and as many fresh ones; QDS_SIM_SEEDS gives another number.
SEEDS = int(os.environ.get("QDS_SIM_SEEDS", "1000"))


class SeedTests(SynchronousTestCase):
    def test_a_seed_reproduces_its_run(self) -> None:
        traces = []
        for _ in range(2):
            with a_base() as base:
                world = World(7, base)
                try:
                    world.run()
                finally:
                    world.close()
            traces.append((world.trace.hexdigest(), world.steps, world.counts))
        self.assertEqual(*traces)

    def test_invariants(self) -> None:
        """No invariant is violated, and what threatens them has happened."""
        fresh = SystemRandom().getrandbits(40)
        each = SEEDS // PROCESSES
        parts = [
            ["--seeds", str(first + part * each), str(each)]
            for part in range(PROCESSES)
            for first in (0, fresh)
        ]
        results = []
        while parts:
            results += beside(parts[:PROCESSES])
            del parts[:PROCESSES]
        counts, violations = merged(results)
        print(f"fresh seeds from {fresh}: {dict(sorted(counts.items()))}")
        told = [
            f"{text}\n  reproduce it: python -m tests.sim {s}" for s, text in violations.items()
        ]
        self.assertEqual(told, [])
        for what in (
            "power cut alpha", "power cut beta", "kill driver", "kill pmd", "kill rmd", "cut link",
            "error", "refresh", "recoveries", "mirrors checked", "reads", "refused requests",
        ):  # fmt: skip
            self.assertGreater(counts[what], 0, what)
