"""A power cut at every I/O of entering bypass, of what is written in it, and of leaving it."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import nbd
from qdsmirror.core.frames import BREAK, ENTRIES, SWITCH, Entry
from qdsmirror.core.inbound import Intake
from qdsmirror.core.nbd import Request
from qdsmirror.core.records import Cursor, Generation
from qdsmirror.core.watermark import Committed
from qdsmirror.storage.writelog import Writelog
from tests.fakes import Choice, MemoryDevice, at_random, everything, nothing
from tests.groups.world import BLOCK, GENERATION, KIB, DriverWorld, unique

LDSUS = 2
SIZE = 256 * KIB
#: Each block is written by at most these: (before bypass, in it).
Script = Callable[["Story"], None]


class Power:
    """Cuts the power before the I/O with a given number, counted over all devices."""

    def __init__(self, test: SynchronousTestCase) -> None:
        self.count = 0
        self.limit: int | None = None
        enter = MemoryDevice._enter

        def counted(device: MemoryDevice, method: str, writes: bool = False, **more: Any) -> None:
            enter(device, method, writes, **more)
            if not writes:
                return
            if self.limit is not None and self.count >= self.limit:
                raise OSError(errno.EIO, "the power is cut")
            self.count += 1

        test.patch(MemoryDevice, "_enter", counted)

    @property
    def is_cut(self) -> bool:
        return self.limit is not None and self.count >= self.limit


class Secondary:
    """What a secondary makes of the frames of a primary's writelogs."""

    def __init__(self, test: SynchronousTestCase) -> None:
        self.test = test
        self.intake = Intake(Cursor(), [SIZE] * LDSUS, [Generation(GENERATION, 1)])
        self.disks = [bytearray(SIZE) for _ in range(LDSUS)]
        self.kinds: list[int] = []
        self.at_break: list[bytes] | None = None

    def receive(self, world: DriverWorld) -> None:
        """Take all that is durable and not yet taken."""
        found = [
            frame
            for unit in world.group.units
            for frame in unit.writelog.reader(unit.writelog.superblock.tail)
            if frame.header.gsn_last <= world.group.durable_gsn
        ]
        for frame in sorted(found, key=lambda one: one.header.gsn_first):
            if frame.header.gsn_first < self.intake.gsn:
                continue
            header, entries = self.intake.check(frame.frame)
            self.kinds.append(header.kind)
            for entry in entries:
                self._apply(header.ldsu, entry)
            if header.kind == BREAK:
                self.at_break = [bytes(disk) for disk in self.disks]

    def _apply(self, ldsu: int, entry: Entry) -> None:
        data = bytes(entry.length) if entry.payload is None else bytes(entry.payload)
        self.disks[ldsu][entry.offset : entry.offset + entry.length] = data


