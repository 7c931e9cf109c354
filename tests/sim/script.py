"""Sequences of operations, and the moments at which the power may go."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from twisted.internet.defer import maybeDeferred

from qdsmirror.core import nbd
from qdsmirror.errors import QdsError
from qdsmirror.limits import KIB, MEMORY_LOG_BYTES_MIN, WRITELOG_BYTES_MIN
from tests.fakes import Choice, Unsynced
from tests.sim.clients import Asked, Client
from tests.sim.history import SECTOR, Made, Violation, payload
from tests.sim.profile import Profile
from tests.sim.sites import AllButTheFirst, is_memory
from tests.sim.watch import installed
from tests.sim.world import World

LENGTH_MAX = 3
#: Orders in which sequences' work is done: each sequence in one of them.
SCHEDULES = 2
_DATA_BYTES = 32 * KIB
#: In schedules other than the first, work is left waiting with this chance at each step.
_LEAVE_OFF = 0.15
#: A backfresh that may begin is over by then.
_BACKFRESH_SECONDS = 1.0
#: A refresh that may begin has changed a mirror by then.
_REFRESH_SECONDS = 1.0

PROFILE = Profile(
    steps=0,
    ldsus=2,
    size=_DATA_BYTES,
    log=WRITELOG_BYTES_MIN // SECTOR * SECTOR,
    journal=WRITELOG_BYTES_MIN // SECTOR * SECTOR,
    block=512,
    durability="flush",
    on_overflow="block",
    pool=1,
    corruption=0.0,
    auto_refresh=False,
    verify_rate=1 << 20,
    verify_every=0.0,
    metadata_entries=4096,
    metadata_seconds=1.0,
    window=1 << 20,
    limit=1 << 20,
    buffer=1 << 20,
    clients=1,
    eager=0.0,
    slow="",
    checkpoint_hold="release",
    before_bytes=0,
    before_images_full="give-up",
    faults={},
)
MEMORY_PROFILE = replace(PROFILE, memory=True, log=MEMORY_LOG_BYTES_MIN)
_IMAGES = {"journal": 400 * KIB, "before_bytes": 192 * KIB}
#: So little is under way at once that a refresh is not over in a moment.
_SLOWLY = {"window": 8 * KIB, "limit": 16 * KIB, "buffer": 8 * KIB}
IMAGES_PROFILE = replace(PROFILE, **_IMAGES, **_SLOWLY)


# -- operations: what a sequence is made of ---------------------------------------------------


def _write(world: Script) -> None:
    """A write of its own place; its frame waits for company."""
    world.client_asks(0, nbd.CMD_WRITE, 4096 * (world.done % 3), 1024)


def _overlapping(world: Script) -> None:
    """Two writes that overlap each other and the first LDSU's first place."""
    world.client_asks(0, nbd.CMD_WRITE, 512, 1024)
    world.client_asks(0, nbd.CMD_WRITE, 0, 1024)


def _fua(world: Script) -> None:
    world.client_asks(0, nbd.CMD_WRITE, 8192, 512, nbd.CMD_FLAG_FUA)


def _other(world: Script) -> None:
    """A write to the other LDSU: its writelog is synced on its own."""
    world.client_asks(1, nbd.CMD_WRITE, 0, 1024)


def _flush(world: Script) -> None:
    for ldsu in range(PROFILE.ldsus):
        world.client_asks(ldsu, nbd.CMD_FLUSH, 0, 0)


def _trim(world: Script) -> None:
    world.client_asks(0, nbd.CMD_TRIM, 0, 8192)


def _zeroes(world: Script) -> None:
    world.client_asks(0, nbd.CMD_WRITE_ZEROES, 512, 1024, nbd.CMD_FLAG_NO_HOLE)


def _ack(world: Script) -> None:
    """What is durable becomes so, is sent, journaled, acknowledged and mirrored."""
    world.settle(0.01)


