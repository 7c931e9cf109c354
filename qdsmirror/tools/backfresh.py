"""``qdsbackfresh``, ``launchbackfresh``, ``killbackfresh``: make data devices what the mirror is.

They act on whole groups, because coherence is the group's.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from qdsmirror.config import GroupConfig
from qdsmirror.errors import BrokenError, DegradedError, QdsError, UsageError
from qdsmirror.paths import Paths
from qdsmirror.tools import cli, info_view, progress
from qdsmirror.tools.audited import audited
from qdsmirror.tools.following import Look, looking, until_over
from qdsmirror.tools.orders import order_all, primaries, tell
from qdsmirror.tools.status import Group, raise_failure

_OPTIONS = ("dry-run", "discard", "force")


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of ``qdsbackfresh``."""
    made = _backfresh_parser(
        "qdsbackfresh", "Make data devices equal to their mirror, in the foreground."
    )
    made.add_argument("--dry-run", action="store_true", help="only say how much differs")
    made.add_argument(
        "--replay", metavar="FILE", help="write back what a backfresh has kept; no driver runs"
    )
    return made


def build_launch_parser() -> argparse.ArgumentParser:
    """Make the parser of ``launchbackfresh``."""
    return _backfresh_parser(
        "launchbackfresh", "Begin to make data devices equal to their mirror, and return."
    )


def build_kill_parser() -> argparse.ArgumentParser:
    """Make the parser of ``killbackfresh``."""
    made = cli.parser(
        "killbackfresh",
        "End the backfresh of groups; their LDSUs stay closed until another one.",
        groups=True,
    )
    made.add_argument(
        "--online", action="store_true", help="open the LDSUs with what their data devices hold"
    )
    made.add_argument("--yes", action="store_true", help="needed by --online")
    return made


def _backfresh_parser(prog: str, description: str) -> argparse.ArgumentParser:
    made = cli.parser(prog, description, groups=True)
    made.add_argument(
        "--discard", action="store_true", help="give up what the secondary does not have"
    )
    made.add_argument("--force", action="store_true", help="cut off clients that are connected")
    made.add_argument("--keep", metavar="FILE", help="keep what is overwritten in a new file")
    made.add_argument("--yes", action="store_true", help="needed where data is overwritten")
    return made


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsbackfresh``: return once every group's data devices are what the mirror is."""
    arguments = build_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    configs, failed = primaries(paths, arguments)
    _check(arguments, configs)
    if arguments.replay is not None:
        return _replay(arguments, paths, configs, failed)
    begun = _begin_all(arguments, paths, configs, failed)
    # What was refused is told before the others are waited for.
    code = cli.report_all(failed, arguments.json)
    ids = {one["group"]: one["id"] for one in begun}
    followed = [one for one in configs if one.number in ids]
    with progress.of_groups(arguments.json, "backfresh") as show:
        seen, ended = follow(followed, ids, looking(paths), show, dry_run=arguments.dry_run)
    done = [{**one, **seen[one["group"]]} for one in begun if one["group"] not in ended]
    untold = [*(failed if arguments.json else ()), *ended.values()]
    if not arguments.json:
        for one in done:
            print(f"{one['name']}: {_result(one, arguments.dry_run)}")
        return code or cli.report_all(untold, False)
    return code or tell(True, done, "", untold)


@cli.run
def launch_main(argv: Sequence[str] | None = None) -> int:
    """Run ``launchbackfresh``: return once every group's backfresh has durably begun."""
    arguments = build_launch_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    configs, failed = primaries(paths, arguments)
    arguments.dry_run, arguments.replay = False, None
    _check(arguments, configs)
    begun = _begin_all(arguments, paths, configs, failed)
    return tell(arguments.json, begun, "backfresh has begun; its LDSUs are closed", failed)


@cli.run
def kill_main(argv: Sequence[str] | None = None) -> int:
    """Run ``killbackfresh``."""
    arguments = build_kill_parser().parse_args(argv)
    if arguments.online and not arguments.yes:
        raise UsageError(
            "--online opens LDSUs that are a mixture of old and new blocks",
            hint="if that is meant, say so with --yes; qdsbackfresh would complete them",
        )
    paths = cli.paths_of(arguments)
    configs, failed = primaries(paths, arguments)
    options = "online" if arguments.online else ""
    ended = order_all(paths, configs, failed, "KillBackfresh", options=options)
    if arguments.json:
        return tell(True, ended, "", failed)
    for one in ended:
        text = "backfresh has ended; its LDSUs are open"
        if one.get("state") == "needed":
            text = "backfresh has ended; its LDSUs stay closed until another one"
        print(f"{one['name']}: {text}")
    return cli.report_all(failed, False)


