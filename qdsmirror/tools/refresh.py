"""``qdsrefresh``, ``launchrefresh`` and ``killrefresh``: make the mirror anew from the primary.

They act on whole groups, because coherence is the group's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from qdsmirror.config import GroupConfig
from qdsmirror.errors import BrokenError, QdsError, UnreachableError
from qdsmirror.limits import REFRESH_RING_SHARE
from qdsmirror.paths import Paths
from qdsmirror.tools import cli, following, progress
from qdsmirror.tools.following import Look, looking, until_over
from qdsmirror.tools.orders import order_all, primaries, tell
from qdsmirror.tools.status import Group, raise_failure


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
    kinds = made.add_mutually_exclusive_group()
    for kind, text in (
        ("full", "send every block"),
        ("smart", "send what differs by hash; the default where a dirty one would not do"),
        ("dirty", "send what was written in bypass; the default where that will do"),
    ):
        kinds.add_argument(
            f"--{kind}", dest="kind", action="store_const", const=kind, default="auto", help=text
        )
    return made


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsrefresh``: return once every group's refresh has durably ended."""
    arguments = build_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    configs, failed = primaries(paths, arguments)
    begun = _begin_all(paths, configs, failed, arguments.kind)
    # What was refused is told before the others are waited for.
    code = cli.report_all(failed, arguments.json)
    numbers = [one["group"] for one in begun]
    with progress.of_groups(arguments.json) as show:
        ended = follow([one for one in configs if one.number in numbers], looking(paths), show)
    done = [one for one in begun if one["group"] not in ended]
    untold = [*(failed if arguments.json else ()), *ended.values()]
    told = tell(arguments.json, done, "refreshed", untold)
    return code or told


@cli.run
def launch_main(argv: Sequence[str] | None = None) -> int:
    """Run ``launchrefresh``: return once every group's refresh has durably begun."""
    arguments = build_launch_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    configs, failed = primaries(paths, arguments)
    begun = _begin_all(paths, configs, failed, arguments.kind)
    return tell(arguments.json, begun, "refresh has begun", failed)


@cli.run
def kill_main(argv: Sequence[str] | None = None) -> int:
    """Run ``killrefresh``."""
    arguments = build_kill_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    configs, failed = primaries(paths, arguments)
    ended = order_all(paths, configs, failed, "KillRefresh")
    return tell(arguments.json, ended, "refresh has ended; the mirror stays incoherent", failed)


def _begin_all(
    paths: Paths, configs: Sequence[GroupConfig], failed: list[QdsError], kind: str
) -> list[dict[str, Any]]:
    for config in configs:
        wait_for_room(config, looking(paths))
    return order_all(paths, configs, failed, "Refresh", kind=kind)


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
        sleep(following.POLL_SECONDS)


def follow(
    configs: Sequence[GroupConfig],
    look: Look,
    show: progress.Show,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[int, QdsError]:
    """Wait for the durable end of the groups' refreshes; daemons may come and go meanwhile.

    :returns: by group number why there was none: the refresh ended and its mirror is not coherent
        (it was killed), or the link is refused for good.
    """

    def over(group: Group) -> bool:
        show(group)
        return _ended(group)

    def final(group: Group, _error: QdsError) -> bool:
        # While there is one, the link may have been refused for what it is about to overcome.
        return group["refresh"] is None

    return until_over(configs, look, over, final, sleep)


def _ended(group: Group) -> bool:
    if group["driver"]["pid"] is None or group["refresh"] is not None:
        raise_failure(group)
        return False
    if group["coherent"] is not True:
        # The link's reason is another matter.
        reason = group["reason"] if group["reason"] != group["pmd"].get("reason") else ""
        reason = f" ({reason})" if reason else ""
        raise BrokenError(
            f"{group['name']}: the refresh was ended before its end{reason}", hint="qdsrefresh"
        )
    return True
