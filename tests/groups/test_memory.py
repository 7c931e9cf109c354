"""Writelogs in memory: what is durable when, what a child's and a master's end leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qdsmirror.core.bitmap import DirtyBitmap
from qdsmirror.core.watermark import LINK, pack_json
from qdsmirror.limits import GENERATIONS_MAX, MEMORY_DRAIN_SECONDS, MEMORY_SETTLE_SECONDS
from qdsmirror.storage.memory import absent_memory
from qdsmirror.storage.memorylog import MemoryLogDevice
from qdsmirror.storage.writelog import Writelog
from tests.fakes import MemoryDevice, everything, nothing
from tests.groups.test_bypass import CHUNK, Case
from tests.groups.test_failures import MemoryLatch
from tests.groups.world import (
    BLOCK,
    KIB,
    MIB,
    DriverWorld,
    WatchedDevice,
    durable_superblock,
    unique,
)


def make_coherent(world: DriverWorld) -> None:
    for ldsu in world.config.ldsus:
        device = MemoryLogDevice(world.log(ldsu.index), absent_memory(ldsu))
        Writelog.open(device).update(both=True, coherent=True, reason="")


class MemoryCase(Case):
    more: dict[str, Any] = {}  # noqa: RUF012

    def setUp(self) -> None:
        self.world = DriverWorld(self, memory=True, size=16 * CHUNK, log=MIB, **self.more)
        make_coherent(self.world)
        self.unit = self.world.start()

    def dirty(self) -> list[int]:
        """Give the chunks that are dirty on the platters."""
        log = self.world.log().durable()
        superblock = durable_superblock(log)
        area = superblock.bitmap
        assert area is not None
        stored = log[area.start : area.start + area.size]
        bitmap = DirtyBitmap(area, superblock.units[0].size, superblock.log, stored)
        self.assertEqual(bitmap.damaged, [])
        return [n for n in range(16) if bitmap.is_marked(n * CHUNK)]

    def link(self, state: str = "connected", **more: Any) -> None:
        said = {"state": state, "code": 0, "reason": "", "pid": 1, **more}
        self.world.pmd.dataReceived(pack_json(LINK, said))
        self.world.settle()


class OrderTests(MemoryCase):
    more = {"stepped": True}  # noqa: RUF012

    def setUp(self) -> None:
        super().setUp()
        self.world.settle()

    def test_answered_once_its_bit_is_durable(self) -> None:
        request = self.world.client.write(self.unit, 3 * CHUNK, unique(1))
        self.assertEqual((self.world.client.done, self.dirty()), ([], []))
        self.world.step("qds0 writelog")
        self.assertEqual((self.world.client.done, self.dirty()), ([request], [3]))

    def test_a_bit_that_stands_costs_nothing(self) -> None:
        self.world.client.write(self.unit, 0, unique(1))
        self.world.settle()
        before = self.world.log().syncs
        self.world.client.write(self.unit, BLOCK, unique(2))
        self.world.step("qds0 writelog")
        self.assertEqual(self.world.log().syncs, before)
        self.assertEqual(len(self.world.client.done), 2)

    def test_durable_once_the_data_device_is_synced(self) -> None:
        """Only then is it announced (NO-AHEAD), and FUA and FLUSH are answered (DURABLE)."""
        client = self.world.client
        fua = client.write(self.unit, 0, unique(1), fua=True)
        self.world.step("qds0 writelog")
        flush = client.flush(self.unit)
        self.assertEqual((client.done, self.world.group.durable_gsn), ([], 0))
        self.assertEqual(self.world.data().unsynced, [])
        self.world.step("qds0 data")
        self.assertEqual(client.done, [fua, flush])
        self.assertEqual(self.world.group.durable_gsn, 1)
        self.assertEqual(self.world.data().durable()[:BLOCK], unique(1))

    def test_read_from_memory_until_it_is_applied(self) -> None:
        self.world.client.write(self.unit, 0, unique(1))
        self.world.step("qds0 writelog")
        request = self.world.client.ask(self.unit, 0, 0, BLOCK)
        self.assertEqual(self.world.client.data.get(request), unique(1))

    def test_a_bitmap_device_that_fails(self) -> None:
        """LOUD: the write goes past the writelog only when that is on record."""
        self.world.log().fail("pwritev")
        request = self.world.client.write(self.unit, 0, unique(1))
        self.world.settle()
        self.assertNotIn(request, self.world.client.done)
        self.assertIn("/near/log0", self.world.group.status()["reason"])

    def test_a_data_device_that_fails(self) -> None:
        self.world.data().fail("pwritev")
        fua = self.world.client.write(self.unit, 0, unique(1), fua=True)
        self.world.settle()
        self.assertIn(fua, self.world.client.errors)

    def test_appended_once_the_data_device_is_dead(self) -> None:
        """DURABLE: what must be durable, and is nowhere here, is no success."""
        world = self.world
        world.group.failures._latch = MemoryLatch()
        world.data().fail("pwritev")
        world.client.write(self.unit, 0, unique(1), fua=True)
        world.step("qds0 writelog")
        fua = world.client.write(self.unit, BLOCK, unique(2), fua=True)
        world.step("qds0 data")
        self.assertTrue(self.unit.dead)
        self.assertFalse(world.client.answered(fua), "its append is under way")
        world.settle()
        self.assertIn(fua, world.client.errors)


class ClearingTests(MemoryCase):
    def setUp(self) -> None:
        super().setUp()
        self.world.attach()

    def let_epoch_pass(self) -> None:
        self.world.settle(MEMORY_SETTLE_SECONDS + 2)

    def test_cleared_once_committed_and_free(self) -> None:
        self.world.client.write(self.unit, 0, unique(1))
        self.let_epoch_pass()
        self.let_epoch_pass()
        self.assertEqual(self.dirty(), [0])
        self.world.commit()
        self.let_epoch_pass()
        self.let_epoch_pass()
        self.assertEqual(self.dirty(), [])

    def test_not_while_something_newer_is_there(self) -> None:
        self.world.client.write(self.unit, 0, unique(1))
        self.world.client.write(self.unit, CHUNK, unique(2))
        self.world.settle()
        for number in range(3, 7):
            self.world.commit()
            self.world.client.write(self.unit, 0, unique(number))
            self.let_epoch_pass()
        self.assertEqual(self.dirty(), [0])

    def test_not_while_the_mirror_is_incoherent(self) -> None:
        self.world.client.write(self.unit, 0, unique(1))
        self.world.settle()
        self.world.group.coherence.lose("another history")
        self.world.settle()
        self.world.commit()
        for _ in range(4):
            self.let_epoch_pass()
        self.assertEqual(self.dirty(), [0])

    def test_not_in_bypass(self) -> None:
        self.world.client.write(self.unit, 0, unique(1))
        self.world.settle()
        self.switch("on")
        self.world.client.write(self.unit, CHUNK, unique(2))
        self.world.settle()
        self.world.commit()
        for _ in range(4):
            self.let_epoch_pass()
        self.assertEqual(self.dirty(), [0, 1])


class EndTests(MemoryCase):
    def test_a_childs_death_loses_nothing(self) -> None:
        self.world.client.write(self.unit, 0, unique(1))
        self.world.settle()
        before = self.world.group.generation, self.unit.framed_point, self.world.group.next_gsn
        self.world.kill()
        unit = self.world.start()
        group = self.world.group
        self.assertEqual((group.generation, unit.framed_point, group.next_gsn), before)
        self.assertEqual(group.status()["state"], "accumulating")
        self.assertTrue(group.coherent)

    def test_a_childs_death_before_the_write_is_applied(self) -> None:
        self.world.close()
        self.world = DriverWorld(self, memory=True, size=16 * CHUNK, log=MIB, stepped=True)
        self.unit = self.world.start()
        self.world.client.write(self.unit, 0, unique(1))
        self.world.step("qds0 writelog")
        self.world.kill()
        self.world.start()
        self.assertEqual(self.world.data().durable()[:BLOCK], unique(1))
        self.assertEqual(self.world.group.durable_gsn, 1)

    def test_a_replay_writes_nothing_older_over_what_may_be_durable(self) -> None:
        """The power may go in it, and with it the memory: nobody would put it right again."""
        self.world.close()
        self.world = DriverWorld(self, memory=True, size=16 * CHUNK, log=MIB, stepped=True)
        self.unit = self.world.start()
        for number in (1, 2, 3):
            self.world.client.write(self.unit, 0, unique(number))
            self.world.client.write(self.unit, number * BLOCK, unique(10 + number))
            self.world.settle(0.01)
        # Durable too, but nothing in the log says so.
        self.assertEqual(self.world.data().durable()[:BLOCK], unique(3))
        self.world.kill()
        written: list[bytes] = []

        def record(device: Any, buffers: Any, offset: int) -> None:
            written.append(b"".join(buffers))
            MemoryDevice.pwritev(device, buffers, offset)

        self.patch(WatchedDevice, "pwritev", record)
        self.world.start()
        self.assertNotEqual(written, [])
        for number in (1, 2):
            self.assertFalse(any(unique(number) in one for one in written))

    def lost(self, end: Any) -> dict[str, Any]:
        self.world.client.write(self.unit, 5 * CHUNK, unique(1))
        self.world.settle()
        end()
        self.unit = self.world.start()
        status: dict[str, Any] = self.world.group.status()
        return status

    def check_lost(self, status: dict[str, Any]) -> None:
        """GENERATION, LOUD: nothing more of the old history; the mirror is older and coherent."""
        self.assertEqual(status["state"], "bypass")
        self.assertIn("memory were lost (qds0)", status["reason"])
        self.assertTrue(status["coherent"])
        self.assertEqual(self.dirty(), [5])
        self.assertGreater(status["gsn"]["written"], 1)
        self.assertEqual(self.unit.durable_end, self.unit.committed_end)

    def test_a_masters_death(self) -> None:
        self.check_lost(self.lost(self.world.kill_master))

    def test_a_power_cut(self) -> None:
        for choose in (nothing, everything):
            with self.subTest(choose):
                self.check_lost(self.lost(lambda choose=choose: self.world.crash(choose)))
                self.world.close()
                self.setUp()

    def test_a_child_dies_in_the_start_after_a_loss(self) -> None:
        """It is found again, with whatever was recorded of it: nothing counts twice as there."""
        self.lost(self.world.kill_master)
        self.world.kill()
        self.unit = self.world.start()
        self.check_lost(self.world.group.status())

    def test_a_dirty_refresh_leads_out(self) -> None:
        generation = self.world.group.generation
        self.lost(self.world.kill_master)
        info = self.world.attach()
        self.assertEqual(info["covered_gsn"], self.world.group.next_gsn)
        told = self.switch("off")
        self.assertEqual((told["kind"], told["remaining_bytes"]), ("dirty", CHUNK))
        self.assertNotEqual(self.world.group.generation, generation)
        info = self.world.attach()
        self.assertTrue(info["refresh"]["dirty"])
        self.mirror_all()
        self.assertTrue(self.world.group.coherent)

    def test_by_itself_where_auto_refresh_says_so(self) -> None:
        config = self.world.config
        tunables = replace(config.tunables, auto_refresh=True)
        self.world.config = replace(config, tunables=tunables)
        self.lost(self.world.kill_master)
        self.world.attach()
        self.link("connecting")
        self.assertEqual(self.world.group.status()["state"], "bypass")
        self.link("refused", awaits_refresh=True)
        self.assertEqual(self.world.group.status()["state"], "refresh")

    def test_lost_again_before_the_refresh_ends(self) -> None:
        self.lost(self.world.kill_master)
        self.world.attach()
        self.switch("off")
        self.world.client.write(self.unit, 0, unique(2))
        self.world.settle()
        self.world.kill_master()
        self.unit = self.world.start()
        group = self.world.group
        self.assertEqual((group.status()["state"], group.coherent), ("bypass", False))
        self.assertEqual(self.dirty(), [0, 5])
        self.world.attach()
        self.assertEqual(self.switch("off")["kind"], "dirty")

    def test_lost_again_and_again(self) -> None:
        """There is always a way out, and the secondary that never got on stays known."""
        first = self.world.group.generation
        for n in range(2 * GENERATIONS_MAX):
            self.world.client.write(self.unit, 0, unique(n + 1))
            self.world.settle()
            self.world.kill_master()
            self.unit = self.world.start()
            self.world.attach()
            self.assertEqual(self.switch("off")["kind"], "dirty")
        known = [bytes.fromhex(one) for one in self.world.attach()["generations"]]
        self.assertEqual((known[0], known[-1]), (first, self.world.group.generation))
        self.assertEqual(len(set(known)), GENERATIONS_MAX)

    def test_left_empty_by_an_orderly_stop(self) -> None:
        """Where the secondary has everything, the history goes on: there was nothing to lose."""
        self.world.attach()
        self.world.client.write(self.unit, 0, unique(1))
        self.world.settle()
        self.world.commit()
        before = self.world.group.generation, self.unit.framed_point, self.world.group.next_gsn
        self.stop()
        self.world.kill_master()
        unit = self.world.start()
        group = self.world.group
        self.assertEqual((group.generation, unit.framed_point, group.next_gsn), before)
        self.assertEqual(group.status()["state"], "accumulating")

    def test_left_in_order_with_something_to_send(self) -> None:
        self.world.client.write(self.unit, 5 * CHUNK, unique(1))
        self.world.settle()
        self.stop()
        self.world.kill_master()
        self.unit = self.world.start()
        self.check_lost(self.world.group.status())

    def stop(self) -> None:
        stopped = self.world.group.stop()
        self.world.settle()
        self.successResultOf(stopped)

    def test_a_stop_waits_for_a_secondary_that_is_there(self) -> None:
        self.world.attach()
        self.link()
        self.world.client.write(self.unit, 0, unique(1))
        self.world.settle()
        stopped = self.world.group.stop()
        self.world.settle()
        self.assertNoResult(stopped)
        self.world.commit()
        self.world.settle()
        self.successResultOf(stopped)

    def test_but_not_for_ever(self) -> None:
        self.world.attach()
        self.link()
        self.world.client.write(self.unit, 0, unique(1))
        stopped = self.world.group.stop()
        self.world.settle(MEMORY_DRAIN_SECONDS + 1)
        self.successResultOf(stopped)


class OverflowTests(MemoryCase):
    more = {"metadata_seconds": 0.05}  # noqa: RUF012

    def test_spills_to_the_bitmap_and_comes_back(self) -> None:
        """What is undelivered stays deliverable, and its bits stand: a power cut may still come."""
        self.world.config = replace(self.world.config, on_overflow="bypass")
        self.world.kill()
        self.unit = self.world.start()
        requests = [
            self.world.client.write(self.unit, n * 4 * KIB % (16 * CHUNK), unique(n, 16 * KIB))
            for n in range(100)
        ]
        self.world.settle()
        self.assertEqual(self.world.client.done, requests)
        self.assertEqual(self.world.group.status()["state"], "bypass")
        held = self.unit.durable_end - self.unit.committed_end
        self.assertGreater(held, 0)
        self.assertEqual(self.dirty(), list(range(7)))
        self.world.attach()
        self.world.commit()
        self.world.settle(1)
        self.assertEqual(self.switch("off")["kind"], "dirty")
        self.mirror_all()

    def test_full_of_what_can_never_be_sent(self) -> None:
        """Begun anew, as the hint says, they have room again, and a refresh leads out."""
        self.world.config = replace(self.world.config, on_overflow="bypass")
        self.world.kill()
        self.unit = self.world.start()
        for n in range(100):
            self.world.client.write(self.unit, n * 4 * KIB % (16 * CHUNK), unique(n, 16 * KIB))
        self.world.settle()
        refused: list[Any] = []
        for _turn in range(100):
            self.world.group.refresh("full").addErrback(refused.append)
            self.world.settle()
            if refused:
                break
            self.switch("on")
        self.assertIn("no room", refused[0].value.message)
        self.assertIn("launchdriver", refused[0].value.hint)
        self.world.kill_master()
        self.unit = self.world.start()
        self.world.attach()
        begun = self.world.group.refresh("full")
        self.world.settle()
        self.successResultOf(begun)
        self.mirror_all()
        self.assertTrue(self.world.group.coherent)