class Story:
    """A driver, what an application asks of it, and what it was promised.

    :ivar promised: content that must survive, by (LDSU, offset).
    :ivar possible: content that may be found, likewise.
    """

    def __init__(
        self,
        test: SynchronousTestCase,
        overflow: str = "block",
        source: random.Random | None = None,
    ) -> None:
        self.test = test
        self.source = source
        stepped = source is not None
        self.world = DriverWorld(test, ldsus=LDSUS, size=SIZE, log=192 * KIB, stepped=stepped)
        self.world.config = replace(self.world.config, on_overflow=overflow)
        for index in range(LDSUS):
            log = Writelog.open(self.world.log(index))
            log.update(both=True, coherent=True, reason="")
        self.promised: dict[tuple[int, int], bytes] = {}
        self.possible: dict[tuple[int, int], set[bytes]] = {}
        self.waiting: dict[Request, tuple[tuple[int, int], bytes]] = {}
        self.numbers = iter(range(1, 10_000))
        self.asked_writes: dict[Request, tuple[tuple[int, int], bytes]] = {}
        self.asked_flushes: dict[Request, list[Request]] = {}

    def note_answers(self) -> None:
        """Take what was answered since: a write with FUA is a promise at once."""
        client = self.world.client
        for request, kept in list(self.asked_writes.items()):
            if request in client.done:
                del self.asked_writes[request]
                self.waiting[request] = kept
                if request.flags & nbd.CMD_FLAG_FUA:
                    self._promise([request])
        for request, before in list(self.asked_flushes.items()):
            if request in client.done:
                del self.asked_flushes[request]
                self._promise([one for one in before if one in self.waiting])

    def write(self, ldsu: int, block: int, fua: bool = False, trim: bool = False) -> None:
        unit = self.world.group.units[ldsu]
        place = (ldsu, block * BLOCK)
        data = bytes(BLOCK) if trim else unique(next(self.numbers))
        self.possible.setdefault(place, {bytes(BLOCK)}).add(data)
        # Whatever was promised of it may be replaced from now on.
        self.promised.pop(place, None)
        self.waiting = {r: one for r, one in self.waiting.items() if one[0] != place}
        for asked in [r for r, one in self.asked_writes.items() if one[0] == place]:
            del self.asked_writes[asked]
        command = nbd.CMD_TRIM if trim else nbd.CMD_WRITE
        flags = nbd.CMD_FLAG_FUA if fua else 0
        client = self.world.client
        request = client.ask(unit, command, place[1], BLOCK, None if trim else data, flags)
        self.asked_writes[request] = (place, data)
        self.settle()
        self.note_answers()

    def flush(self, ldsu: int) -> None:
        client = self.world.client
        before = [r for r in self.waiting if self.waiting[r][0][0] == ldsu]
        request = client.flush(self.world.group.units[ldsu])
        self.asked_flushes[request] = before
        self.settle()
        self.note_answers()

    def _promise(self, requests: list[Request]) -> None:
        for request in requests:
            place, data = self.waiting.pop(request)
            self.promised[place] = data
            if not any(one[0] == place for one in self.asked_writes.values()):
                self.possible[place] = {data}

    def bypass(self, to: str) -> None:
        asked = self.world.group.switch_bypass(to)
        asked.addErrback(lambda _: None)
        self.settle()

    def settle(self) -> None:
        """Let things happen; from a source of chance: some, in any order that can be."""
        if self.source is None:
            for _ in range(5):
                self.world.reactor.advance(0.01)
            return
        for _ in range(self.source.randrange(12)):
            self._step()

    def _step(self) -> bool:
        assert self.source is not None
        ready = [worker for worker in self.world.steps.values() if worker.waiting]
        if not ready:
            self.world.reactor.advance(0.002)
        return bool(ready) and self.source.choice(ready).step()

    def settle_all(self) -> None:
        """Let everything happen that can happen by itself."""
        for _ in range(3):
            while self.source is not None and self._step():
                pass
            self.world.reactor.advance(0.01)

    def all_committed(self) -> None:
        """Let the secondary have committed all that is durable."""
        ends = [Committed(u.index, u.durable_end, *u.durable_point) for u in self.world.group.units]
        self.world.commit(ends=ends)
        self.settle_all()

    # -- what must hold ------------------------------------------------------------------------

    def check(self) -> Secondary:
        """Check a driver that has recovered; give what its secondary has."""
        group, test = self.world.group, self.test
        for (ldsu, offset), data in self.promised.items():
            test.assertEqual(self._content(ldsu, offset), data, f"DURABLE {ldsu} {offset}")
        for (ldsu, offset), some in self.possible.items():
            found = self._content(ldsu, offset)
            sectors = [found[at : at + 512] for at in range(0, BLOCK, 512)]
            for number, sector in enumerate(sectors):
                fits = {one[number * 512 : number * 512 + 512] for one in some}
                test.assertIn(sector, fits, f"of another time: {ldsu} {offset}")
        far = Secondary(test)
        far.receive(self.world)
        if group.refresh_job is not None:
            test.assertFalse(group.coherent)
            test.assertEqual(sum(group.refresh_job._done), 0)
            return far
        for unit in group.units:
            if self._content(unit.index, 0, SIZE) == bytes(far.disks[unit.index]):
                continue
            for offset in range(0, SIZE, 512):
                near = self._content(unit.index, offset, 512)
                if near != bytes(far.disks[unit.index][offset : offset + 512]):
                    test.assertEqual(group.bypass.phase, "on", "differs, and nobody knows")
                    test.assertTrue(unit.dirty.is_marked(offset), f"NO-HIDDEN {offset}")
        return far

    def _content(self, ldsu: int, offset: int, length: int = BLOCK) -> bytes:
        return self.world.client.read(self.world.group.units[ldsu], offset, length)

    def go_on(self, far: Secondary) -> None:
        """Leave bypass if need be, let everything be mirrored, and compare."""
        group = self.world.group
        self.world.attach()
        self.write(0, 50)
        if group.bypass.phase == "off" and group.refresh_job is None and not group.coherent:
            group.refresh("full")
        self.write(1, 51)
        for _ in range(50):
            self.settle_all()
            far.receive(self.world)
            self.all_committed()
            if group.bypass.phase == "on":
                self.bypass("off")
                continue
            if group.coherent and group.durable_gsn == group.next_gsn - 1:
                break
        self.test.assertTrue(group.coherent, group.status())
        self.settle_all()
        far.receive(self.world)
        for index in range(LDSUS):
            near = self.world.data(index).content()
            self.test.assertTrue(near == bytes(far.disks[index]), f"LDSU {index} differs")


