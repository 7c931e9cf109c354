"""Pace: how fast a network path takes bytes, as far as that is known."""

from __future__ import annotations

from qdsmirror.limits import PATH_FORGET_SECONDS

#: Weight of the newest stripe in the moving average.
_WEIGHT = 0.25
#: A time so short tells nothing of the path, but of buffers.
_SECONDS_MIN = 0.001


class Pace:
    """One path's.

    :ivar under_way: bytes sent and not acknowledged.
    """

    def __init__(self) -> None:
        self.under_way = 0
        self._rate = 0.0
        self._measured_at = 0.0
        self._begun: tuple[float, int] | None = None

    def begun(self, now: float, size: int) -> None:
        """Learn that so many bytes have filled the path, at a time in seconds."""
        self._begun = now, size

    def drained(self, now: float) -> None:
        """Learn that it takes more."""
        if self._begun is None:
            return
        begun, size = self._begun
        self._begun = None
        rate = size / max(now - begun, _SECONDS_MIN)
        known = self._rate and now - self._measured_at < PATH_FORGET_SECONDS
        self._rate += (rate - self._rate) * (_WEIGHT if known else 1.0)
        self._measured_at = now

    def seconds(self, size: int, now: float) -> float:
        """Tell how long it would need for so many bytes more; 0 where that is not known.

        What was measured long ago counts no longer, so that a slow path gets a chance again.
        """
        if not self._rate or now - self._measured_at >= PATH_FORGET_SECONDS:
            return 0.0
        return size / self._rate
