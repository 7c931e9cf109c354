"""Measurements of qdsmirror alone: draining a writelog, a full refresh, memory in an outage."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import NamedTuple

import fio
from systems import MIB, Lab, MissingError, peak_memory, processes, wait_for

from qdsmirror.paths import Paths
from qdsmirror.tools.client import ControlClient

FILL = fio.Job("fill", "write", "1M", 4, False)
OUTAGE = fio.Job("outage", "randwrite", "64k", 4, False)


class Rate(NamedTuple):
    """So many bytes in so many seconds."""

    done: int
    seconds: float

    @property
    def per_second(self) -> float:
        """MB (10^6 bytes) per second."""
        return self.done / 1e6 / self.seconds


def _lag_bytes(lab: Lab) -> int:
    """Ask the driver's child, without the time that a command needs to start."""
    socket = Paths.of(lab.primary).control_socket("dsgrp000.driver")
    return int(ControlClient(socket).call("Status")["lag"]["bytes"])


def drain(lab: Lab, fill: int) -> Rate:
    """Fill the writelog while no pmd runs, then measure how fast it drains.

    The clock starts when the first bytes have been acknowledged, so that starting a process is
    not measured.

    :param fill: bytes to write; less than the writelog.
    """
    lab.settle()
    lab.at(lab.primary, "killpmds")
    try:
        fio.run(FILL, lab.uri, fill, 0, f"--io_size={fill}")
        full = _lag_bytes(lab)
    finally:
        lab.at(lab.primary, "launchpmds")
    first = wait_for("the first acknowledgement", lambda: _below(lab, full), 60)
    started = time.monotonic()
    wait_for("the end of draining", lambda: _lag_bytes(lab) == 0, 600)
    seconds = time.monotonic() - started
    lab.settle()
    return Rate(first, seconds)


def _below(lab: Lab, full: int) -> int:
    """Give what is left once it is less than it was; 0 before."""
    left = _lag_bytes(lab)
    return left if left < full else 0


def refresh(lab: Lab, size: int) -> Rate:
    """Measure a full refresh of incompressible data, from the command to its durable end."""
    fio.run(FILL, lab.uri, size, 0, "--refill_buffers")
    lab.settle()
    started = time.monotonic()
    lab.at(lab.primary, "qdsrefresh", "--full")
    return Rate(size, time.monotonic() - started)


class Memory(NamedTuple):
    """The largest resident memory of each child, in bytes, and how long the outage was."""

    peaks: dict[str, int]
    seconds: float


def outage(lab: Lab, size: int, seconds: float, rate: str) -> Memory:
    """Stop the rmd, write at a given rate, start it again, drain; watch the children's memory.

    :param rate: as fio takes it, e.g. ``20M``.
    """
    lab.settle()
    peaks: dict[str, int] = {}
    stop = threading.Event()
    sites = {lab.primary: ("driver", "pmd"), lab.secondary: ("rmd",)}

    def watch() -> None:
        while not stop.wait(0.5):
            for site, roles in sites.items():
                _note(site, roles, peaks)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        lab.at(lab.secondary, "killrmds")
        try:
            fio.run(OUTAGE, lab.uri, size, seconds, f"--rate={rate}")
        finally:
            lab.at(lab.secondary, "launchrmds")
        lab.settle()
        time.sleep(1)
    finally:
        stop.set()
        watcher.join()
    if not peaks:
        raise MissingError("no child's pid file was found")
    return Memory(peaks, seconds)


def _note(site: Path, roles: tuple[str, ...], peaks: dict[str, int]) -> None:
    try:
        running = processes(site, [f"dsgrp000.{role}" for role in roles])
    except (OSError, ValueError, IndexError):
        return  # A pid file that is being written or removed.
    for name, pid in running.items():
        peaks[name] = max(peaks.get(name, 0), peak_memory(pid))


def writelog_for(seconds: float, rate: str) -> int:
    """Give the size of a writelog that holds an outage: 1.3 times what is written."""
    units = {"K": 1024, "M": MIB, "G": 1024 * MIB}
    per_second = int(rate[:-1]) * units[rate[-1].upper()] if rate[-1].isalpha() else int(rate)
    return max(128 * MIB, int(seconds * per_second * 1.3) // MIB * MIB + 64 * MIB)
