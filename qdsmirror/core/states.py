"""The modes of a group and every way between them (patent: "operating modes").

Modes may hold at the same time; the state that is shown is the first that holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum


class Mode(StrEnum):
    """A mode of a group, in the order in which ``state`` is chosen."""

    REFRESH = "refresh"
    BYPASS = "bypass"
    ACCUMULATING = "accumulating"
    CONNECTED = "connected"
    SETUP = "setup"


class Event(Enum):
    """What moves a group from mode to mode."""

    DRIVER_STARTED = "the driver serves the group's LDSUs"
    DRIVER_STOPPED = "the driver stops serving"
    LINK_UP = "the secondary has authenticated and mapped every LDSU"
    LINK_DOWN = "the link to the secondary is gone"
    REFRESH_BEGUN = "a refresh has durably begun"
    REFRESH_ENDED = "the end mark of the refresh is committed"
    REFRESH_KILLED = "the operator ended the refresh"
    BYPASS_BEGUN = "bypass is durable, and writes go past the writelog"
    BYPASS_ENDED = "a new generation is durable, and a refresh in it"


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


def _ways(*modes: Mode) -> frozenset[Mode]:
    return frozenset(modes)


_S, _A, _C, _R = Mode.SETUP, Mode.ACCUMULATING, Mode.CONNECTED, Mode.REFRESH
_B = Mode.BYPASS

TRANSITIONS: tuple[Transition, ...] = (
    Transition(
        Event.DRIVER_STARTED, _ways(_S), _ways(_S), _ways(_A),
        "writes are journaled from the first moment; nothing removes them yet",
    ),
    Transition(
        Event.DRIVER_STOPPED, _ways(_A), _ways(_A, _R, _B), _ways(_S),
        "no LDSU exists; a refresh or bypass goes on when the driver starts again",
    ),
    Transition(
        Event.DRIVER_STOPPED, _ways(_C), _ways(_C, _R, _B), _ways(_S),
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
        Event.REFRESH_BEGUN, _ways(_A), _ways(), _ways(_R),
        "chunks wait in the writelog for the link, within the refresh's share of it", _ways(_B),
    ),
    Transition(
        Event.REFRESH_BEGUN, _ways(_C), _ways(), _ways(_R),
        "chunks travel between the application's writes", _ways(_B),
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
        _ways(_B),
    ),
    Transition(
        Event.BYPASS_BEGUN, _ways(_C), _ways(_R), _ways(_B),
        "what lies before the break still travels; nothing after it will", _ways(_B),
    ),
    Transition(
        Event.BYPASS_ENDED, _ways(_B), _ways(_B), _ways(_R),
        "the writelog knows nothing of what was written meanwhile: only a refresh leads out",
    ),
)  # fmt: skip


class GroupModes:
    """The modes of one group.

    :ivar modes: those that hold now.
    :ivar since: when the shown state was entered, seconds since 1970.
    :ivar reason: why.
    """

    def __init__(self, now: float) -> None:
        self.modes: frozenset[Mode] = frozenset({Mode.SETUP})
        self.since = now
        self.reason = ""

    @property
    def shown(self) -> list[Mode]:
        """The modes that hold, in the order of :class:`Mode`."""
        return [mode for mode in Mode if mode in self.modes]

    @property
    def state(self) -> Mode:
        """The first of the modes that hold, in the order of :class:`Mode`."""
        return self.shown[0]

    def allows(self, event: Event) -> bool:
        """Tell whether an event means anything in the present modes."""
        return any(way.applies(event, self.modes) for way in TRANSITIONS)

    def happen(self, event: Event, now: float, reason: str = "") -> bool:
        """Follow an event.

        :returns: whether the modes changed; an event with no way from here changes nothing.
        """
        for way in TRANSITIONS:
            if way.applies(event, self.modes):
                before = self.state
                self.modes = self.modes - way.leaves | way.enters
                if self.state is not before:
                    self.since = now
                self.reason = reason
                return True
        return False
