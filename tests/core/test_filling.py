from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.filling import SAMPLES_MAX, FillRate

MIB = 1 << 20


def fed(uses, step=1.0):
    rate = FillRate()
    for turn, used in enumerate(uses):
        rate.note(turn * step, used)
    return rate


class FillRateTests(SynchronousTestCase):
    def test_even_growth(self):
        rate = fed([3 * MIB * turn for turn in range(60)])
        self.assertEqual(rate.bytes_per_second, 3 * MIB)
        self.assertEqual(rate.seconds_to_full(30 * MIB), 10.0)

    def test_nothing_is_said_at_first(self):
        for count in range(6):
            rate = fed([turn * MIB for turn in range(count)])
            self.assertIsNone(rate.bytes_per_second)
            self.assertIsNone(rate.seconds_to_full(MIB))

    def test_a_full_log_is_full_whatever_its_rate(self):
        self.assertEqual(FillRate().seconds_to_full(0), 0.0)
        self.assertEqual(fed([5 * MIB] * 30).seconds_to_full(-1), 0.0)

    def test_a_log_that_stands_or_drains_is_not_filling(self):
        self.assertIsNone(fed([MIB] * 30).seconds_to_full(MIB))
        draining = fed([(100 - turn) * MIB for turn in range(30)])
        self.assertIsNone(draining.seconds_to_full(MIB))
        self.assertLess(draining.bytes_per_second, 0)

    def test_a_saw_is_not_filling_wherever_one_looks(self):
        saw = [turn % 4 * 8 * MIB for turn in range(200)]
        for end in range(8, 200):
            self.assertIsNone(fed(saw[:end]).seconds_to_full(MIB), end)

    def test_a_saw_that_climbs(self):
        saw = [(turn % 4 * 8 + turn) * MIB for turn in range(200)]
        for end in range(SAMPLES_MAX, 200):
            growth = fed(saw[:end]).bytes_per_second / MIB
            self.assertTrue(0.5 < growth < 1.5, (end, growth))

    def test_samples_that_come_too_fast_are_passed_over(self):
        even = fed([turn * MIB for turn in range(30)])
        dense = fed([turn * MIB / 8 for turn in range(240)], step=0.125)
        self.assertEqual(dense.bytes_per_second, even.bytes_per_second)
        self.assertIsNone(fed([turn * MIB for turn in range(30)], step=0.125).bytes_per_second)

    def test_a_clock_that_is_set_back(self):
        rate = fed([turn * MIB for turn in range(30)])
        for turn in range(10):
            rate.note(-3600.0 + turn, 5 * turn * MIB)
        self.assertEqual(rate.bytes_per_second, 5 * MIB)

    def test_an_outage_is_noticed(self):
        rate = fed([0] * 100 + [turn * MIB for turn in range(1, 16)])
        self.assertGreater(rate.bytes_per_second, 0)
        rate = fed([0] * 100 + [turn * MIB for turn in range(1, 21)])
        self.assertEqual(rate.bytes_per_second, MIB)

    @given(
        st.integers(1, 1 << 30),
        st.integers(0, 1 << 40),
        st.floats(1, 60, allow_nan=False),
        st.integers(6, 50),
    )
    def test_any_even_growth(self, growth, begin, step, count):
        rate = fed([begin + turn * growth for turn in range(count)], step=step)
        self.assertAlmostEqual(rate.bytes_per_second * step / growth, 1.0, places=6)
