"""Sizes recommended of recorded rates, against what they must hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.samples import GroupSample, LdsuSample
from qdsmirror.core.sizing import HEADROOM, Interval, busiest, recommend
from qdsmirror.limits import MIB

HOUR = 3600.0
WINDOW = 48 * MIB


def sample(
    epoch: float, kbps: float | None, sectors: int | None = 0, total: float | None = None
) -> GroupSample:
    """Make a sample of one LDSU."""
    wire = kbps if total is None else total
    ldsu = LdsuSample("qds0", wire, kbps, 1.0, 0, sectors, 0.0, 0.0)
    return GroupSample(epoch, 1.0, 0, "connected", (ldsu,), wire)


def steady(kbps: float, seconds: float, start: float = 0.0) -> list[GroupSample]:
    """Make samples of a rate that does not change, one each 10 s."""
    return [sample(start + 10.0 * n, kbps) for n in range(int(seconds / 10) + 1)]


class BusiestTests(SynchronousTestCase):
    def test_of_a_short_record(self) -> None:
        self.assertEqual(busiest([], 60), 0.0)
        self.assertEqual(busiest([Interval(10, 10, 100)], 60), 10.0)

    def test_a_burst_counts_in_a_short_window_only(self) -> None:
        quiet = [Interval(10.0 * n, 10, 10) for n in range(1, 101)]
        burst = [*quiet[:50], Interval(510.0, 10, 10_000), *quiet[50:]]
        self.assertEqual(busiest(burst, 10), 1000.0)
        self.assertEqual(busiest(burst, 100), (10_000 + 9 * 10) / 100)
        self.assertLess(busiest(burst, 1000), 15)

    @given(
        st.lists(st.tuples(st.integers(1, 60), st.integers(0, 10**9)), min_size=1, max_size=40),
        st.integers(1, 600),
    )
    def test_against_every_window(self, pieces: list[tuple[int, int]], seconds: int) -> None:
        """It is the rate of the busiest of the shortest stretches that are long enough."""
        whole = sum(a for _, a in pieces) / sum(s for s, _ in pieces)
        rates = []
        for one in (pieces, pieces[::-1]):
            for first in range(len(one)):
                length = amount = 0
                for more, moved in one[first:]:
                    length, amount = length + more, amount + moved
                    if length >= seconds:
                        rates.append(amount / length)
                        break
        found = busiest([Interval(0.0, float(s), float(a)) for s, a in pieces], float(seconds))
        self.assertAlmostEqual(found, max(rates, default=whole), 6)

    def test_what_is_busy_at_an_edge_counts(self) -> None:
        record = [Interval(1.0, 1, 1), Interval(3.0, 2, 0)]
        for intervals in (record, record[::-1]):
            self.assertEqual(busiest(intervals, 2), 1 / 3)


class RecommendTests(SynchronousTestCase):
    def test_of_a_steady_rate(self) -> None:
        asked = recommend(steady(1024, 2 * HOUR), HOUR, WINDOW)
        assert asked is not None
        wanted = MIB * HOUR * HEADROOM
        self.assertGreaterEqual(asked.writelogs["qds0"], wanted)
        self.assertLess(asked.writelogs["qds0"], wanted + 32 * MIB)
        self.assertEqual(asked.journal, asked.writelogs["qds0"])
        self.assertAlmostEqual(asked.link, MIB * HEADROOM)
        self.assertAlmostEqual(asked.recorded_seconds, 2 * HOUR)

    def test_of_nothing(self) -> None:
        self.assertIsNone(recommend([], HOUR, WINDOW))
        self.assertIsNone(recommend(steady(100, 30), HOUR, WINDOW))
        self.assertIsNone(recommend([sample(10.0 * n, None) for n in range(50)], HOUR, WINDOW))

    def test_what_a_writelog_grew_by_was_written(self) -> None:
        """While the secondary is away nothing is sent: the writelog tells the rate."""
        away = [sample(10.0 * n, 0, sectors=n * 20_480) for n in range(40)]
        asked = recommend(away, HOUR, WINDOW)
        assert asked is not None
        self.assertAlmostEqual(asked.rates["qds0"], MIB)

    def test_what_drains_was_not_written_again(self) -> None:
        filled = [sample(10.0 * n, 0, sectors=n * 20_480) for n in range(61)]
        drained = [sample(600 + 10.0 * n, 1024, sectors=(60 - n) * 20_480) for n in range(1, 61)]
        asked = recommend([*filled, *drained], 1200, WINDOW)
        assert asked is not None
        self.assertAlmostEqual(asked.rates["qds0"], MIB / 2)

    def test_a_pause_of_the_recording_is_no_rate(self) -> None:
        record = [*steady(1024, 600), *steady(1024, 600, start=1e6)]
        asked = recommend(record, 600, WINDOW)
        assert asked is not None
        self.assertAlmostEqual(asked.rates["qds0"], MIB)
        self.assertAlmostEqual(asked.recorded_seconds, 1200)

    def test_the_link_carries_what_is_left_after_compression(self) -> None:
        record = [sample(10.0 * n, 1024, total=256) for n in range(100)]
        asked = recommend(record, HOUR, WINDOW)
        assert asked is not None
        self.assertAlmostEqual(asked.link, 256 * 1024 * HEADROOM)
        self.assertAlmostEqual(asked.rates["qds0"], MIB)

    def test_a_journal_holds_the_window(self) -> None:
        asked = recommend(steady(1, 600), HOUR, WINDOW)
        assert asked is not None
        self.assertGreaterEqual(asked.journal, 2 * WINDOW)
        self.assertLess(asked.writelogs["qds0"], 6 * MIB)

    def test_of_an_idle_group(self) -> None:
        """The least that there should be, not nothing."""
        asked = recommend(steady(0, 600), HOUR, WINDOW)
        assert asked is not None
        self.assertEqual(asked.writelogs, {"qds0": 2 * MIB})

    def test_clocks_that_go_back(self) -> None:
        record = [*steady(1024, 600), *steady(1024, 600)]
        asked = recommend(record, 600, WINDOW)
        assert asked is not None
        self.assertAlmostEqual(asked.rates["qds0"], MIB)
