"""A group whose throttles are evaluated, on the fake clock, under a load that does not end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from twisted.internet.defer import maybeDeferred

from qdsmirror.core import nbd
from qdsmirror.core.evaluation import Fired, State, evaluate
from qdsmirror.core.rates import Rates, Reading
from qdsmirror.core.samples import GroupSample
from qdsmirror.core.throttles import (
    EXTEND,
    FREE,
    Throttle,
    parse_actions,
    parse_test,
    parse_time,
    window,
)
from qdsmirror.errors import QdsError
from qdsmirror.limits import KIB, MIB, THROTTLE_INTERVAL_SECONDS
from tests.sim.profile import Profile
from tests.sim.watch import installed
from tests.sim.world import World

_TICK_SECONDS = 0.1
#: The wall clock shows this when the load begins.
BEGIN = datetime(2026, 1, 15, 16, 50)


def throttle(name: str, test: str, *actions: str, start: str = "--", stop: str = "--") -> Throttle:
    """Make a throttle of texts."""
    ends = window(parse_time(start), parse_time(stop))
    return Throttle(name, parse_test(test), parse_actions(actions), ends)


def profile(**changed: Any) -> Profile:
    """Give a profile without faults."""
    values: dict[str, Any] = {
        "steps": 0, "ldsus": 2, "size": 64 * KIB, "log": MIB, "journal": MIB, "block": 512,
        "durability": "flush", "on_overflow": "block", "pool": 0, "corruption": 0.0,
        "auto_refresh": False, "verify_rate": MIB, "verify_every": 0.0, "metadata_entries": 4096,
        "metadata_seconds": 1.0, "window": MIB, "limit": MIB, "buffer": MIB, "clients": 1,
        "eager": 1.0, "slow": "", "checkpoint_hold": "release", "before_bytes": 0,
        "before_images_full": "give-up", "faults": {},
    }  # fmt: skip
    return Profile(**{**values, **changed})


class ThrottledWorld(World):
    """The two sites, applications that write on and on, and who evaluates the throttles.

    :param write_bytes: of each write; ``kbps``: of all of them, as far as they are answered.
    :ivar sent: by second of the load, bytes that the pmd wrote to the network.
    :ivar knobs: by evaluation, what was in force after it.
    :ivar fired: by evaluation, what fired.
    """

    def __init__(
        self,
        seed: int,
        base: Path,
        throttles: Iterable[Throttle],
        *,
        write_bytes: int = 8 * KIB,
        kbps: float = 800.0,
        **changed: Any,
    ) -> None:
        super().__init__(seed, base, profile(**changed))
        self.throttles = tuple(throttles)
        self.write_bytes = write_bytes
        self.kbps = kbps
        self.state = State()
        self.sent: list[int] = []
        self.knobs: list[Any] = []
        self.fired: list[list[Fired]] = []
        self.samples: list[GroupSample] = []
        self._rates = Rates([ldsu.name for ldsu in self.config.ldsus], "primary")
        self._owed = 0.0
        self._counted: dict[int, int] = {}
        self._begun = 0.0
        self._next = 0.0

    # -- what happens -------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the daemons, and wait until the group is connected."""
        self._make_disks()
        for name in ("driver", "pmd", "rmd"):
            self.due[name] = 0.0
        self._until(self._at_rest, "the group to connect")
        self._begun = self._next = self.clock.seconds()
        self._wire_bytes()

    def run_throttled(self, *stages: Callable[[], None]) -> None:
        """Begin, go through stages, and see that everything is mirrored in the end."""
        with installed(self):
            self.begin()
            for stage in stages:
                stage()
            self.throttles, self.kbps, self.state = (), 0.0, State()
            self._evaluate()
            self._liveness()

    def load(self, seconds: float) -> None:
        """Have applications write for a while."""
        end = self.clock.seconds() + seconds
        count = 0.0
        while self.clock.seconds() < end - 1e-6:
            self._write()
            self._settle()
            if self.clock.seconds() >= self._next - 1e-6:
                self._evaluate()
                self._next += THROTTLE_INTERVAL_SECONDS
            self.pass_time(_TICK_SECONDS)
            count += self._wire_bytes()
            if round(self.clock.seconds() - self._begun, 3) % 1 < 1e-6:
                self.sent.append(int(count))
                count = 0.0

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and everything happen meanwhile that can."""
        end = self.clock.seconds() + seconds
        while self.clock.seconds() < end - 1e-9:
            times = [call.getTime() for call in self.clock.getDelayedCalls()]
            times += [*self.due.values(), end]
            now = self.clock.seconds()
            self.clock.advance(max(0.0, min(min(times), end) - now))
            self._after()
            for name, at in list(self.due.items()):
                if at <= self.clock.seconds():
                    del self.due[name]
                    self.start(name)
            self._settle()

    def _settle(self) -> None:
        busy = True
        while busy:
            busy = False
            for process in self.processes():
                for worker in process.workers:
                    while worker.waiting:
                        worker.step()
                        busy = True
                for end in list(process.ends):
                    while end.ready and self.passes(end.wire):
                        end.step(MIB)
                        busy = True
            self._after()

    def _write(self) -> None:
        """Write what the load has become in a tick; who is not answered does not ask on."""
        self._owed = min(self._owed + self.kbps * KIB * _TICK_SECONDS, 64 * self.write_bytes)
        while self._owed >= self.write_bytes and self.serving and self.driver is not None:
            client = self.random.choice(self.clients)
            if len(client.open) >= 64:
                return
            self._owed -= self.write_bytes
            ldsu = self.random.randrange(self.profile.ldsus)
            places = (self.profile.size - self.write_bytes) // self.profile.block
            offset = self.random.randrange(places + 1) * self.profile.block
            asked = self.submit(client, ldsu, nbd.CMD_WRITE, offset, self.write_bytes)
            self.driver.group.units[ldsu].submit([asked.request])

    def _wire_bytes(self) -> int:
        """Count what went over the network since the last time."""
        new = 0
        for wire in self.wires:
            if not wire.local:
                total = wire.written["pmd"]
                new += total - self._counted.get(id(wire), 0)
                self._counted[id(wire)] = total
        return new

    # -- throttles ----------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Do what the process for statistics does every ten seconds."""
        driver, pmd = self.driver if self.serving else None, self.pmd
        now = self.clock.seconds()
        reading = Reading(
            now,
            now,
            driver.group.status() if driver is not None else None,
            pmd.group.status() if pmd is not None else None,
            gone=pmd is None,
        )
        sample = self._rates.sample(reading)
        self.samples.append(sample)
        outcome = evaluate(self.throttles, self.state, [sample], now, self._shown)
        self.state = outcome.state
        self.knobs.append(self.state.knobs)
        self.fired.append(list(outcome.fired))
        knobs = self.state.knobs
        if pmd is not None:
            told = {"sleep_us": knobs.sleep_us, "limit_kbps": knobs.limit_kbps}
            pmd.group.set_knobs(json.dumps(told))
        if driver is not None:
            driver.group.set_knobs(json.dumps({"writesleep_us": knobs.writesleep_us}))
            for one in outcome.fired:
                self._change_logs(driver.group, one)

    def _change_logs(self, group: Any, fired: Fired) -> None:
        for action in fired.actions:
            if action.kind in (EXTEND, FREE):
                for name in fired.targets:
                    changed = maybeDeferred(getattr(group, action.kind), name, "")
                    changed.addCallback(lambda _, kind=action.kind: self.count(kind))
                    changed.addErrback(lambda failure: failure.trap(QdsError))

    def _shown(self, at: float) -> datetime:
        return BEGIN + timedelta(seconds=at - self._begun)


