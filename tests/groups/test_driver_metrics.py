"""What the driver counts and estimates for qdsinfo and the metrics."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import nbd
from qdsmirror.core.latency import BOUNDS_SECONDS
from qdsmirror.groups.driver_status import waits_for_room
from tests.groups.world import BLOCK, KIB, MIB, DriverWorld, FakeConnection, unique


def writelog_of(world: DriverWorld, index: int = 0) -> dict[str, Any]:
    status: dict[str, Any] = world.group.status()["ldsus"][index]["writelog"]
    return status


class FillingTests(SynchronousTestCase):
    """``seconds_to_full``: the time until the writelog is full at its present rate."""

    def write_for(self, world: DriverWorld, seconds: int, blocks: int) -> None:
        for turn in range(seconds):
            for block in range(blocks):
                world.client.write(world.group.units[0], block * BLOCK, unique(turn))
            world.settle(1.0)

    def test_an_outage_fills_it(self) -> None:
        world = DriverWorld(self, log=8 * MIB)
        unit = world.start()
        self.assertIsNone(writelog_of(world)["seconds_to_full"])
        self.write_for(world, 30, 4)
        # Each block is a frame of its own: a record of 8 KiB.
        free = unit.writelog.free_bytes
        self.assertAlmostEqual(writelog_of(world)["seconds_to_full"], free / (32 * KIB), 1)
        before = writelog_of(world)["seconds_to_full"]
        self.write_for(world, 5, 4)
        self.assertAlmostEqual(writelog_of(world)["seconds_to_full"], before - 5, 1)

    def test_a_link_that_keeps_up_does_not(self) -> None:
        world = DriverWorld(self, log=8 * MIB)
        world.start()
        world.attach()
        for _ in range(30):
            self.write_for(world, 1, 4)
            world.commit()
        world.settle(1.0)
        self.assertIsNone(writelog_of(world)["seconds_to_full"])

    def test_a_write_that_waits_for_room_finds_it_full(self) -> None:
        world = DriverWorld(self, log=256 * KIB)
        unit = world.start()
        for number in range(60):
            world.client.write(unit, number * BLOCK, unique(number))
            world.settle(0.01)
        self.assertTrue(waits_for_room(unit))
        self.assertGreater(unit.writelog.free_bytes, 0)
        self.assertEqual(writelog_of(world)["seconds_to_full"], 0.0)

    def test_not_full_when_another_bound_holds_writes_back(self) -> None:
        world = DriverWorld(self, log=8 * MIB, stepped=True)
        unit = world.start()
        world.client.write(unit, 0, unique(1))
        world.client.write(unit, BLOCK, unique(2))
        self.assertFalse(waits_for_room(unit), "an append is under way")
        world.settle()


class LatencyTests(SynchronousTestCase):
    """How long writes took, from their arrival to their answer."""

    def setUp(self) -> None:
        self.world = DriverWorld(self, stepped=True)
        self.unit = self.world.start()
        self.world.settle()

    def counted(self) -> dict[float, int]:
        """Give what was counted, by the upper ends of the buckets that hold something."""
        told = self.world.group.status()["latency"]["qds0"]
        self.assertEqual(told["bounds_seconds"], list(BOUNDS_SECONDS))
        bounds = [*BOUNDS_SECONDS, float("inf")]
        return {
            bound: count
            for bound, count in zip(bounds, told["counts"], strict=True)
            if count
        }  # fmt: skip

    def seconds(self) -> float:
        seconds: float = self.world.group.status()["latency"]["qds0"]["seconds"]
        return seconds

    def test_a_write_until_it_is_in_the_writelog(self) -> None:
        self.world.client.write(self.unit, 0, unique(1))
        self.world.reactor.advance(0.2)
        self.assertEqual(self.counted(), {})
        self.world.step("qds0 writelog")
        self.assertEqual(self.counted(), {0.25: 1})
        self.assertAlmostEqual(self.seconds(), 0.2)
        self.world.settle()
        self.assertEqual(self.counted(), {0.25: 1}, "counted once")

    def test_a_write_through_until_it_is_durable(self) -> None:
        self.world.client.write(self.unit, 0, unique(1), fua=True)
        self.world.step("qds0 writelog")
        self.world.reactor.advance(0.7)
        self.assertEqual(self.counted(), {})
        self.world.step("qds0 commit")
        self.assertEqual(self.counted(), {1.0: 1})

    def test_those_that_came_together_and_others(self) -> None:
        client = self.world.client
        together = [client.request(nbd.CMD_WRITE, n * BLOCK, BLOCK, unique(n)) for n in range(3)]
        self.unit.submit(together)
        self.world.reactor.advance(0.02)
        client.ask(self.unit, nbd.CMD_TRIM, 0, BLOCK)
        client.ask(self.unit, nbd.CMD_WRITE_ZEROES, 0, BLOCK)
        self.world.reactor.advance(0.02)
        self.world.step("qds0 writelog", 2)
        self.assertEqual(self.counted(), {0.05: 3, 0.025: 2})
        self.assertAlmostEqual(self.seconds(), 3 * 0.04 + 2 * 0.02)

    def test_reads_and_flushes_do_not_count(self) -> None:
        client = self.world.client
        client.ask(self.unit, nbd.CMD_READ, 0, BLOCK)
        client.flush(self.unit)
        self.world.settle()
        self.assertEqual(self.counted(), {})

    def test_what_is_never_answered_does_not_count(self) -> None:
        gone = FakeConnection()
        gone.write(self.unit, 0, unique(1))
        self.world.client.write(self.unit, BLOCK, unique(2))
        self.world.client.write(self.unit, 2 * BLOCK, unique(3))
        self.world.client.gone = True
        self.world.settle()
        self.assertEqual(sum(self.counted().values()), 1)

    def test_writes_in_bypass(self) -> None:
        asked = self.world.group.switch_bypass("on")
        self.world.settle()
        self.successResultOf(asked)
        written = self.world.client.write(self.unit, 0, unique(1))
        self.world.client.flush(self.unit)
        self.world.settle()
        self.assertIn(written, self.world.client.done)
        self.assertEqual(sum(self.counted().values()), 1)

    def test_a_clock_that_is_set_back_counts_as_no_time(self) -> None:
        self.world.client.write(self.unit, 0, unique(1))
        self.world.reactor.rightNow -= 3600
        self.world.step("qds0 writelog")
        self.assertEqual(self.counted(), {BOUNDS_SECONDS[0]: 1})
        self.assertEqual(self.seconds(), 0.0)


class CommitTests(SynchronousTestCase):
    def test_when_the_secondary_last_committed_something_new(self) -> None:
        world = DriverWorld(self)
        unit = world.start()
        world.attach()
        world.client.write(unit, 0, unique(1))
        world.settle(1.0)
        self.assertIsNone(world.group.status()["last_commit"])
        world.commit()
        first = world.group.runtime.wall()
        self.assertEqual(world.group.status()["last_commit"], first)
        world.settle(5.0)
        world.commit()
        self.assertEqual(world.group.status()["last_commit"], first, "nothing new")
        world.client.write(unit, 0, unique(2))
        world.settle(1.0)
        world.commit()
        self.assertEqual(world.group.status()["last_commit"], world.group.runtime.wall())
