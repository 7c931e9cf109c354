"""fio runs through every mode change in turn: no error, and identical mirrors at the end.

Two minutes; ``QDS_MODES_SECONDS`` says otherwise (bench/modes.py), ``QDS_MODES_REPORT`` names a
file for what was done, ``QDS_MODES_ONLY`` chooses steps by a pattern, ``QDS_MODES_LAB`` has further
options of ``qdslab create``.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

from twisted.trial.unittest import TestCase

from tests.integration.lab import draw_seed, in_thread
from tests.integration.modes import STEPS, Modes, Step

SECONDS = float(os.environ.get("QDS_MODES_SECONDS", "120"))
ONLY = os.environ.get("QDS_MODES_ONLY", "")
LAB = os.environ.get("QDS_MODES_LAB", "").split()
REPORT = os.environ.get("QDS_MODES_REPORT")
#: At least one round of every step is gone through, however slow the machine is.
ROUND_SECONDS = 600


class ModesTests(TestCase):
    timeout = SECONDS + ROUND_SECONDS

    @in_thread
    def test_every_mode_change_in_turn(self) -> None:
        seed = draw_seed(self)
        modes = Modes(self, seed, *LAB)
        modes.begin()
        steps = [step for step in STEPS if re.search(ONLY, step.name)]
        self.took: dict[str, list[float]] = {step.name: [] for step in steps}
        started, rounds = time.monotonic(), 0
        while not rounds or time.monotonic() - started < SECONDS:
            for step in modes.source.sample(steps, len(steps)):
                if rounds and time.monotonic() - started >= SECONDS:
                    break
                self.go(modes, step)
            rounds += 1
            modes.unload()
            modes.settle()
        seconds = time.monotonic() - started
        modes.until(modes.pool_is_free, "the pool to be free")
        modes.stop()
        modes.compare()
        written, verified = (
            sum(leg[what] for leg in modes.legs) for what in ("written", "verified")
        )
        self.assertGreater(verified, written // 2)
        if REPORT:
            told = {
                "seed": seed,
                "seconds": round(seconds, 1),
                "rounds": rounds,
                "steps": {
                    name: [round(one, 2) for one in took] for name, took in self.took.items()
                },
                "written_bytes": written,
                "verified_bytes": verified,
            }
            Path(REPORT).write_text(json.dumps(told))

    def go(self, modes: Modes, step: Step) -> None:
        """Go through a step, and back to connected and coherent."""
        print(f"{time.strftime('%H:%M:%S')} {step.name}", flush=True)
        began = time.monotonic()
        if step.offline and modes.is_loaded:
            modes.unload()
        if not step.offline and not modes.is_loaded:
            modes.load()
        step.run(modes)
        modes.normal()
        if modes.is_loaded:
            modes.writes_go_on()
        self.took[step.name].append(time.monotonic() - began)
