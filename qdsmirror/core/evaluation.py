"""What a group's throttles say to its measured values: which fire, and what is in force then.

Pure: whoever evaluates gives the samples and the time, keeps the state between evaluations, and
does what the outcome says.  Pages qdsthrottle(5) and interface.md have the semantics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qdsmirror.core.localtime import WallClock, is_within
from qdsmirror.core.samples import GroupSample
from qdsmirror.core.throttles import INC, LIMIT, SET, SLEEP, WRITESLEEP, Action, Throttle
from qdsmirror.limits import THROTTLE_SLEEP_USEC_MAX

#: The subject of a measure that is the group's, not an LDSU's.
GROUP = ""


@dataclass(frozen=True)
class Knobs:
    """What holds the data path back.

    :ivar sleep_us: microseconds before each entry is sent.
    :ivar writesleep_us: microseconds before a write is answered.
    :ivar limit_kbps: KB a second on the wire; 0: no limit.
    """

    sleep_us: int = 0
    writesleep_us: int = 0
    limit_kbps: int = 0


@dataclass(frozen=True)
class State:
    """What an evaluation leaves to the next one.

    :ivar sleep_us: see :class:`Knobs`; likewise ``writesleep_us``.
    :ivar limits: KB a second by the throttle that set it and whose window is open; the lowest
        holds.
    :ivar true_of: by throttle's :attr:`~qdsmirror.core.throttles.Throttle.condition`, of which
        subjects its relation was true last; only of throttles whose window is open.
    """

    sleep_us: int = 0
    writesleep_us: int = 0
    limits: Mapping[str, int] = field(default_factory=dict)
    true_of: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def knobs(self) -> Knobs:
        """What is in force."""
        return Knobs(self.sleep_us, self.writesleep_us, min(self.limits.values(), default=0))

    def to_json(self) -> list[Any]:
        """Give it as JSON, for a process that goes on where another one was killed."""
        true_of = {name: sorted(subjects) for name, subjects in self.true_of.items()}
        return [self.sleep_us, self.writesleep_us, dict(self.limits), true_of]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> State:
        """Take it from JSON.

        :raises ValueError: it is not what :meth:`to_json` gave; also TypeError, AttributeError.
        """
        sleep, writesleep, limits, true_of = value
        return cls(
            int(sleep),
            int(writesleep),
            {str(name): int(kbps) for name, kbps in limits.items()},
            {str(name): frozenset(map(str, subjects)) for name, subjects in true_of.items()},
        )


@dataclass(frozen=True)
class Fired:
    """A throttle whose test was true.

    :ivar value: what was measured; of several LDSUs the first one's.
    :ivar ldsus: those that made ``pctwl`` true; empty for other measures.
    :ivar targets: LDSUs whose writelogs ``extend`` and ``free`` mean: those, else the fullest.
    """

    throttle: Throttle
    value: float
    ldsus: tuple[str, ...]
    targets: tuple[str, ...]

    @property
    def actions(self) -> tuple[Action, ...]:
        """What is to be done, in order; the knobs are in the outcome's state already."""
        return self.throttle.actions

    def __str__(self) -> str:
        of = f" ({' '.join(self.ldsus)})" if self.ldsus else ""
        places = 3 if self.throttle.test.measure == "lag" else 0
        return f"{self.throttle.name}: {self.throttle.test}: {self.value:.{places}f}{of}"


@dataclass(frozen=True)
class Outcome:
    """One evaluation: what it leaves to the next one, and which throttles have fired."""

    state: State
    fired: tuple[Fired, ...]


#: Measured values by measure and subject: an LDSU's name, or GROUP.  What is not known is missing.
Measured = Mapping[str, Mapping[str, float]]


