"""Measurements of qdsmirror alone: draining a writelog, and a full refresh."""

from __future__ import annotations

import time
from typing import NamedTuple

import fio
from systems import Lab, wait_for

from qdsmirror.paths import Paths
from qdsmirror.tools.client import ControlClient

FILL = fio.Job("fill", "write", "1M", 4, False)


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
