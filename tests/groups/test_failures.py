"""A failed writelog, a failed data device: what goes on, and what every crash leaves of it."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import nbd
from qdsmirror.core.failures import Failed, Untrusted, worst
from qdsmirror.core.inbound import Intake
from qdsmirror.core.records import BoundUnit, Cursor, Generation
from qdsmirror.core.watermark import Committed
from qdsmirror.errors import DegradedError, DeviceFailedError, QdsError
from qdsmirror.groups.unit import DriverUnit
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.writelog import Writelog
from tests.fakes import Choice, MemoryDevice, at_random, everything, nothing
from tests.groups.application import Application, Power, cut_before_each
from tests.groups.world import (
    BLOCK,
    GENERATION,
    KIB,
    DriverWorld,
    WatchedDevice,
    durable_superblock,
    unique,
)

SIZE = 256 * KIB
LOG = 256 * KIB


class MemoryLatch(FailureLatch):
    """A state file in memory.

    :ivar before: called before each write, may raise.
    :ivar before_crash: what it knew of the group at the first crash.
    """

    def __init__(self) -> None:
        super().__init__(Path("/nowhere/dsgrp000.state"))
        self.kept: tuple[dict[str, str], Failed] = ({}, Failed())
        self.before_crash: Failed | None = None
        self.before: Callable[[], None] = lambda: None

    def _read(self) -> tuple[dict[str, str], Failed]:
        return dict(self.kept[0]), self.kept[1]

    def _write(self, failed: Mapping[str, str], group: Failed) -> None:
        try:
            self.before()
        except OSError as error:
            raise QdsError(f"{self.path} cannot be written: {error}") from error
        self.kept = (dict(failed), group)


class FailingDevice(WatchedDevice):
    """NO-HIDDEN also holds where it is durable that the writelog is not to be trusted."""

    world: FailureWorld
    index: int

    def pwritev(self, buffers: Any, offset: int) -> None:
        if self.world.is_untrusted(self.index):
            MemoryDevice.pwritev(self, buffers, offset)
        else:
            super().pwritev(buffers, offset)

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        if self.world.is_untrusted(self.index):
            MemoryDevice.zero(self, offset, length, unmap)
        else:
            super().zero(offset, length, unmap)


class FailureWorld(DriverWorld):
    """A driver whose failed devices can be recorded; its mirror is coherent at first."""

    latch: MemoryLatch

    def __init__(self, test: SynchronousTestCase, ldsus: int = 2, **more: Any) -> None:
        super().__init__(test, ldsus=ldsus, **{"size": SIZE, "log": LOG, **more})
        self.latch = MemoryLatch()
        for index in range(ldsus):
            self._watch(self.devices[f"/near/data{index}"], index)
            Writelog.open(self.log(index)).update(both=True, coherent=True, reason="")

    def _watch(self, device: MemoryDevice, index: int) -> None:
        device.__class__ = FailingDevice
        assert isinstance(device, FailingDevice)
        device.world, device.index = self, index

    def _forget(self) -> None:
        super()._forget()
        if self.latch.before_crash is None:
            self.latch.before_crash = self.latch.kept[1]

    def _again(self, old: MemoryDevice, new: MemoryDevice) -> MemoryDevice:
        again = super()._again(old, new)
        if isinstance(old, FailingDevice):
            self._watch(again, old.index)
        return again

    def is_untrusted(self, index: int) -> bool:
        """Tell whether a power cut would find this LDSU's writelog marked everywhere."""
        recorded = self.latch.kept[1].untrusted
        others = [i for i in range(len(self.config.ldsus)) if i not in recorded]
        marks = [
            Failed.from_json(durable_superblock(self.log(i).durable()).failures) for i in others
        ]
        return index in recorded and all(index in mark.untrusted for mark in marks)


