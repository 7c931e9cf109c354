"""``qdsbypass on|off``: let writes go past the writelogs, and come back by a refresh.

It acts on whole groups, because coherence is the group's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qdsmirror.tools import cli
from qdsmirror.tools.refresh import call_driver, looking, primaries, tell, wait_for_room


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
    configs, broken = primaries(paths, arguments)
    done = []
    for config in configs:
        if arguments.to == "off":
            wait_for_room(config, looking(paths))
        answer = call_driver(paths, config, "Bypass", to=arguments.to)
        done.append({**answer, "group": config.number, "name": config.name})
    text = "in bypass; its mirror grows older until qdsbypass off"
    if arguments.to == "off":
        text = "bypass left, a full refresh has begun; watch it with qdsinfo"
    return tell(arguments.json, done, text, broken)
