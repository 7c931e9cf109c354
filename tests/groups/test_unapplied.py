"""What a child's groups hold in memory together is bounded, and none stops the others."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.groups.unapplied import Unapplied
from tests.groups.world import BLOCK, KIB, MIB, DriverWorld, unique


class FakeGroup:
    def __init__(self) -> None:
        self.woken = 0

    def frame_again(self) -> None:
        self.woken += 1


class UnappliedTests(SynchronousTestCase):
    def test_one_bound_for_all(self) -> None:
        pool, one, other = Unapplied(100, 10), FakeGroup(), FakeGroup()
        pool.take(one, 60)
        pool.take(other, 30)
        self.assertTrue(pool.has_room(one))
        pool.take(one, 20)
        self.assertFalse(pool.has_room(one))
        self.assertFalse(pool.has_room(other))
        pool.give(one, 11)
        self.assertTrue(pool.has_room(other))
        self.assertEqual((one.woken, other.woken), (0, 1))
        pool.give(one, 1)
        self.assertEqual(other.woken, 1)

    def test_a_group_that_stands_still_leaves_the_others_their_share(self) -> None:
        pool, still, other = Unapplied(100, 10), FakeGroup(), FakeGroup()
        pool.take(still, 100)
        self.assertTrue(pool.has_room(other))
        pool.take(other, 10)
        self.assertFalse(pool.has_room(other))
        pool.give(other, 5)
        self.assertTrue(pool.has_room(other))

    def test_what_an_ended_group_held_is_free(self) -> None:
        pool, one, other = Unapplied(100, 0), FakeGroup(), FakeGroup()
        pool.take(one, 100)
        pool.take(other, 1)
        pool.leave(one)
        self.assertEqual((pool.held_bytes, other.woken), (1, 1))
        pool.leave(one)
        self.assertEqual(pool.held_bytes, 1)


class TwoGroupsTests(SynchronousTestCase):
    def test_two_drivers_share_and_wake_each_other(self) -> None:
        worlds = [DriverWorld(self, log=4 * MIB, stepped=True) for _ in range(2)]
        pool = Unapplied(64 * KIB, 0)
        for world in worlds:
            world.start()
            world.group.runtime.unapplied = pool
        first, second = worlds
        for number in range(16):
            first.client.write(first.group.units[0], number * BLOCK, unique(number))
            first.steps["qds0 writelog"].step_all()
        self.assertFalse(first.group.may_frame)
        asked = second.client.write(second.group.units[0], 0, unique(99))
        second.steps["qds0 writelog"].step_all()
        self.assertEqual(second.frames, [])
        first.settle()
        self.assertEqual(len(second.frames), 1)
        second.settle()
        self.assertEqual(second.client.done, [asked])
        self.assertEqual(pool.held_bytes, 0)

    def test_a_driver_that_stops_gives_back_what_it_holds(self) -> None:
        world = DriverWorld(self)
        unit = world.start()
        world.data().fail("pwritev")
        world.client.write(unit, 0, unique(1))
        stopped = world.group.stop()
        world.settle()
        self.successResultOf(stopped)
        self.assertEqual(world.group.runtime.unapplied.held_bytes, 0)
