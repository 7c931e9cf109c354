"""COHERENT at the primary: what is durably known of the mirror when the power is cut."""

from __future__ import annotations

import gc
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import watermark
from qdsmirror.core.frames import BREAK, ENTRIES, entries
from qdsmirror.core.records import Cursor
from qdsmirror.core.states import Mode
from qdsmirror.core.superblock import Superblock
from qdsmirror.errors import DegradedError, QdsError
from qdsmirror.groups.refresh import Refresh
from qdsmirror.storage.superblock import read_superblock
from tests.fakes import MemoryDevice, nothing
from tests.groups.world import BLOCK, KIB, MIB, DriverWorld, durable_superblock, unique

ENDED = "the last refresh was ended before it was complete"


class CoherenceWorld(DriverWorld):
    """A driver of two LDSUs with a pmd; its data devices hold what no log knows."""

    def begin_work(self) -> None:
        for index in range(2):
            self.data(index).corrupt(0, b"".join(unique(10**6 + n) for n in range(64)))
        self.start()
        self.attach()

    def refresh(self) -> Refresh:
        self.asked: Deferred[Any] = self.group.refresh("full")
        self.asked.addErrback(lambda _: None)
        job = self.group.refresh_job
        assert job is not None
        return job

    def make_coherent(self) -> None:
        self.refresh()
        for _ in range(100):
            self.settle(0.01)
            self.commit()
        self.settle()
        self.test.assertTrue(self.group.coherent)

    def say(self, state: str = "refused", **more: Any) -> None:
        """Say, as the pmd, how its link is."""
        link = {"state": state, "code": 4, "reason": "another mirror", "pid": 7, **more}
        self.pmd.dataReceived(watermark.pack_json(watermark.LINK, link))

    def durable(self) -> list[Superblock]:
        return [durable_superblock(self.log(index).durable()) for index in range(2)]

    def each_slot(self) -> list[Superblock]:
        """Give what is found of each log when either of its slots is lost."""
        found = []
        for index in range(2):
            size = read_superblock(self.log(index)).slot_bytes
            for slot in range(2):
                copy = MemoryDevice(self.log(index).size, content=self.log(index).durable())
                copy.corrupt(slot * size, bytes(size))
                found.append(read_superblock(copy))
        return found

    def after_a_power_cut(self) -> None:
        """Cut the power, which loses what is not synced, and start another driver."""
        self.crash(nothing)
        self.start()
        self.attach()


class CoherenceTestCase(SynchronousTestCase):
    stepped = False

    def setUp(self) -> None:
        self.world = CoherenceWorld(self, ldsus=2, size=512 * KIB, log=MIB, stepped=self.stepped)
        self.world.begin_work()
        self.world.settle()


