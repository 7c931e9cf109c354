from bisect import bisect_left
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.latency import BOUNDS_SECONDS, Begun, LatencyHistogram, note_end


@dataclass
class Ended:
    begun: Begun | None


class HistogramTests(SynchronousTestCase):
    def test_bounds_ascend(self) -> None:
        self.assertEqual(sorted(set(BOUNDS_SECONDS)), list(BOUNDS_SECONDS))

    def test_what_equals_a_bound_is_below_it(self) -> None:
        for place, bound in enumerate(BOUNDS_SECONDS):
            histogram = LatencyHistogram()
            histogram.take(bound)
            self.assertEqual(histogram.counts.index(1), place)
            histogram.take(bound * 1.001)
            self.assertEqual(histogram.counts[place + 1], 1)

    @given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 100)), max_size=60))
    def test_counts_each_where_it_belongs(self, ended: list[tuple[int, float]]) -> None:
        """However they are mixed: by two meters, and some that nobody measures."""
        meters = [LatencyHistogram(), LatencyHistogram()]
        shared: dict[tuple[int, float], Begun] = {}
        requests = []
        expected = [[0] * (len(BOUNDS_SECONDS) + 1) for _ in meters]
        for which, age in ended:
            if which == 2:
                requests.append(Ended(None))
                continue
            # Those of one batch share what they begin with.
            begun = shared.setdefault((which, age), (meters[which], 1000.0 - age))
            requests.append(Ended(begun))
            seconds = 1000.0 - begun[1]
            expected[which][bisect_left(BOUNDS_SECONDS, seconds) if seconds > 0 else 0] += 1
        note_end(requests, 1000.0)
        self.assertEqual([meter.counts for meter in meters], expected)
        for which, meter in enumerate(meters):
            total = sum(age for one, age in ended if one == which)
            self.assertAlmostEqual(meter.seconds, total, places=6)