class Far:
    """A secondary: takes what may be sent, and knows that it was durable (NO-AHEAD)."""

    def __init__(self, test: SynchronousTestCase, ldsus: int) -> None:
        self.test = test
        self.intake = Intake(Cursor(), [SIZE] * ldsus, [Generation(GENERATION, 1)])
        self.disks = [bytearray(SIZE) for _ in range(ldsus)]

    @property
    def gsn(self) -> int:
        return self.intake.gsn - 1

    def receive(self, world: FailureWorld) -> None:
        """Take all that is announced and not yet taken."""
        group = world.group
        found = [
            frame
            for unit in group.units
            if unit.writelog.device.path == world.log(unit.index).path
            and not group.failures.restarted
            for frame in unit.writelog.reader(unit.writelog.superblock.tail)
            if self.gsn < frame.header.gsn_first and frame.header.gsn_last <= group.durable_gsn
        ]
        for frame in sorted(found, key=lambda one: one.header.gsn_first):
            header, entries = self.intake.check(frame.frame)
            durable = world.log(header.ldsu).durable()
            self.test.assertGreaterEqual(durable.find(bytes(frame.frame)), 0, "NO-AHEAD")
            for entry in entries:
                data = bytes(entry.length) if entry.payload is None else bytes(entry.payload)
                self.disks[header.ldsu][entry.offset : entry.offset + entry.length] = data


class Pool:
    """A thread pool that stands still until it is told to run."""

    def __init__(self, world: FailureWorld) -> None:
        self._jobs: list[tuple[Any, ...]] = []
        self._reactor = world.reactor
        self._real = world.reactor.callInThreadWithCallback
        world.test.patch(self._reactor, "callInThreadWithCallback", self._keep)

    def _keep(self, *job: Any) -> None:
        self._jobs.append(job)

    def run(self) -> None:
        while self._jobs:
            self._real(*self._jobs.pop(0))
        self._reactor.callInThreadWithCallback = self._real  # type: ignore[method-assign]


class Story(Application):
    """What an application asks of two LDSUs, and a secondary."""

    world: FailureWorld

    def __init__(self, test: SynchronousTestCase, ldsus: int = 2, **more: Any) -> None:
        super().__init__(test, FailureWorld(test, ldsus, **more))
        self.far = Far(test, ldsus)

    def unit(self, ldsu: int) -> DriverUnit:
        return self.world.group.units[ldsu]

    def settle(self) -> None:
        if not self.world.stepped:
            for _ in range(3):
                self.world.reactor.advance(0.01)
        self.note()

    def committed(self) -> None:
        """Let the secondary take and commit all that it may."""
        self.far.receive(self.world)
        ends: list[Committed] = []
        for unit in self.world.group.units:
            last = [
                f for f in self.world.frames
                if f.unit is unit and f.gsn_last <= self.far.gsn
            ]  # fmt: skip
            if last:
                ends.append(Committed(unit.index, last[-1].end, *last[-1].next_point))
        self.world.commit(self.far.gsn, ends)
        self.settle()

    # -- what must hold ------------------------------------------------------------------------

    def check(self, dead: int | None = None) -> None:
        """Check what a driver serves; of a dead LDSU, what its mirror will have."""
        self.far.receive(self.world)
        for (ldsu, offset), data in self.promised.items():
            if ldsu != dead:
                found = self.content(ldsu, offset)
                self.test.assertEqual(found, data, f"DURABLE {ldsu} {offset}")
            elif not self.world.group.failures.restarted:
                found = bytes(self.far.disks[ldsu][offset : offset + BLOCK])
                self.test.assertEqual(found, data, f"DURABLE, at the mirror {ldsu} {offset}")
        self.check_possible(dead)
        known = self.world.latch.before_crash
        if known is None:
            known = self.world.group.failures.recorded
        for log in known.untrusted.values():
            self.test.assertLessEqual(self.far.gsn, log.upto, "sent after the break")
        if self.world.group.failures.recorded.untrusted:
            return
        for unit in self.world.group.units:
            if unit.index == dead:
                continue
            near, far = self.content(unit.index, 0, SIZE), self.far.disks[unit.index]
            self.test.assertTrue(near == bytes(far), f"NO-HIDDEN LDSU {unit.index}")

    def check_bypass(self, *paths: str) -> None:
        """Check that the group is LOUD about these writelogs, and takes writes nevertheless."""
        group, test = self.world.group, self.test
        status = group.status()
        test.assertEqual(status["state"], "bypass")
        test.assertIn(f"writelog {paths[0]} failed", status["reason"])
        for path in paths:
            test.assertIn(f"writelog {path} failed", status["bypass"]["reason"])
        test.assertGreater(status["bypass"]["since"], 0)
        test.assertGreater(status["since"], 0)
        error = test.failureResultOf(group.switch_bypass("off"), DeviceFailedError).value
        test.assertIn("qdswlinit", error.hint)
        test.failureResultOf(group.refresh("full"), DeviceFailedError)
        if group.failures.restarted:
            error = test.assertRaises(QdsError, group.attach_pmd)
            test.assertIn("nothing is sent", str(error))
        requests = [self.write(index, 60, fua=True) for index in range(len(group.units))]
        for index, request in enumerate(requests):
            test.assertIn(request, self.world.client.done)
            test.assertIn((index, 60 * BLOCK), self.promised)


