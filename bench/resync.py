"""What it costs to make a mirror equal again: a full, a smart and a dirty refresh.

One in a hundred of the device is written in bypass, in scattered pieces of 64 KiB; then a refresh
leads out of it.  Its time is that of the command, from its start to the durable end; its bytes are
those that the loopback of a network namespace carried, both ways, with TLS and TCP.  With
``--rate`` that loopback passes no more bytes per second (tc-tbf(8)), as a narrow link would.
Needs root, for the namespace.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import fio
from systems import MIB, Lab, MissingError, need

from qdsmirror.tools.nbdclient import NbdClient

FILL = fio.Job("fill", "write", "1M", 4, False)
PIECE = 64 * 1024
INSIDE = "QDS_BENCH_NAMESPACE"


class Cost(NamedTuple):
    """What a refresh took.

    :ivar seconds: from the command's start to its end.
    :ivar wire: bytes over the loopback.
    """

    seconds: float
    wire: int


def wire_bytes() -> int:
    """Give what this namespace's loopback has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise MissingError("no loopback")


def refresh(lab: Lab, kind: str) -> Cost:
    """Run a refresh to its durable end."""
    before, started = wire_bytes(), time.monotonic()
    lab.at(lab.primary, "qdsrefresh", f"--{kind}")
    return Cost(time.monotonic() - started, wire_bytes() - before)


def change(lab: Lab, size: int, changed: float) -> None:
    """Write scattered pieces in bypass."""
    lab.settle()
    lab.at(lab.primary, "qdsbypass", "on")
    pieces = random.sample(range(size // PIECE), int(size * changed) // PIECE)
    with NbdClient.connect(lab.uri) as client:
        for piece in pieces:
            client.write(piece * PIECE, os.urandom(PIECE))
        client.flush()


def measure(directory: Path, size: int, changed: float) -> dict[str, Cost]:
    """Measure each kind once, in a lab of its own."""
    lab = Lab(directory, size, 128 * MIB)
    try:
        lab.start()
        fio.run(FILL, lab.uri, size, 0, "--refill_buffers")
        lab.settle()
        costs = {"full": refresh(lab, "full")}
        for kind in ("smart", "dirty"):
            change(lab, size, changed)
            costs[kind] = refresh(lab, kind)
        lab.settle()
        return costs
    finally:
        lab.stop()


def enter_namespace(rate: int) -> None:
    """Run this program again in a network namespace whose loopback has a rate."""
    shape = f"{need('tc')} qdisc add dev lo root tbf rate {rate}bps burst 1mb latency 100ms && "
    script = f'{need("ip")} link set lo up && {shape if rate else ""}exec "$@"'
    command = [need("unshare"), "--net", "sh", "-c", script, "sh", sys.executable, *sys.argv]
    sys.exit(subprocess.run(command, env={**os.environ, INSIDE: "1"}).returncode)


def main() -> int:
    """Print each round's figures, and the ratios to the full refresh of the same round."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of the device")
    parser.add_argument("--changed", type=float, default=0.01, help="part that is changed")
    parser.add_argument("--rate", type=int, default=0, help="MB (10^6 bytes) per second")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not os.environ.get(INSIDE):
        enter_namespace(options.rate * 10**6)
    size = options.size * MIB
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    rounds = []
    for _ in range(options.rounds):
        directory = Path(tempfile.mkdtemp(prefix="qdsbench", dir=place))
        try:
            costs = measure(directory, size, options.changed)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        rounds.append({kind: cost._asdict() for kind, cost in costs.items()})
        full = costs["full"]
        for kind, cost in costs.items():
            print(
                f"{kind:6} {cost.seconds:8.2f} s  1/{full.seconds / cost.seconds:5.1f} of full   "
                f"{cost.wire / size:8.2%} of the device on the wire"
            )
    if options.json:
        options.json.write_text(json.dumps(rounds, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
