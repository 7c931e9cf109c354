"""``qdsconfigtool throttle``: what throttles mean, and when they would have fired."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from qdsmirror.config import GroupConfig, load_group, read_group
from qdsmirror.configsource import ProblemsError
from qdsmirror.core.evaluation import Fired, State, evaluate
from qdsmirror.core.localtime import WallClock
from qdsmirror.core.samples import GroupSample, parse
from qdsmirror.core.throttles import (
    CONSOLE,
    EXEC,
    EXTEND,
    FREE,
    INC,
    LIMIT,
    MAIL,
    SET,
    SLEEP,
    SYSLOG,
    WRITESLEEP,
    Action,
    Throttle,
    number,
)
from qdsmirror.errors import UsageError
from qdsmirror.paths import Paths
from qdsmirror.tools import cli

_MEASURED = {
    "netkbps": "the group sends {} {} KB a second over the network",
    "pctcpu": "its primary mirror daemon uses {} {} percent of a core",
    "pctwl": "{} {} percent of an LDSU's writelog is in use",
    "lag": "its oldest uncommitted write is {} {} seconds old",
}
_RELATIONS = {
    ">": "more than",
    ">=": "at least",
    "<": "less than",
    "<=": "at most",
    "==": "exactly",
    "!=": "other than",
}


def explain(arguments: argparse.Namespace, paths: Paths) -> int:
    """Say in words what the throttles of groups mean."""
    groups = _groups(arguments, paths)
    if arguments.json:
        cli.print_json(
            {
                "groups": [
                    {
                        "group": group.number,
                        "interval": group.tunables.throttle_interval,
                        "throttles": [_described(one) for one in group.throttles],
                    }
                    for group in groups
                ]
            }
        )
        return 0
    for group in groups:
        seconds = group.tunables.throttle_interval
        many = len(group.throttles)
        print(f"{group.name}: {many or 'no'} throttle{'' if many == 1 else 's'}", end="")
        print(f", evaluated every {seconds:g} s" if many else "")
        for throttle in group.throttles:
            print("\n".join(f"  {line}" for line in words(throttle)))
    return 0


def _described(throttle: Throttle) -> dict[str, Any]:
    window = throttle.window
    return {
        "name": throttle.name,
        "from": str(window.start) if window else None,
        "to": str(window.stop) if window else None,
        "test": str(throttle.test),
        "actions": [str(action) for action in throttle.actions],
        "explanation": " ".join(line.strip() for line in words(throttle)),
    }


def words(throttle: Throttle) -> list[str]:
    """Say in words what a throttle means: lines for people."""
    when = "always"
    if throttle.window is not None:
        start, stop = throttle.window.start, throttle.window.stop
        when = f"from {start} to {stop}{' of the next day' if stop < start else ''}"
    test = throttle.test
    measured = _MEASURED[test.measure].format(_RELATIONS[test.relation], number(test.value))
    how = "once, each time that" if test.transition else "at every evaluation at which"
    lines = [f"[[{throttle.name}]] {when}: {how} {measured}:"]
    return [*lines, *(f"  - {_action(action)}" for action in throttle.actions)]


def _action(action: Action) -> str:
    if action.kind in (SLEEP, WRITESLEEP):
        what = "an entry is sent" if action.kind == SLEEP else "a write is answered"
        change = {SET: "is set to", INC: "grows by"}.get(action.how, "shrinks by")
        return f"the pause before {what} {change} {action.amount} microseconds"
    if action.kind == LIMIT and action.amount is None:
        return "no limit holds any more"
    if action.kind == LIMIT:
        return f"{action.amount} KB a second are sent at most, until its window closes"
    return {
        EXTEND: "a device of the pool is chained to the writelog",
        FREE: "a device of the writelog is given back to the pool",
        SYSLOG: f"the system's log is told: {action.text}",
        CONSOLE: f"the console is told: {action.text}",
        MAIL: f"{action.address} is mailed: {action.text}",
        EXEC: f"{' '.join(action.argv)} is run",
    }[action.kind]


# -- replay ----------------------------------------------------------------------------------------


def replay(arguments: argparse.Namespace, paths: Paths) -> int:
    """Say when throttles would have fired on recorded history.

    :raises UsageError: the file cannot be read, or holds no samples.
    """
    file = Path(arguments.replay)
    try:
        table = parse(file.read_text("ascii", errors="replace").split("\n")[:-1])
    except OSError as error:
        hint = f"performance tracking files are in {paths.var}"
        raise UsageError(f"{file}: {error.strerror}", hint) from error
    if not table.samples:
        raise UsageError(f"{file}: no samples in it", "see qdsprf(5)")
    group = _group_of(arguments, paths, file)
    clock = _clock(arguments.zone)
    found = list(replayed(group, table.samples, clock))
    if arguments.json:
        cli.print_json(
            {
                "group": group.number,
                "samples": len(table.samples),
                "damaged": table.damaged,
                "fired": [_event(at, clock, fired, state) for at, fired, state in found],
            }
        )
        return 0
    for at, fired, state in found:
        actions = "; ".join(str(action) for action in fired.actions)
        knobs = state.knobs
        held = [
            f"{name} {value}"
            for name, value in (
                ("sleep", knobs.sleep_us),
                ("writesleep", knobs.writesleep_us),
                ("limit", knobs.limit_kbps),
            )
            if value
        ]
        shown = clock(at).isoformat(" ", "seconds")
        print(cli.one_line(f"{shown} {fired}: {actions} -> {', '.join(held) or 'nothing held'}"))
    first, last = (clock(one.epoch) for one in (table.samples[0], table.samples[-1]))
    print(
        f"samples: {len(table.samples)}, from {first.isoformat(' ', 'seconds')} to "
        f"{last.isoformat(' ', 'seconds')}; throttles: {len(group.throttles)}; "
        f"firings: {len(found)}"
    )
    return 0


def _event(at: float, clock: WallClock, fired: Fired, state: State) -> dict[str, Any]:
    knobs = state.knobs
    return {
        "time": at,
        "shown": clock(at).isoformat(" ", "seconds"),
        "throttle": fired.throttle.name,
        "test": str(fired.throttle.test),
        "value": round(fired.value, 3),
        "ldsus": list(fired.ldsus),
        "actions": [str(action) for action in fired.actions],
        "sleep_us": knobs.sleep_us,
        "writesleep_us": knobs.writesleep_us,
        "limit_kbps": knobs.limit_kbps,
    }


def replayed(
    group: GroupConfig, samples: Sequence[GroupSample], clock: WallClock
) -> Iterator[tuple[float, Fired, State]]:
    """Evaluate a group's throttles on samples, as often as they would have been.

    :returns: when which throttle fires, and what is in force after that evaluation.
    """
    state = State()
    history: list[GroupSample] = []
    due = before = samples[0].epoch
    for sample in samples:
        if sample.epoch < before:
            # The clock was set back: what is due goes by a new one.
            due, history = sample.epoch, []
        before = sample.epoch
        history.append(sample)
        # A sample that is a little early is the one of its evaluation.
        if sample.epoch < due - 0.5:
            continue
        outcome = evaluate(group.throttles, state, history, sample.epoch, clock)
        state, history = outcome.state, []
        due = max(due, sample.epoch - group.tunables.throttle_interval)
        due += group.tunables.throttle_interval
        for fired in outcome.fired:
            yield sample.epoch, fired, state


def _groups(arguments: argparse.Namespace, paths: Paths) -> list[GroupConfig]:
    if arguments.file is not None:
        return [_read(Path(arguments.file))]
    groups, broken = cli.load_selection(arguments, paths)
    for error in broken:
        raise error
    return groups


def _group_of(arguments: argparse.Namespace, paths: Paths, file: Path) -> GroupConfig:
    """Find whose throttles are meant: a file's, a selected group's, or by the history's name."""
    if arguments.file is not None:
        return _read(Path(arguments.file))
    if arguments.numbers or arguments.names:
        groups = _groups(arguments, paths)
        if len(groups) != 1:
            raise UsageError("a history is of one group", "give one with -g")
        return groups[0]
    name = file.name.partition(".")[0]
    if not (name.startswith("dsgrp") and name[5:].isdecimal() and len(name) == 8):
        raise UsageError(f"{file}: its name is no group's", "give the group with -g")
    return load_group(paths, int(name[5:]))


def _read(path: Path) -> GroupConfig:
    group, problems = read_group(path)
    if group is None:
        raise ProblemsError(problems)
    return group


def _clock(zone: str | None) -> WallClock:
    if zone is None:
        return datetime.fromtimestamp
    try:
        info = ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise UsageError(
            f"there is no time zone {zone!r}", "name one as in /usr/share/zoneinfo, or none"
        ) from error
    return lambda at: datetime.fromtimestamp(at, info).replace(tzinfo=None)
