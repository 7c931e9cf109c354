"""``qdsinfo``: state and metrics of the groups of this host."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qdsmirror.config import load_host
from qdsmirror.core.states import Mode
from qdsmirror.errors import (
    EXIT_DEGRADED,
    EXIT_OK,
    DegradedError,
    QdsError,
    UnreachableError,
    UsageError,
)
from qdsmirror.paths import Paths
from qdsmirror.tools import cli, info_view, progress
from qdsmirror.tools.status import Group, collect_groups, raise_failure

#: What ``--is`` and ``--wait`` take: the states, and more.
STATES = tuple(sorted(Mode))
PREDICATES = (*STATES, "coherent", "degraded", "drained", "served", "synchronous")

POLL_SECONDS = 0.1
TIMEOUT_SECONDS_DEFAULT = 60.0
INTERVAL_SECONDS_DEFAULT = 1.0
INTERVAL_SECONDS_MIN = 0.1
_DRAINED = ("written", "applied", "committed", "mirrored")

#: Gives the host's name and the selected group objects as they are now.
Look = Callable[[], tuple[str, list[Group]]]


def build_parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    made = cli.parser("qdsinfo", "Show the state and the metrics of logical groups.", groups=True)
    how = made.add_mutually_exclusive_group()
    how.add_argument(
        "--is",
        dest="is_state",
        metavar="STATE",
        choices=PREDICATES,
        help="exit 0 if every selected group is so, else 3: " + ", ".join(PREDICATES),
    )
    how.add_argument(
        "--wait", metavar="STATE", choices=PREDICATES, help="wait until every group is so"
    )
    how.add_argument("--watch", action="store_true", help="show the state again and again")
    how.add_argument(
        "--schema", action="store_true", help="print the JSON schema of what --json prints"
    )
    made.add_argument(
        "--timeout",
        metavar="S",
        type=_seconds,
        default=None,
        help=f"with --wait: exit 3 after S seconds (default: {TIMEOUT_SECONDS_DEFAULT:g})",
    )
    made.add_argument(
        "--interval",
        metavar="S",
        type=_seconds,
        default=None,
        help=f"with --watch: seconds between two looks (default: {INTERVAL_SECONDS_DEFAULT:g})",
    )
    return made


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsinfo``."""
    arguments = build_parser().parse_args(argv)
    if arguments.timeout is not None and arguments.wait is None:
        raise UsageError("--timeout goes with --wait", hint="qdsinfo --help")
    if arguments.interval is not None and not arguments.watch:
        raise UsageError("--interval goes with --watch", hint="qdsinfo --help")
    if arguments.schema:
        print(schema_text(), end="")
        return EXIT_OK
    look, broken = _look(cli.paths_of(arguments), arguments)
    if arguments.watch:
        cli.report_all(broken, arguments.json)
        interval = arguments.interval or INTERVAL_SECONDS_DEFAULT
        watch(look, max(interval, INTERVAL_SECONDS_MIN), arguments.json, broken=broken)
        return EXIT_OK
    if arguments.wait is not None:
        if broken:
            raise broken[0]
        timeout = arguments.timeout
        seconds = TIMEOUT_SECONDS_DEFAULT if timeout is None else timeout
        with progress.telling(arguments.json) as show:
            host, groups = wait(look, arguments.wait, seconds, show=show)
    else:
        host, groups = look()
    if arguments.json:
        cli.print_json({**report(host, groups), **cli.errors_json(broken)})
    elif arguments.is_state is None and arguments.wait is None:
        info_view.show(groups)
    code = cli.report_all(broken, arguments.json)
    if arguments.is_state is None:
        # What is asked for is the state of those that have one: that is reported.
        return EXIT_OK
    return code or (EXIT_DEGRADED if others(groups, arguments.is_state) else EXIT_OK)


def schema_text() -> str:
    """Give the JSON schema of ``--json``, as it is published."""
    return Path(__file__).parent.with_name("qdsinfo.schema.json").read_text("utf-8")


def report(host: str, groups: list[Group]) -> dict[str, Any]:
    """Give what ``--json`` prints, less the schema's number."""
    return {"host": host, "groups": groups}


