"""What holds a sender back: a pause before each entry (``sleep``), and bytes a second (``limit``).

Times are seconds of a clock that only goes forward.
"""

from __future__ import annotations

import math

from qdsmirror.limits import LIMIT_BURST_SECONDS, PAUSE_BEHIND_SECONDS_MAX

#: RFC 8446, 5.1 and 5.2: what a record of at most so much has around it.
_TLS_RECORD_BYTES = 16384
_TLS_AROUND_BYTES = 22
#: What a sum of floating-point numbers may lack.
ALMOST_SECONDS = 1e-6


def tls_bytes(size: int) -> int:
    """Give what so many bytes, written at once, are on the wire."""
    return size + _TLS_AROUND_BYTES * -(-size // _TLS_RECORD_BYTES)


class Pauses:
    """The pauses before entries: those of a frame run one after another, then it goes.

    They begin when a frame is the next to be sent.  Where the one before it went late, because a
    timer did, they began when it was due.

    :ivar usec: microseconds before each entry; whoever has none asks no more, and is idle.
    """

    def __init__(self) -> None:
        self.usec = 0
        self._next: int | None = None
        self._since = 0.0
        self._due: float | None = None

    def wait(self, frame: int, entries: int, now: float) -> float:
        """Give how long a frame must still wait; 0: it goes now.

        :param frame: a number that tells it from others.
        """
        if self._next != frame:
            due = now if self._due is None else self._due
            self._next, self._since = frame, max(due, now - PAUSE_BEHIND_SECONDS_MAX)
        due = self._since + entries * self.usec / 1e6
        if now + ALMOST_SECONDS < due:
            return due - now
        self._next, self._due = None, due
        return 0.0

    def idle(self) -> None:
        """Learn that nothing is to be sent: pauses begin anew with what comes next."""
        self._next = self._due = None


class Bucket:
    """Bytes that may be sent: so many come in every second, and a few may be saved.

    Whoever sends something waits until there is something, and may then owe the rest.

    :ivar rate: bytes a second; 0: no limit.
    """

    def __init__(self, now: float) -> None:
        self.rate = 0
        self._bytes = 0.0
        self._at = now

    def set_rate(self, rate: int, now: float) -> None:
        """Go by another rate; what is owed stays so long as it would have been."""
        self._fill(now)
        self._bytes = self._bytes * rate / self.rate if self.rate else 0.0
        self.rate = rate

    def wait(self, now: float) -> float:
        """Give how long to wait until something may be sent; 0: now."""
        self._fill(now)
        if not self.rate or self._bytes > -ALMOST_SECONDS * self.rate:
            return 0.0
        return -self._bytes / self.rate

    def spend(self, size: int, now: float) -> None:
        """Take what is sent now."""
        self._fill(now)
        if self.rate:
            self._bytes -= size

    @property
    def portion(self) -> float:
        """What should be sent at once, at most."""
        return self.rate * LIMIT_BURST_SECONDS if self.rate else math.inf

    def _fill(self, now: float) -> None:
        most = self.rate * LIMIT_BURST_SECONDS
        self._bytes = min(most, self._bytes + self.rate * (now - self._at))
        self._at = now
