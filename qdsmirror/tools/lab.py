"""``qdslab``: two or more sites on one machine, to try, test and learn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qdsmirror.config import parse_size
from qdsmirror.errors import EXIT_OK, UsageError
from qdsmirror.tools import cli, info_view, progress
from qdsmirror.tools.lab_plan import Layout, Plan

if TYPE_CHECKING:
    from qdsmirror.tools.lab_sites import Lab


def build_parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    made = cli.parser("qdslab", "Make, run and remove two or more sites on one machine.")
    commands = cli.subcommands(made)
    create = cli.subcommand(commands, "create", "make a primary and secondaries below DIR")
    start = cli.subcommand(
        commands, "start", "start sites; wait until groups whose sites both run have their mirrors"
    )
    stop = cli.subcommand(commands, "stop", "end the daemons of sites in order")
    show = cli.subcommand(commands, "status", "show daemons and groups of every site")
    destroy = cli.subcommand(commands, "destroy", "stop everything and remove DIR")
    for one in (create, start, stop, show, destroy):
        one.add_argument("dir", metavar="DIR", help="the lab's directory")
    _add_plan(create, Plan())
    for one in (start, stop):
        sites = one.add_argument(
            "sites",
            metavar="SITE",
            nargs="*",
            help="primary, secondary, secondary2 ... (default: all)",
        )
        cli.completes(sites, ("primary", "secondary"))
    destroy.add_argument("--dry-run", action="store_true", help="only say what would be lost")
    destroy.add_argument("--yes", action="store_true", help="needed: all its data is lost")
    return made


def _add_plan(create: argparse.ArgumentParser, default: Plan) -> None:
    """Add the options that say what a lab is to have."""
    create.add_argument(
        "--groups", metavar="N", type=int, help="logical groups (default: one for each secondary)"
    )
    for name, text in (
        ("ldsus", "LDSUs in each group"),
        ("pool", "devices in each group's extension pool"),
        ("secondaries", "secondary sites, over which the groups are spread"),
    ):
        count = getattr(default, name)
        create.add_argument(
            f"--{name}", metavar="N", type=int, default=count, help=f"{text} (default: {count})"
        )
    for name, text in (
        ("size", "size of each LDSU"),
        ("writelog", "size of each writelog"),
        ("journal", "size of each group's secondary journal"),
        ("pool-size", "size of each device of the extension pools"),
    ):
        size = getattr(default, name.replace("-", "_"))
        create.add_argument(
            f"--{name}",
            metavar="SIZE",
            type=_size,
            default=size,
            help=f"{text}, e.g. 64M (default: {size >> 20}M)",
        )
    create.add_argument(
        "--overflow",
        choices=("block", "bypass"),
        default=default.overflow,
        help=f"what happens when a writelog is full (default: {default.overflow})",
    )
    create.add_argument(
        "--mode",
        choices=("async", "sync", "near-sync"),
        default=default.mode,
        help=f"how writes are answered with regard to the secondary (default: {default.mode})",
    )
    for name, text in (
        (
            "crossed",
            "every second group goes from secondary to primary: each site plays both parts",
        ),
        ("memory", "keep the writelogs in memory, and dirty bitmaps beside them on small files"),
        ("console", "each site has a console daemon too, which serves the metrics"),
    ):
        create.add_argument(f"--{name}", action="store_true", help=text)
    create.add_argument(
        "--port",
        type=int,
        help="TCP port of the secondary, further ones' follow (default: free ones are chosen)",
    )


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdslab``."""
    arguments = build_parser().parse_args(argv)
    if arguments.root is not None:
        raise UsageError("qdslab takes DIR, not --root", hint="qdslab --help")
    from qdsmirror.tools.lab_sites import Lab

    lab = Lab(arguments.dir)
    if arguments.command == "create":
        return _create(lab, arguments)
    if arguments.command == "status":
        return _status(lab, arguments.json)
    if arguments.command == "destroy":
        if arguments.dry_run:
            size = info_view.size_text(lab.used_bytes())
            return _tell(arguments, f"{lab.directory}: would be removed, {size} in files")
        if not arguments.yes:
            raise UsageError(
                f"destroy removes all data in {lab.directory}",
                hint=f"qdslab destroy {lab.directory} --yes",
            )
        lab.destroy()
        return _tell(arguments, f"{lab.directory}: removed")
    sites = arguments.sites or lab.sites
    for site in sites:
        if site not in lab.sites:
            raise UsageError(f"{site!r} is no site of a lab", hint=f"sites: {', '.join(lab.sites)}")
    if arguments.command == "stop":
        lab.stop(sites)
        return _tell(arguments, f"{lab.directory}: {_listed(sites)} stopped")
    with progress.of_groups(arguments.json, stream=sys.stderr, write=_to_stderr) as show:
        lab.start(sites, show=show)
    return _tell(arguments, f"{lab.directory}: {_listed(sites)} started")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _create(lab: Lab, arguments: argparse.Namespace) -> int:
    least = Layout(1, arguments.secondaries, arguments.crossed).groups_min
    lab.create(
        Plan(
            groups=least if arguments.groups is None else arguments.groups,
            ldsus=arguments.ldsus,
            size=arguments.size,
            writelog=arguments.writelog,
            journal=arguments.journal,
            port=arguments.port,
            overflow=arguments.overflow,
            pool=arguments.pool,
            pool_size=arguments.pool_size,
            secondaries=arguments.secondaries,
            crossed=arguments.crossed,
            memory=arguments.memory,
            mode=arguments.mode,
            console=arguments.console,
        )
    )
    ports = [str(port) for port in lab.ports.values()]
    text = f"{lab.directory}: created, port{'s' * (len(ports) > 1)} {_listed(ports)}"
    if lab.consoles:
        text += f", metrics on {_listed([str(port) for port in lab.consoles.values()])}"
    return _tell(arguments, text)


def _status(lab: Lab, as_json: bool) -> int:
    report = lab.report()
    if as_json:
        cli.print_json(report)
        return EXIT_OK
    for site in report["sites"]:
        daemons = ", ".join(
            f"{name} {'stopped' if pid is None else pid}" for name, pid in site["daemons"].items()
        )
        print(f"{site['site']} ({site['root']}): {daemons}")
        info_view.show(site["groups"])
        print()
    return EXIT_OK


def _tell(arguments: argparse.Namespace, text: str) -> int:
    if arguments.json:
        cli.print_json({"message": text})
    else:
        print(text)
    return EXIT_OK


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