def _checkpoint(world: Script) -> None:
    """Time passes: superblocks are written, space is freed."""
    world.settle(1.1)


def _wrap(world: Script) -> None:
    """So much that the ring begins anew."""
    for _ in range(4):
        world.client_asks(0, nbd.CMD_WRITE, 0, 24 * KIB)
        world.settle(0.01)
    world.settle(1.1)
    world.client_asks(0, nbd.CMD_WRITE, 0, 24 * KIB)


def _power_cut(world: Script) -> None:
    """The primary loses its power, and the first of the unsynced writes; and starts again."""
    world.restart_primary()


def _kill_driver(world: Script) -> None:
    """The driver's child is killed, and starts again; its master keeps what is in memory."""
    world.restart_driver()


def _link_down(world: Script) -> None:
    """The secondary is not reached any more; what is framed waits in the writelogs."""
    world.lose_link()


def _link_up(world: Script) -> None:
    """It is reached again, and gets what has waited, and what there is to be refreshed."""
    world.link_up = True
    world.settle(3.0)


def _smart_refresh(world: Script) -> None:
    """A refresh begins that compares; it leaves bypass."""
    world.change_group("refresh", "smart")
    world.settle(0.01)


def _refresh(world: Script) -> None:
    """A refresh begins, and ends if time passes; it leaves bypass, and is dirty then."""
    world.change_group("refresh", "auto")


def _bypass_on(world: Script) -> None:
    """Bypass is entered, as far as it comes; a refresh leaves it."""
    world.change_group("switch_bypass", "on")


def _synchronous(world: Script) -> None:
    """From now on answers wait for the secondary."""
    world.change_group("set_live", '{"operation": "sync"}')


def _extend(world: Script) -> None:
    """The first LDSU's writelog is chained to the pool's device."""
    world.change_group("extend", "qds0", "")


def _free(world: Script) -> None:
    world.change_group("free", "qds0", "")


def _verify(world: Script) -> None:
    """A verify begins, and ends if time passes."""
    world.change_group("verify", "compare")


def _backfresh(world: Script) -> None:
    """A backfresh, to its end if it may be; somebody else has written to the data devices."""
    world.change_group("begin_backfresh", "", "")
    world.settle(_BACKFRESH_SECONDS)


def _discard(world: Script) -> None:
    """One that gives up what the secondary lacks."""
    world.change_group("begin_backfresh", "discard", "")
    world.settle(_BACKFRESH_SECONDS)


def _kill_backfresh(world: Script) -> None:
    """One that is ended when it has overwritten something."""
    world.fetch_something()
    world.change_group("kill_backfresh", "")


def _resume_backfresh(world: Script) -> None:
    """One in which the primary loses its power, to its end."""
    world.fetch_something()
    world.restart_primary()
    world.settle(_BACKFRESH_SECONDS)


def _hold(world: Script) -> None:
    """A checkpoint is taken at the secondary."""
    world.change_secondary("switch_checkpoint", "on", "c", "release")


def _let_go(world: Script) -> None:
    """It is released, and the mirror catches up if time passes."""
    world.change_secondary("switch_checkpoint", "off", "", "")


def _mark(world: Script) -> None:
    """A mark takes a checkpoint when the secondary reaches it."""
    world.change_group("mark", "m")


def _half_refresh(world: Script) -> None:
    """A refresh in which something is written, and the link lost when mirrors were changed."""
    world.refresh_half()


def _roll_back(world: Script) -> None:
    """The rmd is killed; qdsrmdreco --rollback gives the refresh up."""
    world.kill("rmd")
    world.roll_back_once(interruptible=False)


def _stale_copy(world: Script) -> None:
    """A client asks, loses its connection, and asks for something later on another one; what it
    has asked on the first is read after that is answered."""
    lost, world.clients = world.clients, [Client(world, len(world.clients))]
    stale = world.submit(lost[0], 0, nbd.CMD_WRITE, 0, 1024)
    lost[0].gone = True
    world.client_asks(0, nbd.CMD_WRITE, 0, 1024, nbd.CMD_FLAG_FUA)
    world.settle(0.01)
    world.hand_over(stale)


