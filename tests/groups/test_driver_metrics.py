"""What the driver counts and estimates for qdsinfo and the metrics."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.groups.world import BLOCK, KIB, MIB, DriverWorld, unique


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
        self.assertTrue(unit.waits_for_room)
        self.assertGreater(unit.writelog.free_bytes, 0)
        self.assertEqual(writelog_of(world)["seconds_to_full"], 0.0)

    def test_not_full_when_another_bound_holds_writes_back(self) -> None:
        world = DriverWorld(self, log=8 * MIB, stepped=True)
        unit = world.start()
        world.client.write(unit, 0, unique(1))
        world.client.write(unit, BLOCK, unique(2))
        self.assertFalse(unit.waits_for_room, "an append is under way")
        world.settle()