class BeginTests(CoherenceTestCase):
    stepped = True

    def until_framed(self) -> Refresh:
        """Begin a refresh whose begin mark is framed and not yet durable."""
        job = self.world.refresh()
        for index in range(2):
            self.world.steps[f"qds{index} commit"].step_all()
        self.world.step("qds0 writelog")
        self.assertEqual(len(self.world.frames), 1)
        self.assertFalse(self.world.frames[0].durable)
        return job

    def test_a_begin_that_cannot_be_recorded_is_told(self) -> None:
        world = self.world
        asked = world.group.refresh("full")
        world.log(1).fail("pwritev")
        for index in range(2):
            world.steps[f"qds{index} commit"].step_all()
        self.assertIn("cannot be recorded", str(self.failureResultOf(asked, QdsError).value))
        self.assertIsNone(world.group.refresh_job)
        self.assertNotIn(Mode.REFRESH, world.group.modes.modes)
        self.assertIn("could not begin", world.group.coherence.reason)
        world.settle()
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_the_cut_is_announced_once_the_begin_mark_is_durable(self) -> None:
        world = self.world
        job = world.refresh()
        self.assertIsNone(job.announcement())
        world.kill()
        world.start()
        world.attach()
        world.settle()
        job = self.until_framed()
        self.assertIsNone(job.announcement())
        self.assertIsNone(world.attach()["refresh"])
        for unit in world.group.units:
            self.assertIsNone(job.state(unit)["cut"])
        self.assertFalse(self.world.asked.called)
        world.step("qds0 commit")
        told = job.announcement()
        assert told is not None and told["cut"] is not None
        self.assertEqual((told["id"], told["cut"]["gsn"]), (job.id.hex(), 1))
        self.assertTrue(self.world.asked.called)
        self.assertEqual(world.attach()["refresh"], told)
        self.assertEqual(job.state(world.group.units[1])["cut"], told["cut"])

    def test_a_pmd_that_attached_before_the_cut_hears_of_it_after_a_restart(self) -> None:
        world = self.world
        self.until_framed()
        world.kill()
        world.start()
        self.assertIsNone(world.attach()["refresh"])
        world.settle()
        job = world.group.refresh_job
        assert job is not None and job.announcement() is not None
        told = watermark.pack_json(watermark.REFRESH, job.announcement() or {})
        self.assertIn(told, world.pmd.transport.value())

    def test_a_begin_mark_that_is_lost_leaves_no_cut_behind(self) -> None:
        world = self.world
        world.refresh()
        first, second = world.group.units
        # Framed before the begin mark and lost with it; the other log's frame stays.
        world.client.write(first, 0, unique(1))
        for index in range(2):
            world.steps[f"qds{index} commit"].step_all()
        world.step("qds0 writelog", 2)
        world.client.write(second, 0, unique(3), fua=True)
        world.step("qds1 writelog")
        world.step("qds1 commit")
        self.assertEqual([f.durable for f in world.frames], [False, False, True])
        world.group.checkpoints.take()
        world.steps["qds1 commit"].step_all()
        self.assertEqual(world.durable()[1].head.gsn, 1)
        self.assertGreater(world.durable()[1].head.position, 0)
        world.crash(nothing)
        world.start()
        world.attach()
        world.settle()
        job = world.group.refresh_job
        assert job is not None
        told = job.announcement()
        assert told is not None
        # GSN 1 and 2 are void now: the history that holds them must not begin between them.
        self.assertEqual(told["cut"]["gsn"], 4)

    def test_all_is_durably_incoherent_before_a_frame_says_so(self) -> None:
        world = self.world
        world.make_coherent()
        self.assertTrue(all(found.coherent for found in world.durable()))
        world.frames.clear()
        world.refresh()
        world.steps["qds0 commit"].step_all()
        world.steps["qds0 writelog"].step_all()
        self.assertEqual(world.frames, [], "the other LDSU's superblock is not written")
        while not world.frames:
            self.assertTrue(world.steps["qds1 commit"].step())
        for found in world.each_slot():
            self.assertFalse(found.coherent)
            self.assertIsNotNone(found.refresh)


class EndTests(CoherenceTestCase):
    def test_the_end_is_in_both_slots_of_every_log(self) -> None:
        self.world.make_coherent()
        for found in self.world.each_slot():
            self.assertTrue(found.coherent)
            self.assertEqual((found.refresh, found.reason), (None, ""))
        self.world.after_a_power_cut()
        self.assertTrue(self.world.group.coherent)
        self.assertIsNone(self.world.group.refresh_job)

    def test_not_before_the_secondary_has_committed_the_end_mark(self) -> None:
        world = self.world
        job = world.refresh()
        before = 0
        for _ in range(300):
            world.settle(0.01)
            if world.group.durable_gsn == before:
                break
            before = world.group.durable_gsn
            world.commit(before - 1)
            self.assertFalse(world.group.coherent)
        self.assertIs(world.group.refresh_job, job)
        self.assertFalse(any(found.coherent for found in world.durable()))
        world.commit()
        self.assertTrue(world.group.coherent)

    def test_one_log_that_does_not_know_the_end_makes_the_group_incoherent(self) -> None:
        world = self.world
        world.make_coherent()
        for index in range(2):
            for changes in (
                {"coherent": False, "reason": "not this one"},
                {
                    "refresh": {
                        "id": "00" * 16,
                        "kind": "full",
                        "cut": None,
                        "started": 1.0,
                        "done": 0,
                    }
                },
            ):
                world.settle()
                world.kill()
                world.start()
                world.group.units[index].writelog.update(both=True, **changes)
                world.after_a_power_cut()
                self.assertFalse(world.group.coherent, (index, changes))
                if world.group.refresh_job is not None:
                    self.successResultOf(world.group.kill_refresh())
                world.make_coherent()

    def test_a_killed_refresh_is_no_coherent_mirror(self) -> None:
        world = self.world
        world.make_coherent()
        world.refresh()
        world.settle(0.01)
        self.successResultOf(world.group.kill_refresh())
        self.assertFalse(world.group.coherent)
        for found in world.each_slot():
            self.assertFalse(found.coherent)
            self.assertEqual((found.refresh, found.reason), (None, ENDED))
        self.failureResultOf(world.group.kill_refresh(), DegradedError)
        world.commit()
        world.settle()
        self.assertFalse(world.group.coherent)
        world.after_a_power_cut()
        self.assertFalse(world.group.coherent)
        self.assertIsNone(world.group.refresh_job)
        self.assertEqual(world.group.coherence.reason, ENDED)


