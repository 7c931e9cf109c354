"""qdsmirror beside its peers under the same fio jobs, in turn within one run; prints ratios.

``make bench`` runs everything with its defaults; ``make bench BENCH='--rounds 5'`` passes options.
Absolute figures drift from hour to hour on a shared machine, so each round loads every system in
turn with the same job, a round's ratio is taken within it, and the table shows the median ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fio
import outage
import phases
import tlsrate
from systems import MIB, Lab, MissingError, Nbdkit, QemuMirror, System

#: rates[job][system] = one figure for each round.
Rates = dict[str, dict[str, list[float]]]


class Target(NamedTuple):
    """A ratio that is aimed at (first and goal), from one job, to one peer.

    :ivar of: whose rate is divided by the peer's.
    """

    job: str
    peer: str
    first: float
    goal: float
    of: str = Lab.name


TARGETS = (
    Target("4k write, depth 32", "nbdkit file", 0.4, 1.0),
    Target("4k write, depth 1", "nbdkit file", 0.3, 0.8),
    Target("4k write, depth 32", "qemu background", 3, 10),
    Target("1M seq. write, depth 4", "nbdkit file", 0.3, 0.8),
    Target("4k read, depth 32", "nbdkit file", 0.8, 1.2),
    Target("4k write, depth 32", "qemu write-blocking", 2, 5, f"{Lab.name} sync"),
)
DRAIN_TARGET = (0.5, 0.9)
MEMORY_TARGET_MIB = (150, 80)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    parser = argparse.ArgumentParser(prog="bench/peers.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of every job (default: 3)")
    parser.add_argument("--seconds", type=float, default=3, help="of a job (default: 3)")
    parser.add_argument("--size", type=int, default=256, help="of the device, MiB (default: 256)")
    parser.add_argument("--writelog", type=int, default=1024, help="MiB (default: 1024)")
    parser.add_argument("--outage", type=float, default=20, help="seconds (default: 20)")
    parser.add_argument("--rate", default="20M", help="of writes in the outage (default: 20M)")
    parser.add_argument(
        "--bypass",
        action="store_true",
        help="the outage's writelog holds a tenth of it: it fills, and the group goes into bypass",
    )
    parser.add_argument(
        "--only",
        choices=("peers", "sync", "drain", "refresh", "memory"),
        action="append",
        help="measure only this; may be repeated (sync: of the peers those that answer only once "
        "the mirror has it)",
    )
    parser.add_argument("--directory", default="/dev/shm", help="where files go (default: tmpfs)")
    parser.add_argument("--json", metavar="FILE", help="also write every figure to a file")
    return parser


@contextmanager
def running(makers: Sequence[Callable[[], System]]) -> Iterator[list[System]]:
    """Start the systems that can be; say which cannot, and why; stop them at the end."""
    systems: list[System] = []
    with ExitStack() as stack:
        for make in makers:
            try:
                system = make()
                stack.callback(system.stop)
                system.start()
            except (MissingError, TimeoutError) as error:
                print(f"left out: {error}", file=sys.stderr)
            else:
                systems.append(system)
        yield systems


def compare(systems: Sequence[System], size: int, seconds: float, rounds: int) -> Rates:
    """Run every job on every system in turn, so often."""
    rates: Rates = {job.name: {system.name: [] for system in systems} for job in fio.JOBS}
    for turn in range(rounds):
        for job in fio.JOBS:
            for system in systems:
                rate = fio.run(job, system.uri, size, seconds)
                system.settle()
                rates[job.name][system.name].append(rate)
                say(f"round {turn + 1}: {job.name}: {system.name}: {rate:,.0f}")
    return rates


def ratio(rates: Rates, job: str, of: str, to: str) -> float:
    """Give the median over the rounds of one system's rate divided by another's."""
    return statistics.median(
        a / b for a, b in zip(rates[job][of], rates[job][to], strict=True) if b
    )


def print_rates(rates: Rates) -> None:
    """Print the medians, and each system's ratio to the first one."""
    names = list(next(iter(rates.values())))
    row("", *names)
    for job in fio.JOBS:
        cells = []
        for name in names:
            unit = "/s" if job.per_second else " MB/s"
            median = statistics.median(rates[job.name][name])
            cells.append(f"{median:,.0f}{unit} ({ratio(rates, job.name, name, names[0]):.2f})")
        row(job.name, *cells)


def print_targets(rates: Rates) -> None:
    """Print the ratios that are aimed at."""
    row("qdsmirror divided by", "ratio", "first", "goal", "")
    for target in TARGETS:
        present = rates[target.job]
        if target.of in present and target.peer in present:
            value = ratio(rates, target.job, target.of, target.peer)
            what = "" if target.of == Lab.name else target.of.removeprefix(Lab.name)[1:] + " "
            judged(f"{what}{target.peer}, {target.job}", value, target.first, target.goal)