def measure(history: Sequence[GroupSample]) -> Measured:
    """Give the values that tests are about.

    :param history: the samples since the last evaluation, oldest first, or the newest alone.
        Rates are their means; fill and lag those of the newest sample.
    """
    if not history:
        return {}
    newest = history[-1]
    found = {
        "netkbps": {GROUP: _mean(_netkbps(one) for one in history)},
        "pctcpu": {GROUP: _mean(one.pctcpu for one in history)},
        "pctwl": {one.name: one.pctwl for one in newest.ldsus},
        "lag": {GROUP: _lag(newest)},
    }
    return {
        name: {subject: value for subject, value in values.items() if value is not None}
        for name, values in found.items()
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _netkbps(sample: GroupSample) -> float | None:
    """Give the group's rate, which a file of before it had a column has by LDSU only."""
    if sample.netkbps is not None:
        return sample.netkbps
    known = [one.total_kbps for one in sample.ldsus if one.total_kbps is not None]
    return sum(known) if known else None


def _lag(sample: GroupSample) -> float | None:
    if sample.lag_seconds is not None:
        return sample.lag_seconds
    return max(
        (one.age_seconds for one in sample.ldsus if one.age_seconds is not None), default=None
    )


def evaluate(
    throttles: Sequence[Throttle],
    state: State,
    history: Sequence[GroupSample],
    now: float,
    clock: WallClock,
) -> Outcome:
    """Evaluate a group's throttles, in their order.

    What a throttle sets, the next one's ``inc`` and ``dec`` go by.

    :param state: what the last evaluation left; ``State()`` at the first, or with the sleeps that
        the daemons say are in force.
    :param history: see :func:`measure`.
    :param now: seconds since 1970; ``clock``: gives the host's wall-clock time of it.
    """
    measured = measure(history)
    open_ = [one for one in throttles if is_within(one.window, now, clock)]
    state = _kept(state, throttles, open_)
    true_of = dict(state.true_of)
    fired: list[Fired] = []
    for throttle in open_:
        values = measured.get(throttle.test.measure, {})
        before = true_of.get(throttle.condition, frozenset())
        holds = frozenset(name for name, value in values.items() if throttle.test.holds(value))
        # Of what is not known now, what was known last still counts.
        true_of[throttle.condition] = holds | (before - values.keys())
        due = holds - before if throttle.test.transition else holds
        if due:
            one = _fired(throttle, tuple(name for name in values if name in due), measured)
            fired.append(one)
            state = _turn(state, throttle)
    return Outcome(replace(state, true_of=true_of), tuple(fired))


def carried(state: State, throttles: Sequence[Throttle]) -> State:
    """Give the state with which to go on by throttles of other numbers.

    A limit that is in force becomes what its throttle sets now, without another transition.
    """
    sets = {one.name: one.limit for one in throttles}
    limits = {}
    for name in state.limits:
        action = sets.get(name)
        if action is not None and action.amount is not None:
            limits[name] = action.amount
    return replace(state, limits=limits)


def _kept(state: State, throttles: Sequence[Throttle], open_: Sequence[Throttle]) -> State:
    """Give what still counts of a state, of throttles and those whose window is open."""
    conditions = {one.condition for one in open_}
    # One that its throttle does not set any more, which was changed, has ended too.
    sets = {(one.name, action.amount) for one in open_ for action in one.actions}
    # A sleep outlasts its window, but what no throttle turns nobody would ever turn back.
    turned = {action.kind for one in throttles for action in one.actions}
    return State(
        state.sleep_us if SLEEP in turned else 0,
        state.writesleep_us if WRITESLEEP in turned else 0,
        {name: kbps for name, kbps in state.limits.items() if (name, kbps) in sets},
        {key: subjects for key, subjects in state.true_of.items() if key in conditions},
    )


def _fired(throttle: Throttle, due: tuple[str, ...], measured: Measured) -> Fired:
    fill = measured.get("pctwl", {})
    ldsus = tuple(name for name in due if name != GROUP)
    fullest = tuple(sorted(fill, key=lambda name: -fill[name])[:1])
    return Fired(throttle, measured[throttle.test.measure][due[0]], ldsus, ldsus or fullest)


def _turn(state: State, throttle: Throttle) -> State:
    """Turn the knobs as a throttle says that has fired."""
    for action in throttle.actions:
        if action.kind == SLEEP:
            state = replace(state, sleep_us=_slept(state.sleep_us, action))
        elif action.kind == WRITESLEEP:
            state = replace(state, writesleep_us=_slept(state.writesleep_us, action))
        elif action.kind == LIMIT and action.amount is None:
            state = replace(state, limits={})
        elif action.kind == LIMIT:
            state = replace(state, limits={**state.limits, throttle.name: action.amount or 0})
    return state


def _slept(now: int, action: Action) -> int:
    amount = action.amount or 0
    wanted = amount if action.how == SET else now + (amount if action.how == INC else -amount)
    return max(0, min(wanted, THROTTLE_SLEEP_USEC_MAX))
