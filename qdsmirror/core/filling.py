"""How fast a log fills, and so how long it has until it is full."""

from __future__ import annotations

from collections import deque

#: How many samples are kept, and how far apart they are at least.
SAMPLES_MAX = 20
SAMPLE_SECONDS = 1.0
#: With fewer samples nothing is said.
_SAMPLES_MIN = 6


class FillRate:
    """Tells the rate at which the use of a log grows, of samples of it.

    What is used goes up with every frame, and down whenever the tail moves: what counts is how the
    low points grow, of the later half of the samples over those of the earlier half.  So a log
    that is written and drained evenly is not said to be filling, whenever one looks.

    Times are monotonic seconds (rules.md 26).
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=SAMPLES_MAX)

    def note(self, now: float, used_bytes: int) -> None:
        """Take a sample; one that comes too soon after another is passed over."""
        samples = self._samples
        if samples and now < samples[-1][0]:
            # The clock was set back.
            samples.clear()
        if not samples or now - samples[-1][0] >= SAMPLE_SECONDS:
            samples.append((now, used_bytes))

    @property
    def bytes_per_second(self) -> float | None:
        """What the log's use has grown by of late; negative while it drains, ``None`` at first."""
        samples = list(self._samples)
        if len(samples) < _SAMPLES_MIN:
            return None
        half = len(samples) // 2
        earlier, later = samples[:half], samples[half:]
        seconds = later[0][0] - earlier[0][0]
        return (min(used for _, used in later) - min(used for _, used in earlier)) / seconds

    def seconds_to_full(self, free_bytes: int) -> float | None:
        """Give how long the log has at the present rate.

        :param free_bytes: what is free of it now.
        :returns: 0 when nothing is free; ``None`` while it is not filling, or that is not known.
        """
        if free_bytes <= 0:
            return 0.0
        rate = self.bytes_per_second
        return free_bytes / rate if rate is not None and rate > 0 else None
