"""``qdsextend``, ``qdsfree``: chain a device of the pool to a writelog in use, or free one.

They act on one LDSU: only its writelog changes, and nothing of the group's coherence.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from qdsmirror.tools import cli
from qdsmirror.tools.info_view import size_text
from qdsmirror.tools.orders import order, primaries


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of ``qdsextend``."""
    made = cli.parser(
        "qdsextend", "Extend an LDSU's writelog by a device of the group's extension pool."
    )
    return _with_device(made, "a free one of the pool (default: the first)")


def build_free_parser() -> argparse.ArgumentParser:
    """Make the parser of ``qdsfree``."""
    made = cli.parser(
        "qdsfree", "Take a device out of an LDSU's writelog, when what it holds is drained."
    )
    return _with_device(made, "one that extends the writelog (default: the one chained last)")


def _with_device(made: argparse.ArgumentParser, which: str) -> argparse.ArgumentParser:
    made.add_argument("ldsu", metavar="LDSU", help="whose writelog")
    made.add_argument("device", metavar="DEVICE", nargs="?", default="", help=which)
    return made


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsextend``: return once the device is durably chained."""
    done = _call("Extend", build_parser().parse_args(argv))
    if done is not None:
        print(
            f"{done['ldsu']}: {done['device']} extends the writelog, "
            f"{size_text(done['used_bytes'])} of {size_text(done['size'])} used; "
            f"free in the pool: {done['pool_free']}"
        )
    return 0


@cli.run
def free_main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsfree``: return once it is durable that the device leaves."""
    done = _call("Free", build_free_parser().parse_args(argv))
    if done is not None:
        state = "is free"
        if done["uncommitted_bytes"]:
            state = (
                f"leaves the writelog: {size_text(done['uncommitted_bytes'])} in it have yet to "
                "reach the secondary"
            )
        elif done["state"] != "free":
            state = "leaves the writelog: drained, and free at the next checkpoint"
        print(f"{done['ldsu']}: {done['device']} {state}")
    return 0


def _call(command: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Ask the LDSU's driver; give what it did, ``None`` if that was told already."""
    paths = cli.paths_of(arguments)
    arguments.numbers, arguments.names = [], [arguments.ldsu]
    (config,), _ = primaries(paths, arguments)
    device = os.path.abspath(arguments.device) if arguments.device else ""
    done = order(paths, config, command, ldsu=arguments.ldsu, device=device)
    if not arguments.json:
        return done
    cli.print_json(done)
    return None
