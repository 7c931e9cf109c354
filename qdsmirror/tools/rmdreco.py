"""qdsrmdreco(1): commit what the secondary journal holds to the mirror devices, or roll them back.

Patent: "a recovery utility for the secondary computer system, that commits any buffered data
entries to the mirror device".  It takes the journal's lock, so it is refused beside a live rmd.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from qdsmirror.config import GroupConfig, load_host
from qdsmirror.errors import ConfigError, DeviceFailedError, QdsError, UsageError
from qdsmirror.paths import Paths
from qdsmirror.tools import cli, progress
from qdsmirror.tools.audited import audited
from qdsmirror.tools.progress import Work

if TYPE_CHECKING:
    from qdsmirror.storage.journal import Mirror

#: Does something with a mirror that is open; gives what it has to say.
_Work = Callable[..., dict[str, Any]]


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
    made.add_argument(
        "--rollback",
        action="store_true",
        help="of a mirror whose refresh is interrupted: go back to what it was before; needs --yes",
    )
    made.add_argument(
        "--dry-run", action="store_true", help="with --rollback: only say what would be done"
    )
    made.add_argument("--yes", action="store_true", help="with --rollback: do it")
    return made


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Replay the journals of the groups whose secondary this host is."""
    arguments = build_parser().parse_args(argv)
    work = _work(arguments)
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
    with progress.telling(arguments.json) as tell:
        for group in groups:
            try:
                with (
                    audited(paths, "qdsrmdreco", arguments),
                    cli.naming(group.name),
                    progress.working(tell, group.name, "replaying the journal") as shown,
                ):
                    done.append(_recover(paths, group, partial(work, shown=shown)))
            except QdsError as error:
                # The other mirrors are needed no less.
                failed.append(error)
    if arguments.json:
        cli.print_json({"groups": done, **cli.errors_json(failed)})
    else:
        for one in done:
            _print(one)
    return cli.report_all(failed, arguments.json)


def _work(arguments: argparse.Namespace) -> _Work:
    """Give what is to be done with each mirror.

    :raises UsageError: the options do not go together, or consent is missing.
    """
    if not arguments.rollback:
        for option in ("yes", "dry_run"):
            if getattr(arguments, option):
                name = option.replace("_", "-")
                raise UsageError(f"--{name} goes with --rollback", hint="qdsrmdreco --help")
        return partial(_replay, release=arguments.release)
    if arguments.release:
        raise UsageError("--rollback goes without --release", hint="qdsrmdreco --help")
    if arguments.dry_run:
        return _look_back
    if not arguments.yes:
        raise UsageError(
            "--rollback gives up what the secondary received since the refresh began, and the "
            "primary must refresh it anew",
            hint="see how much with --dry-run; if that is meant, add --yes",
        )
    return _roll_back


def _recover(paths: Paths, group: GroupConfig, work: _Work) -> dict[str, Any]:
    from qdsmirror.storage.latch import FailureLatch

    used = (group.journal_device, *(ldsu.mirror_device for ldsu in group.ldsus))
    latch = FailureLatch(paths.state_file(group.number))
    latch.check(used)
    try:
        return _run(group, work)
    except DeviceFailedError as error:
        # The kernel reports the next sync as good, to the rmd too (rules.md 4).
        latch.record(error.path, error)
        raise


def _replay(mirror: Mirror, shown: Work, release: bool) -> dict[str, Any]:
    frames = mirror.replay()
    while release and mirror.held is not None:
        mirror.release()
        frames += mirror.replay()
    return {"frames": frames}


def _roll_back(mirror: Mirror, shown: Work) -> dict[str, Any]:
    from qdsmirror.storage.rollback import roll_back

    mirror.images.load()
    shown.expect("rolling back", mirror.images.used_bytes)
    return {"frames": 0, "restored_bytes": roll_back(mirror).restored_bytes}


def _look_back(mirror: Mirror, shown: Work) -> dict[str, Any]:
    from qdsmirror.storage.rollback import check_rollback

    to = check_rollback(mirror).gsn
    return {"would_roll_back_to": to, "would_restore_bytes": mirror.images.restorable_bytes}


def _run(group: GroupConfig, work: _Work) -> dict[str, Any]:
    from qdsmirror.storage.device import open_device
    from qdsmirror.storage.journal import Mirror

    mirror = Mirror.open(group, open_device)
    try:
        done = work(mirror)
        for text in mirror.take_told():
            print(f"{group.name}: {text}", file=sys.stderr)
        if "would_roll_back_to" in done:
            return {"group": group.name, **done}
        mirror.seal()
        superblock = mirror.journal.superblock
        return {
            "group": group.name,
            **done,
            "gsn": mirror.applied.gsn - 1,
            "coherent": superblock.coherent,
            "reason": superblock.reason,
            "generation": superblock.generation.hex(),
            "checkpoint": dict(superblock.checkpoint) if superblock.checkpoint else None,
        }
    finally:
        mirror.close()


def _print(found: dict[str, Any]) -> None:
    if "would_roll_back_to" in found:
        print(
            f"{found['group']}: would be rolled back to GSN {found['would_roll_back_to']}, "
            f"{found['would_restore_bytes']} bytes restored; what its journal received since would "
            "be given up"
        )
        return
    usable = "coherent" if found["coherent"] else f"NOT coherent ({found['reason']})"
    if "restored_bytes" in found:
        print(
            f"{found['group']}: rolled back to GSN {found['gsn']}, {found['restored_bytes']} bytes "
            "restored; the mirror is coherent, and the primary must refresh it: qdsrefresh"
        )
        return
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
