"""What throttles hold a pmd back by: ``sleep`` and ``limit``, for as long as the daemon runs.

Nothing blocks: whoever may not send yet is called when he may.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.interfaces import IDelayedCall

from qdsmirror.core.frames import FrameHeader
from qdsmirror.core.jsontext import parse_object
from qdsmirror.core.pacing import Bucket, Pauses, tls_bytes
from qdsmirror.errors import UsageError
from qdsmirror.limits import THROTTLE_LIMIT_KBPS_MAX, THROTTLE_SLEEP_USEC_MAX

SLEEP, WRITESLEEP, LIMIT = "sleep_us", "writesleep_us", "limit_kbps"
_MOST = {
    SLEEP: THROTTLE_SLEEP_USEC_MAX,
    WRITESLEEP: THROTTLE_SLEEP_USEC_MAX,
    LIMIT: THROTTLE_LIMIT_KBPS_MAX,
}


def parse_knobs(text: str, known: Mapping[str, int]) -> dict[str, int]:
    """Read what a daemon is told to hold back by.

    :param text: a JSON object of whole numbers.
    :param known: what it knows, at present.
    :returns: all of them, those that are not told as they are.
    :raises UsageError: it cannot be read, or is out of range.
    """
    told = parse_object(text, "what throttles say", UsageError)
    if not told.keys() <= known.keys():
        raise UsageError(f"the knobs are an object with {', '.join(known)}")
    for name, value in told.items():
        if type(value) is not int or not 0 <= value <= _MOST[name]:
            raise UsageError(f"{name} is a whole number from 0 to {_MOST[name]}")
    return {**known, **told}


class Later:
    """A timer that is set anew as often as it is wanted.

    :param call: what it does.
    """

    def __init__(self, reactor: Any, call: Callable[[], None]) -> None:
        self._reactor = reactor
        self._call = call
        self._timer: IDelayedCall | None = None

    def after(self, seconds: float) -> None:
        """Call so much later, and not at the time that was set before."""
        self.cancel()
        self._timer = self._reactor.callLater(seconds, self._fire)

    def cancel(self) -> None:
        """Do not call."""
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None

    def _fire(self) -> None:
        self._timer = None
        self._call()


class HoldBack:
    """What a group's pmd is held back by, from session to session.

    :param go_on: called when more may be sent.
    """

    def __init__(self, reactor: Any, go_on: Callable[[], None]) -> None:
        self._reactor = reactor
        self._pauses = Pauses()
        self._bucket = Bucket(reactor.seconds())
        self._kbps = 0
        self._go_on = go_on
        self._paused = Later(reactor, go_on)
        self._limited = Later(reactor, go_on)

    def set(self, text: str) -> dict[str, int]:
        """Take what a throttle has set: see :func:`parse_knobs`."""
        knobs = parse_knobs(text, self.status())
        self._pauses.usec = knobs[SLEEP]
        if not knobs[SLEEP]:
            self._pauses.idle()
        self._kbps = knobs[LIMIT]
        self._bucket.set_rate(1024 * self._kbps, self._reactor.seconds())
        self.end()
        self._go_on()
        return knobs

    @property
    def portion(self) -> float:
        """How many bytes should be sent at once."""
        return self._bucket.portion

    def is_frame_due(self, header: FrameHeader) -> bool:
        """Tell whether the pauses before a frame's entries are over; if not, call when they are."""
        if not self._pauses.usec:
            return True
        now = self._reactor.seconds()
        seconds = self._pauses.wait(header.gsn_first, header.entry_count, now)
        if seconds:
            self._paused.after(seconds)
        return not seconds

    def idle(self) -> None:
        """Learn that no frame is to be sent."""
        self._pauses.idle()

    def may_send(self) -> bool:
        """Tell whether more bytes may be sent within the limit; if not, call when they may."""
        if not self._kbps:
            return True
        seconds = self._bucket.wait(self._reactor.seconds())
        if seconds:
            self._limited.after(seconds)
        return not seconds

    def sent(self, size: int) -> None:
        """Count what was written to a link, while there is a limit."""
        if self._kbps:
            self._bucket.spend(tls_bytes(size), self._reactor.seconds())

    def end(self) -> None:
        """Wait for nothing: the session is over, or it is to be seen anew for how long."""
        self._paused.cancel()
        self._limited.cancel()

    def status(self) -> dict[str, int]:
        """Give what it is held back by."""
        return {SLEEP: self._pauses.usec, LIMIT: self._kbps}
