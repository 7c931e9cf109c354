"""The modes of a group and every way between them (patent: "operating modes").

Modes may hold at the same time; the state that is shown is the first that holds.  Of setup,
accumulating and connected one holds at any time.  Refresh, bypass and backfresh come on top:
refresh alone, backfresh and bypass also together.  Page qdsmirror-modes(7) is drawn from the two
tables below.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import NamedTuple

from qdsmirror.errors import DegradedError
from qdsmirror.limits import MODE_CHANGES_KEPT


class Mode(StrEnum):
    """A mode of a group, in the order in which ``state`` is chosen."""

    BACKFRESH = "backfresh"
    REFRESH = "refresh"
    BYPASS = "bypass"
    ACCUMULATING = "accumulating"
    CONNECTED = "connected"
    SETUP = "setup"


_IN_ORDER = tuple(Mode)


class Event(Enum):
    """What moves a group from mode to mode."""

    DRIVER_STARTED = "the driver serves the group's LDSUs"
    DRIVER_STOPPED = "the driver does not serve the group's LDSUs"
    LINK_UP = "the secondary has authenticated and mapped every LDSU"
    LINK_DOWN = "the link to the secondary is gone"
    REFRESH_BEGUN = "a refresh has durably begun"
    REFRESH_RESTARTED = "a refresh has durably begun anew"
    REFRESH_ENDED = "the end mark of the refresh is committed"
    REFRESH_KILLED = "the refresh was ended before its end"
    BYPASS_BEGUN = "bypass is durable, and writes go past the writelog"
    BYPASS_ENDED = "a new generation is durable, and a refresh in it"
    WRITELOG_FAILED = "a failed writelog is durably untrusted, and writes go past it"
    BACKFRESH_BEGUN = "a backfresh has durably begun"
    BACKFRESH_ENDED = "the end of the backfresh is durable"
    BACKFRESH_KILLED = "the backfresh was ended before its end"


@dataclass(frozen=True)
class Transition:
    """One way between modes: where ``event`` finds ``when``, ``leaves`` give way to ``enters``.

    :ivar unless: the way is closed while one of these holds.
    """

    event: Event
    when: frozenset[Mode]
    leaves: frozenset[Mode]
    enters: frozenset[Mode]
    why: str
    unless: frozenset[Mode] = frozenset()

    def applies(self, event: Event, modes: frozenset[Mode]) -> bool:
        """Tell whether this is the way that an event takes from these modes."""
        return self.event is event and self.when <= modes and not self.unless & modes


@dataclass(frozen=True)
class Refusal:
    """What an operator is told who asks for an event that has no way from here.

    :ivar when: applies while all of these hold, ``unless`` none of those.
    :ivar says: what is in the way, after the group's name.
    :ivar hint: the way out: the next command, with the group's ``{number}`` to be filled in.
    """

    event: Event
    when: frozenset[Mode]
    unless: frozenset[Mode]
    says: str
    hint: str

    def applies(self, event: Event, modes: frozenset[Mode]) -> bool:
        """Tell whether this is what is in the way of an event in these modes."""
        return self.event is event and self.when <= modes and not self.unless & modes


def _ways(*modes: Mode) -> frozenset[Mode]:
    return frozenset(modes)


_S, _A, _C, _R = Mode.SETUP, Mode.ACCUMULATING, Mode.CONNECTED, Mode.REFRESH
_B, _K = Mode.BYPASS, Mode.BACKFRESH

TRANSITIONS: tuple[Transition, ...] = (
    Transition(
        Event.DRIVER_STARTED, _ways(_S), _ways(_S), _ways(_A),
        "writes are journaled from the first moment; nothing removes them yet",
    ),
    Transition(
        Event.DRIVER_STOPPED, _ways(_A), _ways(_A, _R, _B, _K), _ways(_S),
        "no LDSU exists; refresh, bypass and backfresh go on when the driver starts again",
    ),
    Transition(
        Event.DRIVER_STOPPED, _ways(_C), _ways(_C, _R, _B, _K), _ways(_S),
        "the pmd loses the driver with the LDSUs",
    ),
    Transition(
        Event.LINK_UP, _ways(_A), _ways(_A), _ways(_C),
        "the pmd moves entries to the secondary",
    ),
    Transition(
        Event.LINK_DOWN, _ways(_C), _ways(_C), _ways(_A),
        "the writelog absorbs the outage",
    ),
    Transition(
        Event.LINK_DOWN, _ways(_A), _ways(), _ways(_A),
        "the outage goes on, perhaps for another reason",
    ),
    Transition(
        Event.REFRESH_BEGUN, _ways(_A), _ways(), _ways(_R),
        "chunks wait in the writelog for the link, within the refresh's share of it",
        _ways(_R, _B, _K),
    ),
    Transition(
        Event.REFRESH_BEGUN, _ways(_C), _ways(), _ways(_R),
        "chunks travel between the application's writes", _ways(_R, _B, _K),
    ),
    Transition(
        Event.REFRESH_RESTARTED, _ways(_R), _ways(), _ways(_R),
        "the secondary has lost part of what it was sent",
    ),
    Transition(
        Event.REFRESH_ENDED, _ways(_R), _ways(_R), _ways(),
        "the mirror is coherent again",
    ),
    Transition(
        Event.REFRESH_KILLED, _ways(_R), _ways(_R), _ways(),
        "the mirror stays incoherent until another refresh",
    ),
    Transition(
        Event.BYPASS_BEGUN, _ways(_A), _ways(_R), _ways(_B),
        "the writelog is full, or the operator wants it so; a refresh cannot go on without it",
        _ways(_B, _K),
    ),
    Transition(
        Event.BYPASS_BEGUN, _ways(_C), _ways(_R), _ways(_B),
        "what lies before the break still travels; nothing after it will", _ways(_B, _K),
    ),
    Transition(
        Event.WRITELOG_FAILED, _ways(_A), _ways(_R), _ways(_B),
        "nothing can be journaled any more; a backfresh, which needs no journal, stays", _ways(_B),
    ),
    Transition(
        Event.WRITELOG_FAILED, _ways(_C), _ways(_R), _ways(_B),
        "what was durable in the writelogs still travels; nothing after it will", _ways(_B),
    ),
    Transition(
        Event.BYPASS_ENDED, _ways(_B), _ways(_B), _ways(_R),
        "the writelog knows nothing of what was written meanwhile: only a refresh leads out",
        _ways(_K),
    ),
    Transition(
        Event.BACKFRESH_BEGUN, _ways(_A), _ways(), _ways(_K),
        "the LDSUs are closed to applications; blocks are fetched once the link is there",
        _ways(_R, _K),
    ),
    Transition(
        Event.BACKFRESH_BEGUN, _ways(_C), _ways(), _ways(_K),
        "the LDSUs are closed to applications; blocks are fetched from the mirror", _ways(_R, _K),
    ),
    Transition(
        Event.BACKFRESH_ENDED, _ways(_K), _ways(_K), _ways(),
        "the local data devices are coherent again, and what held before holds on",
    ),
    Transition(
        Event.BACKFRESH_KILLED, _ways(_K), _ways(_K), _ways(),
        "the local data devices stay incoherent until another backfresh",
    ),
)  # fmt: skip

#: The events that an operator's command asks for.
ASKED = (
    Event.REFRESH_BEGUN,
    Event.REFRESH_KILLED,
    Event.BYPASS_BEGUN,
    Event.BYPASS_ENDED,
    Event.BACKFRESH_BEGUN,
    Event.BACKFRESH_KILLED,
)

_NOT_SERVED = "its driver does not serve it"
_START = "launchdriver, then qdsinfo -g {number}"
_WATCH_REFRESH = "watch it with qdsinfo -g {number}, or end it with killrefresh -g {number}"
_END_BACKFRESH = (
    "wait until it has ended (qdsinfo -g {number}), or end it: killbackfresh -g {number}"
)
_AFTER_REFRESH = "wait until it has ended: qdsinfo -g {number} --wait coherent"

#: The first that applies is told.
REFUSALS: tuple[Refusal, ...] = (
    *(Refusal(event, _ways(_S), _ways(), _NOT_SERVED, _START) for event in ASKED),
    Refusal(
        Event.REFRESH_BEGUN, _ways(_R), _ways(), "a refresh is running already", _WATCH_REFRESH,
    ),
    Refusal(
        Event.REFRESH_BEGUN, _ways(_K), _ways(), "a backfresh is running", _END_BACKFRESH,
    ),
    Refusal(
        Event.REFRESH_BEGUN, _ways(_B), _ways(), "it is in bypass",
        "qdsbypass off -g {number} leaves it with a refresh",
    ),
    Refusal(
        Event.REFRESH_KILLED, _ways(_K), _ways(_R), "no refresh is running, but a backfresh",
        _END_BACKFRESH,
    ),
    Refusal(
        Event.REFRESH_KILLED, _ways(), _ways(_R), "no refresh is running",
        "launchrefresh -g {number} begins one",
    ),
    Refusal(
        Event.BYPASS_BEGUN, _ways(_K), _ways(), "a backfresh is running", _END_BACKFRESH,
    ),
    Refusal(
        Event.BYPASS_BEGUN, _ways(_B), _ways(), "it is in bypass already",
        "qdsbypass off -g {number} leaves it with a refresh",
    ),
    Refusal(
        Event.BYPASS_ENDED, _ways(_K), _ways(), "a backfresh is running", _END_BACKFRESH,
    ),
    Refusal(
        Event.BYPASS_ENDED, _ways(_R), _ways(), "it is not in bypass; a refresh is running",
        _WATCH_REFRESH,
    ),
    Refusal(
        Event.BYPASS_ENDED, _ways(), _ways(_B), "it is not in bypass",
        "make the mirror anew with qdsrefresh -g {number}",
    ),
    Refusal(
        Event.BACKFRESH_BEGUN, _ways(_K), _ways(), "a backfresh is running already",
        _END_BACKFRESH,
    ),
    Refusal(
        Event.BACKFRESH_BEGUN, _ways(_R), _ways(), "a refresh is running, and has changed the "
        "mirror already", _AFTER_REFRESH,
    ),
    Refusal(
        Event.BACKFRESH_KILLED, _ways(_R), _ways(), "no backfresh is running, but a refresh",
        _AFTER_REFRESH,
    ),
    Refusal(
        Event.BACKFRESH_KILLED, _ways(), _ways(_K), "no backfresh is running",
        "launchbackfresh -g {number} --yes begins one",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Holding:
    """Since when a mode holds, in seconds since 1970, and why."""

    since: float
    reason: str


class Changed(NamedTuple):
    """A change of modes.

    :ivar number: of the change, from 1.
    :ivar time: seconds since 1970.
    :ivar modes: those that held from then on, in the order of :class:`Mode`.
    """

    number: int
    time: float
    modes: tuple[Mode, ...]
    reason: str


class GroupModes:
    """The modes of one group.

    :param name: the group's, and its number: for what is told to an operator.
    :param now: seconds since 1970.
    :ivar since: when the shown state was entered, seconds since 1970.
    :ivar changes: the last ones, oldest first.
    """

    def __init__(self, name: str, number: int, now: float) -> None:
        self._name, self._number = name, number
        self._held = {Mode.SETUP: Holding(now, Event.DRIVER_STOPPED.value)}
        self.since = now
        self.changes: deque[Changed] = deque(maxlen=MODE_CHANGES_KEPT)
        self._count = 0

    @property
    def modes(self) -> frozenset[Mode]:
        """Those that hold now."""
        return frozenset(self._held)

    @property
    def shown(self) -> list[Mode]:
        """The modes that hold, in the order of :class:`Mode`."""
        return [mode for mode in _IN_ORDER if mode in self._held]

    @property
    def state(self) -> Mode:
        """The first of the modes that hold, in the order of :class:`Mode`."""
        return self.shown[0]

    @property
    def reason(self) -> str:
        """Why the shown state holds."""
        return self._held[self.state].reason

    @property
    def details(self) -> list[tuple[Mode, Holding]]:
        """Each mode that holds, in the order of :class:`Mode`, with its since and reason."""
        return [(mode, self._held[mode]) for mode in self.shown]

    def allows(self, event: Event, *coming: Mode) -> bool:
        """Tell whether an event means anything in the present modes.

        :param coming: modes that are about to hold, and count as if they did.
        """
        modes = self.modes.union(coming)
        return any(way.applies(event, modes) for way in TRANSITIONS)

    def refuse(self, event: Event, *coming: Mode) -> None:
        """Refuse what an operator asks for, if it has no way from here.

        :param event: one of ASKED.
        :param coming: see :meth:`allows`.
        :raises DegradedError: it has none; the hint is the way out.
        """
        if self.allows(event, *coming):
            return
        modes = self.modes.union(coming)
        refusal = next(one for one in REFUSALS if one.applies(event, modes))
        hint = refusal.hint.format(number=self._number)
        raise DegradedError(f"{self._name}: {refusal.says}", hint=hint)

    def happen(self, event: Event, now: float, reason: str = "") -> bool:
        """Follow an event.

        A mode that is entered while it holds keeps its since, and takes the new reason.

        :param now: since when it is so, seconds since 1970.
        :param reason: why; "" for the event itself.
        :returns: whether there was a way; an event with none from here changes nothing.
        """
        way = next((way for way in TRANSITIONS if way.applies(event, self.modes)), None)
        if way is None:
            return False
        before, held = self.state, self.modes
        for mode in way.leaves:
            self._held.pop(mode, None)
        for mode in way.enters:
            since = self._held[mode].since if mode in self._held else now
            self._held[mode] = Holding(since, reason or event.value)
        if self.state is not before:
            self.since = now
        if self.modes != held:
            self._count += 1
            changed = Changed(self._count, now, tuple(self.shown), reason or event.value)
            self.changes.append(changed)
        return True
