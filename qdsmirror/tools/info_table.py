"""How a terminal shows what ``qdsinfo`` tells: tables as wide as it is, in colour, once or live.

``NO_COLOR`` turns the colours off.  rich comes in with this module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qdsmirror.tools.info_view import HEADINGS, UNIT_HEADINGS, group_row, remarks, unit_rows
from qdsmirror.tools.status import Group

_STATES = {
    "connected": "green",
    "refresh": "cyan",
    "backfresh": "cyan",
    "accumulating": "yellow",
    "bypass": "red",
    "setup": "red",
}
#: What is left out first where the terminal is too narrow for all.
_LESS = ("MIRRORED", "COMMITTED", "GSN", "ROLE")
_UNIT_LESS = ("SIZE", "ENTRIES")
_RIGHT = frozenset({"SINCE", "GSN", "COMMITTED", "MIRRORED", "SIZE", "FULL IN", "ENTRIES"})
_GAP = 2
_METER_CELLS = 8
_LAST_CELLS = 34
#: Shares of a log from which on it is shown in another colour, and seconds until it is full.
_WARN_SHARE, _ALARM_SHARE = 0.6, 0.8
_WARN_SECONDS, _ALARM_SECONDS = 3600.0, 600.0


def tables(groups: Sequence[Group], now: float, width: int) -> RenderableType:
    """Give the whole report.

    :param now: seconds since 1970.
    :param width: of the terminal, in columns.
    """
    rows = [_group_cells(group, now) for group in groups]
    units = [cells for group in groups for cells in _unit_cells(group)]
    parts: list[RenderableType] = [_table(HEADINGS, rows, _LESS, width)]
    if units:
        parts += [Text(""), _table(UNIT_HEADINGS, units, _UNIT_LESS, width)]
    notes = [(group, line) for group in groups for line in remarks(group)]
    if notes:
        told = Table.grid(padding=(0, _GAP, 0, 0))
        for group, line in notes:
            name = f"{group['name']}: "
            told.add_row(Text(group["name"], style="bold"), _remark(line.removeprefix(name)))
        parts += [Text(""), told]
    return Stack(*parts)


def print_tables(groups: Sequence[Group], now: float) -> None:
    """Print the report to stdout."""
    console = _console()
    console.print(tables(groups, now, console.width))


def watch(
    look: Callable[[], tuple[str, list[Group]]],
    interval_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the report on the whole terminal, again and again; leave the last one when interrupted.

    :param look: gives the host's name and its groups.
    """
    console = _console()
    host, groups = look()
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                now = time.time()
                clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
                title = Text.assemble((host, "bold"), f"   {clock}   every {interval_seconds:g} s")
                shown = Stack(title, Text(""), tables(groups, now, console.width))
                live.update(shown, refresh=True)
                sleep(interval_seconds)
                host, groups = look()
    finally:
        console.print(tables(groups, time.time(), console.width))


def _console() -> Console:
    return Console(highlight=False)


# -- cells -----------------------------------------------------------------------------------------


def _group_cells(group: Group, now: float) -> list[Text]:
    cells = [Text(cell) for cell in group_row(group, now)]
    by_name = dict(zip(HEADINGS, cells, strict=True))
    by_name["GROUP"].stylize("bold")
    by_name["STATE"].stylize(_STATES.get(group["state"], ""))
    by_name["COHERENT"].stylize({True: "green", False: "bold red"}.get(group["coherent"], ""))
    return cells


def _unit_cells(group: Group) -> list[list[Text]]:
    rows = []
    for unit, texts in zip(group["ldsus"], unit_rows(group), strict=True):
        cells = [Text(text) for text in texts]
        by_name = dict(zip(UNIT_HEADINGS, cells, strict=True))
        log = unit.get("writelog") or group.get("journal") or {}
        ratio, seconds = log.get("used_ratio"), log.get("seconds_to_full")
        by_name["LDSU"].stylize("bold")
        if ratio is not None:
            cells[UNIT_HEADINGS.index("LOG USED")] = _meter(ratio, by_name["LOG USED"])
        if seconds is not None and seconds < _WARN_SECONDS:
            by_name["FULL IN"].stylize("bold red" if seconds < _ALARM_SECONDS else "yellow")
        rows.append(cells)
    return rows


def _meter(ratio: float, text: Text) -> Text:
    """Give a share as a bar and in words."""
    full = min(round(ratio * _METER_CELLS), _METER_CELLS)
    style = "red" if ratio >= _ALARM_SHARE else "yellow" if ratio >= _WARN_SHARE else "green"
    rest = ("\u2500" * (_METER_CELLS - full), "bright_black")
    return Text.assemble(("\u2501" * full, style), rest, f" {text.plain:>7}")


def _remark(line: str) -> Text:
    urgent = any(word in line for word in ("DIFFER", "DEGRADED", "failed", "cannot", "refused"))
    return Text(line, style="red" if urgent else "yellow")


# -- tables ----------------------------------------------------------------------------------------


def _table(
    headings: Sequence[str], rows: Sequence[Sequence[Text]], less: Sequence[str], width: int
) -> Table:
    """Make a table of as many columns as the terminal has room for.

    :param less: headings of those that can be left out, in this order.
    """
    widths = {
        heading: max(len(heading), *(row[column].cell_len for row in rows))
        for column, heading in enumerate(headings)
    }
    # What stands last goes on in the next line; but not every few letters.
    widths[headings[-1]] = min(widths[headings[-1]], _LAST_CELLS)
    for heading in less:
        if sum(widths.values()) + _GAP * (len(widths) - 1) <= width:
            break
        del widths[heading]
    table = Table(box=None, header_style="dim", padding=(0, _GAP, 0, 0), pad_edge=False)
    for heading in widths:
        right = heading in _RIGHT
        # The last one takes what is left, in several lines if it must.
        last = heading == headings[-1]
        table.add_column(heading, justify="right" if right else "left", no_wrap=not last,
                         overflow="fold" if last else "ellipsis")  # fmt: skip
    kept = [column for column, heading in enumerate(headings) if heading in widths]
    for row in rows:
        table.add_row(*(row[column] for column in kept))
    return table
