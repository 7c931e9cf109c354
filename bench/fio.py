"""fio's nbd engine: the jobs that every system gets, and running one of them."""

from __future__ import annotations

import json
import subprocess
from typing import Any, NamedTuple

from systems import MissingError, need


class Job(NamedTuple):
    """One way to load an export.

    :ivar per_second: whether requests are counted (else bytes).
    """

    name: str
    pattern: str
    block: str
    depth: int
    per_second: bool


JOBS = (
    Job("4k write, depth 1", "randwrite", "4k", 1, True),
    Job("4k write, depth 32", "randwrite", "4k", 32, True),
    Job("64k write, depth 8", "randwrite", "64k", 8, False),
    Job("1M seq. write, depth 4", "write", "1M", 4, False),
    Job("4k read, depth 32", "randread", "4k", 32, True),
)


def run(job: Job, uri: str, size: int, seconds: float, *extra: str) -> float:
    """Load an export with a job.

    :param size: bytes of the export to use.
    :returns: requests per second, or MB (10^6 bytes) per second.
    :raises MissingError: fio failed, with its own words.
    """
    side = report(job, uri, size, seconds, *extra)
    return float(side["iops"]) if job.per_second else float(side["bw_bytes"]) / 1e6


def report(job: Job, uri: str, size: int, seconds: float, *extra: str) -> dict[str, Any]:
    """Load an export with a job; give what fio reports of its reads or writes.

    :raises MissingError: as for :func:`run`.
    """
    command = [
        need("fio"),
        *("--name=bench", "--ioengine=nbd", f"--uri={uri}", "--output-format=json"),
        *(f"--rw={job.pattern}", f"--bs={job.block}", f"--iodepth={job.depth}"),
        *(f"--size={size}", "--randrepeat=0", "--norandommap"),
        *((f"--runtime={seconds}", "--time_based") if seconds else ()),
        *extra,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise MissingError(f"fio: {done.stderr.strip() or done.stdout.strip()}")
    result = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side: dict[str, Any] = result["read" if "read" in job.pattern else "write"]
    return side
