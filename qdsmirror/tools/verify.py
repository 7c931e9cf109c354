"""``qdsverify``: compare the mirror with the LDSUs while writes go on, and mend it.

It acts on whole groups, because coherence is the group's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from qdsmirror.config import GroupConfig
from qdsmirror.errors import BrokenError, DegradedError, QdsError
from qdsmirror.tools import cli, info_view, progress
from qdsmirror.tools.following import Look, looking, until_over
from qdsmirror.tools.orders import order_all, primaries, tell
from qdsmirror.tools.status import Group, raise_failure


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of ``qdsverify``."""
    made = cli.parser(
        "qdsverify",
        "Compare the mirror of groups with their LDSUs while writes go on, with progress.",
        groups=True,
    )
    ways = made.add_mutually_exclusive_group()
    for how, text in (
        ("repair", "send what differs again, and compare that again"),
        ("stop", "end the verify that is running"),
    ):
        ways.add_argument(
            f"--{how}", dest="how", action="store_const", const=how, default="compare", help=text
        )
    return made


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsverify``: return once every group's verify has ended."""
    arguments = build_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    configs, failed = primaries(paths, arguments)
    begun = order_all(paths, configs, failed, "Verify", how=arguments.how)
    if arguments.how == "stop":
        return tell(arguments.json, begun, "verify has ended", failed)
    # What was refused is told before the others are waited for.
    code = cli.report_all(failed, arguments.json)
    ids = {one["group"]: one["id"] for one in begun}
    with progress.of_groups(arguments.json, "verify") as show:
        ended, broken = follow([c for c in configs if c.number in ids], ids, looking(paths), show)
    if not arguments.json:
        for one in ended:
            _tell_result(one)
    results = [_judge(one) for one in ended]
    wrong = [error for error in results if error is not None] + broken
    if arguments.json:
        cli.print_json({"groups": ended, **cli.errors_json([*failed, *wrong])})
    return code or cli.report_all(sorted(wrong, key=lambda e: -e.exit_code), arguments.json)


def follow(
    configs: Sequence[GroupConfig],
    ids: dict[int, str],
    look: Look,
    show: progress.Show,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[dict[str, Any]], list[QdsError]]:
    """Wait for the end of the groups' verifies; daemons may come and go meanwhile.

    :param ids: of the verifies, by group number.
    :returns: the ``verify`` objects at their ends, with group number and name; and why there was no
        end to wait for.
    """
    ended: list[dict[str, Any]] = []

    def over(group: Group) -> bool:
        verify = group["verify"]
        if verify is None or group["driver"]["pid"] is None:
            return False
        show(group)
        if verify["id"] != ids[group["group"]]:
            raise DegradedError(f"{group['name']}: another verify has begun")
        if verify["phase"] == "over":
            ended.append({**verify, "group": group["group"], "name": group["name"]})
            return True
        raise_failure(group)
        return False

    def final(group: Group, _error: QdsError) -> bool:
        # A link may be refused for a moment; another verify is another one for good.
        return bool(group["verify"]["id"] != ids[group["group"]])

    return ended, list(until_over(configs, look, over, final, sleep).values())


def _judge(verify: dict[str, Any]) -> QdsError | None:
    """Give the error by which a verify ends the command; ``None`` where all is equal."""
    name = verify["name"]
    if verify["result"] == "equal":
        return None
    if verify["result"] == "differs":
        size = info_view.size_text(verify["differing_bytes"])
        text = f"{size} of the mirror differ"
        if not verify["differing_bytes"]:
            text = "the mirror differed, and is marked so; it does not differ any more"
        return BrokenError(f"{name}: {text}", hint=f"qdsverify --repair -g {verify['group']}")
    return DegradedError(f"{name}: the verify was ended: {verify['reason']}")


def _tell_result(verify: dict[str, Any]) -> None:
    name = verify["name"]
    for one in verify["differing"]:
        last = one["offset"] + one["length"] - 1
        print(f"{name}: {one['ldsu']}: bytes {one['offset']} to {last} differ")
    shown = sum(one["length"] for one in verify["differing"])
    if verify["differing_bytes"] > shown:
        more = info_view.size_text(verify["differing_bytes"] - shown)
        print(f"{name}: and {more} more")
    if verify["result"] == "equal":
        repaired = verify["repaired_bytes"]
        text = f", after {info_view.size_text(repaired)} were repaired" if repaired else ""
        print(f"{name}: the mirror is equal{text}")
    sys.stdout.flush()
