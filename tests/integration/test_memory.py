"""Memory through an outage that fills the writelog and leads into bypass, with real daemons."""

from __future__ import annotations

import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from twisted.trial.unittest import TestCase

from qdsmirror.limits import (
    FRAME_BYTES_MAX,
    KIB,
    MIB,
    NBD_RECEIVE_BYTES,
    REFRESH_READ_BYTES,
    REQUEST_BUDGET_BYTES,
    SEND_BUFFER_BYTES,
    UNAPPLIED_BYTES_MAX,
)
from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import in_thread
from tests.integration.world import World

SIZE = LOG = 64 * MIB
BLOCK = 64 * KIB
CONNECTIONS = 8
WARM_BYTES = 16 * MIB
#: Written in bypass alone: what is kept of it would be far more than the budgets are.
BYPASS_BYTES = 6 * LOG
#: What the daemons may hold beyond what they had before; each once, however long the outage is.
#: The driver: requests in flight, what is framed and not yet applied, what each connection
#: receives at a time, the frame that is being made, and a refresh's read.
DRIVER_BYTES_MAX = (
    REQUEST_BUDGET_BYTES
    + UNAPPLIED_BYTES_MAX
    + CONNECTIONS * NBD_RECEIVE_BYTES
    + FRAME_BYTES_MAX
    + REFRESH_READ_BYTES
)
#: The pmd: what was sent and is unacknowledged, and what is read for the next sending.
WINDOW_BYTES = 16 * MIB
PMD_BYTES_MAX = WINDOW_BYTES + SEND_BUFFER_BYTES
#: Once the driver writes directly nothing is framed: it has requests in flight, at most one of each
#: connection here, and what connections receive.
DIRECT_BYTES_MAX = CONNECTIONS * (BLOCK + NBD_RECEIVE_BYTES)
BOUNDS = {"dsgrp000.driver": DRIVER_BYTES_MAX, "dsgrp000.pmd": PMD_BYTES_MAX}
assert DRIVER_BYTES_MAX * 4 < LOG + BYPASS_BYTES
assert PMD_BYTES_MAX * 3 < LOG
assert DIRECT_BYTES_MAX * 50 < BYPASS_BYTES // 2


class Footprint:
    """One process's memory beyond what it had when this was made.

    :param bound: bytes it may grow by.
    """

    def __init__(self, world: World, name: str, bound: int) -> None:
        self.name = name
        self.pid = world.until(lambda: world.pid(name), f"{name} to run")
        self._world = world
        self._bound = bound
        # Its peak counts from now on (proc(5), clear_refs).
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        self.before = self._field("status", "VmRSS")
        self.locked_before = self._field("smaps_rollup", "Locked")

    def _field(self, file: str, name: str) -> int:
        lines = Path(f"/proc/{self.pid}/{file}").read_text().splitlines()
        return next(int(line.split()[1]) * KIB for line in lines if line.startswith(f"{name}:"))

    def grown(self) -> int:
        """Give by how much it has ever been larger than when this was made, in bytes."""
        return self._field("status", "VmHWM") - self.before

    def check(self, when: str) -> None:
        """Fail when it has ever had more than it may."""
        test = self._world.test
        test.assertEqual(self._world.pid(self.name), self.pid, f"{self.name} was started anew")
        grown, locked = self.grown(), self._field("smaps_rollup", "Locked") - self.locked_before
        test.assertLess(grown, self._bound, f"{self.name}, {when}")
        test.assertLess(locked, self._bound, f"{self.name}, locked, {when}")


class OutageTests(TestCase):
    timeout = 1200

    @in_thread
    def test_memory_is_bounded_through_overflow_bypass_and_return(self) -> None:
        world = World(self, "--size", "64M", "--writelog", "64M", "--journal", "64M",
                      "--overflow", "bypass")  # fmt: skip
        world.create()
        window = f"[tunables]\nsend_window = {WINDOW_BYTES}\n[ldsus]"
        world.edit_both("[ldsus]", window)
        world.start()
        self.write(world, WARM_BYTES)
        world.wait("drained")
        daemons = [Footprint(world, name, bound) for name, bound in BOUNDS.items()]

        # A link that is silent, so that the send window is full too; later one that is refused.
        world.kill("dsgrp000.rmd", signal.SIGSTOP)
        written = 0
        while world.info()["state"] != "bypass":
            self.assertLess(written, 2 * LOG, "the writelog took more than it holds")
            self.write(world, LOG // 4)
            written += LOG // 4
        self.check(daemons, "the writelog is full")
        info = world.info()
        self.assertEqual(info["reason"], "the writelog of qds0 is full")
        self.assertIsNotNone(info["since"])

        self.write(world, BYPASS_BYTES // 2)
        self.check(daemons, "in bypass")
        half = daemons[0].grown()
        world.kill("qdsrmd")
        world.kill("dsgrp000.rmd")
        self.write(world, BYPASS_BYTES // 2)
        self.check(daemons, "in bypass, with the link refused")
        self.assertLess(daemons[0].grown() - half, DIRECT_BYTES_MAX)
        self.assertEqual(world.info()["since"], info["since"])

        world.start("secondary")
        world.at("primary", "qdsbypass", "off")
        self.write(world, WARM_BYTES)
        world.wait("coherent")
        self.assertNotEqual(world.info()["state"], "bypass")
        world.settle()
        self.check(daemons, "mirrored again")

    def check(self, daemons: list[Footprint], when: str) -> None:
        for one in daemons:
            one.check(when)

    def write(self, world: World, total: int) -> None:
        """Write blocks at random places, as fast as they are taken, over several connections."""
        source = random.Random(total)
        pool = source.randbytes(2 * BLOCK)
        left = iter(range(total // BLOCK))
        turn = threading.Lock()

        def work() -> None:
            with NbdClient.connect(world.uri()) as client:
                while True:
                    with turn:
                        if next(left, None) is None:
                            return
                        at, shift = source.randrange(SIZE // BLOCK), source.randrange(BLOCK)
                    client.write(at * BLOCK, pool[shift : shift + BLOCK])

        with ThreadPoolExecutor(CONNECTIONS) as threads:
            for done in [threads.submit(work) for _ in range(CONNECTIONS)]:
                done.result()
