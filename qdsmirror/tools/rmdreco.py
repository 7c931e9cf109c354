"""qdsrmdreco(1): commit what the secondary journal holds to the mirror devices.

Patent: "a recovery utility for the secondary computer system, that commits any buffered data
entries to the mirror device".  It takes the journal's lock, so it is refused beside a live rmd.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from qdsmirror.config import GroupConfig, load_host
from qdsmirror.errors import ConfigError, DeviceFailedError, QdsError
from qdsmirror.paths import Paths
from qdsmirror.storage.device import open_device
from qdsmirror.storage.journal import Mirror
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.tools import cli


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of qdsrmdreco."""
    made = cli.parser(
        "qdsrmdreco",
        "Commit what the journal of a stopped secondary holds to its mirror devices.",
        groups=True,
    )
    made.add_argument(
        "--release", action="store_true", help="release checkpoints, and go on beyond them"
    )
    return made


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Replay the journals of the groups whose secondary this host is."""
    arguments = build_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    host = load_host(paths)
    selection = cli.load_selection(arguments, paths)
    groups = [group for group in selection.groups if group.secondary_host == host.name]
    if not groups:
        raise ConfigError(
            f"{host.name} is not the secondary of any group selected",
            hint="run it on the secondary system",
        )
    for group in groups:
        cli.refuse_beside_daemon(paths, group, "rmd")
    done: list[dict[str, Any]] = []
    failed = selection.broken
    for group in groups:
        try:
            with cli.naming(group.name):
                done.append(_recover(paths, group, arguments.release))
        except QdsError as error:
            # The other mirrors are needed no less.
            failed.append(error)
    if arguments.json:
        cli.print_json({"groups": done, **cli.errors_json(failed)})
    else:
        for one in done:
            _print(one)
    return cli.report_all(failed, arguments.json)


def _recover(paths: Paths, group: GroupConfig, release: bool) -> dict[str, Any]:
    used = (group.journal_device, *(ldsu.mirror_device for ldsu in group.ldsus))
    latch = FailureLatch(paths.state_file(group.number))
    latch.check(used)
    try:
        return _replay(group, release)
    except DeviceFailedError as error:
        # The kernel reports the next sync as good, to the rmd too (rules.md 4).
        latch.record(error.path, error)
        raise


def _replay(group: GroupConfig, release: bool) -> dict[str, Any]:
    mirror = Mirror.open(group, open_device)
    try:
        frames = mirror.replay()
        while release and mirror.held is not None:
            mirror.release()
            frames += mirror.replay()
        for text in mirror.told:
            print(f"{group.name}: {text}", file=sys.stderr)
        mirror.seal()
        superblock = mirror.journal.superblock
        return {
            "group": group.name,
            "frames": frames,
            "gsn": mirror.applied.gsn - 1,
            "coherent": superblock.coherent,
            "reason": superblock.reason,
            "generation": superblock.generation.hex(),
            "checkpoint": dict(superblock.checkpoint) if superblock.checkpoint else None,
        }
    finally:
        mirror.close()


def _print(found: dict[str, Any]) -> None:
    usable = "coherent" if found["coherent"] else f"NOT coherent ({found['reason']})"
    print(
        f"{found['group']}: {found['frames']} frames committed; the mirror stands at GSN "
        f"{found['gsn']} and is {usable}"
    )
    held = found["checkpoint"]
    if held is not None:
        print(
            f"{found['group']}: checkpoint {held['name']} holds there; what the journal has beyond "
            "it is applied with --release"
        )
