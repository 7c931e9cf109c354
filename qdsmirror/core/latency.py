"""How long an LDSU's writes took to be answered, as a histogram.

It is fed on the way of every write, so a batch of requests that came together costs one look at
the clock and one shared tuple, and those of it that are answered together one count.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any, Protocol

#: Upper ends of the histogram's buckets, in seconds; the last one has none.
BOUNDS_SECONDS = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class LatencyHistogram:
    """Counts of what took so long; they only grow.

    :ivar counts: by bucket; a value that equals a bound is below it, as Prometheus has it.
    :ivar seconds: all of them together.
    """

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_SECONDS) + 1)
        self.seconds = 0.0

    def take(self, seconds: float, count: int = 1) -> None:
        """Count some that took so long each; a clock that was set back counts as no time."""
        if seconds > 0.0:
            self.counts[bisect_left(BOUNDS_SECONDS, seconds)] += count
            self.seconds += seconds * count
        else:
            self.counts[0] += count

    def status(self) -> dict[str, Any]:
        """Describe it, for ``qdsinfo --json``."""
        return {
            "bounds_seconds": list(BOUNDS_SECONDS),
            "counts": list(self.counts),
            "seconds": round(self.seconds, 6),
        }


#: Where something is measured, and when it began; shared by all that began then.
Begun = tuple[LatencyHistogram, float]


class Measured(Protocol):
    """What :func:`note_end` asks of a request."""

    begun: Begun | None


def note_end(ended: Iterable[Measured], now: float) -> None:
    """Measure what has ended now; what is not measured has no beginning."""
    last: Begun | None = None
    count = 0
    for one in ended:
        begun = one.begun
        if begun is last:
            count += 1
            continue
        if last is not None:
            last[0].take(now - last[1], count)
        last, count = begun, 1
    if last is not None:
        last[0].take(now - last[1], count)
