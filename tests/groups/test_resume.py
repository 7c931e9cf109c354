"""Where a primary goes on, by what the secondary says and by the refresh that runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.records import Cursor, Point
from qdsmirror.errors import DivergedError, ProtocolError
from qdsmirror.groups.outbound import OutUnit
from qdsmirror.groups.resume import RefreshLostError, agreed_gsn, at_cut, is_covered
from qdsmirror.net.handshake import UnitPosition

OLD, NEW, OTHER = b"O" * 16, b"N" * 16, b"X" * 16


def positions(generation: bytes = OLD, sequence: int = 4, gsn: int = 9) -> list[UnitPosition]:
    """Give the places of two LDSUs."""
    return [UnitPosition(index, generation, sequence, b"c" * 16, gsn) for index in range(2)]


class AgreedTests(SynchronousTestCase):
    """The secondary's place is one, of a history that the primary knows."""

    def test_known_generation(self) -> None:
        for generation in (OLD, NEW):
            self.assertEqual(agreed_gsn(positions(generation), [OLD, NEW]), 9)

    def test_another_generation(self) -> None:
        one, two = positions()
        for told in (positions(OTHER), positions(b""), [one, replace(two, generation=OTHER)]):
            error = self.assertRaises(DivergedError, agreed_gsn, told, [OLD, NEW])
            self.assertIn(f"than the primary ({NEW.hex()})", error.message)

    def test_blank_secondary(self) -> None:
        self.assertEqual(agreed_gsn(positions(b"", 1, 1), [OLD, NEW]), 1)
        one, two = positions(b"", 1, 1)
        self.assertRaises(DivergedError, agreed_gsn, [one, replace(two, next_sequence=2)], [OLD])

    def test_two_places(self) -> None:
        one, two = positions()
        self.assertRaises(ProtocolError, agreed_gsn, [one, replace(two, next_gsn=8)], [OLD])


class CoveredTests(SynchronousTestCase):
    """Dirty bits stand for what a secondary lacks only in what was lost, behind what it had."""

    def covered(self, upto: int | None, committed: int = 5, **where: Any) -> bool:
        class Unit:
            def __init__(self, gsn: int) -> None:
                self.committed = Cursor(0, gsn)

        units = [Unit(3), Unit(committed)]
        return is_covered(positions(**where), cast("list[OutUnit]", units), [OLD, NEW], upto)

    def test_within(self) -> None:
        for gsn in (5, 9, 20):
            self.assertTrue(self.covered(20, gsn=gsn))

    def test_what_it_had_is_lost(self) -> None:
        """Bits of that may be cleared."""
        self.assertFalse(self.covered(20, gsn=4))
        self.assertFalse(self.covered(20, committed=10))

    def test_ahead_of_what_was_lost(self) -> None:
        """The writelogs hold that: it must be proven."""
        self.assertFalse(self.covered(20, gsn=21))

    def test_of_another_history(self) -> None:
        self.assertFalse(self.covered(20, generation=OTHER))
        self.assertFalse(self.covered(20, generation=b""))

    def test_nothing_was_lost(self) -> None:
        self.assertFalse(self.covered(None))


class CutTests(SynchronousTestCase):
    """A refresh replaces any history, as long as nothing that it has brought is lost."""

    REFRESH: dict[str, Any] = {
        "id": "ab" * 16,
        "cut": {"gsn": 30, "points": {"0": [4096, 7, "11" * 16], "1": [8192, 8, "22" * 16]}},
    }

    def units(self, *committed: int) -> list[OutUnit]:
        class Unit:
            def __init__(self, index: int, position: int) -> None:
                self.index = index
                self.committed = Cursor(position)

        return [cast(OutUnit, Unit(index, at)) for index, at in enumerate(committed)]

    def at_cut(self, *committed: int) -> Any:
        error = DivergedError("why")
        return at_cut(self.REFRESH, positions(OTHER), self.units(*committed), NEW, error)

    def test_both_sides_go_on_from_the_cut(self) -> None:
        found = self.at_cut(4096, 8192)
        self.assertEqual(found.next_gsn, 30)
        points = [Point(7, b"\x11" * 16), Point(8, b"\x22" * 16)]
        for index, (place, point) in enumerate(zip((4096, 8192), points, strict=True)):
            self.assertEqual(found.cursors[index], Cursor(place, 30, {index: point}))
            told = found.rebases[index]
            self.assertEqual((told.index, told.next_gsn), (index, 30))
            self.assertEqual((told.next_sequence, told.chain), point)
            self.assertEqual((told.generation, told.predecessor), (NEW, OTHER))
            self.assertEqual(told.refresh_id, b"\xab" * 16)

    def test_lost_part_of_the_refresh(self) -> None:
        error = self.assertRaises(RefreshLostError, self.at_cut, 4096, 8193)
        self.assertEqual(error.refresh, self.REFRESH["id"])
        self.assertIn("(why)", error.message)
        self.assertIsInstance(error.__cause__, DivergedError)
