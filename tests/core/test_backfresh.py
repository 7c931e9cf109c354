"""What superblocks say of a backfresh: records, crashes between two of them, and the end."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.backfresh import (
    ENDED,
    INTERRUPTED,
    NEEDED,
    RUNNING,
    BackfreshState,
    after,
    completed,
    needed,
)
from qdsmirror.core.generations import awaits_switch, settle
from qdsmirror.core.records import BoundUnit, Cursor, Generation, Point
from qdsmirror.core.superblock import Superblock, layout
from qdsmirror.limits import GENERATIONS_MAX

SIZE = 1 << 20
OWN, OLDER, THEIRS, NEW = (Generation(n * 16, g) for n, g in
                           ((b"O", 50), (b"o", 1), (b"t", 7), (b"N", 7)))  # fmt: skip


def superblock(index: int = 0, **changes: Any) -> Superblock:
    slot, ring, bitmap = layout(SIZE, 1, 4096, SIZE)
    head = Cursor(8192, 60, {index: Point(9, b"h" * 16)})
    known = {"generations": (OLDER, OWN), "head": head, "applied": head, "tail": Cursor()}
    return Superblock(
        role="writelog", log=b"L" * 16, group=0,
        units=(BoundUnit(index, f"qds{index}", SIZE, ""),),
        ring=ring, device_bytes=SIZE, bitmap=bitmap, slot_bytes=slot, **known | changes,
    )  # fmt: skip


def state(phase: str = RUNNING, **more: Any) -> BackfreshState:
    known = {"generation": OWN.id, "gsn": 60, "point": Point(9, b"h" * 16)}
    return BackfreshState(b"I" * 16, phase, 5.0, **known | more)


def holding(index: int, one: BackfreshState | None) -> Superblock:
    return superblock(index, backfresh=one.to_json() if one is not None else None)


class RecordTests(SynchronousTestCase):
    def test_there_and_back(self) -> None:
        whole = state(ENDED, reason="x", keep="/k", discard=NEW.id, done=7, changed=3, lacked=True)
        body = json.loads(json.dumps(whole.to_json()))
        self.assertEqual(BackfreshState.from_json(body), whole)
        self.assertEqual(BackfreshState.of(superblock(backfresh=body)), whole)
        self.assertIsNone(BackfreshState.of(superblock()))

    def test_it_stands_in_a_superblock(self) -> None:
        one = holding(0, state())
        body = json.loads(json.dumps(one.to_json()))
        found = Superblock.from_json(body, one.counter, one.slot_bytes)
        self.assertEqual(BackfreshState.of(found), state())

    def test_what_cannot_be_read(self) -> None:
        good = state().to_json()
        for key, value in (
            ("phase", "walking"), ("done", -1), ("done", "1"), ("mirror", [1]), ("id", 5),
            ("started", "now"), ("keep", None), ("reason", 1), ("discard", "zz"),
        ):  # fmt: skip
            with self.assertRaises(ValueError, msg=key):
                BackfreshState.from_json(good | {key: value})
        for key in good:
            with self.assertRaises(ValueError, msg=key):
                BackfreshState.from_json({k: v for k, v in good.items() if k != key})


class EndTests(SynchronousTestCase):
    def test_a_history_that_was_kept_goes_on(self) -> None:
        changes = after(superblock(), state(ENDED))
        self.assertEqual(changes["backfresh"], None)
        self.assertTrue(changes["coherent"])
        self.assertNotIn("generations", changes)
        self.assertNotIn("tail", changes)

    def given_up(self, **changes: Any) -> Superblock:
        made = superblock(**changes)
        one = state(ENDED, generation=OLDER.id, gsn=7, point=Point(3, b"p" * 16), discard=NEW.id)
        return replace(made, **after(made, one))

    def test_a_history_that_was_given_up_begins_anew_at_the_mirror(self) -> None:
        ended = self.given_up()
        self.assertEqual(ended.generations, (OLDER, NEW))
        place = Cursor(8192, 7, {0: Point(3, b"p" * 16)})
        self.assertEqual((ended.tail, ended.applied, ended.head), (place, place, place))
        self.assertEqual(ended.durable_gsn, 6)
        self.assertTrue(awaits_switch(ended.generations, 7))
        Superblock.from_json(json.loads(json.dumps(ended.to_json())), 0, ended.slot_bytes)

    def test_another_history_than_any_of_ours(self) -> None:
        made = superblock()
        one = state(ENDED, generation=b"t" * 16, gsn=7, discard=NEW.id)
        self.assertEqual(after(made, one)["generations"], (THEIRS, NEW))

    def test_in_bypass_the_next_generation_waits_for_its_end(self) -> None:
        ended = self.given_up(bypass={"id": "00"})
        self.assertEqual(ended.generations, (OLDER,))
        self.assertFalse(awaits_switch(ended.generations, 7))
        self.assertIsNotNone(ended.bypass)

    def test_a_full_list_stays_bounded(self) -> None:
        many = tuple(Generation(bytes([n]) * 16, n + 1) for n in range(GENERATIONS_MAX))
        made = superblock(generations=many)
        one = state(ENDED, generation=many[-1].id, gsn=60, discard=NEW.id)
        found = after(made, one)["generations"]
        self.assertEqual(len(found), GENERATIONS_MAX)
        self.assertEqual(found[-2:], (many[-1], Generation(NEW.id, 60)))


class CompletedTests(SynchronousTestCase):
    """A crash came between two superblocks."""

    def of(self, *states: BackfreshState | None) -> list[BackfreshState | None]:
        found = completed([holding(i, one) for i, one in enumerate(states)])
        return [BackfreshState.of(one) for one in found]

    def test_all_agree(self) -> None:
        for one in (state(), needed(b"n" * 16, 1.0, "why"), None):
            self.assertEqual(self.of(one, one), [one, one])

    def test_each_has_come_as_far_as_it_has(self) -> None:
        self.assertEqual(self.of(state(done=5), state()), [state(done=5), state()])

    def test_marked_in_some_only_nothing_was_overwritten(self) -> None:
        self.assertEqual(self.of(state(), None), [None, None])
        self.assertEqual(self.of(None, state()), [None, None])

    def test_but_what_lacked_blocks_before_still_does(self) -> None:
        before = needed(b"n" * 16, 1.0, "its device was replaced")
        first, second = self.of(state(lacked=True, reason=before.reason), before)
        self.assertEqual(second, before)
        assert first is not None
        self.assertEqual((first.phase, first.reason), (NEEDED, before.reason))
        self.assertEqual(self.of(state(), before), [None, before])

    def test_killed_in_some_is_killed(self) -> None:
        first, second = self.of(state(NEEDED, reason=INTERRUPTED), state(done=3))
        assert first is not None and second is not None
        self.assertEqual((first.phase, second.phase), (NEEDED, NEEDED))
        self.assertEqual(second.reason, INTERRUPTED)

    def test_ended_in_one_has_ended_in_all(self) -> None:
        for others in (state(), state(ENDED), None):
            self.assertEqual(self.of(state(ENDED), others), [None, None])

    def test_ended_and_written_in_some_is_one_history(self) -> None:
        points = [Point(3 + i, bytes([i]) * 16) for i in range(2)]
        ended = [
            holding(i, state(ENDED, generation=b"t" * 16, gsn=7, point=point, discard=NEW.id))
            for i, point in enumerate(points)
        ]
        written = replace(ended[0], **after(ended[0], BackfreshState.of(ended[0])))  # type: ignore[arg-type]
        for left in ([written, ended[1]], [ended[1], written], ended):
            found = completed(left)
            settled = settle(found)
            self.assertEqual(settled.generations, (THEIRS, NEW))
            self.assertTrue(settled.coherent)
            for one in found:
                index = one.units[0].index
                self.assertEqual(one.applied.points, {index: points[index]})