#: Every operation that goes with all others; a new one is added here, or to one of the families
#: below if it makes a difference to few.
OPERATIONS: dict[str, Callable[[Script], None]] = {
    "write": _write,
    "overlapping write": _overlapping,
    "FUA write": _fua,
    "write to another": _other,
    "flush": _flush,
    "trim": _trim,
    "zeroes": _zeroes,
    "ack": _ack,
    "checkpoint": _checkpoint,
    "wrap": _wrap,
    "refresh": _refresh,
    "verify": _verify,
    "bypass on": _bypass_on,
    "extend": _extend,
    "free": _free,
    "power cut": _power_cut,
}


#: Behind this one only those that it may make a difference to.
SYNCHRONOUS = "synchronous"
_SYNCHRONOUSLY = (
    "write", "overlapping write", "FUA write", "write to another", "flush", "trim", "ack",
    "bypass on", "refresh", "power cut",
)  # fmt: skip

#: Before the others: writelogs are in memory, and a child's death is another end than a power cut.
IN_MEMORY = "in memory"
KILL_DRIVER = "kill driver"
_IN_MEMORY = (
    "write", "overlapping write", "FUA write", "write to another", "flush", "trim", "ack",
    "checkpoint", "bypass on", "refresh", "power cut", KILL_DRIVER,
)  # fmt: skip

#: Around others, each in an order of its own: the mirror may lag when a comparison begins.
LINK_DOWN, SMART_REFRESH, LINK_UP = "link down", "smart refresh", "link up"
_LAGGING = ("write", "overlapping write", "trim", "flush", "bypass on")

#: Of these every sequence is examined in every run, of the others a part: 112,000 states or so.
PLAIN = frozenset(
    (
        "write", "overlapping write", "FUA write", "flush", "trim", "zeroes", "wrap", "extend",
        "free", "bypass on", "ack",
    )
)  # fmt: skip
_DRAWN = 0.15

#: Around each of these, one other of all below, or two of the first.
_BACKFRESHES: dict[str, Callable[[Script], None]] = {
    "backfresh": _backfresh,
    "discarding backfresh": _discard,
    "killed backfresh": _kill_backfresh,
    "resumed backfresh": _resume_backfresh,
}
_BESIDE_BACKFRESH = ("write", "bypass on", "refresh", "power cut")
_ALSO_BESIDE_BACKFRESH = ("overlapping write", "flush", "trim", "extend", "verify")

#: Others before one of the first, between it and the release, and behind that.
_HOLDS: dict[str, Callable[[Script], None]] = {"hold": _hold, "mark": _mark}
LET_GO = "let go"
_BESIDE_HOLD = ("write", "write to another", "refresh")
_ALSO_BESIDE_HOLD = ("trim", "ack", "bypass on", "wrap")

#: Before the others: the secondary keeps before-images, so that its mirrors can be rolled back.
WITH_IMAGES = "with before-images"
HALF_REFRESH, ROLL_BACK = "half a refresh", "roll back"
_BEFORE_ROLLBACK = ("write", "trim", "bypass on")

STALE_COPY = "stale copy"
_BESIDE_STALE = ("flush", "bypass on", "refresh")
_ALSO_BESIDE_STALE = ("write", "power cut")

Sequence = tuple[int, tuple[str, ...]]