def _check(arguments: argparse.Namespace, configs: Sequence[GroupConfig]) -> None:
    """Check what goes together.

    :raises UsageError: it does not.
    """
    given = [name for name in ("keep", "replay") if getattr(arguments, name) is not None]
    if given and len(configs) > 1:
        raise UsageError(f"--{given[0]} is for one group", hint="select it with -g N")
    if arguments.replay is not None and (arguments.discard or arguments.force or arguments.keep):
        raise UsageError("--replay goes with --yes or --dry-run, and -g, alone")
    if arguments.dry_run and arguments.keep:
        raise UsageError("--dry-run overwrites nothing that could be kept")
    if not arguments.dry_run and not arguments.yes:
        names = ", ".join(ldsu.data_device for config in configs for ldsu in config.ldsus)
        raise UsageError(
            f"this overwrites {names}",
            hint="see how much with qdsbackfresh --dry-run; if that is meant, say so with --yes",
        )


def _begin_all(
    arguments: argparse.Namespace,
    paths: Paths,
    configs: Sequence[GroupConfig],
    failed: list[QdsError],
) -> list[dict[str, Any]]:
    options = " ".join(name for name in _OPTIONS if getattr(arguments, name.replace("-", "_")))
    keep = os.path.abspath(arguments.keep) if arguments.keep is not None else ""
    return order_all(paths, configs, failed, "Backfresh", options=options, keep=keep)


def follow(
    configs: Sequence[GroupConfig],
    ids: dict[int, str],
    look: Look,
    show: progress.Show,
    sleep: Callable[[float], None] = time.sleep,
    *,
    dry_run: bool = False,
) -> tuple[dict[int, dict[str, Any]], dict[int, QdsError]]:
    """Wait for the end of the groups' backfreshes; daemons may come and go meanwhile.

    :param ids: by group number, of the backfresh that was begun.
    :returns: by group number what was seen last of each; and why there was no end, where there was
        none.
    """
    seen: dict[int, dict[str, Any]] = {one.number: {} for one in configs}

    def over(group: Group) -> bool:
        show(group)
        number = group["group"]
        return _is_over(group, ids[number], seen[number], dry_run)

    def final(_group: Group, error: QdsError) -> bool:
        # A link may be refused for a moment.
        return isinstance(error, DegradedError)

    return seen, until_over(configs, look, over, final, sleep)


def _is_over(group: Group, number: str, seen: dict[str, Any], dry_run: bool) -> bool:
    if group["driver"]["pid"] is None:
        raise_failure(group)
        return False
    now = group["backfresh"]
    if dry_run and (now is None or now.get("id") != number):
        raise DegradedError(f"{group['name']}: the dry run was interrupted", hint="begin another")
    if now is None:
        # The driver was restarted behind the end.
        return True
    if now["state"] == "needed":
        raise DegradedError(
            f"{group['name']}: the backfresh was ended before its end",
            hint=f"its LDSUs stay closed: qdsbackfresh -g {group['group']} --yes",
        )
    if now.get("id") != number:
        raise BrokenError(f"{group['name']}: another backfresh is running", hint="qdsinfo")
    seen.update(now)
    if now["state"] in ("counted", "ended"):
        return True
    if now["state"] == "waiting":
        raise_failure(group)
    return False


def _result(done: dict[str, Any], dry_run: bool) -> str:
    changed = done.get("changed_bytes", 0)
    size = info_view.size_text(changed)
    if not dry_run and done.get("state") != "ended":
        return "backfreshed; its LDSUs are open"
    if not dry_run:
        return f"backfreshed, {size} fetched; its LDSUs are open"
    whole = info_view.size_text(done["done_bytes"] + done["remaining_bytes"])
    return f"{size} of {whole} differ from the mirror"


def _replay(
    arguments: argparse.Namespace,
    paths: Paths,
    configs: Sequence[GroupConfig],
    failed: list[QdsError],
) -> int:
    from qdsmirror.tools.backfresh_replay import replay

    done = []
    with progress.telling(arguments.json) as say:
        for config in configs:
            with (
                audited(paths, "qdsbackfresh", arguments),
                progress.working(say, config.name, "checking") as work,
            ):
                to = replay(paths, config, arguments.replay, work, dry_run=arguments.dry_run)
            done.append({**to, "group": config.number})
    if arguments.json:
        return tell(True, done, "", failed)
    for one in done:
        size = info_view.size_text(one["bytes"])
        if arguments.dry_run:
            print(f"{one['name']}: {one['records']} records, {size} would be written back")
            continue
        print(
            f"{one['name']}: {one['records']} records, {size} written "
            "back; the mirror is not coherent until qdsrefresh"
        )
    return cli.report_all(failed, False)
