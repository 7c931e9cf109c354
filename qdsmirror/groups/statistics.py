"""The statistics of a group: samples, its performance tracking file, events, throttles.

The patent: "throttle evaluation and performance data collection can be separated from the primary
and secondary mirror daemons and placed in a separate daemon executed on the primary and secondary
computer systems".  It asks the group's daemons over their control sockets, as a tool does; nothing
of the data path ever waits for it, and it goes on while the pmd, or the driver, is down.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from qdsmirror.config import GroupConfig, Role
from qdsmirror.configlive import STATISTICS
from qdsmirror.core.evaluation import State
from qdsmirror.core.events import EVENT_HEAD, Seen, mode_lines
from qdsmirror.core.localtime import WallClock
from qdsmirror.core.rates import Rates, Reading
from qdsmirror.core.samples import header, row
from qdsmirror.errors import QdsError, UsageError
from qdsmirror.groups.actions import Actions, Means
from qdsmirror.groups.live import LiveSettings
from qdsmirror.groups.throttling import Throttling
from qdsmirror.groups.tracking import Tracking
from qdsmirror.interfaces import IGroup, IWorker
from qdsmirror.limits import (
    MODES_INTERVAL_SECONDS,
    STATISTICS_ASK_SECONDS,
    STATISTICS_SPREAD_SECONDS,
)
from qdsmirror.net.asking import NobodyThereError, ask
from qdsmirror.net.control import SetKnobs, Status
from qdsmirror.paths import Paths
from qdsmirror.storage.tracking import Directory, GrowingFile
from qdsmirror.storage.worker import ThreadWorker

#: Arguments of programs and texts of mails stand in the events.
_EVENTS_MODE = 0o640


@dataclass
class Machine:
    """What the statistics need of the machine, so that tests can give them another one.

    :ivar reactor: timers and sockets.
    :ivar worker: by name, for what may block.
    :ivar ask: asks a daemon; as :func:`qdsmirror.net.asking.ask`.
    :ivar directory: by path and mode, where files grow.
    :ivar wall: seconds since 1970; ``clock``: what the clocks on the wall show then.
    :ivar master: the number of the process that supervises this one.
    """

    reactor: Any
    worker: Callable[[str], IWorker]
    ask: Callable[..., Deferred[Any]] = ask
    directory: Callable[..., Directory] = Directory
    wall: Callable[[], float] = time.time
    clock: WallClock = datetime.fromtimestamp
    master: int = 0

    @classmethod
    def real(cls, reactor: Any) -> Machine:
        """Give that of a daemon."""
        return cls(reactor, lambda name: ThreadWorker(reactor, name), master=os.getppid())


class _Rhythm:
    """Something that is done again and again; a turn that is missed is left out."""

    def __init__(self, interval: float, do: Callable[[Reading], None]) -> None:
        self.interval = interval
        self.do = do
        self.due = 0.0

    def take(self, now: float) -> bool:
        """Tell whether it is its turn, and note that it was."""
        if now < self.due:
            return False
        begun = self.due or now
        missed = (now - begun) // self.interval
        self.due = begun + (missed + 1) * self.interval
        return True

    def go_by(self, interval: float, now: float) -> None:
        """Have another interval from now on; what is due earlier stays so."""
        self.interval = interval
        if self.due:
            self.due = min(self.due, now + interval)


@implementer(IGroup)
class StatisticsGroup:
    """What the process for statistics does for one group.

    :param means: by which throttles' actions are done.
    :ivar rows: written to the performance tracking file since the start.
    """

    log = Logger()

    def __init__(
        self,
        config: GroupConfig,
        role: Role,
        paths: Paths,
        machine: Machine,
        means: Means | None = None,
    ) -> None:
        self.config = config
        self.role = role
        self.number = config.number
        self.name = config.name
        self.rows = 0
        self._paths = paths
        self._machine = machine
        self._reactor = machine.reactor
        names = [ldsu.name for ldsu in config.ldsus]
        limit = config.tunables.prf_limit
        self._rows = GrowingFile(
            machine.directory(paths.var),
            paths.tracking_file(self.number).name,
            limit,
            header(names),
        )
        self._events = GrowingFile(
            machine.directory(paths.var, _EVENTS_MODE),
            paths.event_file(self.number).name,
            limit,
            EVENT_HEAD,
            durable=True,
        )
        self._rates = Rates(names, role)
        #: By the tunable that has its interval.
        self._tuned = {"perf_interval": _Rhythm(config.tunables.perf_interval, self._track)}
        self._rhythms = [
            self._tuned["perf_interval"],
            _Rhythm(MODES_INTERVAL_SECONDS, lambda _reading: None),
        ]
        self._tracking: Tracking
        self._actions: Actions | None = None
        self._throttling = self._throttles(means) if role == "primary" else None
        self.settings = LiveSettings(self, STATISTICS, self._go_by_settings, role)
        self._file = hashlib.sha256(repr(config).encode()).hexdigest()
        self._seen = Seen()
        self._kept = ""
        self._timer: IDelayedCall | None = None
        #: What is being read for, and what waits until that is done.
        self._served: list[_Rhythm] = []
        self._waiting: list[_Rhythm] = []
        self._stopping: Deferred[None] | None = None
        self._since = machine.wall()

    def _throttles(self, means: Means | None) -> Throttling:
        """Make what evaluates the throttles, and have it done in time."""
        machine, tell = self._machine, self._tell
        self._actions = Actions(
            self.config, self._paths, self._reactor, means or Means(), machine.wall, tell
        )
        made = Throttling(self.config, machine.clock, self._actions, self._turn_knobs, tell)

        def evaluate(reading: Reading) -> None:
            # What would fire now fires in a successor: it is not known to have fired.
            if self._stopping is None:
                made.evaluate(reading)

        rhythm = _Rhythm(self.config.tunables.throttle_interval, evaluate)
        self._tuned["throttle_interval"] = rhythm
        self._rhythms.append(rhythm)
        return made

    def _tell(self, lines: list[str]) -> None:
        self._tracking.write(self._events, lines)

    def _turn_knobs(self, daemon: str, knobs: Mapping[str, int]) -> Deferred[Any]:
        path = self._paths.control_socket(f"{self.name}.{daemon}")
        text = json.dumps(knobs)
        return self._machine.ask(self._reactor, path, SetKnobs, STATISTICS_ASK_SECONDS, knobs=text)

    # -- settings -------------------------------------------------------------------------------

    def set_live(self, settings: str) -> Deferred[dict[str, Any]]:
        """See :meth:`LiveSettings.set`."""
        return self.settings.set(settings)

    @inlineCallbacks
    def _go_by_settings(self) -> Any:
        """Go by ``config`` as it is now; done when a successor would, too."""
        turned = self._tune()
        self._plan()
        yield gatherResults([turned, self._keep()])

    def _tune(self) -> Deferred[Any]:
        tunables, now = self.config.tunables, self._reactor.seconds()
        for name, rhythm in self._tuned.items():
            rhythm.go_by(getattr(tunables, name), now)
        for file in (self._rows, self._events):
            file.go_by(tunables.prf_limit)
        throttling = self._throttling
        return throttling.go_by(self.config) if throttling is not None else succeed(None)

    # -- life -----------------------------------------------------------------------------------

    def start(self) -> Deferred[None]:
        """Begin to ask; succeeds at once, whether anybody answers or not."""
        self._tracking = Tracking(self.name, self._machine.worker(f"{self.name} files"))
        self._take_up()
        # Groups that are started together do not ask at the same moment for ever.
        self._timer = self._reactor.callLater(self.number * STATISTICS_SPREAD_SECONDS, self._turn)
        return succeed(None)

    @inlineCallbacks
    def stop(self) -> Any:
        """Ask nobody any more, and write what waits."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        ended = self._actions.stop() if self._actions is not None else succeed(None)
        if self._served:
            self._stopping = Deferred()
            yield self._stopping
        yield ended
        yield self._tracking.stop(self._rows, self._events)

    def status(self) -> dict[str, Any]:
        """Describe what it does."""
        return {
            "group": self.number,
            "name": self.name,
            "role": self.role,
            "pid": os.getpid(),
            "since": self._since,
            "rows": self.rows,
            "settings": self.settings.status(),
            **(self._throttling.status() if self._throttling is not None else {}),
            "console": [
                {"time": when, "text": text}
                for when, text in (self._actions.console if self._actions is not None else ())
            ],
            "errors": [self._tracking.error] if self._tracking.error else [],
        }

    # -- readings -------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Do what is due now, and come back when something is again."""
        now = self._reactor.seconds()
        due = [one for one in self._rhythms if one.take(now)]
        self._timer = None
        self._plan()
        # Who has not answered yet is not asked again meanwhile: what is being read for already
        # leaves that turn out, the rest has its turn when the answers are there.
        self._waiting += [one for one in due if one not in (*self._served, *self._waiting)]
        self._begin()

    def _plan(self) -> None:
        """Come back when something is due next."""
        if self._timer is not None:
            self._timer.cancel()
        next_ = min(one.due for one in self._rhythms)
        delay = max(0.0, next_ - self._reactor.seconds())
        self._timer = self._reactor.callLater(delay, self._turn)

    def _begin(self) -> None:
        """Read for what waits, unless somebody is being asked."""
        if self._waiting and not self._served:
            self._served, self._waiting = self._waiting, []
            self._read().addCallback(self._take, self._served).addBoth(self._asked)

    def _asked(self, failure: Failure | None) -> None:
        self._served = []
        if failure is not None:
            self.log.failure("{group}: statistics", failure, group=self.name)
        stopping, self._stopping = self._stopping, None
        if stopping is not None:
            stopping.callback(None)
        else:
            self._begin()

    @inlineCallbacks
    def _read(self) -> Any:
        """Ask the group's daemons at the same time."""
        mirror = "pmd" if self.role == "primary" else "rmd"
        asked = [self._ask(mirror)]
        if self.role == "primary":
            asked.append(self._ask("driver"))
        (mirror_said, gone), *driver = yield gatherResults(asked)
        driver_said, driver_gone = driver[0] if driver else (None, False)
        return Reading(
            epoch=self._machine.wall(),
            at=self._reactor.seconds(),
            driver=driver_said,
            mirror=mirror_said,
            gone=gone,
            driver_gone=driver_gone,
        )

    @inlineCallbacks
    def _ask(self, daemon: str) -> Any:
        """Ask one; gives (its status or ``None``, whether nobody is there)."""
        path = self._paths.control_socket(f"{self.name}.{daemon}")
        try:
            said = yield self._machine.ask(self._reactor, path, Status, STATISTICS_ASK_SECONDS)
        except QdsError as error:
            return None, isinstance(error, NobodyThereError)
        return said, False

    def _take(self, reading: Reading, due: Iterable[_Rhythm]) -> None:
        self._seen, lines = mode_lines(self._seen, reading, self.role)
        self._tell(lines)
        for rhythm in due:
            rhythm.do(reading)
        self._keep()

    def _track(self, reading: Reading) -> None:
        """Add a row; the first reading has nothing to be compared with."""
        first = not self._rates.begun
        sample = self._rates.sample(reading)
        if not first:
            self.rows += 1
            self._tracking.write(self._rows, [row(sample)])

    # -- what a successor takes up --------------------------------------------------------------

    def _keep(self) -> Deferred[None]:
        """Leave to a successor what must not be told, or done, twice, and what was set."""
        kept: dict[str, Any] = {"master": self._machine.master, "seen": self._seen.to_json()}
        if self._throttling is not None:
            kept["throttles"] = self._throttling.state.to_json()
        if self.settings.texts:
            kept |= {"file": self._file, "settings": self.settings.texts}
        text = json.dumps(kept)
        if text == self._kept:
            return succeed(None)
        self._kept = text
        return self._tracking.replace(self._paths.statistics_file(self.number), text)

    def _take_up(self) -> None:
        """Go on where a process that was killed has stopped."""
        try:
            kept = json.loads(self._paths.statistics_file(self.number).read_text("utf-8"))
            self._seen = Seen.from_json(kept["seen"])
            if kept["master"] != self._machine.master:
                # At the start of the daemons everything begins anew.
                return
            if self._throttling is not None:
                self._throttling.state = State.from_json(kept["throttles"])
            if kept.get("file") == self._file:
                # (Another file says itself what is wanted.)
                self.settings.go_by(kept["settings"])
                self._tune()
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError, UsageError) as error:
            self.log.warn(
                "{group}: its statistics begin anew: {error}", group=self.name, error=error
            )
