"""Bypass at the primary: the way in, what is written in it, the way out, and what is refused."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror import limits
from qdsmirror.core import nbd
from qdsmirror.core.frames import BREAK, ENTRIES, REFRESH_BEGIN, SWITCH
from qdsmirror.core.watermark import LINK, Committed, pack_json
from qdsmirror.errors import DegradedError, DeviceFailedError, UsageError
from qdsmirror.storage.writelog import Writelog
from tests.groups.world import (
    BLOCK,
    KIB,
    MIB,
    DriverWorld,
    FakeConnection,
    durable_superblock,
    unique,
)

CHUNK = 64 * KIB


def overflowing(test: SynchronousTestCase, **more: Any) -> DriverWorld:
    """Make a world whose group goes into bypass when its log is full."""
    world = DriverWorld(test, **{"log": 256 * KIB, **more})
    world.config = replace(world.config, on_overflow="bypass")
    return world


def make_coherent(world: DriverWorld) -> None:
    for ldsu in world.config.ldsus:
        Writelog.open(world.log(ldsu.index)).update(both=True, coherent=True, reason="")


def kinds(world: DriverWorld, index: int = 0) -> list[int]:
    """Read the kinds of the frames in a writelog, as the pmd would."""
    unit = world.group.units[index]
    return [found.header.kind for found in unit.writelog.reader(unit.writelog.superblock.tail)]


class Case(SynchronousTestCase):
    world: DriverWorld

    def switch(self, to: str) -> dict[str, Any]:
        asked = self.world.group.switch_bypass(to)
        self.world.settle()
        done: dict[str, Any] = self.successResultOf(asked)
        return done

    def leave_by_a_full_refresh(self) -> None:
        asked = self.world.group.refresh("full")
        self.world.settle()
        self.successResultOf(asked)

    def refuse(self, to: str, error: type[Exception], text: str) -> Any:
        asked = self.world.group.switch_bypass(to)
        failure = self.failureResultOf(asked, error)
        self.assertIn(text, failure.getErrorMessage())
        return failure.value

    def mirror_all(self) -> None:
        """Commit whatever comes until the mirror is coherent."""
        group = self.world.group
        for _ in range(50):
            self.world.settle()
            ends = [Committed(u.index, u.durable_end, *u.durable_point) for u in group.units]
            self.world.commit(ends=ends)
        self.world.settle()
        self.assertTrue(group.coherent)


class OverflowTests(Case):
    def fill(self, count: int = 100) -> list[Any]:
        unit = self.world.group.units[0]
        return [self.world.client.write(unit, n * BLOCK, unique(n)) for n in range(count)]

    def link(self, state: str) -> None:
        said = {"state": state, "code": 0, "reason": "", "pid": 1}
        self.world.pmd.dataReceived(pack_json(LINK, said))

    def test_full_log_leads_into_bypass_and_no_write_waits(self) -> None:
        world = self.world = overflowing(self)
        world.start()
        requests = self.fill()
        world.settle()
        self.assertEqual(world.client.done, requests)
        status = world.group.status()
        self.assertEqual((status["state"], status["modes"]), ("bypass", ["bypass", "accumulating"]))
        self.assertEqual(status["reason"], "the writelog of qds0 is full")
        told = {one["mode"]: one for one in status["mode_details"]}
        self.assertEqual(list(told), status["modes"])
        self.assertEqual(told["bypass"]["reason"], "the writelog of qds0 is full")
        self.assertEqual(told["bypass"]["since"], status["bypass"]["since"])
        self.assertEqual(told["accumulating"]["reason"], "no pmd is attached")
        self.assertEqual(kinds(world)[-1], BREAK)
        expected = b"".join(unique(n) for n in range(100))
        self.assertEqual(world.data().content()[: 100 * BLOCK], expected)
        dirty = status["ldsus"][0]["dirty_bytes"]
        self.assertEqual((dirty, status["bypass"]["dirty_bytes"]), (dirty, dirty))
        self.assertEqual(dirty % CHUNK, 0)
        self.assertLess(0, dirty)

    def test_not_where_writes_are_to_wait(self) -> None:
        self.world = DriverWorld(self, log=256 * KIB)
        self.world.start()
        self.fill()
        self.world.settle()
        self.assertLess(len(self.world.client.done), 100)
        self.assertEqual(self.world.group.state, "accumulating")

    def test_not_while_our_own_devices_hold_the_space(self) -> None:
        world = self.world = overflowing(self, stepped=True)
        world.start()
        self.fill()
        while world.steps["qds0 writelog"].step() or world.steps["qds0 commit"].step():
            pass
        self.assertLess(len(world.client.done), 100)
        self.assertEqual(world.group.bypass.phase, "off")
        world.settle()
        self.assertEqual(world.group.bypass.phase, "on")

    def test_a_connected_secondary_has_a_moment_to_free_the_log(self) -> None:
        world = self.world = overflowing(self)
        world.start()
        world.attach()
        self.link("connected")
        self.fill(60)
        world.reactor.advance(limits.OVERFLOW_WAIT_SECONDS / 2)
        self.assertLess(len(world.client.done), 60)
        world.commit()
        world.reactor.advance(limits.OVERFLOW_WAIT_SECONDS)
        self.assertEqual(len(world.client.done), 60)
        self.assertEqual(world.group.state, "connected")
        self.fill()
        world.reactor.advance(limits.OVERFLOW_WAIT_SECONDS * 0.9)
        self.assertEqual(world.group.state, "connected")
        world.reactor.advance(limits.OVERFLOW_WAIT_SECONDS * 0.2)
        world.settle()
        self.assertEqual(world.group.state, "bypass")

    def test_a_refresh_never_leads_into_it(self) -> None:
        world = self.world = overflowing(self, size=MIB)
        unit = world.start()
        for number in range(200):
            world.data().pwritev([b""], 0)
            world.data()._seen[number * BLOCK : (number + 1) * BLOCK] = unique(number)
        world.group.refresh("full")
        world.settle(60.0)
        self.assertEqual(world.group.state, "refresh")
        self.assertGreater(unit.writelog.used_bytes, 0)

    def test_ends_a_refresh(self) -> None:
        world = self.world = overflowing(self)
        world.start()
        begun = world.group.refresh("full")
        world.settle()
        self.successResultOf(begun)
        self.fill()
        world.settle()
        status = world.group.status()
        self.assertEqual((status["state"], status["refresh"]), ("bypass", None))
        self.assertFalse(status["coherent"])
        self.assertIsNone(durable_superblock(world.log().durable()).refresh)
        world.kill()
        world.start()
        self.assertEqual(world.group.state, "bypass")
        self.assertFalse(world.group.coherent)

    def test_ends_a_refresh_that_was_taken_up_at_the_start(self) -> None:
        world = self.world = overflowing(self, stepped=True)
        world.start()
        world.group.refresh("full")
        world.settle()
        world.kill()
        world.start()
        self.assertIsNotNone(world.group.refresh_job)
        world.group.switch_bypass("on")
        world.settle()
        self.assertEqual(world.group.state, "bypass")
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_what_cannot_be_entered_is_not_tried_at_once_again(self) -> None:
        world = self.world = overflowing(self)
        world.start()
        tried: list[float] = []

        def fail() -> None:
            tried.append(world.reactor.seconds())
            raise DeviceFailedError("no way in")

        world.group.bypass.check_logs = fail  # type: ignore[method-assign]
        self.fill()
        world.settle()
        self.assertEqual(len(tried), 1)
        world.settle(limits.OVERFLOW_AGAIN_SECONDS)
        self.assertEqual(len(tried), 2)
        self.assertIn("no way in", world.group.notes[-1])

    def test_after_leaving_there_is_time_to_make_room(self) -> None:
        world = self.world = overflowing(self)
        world.start()
        self.fill()
        world.settle()
        self.leave_by_a_full_refresh()
        more = self.fill(30)
        world.reactor.advance(limits.OVERFLOW_AGAIN_SECONDS * 0.5)
        self.assertEqual(world.group.state, "refresh")
        world.attach()
        self.mirror_all()
        self.assertTrue(set(more) <= set(world.client.done))


class DirectTests(Case):
    def setUp(self) -> None:
        self.world = DriverWorld(self, stepped=True)
        make_coherent(self.world)
        self.unit = self.world.start()
        self.switch("on")

    def test_dirty_bits_are_durable_before_the_write_is_issued(self) -> None:
        request = self.world.client.write(self.unit, CHUNK, unique(1))
        self.assertFalse(self.world.steps["qds0 data"].waiting)
        self.world.step("qds0 commit")
        self.assertFalse(self.world.client.answered(request))
        self.world.step("qds0 data")
        self.assertTrue(self.world.client.answered(request))
        self.assertEqual(self.world.data().content()[CHUNK:][:BLOCK], unique(1))
        # The second write of a chunk needs no bit.
        again = self.world.client.write(self.unit, CHUNK + BLOCK, unique(2))
        self.world.step("qds0 data")
        self.assertTrue(self.world.client.answered(again))

    def test_a_batch_shares_one_sync(self) -> None:
        first = self.world.client.write(self.unit, 0, unique(1))
        for number in range(1, 5):
            self.world.client.write(self.unit, number * CHUNK, unique(number + 1))
        self.world.step("qds0 commit")
        self.world.step("qds0 data")
        self.assertEqual(self.world.client.done, [first])
        syncs = self.world.log().syncs
        self.world.step("qds0 commit")
        self.world.step("qds0 data")
        self.assertEqual(len(self.world.client.done), 5)
        self.assertEqual(self.world.log().syncs, syncs + 1)

    def test_flush_and_fua_are_behind_a_sync_of_the_data_device(self) -> None:
        plain = self.world.client.write(self.unit, 0, unique(1))
        flush = self.world.client.flush(self.unit)
        self.world.settle()
        self.assertEqual(self.world.client.done, [plain, flush])
        self.assertEqual(self.world.data().durable()[:BLOCK], unique(1))
        self.world.client.write(self.unit, BLOCK, unique(2))
        self.world.settle()
        self.assertNotEqual(self.world.data().durable()[BLOCK:][:BLOCK], unique(2))
        self.world.client.write(self.unit, 2 * BLOCK, unique(3), fua=True)
        self.world.settle()
        self.assertEqual(self.world.data().durable()[2 * BLOCK :][:BLOCK], unique(3))

    def test_trim_zeroes_and_reads(self) -> None:
        client = self.world.client
        client.write(self.unit, 0, unique(1, 4 * BLOCK))
        client.ask(self.unit, nbd.CMD_TRIM, 0, BLOCK)
        client.ask(self.unit, nbd.CMD_WRITE_ZEROES, 2 * BLOCK, BLOCK)
        self.world.settle()
        expected = bytes(BLOCK) + unique(1) + bytes(BLOCK) + unique(1)
        self.assertEqual(client.read(self.unit, 0, 4 * BLOCK), expected)
        self.assertTrue(self.unit.dirty.is_marked(0))

    def test_requests_of_dead_connections_are_not_written(self) -> None:
        self.world.client.write(self.unit, 0, unique(1))
        dead = FakeConnection()
        request = dead.write(self.unit, 0, unique(2))
        dead.gone = True
        self.world.settle()
        self.assertIn(request, dead.abandoned)
        self.assertEqual(self.world.data().content()[:BLOCK], unique(1))

    def test_failed_data_device_answers_errors(self) -> None:
        self.world.data().fail("pwritev")
        one = self.world.client.write(self.unit, 0, unique(1))
        two = self.world.client.write(self.unit, 0, unique(2))
        self.world.settle()
        self.assertEqual(set(self.world.client.errors), {one, two})
        self.refuse("off", DeviceFailedError, "data device /near/data0 failed")

    def test_failed_bitmap_writes_nothing(self) -> None:
        self.world.log().fail("pwritev")
        request = self.world.client.write(self.unit, 0, unique(1))
        self.world.settle()
        self.assertIn(request, self.world.client.errors)
        self.assertEqual(self.world.data().content()[:BLOCK], bytes(BLOCK))

    def test_stop_syncs_and_the_next_start_is_in_bypass(self) -> None:
        self.world.client.write(self.unit, 0, unique(1))
        self.world.settle()
        stopped = self.world.group.stop()
        self.world.settle()
        self.successResultOf(stopped)
        self.assertEqual(self.world.data().durable()[:BLOCK], unique(1))
        self.world.start()
        self.assertEqual(self.world.group.state, "bypass")
        self.assertTrue(self.world.group.coherent)
        status = self.world.group.status()
        self.assertEqual(status["bypass"]["dirty_bytes"], CHUNK)
        self.assertEqual(status["since"], status["bypass"]["since"])

    def test_a_damaged_bitmap_is_told_and_counts_as_dirty(self) -> None:
        self.world.client.write(self.unit, 0, unique(1))
        self.world.settle()
        area = self.unit.dirty.area
        for told in (True, False):
            stopped = self.world.group.stop()
            self.world.settle()
            self.successResultOf(stopped)
            if told:
                # Its only mark is lost.
                self.world.log().corrupt(area.start + 8, b"\0")
            self.world.start()
            status = self.world.group.status()
            self.assertEqual(status["bypass"]["dirty_bytes"], self.world.data().size)
            notes = "".join(self.world.group.notes)
            self.assertEqual("dirty bitmap of qds0 on /near/log0 is damaged" in notes, told, notes)


class SwitchTests(Case):
    def setUp(self) -> None:
        self.world = DriverWorld(self, ldsus=2)
        make_coherent(self.world)
        self.unit = self.world.start()

    def test_in_and_out(self) -> None:
        self.world.client.write(self.unit, 0, unique(1))
        told = self.switch("on")
        self.assertEqual(told["reason"], "asked for by the operator")
        self.assertTrue(self.world.group.coherent)
        before = self.world.group.generation
        self.world.client.write(self.unit, BLOCK, unique(2))
        self.assertEqual(self.switch("off")["kind"], "dirty")
        status = self.world.group.status()
        self.assertEqual((status["state"], status["bypass"]), ("refresh", None))
        self.assertFalse(status["coherent"])
        self.assertNotEqual(self.world.group.generation, before)
        self.assertEqual(sorted(kinds(self.world) + kinds(self.world, 1))[:1], [ENTRIES])
        found = kinds(self.world)
        self.assertLess(found.index(SWITCH), found.index(REFRESH_BEGIN))

    def test_refused_with_the_way_out(self) -> None:
        error = self.refuse("off", DegradedError, "not in bypass")
        self.assertIn("qdsrefresh", error.hint)
        self.switch("on")
        error = self.refuse("on", DegradedError, "in bypass already")
        self.assertIn("qdsbypass off -g 0", error.hint)
        with self.assertRaises(UsageError):
            self.world.group.switch_bypass("sideways")

    def test_a_refresh_leaves_bypass(self) -> None:
        self.switch("on")
        asked = self.world.group.refresh("full")
        self.world.settle()
        self.successResultOf(asked)
        self.assertEqual(self.world.group.state, "refresh")

    def test_requests_wait_on_the_way(self) -> None:
        world = self.world = DriverWorld(self, stepped=True)
        unit = world.start()
        world.client.write(unit, 0, unique(1))
        entering = world.group.switch_bypass("on")
        held = world.client.write(unit, BLOCK, unique(2))
        for name in ("qds0 writelog", "qds0 writelog", "qds0 commit", "qds0 data"):
            self.assertNoResult(entering)
            self.assertFalse(world.client.answered(held))
            world.step(name)
        world.settle()
        self.successResultOf(entering)
        self.assertEqual(world.log().content().find(unique(2)), -1)
        self.assertEqual(world.data().content()[: 2 * BLOCK], unique(1) + unique(2))
        world.client.write(unit, 2 * BLOCK, unique(3))
        leaving = world.group.switch_bypass("off")
        flush = world.client.flush(unit)
        late = world.client.write(unit, 3 * BLOCK, unique(4))
        self.assertFalse(world.client.answered(flush))
        world.settle()
        self.successResultOf(leaving)
        self.assertTrue(world.client.answered(flush) and world.client.answered(late))
        self.assertEqual(world.data().durable()[2 * BLOCK :][:BLOCK], unique(3))
        self.assertNotEqual(world.log().content().find(unique(4)), -1)

    def test_the_driver_stops_while_bypass_is_left(self) -> None:
        world = self.world = DriverWorld(self, stepped=True)
        world.start()
        self.switch("on")
        leaving = world.group.switch_bypass("off")
        stopped = world.group.stop()
        world.settle()
        self.successResultOf(stopped)
        self.assertEqual(world.group.bypass.phase, "off")
        # Its refresh goes on at the next start.
        leaving.addErrback(lambda _: None)
        world.kill()
        world.start()
        self.assertIsNotNone(world.group.refresh_job)

    def test_bits_are_cleared_for_a_coherent_mirror_only(self) -> None:
        self.switch("on")
        self.world.client.write(self.unit, 0, unique(1))
        self.switch("off")
        self.switch("on")
        # Between a break and the committed end of a refresh bits are only set.
        self.world.client.write(self.unit, CHUNK, unique(2))
        self.assertTrue(self.unit.dirty.is_marked(0) and self.unit.dirty.is_marked(CHUNK))
        self.switch("off")
        self.world.attach()
        self.mirror_all()
        self.switch("on")
        self.assertEqual(self.unit.dirty.dirty_bytes(), 0)
        self.world.kill()
        self.world.start()
        self.assertEqual(self.world.group.units[0].dirty.dirty_bytes(), 0)