def sequences(schedules: int = SCHEDULES) -> Iterator[Sequence]:
    """Give all sequences of operations, short ones first, each with the number of a schedule."""
    number = 0
    for length in range(1, LENGTH_MAX + 1):
        for names in itertools.product(OPERATIONS, repeat=length):
            yield number % schedules, names
            number += 1
    for length in range(1, LENGTH_MAX):
        for names in itertools.product(_SYNCHRONOUSLY, repeat=length):
            yield number % schedules, (SYNCHRONOUS, *names)
            number += 1
    for length in range(1, LENGTH_MAX + 1):
        for names in itertools.product(_IN_MEMORY, repeat=length):
            # Of the longest those that end with what only these writelogs have.
            if length < LENGTH_MAX or names[-1] == KILL_DRIVER:
                yield number % schedules, (IN_MEMORY, *names)
                number += 1
    for names in itertools.product(_LAGGING, repeat=LENGTH_MAX):
        yield number, (LINK_DOWN, *names, SMART_REFRESH, LINK_UP)
        number += 1
    for names in _families():
        yield number % schedules, names
        number += 1


def _families() -> Iterator[tuple[str, ...]]:
    """Give the sequences of operations that make a difference to few others."""
    yield from _around(_BACKFRESHES, _BESIDE_BACKFRESH, _ALSO_BESIDE_BACKFRESH)
    for names in _around(_HOLDS, _BESIDE_HOLD, _ALSO_BESIDE_HOLD):
        yield names
        yield (*names, LET_GO)
    yield from _around((STALE_COPY,), _BESIDE_STALE, _ALSO_BESIDE_STALE)
    for end in ((HALF_REFRESH,), (HALF_REFRESH, ROLL_BACK)):
        for names in itertools.product(_BEFORE_ROLLBACK, repeat=2):
            yield (WITH_IMAGES, *names, *end)


def _around(
    middle: Iterable[str], others: tuple[str, ...], also: tuple[str, ...]
) -> Iterator[tuple[str, ...]]:
    """Give each of some alone, with one other, and with two, at every place among them.

    :param also: what comes as the only other.
    """
    for one in middle:
        for length in range(LENGTH_MAX):
            some = others if length > 1 else (*others, *also)
            for names in itertools.product(some, repeat=length):
                for at in range(length + 1):
                    yield (*names[:at], one, *names[at:])


def drawn(seed: int) -> Iterator[Sequence]:
    """Give the sequences of one run: all of :data:`PLAIN`, all short ones, a part of the rest.

    Of the rest chance decides: another run draws others.
    """
    random = Random(seed)
    for schedule, names in sequences():
        plain = len(names) < LENGTH_MAX or PLAIN.issuperset(names) or names[0] not in OPERATIONS
        if plain or random.random() < _DRAWN:
            yield schedule, names


_ONLY_THERE = {
    SYNCHRONOUS: _synchronous,
    KILL_DRIVER: _kill_driver,
    LINK_DOWN: _link_down,
    SMART_REFRESH: _smart_refresh,
    LINK_UP: _link_up,
    **_BACKFRESHES,
    **_HOLDS,
    LET_GO: _let_go,
    STALE_COPY: _stale_copy,
    HALF_REFRESH: _half_refresh,
    ROLL_BACK: _roll_back,
}

#: By what comes before all others.
_PROFILES = {IN_MEMORY: MEMORY_PROFILE, WITH_IMAGES: IMAGES_PROFILE}


# -- one sequence -------------------------------------------------------------------------------


class Kept(NamedTuple):
    """A disk: what is on its platters, and the writes that are not, oldest first."""

    durable: bytes
    unsynced: tuple[Unsynced, ...]


class Moment(NamedTuple):
    """A site's disks when the power goes, and what had been promised.

    :ivar disks: the disks by path.
    :ivar safe: by LDSU, the sectors' newest promised writes (at the primary).
    :ivar held: by LDSU, the last frame that the secondary had durably.
    :ivar acked: the GSN up to which the secondary had acknowledged.
    :ivar promised: that up to which synchronous operation had answered.
    :ivar coherent: whether the secondary called its mirror coherent.
    :ivar gives_up: whether a superblock may say that a backfresh has ended, and what the secondary
        lacks is given up.
    :ivar is_held: whether a checkpoint was told to hold.
    """

    site: str
    disks: dict[str, Kept]
    sectors: tuple[Any, ...]
    tips: tuple[Made, ...]
    held: tuple[Made, ...]
    acked: int
    promised: int
    coherent: bool
    gives_up: bool
    is_held: bool