#: What goes wrong: a method of the device, and the errno.
WRITELOG_FAULTS = (("fdatasync", errno.EIO), ("pwritev", errno.EIO), ("pwritev", errno.ENOSPC))


def before_and_after(story: Story, fault: Callable[[], None]) -> None:
    """Writes of every kind before a fault, at it and after it."""
    story.world.attach()
    story.write(0, 0)
    story.write(1, 1)
    story.write(0, 2, fua=True)
    story.committed()
    story.write(0, 3)
    story.flush(0)
    story.write(0, 0)
    story.write(1, 1, fua=True)
    fault()
    story.write(0, 4)
    story.write(0, 3)
    story.write(1, 5)
    story.write(0, 6, fua=True)
    story.far.receive(story.world)
    story.write(1, 1)
    story.write(0, 0)
    story.flush(0)
    story.flush(1)
    story.write(1, 7, fua=True)
    story.far.receive(story.world)
    story.write(0, 8)


class WritelogTests(SynchronousTestCase):
    """rules.md 13, with nothing else going wrong."""

    def test_application_sees_nothing_of_it(self) -> None:
        for method, code in WRITELOG_FAULTS:
            story = Story(self)
            story.world.start()
            log = story.world.log(0)
            before_and_after(story, lambda log=log, m=method, c=code: log.fail(m, c))
            self.assertEqual(story.world.client.errors, {})
            self.assertEqual(len(story.world.client.done), 17)
            self.assertTrue(story.world.group.coherent)
            story.check()
            story.check_bypass("/near/log0")

    def test_only_log_of_a_group(self) -> None:
        story = Story(self, 1)
        story.world.start()
        story.write(0, 0)
        story.flush(0)
        story.world.log(0).fail("fdatasync")
        story.write(0, 1, fua=True)
        story.check_bypass("/near/log0")
        story.world.crash(nothing)
        story.world.start()
        story.check()
        story.check_bypass("/near/log0")
        self.assertEqual(story.world.group.generation, GENERATION)
        # The only superblock that knew of the mirror is gone.
        self.assertFalse(story.world.group.coherent)

    def test_break_is_below_the_first_frame_that_is_not_durable(self) -> None:
        story = Story(self, stepped=True)
        world = story.world
        world.start()
        world.attach()
        for name in ("qds0", "qds1"):
            story.write(int(name[-1]), 0, fua=True)
            world.step(f"{name} writelog")
            world.step(f"{name} commit")
        story.write(0, 1)
        world.step("qds0 writelog")
        story.write(1, 1, fua=True)
        world.step("qds1 writelog")
        world.step("qds1 commit")
        world.log(0).fail("fdatasync")
        world.settle(1)
        self.assertEqual(world.group.durable_gsn, 2)
        self.assertEqual(world.group.failures.recorded.untrusted[0].upto, 2)
        story.far.receive(world)
        self.assertEqual(story.far.gsn, 2)
        self.assertEqual(world.data(0).content()[BLOCK : 2 * BLOCK], unique(3))
        self.assertEqual(world.data(1).content()[BLOCK : 2 * BLOCK], unique(4))

    def test_failed_log_is_never_written_again(self) -> None:
        story = Story(self)
        world = story.world
        world.start()
        world.log(0).fail("fdatasync")
        story.write(0, 0, fua=True)
        syncs, content = world.log(0).syncs, world.log(0).content()
        story.write(0, 1, fua=True)
        story.flush(0)
        world.settle(10)
        self.assertEqual((world.log(0).syncs, world.log(0).content()), (syncs, content))
        self.successResultOf(world.group.stop())
        self.assertEqual((world.log(0).syncs, world.log(0).content()), (syncs, content))

    def test_nothing_is_answered_that_could_not_be_recorded(self) -> None:
        for method, code in WRITELOG_FAULTS:
            story = Story(self)
            world = story.world
            world.start()
            promised = story.write(0, 0, fua=True)

            def full() -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            world.latch.before = full
            world.log(0).fail(method, code)
            waiting = story.write(0, 1, fua=True)
            after = [story.write(0, 2), story.write(1, 2), story.flush(0), story.flush(1)]
            self.assertEqual(world.client.done, [promised])
            self.assertEqual(set(world.client.errors), {waiting, *after})
            self.assertEqual(set(world.client.errors.values()), {errno.EIO})
            self.assertEqual(world.data().content()[BLOCK : 3 * BLOCK], bytes(2 * BLOCK))
            self.assertIn("cannot be recorded", str(world.group.status()["errors"]))

    def test_second_log_fails_too(self) -> None:
        for fault in ("fdatasync", "pwritev"):
            story = Story(self, 3)
            world = story.world
            world.start()
            story.write(1, 0, fua=True)
            world.log(0).fail("fdatasync")
            story.write(0, 0, fua=True)
            world.log(1).fail(fault)
            story.write(1, 1, fua=True)
            story.write(1, 2)
            story.flush(1)
            self.assertEqual(world.client.errors, {})
            story.check_bypass("/near/log0", "/near/log1")
            world.crash(nothing)
            world.start()
            story.check()
            story.check_bypass("/near/log0", "/near/log1")

    def test_both_logs_fail_at_once(self) -> None:
        story = Story(self)
        world = story.world
        world.start()
        story.write(1, 0)
        world.log(0).fail("fdatasync")
        world.log(1).fail("fdatasync")
        story.write(0, 0, fua=True)
        story.write(1, 1, fua=True)
        self.assertEqual(world.client.errors, {})
        story.check_bypass("/near/log0", "/near/log1")
        world.crash(nothing)
        world.start()
        story.check()
        story.check_bypass("/near/log0", "/near/log1")

    def test_degraded_is_completed_in_the_logs_that_are_left(self) -> None:
        """SYNC: the crash came while it was recorded, and the one that says so may fail too."""
        world = FailureWorld(self, 3)
        world.config = replace(world.config, operation="sync", on_disconnect="async")
        world.start()
        world.log(0).fail("fdatasync")
        asked = world.client.write(world.group.units[0], 0, unique(1))
        world.settle()
        self.assertTrue(world.client.answered(asked))
        world.group.units[2].writelog.update(both=True, degraded=None)
        world.crash(nothing)
        world.start()
        for index in (1, 2):
            self.assertIsNotNone(durable_superblock(world.log(index).durable()).degraded)

    def test_log_fails_on_the_way_into_and_out_of_bypass(self) -> None:
        for to in ("on", "off"):
            for nth in range(12):
                story = Story(self)
                world = story.world
                world.start()
                story.write(0, 0)
                if to == "off":
                    self.successResultOf(world.group.switch_bypass("on"))
                    story.write(0, 1, fua=True)
                    story.write(1, 1)
                fault_nth(world.log(1), nth)
                switched = world.group.switch_bypass(to)
                switched.addErrback(lambda _: None)
                story.settle()
                story.write(1, 2, fua=True)
                story.write(0, 2)
                story.flush(0)
                self.assertEqual(world.client.errors, {}, (to, nth))
                if world.group.failures.recorded:
                    story.check_bypass("/near/log1")
                world.crash(nothing)
                world.start()
                for (ldsu, offset), data in story.promised.items():
                    self.assertEqual(world.client.read(story.unit(ldsu), offset, BLOCK), data)

    def test_direct_write_waits_until_its_bitmap_is_recorded_as_failed(self) -> None:
        story = Story(self, stepped=True)
        world = story.world
        world.start()
        world.group.switch_bypass("on")
        world.settle(1)
        self.assertEqual(world.group.state, "bypass")
        world.log(0).fail("fdatasync")
        requests = [story.write(0, 0)]
        world.step("qds0 commit")
        # The same block again: its bit is set in memory, and nowhere else.
        requests.append(story.write(0, 0))
        world.steps["qds0 data"].step_all()
        self.assertEqual(world.client.done, [])
        self.assertEqual(world.data().content()[:BLOCK], bytes(BLOCK))
        world.settle(1)
        self.assertEqual(world.client.done, requests)
        self.assertEqual(world.data().content()[:BLOCK], unique(2))

    def test_log_that_fails_while_another_is_recorded_is_recorded_first(self) -> None:
        story = Story(self, 3, stepped=True)
        world = story.world
        world.start()
        world.group.switch_bypass("on")
        world.settle(1)
        world.log(0).fail("pwritev")
        requests = [story.write(0, 0)]
        world.step("qds0 commit")
        requests.append(story.write(1, 0))
        # The first record of the other; this one's dirty bits; that all is safe without the other.
        world.step("qds2 commit")
        world.step("qds1 commit")
        world.log(1).fail("pwritev")
        world.step("qds1 commit", 2)
        world.step("qds2 commit")
        self.assertTrue(story.unit(0).unlogged)
        self.assertTrue(story.unit(1).log_failed)
        self.assertFalse(world.steps["qds1 data"].waiting, "rules.md 13")
        world.settle(1)
        self.assertEqual(world.client.done, requests)
        self.assertEqual(world.data(1).violations, 0)
        self.assertEqual(world.data(1).content()[:BLOCK], unique(2))
        self.assertEqual(set(world.latch.kept[1].untrusted), {0, 1})

    def test_what_is_made_of_a_failure_waits_for_the_state_file_alone(self) -> None:
        story = Story(self)
        world = story.world
        world.start()
        told: list[str] = []
        self.patch(world.latch, "_tell", lambda device, _reason: told.append(device))
        pool = Pool(world)
        world.log(0).fail("fdatasync")
        request = story.write(0, 0, fua=True)
        world.settle(1)
        self.assertEqual(told, ["/near/log0"], "the master is told at once")
        self.assertEqual(world.latch.kept, ({}, Failed()))
        self.assertIsNone(durable_superblock(world.log(1).durable()).failures)
        self.assertEqual(world.client.done, [])
        self.assertEqual(world.client.read(story.unit(1), 0, BLOCK), bytes(BLOCK))
        pool.run()
        world.settle(1)
        self.assertEqual(world.client.done, [request])
        self.assertIn("/near/log0", world.latch.kept[0])
        story.check_bypass("/near/log0")

    def test_driver_ends_when_the_state_file_is_written(self) -> None:
        story = Story(self)
        world = story.world
        world.start()
        story.write(0, 0)
        world.settle(0.1)
        pool = Pool(world)
        world.data().fail("fdatasync")
        stopped = world.group.stop()
        world.settle(1)
        self.assertNoResult(stopped)
        pool.run()
        world.settle(1)
        self.successResultOf(stopped)
        self.assertIn("/near/data0", world.latch.kept[0])

    def test_overflow_and_refresh_are_refused_while_a_log_has_failed(self) -> None:
        story = Story(self)
        world = story.world
        world.start()
        world.log(0).fail("fdatasync")
        story.write(0, 0, fua=True)
        self.failureResultOf(world.group.switch_bypass("on"), DegradedError)

    def test_new_logs_and_a_full_refresh_lead_back(self) -> None:
        story = Story(self)
        world = story.world
        world.start()
        world.log(0).fail("fdatasync")
        story.write(0, 0, fua=True)
        story.write(1, 1, fua=True)
        self.successResultOf(world.group.stop())
        # A new device, and what qdswlinit --yes does to all of the group.
        world.devices["/near/log0"] = MemoryDevice(LOG, path="/near/log0", role="writelog")
        for ldsu in world.config.ldsus:
            device = world.log(ldsu.index).reopen()
            world.devices[ldsu.writelog_device] = device
            Writelog.initialise(
                device,
                role="writelog",
                group=0,
                units=[BoundUnit(ldsu.index, ldsu.name, SIZE, ldsu.data_device)],
                generations=[Generation(b"N" * 16, 1)],
            )
        world.latch.kept = ({}, Failed())
        world.start()
        world.attach()
        self.assertEqual(world.group.state, "accumulating")
        world.group.refresh("full")
        far = Far(self, 2)
        far.intake = Intake(Cursor(), [SIZE] * 2, [Generation(b"N" * 16, 1)])
        story.far = far
        for _ in range(30):
            story.committed()
        self.assertTrue(world.group.coherent)
        story.check()


