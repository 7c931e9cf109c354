"""The recovery decision, walked exhaustively for small groups against a brute-force oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.records import Cursor
from qdsmirror.core.recovery import Finding, GsnRange, Recovery, decide
from qdsmirror.errors import CorruptError

RECORD = 4096


def finding(
    ldsu: int,
    gsns: Sequence[int],
    *,
    durable: int = 0,
    room: int = 99,
    applied_gsn: int = 1,
    expected: int = 0,
) -> Finding:
    """The scan of a log that holds frames of one entry with these GSNs."""
    reached = Cursor(len(gsns) * RECORD, gsns[-1] + 1 if gsns else applied_gsn)
    return Finding(
        ldsu=ldsu,
        name=f"qds{ldsu}",
        applied=Cursor(0, applied_gsn),
        expected=expected,
        reached=reached,
        durable_gsn=durable,
        ranges=[GsnRange(gsn, 1) for gsn in gsns],
        room=room,
        stopped="no record here",
    )


def histories(logs: int, frames: int) -> Iterator[list[list[int]]]:
    """Every way in which a group may have spread its frames over its logs."""
    for owners in product(range(logs), repeat=frames):
        yield [[g for g, o in enumerate(owners, 1) if o == log] for log in range(logs)]


def survivals(history: list[list[int]]) -> Iterator[list[list[int]]]:
    """Every combination of what each log kept: the chain cuts all behind the first loss."""
    for kept in product(*(range(len(log) + 1) for log in history)):
        yield [log[:count] for log, count in zip(history, kept, strict=True)]


def oracle(found: list[list[int]], durable: int, floor: int) -> tuple[int, list[int]] | None:
    """What has to come out: next GSN and lost ones; ``None`` where durable data is missing."""
    held = {gsn for log in found for gsn in log}
    if any(gsn not in held for gsn in range(floor, durable + 1)):
        return None
    last = max(held, default=0)
    last = max(last, floor - 1)
    return last + 1, [gsn for gsn in range(floor, last) if gsn not in held]


class ExhaustiveTests(SynchronousTestCase):
    def check(self, found: list[list[int]], findings: list[Finding], floor: int) -> None:
        durable = max(f.durable_gsn for f in findings)
        wanted = oracle(found, durable, floor)
        try:
            plan: Recovery | None = decide(findings)
        except CorruptError:
            plan = None
        if plan is None or wanted is None:
            self.assertEqual(plan is None, wanted is None, (found, durable))
            return
        lost = [g for void in plan.voids for g in range(void.range.first, void.range.end)]
        self.assertEqual((plan.next_gsn, lost), wanted, (found, durable))
        logs = {f.ldsu: [r.first for r in f.ranges] for f in findings}
        held = {gsn for log in found for gsn in log}
        for void in plan.voids:
            # Maximal, and in the order of the log that takes it.
            self.assertIn(void.range.end, held)
            self.assertGreater(void.range.first, max(logs[void.ldsu], default=0))
            logs[void.ldsu].append(void.range.end - 1)

    def test_every_combination(self) -> None:
        for logs, frames in ((1, 6), (2, 6), (3, 5)):
            for history in histories(logs, frames):
                for found in survivals(history):
                    for durable in range(frames + 1):
                        findings = [
                            finding(log, gsns, durable=durable if log == logs - 1 else 0)
                            for log, gsns in enumerate(found)
                        ]
                        self.check(found, findings, 1)

    def test_every_combination_of_applied_cursors(self) -> None:
        # A checkpoint reached some superblocks and not others: their scans begin at GSN 1.
        frames = 5
        for history in histories(2, frames):
            for applied, newer, durable in product(
                range(frames + 1), product((False, True), repeat=2), range(frames + 1)
            ):
                if durable < applied:
                    continue
                for found in survivals(history):
                    if any(g not in sum(found, []) for g in range(1, applied + 1)):
                        continue  # what is applied was durable in its log
                    findings = [
                        finding(
                            log,
                            [g for g in gsns if not new or g > applied],
                            durable=durable,
                            applied_gsn=applied + 1 if new else 1,
                        )
                        for log, (gsns, new) in enumerate(zip(found, newer, strict=True))
                    ]
                    self.check(found, findings, applied + 1 if any(newer) else 1)

    def test_lost_frames_leave_room_for_their_voids(self) -> None:
        for history in histories(3, 6):
            for found in survivals(history):
                findings = [
                    finding(log, gsns, room=len(history[log]) - len(gsns))
                    for log, gsns in enumerate(found)
                ]
                plan = decide(findings)
                for f in findings:
                    self.assertLessEqual(sum(v.ldsu == f.ldsu for v in plan.voids), f.room)


class RowTests(SynchronousTestCase):
    def test_a_log_ends_before_its_durable_head(self) -> None:
        with self.assertRaisesRegex(CorruptError, "writelog of qds1: durable up to position 8192"):
            decide([finding(0, [1, 3]), finding(1, [2], expected=2 * RECORD)])
        self.assertEqual(decide([finding(0, [1, 2], expected=2 * RECORD)]).next_gsn, 3)

    def test_the_missing_number_is_named(self) -> None:
        with self.assertRaisesRegex(CorruptError, r"GSN 2 was durable \(up to 3\)"):
            decide([finding(0, [1]), finding(1, [3], durable=3)])

    def test_a_number_in_two_logs(self) -> None:
        with self.assertRaisesRegex(CorruptError, "GSN 2 is in a writelog of the group twice"):
            decide([finding(0, [1, 2]), finding(1, [2, 3])])

    def test_no_log_can_have_lost_it(self) -> None:
        with self.assertRaisesRegex(CorruptError, "yet every writelog goes on"):
            decide([finding(0, [1, 3]), finding(1, [4])])

    def test_no_room(self) -> None:
        with self.assertRaises(CorruptError):
            decide([finding(0, [1], room=0), finding(1, [3], room=9)])
