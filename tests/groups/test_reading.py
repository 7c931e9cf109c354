"""Reads against what is accepted and not yet applied, wherever the two overlap."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import nbd
from tests.groups.world import BLOCK, DriverWorld, unique


class OverlapTests(SynchronousTestCase):
    def test_every_range_around_one_pending_write(self) -> None:
        world = DriverWorld(self, stepped=True)
        old = b"".join(unique(100 + number) for number in range(8))
        world.data().corrupt(0, old)
        unit = world.start()
        world.client.write(unit, 3 * BLOCK, unique(1) + unique(2))
        expected = old[: 3 * BLOCK] + unique(1) + unique(2) + old[5 * BLOCK :]
        self.assertEqual(world.data().content()[: 8 * BLOCK], old)
        for first in range(0, 8 * BLOCK, BLOCK // 2):
            for length in (512, BLOCK // 2, BLOCK, 2 * BLOCK, 3 * BLOCK, 5 * BLOCK):
                if first + length <= len(expected):
                    found = world.client.read(unit, first, length)
                    self.assertEqual(found, expected[first : first + length], (first, length))

    def test_every_range_around_one_pending_trim(self) -> None:
        world = DriverWorld(self, stepped=True)
        old = b"".join(unique(100 + number) for number in range(8))
        world.data().corrupt(0, old)
        unit = world.start()
        world.client.ask(unit, nbd.CMD_TRIM, 3 * BLOCK, 2 * BLOCK)
        expected = old[: 3 * BLOCK] + bytes(2 * BLOCK) + old[5 * BLOCK :]
        for first in range(0, 8 * BLOCK, BLOCK // 2):
            for length in (512, BLOCK, 3 * BLOCK):
                if first + length <= len(expected):
                    found = world.client.read(unit, first, length)
                    self.assertEqual(found, expected[first : first + length], (first, length))
