"""Windows of time in the host's zone, over midnight and where clocks are changed."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.localtime import WallClock, is_within
from qdsmirror.core.throttles import Window

_BERLIN = "Europe/Berlin"
#: When its clocks go forward and back, in UTC.
_FORWARD = datetime(2026, 3, 29, 1, tzinfo=UTC)
_BACK = datetime(2026, 10, 25, 1, tzinfo=UTC)


def clock_of(zone: str) -> WallClock:
    """Give the wall clock of a zone."""
    info = ZoneInfo(zone)
    return lambda at: datetime.fromtimestamp(at, info).replace(tzinfo=None)


def when_open(window: Window, around: datetime, zone: str = _BERLIN) -> list[tuple[str, str]]:
    """Give the stretches, in UTC, in which a window is open within 12 hours around a time."""
    clock = clock_of(zone)
    found: list[list[datetime]] = []
    was = False
    for minute in range(-12 * 60, 12 * 60):
        at = around + timedelta(minutes=minute)
        is_open = is_within(window, at.timestamp(), clock)
        if is_open and not was:
            found.append([at])
        elif was and not is_open:
            found[-1].append(at)
        was = is_open
    return [tuple(f"{at:%d %H:%M}" for at in one) for one in found]  # type: ignore[misc]


class WindowTests(SynchronousTestCase):
    def test_in_the_hosts_zone(self) -> None:
        noon = datetime(2026, 1, 15, 12, tzinfo=UTC)
        office = Window(time(8), time(17))
        self.assertEqual(when_open(office, noon, "UTC"), [("15 08:00", "15 17:00")])
        self.assertEqual(when_open(office, noon), [("15 07:00", "15 16:00")])
        self.assertEqual(when_open(office, noon, "Asia/Kolkata"), [("15 02:30", "15 11:30")])

    def test_over_midnight(self) -> None:
        midnight = datetime(2026, 1, 15, tzinfo=UTC)
        night = Window(time(17), time(8))
        self.assertEqual(when_open(night, midnight, "UTC"), [("14 17:00", "15 08:00")])

    def test_always(self) -> None:
        self.assertTrue(is_within(None, _BACK.timestamp(), clock_of(_BERLIN)))

    def test_while_clocks_go_forward(self) -> None:
        """02:00 to 03:00 is left out: what begins or ends in it does so when it is left out."""
        for start, stop, wanted in (
            (time(22), time(6), [("28 21:00", "29 04:00")]),
            (time(2, 30), time(4), [("29 01:00", "29 02:00")]),
            (time(1), time(2, 30), [("29 00:00", "29 01:00")]),
            (time(2, 10), time(2, 40), []),
        ):
            self.assertEqual(when_open(Window(start, stop), _FORWARD), wanted, (start, stop))

    def test_while_clocks_go_back(self) -> None:
        """02:00 to 03:00 comes twice: from the first that is shown to the last, without a break."""
        for start, stop, wanted in (
            (time(22), time(6), [("24 20:00", "25 05:00")]),
            (time(2, 30), time(4), [("25 00:30", "25 03:00")]),
            (time(22), time(2, 30), [("24 20:00", "25 01:30")]),
            (time(2, 10), time(2, 40), [("25 00:10", "25 01:40")]),
            (time(2), time(3), [("25 00:00", "25 02:00")]),
            (time(22), time(2), [("24 20:00", "25 00:00")]),
            (time(3), time(4), [("25 02:00", "25 03:00")]),
        ):
            self.assertEqual(when_open(Window(start, stop), _BACK), wanted, (start, stop))

    def test_clocks_that_go_back_over_midnight(self) -> None:
        """In Santiago 24:00 becomes 23:00, in Lord Howe clocks change by half an hour."""
        back = datetime(2026, 4, 5, 3, tzinfo=UTC)
        window = Window(time(23, 30), time(0, 30))
        self.assertEqual(
            when_open(window, back, "America/Santiago"), [("05 02:30", "05 04:30")]
        )  # fmt: skip
        back = datetime(2026, 4, 4, 15, tzinfo=UTC)
        window = Window(time(1, 40), time(3))
        self.assertEqual(when_open(window, back, "Australia/Lord_Howe"), [("04 14:40", "04 16:30")])

    @settings(max_examples=100, deadline=None)
    @given(
        st.integers(0, 287),
        st.integers(0, 287),
        st.sampled_from([_BERLIN, "Australia/Lord_Howe", "Antarctica/Troll"]),
    )
    def test_a_window_opens_once_a_day(self, first: int, last: int, zone: str) -> None:
        start, stop = (time(at // 12, at % 12 * 5) for at in (first, last))
        if start == stop:
            return
        clock = clock_of(zone)
        for month, day in ((3, 28), (4, 4), (10, 3), (10, 24)):
            # Three days, of which the second may have more or fewer hours.
            begin, end = (
                datetime(2026, month, day + days, tzinfo=ZoneInfo(zone)).timestamp()
                for days in (0, 3)
            )
            times = range(int(begin), int(end), 300)
            seen = [is_within(Window(start, stop), at, clock) for at in times]
            opened = sum(not before and now for before, now in zip(seen, seen[1:], strict=False))
            self.assertLessEqual(opened, 3)
