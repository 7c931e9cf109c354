"""qdswlscan(1): what a start of the driver, or of the rmd, would find in the logs.

The driver scans and registers its writelogs by itself; this command scans when none runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from qdsmirror.config import load_host
from qdsmirror.errors import BrokenError, QdsError
from qdsmirror.tools import cli, progress
from qdsmirror.tools.info_view import size_text


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
    here = cli.taking_part(groups, host, paths)
    from qdsmirror.tools.scanning import scan

    found: list[dict[str, Any]] = []
    with progress.telling(arguments.json) as tell:
        for group in here:
            try:
                with progress.working(tell, group.name, "scanning"):
                    found.append(scan(paths, group, host.name, arguments.check, failed))
            except QdsError as error:
                # The others are to be known no less.
                failed.append(error)
                continue
            refused = found[-1]["refused"]
            if refused:
                failed.append(BrokenError(refused, hint="see RECOVERY in qdswlscan(1)"))
    if arguments.json:
        cli.print_json({"groups": found, **cli.errors_json(failed)})
    else:
        for one in found:
            _print(one)
    return cli.report_all(failed, arguments.json)


def _print(found: dict[str, Any]) -> None:
    print(f"{found['group']} ({found['role']}), generation {found['generation'] or 'none yet'}")
    for log in found["logs"]:
        place = "not read any more"
        if log["head"] is not None:
            place = (
                f"tail {log['tail']}, applied {log['applied']}, head {log['head']}; "
                f"{log['frames_to_replay']} frames with {log['entries_to_replay']} entries to "
                "replay"
            )
        print(f"  {log['name']}: {log['device']}: {place}")
        if "memory_bytes" in log:
            held = "held by the driver's master, lost if that has ended"
            kept = held if log["lost"] else "empty"
            print(
                f"    {size_text(log['memory_bytes'])} in memory, {kept}; "
                f"{size_text(log['dirty_bytes'])} dirty"
            )
    for one in found["failed"]:
        since = f"since {_time_text(one['since'])}: " if one["since"] is not None else ""
        print(f"  {one['ldsu']}: {since}{one['reason']}")
    if found["bypass"] is not None:
        print(f"  {_bypass_text(found)}")
    for first, length in found["voids"]:
        print(f"  void range: GSN {first} to {first + length - 1}")
    if found["replayed"]:
        print("  replayed onto the data devices")


def _bypass_text(found: dict[str, Any]) -> str:
    bypass = found["bypass"]
    since = f"since {_time_text(bypass['since'])} ({bypass['reason']})"
    if found["role"] == "primary":
        return f"in bypass {since}; {size_text(bypass['dirty_bytes'])} dirty"
    return f"the primary went into bypass {since}; the mirror ends there"


def _time_text(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
