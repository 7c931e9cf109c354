"""Many runs, in this process or in others beside it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.sim import crashes
from tests.sim.history import Violation
from tests.sim.mutations import Mutation
from tests.sim.sites import make_base
from tests.sim.world import World

REPOSITORY = Path(__file__).parents[2]
PROCESSES = min(2, os.cpu_count() or 1)


@contextmanager
def a_base() -> Iterator[Path]:
    """Give a directory for runs; no disk under it."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    base = Path(tempfile.mkdtemp(prefix="qdss", dir=place))
    try:
        yield make_base(base)
    finally:
        shutil.rmtree(base, True)


def run_seed(seed: int, base: Path, counts: Counter[str] | None = None, tail: int = 0) -> str:
    """Run one seed; give what was violated, or an empty string.

    :param tail: lines of what happened before, to be given too.
    """
    world = World(seed, base)
    world.keep_log = bool(tail)
    # Cycles that a run leaves are many; they are collected between runs.
    gc.disable()
    try:
        world.run()
        return ""
    except Exception as error:  # noqa: BLE001 - a crash is a finding too
        # What the product makes of a violation that passes through it comes after it.
        seen = Violation.seen
        text = str(seen[0]) if seen else f"CRASH: {error!r}\n{traceback.format_exc()}"
        return "\n".join([*world.log[-tail:], text] if tail else [text])
    finally:
        if counts is not None:
            counts.update(world.counts)
            counts.update(world.model.counts)
            counts["steps"] += world.steps
            counts["seeds"] += 1
        world.close()
        del world
        gc.enable()
        if seed % 8 == 0:
            gc.collect()


def run_seeds(seeds: Iterable[int], until: float | None = None) -> dict[str, Any]:
    """Run seeds, until the monotonic time is up; give counts and violations by seed."""
    counts: Counter[str] = Counter()
    violations: dict[str, str] = {}
    with a_base() as base:
        for seed in seeds:
            if until is not None and time.monotonic() > until:
                break
            violated = run_seed(seed, base, counts)
            if violated:
                violations[str(seed)] = violated
    return {"counts": dict(counts), "violations": violations}


def mutate(mutations: Sequence[Mutation]) -> dict[str, Any]:
    """Look whether the simulation sees each broken build; give those that it does not."""
    counts: Counter[str] = Counter()
    missed: dict[str, str] = {}
    with a_base() as base:
        for mutation in mutations:
            seen = _seen(mutation, base, counts)
            counts["seen" if seen else "missed"] += 1
            if not seen:
                missed[mutation.name] = f"not seen, though it breaks {mutation.breaks}"
    return {"counts": dict(counts), "violations": missed}


def _seen(mutation: Mutation, base: Path, counts: Counter[str]) -> bool:
    with mutation.applied():
        if mutation.sequence:
            result = crashes.run(base, [(mutation.schedule, mutation.sequence)])
            counts["sequences"] += 1
            if result["violations"]:
                return True
        for seed in mutation.chosen():
            counts["seeds"] += 1
            if run_seed(seed, base):
                return True
    return False


def beside(arguments: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Run ``python -m tests.sim`` with each of these arguments, all at once; give the results."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sim", *some, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        for some in arguments
    ]
    results = []
    for process in running:
        output, _ = process.communicate()
        if process.returncode not in (0, 1):
            raise RuntimeError(f"{process.args} ended with {process.returncode}: {output!r}")
        results.append(json.loads(output))
    return results


def merged(results: Sequence[dict[str, Any]]) -> tuple[Counter[str], dict[str, str]]:
    counts: Counter[str] = Counter()
    violations: dict[str, str] = {}
    for result in results:
        counts.update(result["counts"])
        violations.update(result["violations"])
    return counts, violations
