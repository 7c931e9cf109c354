"""The way out of bypass: room for it, and what full writelogs hold that can never be sent."""

from __future__ import annotations

from typing import Any

from qdsmirror.core.watermark import LINK, Committed, pack_json
from qdsmirror.errors import DegradedError
from qdsmirror.groups.unit import DriverUnit
from tests.fakes import nothing
from tests.groups.test_bypass import Case, make_coherent, overflowing
from tests.groups.world import BLOCK, KIB, DriverWorld, durable_superblock, unique


def overflow(world: DriverWorld) -> DriverUnit:
    """Start the driver, and write until its group is in bypass."""
    unit = world.start()
    for number in range(100):
        world.client.write(unit, number * BLOCK, unique(number))
    world.settle()
    world.test.assertEqual(world.group.bypass.phase, "on")
    return unit


class RoomTests(Case):
    def test_a_break_leaves_room_for_what_must_follow(self) -> None:
        for more in range(3):
            world = self.world = overflowing(self, log=256 * KIB + more * 4 * KIB)
            unit = overflow(world)
            for turn in range(20):
                asked = world.group.refresh("full")
                world.settle()
                refused: list[Any] = []
                asked.addErrback(refused.append)
                if refused:
                    break
                could = unit.writelog.control_room(120) >= 2
                self.switch("on")
                self.assertEqual(unit.writelog.control_room(120) >= 2, could, turn)
            self.assertIsInstance(refused[0].value, DegradedError)
            self.assertIn("bring the secondary back", refused[0].value.hint)
            world.client.write(unit, 0, unique(777))
            self.assertEqual(world.data().content()[:BLOCK], unique(777))
            # The secondary is back: there is room again.
            world.attach()
            world.commit(ends=[Committed(0, unit.durable_end, *unit.durable_point)])
            world.settle()
            self.leave_by_a_full_refresh()
            self.mirror_all()


class UnsendableTests(Case):
    """Full writelogs, and a secondary that has another history (TAIL, GENERATION)."""

    def setUp(self) -> None:
        world = self.world = overflowing(self)
        make_coherent(world)
        unit = overflow(world)
        for _ in range(20):
            if unit.writelog.control_room(120) < 2:
                break
            self.leave_by_a_full_refresh()
            self.switch("on")
        self.refuse("off", DegradedError, "no room")

    def diverge(self) -> None:
        self.world.attach()
        said = {"state": "refused", "code": 4, "reason": "another history", "diverged": True}
        self.world.pmd.dataReceived(pack_json(LINK, {**said, "pid": 1}))
        self.world.settle()

    @property
    def tail(self) -> int:
        return durable_superblock(self.world.log().durable()).tail.position

    def test_given_up_where_it_can_never_be_sent(self) -> None:
        self.diverge()
        world, head = self.world, self.world.group.units[0].durable_end
        world.client.write(world.group.units[0], 0, unique(777))
        self.leave_by_a_full_refresh()
        found = durable_superblock(world.log().durable())
        self.assertEqual((found.coherent, found.tracked, found.bypass), (False, False, None))
        # Who was attached knows of places that are free now.
        self.assertIsNone(world.group.pmd.end)
        (told,) = world.attach()["units"]
        self.assertEqual(told["tail"]["position"], head)
        self.mirror_all()
        self.assertEqual(world.data().content()[:BLOCK], unique(777))
        self.assertEqual(world.client.errors, {})

    def test_not_for_a_refresh_that_would_not_do(self) -> None:
        self.diverge()
        before = self.tail
        asked = self.world.group.refresh("dirty")
        self.assertIn("lacks more", self.failureResultOf(asked, DegradedError).value.message)
        self.assertEqual(self.tail, before)

    def test_not_while_the_secondary_may_take_it(self) -> None:
        before = self.tail
        self.world.attach()
        said = {"state": "connecting", "code": 0, "reason": "no route", "pid": 1}
        self.world.pmd.dataReceived(pack_json(LINK, said))
        self.refuse("off", DegradedError, "no room")
        self.assertEqual(self.tail, before)

    def test_in_bypass_until_the_refresh_has_begun(self) -> None:
        """A power cut between the two leaves empty writelogs, in bypass."""
        self.diverge()
        given_up = self.world.group.way_out.give_up_unsendable()
        self.world.settle()
        self.successResultOf(given_up)
        self.world.crash(nothing)
        self.world.start()
        self.assertEqual(self.world.group.bypass.phase, "on")
        self.assertFalse(self.world.group.coherence.tracked)
        self.assertEqual(self.switch("off")["kind"], "smart")
