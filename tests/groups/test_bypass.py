"""Bypass at the primary: the way in, what is written in it, the way out; crashes at every step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.frames import BREAK, REFRESH_BEGIN, SWITCH
from tests.groups.world import BLOCK, KIB, MIB, DriverWorld, unique


def overflowing(test: SynchronousTestCase, **more: Any) -> DriverWorld:
    """Make a world whose group goes into bypass when its log is full."""
    world = DriverWorld(test, **{"log": 256 * KIB, **more})
    world.config = replace(world.config, on_overflow="bypass")
    return world


def kinds(world: DriverWorld, index: int = 0) -> list[int]:
    """Read the kinds of the frames in a writelog, as the pmd would."""
    unit = world.group.units[index]
    return [found.header.kind for found in unit.writelog.reader(unit.writelog.superblock.tail)]


class OverflowTests(SynchronousTestCase):
    def test_full_log_leads_into_bypass_and_no_write_waits(self) -> None:
        world = overflowing(self)
        unit = world.start()
        requests = [world.client.write(unit, n * BLOCK, unique(n)) for n in range(100)]
        world.settle()
        self.assertEqual(world.client.done, requests)
        self.assertEqual(world.group.state, "bypass")
        self.assertEqual(kinds(world)[-1], BREAK)
        self.assertEqual(world.data().content()[: 100 * BLOCK],
                         b"".join(unique(n) for n in range(100)))  # fmt: skip

    def test_leaving_begins_a_generation_with_a_switch(self) -> None:
        world = overflowing(self, log=MIB)
        unit = world.start()
        world.client.write(unit, 0, unique(1))
        self.successResultOf(world.group.switch_bypass("on"))
        before = world.group.generation
        world.client.write(unit, BLOCK, unique(2))
        left = world.group.switch_bypass("off")
        world.settle()
        self.successResultOf(left)
        self.assertNotEqual(world.group.generation, before)
        self.assertEqual(kinds(world)[1:4], [BREAK, SWITCH, REFRESH_BEGIN])
