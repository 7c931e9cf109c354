"""What superblocks of different age say together, and the bounded list."""

from __future__ import annotations

from itertools import product
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.generations import awaits_switch, begun, covering, grown, settle
from qdsmirror.core.records import BoundUnit, Generation
from qdsmirror.core.ring import Ring
from qdsmirror.core.superblock import Superblock
from qdsmirror.errors import BrokenError
from qdsmirror.limits import GENERATIONS_MAX, MIB

FIRST, SECOND, THIRD = (Generation(bytes([n]) * 16, n * 10) for n in (1, 2, 3))
BYPASS = {"id": "ab", "since": 1.0, "reason": "full"}
REFRESH = {"id": "cd", "started": 2.0, "cut": None, "done": 0}


def superblock(*generations: Generation, **more: Any) -> Superblock:
    return Superblock(
        role="writelog",
        log=bytes(16),
        group=0,
        units=(BoundUnit(0, "qds0", MIB, ""),),
        ring=Ring(16384, MIB, 4096),
        device_bytes=2 * MIB,
        generations=generations,
        **more,
    )


class SettleTests(SynchronousTestCase):
    def test_all_say_the_same(self) -> None:
        settled = settle([superblock(FIRST, coherent=True)] * 2)
        self.assertEqual((settled.bypass, settled.coherent, settled.uneven), (None, True, False))
        settled = settle([superblock(FIRST, coherent=True, bypass=BYPASS)] * 2)
        self.assertEqual((settled.bypass, settled.coherent, settled.uneven), (BYPASS, True, False))

    def test_entering_is_completed(self) -> None:
        before = superblock(FIRST, coherent=True)
        after = superblock(FIRST, coherent=True, bypass=BYPASS)
        for pair in ((before, after), (after, before)):
            settled = settle(pair)
            self.assertEqual(
                (settled.bypass, settled.coherent, settled.uneven), (BYPASS, True, True)
            )

    def test_entering_ends_a_refresh(self) -> None:
        before = superblock(FIRST, refresh=REFRESH)
        after = superblock(FIRST, bypass=BYPASS)
        settled = settle([before, after])
        self.assertEqual((settled.refreshes, settled.coherent), ([None, None], False))

    def test_leaving_is_completed(self) -> None:
        before = superblock(FIRST, coherent=True, bypass=BYPASS)
        after = superblock(FIRST, SECOND, refresh=REFRESH, reason="a refresh is in progress")
        for pair, refreshes in (
            ((before, after), [None, REFRESH]),
            ((after, before), [REFRESH, None]),
        ):
            settled = settle(pair)
            self.assertEqual(settled.generations, (FIRST, SECOND))
            self.assertEqual((settled.bypass, settled.coherent), (None, False))
            self.assertEqual((settled.refreshes, settled.uneven), (refreshes, True))
            self.assertEqual(settled.reason, "a refresh is in progress")

    def test_what_was_left_before_does_not_come_back(self) -> None:
        # Bypass in the older generation alone is what the leaving has overcome.
        old = superblock(FIRST, SECOND, bypass=BYPASS)
        new = superblock(FIRST, SECOND, THIRD, refresh=REFRESH)
        self.assertIsNone(settle([old, new, old]).bypass)

    def test_other_histories(self) -> None:
        for one, other in product((superblock(FIRST), superblock()), (superblock(SECOND, THIRD),)):
            self.assertRaises(BrokenError, settle, [one, other])
            self.assertRaises(BrokenError, settle, [other, one])


class ListTests(SynchronousTestCase):
    def test_bounded_by_what_is_needed(self) -> None:
        full = tuple(Generation(bytes([n]) * 16, n * 10) for n in range(1, GENERATIONS_MAX + 1))
        new = Generation(b"n" * 16, 1000)
        self.assertEqual(grown(full[:3], new, 0), (*full[:3], new))
        self.assertIsNone(grown(full, new, 19))
        self.assertEqual(grown(full, new, 20), (*full[1:], new))
        self.assertEqual(grown((), new, 0), (new,))

    def test_what_was_lost_makes_room_but_for_the_first(self) -> None:
        full = tuple(Generation(bytes([n]) * 16, n * 10) for n in range(1, GENERATIONS_MAX + 1))
        new = Generation(b"n" * 16, 1000)
        self.assertIsNone(grown(full, new, 0, 28))
        self.assertEqual(grown(full, new, 0, 29), (full[0], *full[2:], new))
        self.assertEqual(grown(full[:3], new, 0, 999), (*full[:3], new))

    def test_begun_with_its_switch(self) -> None:
        known = (FIRST, SECOND)
        for gsn, count in ((99, 2), (21, 2), (20, 1), (11, 1), (10, 1), (1, 1)):
            self.assertEqual(begun(known, gsn), known[:count])
        self.assertEqual(begun((), 1), ())

    def test_covering(self) -> None:
        known = (FIRST, SECOND)
        for gsn, index in ((9, None), (10, 0), (19, 0), (20, 1), (99, 1)):
            self.assertEqual(covering(known, gsn), index)

    def test_awaits_switch(self) -> None:
        self.assertTrue(awaits_switch((FIRST, SECOND), 20))
        self.assertFalse(awaits_switch((FIRST, SECOND), 21))
        self.assertFalse(awaits_switch((FIRST,), 10))
