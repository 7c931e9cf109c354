"""Which entries may be answered, against a plain list of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import allowance as module
from qdsmirror.core.allowance import Allowance, CatchUp, SplitNumber

#: Frames: how many GSNs each has, and whether it is the application's.
FRAMES = st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=12)


class AllowanceTests(SynchronousTestCase):
    @settings(max_examples=200, deadline=None)
    @given(FRAMES, st.integers(0, 6), st.data())
    def test_against_a_list(
        self, frames: list[tuple[int, bool]], limit: int, data: st.DataObject
    ) -> None:
        """An entry may be answered once at most `limit` up to and with it are not committed."""
        start = data.draw(st.integers(0, 4))
        numbers = Allowance(start, 5)
        # GSN and number of each entry of the application; what a start found counts as such.
        entries = [(gsn, gsn) for gsn in range(start + 1, 5)]
        ends = [4]
        for count, own in frames:
            ends.append(ends[-1] + count)
            numbers.frame(ends[-1], own)
            if own:
                last = numbers.framed
                entries += [(ends[-1] - i, last - i) for i in reversed(range(count))]
            committed = data.draw(st.sampled_from([start, *ends]))
            numbers.commit(committed)
            done = max(numbers._committed_gsn, committed)
            waiting = [number for gsn, number in entries if gsn > done]
            self.assertEqual(numbers.uncommitted, len(waiting))
            for gsn, number in entries:
                before = sum(one <= number for one in waiting)
                may = number <= numbers.answerable(limit)
                self.assertEqual(may, gsn <= done or before <= limit, (gsn, number))

    def test_what_is_committed_counts_once(self) -> None:
        numbers = Allowance(0, 1)
        numbers.frame(3, True)
        numbers.frame(8, False)
        numbers.frame(10, True)
        self.assertEqual([numbers.commit(gsn) for gsn in (0, 3, 8, 8, 10, 9)], [0, 3, 0, 0, 2, 0])
        self.assertEqual(numbers.uncommitted, 0)

    def test_memory_is_bounded(self) -> None:
        """What is too much to be told apart counts as the application's: answers wait longer."""
        self.patch(module, "UNNUMBERED_MAX", 3)
        numbers = Allowance(0, 1)
        for gsn in range(1, 11):
            numbers.frame(gsn, False)
        self.assertEqual(len(numbers._others), 3)
        self.assertEqual(numbers.uncommitted, 7)
        numbers.commit(10)
        self.assertEqual((numbers.uncommitted, len(numbers._others)), (0, 0))

    def test_skipped(self) -> None:
        numbers = Allowance(0, 1)
        numbers.frame(10, True)
        numbers.commit(3)
        numbers.commit(8)
        numbers.skip(3)
        self.assertEqual([numbers.is_skipped(n) for n in (3, 4, 8, 9)], [False, True, True, False])
        # Of a request in several frames a part is enough.
        split = [SplitNumber(3, 1), SplitNumber(4, 3), SplitNumber(12, 8), SplitNumber(12, 9)]
        self.assertEqual([numbers.is_skipped(n) for n in split], [False, True, True, False])
        # More than that must not be missing.
        self.assertEqual(numbers.answerable(5), 8)
        numbers.commit(10)
        numbers.skip(8)
        self.assertEqual(numbers.skipped, (3, 10))
        numbers.skipped = None
        self.assertEqual(numbers.answerable(5), 15)


class CatchUpTests(SynchronousTestCase):
    @settings(max_examples=200, deadline=None)
    @given(st.integers(0, 50), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
    def test_ends_beside_any_load(self, backlog: int, steps: list[tuple[int, int]]) -> None:
        """What may be answered grows by half of what is committed; nothing answered is too much."""
        numbers = Allowance(0, 1)
        if backlog:
            numbers.frame(backlog, True)
        catch_up = CatchUp(numbers.uncommitted)
        answered = backlog
        paid = 0
        for more, done in steps:
            if more:
                numbers.frame(numbers.framed + more, True)
            count = numbers.commit(min(numbers.committed + done, numbers.framed))
            paid += count
            catch_up.committed(count, numbers.uncommitted)
            answered = max(answered, min(numbers.answerable(catch_up.limit), numbers.framed))
            self.assertLessEqual(answered, numbers.answerable(catch_up.limit))
            self.assertLessEqual(catch_up.limit, max(0, backlog - paid // 2))

    def test_an_idle_one_is_done_with_its_backlog(self) -> None:
        numbers = Allowance(0, 1)
        numbers.frame(100, True)
        catch_up = CatchUp(100)
        catch_up.committed(numbers.commit(100), numbers.uncommitted)
        self.assertEqual(catch_up.limit, 0)
