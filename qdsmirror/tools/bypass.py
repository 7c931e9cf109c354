"""``qdsbypass on|off``: let writes go past the writelogs, and come back by a refresh.

It acts on whole groups, because coherence is the group's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qdsmirror.tools import cli
from qdsmirror.tools.following import looking
from qdsmirror.tools.orders import order_all, primaries, tell
from qdsmirror.tools.refresh import wait_for_room


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of ``qdsbypass``."""
    made = cli.parser("qdsbypass", "Enter bypass, or leave it by a refresh.")
    made.add_argument(
        "to",
        choices=("on", "off"),
        metavar="on|off",
        help="on: writes go past the writelogs; off: a refresh leads back",
    )
    cli.add_selection(made)
    return made


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsbypass``: return once the groups are in bypass, or their refreshes have begun."""
    arguments = build_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    configs, failed = primaries(paths, arguments)
    text = "in bypass; its mirror grows older until qdsbypass off"
    if arguments.to == "off":
        text = "bypass left, a refresh has begun; watch it with qdsinfo"
        for config in configs:
            wait_for_room(config, looking(paths))
    done = order_all(paths, configs, failed, "Bypass", to=arguments.to)
    return tell(arguments.json, done, text, failed)
