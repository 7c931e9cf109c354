"""What ``qdswlscan`` does: scan the writelogs or the journal of a group while no daemon runs.

The storage room comes in with this module, so the command imports it when its arguments are good.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from qdsmirror.config import GroupConfig
from qdsmirror.core.failures import Failed
from qdsmirror.core.generations import settle
from qdsmirror.errors import BrokenError, CorruptError, DeviceFailedError, QdsError
from qdsmirror.paths import Paths
from qdsmirror.storage.bitmap import read_bitmap
from qdsmirror.storage.device import open_device
from qdsmirror.storage.extension import PoolDevice, open_pool
from qdsmirror.storage.journal import Mirror
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.recovery import (
    DataDeviceError,
    OpenUnit,
    believed,
    close_units,
    failures_of,
    judge,
    open_units,
    replay,
)
from qdsmirror.tools import cli


def scan(
    paths: Paths, group: GroupConfig, host: str, check: bool, failed: list[QdsError]
) -> dict[str, Any]:
    """Scan a group's logs.

    :param failed: takes what is known of failed devices; what can be scanned without them is.
    """
    latch = FailureLatch(paths.state_file(group.number))
    try:
        if host == group.primary_host:
            cli.refuse_beside_daemon(paths, group, "driver")
            with cli.naming(group.name):
                return _scan_primary(group, check, latch, failed)
        cli.refuse_beside_daemon(paths, group, "rmd")
        latch.check((group.journal_device, *(ldsu.mirror_device for ldsu in group.ldsus)))
        with cli.naming(group.name):
            return _scan_secondary(group)
    except DeviceFailedError as error:
        # The kernel reports the next sync as good, to a daemon too (rules.md 4).
        latch.record(error.path, error)
        raise


def _scan_primary(
    group: GroupConfig, check: bool, latch: FailureLatch, failed: list[QdsError]
) -> dict[str, Any]:
    now = time.time()
    known = latch.known(group.ldsus, now)
    pool = _open_pool(group, known, latch.failures())
    try:
        try:
            units = open_units(group, open_device, known, pool)
        except BaseException:
            failed += _failure_errors(group, known)
            raise
        try:
            failed += _failure_errors(group, failures_of(units))
            found = _describe(group, units, now)
            found["replayed"] = not check and not found["refused"]
            if found["replayed"]:
                _replay(units)
        finally:
            close_units(units)
    finally:
        _close_pool(pool)
    return found


def _describe(group: GroupConfig, units: Sequence[OpenUnit], now: float) -> dict[str, Any]:
    """Say what a start of the driver would find."""
    refused, voids = "", []
    try:
        voids = [[void.range.first, void.range.length] for void in judge(units).voids]
    except CorruptError as error:
        refused = error.message
    settled = settle(believed(units) or [unit.writelog.superblock for unit in units])
    bypass = dict(settled.bypass) if settled.bypass is not None else None
    # Of damage an operator learns whether it matters now or not.
    dirty_bytes = sum(map(_dirty_bytes, units))
    if bypass is not None:
        bypass["dirty_bytes"] = dirty_bytes
    return {
        "group": group.name,
        "role": "primary",
        "generation": settled.generations[-1].id.hex(),
        "logs": [_log(unit) for unit in units],
        "voids": voids,
        "bypass": bypass,
        "failed": _failed_devices(group, failures_of(units), now),
        "replayed": False,
        "refused": refused,
    }


def _replay(units: Sequence[OpenUnit]) -> None:
    for unit in units:
        with cli.naming(unit.config.data_device):
            try:
                replay(unit)
            except DataDeviceError as error:
                raise error.cause from error


def _open_pool(group: GroupConfig, known: Failed, latched: Mapping[str, str]) -> list[PoolDevice]:
    """Open what the driver would of a group's extension pool; warn of the rest."""
    needed = any(not log.drained for log in known.untrusted.values())
    good = [path for path in group.pool if path not in latched or needed]
    pool, problems = open_pool(good, group.number, open_device, failed=needed)
    for path in group.pool:
        if path in latched:
            print(f"warning: extension {path} has failed: {latched[path]}", file=sys.stderr)
        elif path in problems:
            print(f"warning: {problems[path].message}", file=sys.stderr)
    return pool


def _log(unit: OpenUnit) -> dict[str, Any]:
    """Give what the scan of a writelog found; of one that is not read any more nothing."""
    superblock, read = unit.writelog.superblock, not unit.is_unread
    return {
        "name": unit.config.name,
        "device": unit.config.log_device,
        "tail": superblock.tail.position if read else None,
        "applied": superblock.applied.position if read else None,
        "head": unit.reached.position if read else None,
        "frames_to_replay": len(unit.finding.ranges),
        "entries_to_replay": sum(span.length for span in unit.finding.ranges),
        "stopped": unit.finding.stopped,
        **_memory(unit),
    }


def _memory(unit: OpenUnit) -> dict[str, Any]:
    """Say of a writelog in memory what its bitmap device tells; nothing of another one."""
    if not unit.config.memory_bytes:
        return {}
    return {
        "memory_bytes": unit.config.memory_bytes,
        "lost": unit.loss.lost,
        "dirty_bytes": _dirty_bytes(unit),
    }


def _dirty_bytes(unit: OpenUnit) -> int:
    """Give what was written past a writelog; everything, where its bitmap has failed with it."""
    if unit.untrusted is not None:
        return unit.device.size
    bitmap, damage = read_bitmap(unit.writelog.device, unit.writelog.superblock)
    if damage:
        print(f"warning: {damage}", file=sys.stderr)
    return bitmap.dirty_bytes()


def _failed_devices(group: GroupConfig, failed: Failed, now: float) -> list[dict[str, Any]]:
    """Give a group's failed devices, as --json shows them."""
    return [
        {
            "ldsu": ldsu.name,
            "use": use,
            "device": device,
            # What a crash kept from being recorded is known of since now.
            "since": one.since if one.since < now else None,
            "reason": one.reason,
        }
        for ldsu in group.ldsus
        for use, device, one in (
            ("writelog", ldsu.log_device, failed.untrusted.get(ldsu.index)),
            ("data device", ldsu.data_device, failed.dead.get(ldsu.index)),
        )
        if one is not None
    ]


def _failure_errors(group: GroupConfig, failed: Failed) -> list[QdsError]:
    return [
        BrokenError(
            f"{group.name}: {one['ldsu']}: {one['reason']}",
            hint="see Failed devices in qdsmirror-architecture(7)",
        )
        for one in _failed_devices(group, failed, 0)
    ]


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
        "bypass": dict(superblock.bypass) if superblock.bypass is not None else None,
        "failed": [],
        "replayed": False,
        "refused": scan.damage,
    }
