"""How commands that take long say how far they are: bars on a terminal, else a line at times.

What is waited for, or worked at, has a name and a text, and where it is known, how much of it is
done.  The display of a refresh, verify or backfresh stands on standard output, where its result is
told; that of commands whose output is something else, on standard error.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from qdsmirror.tools import info_view
from qdsmirror.tools.status import Group

if TYPE_CHECKING:
    from rich.progress import Progress

#: Between two lines of the same thing, where there is no terminal.
LINE_SECONDS = 10.0
#: Between two looks of a display that looks by itself.
LOOK_SECONDS = 0.2

#: Tells of something: (its name, a text, how much is done, and of how much; None if not known).
Tell = Callable[[str, str, int | None, int | None], None]
#: Tells how far a group is: (group object).
Show = Callable[[Group], None]


def nobody(name: str, text: str, done: int | None = None, total: int | None = None) -> None:
    """Tell nobody: what ``--json`` takes."""


def lines(
    clock: Callable[[], float] = time.monotonic,
    write: Callable[[str], None] = print,
    *,
    at_once: bool = False,
) -> Tell:
    """Give what writes lines, of each name one each LINE_SECONDS.

    :param at_once: the first one immediately, else after so long: what is soon over needs none.
    """
    last: dict[str, float] = {}

    def tell(name: str, text: str, done: int | None = None, total: int | None = None) -> None:
        now = clock()
        since = last.setdefault(name, now - LINE_SECONDS if at_once else now)
        if now - since >= LINE_SECONDS:
            last[name] = now
            write(f"{name}: {text}")

    return tell


@contextlib.contextmanager
def telling(quiet: bool) -> Iterator[Tell]:
    """Give what tells on standard error what a command waits for, or works at; gone at the end.

    :param quiet: tell nothing.
    """
    if quiet:
        yield nobody
    elif info_view.is_terminal(sys.stderr):
        with _bars(sys.stderr, transient=True) as bars:
            yield _by_bars(bars)
    else:
        yield lines(write=_to_stderr)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- work that blocks ------------------------------------------------------------------------------


class Work:
    """Something that a command does, or waits for, seen from outside.

    :ivar text: what is being done.
    :ivar total_bytes: how much will be written, where that is known.
    """

    def __init__(self, tell: Tell, name: str, text: str, moves: bool) -> None:
        self.text = text
        self.total_bytes: int | None = None
        self._tell = tell
        self._name = name
        self._moves = moves
        self._begun = time.monotonic()
        self._looked_bytes = 0
        self._before = self._moved()
        self._over = threading.Event()

    def expect(self, text: str, total_bytes: int) -> None:
        """Begin another part, of which the size is known: so much is to be written."""
        self._before = self._moved()
        self.text, self.total_bytes = text, total_bytes

    def look(self) -> None:
        """Tell how far it is."""
        seconds = info_view.duration_text(time.monotonic() - self._begun)
        read, written = (now - then for now, then in zip(self._moved(), self._before, strict=True))
        if not self._moves:
            self._tell(self._name, f"{self.text}, {seconds}", None, None)
        elif self.total_bytes is None:
            moved = f"{info_view.size_text(read)} read, {info_view.size_text(written)} written"
            self._tell(self._name, f"{self.text}, {moved}, {seconds}", None, None)
        else:
            done = min(written, self.total_bytes)
            of = f"{info_view.size_text(done)} of {info_view.size_text(self.total_bytes)}"
            self._tell(self._name, f"{self.text}, {of}, {seconds}", done, self.total_bytes)

    def watch(self) -> None:
        """Look until it is over; this is the thread of its own."""
        while not self._over.wait(LOOK_SECONDS):
            self.look()

    def end(self) -> None:
        """End :meth:`watch`."""
        self._over.set()

    def _moved(self) -> tuple[int, int]:
        """Give what this process has read, but for this, and written; zeroes if nobody knows."""
        try:
            with open("/proc/self/io", encoding="ascii") as file:
                told = file.read()
        except OSError:
            return 0, 0
        counts = dict(line.split(": ") for line in told.splitlines())
        read = int(counts["rchar"]) - self._looked_bytes
        self._looked_bytes += len(told)
        return read, int(counts["wchar"])


@contextlib.contextmanager
def working(tell: Tell, name: str, text: str, *, moves: bool = True) -> Iterator[Work]:
    """Tell how far it is while something blocks.

    :param name: what is told of, e.g. the group's.
    :param text: what is being done, or waited for.
    :param moves: tell what this process reads and writes meanwhile.
    """
    work = Work(tell, name, text, moves)
    if tell is nobody:
        yield work
        return
    thread = threading.Thread(target=work.watch, daemon=True)
    thread.start()
    try:
        yield work
    finally:
        work.end()
        thread.join()


@contextlib.contextmanager
def waiting(quiet: bool, name: str, text: str) -> Iterator[None]:
    """Tell what a command waits for; as :func:`telling` and :func:`working`."""
    with telling(quiet) as tell, working(tell, name, text, moves=False):
        yield


# -- groups ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def of_groups(
    quiet: bool,
    of: str = "refresh",
    stream: TextIO | None = None,
    write: Callable[[str], None] = print,
) -> Iterator[Show]:
    """Give what shows the progress of groups.

    :param of: the part of a group object that tells it: refresh, verify or backfresh.
    :param stream: where bars are shown if that is a terminal; by default standard output.
    :param write: else takes the lines.
    """
    if quiet:
        yield lambda group: None
    elif info_view.is_terminal(stream):
        with _bars(stream or sys.stdout) as bars:
            yield _group_bars(bars, of)
    else:
        yield group_lines(write=write, of=of)


def group_lines(
    clock: Callable[[], float] = time.monotonic,
    write: Callable[[str], None] = print,
    of: str = "refresh",
) -> Show:
    """Give what writes a line of progress per group, at most one each LINE_SECONDS."""
    tell = lines(clock, write, at_once=True)

    def show(group: Group) -> None:
        progress = _progress(group, of)
        if progress:
            tell(group["name"], _text(of, progress), None, None)

    return show


def _group_bars(bars: Progress, of: str) -> Show:
    tell = _by_bars(bars)
    known: dict[str, int] = {}

    def show(group: Group) -> None:
        name, progress = group["name"], _progress(group, of)
        if progress:
            done = progress["done_bytes"]
            known[name] = done + progress["remaining_bytes"]
            tell(name, _text(of, progress), done, known[name])
        elif group["coherent"]:
            total = known.get(name) or 1
            tell(name, "done", total, total)
        else:
            tell(name, group["reason"] or "waiting", None, known.get(name))

    return show


def _text(of: str, progress: dict[str, Any]) -> str:
    if of == "verify":
        return info_view.verify_text(progress)
    return info_view.progress_text(of, progress)


def _progress(group: Group, of: str) -> dict[str, Any] | None:
    progress: dict[str, Any] | None = group[of]
    if progress is None or "done_bytes" not in progress or progress.get("phase") == "over":
        return None
    return progress


# -- bars ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bars(stream: TextIO, *, transient: bool = False) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    name = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
    # The text is what counts; the bar takes what is left of the line.
    text = TextColumn(
        "{task.fields[text]}",
        markup=False,
        table_column=Column(no_wrap=True, overflow="ellipsis", ratio=7),
    )
    bar = BarColumn(bar_width=None, table_column=Column(min_width=8, ratio=1))
    console = Console(file=stream, highlight=False)
    with Progress(name, bar, text, console=console, transient=transient, expand=True) as bars:
        yield bars


def _by_bars(bars: Progress) -> Tell:
    tasks: dict[str, Any] = {}

    def tell(name: str, text: str, done: int | None = None, total: int | None = None) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=None, text="")
        bars.update(tasks[name], text=text, total=total, completed=done if total else None)

    return tell
