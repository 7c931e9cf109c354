"""Pauses before entries, and bytes a second: how fast something goes, whatever the timers do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.pacing import Bucket, Pauses, tls_bytes
from qdsmirror.limits import LIMIT_BURST_SECONDS


class PausesTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.pauses = Pauses()
        self.pauses.usec = 10_000

    def test_one_before_each_entry(self) -> None:
        self.assertAlmostEqual(self.pauses.wait(1, 5, 7.0), 0.05)
        self.assertAlmostEqual(self.pauses.wait(1, 5, 7.03), 0.02)
        self.assertEqual(self.pauses.wait(1, 5, 7.05), 0.0)
        self.assertAlmostEqual(self.pauses.wait(6, 1, 7.05), 0.01)

    def test_a_frame_without_entries_does_not_wait(self) -> None:
        self.assertEqual(self.pauses.wait(1, 0, 7.0), 0.0)

    def test_they_begin_with_what_comes_after_idleness(self) -> None:
        self.assertEqual(self.pauses.wait(1, 0, 0.0), 0.0)
        self.pauses.idle()
        self.assertAlmostEqual(self.pauses.wait(2, 1, 60.0), 0.01)

    def test_a_change_counts_for_those_under_way(self) -> None:
        self.assertAlmostEqual(self.pauses.wait(1, 100, 0.0), 1.0)
        self.pauses.usec = 2_000
        self.assertAlmostEqual(self.pauses.wait(1, 100, 0.15), 0.05)
        self.assertEqual(self.pauses.wait(1, 100, 0.2), 0.0)

    @given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 0.005)), min_size=1, max_size=50))
    def test_late_timers_do_not_add_up(self, frames: list[tuple[int, float]]) -> None:
        pauses = Pauses()
        pauses.usec = 10_000
        now, entries = 0.0, 0
        for number, (count, late) in enumerate(frames):
            entries += count
            wait = pauses.wait(number, count, now)
            if wait:
                now += wait + late
                self.assertEqual(pauses.wait(number, count, now), 0.0)
            self.assertGreaterEqual(now, entries * 0.01 - 1e-4)
            self.assertLess(now, entries * 0.01 + 0.006)

    def test_a_long_halt_is_not_made_up_for(self) -> None:
        self.pauses.wait(1, 1, 0.0)
        self.assertEqual(self.pauses.wait(1, 1, 0.01), 0.0)
        sent = 0
        while not self.pauses.wait(2 + sent, 1, 60.0):
            sent += 1
        self.assertTrue(9 <= sent <= 11, sent)


class BucketTests(SynchronousTestCase):
    def test_no_limit(self) -> None:
        bucket = Bucket(0.0)
        bucket.spend(1 << 30, 0.0)
        self.assertEqual((bucket.wait(0.0), bucket.portion), (0.0, float("inf")))

    def test_what_is_owed_is_waited_for(self) -> None:
        bucket = Bucket(0.0)
        bucket.set_rate(1000, 0.0)
        self.assertEqual(bucket.wait(0.0), 0.0)
        bucket.spend(2500, 0.0)
        self.assertAlmostEqual(bucket.wait(0.0), 2.5)
        self.assertAlmostEqual(bucket.wait(2.0), 0.5)
        self.assertEqual(bucket.wait(2.5), 0.0)

    def test_idleness_saves_little(self) -> None:
        bucket = Bucket(0.0)
        bucket.set_rate(1000, 0.0)
        bucket.wait(3600.0)
        bucket.spend(1000, 3600.0)
        self.assertAlmostEqual(bucket.wait(3600.0), 1 - LIMIT_BURST_SECONDS)

    def test_another_rate(self) -> None:
        bucket = Bucket(0.0)
        bucket.set_rate(1000, 0.0)
        bucket.spend(10_000, 0.0)
        bucket.set_rate(100_000, 5.0)
        self.assertAlmostEqual(bucket.wait(5.0), 5.0)
        bucket.set_rate(0, 6.0)
        self.assertEqual(bucket.wait(6.0), 0.0)
        # One that ends and begins anew owes nothing.
        bucket.set_rate(1000, 6.0)
        self.assertEqual(bucket.wait(6.0), 0.0)

    @given(
        st.integers(1, 100_000),
        st.lists(
            st.tuples(st.integers(1, 1 << 20), st.floats(0, LIMIT_BURST_SECONDS / 2)),
            min_size=1, max_size=50,
        ),
    )  # fmt: skip
    def test_it_holds_whatever_is_sent_and_however_late(
        self, kbps: int, sends: list[tuple[int, float]]
    ) -> None:
        rate = 1024 * kbps
        bucket = Bucket(0.0)
        bucket.set_rate(rate, 0.0)
        now, sent = 0.0, 0
        for size, late in sends:
            wait = bucket.wait(now)
            if wait:
                now += wait + late
                self.assertEqual(bucket.wait(now), 0.0)
            bucket.spend(size, now)
            sent += size
            # Not faster; nor slower, while there is always more to send.
            self.assertLessEqual(sent - size, rate * (now + LIMIT_BURST_SECONDS) + 1)
            self.assertGreaterEqual(sent, rate * (now - LIMIT_BURST_SECONDS) - 1)

    def test_what_tls_adds(self) -> None:
        self.assertEqual([tls_bytes(n) for n in (1, 16384, 16385)], [23, 16406, 16429])