class SteppedEndTests(CoherenceTestCase):
    stepped = True

    def until_its_end_is_committed(self) -> None:
        world = self.world
        world.refresh()
        for _ in range(300):
            world.settle(0.01)
            upto = world.group.durable_gsn
            if world.frames[-1].gsn_last == upto and not world.frames[-1].weight > BLOCK:
                break
            world.commit()
        world.settle(2)
        world.commit()
        self.assertIsNone(world.group.refresh_job)
        self.assertFalse(world.group.coherent)

    def test_coherent_once_every_log_says_so(self) -> None:
        world = self.world
        self.until_its_end_is_committed()
        world.steps["qds0 commit"].step_all()
        self.assertFalse(world.group.coherent, "the other LDSU's superblock is not written")
        world.steps["qds1 commit"].step_all()
        self.assertTrue(world.group.coherent)

    def test_an_end_that_cannot_be_recorded_is_told(self) -> None:
        """LOUD: no refresh is running any more, and what is missing has a name."""
        world = self.world
        self.until_its_end_is_committed()
        self.assertIn(Mode.REFRESH, world.group.modes.modes)
        world.log(1).fail("pwritev")
        for index in range(2):
            world.steps[f"qds{index} commit"].step_all()
        self.assertNotIn(Mode.REFRESH, world.group.modes.modes)
        self.assertFalse(world.group.coherent)
        self.assertIn("complete, but that", world.group.coherence.reason)


class LossTests(CoherenceTestCase):
    def test_a_lost_mirror_is_remembered(self) -> None:
        world = self.world
        world.make_coherent()
        world.say()
        self.assertTrue(world.group.coherent, "a refusal alone says nothing of the mirror")
        world.say(diverged=True)
        self.assertFalse(world.group.coherent)
        for found in world.each_slot():
            self.assertEqual((found.coherent, found.reason), (False, "another mirror"))
        world.after_a_power_cut()
        self.assertFalse(world.group.coherent)
        self.assertEqual(world.group.coherence.reason, "another mirror")

    def test_a_loss_is_written_once(self) -> None:
        world = self.world
        world.make_coherent()
        world.say(diverged=True)
        before = [found.counter for found in world.durable()]
        world.say(diverged=True, reason="yet another")
        self.assertEqual([found.counter for found in world.durable()], before)

    def fill(self) -> None:
        """Fill the first writelog, its reserve too, with what a secondary is to take."""
        world = self.world
        first = world.group.units[0]
        offset = 0
        while first.writelog.free_bytes > 64 * KIB:
            world.client.write(first, offset, unique(offset, 32 * KIB))
            offset = (offset + 32 * KIB) % (512 * KIB)
            world.settle()
        while first.own_frames.control(BREAK, b"b" * 16) is not None:
            world.settle()

    def test_a_refresh_without_room_is_refused(self) -> None:
        """LOUD: nothing makes room in what a secondary of another history can never take."""
        world = self.world
        world.make_coherent()
        self.fill()
        world.say(diverged=True)
        refused = self.failureResultOf(world.group.refresh("auto"), DegradedError).value
        self.assertIn("never take", str(refused))
        self.assertIn("qdsbypass on", refused.hint)
        self.assertIsNone(world.group.refresh_job)
        self.assertIn("could not begin", world.group.coherence.reason)
        world.settle()
        for to in ("on", "off"):
            asked = world.group.switch_bypass(to)
            world.settle()
            self.successResultOf(asked)
        world.attach()
        world.say("connected")
        self.assertIsNotNone(world.group.refresh_job)


