"""How old the oldest entry is that the secondary has not committed, in bounded memory."""

from __future__ import annotations

from collections import deque

SAMPLES_MAX = 512
_RESOLUTION_SECONDS = 0.05


class LagClock:
    """Remembers when some of the recent GSNs were framed.

    Times are monotonic seconds (rules.md 26).  Samples are thinned as an outage grows, so the
    answer loses precision in proportion to its size, and memory does not grow.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[int, float]] = deque()
        self._resolution = _RESOLUTION_SECONDS

    def framed(self, gsn: int, now: float) -> None:
        """Note that ``gsn`` was framed now."""
        samples = self._samples
        if samples and now - samples[-1][1] < self._resolution:
            return
        samples.append((gsn, now))
        if len(samples) > SAMPLES_MAX:
            self._samples = deque(s for i, s in enumerate(samples) if i % 2 == 0)
            self._resolution *= 2

    def age(self, committed: int, written: int, now: float) -> float:
        """Give the age in seconds of the entry after ``committed``; 0 when all are committed."""
        samples = self._samples
        while len(samples) > 1 and samples[1][0] <= committed + 1:
            samples.popleft()
        if committed >= written:
            samples.clear()
            self._resolution = _RESOLUTION_SECONDS
            return 0.0
        return max(0.0, now - samples[0][1]) if samples else 0.0
