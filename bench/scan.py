"""What a scan after kill -9 costs: by the log's size, and by what was written since a checkpoint.

The cost should be flat in the first and linear in the second (invariant RECOVER).  Checkpoints are
a minute apart here, so a kill leaves exactly the writes that were made.  Each figure is the time of
``qdswlscan --check`` less that of ``qdswlscan --version``, the median of some; ratios are to the
first row.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import fio
from systems import MIB, Lab, processes, wait_for

LOAD = fio.Job("load", "randwrite", "64k", 8, False)
SIZE = 64 * MIB
BLOCK = 64 * 1024
WRITES = 400
LOG_SIZES = (64 * MIB, 256 * MIB, 1024 * MIB)
MANY_WRITES = (1000, 2000, 4000, 8000)
TUNABLES = "[tunables]\nmetadata_seconds = 60\nmetadata_entries = 1000000\n[ldsus]"


class Scan(NamedTuple):
    """What one scan took, and what it read."""

    seconds: float
    entries: int


def write_and_kill(lab: Lab, writes: int) -> None:
    """Make so many writes, then kill the driver's child and master before any checkpoint."""
    lab.at(lab.primary, "launchdriver")
    uri = str(lab.group()["ldsus"][0]["nbd_uri"])
    fio.run(LOAD, uri, SIZE, 0, f"--io_size={writes * BLOCK}")
    for pid in processes(lab.primary, ("qdsdriver", "dsgrp000.driver")).values():
        os.kill(pid, signal.SIGKILL)
    wait_for("the driver's end", lambda: _is_free(lab))


def scan(lab: Lab) -> Scan:
    """Check the writelog as the next start would."""
    started = time.monotonic()
    told = json.loads(lab.at(lab.primary, "qdswlscan", "--check", "--json"))
    seconds = time.monotonic() - started
    started = time.monotonic()
    lab.tool("qdswlscan", "--version")
    seconds -= time.monotonic() - started
    return Scan(seconds, int(told["groups"][0]["logs"][0]["entries_to_replay"]))


def measure(directory: Path, log: int, writes: int, times: int) -> Scan:
    """Give the median scan of a log of this size after this many writes."""
    lab = Lab(directory, SIZE, log, f"scan{log // MIB}-{writes}")
    config = lab.primary / "etc" / "dsgrp000.cfg"
    config.write_text(config.read_text().replace("[ldsus]", TUNABLES))
    try:
        write_and_kill(lab, writes)
        found = [scan(lab) for _ in range(times)]
    finally:
        lab.stop()
    return Scan(statistics.median(one.seconds for one in found), found[0].entries)


def _is_free(lab: Lab) -> bool:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "qdswlscan"), "--check", "--root", str(lab.primary)],
        capture_output=True,
    )
    return done.returncode == 0


def table(title: str, rows: list[tuple[str, Scan]]) -> None:
    """Print figures, and their ratios to the first."""
    print(f"\n{title:>24}{'scan':>12}{'ratio':>8}{'entries':>10}{'ratio':>8}")
    first = rows[0][1]
    for name, one in rows:
        print(
            f"{name:>24}{one.seconds:>10.3f} s{one.seconds / first.seconds:>8.2f}"
            f"{one.entries:>10}{one.entries / max(1, first.entries):>8.2f}"
        )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench/scan.py", description=__doc__)
    parser.add_argument("--times", type=int, default=5, help="of each scan (default: 5)")
    parser.add_argument("--directory", default="/dev/shm", help="where files go (default: tmpfs)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qdsscan", dir=options.directory) as place:
        directory = Path(place)
        sizes = [
            (f"{log // MIB} MiB", measure(directory, log, WRITES, options.times))
            for log in LOG_SIZES
        ]
        table(f"log, {WRITES} writes", sizes)
        writes = [
            (f"{count}", measure(directory, LOG_SIZES[-1], count, options.times))
            for count in MANY_WRITES
        ]
        table("writes, log 1 GiB", writes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
