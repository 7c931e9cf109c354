"""Whether a master and its children are alive, and what a service manager is told of them.

A watchdog that is fed by a timer of the master proves only that timers run.  Here every child is
asked over its channel, and answers from its own loop (end to end); only then the service manager
has its sign of life.  A child that does not answer is killed and relaunched by itself, so that the
groups of the others are not disturbed; where none answers at all the fault may be the master's own,
and the service manager is left to restart it.

A daemon without children asks itself, over its own control socket, as anybody else would.

What is counted are questions, not seconds: a machine that was suspended finds nobody silent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from qdsmirror.daemons.notify import Notifier
from qdsmirror.daemons.supervise import Supervisor
from qdsmirror.limits import WATCHDOG_SHARE

_log = Logger()


class Vigil:
    """Asks the children, and tells the service manager.

    :param reactor: provides IReactorTime.
    :param beside: asks those whose silence concerns nobody else: they are relaunched, no more.
    """

    def __init__(
        self,
        reactor: Any,
        notifier: Notifier,
        supervisor: Supervisor,
        beside: Callable[[], None] = lambda: None,
    ) -> None:
        self._reactor = reactor
        self._notifier = notifier
        self._supervisor = supervisor
        self._beside = beside
        self._seconds = notifier.watchdog_seconds * WATCHDOG_SHARE
        self._timer: IDelayedCall | None = None
        self._ready = False
        self._ended = False

    def begin(self) -> None:
        """Begin, when the children have been started."""
        self.look()
        if self._seconds:
            self._ask_all()
            self._timer = self._reactor.callLater(self._seconds, self._turn)

    def look(self) -> None:
        """Tell how things are: a group's state may have changed."""
        if self._ended or not self._notifier:
            return
        groups = self._supervisor.status()["groups"]
        self._notifier.status(describe(groups))
        if not self._ready and all(one["state"] != "starting" for one in groups):
            self._ready = True
            self._notifier.ready()

    def reloading(self) -> None:
        """Tell that the configuration is being taken up."""
        if self._ready:
            self._notifier.reloading()

    def reloaded(self) -> None:
        """Tell that it is."""
        if self._ready:
            self._notifier.ready()
            self.look()

    def end(self) -> None:
        """Tell that the end has begun; nothing is asked from here on."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._notifier.status("ending")
        self._notifier.stopping()

    def _turn(self) -> None:
        self._timer = self._reactor.callLater(self._seconds, self._turn)
        if self._supervisor.answers():
            self._notifier.alive()
            if not self._ready:
                self._notifier.still_starting(self._notifier.watchdog_seconds)
        else:
            _log.error("no child process has answered within {n:g} s", n=self._seconds)
        self._ask_all()

    def _ask_all(self) -> None:
        self._supervisor.ask_all()
        self._beside()


class OwnVigil:
    """Feeds the watchdog of a daemon that has no children, while it answers its own question.

    :param reactor: provides IReactorTime.
    :param ask: asks for the daemon's Status, within so many seconds, by its control socket.
    """

    def __init__(
        self, reactor: Any, notifier: Notifier, ask: Callable[[float], Deferred[Any]]
    ) -> None:
        self._reactor = reactor
        self._notifier = notifier
        self._ask = ask
        self._seconds = notifier.watchdog_seconds * WATCHDOG_SHARE
        self._timer: IDelayedCall | None = None
        self._ended = False

    def begin(self) -> None:
        """Begin, when the control socket is there."""
        if self._seconds:
            self._timer = self._reactor.callLater(self._seconds, self.begin)
            self._ask(self._seconds).addCallbacks(self._answered, self._silent)

    def reloading(self) -> None:
        """Tell that the configuration is being taken up."""
        self._notifier.reloading()

    def reloaded(self) -> None:
        """Tell that it is."""
        self._notifier.ready()

    def end(self) -> None:
        """Ask no more."""
        self._ended = True
        if self._timer is not None and self._timer.active():
            self._timer.cancel()

    def _answered(self, _status: Any) -> None:
        if not self._ended:
            self._notifier.alive()

    def _silent(self, failure: Failure) -> None:
        if not self._ended:
            _log.error("our own question was not answered: {why}", why=failure.getErrorMessage())


def describe(groups: list[dict[str, Any]]) -> str:
    """Say in a line how a master's groups are.

    :param groups: as in its Status.
    """
    counts = Counter(one["state"] for one in groups)
    parts = [f"{count} {state}" for state, count in sorted(counts.items())]
    line = f"{len(groups)} group{'s' if len(groups) != 1 else ''}: {', '.join(parts) or 'none'}"
    ill = [one for one in groups if one["state"] in ("failed", "retrying")]
    return f"{line}; {ill[0]['name']}: {ill[0]['reason']}" if ill else line
