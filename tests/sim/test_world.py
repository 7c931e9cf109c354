"""The simulation by seeds: a fixed set, and fresh ones on every run."""

from __future__ import annotations

import os
from random import SystemRandom

from twisted.trial.unittest import SynchronousTestCase

from tests.sim.runs import PROCESSES, a_base, beside, merged
from tests.sim.world import World

#: Seeds that are run every time.
SEEDS = 1800
#: And fresh ones; QDS_SIM_SEEDS gives another number.  `make soak` runs nothing else, without end.
FRESH_SEEDS = int(os.environ.get("QDS_SIM_SEEDS", "200"))


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
        results = []
        for first, count in ((0, SEEDS), (fresh, FRESH_SEEDS)):
            each = count // PROCESSES
            results += beside(
                [["--seeds", str(first + part * each), str(each)] for part in range(PROCESSES)]
            )
        counts, violations = merged(results)
        print(f"fresh seeds from {fresh}: {dict(sorted(counts.items()))}")
        told = [
            f"{text}\n  reproduce it: python -m tests.sim {s}" for s, text in violations.items()
        ]
        self.assertEqual(told, [])
        for what in (
            "power cut alpha", "power cut beta", "kill driver", "kill pmd", "kill rmd", "cut link",
            "error", "recoveries", "mirrors checked", "reads", "refused requests", "auto refresh",
            "dirty refresh", "smart refresh", "full refresh", "bypass on", "bypass off",
            "direct writes", "extend", "free", "corruption", "refused over corruption",
            "synchronous answers", "near-synchronous answers", "degraded answers", "degraded ended",
            "operation",
            "cut path", "hang path", "slow path", "path joined", "stripes sent again",
            "frames in order again", "messages unpacked",
        ):  # fmt: skip
            self.assertGreater(counts[what], 0, what)