def is_so(group: Group, predicate: str) -> bool:
    """Tell whether a group satisfies one of PREDICATES; what is not known is not so.

    ``synchronous``: all that was answered is as synchronous or near-synchronous operation promises.

    ``drained``: the last number written is applied here and committed and applied at the
    secondary, and nothing was written past the writelogs.  The secondary does not know what was
    written, so a group is drained as seen from the primary only.

    ``served``: a process of this host serves its LDSUs, or takes what the primary sends.
    """
    if predicate == "served":
        server = "driver" if group["role"] == "primary" else "rmd"
        return group[server]["pid"] is not None
    if predicate == "coherent":
        return group["coherent"] is True
    if predicate == "degraded":
        return group["degraded"] is not None
    if predicate == "synchronous":
        return bool((group["synchronous"] or {}).get("kept"))
    if predicate == "drained":
        gsn = group["gsn"]
        equal = gsn["written"] is not None and len({gsn[key] for key in _DRAINED}) == 1
        return equal and not (group["bypass"] or {}).get("dirty_bytes")
    return predicate == group["state"] or predicate in group["modes"]


def others(groups: Sequence[Group], predicate: str) -> list[Group]:
    """Give the groups that do not satisfy the predicate.

    On a host with both parts only the primary's groups can be drained: the others do not count.
    """
    if predicate == "drained":
        here = [group for group in groups if group["role"] == "primary"]
        groups = here or groups
    return [group for group in groups if not is_so(group, predicate)]


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def wait(
    look: Look,
    predicate: str,
    timeout_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    tell: Callable[[str], None] = _to_stderr,
    show: progress.Tell = progress.nobody,
) -> tuple[str, list[Group]]:
    """Wait until every group satisfies a predicate; daemons may come and go meanwhile.

    :param tell: told once what it waits for where somebody has to do something: a checkpoint.
    :param show: told at every look what is lacking.
    :returns: what the last look gave.
    :raises DegradedError: not within the time.
    :raises IdentityError: the link is refused for good; likewise ConfigError, BrokenError.
    """
    deadline = clock() + timeout_seconds
    told = predicate != "drained"
    while True:
        try:
            host, groups = look()
        except UnreachableError as error:
            lacking = error.message
        else:
            open_ones = others(groups, predicate)
            if not open_ones:
                return host, groups
            for group in open_ones:
                raise_failure(group)
            lacking = describe(open_ones[0], predicate)
            if not told and open_ones[0].get("checkpoint"):
                told = True
                tell(lacking)
        left = max(deadline - clock(), 0.0)
        show("waiting", f"until {predicate}, {left:.0f} s more: {lacking}", None, None)
        if clock() >= deadline:
            raise DegradedError(
                f"not {predicate} after {timeout_seconds:g} s: {lacking}", hint="qdsinfo"
            )
        sleep(min(POLL_SECONDS, max(deadline - clock(), 0.0)))


def describe(group: Group, predicate: str) -> str:
    """Say in a few words how a group is that does not satisfy the predicate."""
    name = group["name"]
    if predicate == "drained":
        if group["role"] == "secondary":
            return f"{name} is secondary here, only its primary knows when it is drained"
        held = group.get("checkpoint")
        if held:
            return (
                f"{name}: checkpoint {held['name']} holds at the secondary at GSN {held['gsn']}: "
                f"release it there with qdscheckpoint off -g {group['group']}"
            )
        gsn = group["gsn"]
        past = (group["bypass"] or {}).get("dirty_bytes")
        if past:
            return (
                f"{name} is in bypass, {past} bytes may differ from the mirror: leave it with "
                f"qdsbypass off -g {group['group']}"
            )
        return f"{name}: " + ", ".join(f"{key} {gsn[key]}" for key in _DRAINED)
    text = f"{name} is {'+'.join(group['modes'])}"
    if predicate == "coherent":
        text += ", not known to be coherent" if group["coherent"] is None else ", not coherent"
    reasons = (group["reason"], group["pmd"].get("reason"), group["rmd"].get("reason"))
    reason = next((one for one in reasons if one), "")
    return f"{text} ({reason})" if reason else text


def watch(
    look: Look,
    interval_seconds: float,
    as_json: bool,
    sleep: Callable[[float], None] = time.sleep,
    broken: Sequence[QdsError] = (),
) -> None:
    """Show the groups again and again, until Ctrl-C.

    :param broken: the groups' files that cannot be looked at; each JSON object names them.
    """
    if as_json or not info_view.is_terminal():
        while True:
            host, groups = look()
            if as_json:
                cli.print_json({**report(host, groups), **cli.errors_json(broken)}, indent=None)
            else:
                info_view.show(groups)
                print()
            sleep(interval_seconds)
    from qdsmirror.tools import info_table

    info_table.watch(look, interval_seconds, sleep)


def _look(paths: Paths, arguments: argparse.Namespace) -> tuple[Look, list[QdsError]]:
    """Read the configuration once; give what looks at the selected groups, and what is broken."""
    host = load_host(paths)
    selected, broken = cli.load_selection(arguments, paths)
    here = cli.taking_part(selected, host, paths)
    return lambda: (host.name, collect_groups(paths, host.name, here)), broken


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value
