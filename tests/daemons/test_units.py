"""The systemd units: valid, and granting what the daemons ask for, and no more (rules.md 20)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

UNITS = Path(__file__).parents[2] / "conf" / "systemd"


def settings(name: str) -> dict[str, str]:
    lines = (UNITS / name).read_text().splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line and line[0] not in "#[")
    return {key: value for key, _, value in pairs}


class UnitTests(SynchronousTestCase):
    def test_driver_and_pmd_may_protect_their_memory(self) -> None:
        for name in ("qdsdriver.service", "qdspmd.service"):
            unit = settings(name)
            self.assertEqual(unit["LimitMEMLOCK"], "infinity")
            self.assertEqual(unit["OOMScoreAdjust"], "-1000")
            for capabilities in ("CapabilityBoundingSet", "AmbientCapabilities"):
                self.assertEqual(unit[capabilities], "CAP_SYS_RESOURCE", name)

    def test_the_rmd_has_no_capability(self) -> None:
        unit = settings("qdsrmd.service")
        self.assertEqual((unit["CapabilityBoundingSet"], unit["AmbientCapabilities"]), ("", ""))
        self.assertNotIn("OOMScoreAdjust", unit)

    def test_a_child_killed_for_memory_is_the_masters_to_restart(self) -> None:
        for name in ("qdsdriver.service", "qdspmd.service", "qdsrmd.service"):
            self.assertEqual(settings(name)["OOMPolicy"], "continue")

    def test_systemd_understands_them(self) -> None:
        if shutil.which("systemd-analyze") is None:
            raise SkipTest("systemd-analyze is missing")
        files = sorted(map(str, UNITS.iterdir()))
        done = subprocess.run(
            ["systemd-analyze", "verify", *files], capture_output=True, text=True, timeout=60
        )
        # The manual pages need not be installed here, nor the units.
        wrong = [
            line for line in done.stderr.splitlines()
            if line.startswith(("qds", str(UNITS))) and "Command 'man " not in line
        ]  # fmt: skip
        self.assertEqual(wrong, [])
