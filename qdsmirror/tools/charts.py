"""Charts for a terminal: time from left to right, values as bars of eighths of a line."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

#: A point in time, and a value, or ``None`` where none is known.
Point = tuple[float, float | None]

_EIGHTHS = " ▁▂▃▄▅▆▇█"
#: Without such letters a bar is full, or not there.
_PLAIN = " " * 4 + "#" * 5
_LABEL_CHARS = 9
#: The least width that anything can be seen in.
_CELLS_MIN = 8


class Frame(NamedTuple):
    """What charts stand in.

    :ivar first: the time at the left end, ``last`` at the right one; seconds since 1970.
    :ivar width: of the terminal, in characters; ``height``: of a chart, in lines of bars.
    :ivar plain: whether only ASCII may be used.
    """

    first: float
    last: float
    width: int = 80
    height: int = 6
    plain: bool = False

    @property
    def cells(self) -> int:
        """How many columns have values."""
        return max(_CELLS_MIN, self.width - _LABEL_CHARS - 2)

    def cell(self, when: float) -> int:
        """Give the column of a time."""
        span = self.last - self.first
        place = int((when - self.first) / span * self.cells) if span > 0 else 0
        return max(0, min(place, self.cells - 1))


def columns(points: Sequence[Point], frame: Frame, peak: bool) -> list[float | None]:
    """Gather points by the columns they belong to.

    :param peak: whether a column has the highest of its values, or their mean.
    """
    gathered: list[list[float]] = [[] for _ in range(frame.cells)]
    for when, value in points:
        if value is not None:
            gathered[frame.cell(when)].append(value)
    found = [(max(some) if peak else sum(some) / len(some)) if some else None for some in gathered]
    return _joined(found, points, frame)


def _joined(found: list[float | None], points: Sequence[Point], frame: Frame) -> list[float | None]:
    """Let a value stand until the next one comes, where samples are fewer than columns."""
    known = sorted({frame.cell(when) for when, _ in points})
    steps = [after - before for before, after in zip(known, known[1:], strict=False)]
    usual = sorted(steps)[len(steps) // 2] if steps else 1
    made = list(found)
    for before, after in zip(known, known[1:], strict=False):
        # What is longer is a time of which nothing is known.
        if 1 < after - before <= 2 * usual:
            made[before + 1 : after] = [found[before]] * (after - before - 1)
    return made


def top(values: Sequence[float | None]) -> float:
    """Give the round number at which a scale ends."""
    most = max((value for value in values if value is not None), default=0.0)
    # What a float does not hold in full is nothing: its power of ten may be zero.
    if most < sys.float_info.min:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= most * (1 - 1e-9))


def number(value: float) -> str:
    """Write a number of a scale, or below a chart, shortly."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def chart(title: str, points: Sequence[Point], frame: Frame, peak: bool = False) -> list[str]:
    """Draw one chart, with its title, its scale, and what it comes to.

    :param points: in the order of time.
    :param peak: see :func:`columns`.
    """
    known = [value for _, value in points if value is not None]
    if not known:
        return [f"{title}: nothing is known"]
    values = columns(points, frame, peak)
    end = top(known)
    mean = sum(known) / len(known)
    said = f"last {number(known[-1])}, mean {number(mean)}, most {number(max(known))}"
    letters = _PLAIN if frame.plain else _EIGHTHS
    lines = [f"{title}: {said}"]
    for line in range(frame.height, 0, -1):
        label = {frame.height: number(end), 1: "0"}.get(line, "")
        bar = "".join(_eighth(value, end, line, frame.height, letters) for value in values)
        lines.append(f"{label:>{_LABEL_CHARS}} {'|' if frame.plain else '┤'}{bar}".rstrip())
    return lines


def _eighth(value: float | None, end: float, line: int, height: int, letters: str) -> str:
    if value is None:
        return " "
    eighths = round(value / end * height * 8)
    if value > 0 and line == 1:
        # That there is something shows, however little it is.
        eighths = max(1 if letters is _EIGHTHS else 4, eighths)
    return letters[max(0, min(8, eighths - 8 * (line - 1)))]


def strip(title: str, points: Sequence[tuple[float, str]], frame: Frame) -> list[str]:
    """Draw letters that say how something was, and what they mean.

    :param points: words, in the order of time; each is shown by its first letter.
    """
    cells = [" "] * frame.cells
    places = [frame.cell(when) for when, _ in points]
    for place, following, (_, word) in zip(places, [*places[1:], frame.cells], points, strict=True):
        cells[place : max(place + 1, following)] = word[0] * max(1, following - place)
    words = ", ".join(f"{word[0]} {word}" for word in dict.fromkeys(word for _, word in points))
    label = " " * (_LABEL_CHARS + 2)
    return [f"{title}: {words}", f"{label}{''.join(cells)}".rstrip()]


def axis(frame: Frame) -> list[str]:
    """Draw the line of time below charts."""
    form = "%H:%M:%S" if frame.last - frame.first < 86400 else "%m-%d %H:%M"
    first, last = (time.strftime(form, time.localtime(one)) for one in (frame.first, frame.last))
    between = " " * max(1, frame.cells - len(first) - len(last))
    return [" " * (_LABEL_CHARS + 2) + first + between + last]
