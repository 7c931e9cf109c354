"""Draws qdsmirror-modes(7) from the tables in qdsmirror/core/states.py.

``python man/modes.py`` (``make man``) writes the page; a test holds it to the tables.  A picture
has a column for each thing that can be, with a line downwards, and an arrow for each way between
two of them, under the events that take it.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qdsmirror.core.states import ASKED, REFUSALS, TRANSITIONS, Event, GroupModes, Mode

PAGE = Path(__file__).resolve().parent / "man7" / "qdsmirror-modes.7"
DATE = "November 23, 2026"
COMMANDS = {
    Event.REFRESH_BEGUN: "qdsrefresh, launchrefresh",
    Event.REFRESH_KILLED: "killrefresh",
    Event.BYPASS_BEGUN: "qdsbypass on",
    Event.BYPASS_ENDED: "qdsbypass off; in bypass also qdsrefresh and launchrefresh",
    Event.BACKFRESH_BEGUN: "qdsbackfresh, launchbackfresh",
    Event.BACKFRESH_KILLED: "killbackfresh",
}
BELOW = (Mode.SETUP, Mode.ACCUMULATING, Mode.CONNECTED)

Modes = frozenset[Mode]
#: A way in a picture: from a column to a column, by events.
Way = tuple[int, int, list[str]]

HEAD = r""".\" Made from the tables in qdsmirror/core/states.py by man/modes.py: change those.
.Dd {date}
.Dt QDSMIRROR-MODES 7
.Os qdsmirror
.Sh NAME
.Nm qdsmirror-modes
.Nd the modes of a group and every way between them
.Sh DESCRIPTION
A group has one or more of the modes
{modes}.
The first of them in this order is the state that
.Xr qdsinfo 1
shows; with
.Fl -json
it tells of each mode since when it holds, and why.
What each one means is in
.Xr qdsmirror 7 .
.Pp
One of setup, accumulating and connected holds at any time.
The others come on top of accumulating or connected.
What can hold together:
.Bl -bullet -compact
"""
FOOT = """.Sh SEE ALSO
.Xr qdsbypass 1 ,
.Xr qdsinfo 1 ,
.Xr qdsrefresh 1 ,
.Xr qdsmirror 7 ,
.Xr qdsmirror-architecture 7
"""


def name_of(event: Event) -> str:
    """Give an event's short name."""
    return event.name.lower().replace("_", " ")


def machine(path: Sequence[Event] = ()) -> GroupModes:
    """Make a group's modes, and let events happen to it."""
    made = GroupModes("dsgrp000", 0, 0.0)
    for event in path:
        made.happen(event, 0.0)
    return made


def reachable() -> dict[Modes, tuple[Event, ...]]:
    """Find every set of modes that can hold, with the events that lead there."""
    found: dict[Modes, tuple[Event, ...]] = {}
    waiting: list[tuple[Event, ...]] = [()]
    while waiting:
        path = waiting.pop(0)
        modes = machine(path).modes
        if modes not in found:
            found[modes] = path
            waiting += [(*path, event) for event in Event]
    return found


def steps() -> Iterator[tuple[Modes, Event, Modes]]:
    """Give every step that can be taken."""
    for modes, path in reachable().items():
        for event in Event:
            group = machine(path)
            if group.happen(event, 0.0):
                yield modes, event, group.modes


def above(modes: Modes) -> Modes:
    """Give what comes on top."""
    return modes - set(BELOW)


def below(modes: Modes) -> Mode:
    """Give the one of setup, accumulating and connected that holds."""
    return next(mode for mode in BELOW if mode in modes)


def ordered(modes: Iterable[Mode]) -> list[str]:
    """Give names of modes in the order in which they are shown."""
    return [mode.value for mode in Mode if mode in set(modes)]


def listed(words: Sequence[str], last: str = "and") -> str:
    """Write a list: ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


# -- pictures -------------------------------------------------------------------------------------


def gather(found: Iterable[tuple[int, int, Event]]) -> list[Way]:
    """Put events that take the same way together, neighbours first, in the events' order."""
    ways: dict[tuple[int, int], list[Event]] = {}
    for source, target, event in found:
        known = ways.setdefault((source, target), [])
        if event not in known:
            known.append(event)
    order = list(Event)
    for events in ways.values():
        events.sort(key=order.index)
    first = sorted(ways, key=lambda way: (order.index(ways[way][0]), way))
    return [(*way, [name_of(event) for event in ways[way]]) for way in first]


def picture(heads: Sequence[str], gap: int, ways: Sequence[Way]) -> list[str]:
    """Draw columns and the ways between them.

    :param heads: the columns' titles, of one or more lines.
    :param gap: characters from one column's line to the next.
    """
    places = [2 + gap * column for column in range(len(heads))]
    width = places[-1] + 2
    lines = _titles(heads, places, width)

    def blank() -> list[str]:
        row = [" "] * (width + gap)
        for place in places:
            row[place] = "|"
        return row

    for source, target, events in ways:
        lines.append(blank())
        left, right = sorted((places[source], places[target]))
        for event in events:
            row = blank()
            start = left + 5 if left == right else left + (2 if len(event) <= gap - 2 else 1)
            row[start : start + len(event)] = event
            lines.append(row)
        row = blank()
        if left == right:
            lines[-1][left : left + 4] = "+--."
            row[left : left + 4] = "|<-'"
        else:
            row[left + 1 : right] = "-" * (right - left - 1)
            row[places[source]] = "+"
            row[places[target] + (-1 if source < target else 1)] = ">" if source < target else "<"
        lines.append(row)
    lines.append(blank())
    return ["".join(line).rstrip() for line in lines]


