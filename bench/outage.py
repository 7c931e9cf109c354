"""The children's memory through an outage, of which the writelog holds all or only a part."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import NamedTuple

import fio
from systems import MIB, Lab, MissingError, memory, processes

OUTAGE = fio.Job("outage", "randwrite", "64k", 4, False)
SAMPLE_SECONDS = 0.5
#: So much of what is written fits into the writelog: all and a reserve, or just the beginning.
_WHOLE, _PART = 1.3, 0.1
_WHOLE_BYTES_MIN, _PART_BYTES_MIN = 128 * MIB, 32 * MIB


class Memory(NamedTuple):
    """Resident memory of each child, in bytes (0 or left out: it did not run).

    :ivar start: after the first connecting, before the outage.
    :ivar middle: after half of the outage.
    :ivar end: at the end of the outage.
    :ivar after: when the mirror was equal again.
    :ivar peaks: the largest that each had at any time.
    :ivar bypass: seconds into the outage after which the group was in bypass; ``None``: never.
    """

    start: dict[str, int]
    middle: dict[str, int]
    end: dict[str, int]
    after: dict[str, int]
    peaks: dict[str, int]
    bypass: float | None


class Watch(threading.Thread):
    """Notes again and again how much memory the children of a lab have.

    :ivar peaks: the largest resident memory of each, in bytes.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {}
        self._sites = {lab.primary: ("driver", "pmd"), lab.secondary: ("rmd",)}
        self._samples: list[tuple[float, dict[str, int]]] = []
        self._ended = threading.Event()

    def run(self) -> None:
        """Sample until stopped."""
        while not self._ended.wait(SAMPLE_SECONDS):
            self.sample()

    def stop(self) -> None:
        """Take the last sample."""
        self._ended.set()
        self.join()

    def sample(self) -> dict[str, int]:
        """Give the resident memory of each child that runs."""
        found = {}
        for site, roles in self._sites.items():
            for name, pid in _running(site, roles).items():
                resident, peak = memory(pid)
                found[name] = resident
                self.peaks[name] = max(self.peaks.get(name, 0), peak)
        self._samples.append((time.monotonic(), found))
        return found

    def at(self, when: float) -> dict[str, int]:
        """Give the sample that was taken nearest to a time of the monotonic clock."""
        return min(self._samples, key=lambda sample: abs(sample[0] - when))[1]


def _running(site: Path, roles: tuple[str, ...]) -> dict[str, int]:
    try:
        return processes(site, [f"dsgrp000.{role}" for role in roles])
    except (OSError, ValueError, IndexError):
        return {}  # A pid file that is being written or removed.


def outage(lab: Lab, size: int, seconds: float, rate: str) -> Memory:
    """Stop the rmd, write at a given rate, start it again, drain; watch the children's memory.

    :param rate: as fio takes it, e.g. ``20M``.
    """
    lab.settle()
    watch = Watch(lab)
    start = watch.sample()
    if not start:
        raise MissingError("no child's pid file was found")
    watch.start()
    try:
        lab.at(lab.secondary, "killrmds")
        began, began_at = time.monotonic(), time.time()
        try:
            fio.run(OUTAGE, lab.uri, size, seconds, f"--rate={rate}")
            end, group = watch.sample(), lab.group()
        finally:
            lab.at(lab.secondary, "launchrmds")
        in_bypass = group["state"] == "bypass"
        if in_bypass:
            lab.at(lab.primary, "qdsbypass", "off")
            lab.at(lab.primary, "qdsinfo", "--wait", "coherent", "--timeout", "300")
        lab.settle()
        time.sleep(1)
        after = watch.sample()
    finally:
        watch.stop()
    bypass = float(group["since"]) - began_at if in_bypass else None
    return Memory(start, watch.at(began + seconds / 2), end, after, watch.peaks, bypass)


def writelog_for(seconds: float, rate: str, bypass: bool) -> int:
    """Give the size of a writelog, in bytes, that holds an outage, or that overflows early in it.

    :param rate: as fio takes it.
    :param bypass: whether it overflows, after about a tenth of the time.
    """
    units = {"K": 1024, "M": MIB, "G": 1024 * MIB}
    per_second = int(rate[:-1]) * units[rate[-1].upper()] if rate[-1].isalpha() else int(rate)
    written = seconds * per_second
    if bypass:
        return max(_PART_BYTES_MIN, int(written * _PART) // MIB * MIB)
    return max(_WHOLE_BYTES_MIN, int(written * _WHOLE) // MIB * MIB + 64 * MIB)
