"""Daemons' answers for the tests of the console, and a clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.console.looking import Look, Looking
from qdsmirror.core.latency import LatencyHistogram
from qdsmirror.errors import UnreachableError
from qdsmirror.paths import Paths
from tests.groups.world import FakeReactor
from tests.tools.sites import driver_status, pmd_status

#: What a daemon says: an answer, or nothing for ever.
SILENT: Deferred[Any] = Deferred()


def driver(number: int = 0, **changes: Any) -> dict[str, Any]:
    """Give a driver's Status as it is with what only daemons tell each other."""
    histogram = LatencyHistogram()
    histogram.take(0.0002, 3)
    histogram.take(0.02)
    status = driver_status(number, last_commit=1790000123.5)
    return {**status, "latency": {f"qds{number}": histogram.status()}, **changes}


def pmd(number: int = 0) -> dict[str, Any]:
    """Give a pmd's Status likewise."""
    counts = {
        "name": f"qds{number}",
        "frame_bytes": 10_000,
        "data_bytes": 8_000,
        "entries": 70,
        "refresh_bytes": 3_000,
        "verify_bytes": 500,
    }
    return {
        **pmd_status(number),
        "wire": {"compression": "lz4", "frame_bytes": 10_000, "wire_bytes": 6_000, "paths": []},
        "traffic": {"cpu_seconds": 1.5, "ldsus": [counts]},
    }


def stats(number: int = 0) -> dict[str, Any]:
    """Give what the process for statistics says of a group."""
    return {
        "group": number,
        "role": "primary",
        "throttles": [
            {"name": "office hours", "fired": 7, "last": 1790000000.0},
            {"name": 'a "quoted" \\ name', "fired": 0, "last": None},
        ],
    }


class Host:
    """A host whose daemons answer as they are told.

    :ivar answers: by the name of the control socket: a Status, or SILENT.
    :ivar asked: which were asked, in turn.
    """

    def __init__(self, test: SynchronousTestCase, paths: Paths) -> None:
        self.test = test
        self.paths = paths
        self.reactor = FakeReactor()
        self.reactor.advance(1000.0)
        self.answers: dict[str, Any] = {
            "dsgrp000.driver": driver(),
            "dsgrp000.pmd": pmd(),
            "dsgrp000.stats": stats(),
            "qdsdriver": {"groups": []},
        }
        self.asked: list[str] = []
        self.looking = Looking(self.reactor, paths, self.ask)

    def ask(self, path: Path) -> Deferred[dict[str, Any]]:
        """Ask one; a silent one is given up after 2 seconds."""
        self.asked.append(path.stem)
        answer = self.answers.get(path.stem)
        if answer is SILENT:
            waits: Deferred[dict[str, Any]] = Deferred()
            self.reactor.callLater(2.0, waits.errback, UnreachableError("no answer"))
            return waits
        if answer is None:
            return fail(UnreachableError("nobody there"))
        return succeed(answer)

    def look(self) -> Look:
        """Look when all answer at once, or not at all."""
        look: Look = self.test.successResultOf(self.looking.look())
        return look


def samples(text: bytes) -> dict[str, float]:
    """Read a scrape: values by name and labels, as they are written."""
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
