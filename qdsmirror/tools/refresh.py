"""``qdsrefresh``, ``launchrefresh`` and ``killrefresh``: make the mirror anew from the primary.

They act on whole groups, because coherence is the group's.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qdsmirror.config import GroupConfig, load_host
from qdsmirror.errors import BrokenError, ConfigError, QdsError, UnreachableError
from qdsmirror.limits import REFRESH_RING_SHARE
from qdsmirror.paths import Paths
from qdsmirror.tools import cli, info_view
from qdsmirror.tools.client import ControlClient
from qdsmirror.tools.status import Group, collect_groups, raise_failure

#: The driver answers when the beginning is durable in every writelog of the group.
BEGIN_SECONDS = 30.0
POLL_SECONDS = 0.2
#: A failure that has stood for so many looks is one.
REFUSED_LOOKS = 5
LINE_SECONDS = 10.0

#: Calls a command of a group's driver: (group, command, arguments) -> answer.
Call = Callable[..., dict[str, Any]]
#: Gives a group object as it is now.
Look = Callable[[GroupConfig], Group]
#: Shows a group's progress: (group object).
Show = Callable[[Group], None]


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of ``qdsrefresh``."""
    return _refresh_parser(
        "qdsrefresh", "Refresh the mirror of groups, in the foreground, with progress."
    )


def build_launch_parser() -> argparse.ArgumentParser:
    """Make the parser of ``launchrefresh``."""
    return _refresh_parser("launchrefresh", "Begin to refresh the mirror of groups and return.")


def build_kill_parser() -> argparse.ArgumentParser:
    """Make the parser of ``killrefresh``."""
    description = "End the refresh of groups; their mirrors stay incoherent until the next one."
    return cli.parser("killrefresh", description, groups=True)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _refresh_parser(prog: str, description: str) -> argparse.ArgumentParser:
    made = cli.parser(prog, description, groups=True)
    made.add_argument(
        "--full",
        dest="kind",
        action="store_const",
        const="full",
        default="full",
        help="send every block (the default)",
    )
    return made


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsrefresh``: return once every group's refresh has durably ended."""
    arguments = build_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    configs, broken = primaries(paths, arguments)
    begun = _begin_all(paths, configs, arguments.kind)
    with _display(arguments.json) as show:
        follow(configs, looking(paths), show)
    return tell(arguments.json, begun, "refreshed", broken)


@cli.run
def launch_main(argv: Sequence[str] | None = None) -> int:
    """Run ``launchrefresh``: return once every group's refresh has durably begun."""
    arguments = build_launch_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    configs, broken = primaries(paths, arguments)
    begun = _begin_all(paths, configs, arguments.kind)
    return tell(arguments.json, begun, "refresh has begun", broken)


@cli.run
def kill_main(argv: Sequence[str] | None = None) -> int:
    """Run ``killrefresh``."""
    arguments = build_kill_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    ended = []
    configs, broken = primaries(paths, arguments)
    for config in configs:
        call_driver(paths, config, "KillRefresh")
        ended.append({"group": config.number, "name": config.name})
    return tell(arguments.json, ended, "refresh has ended; the mirror stays incoherent", broken)


def looking(paths: Paths) -> Look:
    """Give what looks at a group of which this host is primary."""
    return lambda config: collect_groups(paths, config.primary_host, [config])[0]


def _begin_all(paths: Paths, configs: Sequence[GroupConfig], kind: str) -> list[dict[str, Any]]:
    for config in configs:
        wait_for_room(config, looking(paths))
    return [begin(paths, config, kind) for config in configs]


def begin(paths: Paths, config: GroupConfig, kind: str, call: Call | None = None) -> dict[str, Any]:
    """Have a group's refresh begin.

    :param kind: ``full``.
    :returns: the driver's answer with the group's number and name.
    :raises QdsError: the driver does not answer, or refuses.
    """
    ask = call or call_driver
    answer = ask(paths, config, "Refresh", kind=kind)
    return {**answer, "group": config.number, "name": config.name, "kind": kind}


def wait_for_room(
    config: GroupConfig,
    look: Look,
    sleep: Callable[[float], None] = time.sleep,
    tell_why: Callable[[str], None] = _to_stderr,
) -> None:
    """Wait while a group in bypass still sends what lies before the break, and has little room.

    Leaving bypass then would soon fill its writelogs again.  Without a link there is nothing to
    wait for.
    """
    told = False
    while True:
        try:
            group = look(config)
        except UnreachableError:
            return
        logs = [unit["writelog"]["used_ratio"] or 0.0 for unit in group["ldsus"]]
        linked = group["pmd"].get("state") == "connected"
        if group["state"] != "bypass" or not linked or max(logs) <= REFRESH_RING_SHARE:
            return
        if not told:
            told = True
            tell_why(
                f"{group['name']}: waiting until the secondary has most of what was written "
                "before the bypass"
            )
        sleep(POLL_SECONDS)


