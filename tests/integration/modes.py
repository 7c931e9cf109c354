"""fio writes and verifies, while its group goes through every change of mode there is.

:data:`STEPS` is the table: a step has a name and a function, and may need that no client is
connected.  After a step the group is led back to connected and coherent, by its own commands.
fio's clients reconnect, since a killed driver breaks connections.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from twisted.trial.unittest import SkipTest, TestCase

from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import console_script
from tests.integration.proxy import PASS, REFUSE, SWALLOW, Proxy
from tests.integration.world import World, need

LDSUS = 2
POOL = 2
GROUP = ("-g", "0")
#: So that a writelog holds some seconds of an outage, and no more.
BYTES_PER_SECOND = 1 << 20
SIZE_BYTES = 16 << 20
SIZES = ("--size", "16M", "--writelog", "8M", "--journal", "12M", "--pool-size", "8M")
#: fio is told to write longer than any run; it is ended.
FIO_SECONDS = 100_000
PATIENCE_SECONDS = 120.0
OUTAGE_SECONDS = 1.5
#: The deadlines of qdsmirror.limits, for a run that does not wait for long.
QUICK = """
from qdsmirror import limits
limits.PING_SECONDS = 0.5
limits.SILENT_PEER_SECONDS = 2.0
limits.HANDSHAKE_SECONDS = 5.0
"""
#: What a command may end with where the group is on its way into or out of something.
DONE, REFUSED, UNREACHABLE = 0, 3, 11
CHILDREN = ("dsgrp000.driver", "dsgrp000.pmd", "dsgrp000.rmd")
MASTERS = {
    "qdsdriver": ("primary", "launchdriver"),
    "qdspmd": ("primary", "launchpmds"),
    "qdsrmd": ("secondary", "launchrmds"),
}


@dataclass(frozen=True)
class Step:
    """One change of mode.

    :ivar offline: no client may be connected meanwhile.
    """

    name: str
    run: Callable[[Modes], None]
    offline: bool = False


class Modes(World):
    """A lab with a link that can be cut, and fio on every LDSU.

    :param options: of ``qdslab create``, beside those that a run needs.
    :ivar source: what is drawn by the run's seed.
    """

    def __init__(self, test: TestCase, seed: int, *options: str) -> None:
        need("fio", "nbdkit")
        super().__init__(
            test,
            *(*SIZES, "--ldsus", str(LDSUS), "--pool", str(POOL), "--overflow", "bypass"),
            *options,
        )
        if "nbd" not in self.ended("fio", "--enghelp").stdout.split():
            raise SkipTest("fio has no nbd engine")
        self.seed, self.source = seed, random.Random(seed)
        self.legs: list[dict[str, Any]] = []
        self._fio: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        """Make the lab, and clients for fio that reconnect."""
        self.create()
        self.customise(QUICK)
        text = self.config("primary").read_text()
        port = next(line for line in text.splitlines() if line.startswith("port = "))
        self.proxy = Proxy(self.test, int(port.split(" = ")[1]))
        self.edit(self.config("primary"), port, f"port = {self.proxy.port}")
        self.start()
        for index in range(LDSUS):
            command = ["nbdkit", "-f", "-U", str(self._socket(index)), "--filter=retry", "nbd"]
            command += [f"socket={self.primary}/run/dsgrp000.nbd", f"export=qds{index}"]
            command += ["retries=200", "retry-delay=1", "retry-exponential=no"]
            self.start_program(command)
        self.until(lambda: all(self._socket(n).exists() for n in range(LDSUS)), "nbdkit to serve")

    def _socket(self, index: int) -> Any:
        return self.base / f"retry{index}"

    # -- fio ------------------------------------------------------------------------------------

    def load(self) -> None:
        """Start fio: it reads back what it wrote a while ago, and ends at the first error."""
        leg = len(self.legs)
        command = [
            "fio",
            "--thread",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--size=16M",
            "--iodepth=8",
        ]
        command += ["--bssplit=4k/60:16k/30:64k/10", "--bs_unaligned=0", "--fsync=32"]
        command += ["--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1"]
        command += [f"--rate={BYTES_PER_SECOND}", "--time_based", f"--runtime={FIO_SECONDS}"]
        command += [f"--randseed={self.seed + leg}", "--output-format=json", f"--output=leg{leg}"]
        for index in range(LDSUS):
            command += [f"--name=qds{index}", f"--uri=nbd+unix:///?socket={self._socket(index)}"]
        self._fio = self.start_program(command)
        self.legs.append({})
        self.writes_go_on()

    def unload(self) -> None:
        """End fio, if it runs, and look at what it says."""
        fio, self._fio = self._fio, None
        if fio is None:
            return
        alive = fio.poll() is None
        fio.send_signal(signal.SIGTERM)
        _, errors = fio.communicate(timeout=PATIENCE_SECONDS)
        text = (self.base / f"leg{len(self.legs) - 1}").read_text()
        jobs = json.loads(text[text.index("{") :])["jobs"]
        told = f"{text[-3000:]}{errors}{self.logs()}"
        self.test.assertTrue(alive, f"fio ended by itself: {told}")
        self.test.assertNotIn("verify", errors, told)
        for job in jobs:
            self.test.assertEqual(job["error"], 0, told)
        self.legs[-1] = {
            "written": sum(job["write"]["io_bytes"] for job in jobs),
            # What is read is read to be verified.
            "verified": sum(job["read"]["io_bytes"] for job in jobs),
        }

    @property
    def is_loaded(self) -> bool:
        """Whether fio runs."""
        return self._fio is not None

    def writes_go_on(self) -> None:
        """Wait until fio has written more to every LDSU, whatever mode that is in."""
        fio = self._fio
        assert fio is not None
        before = self.ended_writes()

        def written() -> bool:
            return all(map(int.__gt__, self.ended_writes(), before))

        self.until(lambda: fio.poll() is not None or written(), "fio to write", PATIENCE_SECONDS)
        self.test.assertIsNone(fio.poll(), f"fio ended\n{self.logs()}")

    def ended_writes(self) -> list[int]:
        """Give for each LDSU when its data device was last written: also in bypass."""
        return [self.device("primary", f"qds{n}.data").stat().st_mtime_ns for n in range(LDSUS)]

    # -- ways of a step -------------------------------------------------------------------------

    def order(self, command: str, *arguments: str, codes: tuple[int, ...] = (DONE,)) -> int:
        """Tell the group to do something; give the exit code, which is one of these."""
        done = self.ended(
            console_script(command), "--root", str(self.primary), *arguments,
            seconds=PATIENCE_SECONDS,
        )  # fmt: skip
        told = f"{command} {arguments}: {done.stdout}{done.stderr}{self.logs()}"
        self.test.assertIn(done.returncode, codes, told)
        return done.returncode

    def insist(self, command: str, *arguments: str) -> None:
        """Tell it until it does, where it may have to wait for something first."""
        codes = (DONE, REFUSED, UNREACHABLE)
        self.until(
            lambda: self.order(command, *arguments, codes=codes) == DONE,
            f"{command} to be done",
            PATIENCE_SECONDS,
        )

    def sleep(self, longest: float) -> None:
        """Let time pass: a random part of it."""
        time.sleep(self.source.uniform(0.0, longest))

    def is_in(self, mode: str) -> bool:
        """Tell whether the group has a mode."""
        return mode in self.info()["modes"]

    def comes(self, mode: str) -> None:
        """Wait for a mode."""
        self.until(lambda: self.is_in(mode), f"the group to be in {mode}", PATIENCE_SECONDS)

    def strike(self, name: str) -> None:
        """kill -9 a process; a master is launched again, a child is by its master."""
        victim = self.kill(name)
        if name in MASTERS:
            site, launcher = MASTERS[name]
            self.insist_at(site, launcher)
        else:
            self.until(lambda: self.pid(name) not in (None, victim), f"another {name}")

    @contextmanager
    def no_link(self, mode: str = REFUSE) -> Iterator[None]:
        """Have no link to the secondary for a while."""
        self.proxy.mode = mode
        if mode == REFUSE:
            self.proxy.cut()
        try:
            yield
        finally:
            self.proxy.mode = PASS
            self.proxy.cut()

    def normal(self) -> None:
        """Lead the group back to connected and coherent, with nothing going on."""

        def led() -> bool:
            info = self.info()
            modes, refresh = set(info["modes"]), info["refresh"]
            if modes == {"connected"} and info["coherent"]:
                return True
            lost = (info["bypass"] or {}).get("lost")
            if ("connected" in modes or lost) and not refresh:
                if lost:
                    # The link is refused until there is one.
                    self.order("launchrefresh", *GROUP, codes=(DONE, REFUSED, UNREACHABLE))
                elif "bypass" in modes:
                    self.order("qdsbypass", "off", *GROUP, codes=(DONE, REFUSED, UNREACHABLE))
                elif info["coherent"] is False:
                    self.order("qdsrefresh", *GROUP, codes=(DONE, REFUSED, UNREACHABLE))
            return False

        self.until(led, "the group to be connected and coherent", PATIENCE_SECONDS)

    def set(self, *settings: str) -> None:
        """Change settings of the running group; a driver that was just launched may not answer."""
        self.insist("qdsset", *settings, *GROUP)

    def checkpoint_ends(self) -> bool:
        """Release a checkpoint at the secondary, if one holds; tell whether none does."""
        if self.info("secondary")["checkpoint"] is None:
            return True
        done = self.ask("secondary", "qdscheckpoint", "off", *GROUP)
        self.test.assertIn(done.returncode, (DONE, REFUSED, UNREACHABLE), done.stderr)
        return False

    def pool_is_free(self) -> bool:
        """Free the pool's devices as far as that goes; tell whether all are."""
        states = [(one["state"], one["ldsu"]) for one in self.info()["pool"]["devices"]]
        for state, ldsu in states:
            if state == "chained":
                self.order("qdsfree", ldsu, codes=(DONE, REFUSED, UNREACHABLE))
        return all(state == "free" for state, _ in states)


