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
from qdsmirror.errors import BrokenError, DegradedError, QdsError, UnreachableError
from qdsmirror.tools import cli, info_view, progress
from qdsmirror.tools.orders import order_all, primaries, tell
from qdsmirror.tools.refresh import POLL_SECONDS, REFUSED_LOOKS, Look, looking
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
    waiting = list(configs)
    refusals: dict[int, int] = {}
    ended: list[dict[str, Any]] = []
    broken: list[QdsError] = []
    while waiting:
        for config in list(waiting):
            try:
                group = look(config)
            except UnreachableError:
                continue
            verify = group["verify"]
            if verify is None or group["driver"]["pid"] is None:
                continue
            show(group)
            if verify["id"] != ids[config.number]:
                waiting.remove(config)
                broken.append(DegradedError(f"{group['name']}: another verify has begun"))
            elif verify["phase"] == "over":
                waiting.remove(config)
                ended.append({**verify, "group": config.number, "name": group["name"]})
            elif (error := _refused(group, refusals)) is not None:
                waiting.remove(config)
                broken.append(error)
        if waiting:
            sleep(POLL_SECONDS)
    return ended, broken


def _refused(group: Group, looks: dict[int, int]) -> QdsError | None:
    """Tell why a group will not go on by itself, if that has been so for a while."""
    try:
        raise_failure(group)
    except QdsError as error:
        number = group["group"]
        looks[number] = looks.get(number, 0) + 1
        return error if looks[number] >= REFUSED_LOOKS else None
    looks.pop(group["group"], None)
    return None


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