def fault_nth(device: MemoryDevice, nth: int) -> None:
    """Let the nth sync from now on fail."""
    sync, left = device.fdatasync, [nth]

    def failing() -> None:
        if not left[0]:
            device.fail("fdatasync")
        left[0] -= 1
        sync()

    device.fdatasync = failing  # type: ignore[method-assign]


class DataDeviceTests(SynchronousTestCase):
    """rules.md 16, with nothing else going wrong."""

    def dead(self, method: str = "pwritev", **more: Any) -> Story:
        story = Story(self, **more)
        world = story.world
        world.start()
        world.attach()
        story.write(0, 0, fua=True)
        story.write(1, 0, fua=True)
        world.settle(2)
        world.data(0).fail(method)
        story.write(0, 1, fua=True)
        story.write(1, 1)
        world.settle(2)
        self.assertTrue(story.unit(0).dead)
        return story

    def assert_dead(self, story: Story) -> None:
        world = story.world
        for command in (nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_FLUSH):
            data = bytes(BLOCK) if command == nbd.CMD_WRITE else None
            request = world.client.ask(story.unit(0), command, 0, BLOCK, data)
            self.assertEqual(world.client.errors.get(request), errno.EIO)
        status = world.group.status()
        self.assertIn("data device /near/data0 failed", status["reason"])
        self.assertIn("data device /near/data0 failed", status["ldsus"][0]["errors"][0])
        self.assertIn(story.write(1, 9, fua=True), world.client.done)

    def test_tail_and_the_other_ldsu_go_on(self) -> None:
        for method in ("pwritev", "fdatasync"):
            story = self.dead(method)
            world = story.world
            self.assert_dead(story)
            for number in range(4 * LOG // BLOCK):
                request = story.write(1, number % 50)
                if number % 10 == 0:
                    story.committed()
                    world.settle(1.5)
                self.assertIn(request, world.client.done)
            story.committed()
            world.settle(2)
            self.assertEqual(story.unit(0).writelog.used_bytes, 0)
            # What was journaled before the failure has reached the mirror.
            story.check(dead=0)
            self.assertEqual(bytes(story.far.disks[0][BLOCK : 2 * BLOCK]), unique(3))

    def test_read_error_is_no_death(self) -> None:
        story = Story(self)
        world = story.world
        world.start()
        world.data(0).fail("pread_nowait")
        request = world.client.ask(story.unit(0), nbd.CMD_READ, 0, BLOCK)
        self.assertEqual(world.client.errors, {request: errno.EIO})
        self.assertIn(story.write(0, 1, fua=True), world.client.done)
        self.assertFalse(world.group.failures.recorded)

    def test_restart_keeps_all_of_that(self) -> None:
        for method in ("pwritev", "fdatasync"):
            for again in (DriverWorld.kill, lambda world: world.crash(nothing)):
                story = self.dead(method)
                world = story.world
                again(world)
                syncs = world.data(0).syncs
                world.start()
                world.attach()
                self.assert_dead(story)
                self.assertEqual(world.data(0).syncs, syncs, "the dead device was used")
                story.check(dead=0)
                error = self.failureResultOf(world.group.refresh("full"), DeviceFailedError).value
                self.assertIn("qdsmirror-architecture", error.hint)
                self.successResultOf(world.group.stop())

    def test_device_that_fails_in_recovery_is_dead_from_then_on(self) -> None:
        story = Story(self)
        world = story.world
        world.start()
        story.write(0, 0, fua=True)
        story.write(1, 0, fua=True)
        world.kill()
        world.data(0).fail("pwritev")
        world.start()
        self.assertIn(0, world.latch.kept[1].dead)
        self.assert_dead(story)
        story.check(dead=0)

    def test_group_waits_where_it_cannot_be_recorded(self) -> None:
        story = Story(self)
        world = story.world
        world.start()
        world.attach()

        def full() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        world.latch.before = full
        world.data(0).fail("pwritev")
        story.write(0, 0)
        story.write(1, 0)
        story.committed()
        world.settle(3)
        self.assert_dead(story)
        for unit in world.group.units:
            self.assertEqual(unit.writelog.superblock.tail.position, 0)
        self.assertIn("cannot be recorded", str(world.group.status()["errors"]))
        world.latch.before = lambda: None
        world.kill()
        world.start()
        # Nobody knows of it any more: what was durable is replayed.
        story.check()

    def test_log_and_data_device_of_one_ldsu(self) -> None:
        story = self.dead()
        world = story.world
        world.log(0).fail("fdatasync")
        story.write(1, 2, fua=True)
        world.settle(3)
        world.group.checkpoints.record_everywhere(reason="x").addErrback(lambda _: None)
        world.settle(3)
        self.assertEqual(world.group.state, "bypass")
        self.assertIn(story.write(1, 3, fua=True), world.client.done)
        world.crash(nothing)
        world.start()
        self.assertEqual(world.group.state, "bypass")
        self.assertIn(story.write(1, 4, fua=True), world.client.done)
        story.check(dead=0)

    def test_device_dies_while_bypass_is_entered(self) -> None:
        story = Story(self)
        world = story.world
        world.start()
        pool = Pool(world)
        story.write(0, 0)
        story.write(1, 0)
        world.data(0).fail("fdatasync")
        entered = world.group.switch_bypass("on")
        world.settle(2)
        # Its death is not yet recorded: that is waited for, without looking again and again.
        self.assertNoResult(entered)
        pool.run()
        world.settle(2)
        self.successResultOf(entered)
        self.assertEqual(world.group.state, "bypass")

    def test_overflow_beside_a_dead_device(self) -> None:
        from dataclasses import replace

        story = self.dead()
        world = story.world
        world.kill()
        world.config = replace(world.config, on_overflow="bypass")
        world.start()
        for number in range(2 * LOG // BLOCK):
            self.assertIn(story.write(1, number % 50), world.client.done)
        self.assertEqual(world.group.state, "bypass")
        self.failureResultOf(world.group.switch_bypass("off"), DeviceFailedError)


class CrashTests(SynchronousTestCase):
    """The power is cut before each I/O, whatever of the unsynced writes is on the disks."""

    def begin(self, power: Power) -> Story:
        """Begin a story whose state file is cut too."""
        story = Story(self)
        story.world.latch.before = power.tick
        return story

    def cut_everywhere(
        self, fault: Callable[[FailureWorld], None], choose: Choice, dead: int | None = None
    ) -> set[str]:
        found = set()
        for story in cut_before_each(
            self, self.begin, lambda s: before_and_after(s, lambda: fault(s.world))
        ):
            world = story.world
            world.crash(choose)
            world.start()
            recorded = world.group.failures.recorded
            story.check(dead if recorded.dead else None)
            found.add(world.group.state.value)
            if recorded.untrusted:
                story.check_bypass("/near/log0")
            # And once more: what it says is there to stay.
            world.crash(nothing)
            world.start()
            self.assertEqual(world.group.failures.recorded, recorded)
            story.check(dead if recorded.dead else None)
        return found

    def test_writelog(self) -> None:
        for number, (method, code) in enumerate(WRITELOG_FAULTS):
            for choose in (nothing, everything, at_random(random.Random(number))):
                states = self.cut_everywhere(
                    lambda world, m=method, c=code: world.log(0).fail(m, c), choose
                )
                self.assertEqual(states, {"accumulating", "bypass"})

    def test_data_device(self) -> None:
        for number, method in enumerate(("pwritev", "fdatasync")):
            for choose in (nothing, everything, at_random(random.Random(number))):
                states = self.cut_everywhere(
                    lambda world, m=method: world.data(0).fail(m), choose, dead=0
                )
                self.assertEqual(states, {"accumulating"})


class AnyOrderTests(SynchronousTestCase):
    """Workers end in any order; killed or cut anywhere; one device fails at any time."""

    def test_writelog(self) -> None:
        seen = {self.tell(seed, "log") for seed in range(150)}
        self.assertLessEqual({(True, True), (True, False), (False, False)}, seen)

    def test_data_device(self) -> None:
        seen = {self.tell(seed, "data") for seed in range(150)}
        self.assertLessEqual({(True, True), (True, False), (False, False)}, seen)

    def tell(self, seed: int, what: str) -> tuple[bool, bool]:
        """Tell one story; give whether the failure was recorded before and after the crash."""
        dice = random.Random(seed)
        story = Story(self, stepped=True)
        world = story.world
        world.start()
        world.attach()
        ends = dice.randrange(20, 120)
        for step in range(ends):
            if step == ends // 2:
                world.devices[f"/near/{what}0"].fail(dice.choice(("fdatasync", "pwritev")))
            self.do(story, dice)
        before = bool(world.group.failures.recorded)
        story.far.receive(world)
        if dice.random() < 0.3:
            world.kill()
        else:
            world.crash(at_random(dice))
        starting = world.begin()
        while not starting.called:
            self.assertTrue(any(worker.step() for worker in world.steps.values()))
        self.successResultOf(starting)
        recorded = world.group.failures.recorded
        story.check(0 if recorded.dead else None)
        if before:
            self.assertTrue(recorded)
        world.settle(2)
        for ldsu in range(2):
            if ldsu in recorded.dead:
                continue
            request = story.write(ldsu, 30, fua=True)
            world.settle(2)
            story.note()
            self.assertIn(request, world.client.done)
        world.close()
        return bool(recorded), before

    def do(self, story: Story, dice: random.Random) -> None:
        world = story.world
        roll = dice.random()
        if roll < 0.2:
            story.write(dice.randrange(2), dice.randrange(6), dice.random() < 0.3)
        elif roll < 0.25:
            story.flush(dice.randrange(2))
        elif roll < 0.3:
            story.far.receive(world)
        elif roll < 0.4:
            world.reactor.advance(dice.choice((0.001, 0.1, 1.0)))
        else:
            ready = [worker for worker in world.steps.values() if worker.waiting]
            if ready:
                dice.choice(ready).step()
        story.note()


class RecordTests(SynchronousTestCase):
    """What several records say together."""

    def test_the_worst_wins(self) -> None:
        first = Failed({1: Untrusted("first", 5.0, 90, False, SIZE)})
        second = Failed({1: Untrusted("second", 6.0, 80, True, SIZE)})
        for records in ((first, second), (second, first)):
            log = worst([*records, Failed()]).untrusted[1]
            self.assertEqual(log, Untrusted("first", 5.0, 80, True, SIZE))

    def test_json(self) -> None:
        failed = Failed({1: Untrusted("why", 5.0, 90, False, SIZE)})
        self.assertEqual(Failed.from_json(failed.to_json()), failed)
        self.assertEqual(Failed.from_json(None), Failed())
        for bad in ({}, {"untrusted": [], "dead": {}, "generation": ""},
                    {"untrusted": {"1": ["x"]}, "dead": {}},
                    {"untrusted": {}, "dead": {"0": [1, 2.0, 3]}}):  # fmt: skip
            self.assertRaises(ValueError, Failed.from_json, bad)