class KnobWorld(World):
    """A run of the simulation in which throttles turn the knobs of the daemons all the time."""

    def __init__(self, seed: int, base: Path) -> None:
        super().__init__(seed, base)
        # By itself: what else a seed decides is not drawn from it.
        self._turns = Random(f"knobs {seed}")

    def step(self) -> None:
        if self._turns.random() < 0.02:
            self.turn(
                self._turns.choice((0, 100, 5_000, 100_000, 10_000_000)),
                self._turns.choice((0, 1_000, 50_000, 10_000_000)),
                self._turns.choice((0, 1, 20, 1000)),
            )
        super().step()

    def turn(self, sleep_us: int, writesleep_us: int, limit_kbps: int) -> None:
        """Turn those of the daemons that run."""
        self.count("knobs")
        self.note(f"knobs {sleep_us} {writesleep_us} {limit_kbps}")
        if self.pmd is not None:
            self.pmd.group.set_knobs(json.dumps({"sleep_us": sleep_us, "limit_kbps": limit_kbps}))
        if self.driver is not None and self.serving:
            self.driver.group.set_knobs(json.dumps({"writesleep_us": writesleep_us}))

    def _liveness(self) -> None:
        # What began to wait counts the pauses of now.
        self.turn(0, 0, 0)
        super()._liveness()
