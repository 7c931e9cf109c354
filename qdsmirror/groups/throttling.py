"""Evaluates a group's throttles, turns its knobs, and has its actions done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from qdsmirror.config import GroupConfig
from qdsmirror.core.evaluation import Fired, State, carried, evaluate
from qdsmirror.core.events import fired_line
from qdsmirror.core.localtime import WallClock
from qdsmirror.core.rates import Rates, Reading
from qdsmirror.core.throttles import FREE, LIMIT, SLEEP, WRITESLEEP
from qdsmirror.errors import QdsError
from qdsmirror.groups.actions import Actions

#: Which daemon has which knobs.
_TURNED = (SLEEP, WRITESLEEP, LIMIT)
KNOBS = {"pmd": ("sleep_us", "limit_kbps"), "driver": ("writesleep_us",)}


class Throttling:
    """The throttles of one group.

    :param clock: what the clocks on the wall show.
    :param turn: tells a daemon (``driver``, ``pmd``) what its knobs are to be.
    :param tell: takes lines for the group's events.
    :ivar state: what one evaluation leaves to the next.
    """

    log = Logger()

    def __init__(
        self,
        config: GroupConfig,
        clock: WallClock,
        actions: Actions,
        turn: Callable[[str, Mapping[str, int]], Deferred[Any]],
        tell: Callable[[list[str]], None],
    ) -> None:
        self.state = State()
        self._config = config
        self._clock = clock
        self._actions = actions
        self._turn = turn
        self._tell = tell
        self._rates = Rates([ldsu.name for ldsu in config.ldsus], "primary")
        #: By throttle: how often it has fired since the start, and when last.
        self._counts: dict[str, tuple[int, float | None]] = {
            one.name: (0, None) for one in config.throttles
        }
        #: Throttles that fired at the last evaluation.
        self._firing: frozenset[str] = frozenset()
        self._turning: set[str] = set()
        self._now = 0.0

    def evaluate(self, reading: Reading) -> None:
        """Evaluate all throttles on what happened since the last time, and do what follows."""
        sample = self._rates.sample(reading)
        before = self.state.knobs
        outcome = evaluate(self._config.throttles, self.state, [sample], reading.epoch, self._clock)
        self.state = outcome.state
        turned = self.state.knobs != before
        self._now = reading.epoch
        extended = _extended(reading)
        if reading.driver is not None:
            self._actions.try_again(self._is_true)
        for fired in outcome.fired:
            self._fire(fired, turned, extended)
        self._firing = frozenset(fired.throttle.name for fired in outcome.fired)
        self._turn_knobs(reading)

    def go_by(self, config: GroupConfig) -> Deferred[Any]:
        """Go by throttles of other numbers; a limit that is in force is another one at once.

        :returns: fires, and never fails, when the pmd was told of that.
        """
        self._config = config
        before, self.state = self.state.knobs, carried(self.state, config.throttles)
        if self.state.knobs == before or "pmd" in self._turning:
            # (Whoever is just being told is told again at the next evaluation.)
            return succeed(None)
        return self._tell_knobs("pmd")

    def status(self) -> dict[str, Any]:
        """Describe the throttles, and what is to be in force."""
        knobs = self.state.knobs
        return {
            "throttles": [
                {"name": name, "fired": count, "last": last}
                for name, (count, last) in self._counts.items()
            ],
            "knobs": {name: getattr(knobs, name) for of in KNOBS.values() for name in of},
        }

    # -- firing ---------------------------------------------------------------------------------

    def _fire(self, fired: Fired, turned: bool, extended: frozenset[str]) -> None:
        name = fired.throttle.name
        self._counts[name] = (self._counts[name][0] + 1, self._now)
        if turned or name not in self._firing or self._has_work(fired, extended):
            self._tell([fired_line(self._now, fired)])
            self.log.info("{group}: throttle {fired}", group=self._config.name, fired=str(fired))
        self._actions.perform(fired, extended)

    def _has_work(self, fired: Fired, extended: frozenset[str]) -> bool:
        """Tell whether a throttle that fires again does anything new beside turning knobs."""
        return any(
            not extended.isdisjoint(fired.targets) if one.kind == FREE else one.kind not in _TURNED
            for one in fired.actions
            if not self._actions.is_failing(fired, one)
        )

    def _is_true(self, fired: Fired, ldsu: str) -> bool:
        """Tell whether what a throttle fired for is still so."""
        subjects = self.state.true_of.get(fired.throttle.condition, frozenset())
        return (ldsu in subjects) if fired.ldsus else bool(subjects)

    # -- knobs ----------------------------------------------------------------------------------

    def _turn_knobs(self, reading: Reading) -> None:
        """Tell the daemons that go by other knobs than they should, new ones among them."""
        for daemon in KNOBS:
            said = reading.driver if daemon == "driver" else reading.mirror
            if said is None or daemon in self._turning:
                continue
            known = said.get("knobs", {})
            if any(known.get(name) != value for name, value in self._wanted(daemon).items()):
                self._tell_knobs(daemon)

    def _wanted(self, daemon: str) -> dict[str, int]:
        knobs = self.state.knobs
        return {name: getattr(knobs, name) for name in KNOBS[daemon]}

    def _tell_knobs(self, daemon: str) -> Deferred[Any]:
        self._turning.add(daemon)
        turned = self._turn(daemon, self._wanted(daemon))
        return turned.addBoth(self._turned, daemon).addErrback(self._not_turned, daemon)

    def _turned(self, result: Any, daemon: str) -> Any:
        self._turning.discard(daemon)
        return result

    def _not_turned(self, failure: Failure, daemon: str) -> None:
        """Say that a daemon did not obey; at the next evaluation it is told again."""
        if not isinstance(failure.value, QdsError):
            self.log.failure("{group}: {daemon}", failure, group=self._config.name, daemon=daemon)
            return
        self.log.warn(
            "{group}: the {daemon} was not told what throttles have set: {error}",
            group=self._config.name, daemon=daemon, error=failure.value,
        )  # fmt: skip


def _extended(reading: Reading) -> frozenset[str]:
    """Name the LDSUs whose writelogs have an extension that could be freed."""
    return frozenset(
        one["name"]
        for one in (reading.driver or {}).get("ldsus") or ()
        if any(not each["leaving"] for each in one["writelog"].get("extensions") or ())
    )