def follow(
    configs: Sequence[GroupConfig],
    look: Look,
    show: Show,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait for the durable end of the groups' refreshes; daemons may come and go meanwhile.

    :raises BrokenError: a refresh ended and its mirror is not coherent: it was killed.
    :raises QdsError: the link is refused for good.
    """
    waiting = list(configs)
    failed: dict[str, int] = {}
    while waiting:
        for config in list(waiting):
            try:
                group = look(config)
            except UnreachableError:
                continue
            show(group)
            try:
                if _ended(group):
                    waiting.remove(config)
                failed.pop(group["name"], None)
            except QdsError:
                # The link may have been refused for what the refresh is about to overcome.
                looks = failed[group["name"]] = failed.get(group["name"], 0) + 1
                if group["refresh"] is None or looks >= REFUSED_LOOKS:
                    raise
        if waiting:
            sleep(POLL_SECONDS)


def _ended(group: Group) -> bool:
    if group["driver"]["pid"] is None or group["refresh"] is not None:
        raise_failure(group)
        return False
    if group["coherent"] is not True:
        reason = f" ({group['reason']})" if group["reason"] else ""
        raise BrokenError(
            f"{group['name']}: the refresh was ended before its end{reason}", hint="qdsrefresh"
        )
    return True


@contextlib.contextmanager
def _display(quiet: bool) -> Iterator[Show]:
    """Give what shows progress: a bar on a terminal, else a line each LINE_SECONDS."""
    if quiet:
        yield lambda group: None
    elif info_view.is_terminal():
        with _bars() as show:
            yield show
    else:
        yield lines()


def lines(
    clock: Callable[[], float] = time.monotonic, write: Callable[[str], None] = print
) -> Show:
    """Give what writes a line of progress per group, at most one each LINE_SECONDS."""
    last: dict[str, float] = {}

    def show(group: Group) -> None:
        name, now = group["name"], clock()
        if group["refresh"] and now - last.get(name, now - LINE_SECONDS) >= LINE_SECONDS:
            last[name] = now
            write(f"{name}: {info_view.refresh_text(group['refresh'])}")

    return show


@contextlib.contextmanager
def _bars() -> Iterator[Show]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    name = TextColumn("{task.description}")
    with Progress(name, BarColumn(), DownloadColumn(True), Speed(), TimeRemainingColumn()) as bar:
        tasks: dict[str, Any] = {}

        def show(group: Group) -> None:
            task = tasks.get(group["name"])
            if task is None:
                task = tasks[group["name"]] = bar.add_task(group["name"], total=None)
            progress = group["refresh"]
            if progress:
                done = progress["done_bytes"]
                bar.update(task, completed=done, total=done + progress["remaining_bytes"])
            elif group["coherent"]:
                total = bar.tasks[task].total or 1
                bar.update(task, completed=total, total=total)

        yield show


def call_driver(paths: Paths, config: GroupConfig, command: str, **words: str) -> dict[str, Any]:
    """Call a command of a group's driver.

    :raises QdsError: what it says, or that it does not answer.
    """
    control = paths.control_socket(f"{config.name}.driver")
    return ControlClient(control, BEGIN_SECONDS).call(command, **words)


def primaries(paths: Paths, arguments: argparse.Namespace) -> cli.Selection:
    """Give the selected groups of which this host is primary, and which have broken files.

    :raises ConfigError: there is none, or one that was named is not.
    """
    host = load_host(paths)
    selected, broken = cli.load_selection(arguments, paths)
    here = [one for one in selected if one.role_of(host.name) == "primary"]
    others = [one for one in selected if one not in here]
    if not here or (others and (arguments.numbers or arguments.names)):
        raise ConfigError(
            f"host {host.name} is not the primary of {(others or selected)[0].name}",
            hint=f"run this on {(others or selected)[0].primary_host}",
        )
    return cli.Selection(here, broken)


def tell(as_json: bool, groups: list[dict[str, Any]], text: str, broken: Sequence[QdsError]) -> int:
    """Say what was done to which groups; give the exit code."""
    if as_json:
        cli.print_json({"groups": groups, **cli.errors_json(broken)})
    else:
        for group in groups:
            print(f"{group['name']}: {text}")
    return cli.report_all(broken, as_json)
