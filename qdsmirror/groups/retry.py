"""When a pmd tries again: the pauses between its attempts, and what cuts one short."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred

from qdsmirror.limits import (
    RECONNECT_SECONDS_MIN,
    REFUSED_RETRY_SECONDS,
    REFUSED_RETRY_SECONDS_MIN,
)


class Retry:
    """Pauses that double from one attempt to the next.

    :param reactor: for the time.
    :ivar longest_seconds: of a pause after an attempt that was not refused.
    """

    def __init__(self, reactor: Any, longest_seconds: float) -> None:
        self._reactor = reactor
        self.longest_seconds = longest_seconds
        self._sleep: Deferred[None] | None = None
        self._stopped = False
        self.succeeded()

    def succeeded(self) -> None:
        """Begin with the shortest pauses again."""
        self._seconds: float = RECONNECT_SECONDS_MIN
        self.mended()

    def mended(self) -> None:
        """Begin with the shortest pause after a refusal again: an operator has acted."""
        self._refused_seconds: float = REFUSED_RETRY_SECONDS_MIN

    def _plain_seconds(self) -> float:
        seconds = self._seconds
        self._seconds = min(seconds * 2, self.longest_seconds)
        return seconds

    def refused_seconds(self) -> float:
        """Give the next pause after a refusal.

        What is mended at the secondary cannot be told to the primary.  Doubling from the last
        ``apply`` here on, the link is back at the latest after as long again as the mending
        took, and at most REFUSED_RETRY_SECONDS after it.
        """
        seconds = min(self._refused_seconds, REFUSED_RETRY_SECONDS)
        self._refused_seconds = min(seconds * 2, REFUSED_RETRY_SECONDS)
        return seconds

    async def pause(self, *, refused: bool = False) -> None:
        """Wait until the next attempt, or until something makes it worth while.

        :param refused: what the last attempt ended with.
        :raises CancelledError: there is none.
        """
        self.go_on()
        seconds = self.refused_seconds() if refused else self._plain_seconds()
        self._sleep = Deferred()
        call = self._reactor.callLater(seconds, self.wake)
        try:
            await self._sleep
        finally:
            self._sleep = None
            if call.active():
                call.cancel()

    def go_on(self) -> None:
        """Let the next attempt follow without a pause.

        :raises CancelledError: there is none.
        """
        if self._stopped:
            raise CancelledError

    def stop(self) -> None:
        """Let no attempt follow: one that is under way may end with an error of its own."""
        self._stopped = True

    def wake(self) -> None:
        """Let the next attempt begin now."""
        sleep, self._sleep = self._sleep, None
        if sleep is not None:
            sleep.callback(None)
