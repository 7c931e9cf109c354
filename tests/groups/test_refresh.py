"""A refresh beside an application: its share of the log, its turn, and when it begins."""

from __future__ import annotations

from functools import partial
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror import limits
from qdsmirror.core.frames import REFRESH_BEGIN, REFRESH_END
from qdsmirror.groups import refresh as refresh_module
from qdsmirror.groups.framing import UnitFrame
from qdsmirror.groups.refresh import Refresh
from qdsmirror.groups.unapplied import Unapplied
from qdsmirror.groups.unit import DriverUnit
from tests.fakes import MemoryDevice
from tests.groups import world as world_module
from tests.groups.test_bypass import kinds
from tests.groups.world import BLOCK, KIB, MIB, DriverWorld, unique


def is_chunk(frame: UnitFrame) -> bool:
    """Whether a frame bears what a refresh has read: more than these tests write at once."""
    return frame.weight > 8 * BLOCK


class RefreshWorld(DriverWorld):
    """A driver whose data device has a content that no log knows; a pmd is attached."""

    def begin_work(self) -> DriverUnit:
        for index in range(len(self.config.ldsus)):
            size = self.data(index).size
            content = b"".join(unique(10**6 + n) for n in range(size // BLOCK))
            self.data(index).corrupt(0, content)
        unit = self.start()
        self.attach()
        return unit

    def refresh(self) -> Refresh:
        self.asked: Any = self.group.refresh("full")
        self.asked.addErrback(lambda _: None)
        job = self.group.refresh_job
        assert job is not None
        return job

    def fill_log(self, unit: DriverUnit, number: int) -> int:
        """Write until something waits for space; give the next free number."""
        before = len(self.client.done)
        asked = 0
        while asked == len(self.client.done) - before:
            place = number * BLOCK % unit.size
            self.client.write(unit, place, unique(number))
            number += 1
            asked += 1
        return number


class ShareTests(SynchronousTestCase):
    """A refresh waits for space, but not for ever."""

    def test_application_that_keeps_the_log_full_does_not_starve_a_refresh(self) -> None:
        world = RefreshWorld(self, size=512 * KIB, log=MIB)
        unit = world.begin_work()
        number = world.fill_log(unit, 0)
        job = world.refresh()
        for acknowledged in range(2000):
            if world.group.refresh_job is None:
                break
            # The link takes what the application has written just so slowly that the log is full.
            world.commit(world.frames[acknowledged].gsn_last)
            number = world.fill_log(unit, number)
            world.settle(0.01)
            if job.status()["remaining_bytes"]:
                ring = unit.writelog.ring.size
                self.assertGreater(unit.writelog.used_bytes, ring * 0.6)
                self.assertLessEqual(
                    unit.writelog.used_bytes, ring - limits.CONTROL_RESERVE_BYTES + BLOCK
                )
        self.assertIsNone(world.group.refresh_job)
        self.assertEqual(job.status()["remaining_bytes"], 0)
        self.assertEqual(world.client.errors, {})

    def test_without_acknowledgements_a_full_log_stays_the_applications(self) -> None:
        world = RefreshWorld(self, log=MIB)
        unit = world.begin_work()
        world.refresh()
        world.settle(1)
        world.fill_log(unit, 0)
        world.settle(10)
        used = sum(frame.weight for frame in world.frames if is_chunk(frame))
        self.assertLessEqual(used, unit.writelog.ring.size * limits.REFRESH_RING_SHARE)

    def test_room_kept_for_a_refresh_is_given_back_when_it_ends(self) -> None:
        world = RefreshWorld(self, log=MIB)
        unit = world.begin_work()
        world.refresh()
        world.settle(1)
        world.fill_log(unit, 0)
        self.assertGreater(unit.kept_bytes, 0)
        answered = len(world.client.done)
        self.successResultOf(world.group.kill_refresh())
        self.assertEqual(unit.kept_bytes, 0)
        self.assertEqual(len(world.client.done), answered + 1)

    def test_largest_write_fits_beside_a_refresh_in_any_log(self) -> None:
        for log, physical in (
            (limits.WRITELOG_BYTES_MIN, 4096),
            (256 * KIB, 4096),
            (300 * KIB, 4096),
            (8 * MIB, 4096),
            (1280 * KIB, 64 * KIB),
        ):
            device = partial(MemoryDevice, physical_block=physical)
            self.patch(world_module, "MemoryDevice", device)
            world = RefreshWorld(self, size=2 * MIB, log=log)
            unit = world.begin_work()
            # It keeps its room and makes no use of it.
            for _ in range(100):
                world.data().fail("pread")
            world.refresh()
            data = b"".join(unique(n) for n in range(MIB // BLOCK))
            asked = world.client.write(unit, MIB, data)
            for _ in range(300):
                world.settle(0.01)
                world.commit()
            self.assertIn(asked, world.client.done, f"a log of {log} bytes")
            self.assertIsNotNone(world.group.refresh_job)


class TurnTests(SynchronousTestCase):
    """What a refresh waits for, it is told."""

    def settled(self, world: RefreshWorld) -> None:
        """Let all end but the appends."""
        while any(w.step() for name, w in world.steps.items() if not name.endswith("writelog")):
            pass

    def test_chunk_goes_before_what_came_while_it_waited_for_an_append(self) -> None:
        self.patch(refresh_module, "ZERO_ENTRY_BYTES_MAX", 256 * KIB)
        world = RefreshWorld(self, stepped=True, log=MIB)
        unit = world.begin_work()
        world.settle()
        world.refresh()
        self.settled(world)
        world.step("qds0 writelog")
        # The begin mark is appended.  From here on the log is never without an append.
        for number in range(8):
            world.client.write(unit, 512 * KIB + number * BLOCK, unique(number))
            self.settled(world)
            world.reactor.advance(0.001)
            self.settled(world)
            world.client.write(unit, 768 * KIB + number * BLOCK, unique(100 + number))
            world.step("qds0 writelog")
        self.assertGreaterEqual(sum(map(is_chunk, world.frames)), 2)

    def test_writes_beside_the_chunk_are_not_held_back_while_it_is_read(self) -> None:
        world = RefreshWorld(self, stepped=True, log=4 * MIB)
        unit = world.begin_work()
        world.settle()
        world.refresh()
        for name in ("qds0 commit", "qds0 writelog", "qds0 commit"):
            world.step(name)
        # A hole was looked for, the chunk (a 16th of the log) is still to be read.
        world.step("qds0 read")
        within = world.client.write(unit, 128 * KIB, unique(1))
        beside = world.client.write(unit, 512 * KIB, unique(2))
        world.step("qds0 writelog")
        self.assertEqual(world.client.done, [beside])
        world.settle()
        self.assertIn(within, world.client.done)

    def test_nothing_is_polled_while_a_refresh_waits(self) -> None:
        world = RefreshWorld(self, log=MIB)
        world.begin_work()
        job = world.refresh()
        world.settle(1)
        done = job.status()["done_bytes"]
        calls = [call for call in world.reactor.getDelayedCalls() if call.getTime() < 1.5]
        self.assertEqual(calls, [])
        # Space that is made is space that it hears of.
        for _ in range(200):
            world.commit()
            world.settle(0.01)
        self.assertGreater(job.status()["done_bytes"], done)
        self.assertIsNone(world.group.refresh_job)

    def test_frames_that_are_applied_wake_it(self) -> None:
        world = RefreshWorld(self, stepped=True, log=4 * MIB)
        unit = world.begin_work()
        world.settle()
        world.group.runtime.unapplied = Unapplied(64 * KIB, 0)
        for number in range(40):
            world.client.write(unit, 512 * KIB + number * BLOCK, unique(number))
        world.step("qds0 writelog", 2)
        self.assertFalse(world.group.may_frame)
        world.refresh()
        world.settle(0)
        self.assertTrue(any(map(is_chunk, world.frames[2:])))

    def test_failed_reads_are_tried_again_ever_more_rarely(self) -> None:
        world = RefreshWorld(self, log=MIB)
        unit = world.begin_work()
        for _ in range(1000):
            world.data().fail("pread")
        job = world.refresh()
        for number in range(40):
            # Neither an append nor a commit is a reason to try again.
            world.client.write(unit, 512 * KIB + number * BLOCK, unique(number))
            world.settle(1)
            world.commit()
        tried = 1000 - len(world.data().faults["pread"])
        self.assertLessEqual(tried, 7)
        self.assertGreaterEqual(tried, 5)
        world.data().faults.clear()
        for _ in range(400):
            world.commit()
            world.settle(1)
        self.assertIsNone(world.group.refresh_job)
        self.assertEqual(job.status()["remaining_bytes"], 0)


class BeginTests(SynchronousTestCase):
    def test_nothing_is_framed_before_the_mirror_is_durably_incoherent(self) -> None:
        world = RefreshWorld(self, stepped=True, log=4 * MIB)
        unit = world.begin_work()
        world.settle()
        world.refresh()
        # The marks wait to be written; an append that ends must not set the refresh off.
        world.client.write(unit, 0, unique(1))
        world.step("qds0 writelog")
        self.assertEqual(len(world.frames), 1)
        self.assertFalse(world.steps["qds0 writelog"].waiting)
        world.settle()
        self.assertGreater(len(world.frames), 2)

    def test_no_chunk_before_the_begin_mark_is_durable(self) -> None:
        # It could be lost in its log, and the chunk stay in another one.
        world = RefreshWorld(self, stepped=True, ldsus=2, size=512 * KIB, log=4 * MIB)
        world.begin_work()
        world.settle()
        world.refresh()
        for name in ("qds0 commit", "qds1 commit", "qds0 writelog"):
            world.step(name)
        self.assertEqual(kinds(world), [REFRESH_BEGIN])
        self.assertFalse(world.steps["qds0 read"].waiting)
        world.step("qds0 commit")
        self.assertTrue(world.steps["qds0 read"].waiting)

    def test_no_end_mark_before_every_chunk_is_durable(self) -> None:
        world = RefreshWorld(self, stepped=True, ldsus=2, size=512 * KIB, log=4 * MIB)
        world.begin_work()
        world.settle()
        job = world.refresh()
        world.steps["qds1 commit"].step_all()
        for _ in range(200):
            for name, worker in world.steps.items():
                if name != "qds1 commit":
                    worker.step_all()
            world.reactor.advance(0.01)
        self.assertTrue(world.steps["qds1 commit"].waiting)
        self.assertNotIn(REFRESH_END, kinds(world))
        for _ in range(50):
            world.settle(0.1)
            world.commit()
        self.assertIsNone(world.group.refresh_job)
        self.assertEqual(job.status()["remaining_bytes"], 0)

    def test_refresh_that_follows_an_ended_one_waits_for_its_read(self) -> None:
        world = RefreshWorld(self, stepped=True, log=4 * MIB)
        unit = world.begin_work()
        world.settle()
        world.refresh()
        while not world.steps["qds0 read"].waiting:
            for name, worker in world.steps.items():
                if not name.endswith("read"):
                    worker.step()
        killed = world.group.kill_refresh()
        world.steps["qds0 commit"].step_all()
        self.successResultOf(killed)
        job = world.refresh()
        world.steps["qds0 commit"].step_all()
        world.steps["qds0 writelog"].step_all()
        self.assertTrue(unit.waiting.is_locked)
        world.steps["qds0 read"].step_all()
        for _ in range(100):
            world.settle(0.01)
            world.commit()
        self.assertIsNone(world.group.refresh_job)
        self.assertEqual(job.status()["remaining_bytes"], 0)


class StopTests(SynchronousTestCase):
    def test_the_driver_stops_while_a_refresh_looks_for_a_hole(self) -> None:
        world = RefreshWorld(self, size=512 * KIB, log=MIB, stepped=True)
        world.begin_work()
        world.refresh()
        reads = world.steps["qds0 read"]
        while not reads.waiting:
            self.assertTrue(any(worker.step() for worker in world.steps.values()))
        stopped = world.group.stop()
        while any(worker.step() for name, worker in world.steps.items() if name != "qds0 read"):
            pass
        # Its worker takes no jobs any more.
        world.settle()
        self.successResultOf(stopped)