# -- the steps ------------------------------------------------------------------------------------


def bypass(modes: Modes) -> None:
    modes.order("qdsbypass", "on", *GROUP)
    modes.writes_go_on()
    modes.order("qdsbypass", "on", *GROUP, codes=(REFUSED,))
    modes.insist("qdsbypass", "off", *GROUP)


def bypass_and_kill(modes: Modes) -> None:
    modes.order("qdsbypass", "on", *GROUP)
    modes.writes_go_on()
    modes.strike("dsgrp000.driver")
    modes.comes("bypass")
    modes.writes_go_on()
    modes.insist("qdsrefresh", "--dirty", *GROUP)


def overflow(modes: Modes) -> None:
    with modes.no_link():
        modes.comes("bypass")
        modes.writes_go_on()
    modes.comes("connected")
    modes.insist("qdsbypass", "off", *GROUP)


def refresh_full(modes: Modes) -> None:
    modes.order("qdsrefresh", "--full", *GROUP)


def refresh_smart(modes: Modes) -> None:
    modes.order("qdsrefresh", "--smart", *GROUP)


def refresh_killed(modes: Modes) -> None:
    modes.order("launchrefresh", "--full", *GROUP)
    modes.sleep(0.2)
    if modes.order("killrefresh", *GROUP, codes=(DONE, REFUSED)) == DONE:
        modes.test.assertFalse(modes.info()["coherent"])
    modes.order("qdsrefresh", *GROUP, codes=(DONE, REFUSED))


