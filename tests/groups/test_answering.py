"""When a write is answered with regard to the secondary (SYNC, rules.md 21)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import watermark
from qdsmirror.core.nbd import Request
from qdsmirror.errors import UsageError
from qdsmirror.groups import answering as module
from qdsmirror.limits import STOP_ANSWER_SECONDS
from tests.fakes import nothing
from tests.groups.test_failures import FailureWorld
from tests.groups.world import BLOCK, DriverWorld, FakeConnection, durable_superblock, unique


class AnsweringTestCase(SynchronousTestCase):
    def world(
        self, operation: str = "sync", on_disconnect: str = "block", near: int = 2, **more: Any
    ) -> DriverWorld:
        world = DriverWorld(self, **more)
        world.config = replace(
            world.config,
            operation=operation,
            on_disconnect=on_disconnect,
            near_sync_entries=near,
        )
        world.start()
        # What no test is about: the mirror exists.
        world.group.coherence.coherent = True
        world.group.answering.mirror_is_whole()
        return world

    def connect(self, world: DriverWorld, **said: Any) -> None:
        world.attach()
        self.link(world, "connected", **said)

    def link(self, world: DriverWorld, state: str, **said: Any) -> None:
        told = {"state": state, "code": 0, "reason": "", "pid": 1, **said}
        world.pmd.dataReceived(watermark.pack_json(watermark.LINK, told))

    def write(self, world: DriverWorld, *numbers: int, fua: bool = False) -> list[Request]:
        unit = world.group.units[0]
        return [world.client.write(unit, n * BLOCK, unique(n), fua) for n in numbers]

    def answered(self, world: DriverWorld, requests: list[Request]) -> list[bool]:
        return [world.client.answered(one) for one in requests]

    def set(self, world: DriverWorld, **settings: str) -> None:
        self.successResultOf(world.group.set_live(json.dumps(settings)))

    def superblocks(self, world: DriverWorld) -> list[Any]:
        """What the platters of the writelogs say of being degraded."""
        return [
            durable_superblock(world.log(one.index).durable()).degraded
            for one in world.config.ldsus
        ]


class SynchronousTests(AnsweringTestCase):
    def test_an_answer_waits_for_the_commit(self) -> None:
        world = self.world()
        self.connect(world)
        asked = self.write(world, 1, 2, 3)
        self.assertEqual(self.answered(world, asked), [False] * 3)
        self.assertEqual(world.group.answering.status()["synchronous"]["waiting"], 3)
        world.commit(world.frames[1].gsn_last)
        self.assertEqual(self.answered(world, asked), [True, True, False])
        world.commit()
        self.assertEqual(self.answered(world, asked), [True] * 3)

    def test_frames_become_durable_at_once(self) -> None:
        """Only what is durable is sent: nobody waits for company."""
        world = self.world()
        self.connect(world)
        self.write(world, 1)
        self.assertEqual(world.group.durable_gsn, 1)

    def test_reads_do_not_wait(self) -> None:
        world = self.world()
        self.write(world, 1)
        self.assertEqual(world.client.read(world.group.units[0], BLOCK, BLOCK), unique(1))

    def test_a_flush_waits_for_what_came_before(self) -> None:
        world = self.world()
        self.connect(world)
        asked = self.write(world, 1)
        flush = world.client.flush(world.group.units[0])
        self.assertFalse(world.client.answered(flush))
        later = self.write(world, 2)
        world.commit(world.frames[0].gsn_last)
        self.assertEqual(self.answered(world, [*asked, flush, *later]), [True, True, False])

    def test_a_flush_after_commits_is_answered_at_once(self) -> None:
        world = self.world()
        self.connect(world)
        self.write(world, 1)
        world.commit()
        self.assertTrue(world.client.answered(world.client.flush(world.group.units[0])))

    def test_fua_trim_and_zeroes_wait(self) -> None:
        world = self.world()
        self.connect(world)
        unit = world.group.units[0]
        asked = self.write(world, 1, fua=True)
        asked += [world.client.ask(unit, command, 0, BLOCK) for command in (4, 6)]
        self.assertEqual(self.answered(world, asked), [False] * 3)
        world.commit()
        self.assertEqual(self.answered(world, asked), [True] * 3)

    def test_a_payload_is_not_kept_while_its_answer_waits(self) -> None:
        """BOUND: the budget of requests is for others, though the secondary is away for long."""
        world = self.world()
        asked = self.write(world, 1, 2)
        self.assertEqual(world.client.released, asked)

    def test_a_client_that_is_gone_is_forgotten(self) -> None:
        """BOUND: it asks again, and again, while the secondary is away."""
        world = self.world()
        unit = world.group.units[0]
        for _ in range(5):
            client = FakeConnection()
            unit.attach(client)
            client.write(unit, 0, unique(1))
            unit.detach(client)
        self.assertEqual(world.group.answering.status()["synchronous"]["waiting"], 0)

    def test_a_client_that_is_gone_before_its_write_is_durable(self) -> None:
        world = self.world(stepped=True)
        unit = world.group.units[0]
        unit.attach(world.client)
        self.write(world, 1, fua=True)
        world.step("qds0 writelog")
        unit.detach(world.client)
        world.settle()
        self.assertEqual(world.group.answering.status()["synchronous"]["waiting"], 0)

    def test_writes_wait_while_disconnected(self) -> None:
        world = self.world()
        asked = self.write(world, 1)
        world.settle(5.0)
        self.assertEqual(self.answered(world, asked), [False])
        self.assertEqual(self.superblocks(world), [None])
        self.connect(world)
        world.commit()
        self.assertEqual(self.answered(world, asked), [True])

    def test_a_full_log_waits_whatever_on_overflow_says(self) -> None:
        world = self.world(log=512 * 1024, size=512 * 1024)
        world.group.config = replace(world.group.config, on_overflow="bypass")
        for number in range(100):
            self.write(world, number)
        world.settle(30.0)
        self.assertEqual(world.group.bypass.phase, "off")
        self.set(world, on_disconnect="async")
        world.settle(30.0)
        self.assertEqual(world.group.bypass.phase, "on")
        self.assertEqual(len(world.client.done), 100)

    def test_a_dead_data_device_answers_errors(self) -> None:
        world = self.world()
        asked = self.write(world, 1)
        world.group.units[0].refuse("data device failed")
        self.assertEqual(list(world.client.errors), asked)
        self.connect(world)
        world.commit()

    def test_a_flush_after_a_restart_waits_for_what_was_before(self) -> None:
        world = self.world("async")
        self.write(world, 1)
        world.config = replace(world.config, operation="sync")
        world.kill()
        world.start()
        self.connect(world)
        flush = world.client.flush(world.group.units[0])
        self.assertFalse(world.client.answered(flush))
        world.commit()
        self.assertTrue(world.client.answered(flush))

    def test_after_a_restart_nothing_is_known_to_be_committed(self) -> None:
        world = self.world()
        self.connect(world)
        self.write(world, 1)
        world.commit()
        self.assertIsNotNone(world.group.answering.kept_since)
        self.write(world, 2)
        world.kill()
        world.start()
        self.assertIsNone(world.group.answering.kept_since)
        self.connect(world)
        asked = self.write(world, 3)
        world.commit(world.frames[-1].gsn_last - 1)
        self.assertEqual(self.answered(world, asked), [False])
        world.commit()
        self.assertEqual(self.answered(world, asked), [True])


class NearSynchronousTests(AnsweringTestCase):
    def test_n_entries_may_be_uncommitted(self) -> None:
        world = self.world("near-sync", near=2)
        self.connect(world)
        asked = self.write(world, 1, 2, 3, 4)
        self.assertEqual(self.answered(world, asked), [True, True, False, False])
        world.commit(world.frames[0].gsn_last)
        self.assertEqual(self.answered(world, asked), [True, True, True, False])

    def test_a_batch_is_answered_in_part(self) -> None:
        world = self.world("near-sync", near=2)
        self.connect(world)
        unit = world.group.units[0]
        asked = [world.client.request(1, n * BLOCK, BLOCK, unique(n)) for n in range(5)]
        unit.submit(asked)
        self.assertEqual(len(world.frames), 1)
        self.assertEqual(self.answered(world, asked), [True, True, False, False, False])
        world.commit()
        self.assertEqual(self.answered(world, asked), [True] * 5)

    def test_only_the_applications_entries_count(self) -> None:
        world = self.world("near-sync", near=2)
        self.connect(world)
        unit = world.group.units[0]
        for at in range(5):
            unit.own_frames.chunk(at * BLOCK, None, BLOCK)
        unit.own_frames.control(2)
        asked = self.write(world, 1, 2, 3)
        self.assertEqual(self.answered(world, asked), [True, True, False])

    def test_n_is_changed_while_it_runs(self) -> None:
        world = self.world("near-sync", near=1)
        self.connect(world)
        asked = self.write(world, 1, 2, 3, 4)
        self.assertEqual(self.answered(world, asked), [True, False, False, False])
        self.set(world, near_sync_entries="3")
        self.assertEqual(self.answered(world, asked), [True, True, True, False])
        self.set(world, near_sync_entries="1")
        self.assertIsNone(world.group.answering.kept_since)
        world.commit(world.frames[1].gsn_last)
        self.assertEqual(self.answered(world, asked), [True, True, True, False])
        self.assertIsNotNone(world.group.answering.kept_since)

    def test_those_of_before_a_crash_count(self) -> None:
        world = self.world("near-sync", near=2)
        asked = self.write(world, 1, 2, 3)
        self.assertEqual(self.answered(world, asked), [True, True, False])
        world.kill()
        world.start()
        world.group.coherence.coherent = True
        world.group.answering.mirror_is_whole()
        again = self.write(world, 3)
        self.assertEqual(self.answered(world, again), [False])


class DegradedTests(AnsweringTestCase):
    def test_durable_before_the_first_answer(self) -> None:
        world = self.world(on_disconnect="async", stepped=False, ldsus=2)
        seen: list[Any] = []
        answer = world.client.answer

        def look(requests: Any) -> None:
            seen.append(self.superblocks(world))
            answer(requests)

        world.client.answer = look  # type: ignore[method-assign]
        asked = self.write(world, 1)
        self.assertEqual(self.answered(world, asked), [True])
        for told in seen[0]:
            self.assertIn("not connected", told["reason"])
        self.assertIn("not connected", world.group.answering.status()["degraded"]["reason"])

    def test_not_before_somebody_has_to_wait(self) -> None:
        world = self.world("near-sync", "async", near=2)
        self.write(world, 1, 2)
        self.assertEqual(self.superblocks(world), [None])
        self.write(world, 3)
        self.assertNotEqual(self.superblocks(world), [None])

    def test_ends_when_all_is_committed(self) -> None:
        world = self.world(on_disconnect="async")
        self.write(world, 1, 2, 3, 4)
        world.settle()
        self.connect(world)
        self.assertNotEqual(self.superblocks(world), [None])
        world.commit(world.frames[2].gsn_last)
        self.assertNotEqual(self.superblocks(world), [None])
        self.assertIsNone(world.group.answering.kept_since)
        world.commit()
        self.assertEqual(self.superblocks(world), [None])
        self.assertIsNotNone(world.group.answering.kept_since)
        asked = self.write(world, 5)
        self.assertEqual(self.answered(world, asked), [False])

    def test_a_busy_application_is_slowed_down_not_stopped(self) -> None:
        """For two entries committed one more is answered, so that it ends."""
        world = self.world(on_disconnect="async")
        self.write(world, *range(10))
        self.connect(world)
        answered = 0
        for number in range(10, 40):
            self.write(world, number)
            world.commit(world.frames[number - 10].gsn_last)
            answered = sum(self.answered(world, list(world.client.done)))
        self.assertEqual(world.group.answering.degraded, None)
        self.assertGreater(answered, 15)
        self.assertLess(answered, 40)

    def test_the_link_goes_again_meanwhile(self) -> None:
        world = self.world(on_disconnect="async")
        self.write(world, 1, 2, 3, 4)
        self.connect(world)
        asked = self.write(world, 5)
        self.assertEqual(self.answered(world, asked), [False])
        self.link(world, "connecting")
        self.assertEqual(self.answered(world, asked), [True])

    def test_a_long_reason_fits_the_superblocks(self) -> None:
        world = self.world(on_disconnect="async")
        world.attach()
        self.link(world, "refused", reason="so " * 10_000)
        asked = self.write(world, 1)
        self.assertEqual(self.answered(world, asked), [True])
        self.assertLess(len(self.superblocks(world)[0]["reason"]), 300)

    def test_survives_a_crash(self) -> None:
        world = self.world(on_disconnect="async", ldsus=2)
        self.write(world, 1)
        world.crash(nothing)
        world.start()
        self.assertIsNotNone(world.group.answering.degraded)
        self.assertNotIn(None, self.superblocks(world))
        asked = self.write(world, 2)
        self.assertEqual(self.answered(world, asked), [True])

    def test_one_superblock_is_enough_at_a_start(self) -> None:
        """A crash came while it was being recorded, or the end of it."""
        world = self.world(on_disconnect="async", ldsus=2)
        writelog = world.group.units[1].writelog
        writelog.update(both=True, degraded={"since": 1.0, "reason": "so"})
        world.crash(nothing)
        world.start()
        self.assertEqual([one["reason"] for one in self.superblocks(world)], ["so", "so"])

    def test_an_incoherent_mirror_keeps_it(self) -> None:
        world = self.world(on_disconnect="async")
        self.write(world, 1)
        self.connect(world)
        world.group.coherence.coherent = False
        world.commit()
        self.assertNotEqual(self.superblocks(world), [None])
        world.group.coherence.coherent = True
        world.group.answering.mirror_is_whole()
        self.assertEqual(self.superblocks(world), [None])

    def test_bypass_by_the_operator(self) -> None:
        """He consents, whatever on_disconnect says."""
        world = self.world()
        waiting = self.write(world, 1)
        self.successResultOf(world.group.switch_bypass("on"))
        self.assertEqual(self.answered(world, waiting), [True])
        self.assertIn("in bypass", self.superblocks(world)[0]["reason"])
        asked = self.write(world, 2)
        self.assertEqual(self.answered(world, asked), [True])

    def test_a_failed_writelog(self) -> None:
        """With `block` its writes wait until an operator lets them go on; else they go on."""
        for on_disconnect, at_once in (("block", False), ("async", True)):
            world = FailureWorld(self)
            world.config = replace(world.config, operation="sync", on_disconnect=on_disconnect)
            world.start()
            world.log(1).fail("fdatasync")
            asked = [world.client.write(world.group.units[1], 0, unique(1))]
            asked += self.write(world, 2)
            world.settle()
            asked += self.write(world, 3)
            self.assertEqual(world.group.bypass.phase, "on")
            self.assertEqual(self.answered(world, asked), [at_once] * 3)
            if not at_once:
                self.assertEqual(world.group.status()["synchronous"]["waiting"], 3)
                self.set(world, on_disconnect="async")
                self.assertEqual(self.answered(world, asked), [True] * 3)
            self.assertIn("in bypass", self.superblocks(world)[0]["reason"])

    def test_a_failed_writelog_and_a_stop(self) -> None:
        """What may not go past it is left to the clients."""
        world = FailureWorld(self)
        world.config = replace(world.config, operation="sync")
        world.start()
        world.log(1).fail("fdatasync")
        asked = [world.client.write(world.group.units[1], 0, unique(1))]
        world.settle()
        asked += self.write(world, 3)
        self.successResultOf(world.group.stop())
        self.assertEqual(set(world.client.abandoned), set(asked))


class ChangeTests(AnsweringTestCase):
    def test_to_asynchronous_answers_what_waits(self) -> None:
        world = self.world()
        asked = self.write(world, 1, 2)
        self.set(world, operation="async")
        self.assertEqual(self.answered(world, asked), [True, True])
        self.assertEqual(world.group.status()["operation"], "async")
        self.assertEqual(world.group.status()["settings"], {"operation": "async"})

    def test_to_synchronous_acts_on_later_writes(self) -> None:
        world = self.world("async")
        self.connect(world)
        before = self.write(world, 1, 2)
        self.assertEqual(self.answered(world, before), [True, True])
        self.set(world, operation="sync")
        self.assertFalse(world.group.status()["synchronous"]["kept"])
        asked = self.write(world, 3)
        world.commit(world.frames[1].gsn_last)
        self.assertTrue(world.group.status()["synchronous"]["kept"])
        self.assertEqual(self.answered(world, asked), [False])
        world.commit()
        self.assertEqual(self.answered(world, asked), [True])

    def test_to_synchronous_with_much_to_be_committed(self) -> None:
        self.patch(module, "CATCH_UP_ENTRIES", 3)
        world = self.world("async", "async")
        self.connect(world)
        self.write(world, *range(8))
        self.set(world, operation="sync")
        self.assertIn("8 answered entries", self.superblocks(world)[0]["reason"])
        world.settle()
        world.commit()
        self.assertEqual(self.superblocks(world), [None])

    def test_to_asynchronous_ends_degraded(self) -> None:
        world = self.world(on_disconnect="async")
        self.write(world, 1)
        self.set(world, operation="async")
        self.assertEqual(self.superblocks(world), [None])

    def test_in_bypass(self) -> None:
        world = self.world("async")
        self.successResultOf(world.group.switch_bypass("on"))
        self.assertEqual(self.superblocks(world), [None])
        self.set(world, operation="sync")
        self.assertNotEqual(self.superblocks(world), [None])

    def test_while_bypass_is_left(self) -> None:
        """What was written past the writelogs is answered: who leaves waits for that."""
        world = self.world("async", stepped=True)
        entered = world.group.switch_bypass("on")
        world.settle()
        self.successResultOf(entered)
        asked = self.write(world, 1)
        asked += self.write(world, 2)
        left = world.group.switch_bypass("off")
        set_ = world.group.set_live(json.dumps({"operation": "sync"}))
        self.assertEqual(world.group.bypass.phase, "leaving")
        world.settle()
        self.successResultOf(set_)
        self.successResultOf(left)
        self.assertEqual(self.answered(world, asked), [True, True])

    def test_durability(self) -> None:
        world = self.world("async", stepped=True)
        self.set(world, durability="always")
        asked = self.write(world, 1)
        world.step("qds0 writelog")
        self.assertEqual(self.answered(world, asked), [False])
        world.settle()
        self.assertEqual(self.answered(world, asked), [True])

    def test_all_or_none(self) -> None:
        world = self.world("async")
        wrong = json.dumps({"operation": "sync", "near_sync_entries": "0"})
        self.failureResultOf(world.group.set_live(wrong), UsageError)
        self.assertEqual(world.group.config.operation, "async")


class StopTests(AnsweringTestCase):
    def test_without_the_secondary_clients_ask_again(self) -> None:
        world = self.world()
        asked = self.write(world, 1)
        self.successResultOf(world.group.stop())
        self.assertEqual(world.client.abandoned, asked)

    def test_with_it_answers_wait_a_moment(self) -> None:
        world = self.world()
        self.connect(world)
        asked = self.write(world, 1)
        world.group.answering.leave()
        world.commit()
        self.assertEqual(self.answered(world, asked), [True])
        self.assertEqual(world.client.abandoned, [])
        asked = self.write(world, 2)
        world.reactor.advance(STOP_ANSWER_SECONDS + 0.1)
        self.assertEqual(world.client.abandoned, asked)

    def test_the_link_goes_meanwhile(self) -> None:
        world = self.world()
        self.connect(world)
        asked = self.write(world, 1)
        world.group.answering.leave()
        self.link(world, "connecting")
        self.assertEqual(world.client.abandoned, asked)


class NewHistoryTests(AnsweringTestCase):
    """A refresh replaces the secondary's history: what came before its cut is not committed."""

    def rebase(self, world: DriverWorld) -> None:
        world.group.coherence.coherent = False
        self.connect(world, rebased=True)
        world.commit()

    def test_the_pmd_hears_that_it_is_known(self) -> None:
        """Before, it must not let it happen: what it says may be lost on the way."""
        world = self.world()
        world.attach()
        for said, known in ({}, 0), ({"rebased": False}, 0), ({"rebased": True}, 1):
            world.pmd.transport.clear()
            self.link(world, "connecting", **said)
            told = [
                kind for kind, _ in watermark.WatermarkParser().feed(world.pmd.transport.value())
            ]
            self.assertEqual(told, [watermark.REBASE_KNOWN] * known)

    def test_what_waits_is_answered_at_its_end(self) -> None:
        world = self.world()
        asked = self.write(world, 1, 2)
        self.rebase(world)
        self.assertEqual(self.answered(world, asked), [False, False])
        later = self.write(world, 3)
        world.commit()
        self.assertEqual(self.answered(world, later), [True])
        self.assertEqual(self.answered(world, asked), [False, False])
        world.group.coherence.coherent = True
        world.group.answering.mirror_is_whole()
        self.assertEqual(self.answered(world, asked), [True, True])

    def test_a_flush_does_not_wait_for_its_end(self) -> None:
        world = self.world()
        self.write(world, 1)
        flushes = [world.client.flush(world.group.units[0])]
        self.rebase(world)
        flushes.append(world.client.flush(world.group.units[0]))
        self.assertEqual(self.answered(world, flushes), [True, True])

    def test_numbers_are_given_anew(self) -> None:
        """A backfresh has given a history up: a flush does not wait for what was in it."""
        world = self.world()
        self.connect(world)
        self.write(world, 1, 2, 3)
        world.commit()
        world.group.next_gsn = 2
        world.group.durable_gsn = world.group.committed_gsn = 1
        world.group.answering.begin()
        world.group.answering.mirror_is_whole()
        self.assertTrue(world.client.answered(world.client.flush(world.group.units[0])))

    def test_near_synchronous_answers_no_more_meanwhile(self) -> None:
        world = self.world("near-sync", near=2)
        asked = self.write(world, 1, 2)
        self.assertEqual(self.answered(world, asked), [True, True])
        self.rebase(world)
        later = self.write(world, 3)
        self.assertEqual(self.answered(world, later), [False])
        world.commit()
        self.assertEqual(self.answered(world, later), [True])

    def test_degraded_until_its_end(self) -> None:
        world = self.world(on_disconnect="async")
        self.write(world, 1)
        self.rebase(world)
        self.assertNotEqual(self.superblocks(world), [None])
        world.group.coherence.coherent = True
        world.group.answering.mirror_is_whole()
        self.assertEqual(self.superblocks(world), [None])