class RestartTests(CoherenceTestCase):
    def some_progress(self) -> Refresh:
        world = self.world
        job = world.refresh()
        world.settle()
        # The begin mark and a chunk.
        world.commit(world.frames[1].gsn_last)
        self.assertGreater(job.status()["done_bytes"], 0)
        self.assertIs(world.group.refresh_job, job)
        return job

    def test_only_the_refresh_that_was_lost_begins_anew(self) -> None:
        job = self.some_progress()
        self.world.say(refresh_lost="ff" * 16)
        self.assertIs(self.world.group.refresh_job, job)

    def test_a_refresh_that_begins_anew_is_another_one(self) -> None:
        world = self.world
        job = self.some_progress()
        cut = (job.announcement() or {})["cut"]
        world.say(refresh_lost=job.id.hex())
        again = world.group.refresh_job
        assert again is not None and again is not job
        # What the secondary still gets of the old one, its end too, proves nothing for this one.
        self.assertNotEqual(again.id, job.id)
        self.assertEqual(again.status()["done_bytes"], 0)
        world.settle(0.01)
        told = again.announcement()
        assert told is not None
        self.assertGreater(told["cut"]["gsn"], cut["gsn"])
        for found in world.each_slot():
            self.assertFalse(found.coherent)
            self.assertEqual((found.refresh or {})["id"], again.id.hex())
        for _ in range(100):
            world.settle(0.01)
            world.commit()
        self.assertTrue(world.group.coherent)
        self.assertEqual(again.status()["remaining_bytes"], 0)

    def test_the_old_one_sends_nothing_beside_the_new_one(self) -> None:
        world = self.world
        job = world.refresh()
        framed = len(world.frames)
        self.assertGreater(framed, 1, "it is between two chunks")
        world.say(refresh_lost=job.id.hex())
        for _ in range(100):
            world.settle(0.01)
            world.commit()
        self.assertTrue(world.group.coherent)
        sent = [0, 0]
        for index, unit in enumerate(world.group.units):
            for found in unit.writelog.reader(Cursor()):
                if found.header.kind == ENTRIES and found.header.gsn_first > framed:
                    sent[index] += sum(e.length for e in entries(found.header, found.frame))
        self.assertEqual(sent, [unit.size for unit in world.group.units])

    def test_goes_on_after_a_power_cut_with_the_same_id(self) -> None:
        world = self.world
        job = self.some_progress()
        world.group.checkpoints.take()
        done = [(found.refresh or {})["done"] for found in world.durable()]
        self.assertGreater(sum(done), 0)
        world.after_a_power_cut()
        again = world.group.refresh_job
        assert again is not None
        self.assertEqual((again.id, again.started), (job.id, job.started))
        self.assertEqual(again.status()["done_bytes"], sum(done))
        self.assertEqual((again.announcement() or {})["id"], job.id.hex())
        self.assertFalse(world.group.coherent)

    def test_progress_of_an_earlier_refresh_does_not_count(self) -> None:
        """A crash may come while the marks of a refresh are written over the last one's."""
        world = self.world
        self.some_progress()
        world.group.checkpoints.take()
        old = world.durable()[0].refresh
        assert old is not None and old["done"]
        newer = {**old, "id": "77" * 16, "started": old["started"] + 1, "cut": None, "done": 0}
        world.group.units[1].writelog.update(both=True, refresh=newer)
        world.after_a_power_cut()
        job = world.group.refresh_job
        assert job is not None
        self.assertEqual(job.id.hex(), "77" * 16)
        self.assertEqual(job._done[0], 0)