def _titles(heads: Sequence[str], places: Sequence[int], width: int) -> list[list[str]]:
    rows = max(len(head.split("\n")) for head in heads)
    lines = [[" "] * width for _ in range(rows)]
    for head, place in zip(heads, places, strict=True):
        words = head.split("\n")
        for row, word in enumerate(words, rows - len(words)):
            start = min(max(place - len(word) // 2, 0), width - len(word))
            lines[row][start : start + len(word)] = word
    return lines


def lower_picture() -> list[str]:
    """Draw setup, accumulating and connected."""
    found = [
        (BELOW.index(below(modes)), BELOW.index(below(after)), event)
        for modes, event, after in steps()
        if below(modes) is not below(after) or event in (Event.LINK_UP, Event.LINK_DOWN)
    ]
    return picture([mode.value for mode in BELOW], 26, gather(found))


def upper_picture() -> list[str]:
    """Draw what comes on top of accumulating and connected."""
    columns = [
        frozenset({Mode.BACKFRESH}),
        frozenset(),
        frozenset({Mode.REFRESH}),
        frozenset({Mode.BYPASS}),
        frozenset({Mode.BACKFRESH, Mode.BYPASS}),
    ]
    assert set(columns) == {above(modes) for modes in reachable()}
    found = [
        (columns.index(above(modes)), columns.index(above(after)), event)
        for modes, event, after in steps()
        if below(modes) is below(after) and event is not Event.LINK_DOWN
    ]
    heads = [" +\n".join(ordered(modes)) or "(nothing)" for modes in columns]
    return picture(heads, 17, gather(found))


# -- tables ---------------------------------------------------------------------------------------


def transitions() -> Iterator[str]:
    """List every row of TRANSITIONS, by event."""
    for event in Event:
        yield f".It Li {name_of(event)}"
        yield f"{sentence(event.value)}"
        for way in (one for one in TRANSITIONS if one.event is event):
            unless = f" without {listed(ordered(way.unless), 'or')}" if way.unless else ""
            parts = []
            if way.enters:
                verb = "goes on" if way.enters <= way.when else "begins"
                parts.append(f"{listed(ordered(way.enters))} {verb}")
            if way.leaves:
                verb = "ends" if len(way.leaves) == 1 else "end"
                parts.append(f"{listed(ordered(way.leaves))} {verb}")
            text = f"In {listed(ordered(way.when))}{unless}: {listed(parts)}; {way.why}."
            yield ".Pp"
            yield from wrapped(text)


def refusals() -> Iterator[str]:
    """List what each command is refused with."""
    for event in ASKED:
        yield f".It {COMMANDS[event]}"
        first = True
        for one in (row for row in REFUSALS if row.event is event):
            if event is Event.REFRESH_BEGUN and Mode.BYPASS in one.when:
                # A refresh asked for in bypass leaves it: see COMMANDS.
                continue
            if not first:
                yield ".Pp"
            first = False
            yield f".Dq {one.says} :"
            yield from wrapped(f"{one.hint.format(number='N')}.")


def sentence(text: str) -> str:
    """Make a sentence of a clause."""
    return f"{text[0].upper()}{text[1:]}."


def wrapped(text: str) -> list[str]:
    """Break a line of roff source."""
    return textwrap.wrap(text.replace("-", r"\-"), 95, break_on_hyphens=False)


def literal(lines: Sequence[str]) -> list[str]:
    """Show lines as they are."""
    return [".Bd -literal", *lines, ".Ed"]


def combinations() -> list[str]:
    """Give what can come on top of accumulating or connected."""
    some = {above(modes) for modes in reachable()} - {frozenset()}
    lines = ["setup", "accumulating or connected"]
    for modes in sorted(some, key=lambda one: (len(one), list(Mode).index(min(one, key=_place)))):
        lines.append(f"{listed([*ordered(modes), 'one of these two'])}")
    return lines


def _place(mode: Mode) -> int:
    return list(Mode).index(mode)


def render() -> str:
    """Give the page's source."""
    lines = [HEAD.format(date=DATE, modes=listed([mode.value for mode in Mode])).rstrip("\n")]
    for text in combinations():
        lines += [".It", text]
    lines += [".El", ".Sh PICTURES", ".Ss Driver and link", *literal(lower_picture())]
    lines += [
        ".Pp",
        "Where the driver stops, what came on top ends too; it is recorded in the writelogs,",
    ]
    lines += [
        "and holds again when the driver has started.",
        ".Ss On top of accumulating or connected",
    ]
    lines += literal(upper_picture())
    lines += [".Sh TRANSITIONS", "An event that has no way from the present modes changes nothing."]
    lines += [".Bl -tag -width Ds", *transitions(), ".El"]
    lines += [
        ".Sh REFUSALS",
        "What a command is refused with where its event has no way, and the way",
    ]
    lines += ["out, for group", ".Ar N :", ".Bl -tag -width Ds", *refusals(), ".El"]
    return "\n".join(lines) + "\n" + FOOT


if __name__ == "__main__":
    PAGE.write_text(render())
