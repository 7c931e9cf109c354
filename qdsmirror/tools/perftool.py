"""``qdsperftool``: what performance tracking files have, as charts or as JSON.

The patent: "a graphical utility program qdsperftool, is provided to instantly view any of this
performance information".  Here it is drawn with a terminal's letters.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qdsmirror.config import GroupConfig, parse_seconds
from qdsmirror.core.samples import (
    GROUP_COLUMNS,
    GROUP_COLUMNS_BEHIND,
    LDSU_COLUMNS,
    Column,
    GroupSample,
    Table,
    parse,
)
from qdsmirror.errors import QdsError, UsageError
from qdsmirror.paths import Paths
from qdsmirror.tools import charts, cli

#: What can be drawn: of the group, and of each LDSU, with what its title says.
_TITLES = {
    "netkbps": "KB/s on the wire",
    "pctcpu": "% of one core",
    "sleep_us": "microseconds before each entry",
    "lag_s": "age of what is not committed, seconds",
    "writesleep_us": "microseconds before each answer",
    "limit_kbps": "KB/s allowed (0: no limit)",
    "total_kbps": "KB/s sent",
    "data_kbps": "KB/s of data sent",
    "entries_ps": "entries/s sent",
    "waiting": "entries that wait",
    "sectors": "sectors in use",
    "pctwl": "% of the log in use",
    "age_s": "age of the oldest entry that waits, seconds",
}
_STATE = "state"
_DEFAULT = (_STATE, "netkbps", "pctwl", "lag_s")
#: Of these the highest value of a time counts, of the others the mean.
_PEAKS = ("lag_s", "waiting", "sectors", "pctwl", "age_s")
_GROUP = {one.name: one for one in (*GROUP_COLUMNS, *GROUP_COLUMNS_BEHIND) if one.name in _TITLES}
_LDSU = {one.name: one for one in LDSU_COLUMNS}
_WATCH_SECONDS = 2.0
#: So often files are read that are renamed under our hands.
_READS_MAX = 3


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of ``qdsperftool``."""
    made = cli.parser("qdsperftool", "Show the performance tracking files of groups as charts.")
    made.add_argument("--print", action="store_true", help="print charts, or JSON, and end")
    made.add_argument("--watch", action="store_true", help="go on printing them, every two seconds")
    made.add_argument(
        "--chart",
        metavar="NAME",
        dest="charts",
        action="append",
        choices=(_STATE, *_TITLES),
        help=f"what to draw, by the name of its column; may be repeated (default: "
        f"{', '.join(_DEFAULT)})",
    )
    made.add_argument("--since", metavar="TIME", help="only the last TIME, such as 30 min or 2 h")
    cli.add_selection(made, "only these LDSUs, and their groups")
    return made


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsperftool``."""
    arguments = build_parser().parse_args(argv)
    if not (arguments.print or arguments.watch):
        raise UsageError("say how to show it", hint="qdsperftool --print")
    paths = cli.paths_of(arguments)
    seconds = _seconds(arguments.since)
    selection = cli.load_selection(arguments, paths)
    while True:
        told = [_Group(paths, one, seconds, arguments.names) for one in selection.groups]
        if arguments.json:
            cli.print_json(
                {"groups": [one.to_json() for one in told], **cli.errors_json(selection.broken)},
                indent=None if arguments.watch else 2,
            )
        else:
            text = "\n\n".join("\n".join(one.draw(arguments.charts or _DEFAULT)) for one in told)
            print(_clear() + text if arguments.watch else text, flush=True)
        if not arguments.watch:
            break
        time.sleep(_WATCH_SECONDS)
    return cli.report_all(selection.broken, as_json=arguments.json)


def _seconds(text: str | None) -> float:
    if text is None:
        return 0.0
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise UsageError(f"--since: {error}", hint="qdsperftool --help") from None


def _clear() -> str:
    return "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""


class _Group:
    """One group's files, as far as they are wanted.

    :param seconds: only the samples of so long before the last one; 0: all.
    :param names: only these LDSUs; empty: all.
    """

    def __init__(
        self, paths: Paths, config: GroupConfig, seconds: float, names: Sequence[str]
    ) -> None:
        self.config = config
        self.names = [one.name for one in config.ldsus if not names or one.name in names]
        self.files, contents = _read(paths.tracking_file(config.number))
        self.table = Table()
        for lines in contents:
            found = parse(lines)
            self.table.samples += found.samples
            self.table.damaged += found.damaged
        samples = self.table.samples
        if samples and seconds:
            last = samples[-1].epoch
            self.table.samples = [one for one in samples if last - one.epoch <= seconds]

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON."""
        return {
            "group": self.config.number,
            "name": self.config.name,
            "files": [str(file) for file in self.files],
            "damaged_lines": len(self.table.damaged),
            "samples": [self._sample(one) for one in self.table.samples],
        }

    def _sample(self, sample: GroupSample) -> dict[str, Any]:
        told = {one.name: getattr(sample, one.attribute) for one in GROUP_COLUMNS}
        told |= {one.name: getattr(sample, one.attribute) for one in GROUP_COLUMNS_BEHIND}
        told["ldsus"] = [
            {"name": one.name, **{c.name: getattr(one, c.attribute) for c in LDSU_COLUMNS}}
            for one in sample.ldsus
            if one.name in self.names
        ]
        return told

    def draw(self, names: Sequence[str]) -> Iterator[str]:
        """Draw charts."""
        samples = self.table.samples
        if not samples:
            yield f"{self.config.name}: no samples yet; they come while its driver, or rmd, runs"
            return
        frame = charts.Frame(
            samples[0].epoch, samples[-1].epoch, _width(), plain=not _has_letters()
        )
        yield f"{self.config.name}: {len(samples)} samples"
        for name in names:
            if name == _STATE:
                yield from charts.strip(_STATE, [(s.epoch, s.state) for s in samples], frame)
            elif name in _GROUP:
                yield from self._chart(name, _GROUP[name], "", frame)
            else:
                for ldsu in self.names:
                    yield from self._chart(name, _LDSU[name], ldsu, frame)
        yield from charts.axis(frame)

    def _chart(self, name: str, column: Column, ldsu: str, frame: charts.Frame) -> list[str]:
        points: list[charts.Point] = []
        for sample in self.table.samples:
            of: Any = sample
            if ldsu:
                of = next((one for one in sample.ldsus if one.name == ldsu), None)
            points.append((sample.epoch, None if of is None else getattr(of, column.attribute)))
        title = f"{ldsu + '.' if ldsu else ''}{name} ({_TITLES[name]})"
        return charts.chart(title, points, frame, name in _PEAKS)


def _read(path: Path) -> tuple[list[Path], list[list[str]]]:
    """Read both generations, the previous one first: names and lines of those that are there."""
    previous = path.with_name(path.name + ".1")
    for _ in range(_READS_MAX):
        before = _identity(previous)
        found = {one: _lines(one) for one in (previous, path)}
        if _identity(previous) == before:
            break
        # Meanwhile one has replaced the other.
    there = {one: lines for one, lines in found.items() if lines is not None}
    return list(there), list(there.values())


def _identity(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _lines(path: Path) -> list[str] | None:
    """Give the whole lines of a file, ``None`` if there is none."""
    try:
        return path.read_text("ascii", "replace").split("\n")[:-1]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise QdsError(f"{path}: {error.strerror}", hint="run as root") from None


def _width() -> int:
    return shutil.get_terminal_size((80, 24)).columns


def _has_letters() -> bool:
    """Tell whether the output takes bars of eighths."""
    try:
        "▁┤".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return os.environ.get("TERM") != "dumb"


assert set(_TITLES) <= set(_GROUP) | set(_LDSU)
