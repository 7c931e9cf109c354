"""Bounded-exhaustive: every sequence of up to three operations, a crash at every I/O.

A sequence runs once over the real groups, and every write and sync of either site's disks is a
moment at which the power may go.  What of the unsynced writes is then on the platters: nothing,
everything, each one alone, each one missing, each one as a prefix or torn, beside nothing or all of
the others.  The real recovery runs on each of these states, and what it finds is compared with what
had been promised at that moment.  States are counted by their content.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from typing import Any, cast
from unittest import mock

from blake3 import blake3

from qdsmirror.config import LdsuConfig
from qdsmirror.core.backfresh import BackfreshState
from qdsmirror.core.generations import settle
from qdsmirror.core.records import Point
from qdsmirror.core.superblock import Superblock
from qdsmirror.groups.driver import DriverGroup
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.storage import superblock as superblock_module
from qdsmirror.storage.extension import open_pool
from qdsmirror.storage.journal import Mirror
from qdsmirror.storage.recovery import judge, open_units, replay
from qdsmirror.storage.rollback import roll_back
from tests.fakes import Choice, Unsynced, nothing
from tests.sim.disk import Disk, Memory
from tests.sim.history import SECTOR, Violation
from tests.sim.process import Process
from tests.sim.script import Kept, Moment, Script, Sequence
from tests.sim.watch import installed

#: A write is torn into so many pieces at most.
_PIECES_MAX = 16
#: One state in so many is also recovered twice, and interrupted in the middle.
_TWICE = 60
#: One state in so many is recovered by a whole driver, which records what it found.
_WHOLE = 8


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
    for count in range(1, len(sectors), max(1, len(sectors) // 8)):
        yield sectors[:count]


def _torn(size: int) -> Iterator[list[tuple[int, int]]]:
    sectors = _sectors(size)
    if len(sectors) < 3:
        return
    # The first one is the header; of the others a few will do.
    for gone in range(0, len(sectors) - 1, max(1, len(sectors) // 4)):
        yield sectors[:gone] + sectors[gone + 1 :]
    yield sectors[::2]
    yield sectors[1::2]


Image = dict[str, bytes | bytearray]


def image(moment: Moment, outcome: Pieces) -> Image:
    """Make the disks as the next start finds them."""
    return {
        path: _platters(kept, _there(path, kept, outcome)) for path, kept in moment.disks.items()
    }


#: Of a disk's unsynced writes, oldest first: the pieces that are on the platters.
_There = list[tuple[Unsynced, list[tuple[int, int]]]]


def _there(path: str, kept: Kept, outcome: Pieces) -> _There:
    found = ((write, outcome.get((path, index))) for index, write in enumerate(kept.unsynced))
    return [(write, pieces) for write, pieces in found if pieces]


def _platters(kept: Kept, there: _There) -> bytes | bytearray:
    if not there:
        return kept.durable
    content = bytearray(kept.durable)
    for write, pieces in there:
        for start, end in pieces:
            content[write.offset + start : write.offset + end] = write.data[start:end]
    return content


# -- recovery -----------------------------------------------------------------------------------


class Found(Disk):
    """A disk as a start finds it; its content is copied when that is written to, which is seldom.

    :param content: is left as it is.
    """

    def __init__(self, path: str, content: bytes | bytearray) -> None:
        super().__init__(path, 0)
        self.size = len(content)
        self.durable = self.seen = cast(bytearray, content)
        self._copied_seen = self._copied_durable = False

    def write(self, offset: int, data: bytes) -> None:
        if not self._copied_seen:
            self.seen, self._copied_seen = bytearray(self.seen), True
        super().write(offset, data)

    def sync(self) -> None:
        if self.unsynced and not self._copied_durable:
            self.durable, self._copied_durable = bytearray(self.durable), True
        super().sync()

    def drop_cache(self) -> None:
        if self._copied_seen:
            super().drop_cache()

    def shared(self) -> int:
        self._copied_seen = True
        return super().shared()

    def power_cut(self, choose: Choice = nothing) -> None:
        raise AssertionError("its power goes by an image of what is there")


class Instant(Process):
    """A process whose jobs are done at once."""

    def callInThreadWithCallback(  # noqa: N802
        self, told: Callable[[bool, Any], None], job: Callable[..., Any], *args: Any
    ) -> None:
        told(True, job(*args))


def _open_memory(process: Process, ldsu: LdsuConfig) -> IBlockDevice:
    """Give the memory of another master: there is nothing in it."""
    return process.open(Memory("memory", ldsu.memory_bytes), "memory", 512)


@contextmanager
def _superblocks_known() -> Iterator[None]:
    """Parse the same superblock once: crash states differ in other places."""
    parse = lru_cache(maxsize=256)(superblock_module.parse_slot)

    def parse_slot(raw: bytes, slot: int, slot_bytes: int) -> Superblock:
        return parse(bytes(raw), slot, slot_bytes)

    with mock.patch.object(superblock_module, "parse_slot", parse_slot):
        yield


class Recoverer:
    """Runs the real recovery over crash states and judges what it finds.

    :ivar states: the contents met so far.
    """

    def __init__(self, script: Script, states: set[bytes], again: Random) -> None:
        self.script = script
        self.states = states
        self.again = again
        self.counts: Counter[str] = Counter()
        self._digests: dict[tuple[Any, ...], bytes] = {}

    def _digest_after(self, moment: Moment, outcome: Pieces, promises: bytes) -> bytes:
        """Give :meth:`_digest` of an outcome's image, which is not made for that if it is known."""
        digests = []
        for path, kept in sorted(moment.disks.items()):
            there = _there(path, kept, outcome)
            # The same platters and writes are met again and again; the moments keep their ids.
            key = (id(kept.durable), *((id(write), *pieces) for write, pieces in there))
            known = self._digests.get(key)
            if known is None:
                known = self._digests[key] = blake3(_platters(kept, there)).digest(16)
            digests.append(known)
        return self._digest(digests, promises)

    @staticmethod
    def _digest(digests: Iterable[bytes], promises: bytes) -> bytes:
        """Tell states apart by what is on the platters, in the order of paths, and promised."""
        return blake3(b"".join(digests) + promises).digest(16)

    @staticmethod
    def _promises(moment: Moment) -> bytes:
        held = [made.sequence for made in moment.held]
        known = (moment.acked, moment.promised, held, moment.gives_up, moment.is_held)
        told = repr(known).encode()
        return told + b"".join(sectors.fingerprint() for sectors in moment.sectors)

    def examine(self, moment: Moment) -> None:
        promises = self._promises(moment)
        for outcome in outcomes(moment):
            key = self._digest_after(moment, outcome, promises)
            if key in self.states:
                continue
            self.states.add(key)
            self.counts[f"states of {moment.site}"] += 1
            try:
                self.recover(moment, image(moment, outcome))
            except Violation:
                raise
            except Exception as error:
                raise Violation(f"RECOVER: {moment.site} does not recover: {error!r}") from error

    def recover(self, moment: Moment, content: Image) -> None:
        """Recover; now and then twice, and with a crash in the middle."""
        disks: dict[str, Disk] = {path: Found(path, data) for path, data in content.items()}
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
        promises = self._promises(moment)
        for count in range(1, len(writes)):
            disks: Image = {path: bytearray(data) for path, data in content.items()}
            for path, offset, data in writes[:count]:
                target = disks[path]
                assert isinstance(target, bytearray)
                target[offset : offset + len(data)] = data
            digests = [blake3(data).digest(16) for _, data in sorted(disks.items())]
            key = self._digest(digests, promises)
            if key in self.states:
                continue
            self.states.add(key)
            self.counts["states within a recovery"] += 1
            again: dict[str, Disk] = {path: Found(path, data) for path, data in disks.items()}
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
            pool, _ = open_pool(script.config.pool, 0, runtime.open_device)
            units = open_units(script.config, runtime.open_device, pool=pool)
            judge(units)
            for unit in units:
                replay(unit)
            points = [unit.reached.point(unit.config.index) for unit in units]
            lacking = [BackfreshState.of(unit.writelog.superblock) for unit in units]
            settled = settle([unit.writelog.superblock for unit in units])
            generation, bypass = settled.generations[-1].id, settled.bypass is not None
            lost = [unit.loss.lost for unit in units]
        else:
            self.counts["whole drivers"] += 1
            group = DriverGroup(
                script.config, script.host["alpha"], script.paths["alpha"], process, -1,
                runtime=runtime, open_memory=partial(_open_memory, process),
            )  # fmt: skip
            failures: list[Any] = []
            group.start().addErrback(failures.append)
            if failures:
                process.kill()
                failures[0].raiseException()
            points = [unit.framed_point for unit in group.units]
            lacking = [BackfreshState.of(unit.writelog.superblock) for unit in group.units]
            generation, bypass = group.generation, group.bypass.phase != "off"
            lost = [bypass and group.memory.used for _ in points]
        process.kill()
        if script.profile.memory:
            if not all(lost):
                raise Violation("GENERATION: a writelog in memory was lost, and nobody says so")
            return [self._judge_lost(moment, disks, index) for index in range(len(points))]
        return [
            self._judge_unit(moment, disks, index, generation, point, bypass, lacking[index])
            for index, point in enumerate(points)
        ]

    def _judge_unit(
        self,
        moment: Moment,
        disks: dict[str, Disk],
        index: int,
        generation: bytes,
        point: Point,
        bypass: bool,
        lacking: BackfreshState | None,
    ) -> bytes:
        model = self.script.model
        tip = model.find(index, generation, point.chain)
        if tip is None:
            raise Violation(f"RECOVER: LDSU {index} goes on at a place that never was")
        model.check_kept(moment.held[index], tip)
        content = bytes(disks[self.script.config.ldsus[index].data_device].durable)
        if lacking is not None:
            # It is closed, and no copy of anything; but what counts as fetched is.
            self._judge_fetched(index, lacking, content)
            return content
        dirty = self.script.dirty_bitmap(disks, index) if bypass else None
        model.check_content(tip, content, generation, dirty)
        if not (moment.gives_up and tip is moment.held[index]):
            moment.sectors[index].check_survived(content, f"LDSU {index}")
        return content

    def _judge_fetched(self, index: int, state: BackfreshState, content: bytes) -> None:
        """COHERENT: what a closed LDSU's superblock calls fetched is what the mirror holds."""
        self.counts["within a backfresh"] += 1
        model = self.script.model
        made = model.find(index, state.generation or model.lineage.newest, state.point.chain)
        if made is None:
            raise Violation(f"COHERENT: LDSU {index} is fetched from a mirror that never was")
        if content[: state.done] != made.mirrored()[: state.done]:
            raise Violation(f"COHERENT: LDSU {index} counts as fetched up to {state.done}")

    def _judge_lost(self, moment: Moment, disks: dict[str, Disk], index: int) -> bytes:
        """Judge what a power cut leaves of an LDSU whose writelog was in memory."""
        script = self.script
        content = bytes(disks[script.config.ldsus[index].data_device].durable)
        moment.sectors[index].check_survived(content, f"LDSU {index}")
        if moment.coherent:
            dirty = script.dirty_bitmap(disks, index)
            script.model.check_difference(moment.held[index], content, dirty)
        return content

    def _recover_mirror(self, moment: Moment, disks: dict[str, Disk]) -> Any:
        if not self.script.profile.before_bytes:
            return self._replay_mirror(moment, disks)
        # The rmd may have been started before, and may be started behind it.
        if self.again.randrange(2):
            self._replay_mirror(moment, disks)
        self._roll_back(disks)
        self._replay_mirror(moment, disks)
        self._roll_back(disks)
        return self._mirrors(disks)

    def _roll_back(self, disks: dict[str, Disk]) -> None:
        """COHERENT: wherever a refresh, or a rollback, was interrupted: it can be rolled back."""
        process, runtime = self.script._process("recovery", Instant, disks)
        mirror = Mirror.open(self.script.config, runtime.open_device)
        if not mirror.journal.superblock.coherent:
            roll_back(mirror)
            model = self.script.model
            model.rolled.add(mirror.journal.superblock.generation)
            model.check_rolled_back(self._mirrors(disks))
            self.counts["rolled back"] += 1
        process.kill()

    def _mirrors(self, disks: dict[str, Disk]) -> list[bytes]:
        return [bytes(disks[ldsu.mirror_device].durable) for ldsu in self.script.config.ldsus]

    def _replay_mirror(self, moment: Moment, disks: dict[str, Disk]) -> Any:
        script = self.script
        process, runtime = script._process("recovery", Instant, disks)
        mirror = Mirror.open(script.config, runtime.open_device)
        mirror.replay()
        contents = self._mirrors(disks)
        if mirror.journal.superblock.generation in script.model.rolled:
            self.counts["replayed behind a rollback"] += 1
            if mirror.journal.superblock.coherent:
                script.model.check_rolled_back(contents)
            process.kill()
            return contents
        # What a checkpoint holds back is in the journal.
        journaled = mirror.reached.gsn - 1
        if journaled < moment.acked:
            raise Violation(
                f"DURABLE: the secondary acknowledged GSN {moment.acked}, and after a power cut "
                f"holds {journaled}"
            )
        if journaled < moment.promised:
            raise Violation(
                f"SYNC: GSN {moment.promised} was answered synchronously, and after a power cut "
                f"the secondary holds {journaled}"
            )
        if mirror.held is not None:
            self.counts["held by a checkpoint"] += 1
        elif mirror.applied.gsn != mirror.reached.gsn:
            raise Violation("RECOVER: the replay has stopped before the journal's end")
        elif moment.is_held:
            raise Violation("DURABLE: a checkpoint was told, and is gone after a power cut")
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
        with installed(script, watching=False), _superblocks_known():
            for moment in moments:
                recoverer.examine(moment)
    except Violation as violation:
        return str(violation)
    finally:
        counts.update(recoverer.counts)
        script.close()
    return ""
