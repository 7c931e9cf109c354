"""One LDSU: when it answers, what reaches its devices and when, what reads see."""

from __future__ import annotations

import errno

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror import limits
from qdsmirror.core import nbd
from qdsmirror.groups import waiting as waiting_module
from qdsmirror.groups.unapplied import Unapplied
from tests.groups.world import BLOCK, KIB, MIB, DriverWorld, FakeConnection, unique


class AnswerTests(SynchronousTestCase):
    """Answers come when what they promise holds, and no earlier."""

    def world(self, durability: str = "flush") -> DriverWorld:
        world = DriverWorld(self, stepped=True, durability=durability)
        self.unit = world.start()
        return world

    def test_write_is_answered_after_the_append(self) -> None:
        world = self.world()
        request = world.client.write(self.unit, 0, unique(1))
        self.assertFalse(world.client.answered(request))
        self.assertNotIn(unique(1), world.log().content())
        world.step("qds0 writelog")
        self.assertEqual(world.client.done, [request])
        self.assertIn(unique(1), world.log().content())
        self.assertNotIn(unique(1), world.log().durable())

    def test_write_is_answered_after_the_sync_where_durability_is_always(self) -> None:
        world = self.world("always")
        request = world.client.write(self.unit, 0, unique(1))
        world.step("qds0 writelog")
        self.assertFalse(world.client.answered(request))
        world.step("qds0 commit")
        self.assertEqual(world.client.done, [request])
        self.assertIn(unique(1), world.log().durable())

    def test_fua_is_answered_after_the_sync_and_others_are_not_held_up(self) -> None:
        world = self.world()
        forced = world.client.write(self.unit, 0, unique(1), fua=True)
        plain = world.client.write(self.unit, BLOCK, unique(2))
        world.step("qds0 writelog", 2)
        self.assertEqual(world.client.done, [plain])
        world.step("qds0 commit")
        self.assertEqual(world.client.done, [plain, forced])

    def test_flush_waits_for_every_answered_write_of_any_connection(self) -> None:
        world = self.world()
        other = FakeConnection()
        world.client.write(self.unit, 0, unique(1))
        world.step("qds0 writelog")
        other.write(self.unit, BLOCK, unique(2))
        world.step("qds0 writelog")
        flush = other.flush(self.unit)
        self.assertFalse(other.answered(flush))
        world.step("qds0 commit")
        self.assertTrue(other.answered(flush))
        for number in (1, 2):
            self.assertIn(unique(number), world.log().durable())

    def test_flush_during_a_commit_waits_for_the_next_one(self) -> None:
        world = self.world()
        world.client.write(self.unit, 0, unique(1), fua=True)
        world.step("qds0 writelog")
        world.client.write(self.unit, BLOCK, unique(2))
        world.step("qds0 writelog")
        flush = world.client.flush(self.unit)
        job, done = world.steps["qds0 commit"].waiting.popleft()
        # The sync that is under way may have missed the second append.
        done(None, None)
        self.assertFalse(world.client.answered(flush))
        world.step("qds0 commit")
        self.assertTrue(world.client.answered(flush))
        self.assertIn(unique(2), world.log().durable())

    def test_flush_with_nothing_to_wait_for_is_answered_at_once(self) -> None:
        world = self.world()
        self.assertTrue(world.client.answered(world.client.flush(self.unit)))
        world.client.write(self.unit, 0, unique(1))
        world.settle()
        self.assertTrue(world.client.answered(world.client.flush(self.unit)))

    def test_commit_comes_by_itself_within_the_interval(self) -> None:
        world = self.world()
        world.client.write(self.unit, 0, unique(1))
        world.step("qds0 writelog")
        self.assertFalse(world.steps["qds0 commit"].waiting)
        world.reactor.advance(limits.COMMIT_INTERVAL_SECONDS)
        world.step("qds0 commit")
        self.assertEqual(world.group.durable_gsn, 1)

    def test_requests_that_come_during_an_append_share_the_next_frame(self) -> None:
        world = self.world()
        for number in range(5):
            world.client.write(self.unit, number * BLOCK, unique(number))
        world.step("qds0 writelog", 2)
        self.assertEqual([len(frame.entries) for frame in world.frames], [1, 4])
        self.assertEqual(len(world.client.done), 5)


