"""``qdscheckpoint``: a named, coherent state of the mirror that can be read while others arrive.

At the secondary it is taken, shown and released; at the primary ``--mark`` puts an application's
own marker into the stream, and the secondary takes one exactly there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from qdsmirror.core.held import RELEASE, STRICT, check_name
from qdsmirror.errors import UsageError
from qdsmirror.paths import Paths
from qdsmirror.tools import cli
from qdsmirror.tools.orders import order_all, primaries, secondaries, tell

_WORDS = ("on", "off", "list")


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of ``qdscheckpoint``."""
    made = cli.parser(
        "qdscheckpoint",
        "At the secondary: take, release or list checkpoints; at the primary: set a mark.",
    )
    made.usage = (
        "qdscheckpoint [options] on|off|list [-g N | LDSU ...]\n"
        "       qdscheckpoint [options] --mark NAME [-g N | LDSU ...]"
    )
    made.add_argument("--name", metavar="NAME", help="with on: its name (default: the time)")
    made.add_argument(
        "--hold",
        choices=(RELEASE, STRICT),
        help="with on: what becomes of it when the journal fills (default: as configured)",
    )
    made.add_argument("--force", action="store_true", help="with off: end the clients that read it")
    made.add_argument(
        "--mark", metavar="NAME", help="at the primary: have one taken behind what is written now"
    )
    cli.add_selection(made, "on, off or list; then: only the groups that have these LDSUs", _WORDS)
    return made


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdscheckpoint``: return once what was asked for is durable."""
    arguments = build_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    to = _check(arguments)
    if arguments.mark is not None:
        configs, failed = primaries(paths, arguments)
        done = order_all(paths, configs, failed, "Mark", name=arguments.mark)
        text = f"mark {arguments.mark} is set; the secondary takes a checkpoint there"
        return tell(arguments.json, done, text, failed)
    return _at_secondary(paths, arguments, to)


def _check(arguments: argparse.Namespace) -> str:
    """Check that the options go together; give what is to be done, "" for a mark."""
    to = ""
    if arguments.mark is None:
        if not arguments.names or arguments.names[0] not in _WORDS:
            raise UsageError("say on, off or list, or give --mark", hint="qdscheckpoint --help")
        to = arguments.names.pop(0)
    for option, goes_with in (("name", "on"), ("hold", "on"), ("force", "off")):
        if getattr(arguments, option) and to != goes_with:
            raise UsageError(f"--{option} goes with {goes_with}", hint="qdscheckpoint --help")
    for name in (arguments.name, arguments.mark):
        if name is not None:
            check_name(name)
    return to


def _at_secondary(paths: Paths, arguments: argparse.Namespace, to: str) -> int:
    configs, failed = secondaries(paths, arguments)
    hold = "force" if arguments.force else arguments.hold or ""
    done = order_all(
        paths, configs, failed, "Checkpoint",
        daemon="rmd", to=to, name=arguments.name or "", hold=hold,
    )  # fmt: skip
    if arguments.json:
        return tell(True, done, "", failed)
    for group in done:
        for line in _lines(group, to):
            print(f"{group['name']}: {line}")
    return cli.report_all(failed, as_json=False)


def _lines(group: dict[str, Any], to: str) -> list[str]:
    """Say what holds, or held, and where it can be read."""
    held = group["checkpoint"]
    if held is None:
        return ["no checkpoint"]
    if to == "off":
        return [f"checkpoint {held['name']} (GSN {held['gsn']}) is released; the mirror catches up"]
    then = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held["since"]))
    strict = ", strict" if held["hold"] == STRICT else ""
    return [
        f"checkpoint {held['name']} holds at GSN {held['gsn']} since {then}{strict}",
        *(f"{name}: {uri}" for name, uri in held["nbd_uris"].items()),
    ]
