"""qdswlscan(1): what a start of the driver, or of the rmd, would find in the logs.

The driver scans and registers its writelogs by itself; this command scans when none runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from qdsmirror.config import GroupConfig, load_host
from qdsmirror.core.failures import Failed
from qdsmirror.errors import BrokenError, ConfigError, CorruptError, DeviceFailedError, QdsError
from qdsmirror.paths import Paths
from qdsmirror.storage.device import open_device
from qdsmirror.storage.extension import PoolDevice, open_pool
from qdsmirror.storage.journal import Mirror
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.recovery import (
    DataDeviceError,
    close_units,
    judge,
    open_units,
    replay,
)
from qdsmirror.tools import cli


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of qdswlscan."""
    parser = cli.parser(
        "qdswlscan",
        "Scan the writelogs (at the primary) or the journal (at the secondary) of groups.",
        groups=True,
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing: exit 0 if the logs are usable, 4 if they are refused",
    )
    return parser


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Scan; without ``--check`` also replay the writelogs onto their data devices."""
    arguments = build_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    host = load_host(paths)
    groups, failed = cli.load_selection(arguments, paths)
    here = [group for group in groups if group.role_of(host.name) is not None]
    if not here:
        raise ConfigError(
            f"{host.name} is neither primary nor secondary of the groups selected",
            hint="compare `name` in qds.cfg with `host` in the group files",
        )
    found: list[dict[str, Any]] = []
    for group in here:
        try:
            found.append(_scan(paths, group, host.name, arguments.check))
        except QdsError as error:
            # The others are to be known no less.
            failed.append(error)
            continue
        if found[-1]["refused"]:
            failed.append(BrokenError(found[-1]["refused"], hint="see RECOVERY in qdswlscan(1)"))
    if arguments.json:
        cli.print_json({"groups": found, **cli.errors_json(failed)})
    else:
        for one in found:
            _print(one)
    return cli.report_all(failed, arguments.json)


def _scan(paths: Paths, group: GroupConfig, host: str, check: bool) -> dict[str, Any]:
    latch = FailureLatch(paths.state_file(group.number))
    try:
        if host == group.primary_host:
            cli.refuse_beside_daemon(paths, group, "driver")
            for ldsu in group.ldsus:
                latch.check((ldsu.data_device, ldsu.writelog_device))
            with cli.naming(group.name):
                return _scan_primary(group, check, latch.group())
        cli.refuse_beside_daemon(paths, group, "rmd")
        latch.check((group.journal_device, *(ldsu.mirror_device for ldsu in group.ldsus)))
        with cli.naming(group.name):
            return _scan_secondary(group)
    except DeviceFailedError as error:
        # The kernel reports the next sync as good, to a daemon too (rules.md 4).
        latch.record(error.path, error)
        raise


def _scan_primary(group: GroupConfig, check: bool, known: Failed) -> dict[str, Any]:
    needed = any(not log.drained for log in known.untrusted.values())
    pool, problems = open_pool(group.pool, group.number, open_device, failed=needed)
    for error in problems.values():
        print(f"warning: {error.message}", file=sys.stderr)
    try:
        units = open_units(group, open_device, known, pool)
    except BaseException:
        _close_pool(pool)
        raise
    try:
        refused, voids = "", []
        try:
            voids = [[void.range.first, void.range.length] for void in judge(units).voids]
        except CorruptError as error:
            refused = error.message
        logs = [
            {
                "name": unit.config.name,
                "device": unit.writelog.device.path,
                "tail": unit.writelog.superblock.tail.position,
                "applied": unit.writelog.superblock.applied.position,
                "head": unit.reached.position,
                "frames_to_replay": len(unit.finding.ranges),
                "entries_to_replay": sum(span.length for span in unit.finding.ranges),
                "stopped": unit.finding.stopped,
            }
            for unit in units
        ]
        generation = units[0].writelog.superblock.generation
        if not check and not refused:
            for unit in units:
                with cli.naming(unit.config.data_device):
                    try:
                        replay(unit)
                    except DataDeviceError as error:
                        raise error.cause from error
    finally:
        close_units(units)
        _close_pool(pool)
    return {
        "group": group.name,
        "role": "primary",
        "generation": generation.hex(),
        "logs": logs,
        "voids": voids,
        "replayed": not check and not refused,
        "refused": refused,
    }


def _close_pool(pool: Sequence[PoolDevice]) -> None:
    for one in pool:
        one.device.close()


def _scan_secondary(group: GroupConfig) -> dict[str, Any]:
    mirror = Mirror.open(group, open_device)
    try:
        superblock = mirror.journal.superblock
        scan = mirror.scan()
        log = {
            "name": "journal",
            "device": group.journal_device,
            "tail": superblock.tail.position,
            "applied": superblock.applied.position,
            "head": scan.reached.position,
            "frames_to_replay": scan.frames,
            "entries_to_replay": scan.entries,
            "stopped": scan.stopped,
        }
    finally:
        mirror.close()
    return {
        "group": group.name,
        "role": "secondary",
        "generation": superblock.generation.hex(),
        "logs": [log],
        "voids": [],
        "replayed": False,
        "refused": scan.damage,
    }


def _print(found: dict[str, Any]) -> None:
    print(f"{found['group']} ({found['role']}), generation {found['generation'] or 'none yet'}")
    for log in found["logs"]:
        print(
            f"  {log['name']}: {log['device']}: tail {log['tail']}, applied {log['applied']}, "
            f"head {log['head']}; {log['frames_to_replay']} frames with "
            f"{log['entries_to_replay']} entries to replay"
        )
    for first, length in found["voids"]:
        print(f"  void range: GSN {first} to {first + length - 1}")
    if found["replayed"]:
        print("  replayed onto the data devices")
