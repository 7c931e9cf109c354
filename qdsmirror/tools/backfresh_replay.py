"""``qdsbackfresh --replay FILE``: data devices get back what a backfresh has overwritten."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from qdsmirror.config import GroupConfig
from qdsmirror.core.backfresh import NEEDED, BackfreshState
from qdsmirror.errors import BrokenError, DegradedError, MismatchError
from qdsmirror.paths import Paths
from qdsmirror.storage.device import open_device
from qdsmirror.storage.extension import open_pool
from qdsmirror.storage.keep import KeepFile
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.recovery import OpenUnit, close_units, open_units
from qdsmirror.tools import cli
from qdsmirror.tools.progress import Work


def replay(
    paths: Paths, config: GroupConfig, path: str, work: Work, *, dry_run: bool = False
) -> dict[str, Any]:
    """Write back what a file has kept; no driver runs.

    Before the first block is written it is durable that the mirror is no copy of the data devices;
    and of a backfresh that was under way, that it is no more.  Once all is written, and the file
    is that backfresh's, the data devices are whole again: what they were when it began.

    :param work: shows how far it is.
    :param dry_run: only check all of that.

    :raises CorruptError: the file is none, or damaged.
    :raises MismatchError: it is of other LDSUs.
    :raises DegradedError: a driver runs, or has not applied everything.
    :raises BrokenError: a device of the group has failed.
    """
    cli.refuse_beside_daemon(paths, config, "driver")
    latch = FailureLatch(paths.state_file(config.number))
    with ExitStack() as stack:
        with cli.naming(path):
            file = stack.enter_context(KeepFile(path))
        _check_about(file, config)
        latch.check(one for ldsu in config.ldsus for one in (ldsu.data_device, ldsu.log_device))
        pool, _ = open_pool(config.pool, config.number, open_device)
        for device in pool:
            stack.callback(device.device.close)
        units = open_units(config, open_device, latch.group(), pool)
        stack.callback(close_units, units)
        _check_units(config, units, file)
        if not dry_run:
            work.expect("writing back", file.kept_bytes)
            with cli.naming(config.name):
                _write_back(units, file)
        return {"name": config.name, "records": file.count, "bytes": file.kept_bytes}


def _check_about(file: KeepFile, config: GroupConfig) -> None:
    ours = [[ldsu.index, ldsu.name] for ldsu in config.ldsus]
    theirs = [one[:2] for one in file.about["ldsus"]]
    if file.about["group"] != config.number or theirs != ours:
        raise MismatchError(
            f"{file.path} was kept for LDSUs {', '.join(one[1] for one in theirs)} of group "
            f"{file.about['group']}",
            hint="select that group with -g N",
        )


def _check_units(config: GroupConfig, units: Sequence[OpenUnit], file: KeepFile) -> None:
    sizes = [one[2] for one in file.about["ldsus"]]
    if sizes != [unit.device.size for unit in units]:
        raise MismatchError(f"{file.path} was kept for LDSUs of other sizes")
    for unit in units:
        if unit.dead is not None or unit.untrusted is not None:
            raise BrokenError(f"{config.name}: a device of {unit.config.name} has failed")
        applied = unit.writelog.superblock.applied.position
        if unit.loss.lost or unit.finding.reached.position != applied:
            raise DegradedError(
                f"{config.name}: the writelog of {unit.config.name} holds what is not on its data "
                "device yet",
                hint="launchdriver, then killdriver",
            )
        state = BackfreshState.of(unit.writelog.superblock)
        if state is not None and state.id.hex() != file.about["id"]:
            raise MismatchError(
                f"{file.path} was kept by another backfresh than the one that {unit.config.name} "
                "was left by",
                hint=f"use the file that one has kept: {state.keep or 'it has none'}",
            )


def _write_back(units: Sequence[OpenUnit], file: KeepFile) -> None:
    reason = f"the data devices got back what a backfresh had overwritten ({file.path})"
    for unit in units:
        state = BackfreshState.of(unit.writelog.superblock)
        left = replace(state, phase=NEEDED, reason=reason[:200]) if state is not None else None
        unit.writelog.update(
            both=True,
            coherent=False,
            tracked=False,
            reason=reason,
            refresh=None,
            fingerprints=None,
            backfresh=left.to_json() if left is not None else None,
        )
    for kept in file.backwards():
        units[kept.ldsu].device.pwritev([kept.data], kept.offset)
    for unit in units:
        unit.device.fdatasync()
    for unit in units:
        unit.writelog.update(both=True, backfresh=None)
