"""``qdswlinit --replaced LDSU``: another device takes a data device's place, to be backfreshed.

The writelogs stay as they are, with all that the secondary does not have yet.  The LDSU is closed
until a backfresh has made its new data device what the mirror is (rules.md 16).
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from qdsmirror.config import GroupConfig
from qdsmirror.core.backfresh import INTERRUPTED, NEEDED, RUNNING, BackfreshState, needed
from qdsmirror.core.failures import Dead, Failed
from qdsmirror.errors import BrokenError, CorruptError, DegradedError, DeviceError, UsageError
from qdsmirror.paths import Paths
from qdsmirror.storage.device import open_device
from qdsmirror.storage.extension import open_pool
from qdsmirror.storage.filedevice import FileDevice
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.memorylog import MemoryLogDevice
from qdsmirror.storage.partition import Partition
from qdsmirror.storage.probe import OWN_NAME, probe_signature
from qdsmirror.storage.recovery import OpenUnit, close_units, open_units
from qdsmirror.storage.superblock import read_superblock
from qdsmirror.tools import cli


def take_replaced(
    paths: Paths, groups: Sequence[GroupConfig], names: Sequence[str]
) -> list[tuple[GroupConfig, list[str], dict[str, Any]]]:
    """Take other data devices for these LDSUs, durably; no driver runs.

    First it is durable that they hold no copy of anything; then the failures are forgotten of those
    that they replace.

    :returns: by group, the data devices, and what is told of it.
    :raises UsageError: no such LDSU is selected.
    :raises DeviceError: a device is missing, in use, of another size, or another's.
    :raises BrokenError: a writelog has failed.
    """
    known = {ldsu.name: group for group in groups for ldsu in group.ldsus}
    for name in names:
        if name not in known:
            raise UsageError(f"no LDSU of the groups selected is named {name!r}")
    done = []
    for group in groups:
        own = [name for name in names if known[name] is group]
        if own:
            cli.refuse_beside_daemon(paths, group, "driver")
            done.append(_take(paths, group, own))
    return done


def still_lacking(
    log: FileDevice | Partition | MemoryLogDevice, dead: Dead | None
) -> dict[str, Any] | None:
    """Give what a new writelog must know of its LDSU's data device: a backfresh has not ended.

    Whatever becomes of a writelog, blocks that are lacking are not there.

    :param log: the device of the writelog before, if it was one.
    :param dead: what is known of the data device's failure.
    """
    state = None
    try:
        state = BackfreshState.of(read_superblock(log))
    except (OSError, CorruptError):
        pass  # No log, or one that cannot be read: what it said is in the state file.
    if state is None and (dead is None or INTERRUPTED not in dead.reason):
        return None
    number = state.id if state is not None else os.urandom(16)
    return needed(number, time.time(), INTERRUPTED).to_json()


def _take(
    paths: Paths, group: GroupConfig, names: Sequence[str]
) -> tuple[GroupConfig, list[str], dict[str, Any]]:
    latch = FailureLatch(paths.state_file(group.number))
    chosen = {ldsu.index: ldsu for ldsu in group.ldsus if ldsu.name in names}
    with ExitStack() as stack:
        pool, _ = open_pool(group.pool, group.number, open_device)
        for one in pool:
            stack.callback(one.device.close)
        failed = latch.known(group.ldsus, time.time())
        units = open_units(group, open_device, failed, pool)
        stack.callback(close_units, units)
        _check(group, units)
        identities: dict[int, str] = {}
        for index, ldsu in chosen.items():
            unit = units[index]
            if unit.dead is not None:
                role = f"data device of {ldsu.name}"
                unit.device = open_device(ldsu.data_device, writable=True, role=role)
                stack.callback(unit.device.close)
            _check_device(ldsu.name, unit)
            identities[index] = unit.device.stable
        _record(units, identities)
        left = {index: dead for index, dead in failed.dead.items() if index not in chosen}
        paths_taken = [ldsu.data_device for ldsu in chosen.values()]
        latch.forget(paths_taken, Failed(failed.untrusted, left, failed.generation))
    told = {"group": group.name, "role": "data device", "device": ", ".join(paths_taken)}
    return group, paths_taken, told


def _check(group: GroupConfig, units: Sequence[OpenUnit]) -> None:
    for unit in units:
        if unit.untrusted is not None:
            raise BrokenError(
                f"{group.name}: the writelog of {unit.config.name} has failed: its history cannot "
                "be gone on with",
                hint=f"qdswlinit -g {group.number} --yes initialises all of them anew",
            )
        if unit.loss.lost:
            raise DegradedError(
                f"{group.name}: the writelog of {unit.config.name} was lost with its memory",
                hint=f"qdswlinit -g {group.number} --yes; then qdsbackfresh --discard",
            )


def _check_device(name: str, unit: OpenUnit) -> None:
    device = unit.device
    size = unit.writelog.superblock.units[0].size
    if device.size != size:
        raise DeviceError(
            f"{device.role} {device.path} has {device.size} bytes; {name} has {size}",
            hint="give one of that size",
        )
    if probe_signature(device) == OWN_NAME:
        raise DeviceError(f"{device.role} {device.path} holds a writelog or journal")


def _record(units: Sequence[OpenUnit], identities: Mapping[int, str]) -> None:
    """Record what is lacking, and which devices these are.

    :param identities: of the devices that are new, by LDSU.
    """
    number, now = os.urandom(16), time.time()
    for unit in units:
        superblock, index = unit.writelog.superblock, unit.config.index
        state = BackfreshState.of(superblock)
        changes: dict[str, Any] = {"failures": _without(superblock.failures, identities)}
        if index in identities:
            bound = replace(
                superblock.units[0],
                device=unit.config.data_device,
                identity=identities[index],
            )
            changes |= {"units": (bound,), "fingerprints": None}
            state = needed(number, now, "its data device was replaced")
        elif state is not None and state.phase == RUNNING:
            # It cannot go on: of the one that was replaced, more is lacking.
            state = replace(state, phase=NEEDED, reason="a data device was replaced meanwhile")
        changes["backfresh"] = state.to_json() if state is not None else None
        unit.writelog.update(both=True, **changes)


def _without(failures: Any, gone: Collection[int]) -> dict[str, Any] | None:
    failed = Failed.from_json(failures)
    left = {index: dead for index, dead in failed.dead.items() if index not in gone}
    kept = Failed(failed.untrusted, left, failed.generation)
    return kept.to_json() if kept else None
