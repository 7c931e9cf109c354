"""Bounded-exhaustive: every sequence of up to three operations, a crash at every I/O.

A sequence runs once over the real groups, and every write and sync of either site's disks is a
moment at which the power may go.  What of the unsynced writes is then on the platters: nothing,
everything, each one alone, each one missing, each one as a prefix or torn, beside nothing or all of
the others.  The real recovery runs on each of these states, and what it finds is compared with what
had been promised at that moment.  States are counted by their content.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from blake3 import blake3
from twisted.internet.task import Clock

from qdsmirror.core import nbd
from qdsmirror.core.records import Point
from qdsmirror.groups.driver import DriverGroup
from qdsmirror.limits import KIB, WRITELOG_BYTES_MIN
from qdsmirror.storage.journal import Mirror
from qdsmirror.storage.recovery import judge, open_units, replay
from tests.fakes import Choice, Unsynced
from tests.sim.disk import Disk
from tests.sim.model import SECTOR, Made, Violation
from tests.sim.process import Process, SimWorker
from tests.sim.world import AllButTheFirst, Profile, World

LENGTH_MAX = 3
#: Orders in which sequences' work is done: each sequence in one of them.
SCHEDULES = 2
_DATA_BYTES = 32 * KIB
#: A write is torn into so many pieces at most.
_PIECES_MAX = 8
#: In schedules other than the first, work is left waiting with this chance at each step.
_LEAVE_OFF = 0.15
#: One state in so many is also recovered twice, and interrupted in the middle.
_TWICE = 20
#: One state in so many is recovered by a whole driver, which records what it found.
_WHOLE = 6

PROFILE = Profile(
    steps=0,
    ldsus=2,
    size=_DATA_BYTES,
    log=WRITELOG_BYTES_MIN // SECTOR * SECTOR,
    journal=WRITELOG_BYTES_MIN // SECTOR * SECTOR,
    block=512,
    durability="flush",
    metadata_entries=4096,
    metadata_seconds=1.0,
    window=1 << 20,
    limit=1 << 20,
    buffer=1 << 20,
    clients=1,
    eager=0.0,
    faults={},
)


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


def _refresh(world: Script) -> None:
    """A full refresh begins, and ends if time passes."""
    world.begin_refresh()


#: Every operation that the product has; a new one is added here.
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
    "power cut": _power_cut,
}


Sequence = tuple[int, tuple[str, ...]]


def sequences(schedules: int = SCHEDULES) -> Iterator[Sequence]:
    """Give all sequences of operations, short ones first, each with the number of a schedule."""
    number = 0
    for length in range(1, LENGTH_MAX + 1):
        for names in itertools.product(OPERATIONS, repeat=length):
            yield number % schedules, names
            number += 1


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
    """

    site: str
    disks: dict[str, Kept]
    sectors: tuple[Any, ...]
    tips: tuple[Made, ...]
    held: tuple[Made, ...]
    acked: int


class Script(World):
    """A world in which a sequence of operations happens, and each I/O is a moment kept.

    :param schedule: 0: everything happens in order and at once; another seeds another order, in
        which work of earlier operations may still be under way when the next one begins.
    """

    def __init__(self, base: Path, names: tuple[str, ...], schedule: int) -> None:
        super().__init__(1, base, PROFILE)
        self.names = names
        self._order = Random(schedule) if schedule else None
        self.done = 0
        self.moments: list[Moment] = []
        self.acked = 0
        self._keeping = False
        self._platters: dict[str, bytes] = {}

    def play(self) -> list[Moment]:
        """Run the sequence; give the moments of its last operation."""
        Violation.seen.clear()
        with self.installed():
            self._make_disks()
            told = self.model.told

            def acknowledged(committed: int, generation: bytes) -> None:
                told(committed, generation)
                self.acked = max(self.acked, committed)

            self.model.told = acknowledged  # type: ignore[method-assign]
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
        self._start_in_order("driver", "pmd")

    def _choice(self) -> Choice:
        return AllButTheFirst()

    def _operate(self, name: str) -> None:
        OPERATIONS[name](self)
        self.run_ready()
        self.done += 1

    def client_asks(
        self, ldsu: int, command: int, offset: int, length: int, flags: int = 0
    ) -> None:
        asked = self.submit(self.clients[0], ldsu, command, offset, length)
        asked.request.flags = flags
        assert self.driver is not None
        self.driver.group.units[ldsu].submit([asked.request])
        self.run_ready()

    def begin_refresh(self) -> None:
        assert self.driver is not None
        if self.driver.group.refresh_job is None:
            self.driver.group.refresh("full").addErrback(lambda _: None)

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
            if path.startswith(near):
                if path not in self._platters:
                    self._platters[path] = bytes(disk.durable)
                disks[path] = Kept(self._platters[path], tuple(disk.unsynced))
        self.moments.append(
            Moment(
                site,
                disks,
                tuple(sectors.copy() for sectors in self.model.sectors),
                tuple(self.model.tips),
                tuple(self.model.held),
                self.acked,
            )
        )


# -- what a crash leaves ------------------------------------------------------------------------

