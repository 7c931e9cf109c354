"""A checkpoint is in both superblock slots before space is used again (rules.md 5)."""

from __future__ import annotations

from twisted.trial.unittest import TestCase

from qdsmirror.core.superblock import parse_slot
from qdsmirror.storage.superblock import read_superblock
from tests.groups.world import DriverWorld, unique


class BothSlotsTests(TestCase):
    def test_either_slot_of_a_checkpoint_may_be_lost(self) -> None:
        world = DriverWorld(self)
        unit = world.start()
        world.attach()
        for number in range(4):
            world.client.write(unit, number * 4096, unique(number))
        world.settle()
        world.commit()
        assert world.group is not None
        world.group.checkpoints.take()
        world.settle()
        log = world.log()
        newest = read_superblock(log)
        self.assertGreater(newest.applied.position, 0)
        for slot in range(2):
            raw = log.pread(newest.slot_bytes, slot * newest.slot_bytes)
            found = parse_slot(raw, slot, newest.slot_bytes)
            self.assertEqual((found.applied, found.tail), (newest.applied, newest.tail))
