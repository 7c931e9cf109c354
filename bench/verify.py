"""What an application notices of a verify: fio beside none, and beside one after the other.

Each round runs every job twice, at first without a verify, then with ``verify_every`` of a second.
Shown are requests per second and the 99th percentile of their latency, and the ratios.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import fio
from systems import MIB, Lab

FILL = fio.Job("fill", "write", "1M", 4, False)
JOBS = tuple(job for job in fio.JOBS if job.per_second)


class Load(NamedTuple):
    """What a job achieved: requests per second, and the slowest but one in a hundred, in us."""

    iops: float
    p99: float


def load(lab: Lab, job: fio.Job, size: int, seconds: float) -> Load:
    """Run a job."""
    told = fio.report(job, lab.uri, size, seconds)
    return Load(told["iops"], told["clat_ns"]["percentile"]["99.000000"] / 1e3)


def measure(lab: Lab, size: int, seconds: float, rate: str) -> dict[str, list[Load]]:
    """Run every job without a verify, and with one after the other."""
    found: dict[str, list[Load]] = {}
    for job in JOBS:
        lab.at(lab.primary, "qdsset", "verify_every=never", f"verify_rate={rate}")
        lab.settle()
        alone = load(lab, job, size, seconds)
        lab.settle()
        lab.at(lab.primary, "qdsset", "verify_every=1")
        found[job.name] = [alone, load(lab, job, size, seconds)]
    verify = lab.group()["verify"]
    if verify is None or (verify["result"] or "equal") == "differs":
        raise SystemExit(f"no verify, or a difference: {verify}")
    return found


def main() -> int:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of the device")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each job")
    parser.add_argument("--rate", default="32M", help="verify_rate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size = options.size * MIB
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    directory = Path(tempfile.mkdtemp(prefix="qdsbench", dir=place))
    lab = Lab(directory, size, 128 * MIB)
    rounds: list[dict[str, list[Load]]] = []
    try:
        lab.start()
        fio.run(FILL, lab.uri, size, 0, "--refill_buffers")
        for _ in range(options.rounds):
            rounds.append(measure(lab, size, options.seconds, options.rate))
    finally:
        lab.stop()
        shutil.rmtree(directory, ignore_errors=True)
    print(f"{'job':20} {'alone':>8} {'verify':>8} {'ratio':>6}  p99 us {'alone':>8} {'verify':>8}")
    for job in JOBS:
        pairs = [one[job.name] for one in rounds]
        alone, beside = (median(pair[i].iops for pair in pairs) for i in (0, 1))
        slow, slower = (median(pair[i].p99 for pair in pairs) for i in (0, 1))
        ratio = median(pair[1].iops / pair[0].iops for pair in pairs)
        rates = f"{alone:8.0f} {beside:8.0f} {ratio:6.2f}"
        print(f"{job.name:20} {rates}         {slow:8.0f} {slower:8.0f}")
    if options.json:
        kept: list[dict[str, Any]] = [
            {name: [one._asdict() for one in pair] for name, pair in one_round.items()}
            for one_round in rounds
        ]
        options.json.write_text(json.dumps(kept, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
