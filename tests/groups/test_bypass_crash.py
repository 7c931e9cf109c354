"""A power cut at every I/O of entering bypass, of what is written in it, and of leaving it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.frames import BREAK, ENTRIES, SWITCH, Entry
from qdsmirror.core.inbound import Intake
from qdsmirror.core.records import Cursor, Generation
from qdsmirror.core.watermark import Committed
from qdsmirror.storage.writelog import Writelog
from tests.fakes import Choice, at_random, everything, nothing
from tests.groups.application import Application, Power, cut_before_each
from tests.groups.world import GENERATION, KIB, DriverWorld

LDSUS = 2
SIZE = 256 * KIB
#: Each block is written by at most these: (before bypass, in it).
Script = Callable[["Story"], None]


class Secondary:
    """What a secondary makes of the frames of a primary's writelogs."""

    def __init__(self, test: SynchronousTestCase) -> None:
        self.test = test
        self.intake = Intake(Cursor(), [SIZE] * LDSUS, [Generation(GENERATION, 1)])
        self.disks = [bytearray(SIZE) for _ in range(LDSUS)]
        self.kinds: list[int] = []

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

    def _apply(self, ldsu: int, entry: Entry) -> None:
        data = bytes(entry.length) if entry.payload is None else bytes(entry.payload)
        self.disks[ldsu][entry.offset : entry.offset + entry.length] = data


class Story(Application):
    """A driver, and what an application asks of it, perhaps in an order of chance."""

    def __init__(
        self,
        test: SynchronousTestCase,
        overflow: str = "block",
        source: random.Random | None = None,
    ) -> None:
        stepped = source is not None
        world = DriverWorld(test, ldsus=LDSUS, size=SIZE, log=192 * KIB, stepped=stepped)
        super().__init__(test, world)
        self.source = source
        self.world.config = replace(self.world.config, on_overflow=overflow)
        for index in range(LDSUS):
            log = Writelog.open(self.world.log(index))
            log.update(both=True, coherent=True, reason="")

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
            test.assertEqual(self.content(ldsu, offset), data, f"DURABLE {ldsu} {offset}")
        self.check_possible()
        far = Secondary(test)
        far.receive(self.world)
        if group.refresh_job is not None:
            test.assertFalse(group.coherent)
            test.assertEqual(sum(group.refresh_job._done), 0)
            return far
        for unit in group.units:
            if self.content(unit.index, 0, SIZE) == bytes(far.disks[unit.index]):
                continue
            for offset in range(0, SIZE, 512):
                near = self.content(unit.index, offset, 512)
                if near != bytes(far.disks[unit.index][offset : offset + 512]):
                    test.assertEqual(group.bypass.phase, "on", "differs, and nobody knows")
                    test.assertTrue(unit.dirty.is_marked(offset), f"NO-HIDDEN {offset}")
        return far

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

    def recover(self, story: Story, choose: Choice) -> Secondary:
        story.world.crash(choose)
        story.world.start()
        return story.check()

    def cut_everywhere(self, script: Script, policy: str, choose: Choice) -> set[str]:
        phases = set()
        for story in cut_before_each(self, lambda _: Story(self, policy), script):
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
            story.note()
            power.limit = None
            story.world.crash(at_random(source))
            self.started(story)
            far = story.check()
            phases.add(story.world.group.state.value)
            story.go_on(far)
            story.world.close()
        self.assertEqual(phases, {"accumulating", "bypass", "refresh"})

    def started(self, story: Story) -> None:
        begun = story.world.begin()
        self.successResultOf(begun)

    def test_overflow(self) -> None:
        phases = self.cut_everywhere(overflow, "bypass", at_random(random.Random(9)))
        self.assertLessEqual({"accumulating", "bypass"}, phases)
