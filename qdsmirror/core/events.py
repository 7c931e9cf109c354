"""The lines of a group's event file (page qdsprf(5)), and which of its modes' changes are news."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qdsmirror.core.evaluation import Fired
from qdsmirror.core.rates import Reading
from qdsmirror.core.throttles import Throttle, quoted
from qdsmirror.limits import EVENT_LINE_CHARS_MAX

#: The first line, and the first words of others, behind their time.
EVENT_HEAD = "# epoch what text"
MODE, FIRED, DONE, FAILED, CONSOLE = "mode", "fired", "done", "failed", "console"


def event_line(epoch: float, what: str, text: str) -> str:
    """Make a line, without its end: one line of printable ASCII, whatever the text holds.

    :param epoch: seconds since 1970.
    """
    clean = "".join(one if " " <= one <= "~" else "?" for one in " ".join(text.split()))
    return f"{epoch:.3f} {what} {clean}"[:EVENT_LINE_CHARS_MAX]


def fired_line(epoch: float, fired: Fired) -> str:
    """Make the line of a throttle that has fired."""
    said = str(fired).removeprefix(f"{fired.throttle.name}: ")
    actions = "; ".join(map(str, fired.actions))
    return event_line(epoch, FIRED, f"{quoted(fired.throttle.name)} {said}: {actions}")


def action_line(epoch: float, what: str, throttle: Throttle, action: object, text: str) -> str:
    """Make the line of what an action came to: ``what`` is DONE or FAILED."""
    return event_line(epoch, what, f"{quoted(throttle.name)} {action}: {text}")


@dataclass(frozen=True)
class Seen:
    """What was seen of a group's modes last.

    :ivar run: of the driver's process; 0: none.
    :ivar number: of the last change that it had told.
    :ivar modes: those that held.
    """

    run: int = 0
    number: int = 0
    modes: tuple[str, ...] = ()

    def to_json(self) -> list[Any]:
        """Give it as JSON."""
        return [self.run, self.number, list(self.modes)]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> Seen:
        """Take it from JSON.

        :raises ValueError: it is not what :meth:`to_json` gave; also TypeError.
        """
        run, number, modes = value
        return cls(int(run), int(number), tuple(map(str, modes)))


def mode_lines(seen: Seen, reading: Reading, role: str) -> tuple[Seen, list[str]]:
    """Give the lines of the changes since they were seen last, and what is seen now."""
    own = reading.driver if role == "primary" else reading.mirror
    if own is None:
        absent = reading.driver_gone if role == "primary" else reading.gone
        if not absent or seen.modes == ("setup",):
            return seen, []
        name = "driver" if role == "primary" else "rmd"
        line = event_line(reading.epoch, MODE, f"setup its {name} does not serve it")
        return Seen(seen.run, seen.number, ("setup",)), [line]
    modes = tuple(map(str, own.get("modes") or ()))
    if role != "primary":
        if modes == seen.modes:
            return seen, []
        text = f"{','.join(modes)} {own.get('reason') or ''}"
        return Seen(modes=modes), [event_line(reading.epoch, MODE, text)]
    run = int(own.get("driver", {}).get("pid") or 0)
    known = seen.number if run == seen.run else 0
    fresh = [one for one in own.get("changes") or () if one["number"] > known]
    number = max((one["number"] for one in fresh), default=known)
    return Seen(run, number, modes), list(_changes(fresh))


def _changes(fresh: Iterable[Any]) -> Iterable[str]:
    for one in fresh:
        yield event_line(one["time"], MODE, f"{','.join(one['modes'])} {one['reason']}")
