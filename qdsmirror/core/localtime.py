"""Whether a time of day is in a window, as people mean it, also where clocks are changed.

Where the clocks go forward, a time that is left out is reached at once.  Where they go back, the
same times come twice: a window then begins when its first time is shown first, and lasts until its
last one is shown last, without a break between.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from qdsmirror.core.throttles import Window

#: Gives what the clocks on the wall show at a time in seconds since 1970.
WallClock = Callable[[float], datetime]

#: Clocks were never changed by more than this in one night.
_CHANGE_SECONDS_MAX = 3 * 3600.0


def is_within(window: Window | None, now: float, clock: WallClock) -> bool:
    """Tell whether a window is open.

    :param now: seconds since 1970.
    """
    if window is None or window.shows(clock(now).time()):
        return True
    change = _went_back(now, clock)
    if change is None:
        return False
    at, first, last = change
    shown = clock(now)
    if now < at:
        # What was open in this hour will be open in it again.
        return _opens_between(window, first, shown)
    # What will be open in the rest of it was open in it before.
    return _opens_between(window, shown, last)


def _opens_between(window: Window, first: datetime, last: datetime) -> bool:
    """Tell whether a window is open at some time from ``first`` to before ``last``."""
    if first >= last:
        return False
    starts = datetime.combine(first.date(), window.start)
    if starts < first:
        starts += timedelta(days=1)
    return window.shows(first.time()) or starts < last


def _went_back(now: float, clock: WallClock) -> tuple[float, datetime, datetime] | None:
    """Find whether ``now`` is in a stretch whose times of day come twice.

    :returns: when the clocks go back, and the first and the last time (not in it) of the stretch.
    """
    early, late = now - _CHANGE_SECONDS_MAX, now + _CHANGE_SECONDS_MAX
    before, after = _offset(early, clock), _offset(late, clock)
    if after >= before:
        return None
    while late - early > 0.5:
        middle = (early + late) / 2
        if _offset(middle, clock) == before:
            early = middle
        else:
            late = middle
    at = float(round(late))
    by = (before - after).total_seconds()
    if not at - by <= now < at + by:
        return None
    first = clock(at)
    return at, first, first + timedelta(seconds=by)


def _offset(at: float, clock: WallClock) -> timedelta:
    offset = clock(at) - datetime.fromtimestamp(at, UTC).replace(tzinfo=None)
    # Both cut microseconds off in their own way.
    return timedelta(seconds=round(offset.total_seconds()))