def refresh_and_kill(modes: Modes) -> None:
    modes.order("launchrefresh", modes.source.choice(("--full", "--smart")), *GROUP)
    modes.sleep(0.2)
    modes.strike(modes.source.choice(CHILDREN))


def refresh_and_cut(modes: Modes) -> None:
    modes.order("launchrefresh", modes.source.choice(("--full", "--smart")), *GROUP)
    modes.sleep(0.2)
    modes.proxy.cut()


def refresh_and_bypass(modes: Modes) -> None:
    modes.order("launchrefresh", "--full", *GROUP)
    modes.sleep(0.2)
    modes.insist("qdsbypass", "on", *GROUP)
    modes.writes_go_on()
    modes.insist("qdsrefresh", *GROUP)


def kill_each_child(modes: Modes) -> None:
    for name in modes.source.sample(CHILDREN, len(CHILDREN)):
        modes.strike(name)
        modes.writes_go_on()


def kill_a_master(modes: Modes) -> None:
    modes.strike(modes.source.choice(sorted(MASTERS)))


def restart_pmds(modes: Modes) -> None:
    modes.at("primary", "killpmds")
    modes.comes("accumulating")
    modes.writes_go_on()
    modes.at("primary", "launchpmds")


def restart_rmds(modes: Modes) -> None:
    modes.at("secondary", "killrmds")
    modes.comes("accumulating")
    modes.writes_go_on()
    modes.at("secondary", "launchrmds")