class Script(World):
    """A world in which a sequence of operations happens, and each I/O is a moment kept.

    :param schedule: 0: everything happens in order and at once; another seeds another order, in
        which work of earlier operations may still be under way when the next one begins.
    """

    def __init__(self, base: Path, names: tuple[str, ...], schedule: int) -> None:
        profile = _PROFILES.get(names[0])
        super().__init__(1, base, profile or PROFILE)
        self.names = names[1:] if profile else names
        self._order = Random(schedule) if schedule else None
        self.done = 0
        self.moments: list[Moment] = []
        self.acked = 0
        self._keeping = False
        self._platters: dict[str, bytes] = {}
        self._judged: tuple[bytes, bool] = (b"", False)

    def play(self) -> list[Moment]:
        """Run the sequence; give the moments of its last operation."""
        Violation.seen.clear()
        with installed(self):
            self._make_disks()
            told = self.model.told

            def acknowledged(committed: int, generation: bytes) -> None:
                told(committed, generation)
                self.acked = max(self.acked, committed)

            self.model.told = acknowledged  # type: ignore[method-assign]
            self.model.backfreshes.begun = self._spoilt  # type: ignore[method-assign]
            self._start_in_order("rmd", "driver", "pmd")
            for name in self.names[:-1]:
                self._operate(name)
            self._watch()
            self._operate(self.names[-1])
            self.settle(0.0)
            self._keep("alpha")
            self._keep("beta")
        return self.moments

    def _start_in_order(self, *names: str) -> None:
        order, self._order = self._order, None
        for name in names:
            self.start(name)
            self.settle(0.2)
        self._order = order

    def restart_primary(self) -> None:
        self.power_cut("alpha")
        self._platters.clear()
        self._start_in_order("driver", "pmd")

    def lose_link(self) -> None:
        self.link_up = False
        self._cut_link()

    def restart_driver(self) -> None:
        self.kill("driver")
        self._start_in_order("driver")

    def _choice(self) -> Choice:
        return AllButTheFirst()

    def _operate(self, name: str) -> None:
        (_ONLY_THERE.get(name) or OPERATIONS[name])(self)
        self.run_ready()
        self.done += 1

    def client_asks(
        self, ldsu: int, command: int, offset: int, length: int, flags: int = 0
    ) -> None:
        asked = self.submit(self.clients[0], ldsu, command, offset, length)
        asked.request.flags = flags
        self.hand_over(asked)

    def change_group(self, how: str, *arguments: str) -> None:
        """Ask the driver for something; what is not possible now is refused."""
        assert self.driver is not None
        asked = maybeDeferred(getattr(self.driver.group, how), *arguments)
        asked.addErrback(lambda failure: failure.trap(QdsError))

    def change_secondary(self, how: str, *arguments: str) -> None:
        """Ask the rmd for something; what is not possible now is refused."""
        assert self.rmd is not None
        asked = maybeDeferred(getattr(self.rmd.group, how), *arguments)
        asked.addErrback(lambda failure: failure.trap(QdsError))

    def hand_over(self, asked: Asked) -> None:
        """Let the driver read what a client has asked."""
        assert self.driver is not None
        self.driver.group.units[asked.ldsu].submit([asked.request])
        self.run_ready()

    def fetch_something(self) -> None:
        """Begin a backfresh, and leave it when it has overwritten something, if it comes so far."""
        counts = self.model.counts
        fetched = counts.get("blocks fetched", 0)
        self.change_group("begin_backfresh", "discard", "")
        self._until(lambda: counts.get("blocks fetched", 0) > fetched, _BACKFRESH_SECONDS)

    def refresh_half(self) -> None:
        """Begin a refresh, write something, and lose the link when mirrors were changed."""
        self.settle(0.1)
        self.change_group("refresh", "full")
        self.client_asks(0, nbd.CMD_WRITE, 12 * KIB, 1024)
        self._until(lambda: self.model.usable is not None, _REFRESH_SECONDS)
        counts = self.model.counts
        written = counts.get("mirror writes", 0)
        self._until(lambda: counts.get("mirror writes", 0) > written, _REFRESH_SECONDS)
        self.lose_link()

    def _until(self, happened: Callable[[], bool], seconds: float) -> None:
        """Go on, step by step, until something is so, or time is up."""
        end = self.clock.seconds() + seconds
        while self.clock.seconds() < end and not happened():
            doable = self._doable()
            if doable:
                doable[0][1]()
                self._after()
                continue
            times = [call.getTime() for call in self.clock.getDelayedCalls()]
            self.clock.advance(min(times, default=end) - self.clock.seconds())

    def _spoilt(self, number: int) -> bool:
        """Let somebody else have written to each data device, at two places."""
        for ldsu, disk in zip(self.config.ldsus, self.model.data, strict=True):
            junk = payload(number, SECTOR)
            for at in (SECTOR, 5 * 4096):
                disk.durable[at : at + SECTOR] = disk.seen[at : at + SECTOR] = junk
            self._platters.pop(ldsu.data_device, None)
        return True

    def run_ready(self) -> None:
        """Let happen what needs no time to pass: all of it in order, or some of it in any."""
        order = self._order
        while doable := self._doable():
            if order is None:
                doable[0][1]()
            elif order.random() < _LEAVE_OFF:
                break
            else:
                order.choice(doable)[1]()
            self._after()

    def settle(self, seconds: float) -> None:
        """Let time pass, and everything happen that happens in it."""
        self.run_ready()
        end = self.clock.seconds() + seconds
        while True:
            times = [call.getTime() for call in self.clock.getDelayedCalls()]
            soonest = min(times, default=end)
            if soonest > end:
                break
            self.clock.advance(max(0.0, soonest - self.clock.seconds()))
            self.run_ready()
        self.clock.advance(max(0.0, end - self.clock.seconds()))

    def _some(self) -> int:
        return 1 << 20

    def _watch(self) -> None:
        for path, disk in self.disks.items():
            if is_memory(path):
                continue
            site = "beta" if path.startswith("/far/") else "alpha"
            disk.written = partial(self._keep, site)
            disk.synced = self._behind(disk.synced, site, path)

    def _behind(self, inner: Any, site: str, path: str) -> Callable[[], None]:
        def synced() -> None:
            if inner is not None:
                inner()
            self._platters.pop(path, None)
            self._keep(site)

        return synced

    def _keep(self, site: str) -> None:
        near = "/far/" if site == "beta" else "/near/"
        disks = {}
        for path, disk in self.disks.items():
            if path.startswith(near) and not is_memory(path):
                disks[path] = Kept(self._durable(path), tuple(disk.unsynced))
        self.moments.append(
            Moment(
                site,
                disks,
                tuple(sectors.copy() for sectors in self.model.sectors),
                tuple(self.model.tips),
                tuple(self.model.held),
                self.acked,
                self.synchrony.answered_gsn,
                self._coherent(),
                self.model.backfreshes.ending and self.model.backfreshes.gives_up,
                self.model.is_held,
            )
        )

    def _durable(self, path: str) -> bytes:
        """Give what is on a disk's platters: the same bytes until they change."""
        if path not in self._platters:
            self._platters[path] = bytes(self.disks[path].durable)
        return self._platters[path]

    def _coherent(self) -> bool:
        journal = self._durable(self.config.journal_device)
        if self._judged[0] is not journal:
            self._judged = (journal, self.model.is_coherent())
        return self._judged[1]
