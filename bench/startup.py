"""What it costs to start each command: user and system CPU time, before it does its work.

Every console script of setup.cfg is run with ``--help``, and with what it needs on a host that has
no configuration, which ends when that is noticed: by then everything is imported that a command
needs before its work.  The least of some runs counts.  Exits with 1 if one takes more than the
limit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MILLISECONDS = 150
#: What begins its work without a configuration: ``--help`` alone is run.
AT_ONCE = frozenset({"in.pmd", "in.rmd", "qdslab create"})


def cost(command: list[str], rounds: int) -> float:
    """Give the milliseconds of CPU time that a command takes, the least of some runs."""
    found = []
    for _ in range(rounds + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found.append(1000 * used)
    # The first one compiles what none has used before.
    return min(found[1:])


def words(spec: Any) -> list[str]:
    """Give what a command needs on its command line."""
    needed = []
    for place in spec.places:
        value = next(iter(place.value or ()), "").removeprefix("=")
        needed += [] if place.many or place.optional else [value or "x"]
    return needed


def measure(rounds: int) -> list[dict[str, Any]]:
    """Measure every command."""
    bin_directory = Path(sys.executable).parent
    found = list(runpy.run_path(str(ROOT / "completion" / "make.py"))["specs"]())
    results = []
    with tempfile.TemporaryDirectory(prefix="qds") as place:
        # As where it is installed: compiled once, whatever is the custom on this machine.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(place, "compiled")
        os.environ["QDS_ROOT"] = os.path.join(place, "root")
        for spec in found:
            name, *inner = spec.name.split()
            if spec.commands:
                continue
            program = str(bin_directory / name)
            told = {"command": spec.name, "help": cost([program, *inner, "--help"], rounds)}
            if spec.name not in AT_ONCE:
                told["start"] = cost([program, *inner, *words(spec)], rounds)
            results.append(told)
    return results


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="keep the figures in FILE")
    arguments = parser.parse_args()
    bare = cost([sys.executable, "-c", "pass"], arguments.rounds)
    results = measure(arguments.rounds)
    print(f"python -c pass: {bare:.0f} ms; limit {LIMIT_MILLISECONDS} ms of CPU")
    print(f"{'command':<24}{'--help':>8}{'start':>8}")
    slow = 0
    for one in results:
        start = one.get("start", 0.0)
        over = max(one["help"], start) > LIMIT_MILLISECONDS
        slow += over
        mark = "  OVER" if over else ""
        print(f"{one['command']:<24}{one['help']:>8.0f}{start:>8.0f}{mark}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"python": bare, "commands": results}))
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
