"""fio through every change of mode in turn, for half an hour: no error, and identical mirrors.

    python bench/modes.py [--minutes 30] [--seed N] [--memory] [--json FILE]

The steps are those of tests/integration/modes.py, in an order drawn by the seed; fio writes, reads
back and verifies all the time.  Shown is how long each step took until the group was connected and
coherent again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
TEST = "tests.integration.test_modes"
MIB = 1 << 20


def run(minutes: float, seed: int | None, lab: str) -> dict[str, Any]:
    """Run the test for so long; give its report.

    :param lab: further options of ``qdslab create``.
    :raises SystemExit: it failed, or was skipped.
    """
    with tempfile.TemporaryDirectory(prefix="qdb-") as place:
        report = Path(place) / "report.json"
        environment = {
            **os.environ,
            "QDS_MODES_SECONDS": str(minutes * 60),
            "QDS_MODES_REPORT": str(report),
            "QDS_MODES_LAB": lab,
            **({"QDS_SEED": str(seed)} if seed is not None else {}),
        }
        trial = [
            str(Path(sys.executable).parent / "trial"),
            f"--temp-directory={place}/trial",
            TEST,
        ]
        done = subprocess.run(trial, cwd=REPOSITORY, env=environment)
        if done.returncode or not report.exists():
            sys.exit(done.returncode or 1)
        told: dict[str, Any] = json.loads(report.read_text())
        return told


def show(told: dict[str, Any]) -> None:
    """Print the report as a table."""
    width = max(map(len, told["steps"]))
    print(f"\n{'step':{width}}  times  median s  longest s")
    for name, took in told["steps"].items():
        print(f"{name:{width}}  {len(took):5}  {median(took):8.1f}  {max(took):9.1f}")
    written, verified = (told[f"{what}_bytes"] / MIB for what in ("written", "verified"))
    print(
        f"\nseed {told['seed']}: {told['rounds']} rounds in {told['seconds'] / 60:.1f} min, "
        f"{written:.0f} MiB written, {verified:.0f} MiB verified, no error, mirrors identical"
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="default: 30")
    parser.add_argument("--seed", type=int, help="run a seed again")
    parser.add_argument("--memory", action="store_true", help="keep the writelogs in memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the report there")
    chosen = parser.parse_args()
    told = run(chosen.minutes, chosen.seed, "--memory" if chosen.memory else "")
    if chosen.json:
        chosen.json.write_text(json.dumps(told, indent=1) + "\n")
    show(told)


if __name__ == "__main__":
    main()