Pieces = dict[tuple[str, int], list[tuple[int, int]]]


def outcomes(moment: Moment) -> Iterator[Pieces]:
    """Give what may have become of the unsynced writes: by disk and write, the pieces that are
    on the platters."""
    writes = [
        (path, index, len(write.data))
        for path, (_, unsynced) in moment.disks.items()
        for index, write in enumerate(unsynced)
    ]
    everything: Pieces = {(path, index): [(0, size)] for path, index, size in writes}
    yield {}
    if not writes:
        return
    yield everything
    for path, index, size in writes:
        key = (path, index)
        rest = {other: pieces for other, pieces in everything.items() if other != key}
        yield {key: [(0, size)]}
        yield rest
        # Older writes were torn at the moments when they were the newest; now beside newer ones.
        newest = index == len(moment.disks[path].unsynced) - 1
        for pieces in (*_beginnings(size), *_torn(size)) if newest else _halves(size):
            yield {**rest, key: pieces}
        if newest:
            for pieces in _beginnings(size):
                yield {key: pieces}


def _sectors(size: int) -> list[tuple[int, int]]:
    """Divide a write into what the platters take as one: of a long one, larger pieces."""
    step = SECTOR * max(1, size // SECTOR // _PIECES_MAX)
    return [(at, min(at + step, size)) for at in range(0, size, step)]


def _halves(size: int) -> Iterator[list[tuple[int, int]]]:
    sectors = _sectors(size)
    if len(sectors) > 1:
        yield sectors[: len(sectors) // 2]
        yield sectors[len(sectors) // 2 :]


def _beginnings(size: int) -> Iterator[list[tuple[int, int]]]:
    sectors = _sectors(size)
    for count in range(1, len(sectors)):
        yield sectors[:count]


def _torn(size: int) -> Iterator[list[tuple[int, int]]]:
    sectors = _sectors(size)
    if len(sectors) > 2:
        for gone in range(len(sectors) - 1):
            yield sectors[:gone] + sectors[gone + 1 :]
        yield sectors[::2]
        yield sectors[1::2]


Image = dict[str, bytes | bytearray]


def image(moment: Moment, outcome: Pieces) -> Image:
    """Make the disks as the next start finds them."""
    made: Image = {}
    touched = {path for path, _ in outcome}
    for path, (durable, unsynced) in moment.disks.items():
        if path not in touched:
            made[path] = durable
            continue
        content = made[path] = bytearray(durable)
        for index, write in enumerate(unsynced):
            for start, end in outcome.get((path, index), ()):
                content[write.offset + start : write.offset + end] = write.data[start:end]
    return made


# -- recovery -----------------------------------------------------------------------------------


class Instant(Process):
    """A process whose jobs are done at once."""

    def callInThreadWithCallback(  # noqa: N802
        self, told: Callable[[bool, Any], None], job: Callable[..., Any], *args: Any
    ) -> None:
        told(True, job(*args))


class Recoverer:
    """Runs the real recovery over crash states and judges what it finds.

    :ivar states: the contents met so far.
    """

    def __init__(self, script: Script, states: set[bytes], again: Random) -> None:
        self.script = script
        self.states = states
        self.again = again
        self.counts: Counter[str] = Counter()
        self._digests: dict[int, tuple[bytes, bytes]] = {}

    def _digest(self, moment: Moment, content: Image) -> bytes:
        """Tell states apart by what is on the platters and what was promised."""
        hasher = blake3()
        for path in sorted(content):
            hasher.update(self._digest_of(content[path]))
        hasher.update(repr((moment.acked, [made.sequence for made in moment.held])).encode())
        for sectors in moment.sectors:
            hasher.update(sectors.fingerprint())
        return hasher.digest(16)

    def _digest_of(self, content: bytes | bytearray) -> bytes:
        if isinstance(content, bytearray):
            return blake3(content).digest(16)
        # The same platters are met again and again; keeping them keeps their id.
        known = self._digests.get(id(content))
        if known is None:
            known = self._digests[id(content)] = (content, blake3(content).digest(16))
        return known[1]

    def examine(self, moment: Moment) -> None:
        for outcome in outcomes(moment):
            content = image(moment, outcome)
            key = self._digest(moment, content)
            if key in self.states:
                continue
            self.states.add(key)
            self.counts[f"states of {moment.site}"] += 1
            try:
                self.recover(moment, content)
            except Violation:
                raise
            except Exception as error:
                raise Violation(f"RECOVER: {moment.site} does not recover: {error!r}") from error

    def recover(self, moment: Moment, content: Image) -> None:
        """Recover; now and then twice, and with a crash in the middle."""
        disks = {path: Disk(path, len(data), data) for path, data in content.items()}
        writes = self._recording(disks)
        first = self._once(moment, disks)
        if self.again.randrange(_TWICE):
            return
        self.counts["recovered twice"] += 1
        if self._once(moment, disks) != first:
            raise Violation("RECOVER: a second recovery finds something else")
        self._in_the_middle(moment, content, writes, first)

    def _in_the_middle(
        self,
        moment: Moment,
        content: Image,
        writes: list[tuple[str, int, bytes]],
        first: Any,
    ) -> None:
        """Let the power go again within the recovery: of its writes any beginning remains."""
        for count in range(1, len(writes)):
            disks: Image = {path: bytearray(data) for path, data in content.items()}
            for path, offset, data in writes[:count]:
                target = disks[path]
                assert isinstance(target, bytearray)
                target[offset : offset + len(data)] = data
            key = self._digest(moment, disks)
            if key in self.states:
                continue
            self.states.add(key)
            self.counts["states within a recovery"] += 1
            again = {path: Disk(path, len(data), data) for path, data in disks.items()}
            found = self._once(moment, again)
            if found != first:
                raise Violation(
                    f"RECOVER: after a crash within recovery {found} is found, not {first}"
                )

    @staticmethod
    def _recording(disks: dict[str, Disk]) -> list[tuple[str, int, bytes]]:
        writes: list[tuple[str, int, bytes]] = []
        for path, disk in disks.items():
            disk.wrote = lambda offset, data, path=path: writes.append((path, offset, data))
        return writes

    def _once(self, moment: Moment, disks: dict[str, Disk]) -> Any:
        if moment.site == "alpha":
            return self._recover_driver(moment, disks)
        return self._recover_mirror(moment, disks)

    def _recover_driver(self, moment: Moment, disks: dict[str, Disk]) -> Any:
        script = self.script
        process, runtime = script._process("recovery", Instant, disks)
        if self.again.randrange(_WHOLE):
            units = open_units(script.config, runtime.open_device)
            judge(units)
            for unit in units:
                replay(unit)
            points = [unit.reached.point(unit.config.index) for unit in units]
            generation = units[0].writelog.superblock.generation
        else:
            self.counts["whole drivers"] += 1
            group = DriverGroup(
                script.config, script.host["alpha"], script.paths["alpha"], process, -1,
                runtime=runtime,
            )  # fmt: skip
            failures: list[Any] = []
            group.start().addErrback(failures.append)
            if failures:
                process.kill()
                failures[0].raiseException()
            points = [unit.framed_point for unit in group.units]
            generation = group.generation
        process.kill()
        return [
            self._judge_unit(moment, disks, index, generation, point)
            for index, point in enumerate(points)
        ]

    def _judge_unit(
        self, moment: Moment, disks: dict[str, Disk], index: int, generation: bytes, point: Point
    ) -> bytes:
        model = self.script.model
        tip = model.find(index, generation, point.chain)
        if tip is None:
            raise Violation(f"RECOVER: LDSU {index} goes on at a place that never was")
        model.check_kept(moment.held[index], tip)
        content = bytes(disks[self.script.config.ldsus[index].data_device].durable)
        model.check_content(tip, content)
        moment.sectors[index].check_survived(content, f"LDSU {index}")
        return content

    def _recover_mirror(self, moment: Moment, disks: dict[str, Disk]) -> Any:
        script = self.script
        process, runtime = script._process("recovery", Instant, disks)
        mirror = Mirror.open(script.config, runtime.open_device)
        mirror.replay()
        contents = [bytes(disks[ldsu.mirror_device].durable) for ldsu in script.config.ldsus]
        if mirror.applied.gsn - 1 < moment.acked:
            raise Violation(
                f"DURABLE: the secondary acknowledged GSN {moment.acked}, and after a power cut "
                f"holds {mirror.applied.gsn - 1}"
            )
        script.model.check_places(mirror.applied, mirror.journal.superblock, contents, moment.tips)
        process.kill()
        return contents


def run(
    base: Path, chosen: Iterable[Sequence], until: float | None = None, seed: int = 1
) -> dict[str, Any]:
    """Examine sequences; give counts and the first violation of each."""
    counts: Counter[str] = Counter()
    violations: dict[str, str] = {}
    states: set[bytes] = set()
    again = Random(seed)
    for sequence in chosen:
        if until is not None and time.monotonic() > until:
            break
        violated = examine(base, sequence, states, again, counts)
        if violated:
            violations[spelled(sequence)] = violated
    return {
        "counts": dict(counts),
        "violations": violations,
        "states": [state.hex() for state in states],
    }


def spelled(sequence: Sequence) -> str:
    """Give what ``--sequence`` takes."""
    return ",".join((str(sequence[0]), *sequence[1]))


def examine(
    base: Path, sequence: Sequence, states: set[bytes], again: Random, counts: Counter[str]
) -> str:
    """Examine one sequence; give what was violated, or an empty string."""
    schedule, names = sequence
    script = Script(base, names, schedule)
    counts["sequences"] += 1
    recoverer = Recoverer(script, states, again)
    try:
        moments = script.play()
        counts["moments"] += len(moments)
        with script.installed(watching=False):
            for moment in moments:
                recoverer.examine(moment)
    except Violation as violation:
        return str(violation)
    finally:
        counts.update(recoverer.counts)
        script.close()
    return ""


__all__ = ["OPERATIONS", "Clock", "SimWorker", "examine", "run", "sequences"]