def restart_driver(modes: Modes) -> None:
    modes.at("primary", "killdriver")
    modes.comes("setup")
    modes.at("primary", "launchdriver")


def restart_everything(modes: Modes) -> None:
    modes.stop()
    modes.launch()


def kill_everything(modes: Modes) -> None:
    for name in (*CHILDREN, *MASTERS):
        if modes.pid(name) is not None:
            modes.kill(name)
    for site, launcher in MASTERS.values():
        modes.insist_at(site, launcher)


def cut_link(modes: Modes) -> None:
    for _ in range(3):
        modes.proxy.cut()
        modes.sleep(0.5)


def no_link(modes: Modes) -> None:
    with modes.no_link():
        modes.comes("accumulating")
        modes.writes_go_on()
        modes.sleep(OUTAGE_SECONDS)


def silent_link(modes: Modes) -> None:
    with modes.no_link(SWALLOW):
        modes.comes("accumulating")
        modes.writes_go_on()


def extend_and_free(modes: Modes) -> None:
    modes.order("qdsextend", "qds0")
    modes.order("qdsextend", "qds1")
    modes.writes_go_on()
    modes.until(modes.pool_is_free, "the pool to be free again", PATIENCE_SECONDS)


def verify(modes: Modes) -> None:
    modes.order("qdsverify", *GROUP)


def synchronous(modes: Modes) -> None:
    modes.set("operation=sync")
    modes.writes_go_on()
    modes.until(lambda: modes.info()["synchronous"], "the group to be synchronous")
    with modes.no_link():
        modes.comes("accumulating")
        modes.sleep(OUTAGE_SECONDS)
    modes.writes_go_on()
    modes.set("operation=async")


def synchronous_degraded(modes: Modes) -> None:
    modes.set("operation=sync", "on_disconnect=async")
    with modes.no_link():
        modes.comes("accumulating")
        modes.writes_go_on()
        modes.test.assertIsNotNone(modes.info()["degraded"])
    modes.until(lambda: modes.info()["degraded"] is None, "the group to have caught up")
    modes.set("operation=async", "on_disconnect=block")


def near_synchronous(modes: Modes) -> None:
    modes.set("operation=near-sync", "near_sync_entries=4")
    for entries in (1, 256, 16):
        modes.writes_go_on()
        modes.set(f"near_sync_entries={entries}")
    modes.strike(modes.source.choice(("dsgrp000.pmd", "dsgrp000.rmd")))
    modes.writes_go_on()
    modes.set("operation=async")


def synchronous_refresh_and_bypass(modes: Modes) -> None:
    modes.set("operation=sync")
    modes.order("qdsrefresh", "--full", *GROUP)
    modes.order("qdsbypass", "on", *GROUP)
    modes.writes_go_on()
    modes.insist("qdsbypass", "off", *GROUP)
    modes.set("operation=async")


def durable_always(modes: Modes) -> None:
    modes.set("durability=always")
    modes.writes_go_on()
    modes.set("durability=flush")


def compressed(modes: Modes) -> None:
    for how in ("lz4", "zstd:3", "none"):
        modes.set(f"compression={how}")
        modes.comes("connected")
        modes.writes_go_on()