def in_and_out(story: Story) -> None:
    """Journaled writes, bypass, direct writes over them, and the way back."""
    story.write(0, 0)
    story.write(1, 1)
    story.write(0, 2, fua=True)
    story.bypass("on")
    story.write(0, 0, fua=True)
    story.write(1, 3)
    story.write(1, 40)
    story.flush(1)
    story.write(0, 2, trim=True)
    story.write(1, 1)
    story.bypass("off")
    story.write(0, 4, fua=True)
    # What it is asked after was written past the writelog.
    story.flush(1)
    story.write(1, 3)


def overflow(story: Story) -> None:
    """So many writes that a writelog cannot hold them."""
    for number in range(20):
        story.write(0, number)
        if number % 5 == 0:
            story.write(1, number)
    story.write(0, 40)
    story.write(0, 0, fua=True)
    story.write(1, 40)
    story.flush(0)


class CrashTests(SynchronousTestCase):
    """At every I/O, whatever of the unsynced writes has reached the disks."""

    def stories(self, script: Script, policy: str = "block") -> Iterator[tuple[Story, int]]:
        """Tell a story once to its end, then cut it before each of its I/Os."""
        power = Power(self)
        limit: int | None = None
        total = 0
        while limit is None or limit < total:
            story = Story(self, policy)
            power.limit, power.count = None, 0
            story.world.start()
            power.count, power.limit = 0, limit
            script(story)
            if limit is None:
                total = power.count
            power.limit = None
            yield story, total if limit is None else limit
            limit = 0 if limit is None else limit + 1

    def recover(self, story: Story, choose: Choice) -> Secondary:
        story.world.crash(choose)
        story.world.start()
        return story.check()

    def cut_everywhere(self, script: Script, policy: str, choose: Choice) -> set[str]:
        phases = set()
        for story, _cut in self.stories(script, policy):
            far = self.recover(story, choose)
            phases.add(story.world.group.state.value)
            story.go_on(far)
            if SWITCH in far.kinds:
                self.assertNotIn(
                    ENTRIES, far.kinds[far.kinds.index(BREAK) : far.kinds.index(SWITCH)]
                )
        return phases

    def test_everything_unsynced_is_lost(self) -> None:
        phases = self.cut_everywhere(in_and_out, "block", nothing)
        self.assertEqual(phases, {"accumulating", "bypass", "refresh"})

    def test_everything_unsynced_has_reached_the_disks(self) -> None:
        phases = self.cut_everywhere(in_and_out, "block", everything)
        self.assertEqual(phases, {"accumulating", "bypass", "refresh"})

    def test_some_of_it_has(self) -> None:
        for seed in range(3):
            self.cut_everywhere(in_and_out, "block", at_random(random.Random(seed)))

    def test_in_any_order_of_what_the_workers_do(self) -> None:
        power = Power(self)
        phases = set()
        for seed in range(60):
            source = random.Random(seed)
            story = Story(self, "bypass", source)
            power.limit, power.count = None, 0
            self.started(story)
            power.count, power.limit = 0, source.randrange(90)
            (in_and_out if seed % 3 else overflow)(story)
            if seed % 2:
                story.settle_all()
            story.note_answers()
            power.limit = None
            story.world.crash(at_random(source))
            self.started(story)
            far = story.check()
            phases.add(story.world.group.state.value)
            story.go_on(far)
        self.assertEqual(phases, {"accumulating", "bypass", "refresh"})

    def started(self, story: Story) -> None:
        begun = story.world.begin()
        self.successResultOf(begun)

    def test_overflow(self) -> None:
        phases = self.cut_everywhere(overflow, "bypass", at_random(random.Random(9)))
        self.assertLessEqual({"accumulating", "bypass"}, phases)
