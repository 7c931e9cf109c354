"""Fuzz the parsers, guided by coverage: ``python -m tests.fuzz [--seconds N] [TARGET...]``.

Each target runs in a process of its own; what it finds worth keeping goes to build/fuzz/TARGET and
is where the next run begins.  An input that breaks a parser is kept there as crash-*, and the run
ends with 1; ``python -m tests.fuzz --replay FILE TARGET`` runs it again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["qdsmirror.core"]):
    from tests.fuzz.seeds import seeds
    from tests.fuzz.targets import TARGETS

CORPUS = Path("build/fuzz")
INPUT_BYTES_MAX = 4096


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one target in this process; does not return."""
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds()[name]):
        (corpus / f"seed-{number}").write_bytes(data)
    options = [f"-max_total_time={seconds}", f"-max_len={INPUT_BYTES_MAX}", "-rss_limit_mb=1024"]
    options += [f"-artifact_prefix={corpus}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(corpus), *options], TARGETS[name])
    atheris.Fuzz()


def main() -> int:
    """Run the targets named, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=30, help="for each target")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input again")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.targets:
        if name not in TARGETS:
            parser.error(f"no target {name}: one of {', '.join(TARGETS)}")
    if options.replay is not None:
        for name in options.targets:
            TARGETS[name](options.replay.read_bytes())
        return 0
    if options.here:
        fuzz(options.targets[0], options.seconds)
    broken = []
    for name in options.targets or TARGETS:
        command = [sys.executable, "-m", "tests.fuzz", "--here", name]
        done = subprocess.run(
            [*command, "--seconds", str(options.seconds)], stderr=subprocess.PIPE, text=True
        )
        told = [line for line in done.stderr.splitlines() if "stat::number_of_executed" in line]
        print(
            f"{name}: {(told or ['?'])[0].split()[-1]} inputs, exit {done.returncode}", flush=True
        )
        if done.returncode:
            broken.append(name)
            print(done.stderr[-4000:])
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