class ApplyTests(SynchronousTestCase):
    """What reaches the data device, and what is read before it does."""

    def setUp(self) -> None:
        self.world = DriverWorld(self, stepped=True)
        self.unit = self.world.start()

    def test_nothing_reaches_the_data_device_before_it_is_durable(self) -> None:
        self.world.client.write(self.unit, 0, unique(1))
        self.world.step("qds0 writelog")
        self.assertFalse(self.world.steps["qds0 data"].waiting)
        self.world.reactor.advance(1)
        self.assertFalse(any(w for w in self.world.steps["qds0 data"].waiting))
        self.world.step("qds0 commit")
        self.world.step("qds0 data")
        self.assertEqual(self.world.data().content()[:BLOCK], unique(1))

    def test_watched_device_notices_a_hidden_write(self) -> None:
        self.world.data().pwritev([unique(1)], 0)
        self.assertEqual(self.world.data().violations, 1)
        self.world.data().violations = 0

    def test_reads_see_what_is_not_applied(self) -> None:
        client = self.world.client
        client.write(self.unit, 0, unique(1, 8192))
        client.write(self.unit, 4096, unique(2))
        self.assertEqual(client.read(self.unit, 512, 1024), unique(1, 8192)[512:1536])
        self.world.step("qds0 writelog")
        client.ask(self.unit, nbd.CMD_TRIM, 1024, 512)
        self.world.step("qds0 writelog")
        expected = bytearray(unique(1, 8192) + bytes(4096))
        expected[4096:8192] = unique(2)
        expected[1024:1536] = bytes(512)
        for _ in range(3):
            self.assertEqual(client.read(self.unit, 0, 12288), bytes(expected))
            self.world.settle()
        self.assertEqual(self.world.data().content()[:12288], bytes(expected))

    def test_slow_read_gets_what_was_pending_when_it_came(self) -> None:
        client = self.world.client
        client.write(self.unit, 0, unique(1))
        self.world.settle()
        self.world.data().cached = False
        client.write(self.unit, 512, unique(2, 512))
        self.world.step("qds0 writelog")
        request = client.ask(self.unit, nbd.CMD_READ, 0, 2048)
        self.world.settle()
        expected = unique(1)[:512] + unique(2, 512) + unique(1)[1024:2048]
        self.assertEqual(client.data[request], expected)

    def test_write_applied_between_a_slow_read_and_its_answer_is_not_missed(self) -> None:
        client = self.world.client
        self.world.data().cached = False
        client.write(self.unit, 0, unique(1))
        self.world.step("qds0 writelog")
        request = client.ask(self.unit, nbd.CMD_READ, 0, 2 * BLOCK)
        job, done = self.world.steps["qds0 read"].waiting.popleft()
        data = job()
        self.world.settle()
        self.assertFalse(self.unit.pending)
        done(data, None)
        self.assertEqual(client.data[request], unique(1) + bytes(BLOCK))

    def test_only_what_may_become_a_hole_is_unmapped(self) -> None:
        client = self.world.client
        asked: list[tuple[int, bool]] = []
        self.world.data().zero = (  # type: ignore[method-assign]
            lambda offset, length, unmap: asked.append((offset, unmap))
        )
        client.ask(self.unit, nbd.CMD_TRIM, 0, BLOCK)
        client.ask(self.unit, nbd.CMD_WRITE_ZEROES, BLOCK, BLOCK)
        flags = nbd.CMD_FLAG_NO_HOLE
        client.ask(self.unit, nbd.CMD_WRITE_ZEROES, 2 * BLOCK, BLOCK, None, flags)
        self.world.settle()
        self.assertEqual(asked, [(0, True), (BLOCK, True), (2 * BLOCK, False)])

    def test_overlapping_writes_keep_their_order(self) -> None:
        client = self.world.client
        for number in range(8):
            client.write(self.unit, (number % 3) * 512, unique(number, 2048))
        self.world.settle()
        expected = bytearray(4096)
        for number in range(8):
            at = (number % 3) * 512
            expected[at : at + 2048] = unique(number, 2048)
        self.assertEqual(self.world.data().content()[:4096], bytes(expected))
        self.assertEqual(client.read(self.unit, 0, 4096), bytes(expected))

    def test_trim_and_zeroes_read_as_zeroes_and_carry_no_payload(self) -> None:
        client = self.world.client
        client.write(self.unit, 0, unique(1, 64 * KIB))
        self.world.settle()
        used = self.unit.writelog.used_bytes
        client.ask(self.unit, nbd.CMD_TRIM, 0, 16 * KIB)
        client.ask(self.unit, nbd.CMD_WRITE_ZEROES, 32 * KIB, 16 * KIB)
        client.ask(self.unit, nbd.CMD_WRITE_ZEROES, 48 * KIB, 8 * KIB, None, nbd.CMD_FLAG_NO_HOLE)
        self.world.settle()
        expected = bytearray(unique(1, 64 * KIB))
        expected[: 16 * KIB] = bytes(16 * KIB)
        expected[32 * KIB : 56 * KIB] = bytes(24 * KIB)
        self.assertEqual(self.world.data().content()[: 64 * KIB], bytes(expected))
        self.assertLessEqual(self.unit.writelog.used_bytes - used, 3 * BLOCK)
        self.assertEqual(len(client.done), 4)

    def test_a_write_of_zeroes_carries_no_payload(self) -> None:
        client = self.world.client
        client.write(self.unit, 0, unique(1, 64 * KIB))
        self.world.settle()
        used = self.unit.writelog.used_bytes
        client.write(self.unit, 4 * KIB, bytes(32 * KIB))
        self.assertEqual(client.read(self.unit, 8 * KIB, 4 * KIB), bytes(4 * KIB))
        almost = bytes(3 * KIB) + b"x" + bytes(KIB - 1)
        client.write(self.unit, 40 * KIB, almost)
        self.world.settle()
        expected = bytearray(unique(1, 64 * KIB))
        expected[4 * KIB : 36 * KIB] = bytes(32 * KIB)
        expected[40 * KIB : 44 * KIB] = almost
        self.assertEqual(self.world.data().content()[: 64 * KIB], bytes(expected))
        self.assertLessEqual(self.unit.writelog.used_bytes - used, 3 * BLOCK)

    def test_block_status_lays_what_is_pending_over_the_device(self) -> None:
        client = self.world.client
        client.write(self.unit, 0, unique(1))
        self.world.settle()
        client.write(self.unit, 16 * KIB, unique(2))
        request = client.ask(self.unit, nbd.CMD_BLOCK_STATUS, 0, 32 * KIB)
        self.world.step("qds0 read")
        hole = (12 * KIB, nbd.STATE_HOLE | nbd.STATE_ZERO)
        self.assertEqual(client.extents[request], [(4096, 0), hole, (4096, 0), hole])