def applied(modes: Modes) -> None:
    """A changed file has the group started anew, on both hosts."""
    value = modes.source.randrange(100, 1000)
    for site in ("secondary", "primary"):
        file = modes.config(site)
        lines = [one for one in file.read_text().splitlines() if "metadata_entries" not in one]
        if "[tunables]" not in lines:
            lines.insert(lines.index("[ldsus]"), "[tunables]")
        lines.insert(lines.index("[tunables]") + 1, f"metadata_entries = {value}")
        file.write_text("\n".join(lines) + "\n")
        modes.at(site, "qdsconfigtool", "apply")
        modes.taken_up(site)


def checkpoint(modes: Modes) -> None:
    modes.at("secondary", "qdscheckpoint", "on", *GROUP)
    modes.writes_go_on()
    if modes.source.random() < 0.5:
        modes.strike("dsgrp000.rmd")
        modes.comes("connected")
    modes.until(modes.checkpoint_ends, "the checkpoint to be released")


def checkpoint_at_mark(modes: Modes) -> None:
    modes.order("qdscheckpoint", "--mark", "here", *GROUP)
    modes.until(lambda: modes.info("secondary")["checkpoint"], "the mark to be reached")
    modes.writes_go_on()
    modes.until(modes.checkpoint_ends, "the checkpoint to be released")


def backfresh(modes: Modes) -> None:
    """Somebody has written to a data device while no driver ran."""
    modes.settle()
    modes.at("primary", "killdriver")
    with modes.device("primary", "qds0.data").open("r+b") as device:
        device.seek(modes.source.randrange(SIZE_BYTES // 2))
        device.write(modes.source.randbytes(200_000))
    modes.at("primary", "launchdriver")
    modes.comes("connected")
    modes.order("qdsbackfresh", "--yes", *GROUP)
    modes.settle()


def backfresh_killed(modes: Modes) -> None:
    """Given up and begun again, with a daemon killed; writes of a bypass are discarded."""
    modes.order("qdsbypass", "on", *GROUP)
    with NbdClient.connect(modes.uri()) as client:
        for _ in range(20):
            client.write(modes.source.randrange(SIZE_BYTES >> 16) << 16, bytes(1 << 16))
    modes.order("launchbackfresh", "--discard", "--yes", *GROUP)
    modes.order("killbackfresh", *GROUP, codes=(DONE, REFUSED))
    modes.order("launchbackfresh", "--discard", "--yes", *GROUP)
    modes.strike(modes.source.choice(CHILDREN))
    modes.until(lambda: not modes.is_in("backfresh"), "its end", PATIENCE_SECONDS)
    modes.insist("qdsbypass", "off", *GROUP)


STEPS: tuple[Step, ...] = (
    Step("bypass on and off", bypass),
    Step("bypass, driver killed, dirty refresh", bypass_and_kill),
    Step("overflow into bypass", overflow),
    Step("full refresh", refresh_full),
    Step("smart refresh", refresh_smart),
    Step("refresh killed by killrefresh, and again", refresh_killed),
    Step("refresh with a child killed", refresh_and_kill),
    Step("refresh with the link cut", refresh_and_cut),
    Step("refresh ended by bypass", refresh_and_bypass),
    Step("every child killed", kill_each_child),
    Step("a master killed", kill_a_master),
    Step("accumulating: killpmds, launchpmds", restart_pmds),
    Step("accumulating: killrmds, launchrmds", restart_rmds),
    Step("setup: killdriver, launchdriver", restart_driver),
    Step("everything stopped and started", restart_everything),
    Step("everything killed at once", kill_everything),
    Step("link cut", cut_link),
    Step("no link for a while", no_link),
    Step("silent link", silent_link),
    Step("writelogs extended and freed", extend_and_free),
    Step("verify", verify),
    Step("synchronous, and no link", synchronous),
    Step("synchronous, degraded for a while", synchronous_degraded),
    Step("synchronous, refresh and bypass", synchronous_refresh_and_bypass),
    Step("near-synchronous", near_synchronous),
    Step("durability always", durable_always),
    Step("compression changed", compressed),
    Step("configuration applied", applied),
    Step("checkpoint", checkpoint),
    Step("checkpoint at a mark", checkpoint_at_mark),
    Step("backfresh of a data device", backfresh, offline=True),
    Step("backfresh in bypass, killed and again", backfresh_killed, offline=True),
)
