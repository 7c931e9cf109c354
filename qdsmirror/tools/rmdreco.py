"""qdsrmdreco(1): commit what the secondary journal holds to the mirror devices.

Patent: "a recovery utility for the secondary computer system, that commits any buffered data
entries to the mirror device".  It takes the journal's lock, so it is refused beside a live rmd.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from qdsmirror.config import GroupConfig, load_groups, load_host
from qdsmirror.errors import BrokenError
from qdsmirror.storage.device import open_device
from qdsmirror.storage.journal import Mirror
from qdsmirror.tools import cli


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of qdsrmdreco."""
    return cli.parser(
        "qdsrmdreco",
        "Commit what the journal of a stopped secondary holds to its mirror devices.",
        groups=True,
    )


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Replay the journals of the groups whose secondary this host is."""
    arguments = build_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    host = load_host(paths)
    groups = [
        group
        for group in cli.select_groups(arguments, load_groups(paths))
        if group.secondary_host == host.name
    ]
    if not groups:
        raise BrokenError(
            f"{host.name} is not the secondary of any group selected",
            hint="run it on the secondary system",
        )
    for group in groups:
        cli.refuse_beside_daemon(paths, group, "rmd")
    done = [_recover(group) for group in groups]
    if arguments.json:
        cli.print_json({"groups": done})
    else:
        for one in done:
            usable = "coherent" if one["coherent"] else f"NOT coherent ({one['reason']})"
            print(
                f"{one['group']}: {one['frames']} frames committed; the mirror stands at GSN "
                f"{one['gsn']} and is {usable}"
            )
    return 0


def _recover(group: GroupConfig) -> dict[str, Any]:
    mirror = Mirror.open(group, open_device)
    try:
        frames = mirror.replay()
        superblock = mirror.journal.superblock
        return {
            "group": group.name,
            "frames": frames,
            "gsn": mirror.applied.gsn - 1,
            "coherent": superblock.coherent,
            "reason": superblock.reason,
            "generation": superblock.generation.hex(),
        }
    finally:
        mirror.close()