def judged(what: str, value: float, first: float, goal: float) -> None:
    """Print one ratio beside its targets."""
    verdict = "goal" if value >= goal else "first" if value >= first else "MISSED"
    row(what, f"{value:.2f}", f"{first:g}", f"{goal:g}", verdict)


def row(*cells: str) -> None:
    """Print one row of a table."""
    wide = 24 if len(cells) < 6 else 10
    print("".join([f"{cells[0]:40}", *(f"{cell:>{wide}}" for cell in cells[1:])]).rstrip())


def say(text: str) -> None:
    """Show progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def measure_peers(options: argparse.Namespace, directory: Path, synchronous: bool = False) -> Rates:
    """Run the comparison and print its tables.

    :param synchronous: only of those that answer once the mirror has it.
    """
    size = options.size * MIB
    makers: list[Callable[[], System]] = [
        lambda: Nbdkit(directory, size),
        lambda: QemuMirror(directory, size, "background"),
        lambda: QemuMirror(directory, size, "write-blocking"),
        lambda: Lab(directory, size, options.writelog * MIB),
        lambda: Lab(directory, size, options.writelog * MIB, "lab-sync", mode="sync"),
    ]
    if synchronous:
        makers = [makers[2], makers[4]]
    with running(makers) as systems:
        if not systems:
            return {}
        rates = compare(systems, size, options.seconds, options.rounds)
    print()
    print_rates(rates)
    print()
    print_targets(rates)
    return rates


def measure_lab(
    directory: Path, size: int, writelog: int, name: str, overflow: str = "block"
) -> tuple[Lab, ExitStack]:
    """Start a lab for one phase; the stack stops it."""
    stack = ExitStack()
    lab = Lab(directory, size, writelog, name, overflow)
    stack.callback(lab.stop)
    try:
        lab.start()
    except BaseException:
        stack.close()
        raise
    return lab, stack


def measure_flow(options: argparse.Namespace, directory: Path, what: str) -> dict[str, Any]:
    """Measure draining or a refresh, each round beside a bare TLS transfer."""
    writelog = options.writelog * MIB
    size = max(options.size * MIB, writelog)
    lab, stack = measure_lab(directory, size, writelog, what)
    figures: dict[str, Any] = {"tls": [], what: []}
    with stack:
        for turn in range(options.rounds):
            figures["tls"].append(tlsrate.measure())
            rate = (
                phases.drain(lab, writelog * 7 // 10)
                if what == "drain"
                else phases.refresh(lab, size)
            )
            figures[what].append(rate.per_second)
            say(
                f"round {turn + 1}: {what} {figures[what][-1]:,.0f} MB/s, {figures['tls'][-1]:,.0f}"
            )
    value = statistics.median(a / b for a, b in zip(figures[what], figures["tls"], strict=True))
    print()
    row("MB/s", what, "bare TLS")
    row("median", *(f"{statistics.median(figures[key]):,.0f}" for key in (what, "tls")))
    judged(f"{what} divided by bare Twisted TLS", value, *DRAIN_TARGET)
    return figures


def measure_memory(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Measure the children's memory through an outage."""
    seconds, rate, overflow = options.outage, options.rate, "bypass" if options.bypass else "block"
    writelog = outage.writelog_for(seconds, rate, options.bypass)
    lab, stack = measure_lab(directory, options.size * MIB, writelog, "memory", overflow)
    with stack:
        memory = outage.outage(lab, options.size * MIB, seconds, rate)
    bypass = "no bypass" if memory.bypass is None else f"bypass after {memory.bypass:.0f} s"
    print(f"\n{seconds:g} s outage at {rate}/s, {writelog // MIB} MiB writelog, {bypass}")
    row("MiB", "start", "middle", "end", "after", "peak", "first", "goal", "")
    first, goal = MEMORY_TARGET_MIB
    for name, peak in sorted(memory.peaks.items()):
        verdict = "goal" if peak <= goal * MIB else "first" if peak <= first * MIB else "MISSED"
        held = [one.get(name, 0) for one in memory[:4]]
        shown = [f"{one / MIB:.1f}" if one else "-" for one in (*held, peak)]
        row(name, *shown, str(first), str(goal), verdict)
    if options.bypass and memory.bypass is None:
        raise MissingError("the outage did not lead into bypass")
    return memory._asdict()


def main() -> int:
    """Measure what was asked for."""
    options = build_parser().parse_args()
    chosen = options.only or ["peers", "drain", "refresh", "memory"]
    figures: dict[str, Any] = {}
    status = 0
    with tempfile.TemporaryDirectory(prefix="qdsbench", dir=options.directory) as name:
        directory = Path(name)
        for what in chosen:
            try:
                if what in ("peers", "sync"):
                    figures[what] = measure_peers(options, directory, what == "sync")
                elif what == "memory":
                    figures[what] = measure_memory(options, directory)
                else:
                    figures[what] = measure_flow(options, directory, what)
            except (MissingError, TimeoutError) as error:
                print(f"{what}: {error}", file=sys.stderr)
                status = 1
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
