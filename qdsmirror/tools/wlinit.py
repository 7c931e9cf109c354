"""qdswlinit(1): initialise writelogs at the primary, the secondary journal at the secondary.

Everything is opened and checked before anything is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from qdsmirror.config import GroupConfig, load_host
from qdsmirror.errors import ConfigError, UsageError
from qdsmirror.paths import Paths
from qdsmirror.pidfile import running_pid
from qdsmirror.tools import cli, progress
from qdsmirror.tools.audited import audited
from qdsmirror.tools.client import ControlClient

if TYPE_CHECKING:
    from qdsmirror.tools.initialising import Prepared


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of qdswlinit."""
    parser = cli.parser(
        "qdswlinit",
        "Initialise the writelogs (at the primary) or the journal (at the secondary) of groups.",
        groups=True,
    )
    parser.add_argument(
        "--yes",
        action="store_true",
        help="also where a device holds something already, which is lost",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only check, and say what would be initialised and what would be lost",
    )
    parser.add_argument(
        "--pool",
        action="store_true",
        help="only what is new in the extension pools, also while the driver runs",
    )
    parser.add_argument(
        "--replaced",
        metavar="LDSU",
        action="append",
        default=[],
        help="another data device took the place of this LDSU's: a backfresh is to fill it; "
        "the writelogs stay as they are",
    )
    return parser


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Initialise, and say what was initialised."""
    arguments = build_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    host = load_host(paths)
    groups, broken = cli.load_selection(arguments, paths)
    if broken:
        # What it names may be a device that a good group names too.
        raise broken[0]
    if arguments.replaced:
        with audited(paths, "qdswlinit", arguments):
            return _replaced(arguments, paths, host.name, groups)
    here = cli.taking_part(groups, host, paths)
    if arguments.pool:
        here = [group for group in here if host.name == group.primary_host]
        if not here:
            raise ConfigError(
                f"{host.name} is not the primary of the groups selected",
                hint="run it on the primary system",
            )
    from qdsmirror.tools.initialising import prepare

    with ExitStack() as opened:
        consent = arguments.yes or arguments.dry_run
        prepared = prepare(paths, host.name, here, opened, consent, only_pool=arguments.pool)
        if arguments.dry_run:
            return _tell_plan(prepared, arguments.json)
        with (
            audited(paths, "qdswlinit", arguments),
            progress.telling(arguments.json) as tell,
            progress.working(tell, "qdswlinit", "initialising"),
        ):
            made = prepared.carry_out(paths)
    if arguments.json:
        cli.print_json({"initialised": made})
    else:
        _print(made, "initialised")
    return 0


def _tell_plan(prepared: Prepared, as_json: bool) -> int:
    """Say what would be done, and what would be lost by it."""
    if as_json:
        lost = [{"role": role, "device": path, "holds": what} for role, path, what in prepared.lost]
        cli.print_json({"would_initialise": prepared.described, "would_lose": lost})
        return 0
    _print(prepared.described, "would be initialised")
    for role, path, what in prepared.lost:
        when = " with the first refresh" if role.startswith("mirror device") else ""
        print(f"{role} {path} holds {what}, which would be lost{when}: that needs --yes")
    return 0


def _print(made: Sequence[dict[str, Any]], done: str) -> None:
    if not made:
        print("nothing new in the extension pools")
    for one in made:
        size = f"{one['size']} bytes"
        if "memory_bytes" in one:
            size = f"for a writelog of {one['memory_bytes']} bytes in memory"
        print(f"{one['group']}: {one['role']} {one['device']} {done}, {size}")
        if "before_image_bytes" in one:
            print(f"{one['group']}: {_before_text(one['before_image_bytes'])}")


def _before_text(size: int) -> str:
    """Say what a refresh may overwrite and can still be rolled back."""
    if not size:
        return "no room for before-images: a refresh that is interrupted cannot be rolled back"
    return f"of these {size} bytes for before-images, so that a refresh can be rolled back"


def _replaced(
    arguments: argparse.Namespace, paths: Paths, host: str, groups: Sequence[GroupConfig]
) -> int:
    """Take other data devices for some LDSUs."""
    if arguments.pool or arguments.yes or arguments.dry_run:
        raise UsageError("--replaced goes with -g alone: nothing is initialised")
    from qdsmirror.tools.wlinit_replaced import take_replaced

    here = [group for group in groups if group.primary_host == host]
    made = []
    for group, devices, told in take_replaced(paths, here, arguments.replaced):
        if running_pid(paths.pid_file("qdsdriver")) is not None:
            master = ControlClient(paths.control_socket("qdsdriver"))
            master.call("ForgetFailures", group=str(group.number))
        made.append(told)
        if not arguments.json:
            print(
                f"{group.name}: {', '.join(devices)} taken; closed until qdsbackfresh -g "
                f"{group.number} --yes"
            )
    if arguments.json:
        cli.print_json({"initialised": made})
    return 0
