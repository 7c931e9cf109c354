"""``python -m tests.sim SEED``: run a seed again and show what led to a violation.

``--seeds FIRST COUNT`` runs many; ``--soak`` runs fresh ones until it is stopped; ``--sequence``
examines the crash states of a sequence of operations, ``--crashes`` those of all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from itertools import count
from random import SystemRandom
from typing import Any

from tests.sim import crashes
from tests.sim.mutations import MUTATIONS
from tests.sim.runs import a_base, mutate, run_seed, run_seeds
from tests.sim.script import drawn, sequences


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("seed", nargs="*", type=int, help="seeds to run")
    parser.add_argument("--tail", type=int, default=60, help="steps shown before a violation")
    parser.add_argument("--seeds", nargs=2, type=int, metavar=("FIRST", "COUNT"))
    parser.add_argument("--seconds", type=float, help="at most so long")
    parser.add_argument("--crashes", nargs=2, type=int, metavar=("PART", "PARTS"))
    parser.add_argument("--draw", type=int, help="of the crashes those that this seed draws")
    parser.add_argument("--sequence", help="a schedule and operations, with commas between")
    parser.add_argument("--mutations", nargs=2, type=int, metavar=("PART", "PARTS"))
    parser.add_argument("--soak", action="store_true", help="fresh seeds until stopped")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    chosen = parser.parse_args(arguments)
    if chosen.soak:
        return soak()
    until = time.monotonic() + chosen.seconds if chosen.seconds else None
    if chosen.seeds:
        first, how_many = chosen.seeds
        result = run_seeds(range(first, first + how_many), until)
        return report(result, chosen.json)
    if chosen.crashes or chosen.sequence:
        return report(crash(chosen, until), chosen.json)
    if chosen.mutations:
        part, parts = chosen.mutations
        return report(mutate(MUTATIONS[part::parts]), chosen.json)
    violated = 0
    with a_base() as base:
        for seed in chosen.seed:
            text = run_seed(seed, base, tail=chosen.tail)
            print(f"seed {seed}: {text or 'all invariants hold'}")
            violated += bool(text)
    return 1 if violated else 0


def crash(options: argparse.Namespace, until: float | None) -> dict[str, Any]:
    """Examine the crash states of one sequence, or of a part of all of them."""
    if options.sequence:
        schedule, *names = options.sequence.split(",")
        chosen = [(int(schedule), tuple(names))]
    else:
        part, parts = options.crashes
        every = sequences() if options.draw is None else drawn(options.draw)
        chosen = list(every)[part::parts]
    with a_base() as base:
        return crashes.run(base, chosen, until)


def report(result: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(result))
    else:
        print(", ".join(f"{number} {what}" for what, number in sorted(result["counts"].items())))
        for key, text in result["violations"].items():
            print(f"{key}: {text}")
    return 1 if result["violations"] else 0


def soak() -> int:
    """Run fresh seeds; stop at the first violation."""
    counts: Counter[str] = Counter()
    begun = time.monotonic()
    first = SystemRandom().getrandbits(40)
    print(f"seeds from {first}; stop with Ctrl-C", flush=True)
    with a_base() as base:
        try:
            for seed in count(first):
                text = run_seed(seed, base, counts)
                if text:
                    print(f"{text}\n  reproduce it: python -m tests.sim {seed}")
                    return 1
                if counts["seeds"] % 500 == 0:
                    spent = time.monotonic() - begun
                    print(f"{counts['seeds']} seeds in {spent:.0f} s: 0 violations", flush=True)
        except KeyboardInterrupt:
            print(f"{counts['seeds']} seeds, 0 violations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