class FrameTests(SynchronousTestCase):
    """Large requests, full logs, dead connections."""

    def test_large_write_is_split_and_answered_once_at_its_end(self) -> None:
        world = DriverWorld(self, size=8 * MIB, log=16 * MIB, stepped=True)
        unit = world.start()
        data = b"".join(unique(n) for n in range(3 * 256 + 5))
        request = world.client.write(unit, BLOCK, data)
        world.step("qds0 writelog", 3)
        self.assertFalse(world.client.answered(request))
        world.settle()
        self.assertEqual(world.client.done, [request])
        self.assertEqual(len(world.frames), 4)
        self.assertLessEqual(max(f.weight for f in world.frames), limits.FRAME_BYTES_MAX)
        self.assertEqual(world.data().content()[BLOCK : BLOCK + len(data)], data)

    def test_small_log_splits_too(self) -> None:
        world = DriverWorld(self, size=MIB, log=limits.WRITELOG_BYTES_MIN // 4096 * 4096 + 4096)
        unit = world.start()
        world.attach()
        data = b"".join(unique(n) for n in range(64))
        request = world.client.write(unit, 0, data)
        for _ in range(100):
            if world.client.answered(request):
                break
            world.settle()
            world.commit()
        world.settle()
        self.assertEqual(world.client.done, [request])
        self.assertEqual(world.data().content()[: len(data)], data)

    def test_long_zeroes_become_several_entries(self) -> None:
        self.patch(waiting_module, "ZERO_ENTRY_BYTES_MAX", 64 * KIB)
        world = DriverWorld(self)
        unit = world.start()
        world.client.write(unit, 0, unique(1, 512 * KIB))
        request = world.client.ask(unit, nbd.CMD_WRITE_ZEROES, 4096, 300 * KIB)
        world.settle()
        self.assertIn(request, world.client.done)
        self.assertEqual(world.group.next_gsn - 1, world.frames[-1].gsn_last)
        content = world.data().content()
        self.assertEqual(content[4096 : 4096 + 300 * KIB], bytes(300 * KIB))
        self.assertEqual(content[:4096], unique(1))

    def test_full_log_makes_writes_wait_until_an_ack_frees_space(self) -> None:
        world = DriverWorld(self, size=MIB, log=256 * KIB)
        unit = world.start()
        world.attach()
        requests = [world.client.write(unit, n * BLOCK, unique(n)) for n in range(100)]
        world.settle(5)
        answered = len(world.client.done)
        self.assertLess(answered, 100)
        self.assertGreater(answered, 10)
        self.assertLessEqual(
            unit.writelog.used_bytes, unit.writelog.ring.size - limits.CONTROL_RESERVE_BYTES
        )
        reads = world.client.read(unit, 0, BLOCK)
        self.assertEqual(reads, unique(0))
        for _ in range(20):
            world.settle()
            world.commit()
        self.assertEqual(world.client.done, requests)
        world.settle()
        self.assertEqual(
            world.data().content()[: 100 * BLOCK], b"".join(unique(n) for n in range(100))
        )

    def test_flush_is_answered_while_the_log_is_full(self) -> None:
        world = DriverWorld(self, size=MIB, log=256 * KIB)
        unit = world.start()
        for number in range(100):
            world.client.write(unit, number * BLOCK, unique(number))
        world.settle()
        self.assertLess(len(world.client.done), 100)
        self.assertTrue(world.client.answered(world.client.flush(unit)))

    def test_dead_connections_requests_are_not_framed(self) -> None:
        world = DriverWorld(self, stepped=True)
        unit = world.start()
        dead, alive = FakeConnection(), world.client
        alive.write(unit, 0, unique(0))
        stale = dead.write(unit, BLOCK, unique(1))
        dead.gone = True
        alive.write(unit, BLOCK, unique(2))
        world.settle()
        self.assertEqual(dead.done, [])
        self.assertEqual(dead.abandoned, [stale])
        self.assertEqual(world.data().content()[BLOCK : 2 * BLOCK], unique(2))
        self.assertNotIn(unique(1), world.log().content())

    def test_held_writes_keep_their_order(self) -> None:
        world = DriverWorld(self)
        unit = world.start()
        unit.lock(0, BLOCK)
        for number in range(4):
            world.client.write(unit, 0, unique(number))
        self.assertEqual(world.client.done, [])
        unit.unlock()
        world.settle()
        self.assertEqual(world.data().content()[:BLOCK], unique(3))

    def test_dead_connections_held_requests_are_not_framed(self) -> None:
        """What a refresh's lock has held back is forgotten with the rest, once."""
        world = DriverWorld(self, stepped=True)
        unit = world.start()
        dead, alive = FakeConnection(), world.client
        unit.lock(0, BLOCK)
        held = dead.write(unit, 0, unique(1))
        alive.write(unit, 4 * BLOCK, unique(2))
        queued = dead.write(unit, BLOCK, unique(3))
        dead.gone = True
        world.settle()
        self.assertEqual(dead.abandoned, [queued, held])
        unit.unlock()
        again = alive.write(unit, 0, unique(4))
        world.settle()
        self.assertEqual(dead.abandoned, [queued, held])
        self.assertIn(again, alive.done)
        self.assertEqual(world.data().content()[:BLOCK], unique(4))
        for number in (1, 3):
            self.assertNotIn(unique(number), world.log().content())

    def test_what_a_refresh_holds_back_stays_behind_what_waits_for_space(self) -> None:
        """A write that found no room goes back to the queue, before what was held meanwhile."""
        world = DriverWorld(self, size=MIB, log=256 * KIB)
        unit = world.start()
        world.attach()
        number = 0
        while world.client.answered(world.client.write(unit, MIB // 2, unique(number))):
            number += 1
        unit.lock(0, BLOCK)
        first = world.client.write(unit, BLOCK, unique(201) + unique(202))
        world.client.write(unit, 0, unique(203) + unique(204))
        self.assertFalse(world.client.answered(first))
        unit.unlock()
        for _ in range(8):
            world.commit()
            world.settle()
        self.assertTrue(world.client.answered(first))
        self.assertEqual(
            world.data().content()[: 3 * BLOCK], unique(203) + unique(204) + unique(202)
        )

    def test_what_a_refresh_holds_back_is_not_overtaken(self) -> None:
        world = DriverWorld(self, stepped=True)
        unit = world.start()
        unit.lock(0, BLOCK)
        world.client.write(unit, 0, unique(1) + unique(2))
        world.client.write(unit, BLOCK, unique(3) + unique(4))
        apart = world.client.write(unit, 4 * BLOCK, unique(5))
        world.settle()
        self.assertEqual(world.client.done, [apart])
        unit.unlock()
        world.settle()
        self.assertEqual(world.data().content()[: 3 * BLOCK], unique(1) + unique(3) + unique(4))

    def test_stale_copy_does_not_overtake_what_waits_for_space(self) -> None:
        world = DriverWorld(self, size=MIB, log=256 * KIB)
        unit = world.start()
        world.attach()
        dead, alive = FakeConnection(), world.client
        for number in range(100):
            dead.write(unit, number * BLOCK, unique(number))
        waiting = 100 - len(dead.done)
        self.assertGreater(waiting, 0)
        dead.gone = True
        alive.write(unit, 99 * BLOCK, unique(1000))
        for _ in range(20):
            world.settle()
            world.commit()
        self.assertEqual(len(dead.abandoned), waiting)
        self.assertEqual(world.data().content()[99 * BLOCK : 100 * BLOCK], unique(1000))

    def test_unapplied_bytes_are_bounded(self) -> None:
        world = DriverWorld(self, log=4 * MIB, stepped=True)
        unit = world.start()
        world.group.runtime.unapplied = Unapplied(64 * KIB, 0)
        requests = [world.client.write(unit, n * 8192, unique(n, 8192)) for n in range(32)]
        for name in ("qds0 writelog", "qds0 commit"):
            world.steps[name].step_all()
        framed = sum(frame.weight for frame in world.frames)
        self.assertLess(framed, 64 * KIB + limits.FRAME_PAYLOAD_BYTES_MAX)
        self.assertLessEqual(world.group.unapplied_bytes, framed)
        for number in range(32, 64):
            requests.append(world.client.write(unit, number * 8192, unique(number, 8192)))
        before = len(world.frames)
        world.steps["qds0 writelog"].step_all()
        self.assertEqual(len(world.frames), before, "framed beyond the bound")
        world.settle()
        self.assertEqual(world.client.done, requests)
        self.assertEqual(world.group.unapplied_bytes, 0)


class ErrorTests(SynchronousTestCase):
    """LOUD: a failure is told, latched, and nothing more is acknowledged on the device."""

    def failing(self, name: str, method: str) -> DriverWorld:
        world = DriverWorld(self, ldsus=2)
        self.unit = world.start()
        world.devices[f"/near/{name}0"].fail(method)
        return world

    def assert_failed(self, world: DriverWorld, what: str) -> None:
        client = world.client
        for command in (nbd.CMD_WRITE, nbd.CMD_READ, nbd.CMD_FLUSH, nbd.CMD_TRIM):
            data = bytes(BLOCK) if command == nbd.CMD_WRITE else None
            request = client.ask(self.unit, command, 0, BLOCK, data)
            self.assertEqual(client.errors.get(request), errno.EIO, f"command {command}")
        self.assertIn(what, self.unit.errors[0])
        self.assertIn(what, world.group.status()["reason"])
        self.assertTrue(world.group.status()["ldsus"][0]["errors"])
        # The other LDSU of the group is as it was; but nothing may be framed any more after a
        # writelog's failure, which cannot be recorded here.
        other = client.write(world.group.units[1], 0, unique(9), fua=True)
        world.settle()
        self.assertIn(other, client.errors if what.startswith("writelog") else client.done)

    def test_failed_append_is_an_error_to_the_client(self) -> None:
        world = self.failing("log", "pwritev")
        request = world.client.write(self.unit, 0, unique(1))
        self.assertEqual(world.client.errors, {request: errno.EIO})
        world.settle()
        self.assert_failed(world, "writelog /near/log0")
        self.assertEqual(world.data().content()[:BLOCK], bytes(BLOCK))

    def test_failed_sync_is_not_retried_and_not_answered(self) -> None:
        world = self.failing("log", "fdatasync")
        request = world.client.write(self.unit, 0, unique(1), fua=True)
        self.assertEqual(world.client.errors, {request: errno.EIO})
        syncs = world.log().syncs
        world.settle(10)
        self.assert_failed(world, "writelog /near/log0")
        self.assertEqual(world.log().syncs, syncs)
        self.assertEqual(world.group.durable_gsn, 0)
        self.assertEqual(world.data().content()[:BLOCK], bytes(BLOCK))

    def test_failed_data_device_is_told(self) -> None:
        world = self.failing("data", "pwritev")
        world.client.write(self.unit, 0, unique(1))
        world.settle()
        self.assert_failed(world, "data device /near/data0")
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_failed_sync_of_the_data_device_is_told(self) -> None:
        world = self.failing("data", "fdatasync")
        world.client.write(self.unit, 0, unique(1))
        world.settle(2)
        self.assert_failed(world, "data device /near/data0")
        self.assertEqual(self.unit.writelog.superblock.applied.position, 0)

    def test_read_error_is_the_clients_alone(self) -> None:
        world = self.failing("data", "pread_nowait")
        request = world.client.ask(self.unit, nbd.CMD_READ, 0, BLOCK)
        self.assertEqual(world.client.errors, {request: errno.EIO})
        self.assertEqual(world.client.read(self.unit, 0, BLOCK), bytes(BLOCK))
        self.assertIn("read at 0", world.group.status()["errors"][0])

    def test_full_log_beside_a_failed_device_does_not_spin(self) -> None:
        world = DriverWorld(self, ldsus=2, log=256 * KIB)
        self.unit = world.start()
        world.client.write(self.unit, 0, unique(1))
        world.settle(0.1)
        world.data(0).fail("fdatasync")
        world.settle(2)
        self.assertTrue(self.unit.errors)
        self.assertGreater(self.unit.applying.applied_sequence, self.unit.applying.synced_sequence)
        other = world.group.units[1]
        for number in range(100):
            world.client.write(other, number * BLOCK, unique(number))
        world.settle(2)
        self.assertLess(len(world.client.done), 101)
        self.assertEqual(world.client.errors, {})
