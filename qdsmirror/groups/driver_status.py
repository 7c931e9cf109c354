"""The driver's part of ``qdsinfo --json`` (man page qdsinfo(1))."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from qdsmirror.errors import DeviceFailedError
from qdsmirror.groups.bypass import ON

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit


def driver_status(group: DriverGroup, pid: int) -> dict[str, Any]:
    """Describe a group as the driver sees it."""
    config = group.config
    written = group.next_gsn - 1
    # Numbers that were lost with a writelog in memory wait no more.
    passed = max(group.committed_gsn, group.memory.lost_gsn)
    age = group.lag.age(passed, written, group.runtime.reactor.seconds())
    link = group.pmd.link
    said = {key: link[key] for key in ("state", "reason", "code")}
    failed = next((reason for unit in group.units for reason in unit.errors), "")
    driver: dict[str, Any] = {"pid": pid}
    if failed:
        driver |= {"state": "failed", "reason": failed, "code": DeviceFailedError.exit_code}
    return {
        "group": group.number,
        "name": group.name,
        "role": "primary",
        **group.answering.status(),
        "settings": group.settings.status(),
        "state": group.state.value,
        "modes": [mode.value for mode in group.modes.shown],
        "mode_details": [
            {"mode": mode.value, "since": held.since, "reason": held.reason}
            for mode, held in group.modes.details
        ],
        "changes": [
            {"number": one.number, "time": one.time, "modes": one.modes, "reason": one.reason}
            for one in group.modes.changes
        ],
        "since": group.failures.since if failed else group.modes.since,
        "reason": group.reason,
        "coherent": group.coherent,
        "generation": group.generation.hex(),
        "peer": config.secondary_host,
        "gsn": {
            "written": written,
            "durable": group.durable_gsn,
            "applied": _applied(group),
            "sent": group.pmd.sent_gsn,
            "committed": group.committed_gsn,
            "mirrored": group.pmd.mirrored_gsn,
        },
        "lag": {
            "entries": written - passed,
            "bytes": sum(u.writelog.head - u.committed_end for u in group.units),
            "seconds": round(age, 3),
        },
        "last_commit": group.last_commit,
        "refresh": group.refresh_job.status() if group.refresh_job is not None else None,
        "bypass": group.bypass.status(),
        "verify": group.verifying.status(),
        "checkpoint": group.marks.status(),
        "backfresh": group.backfresh.status(),
        "pool": group.extensions.status(),
        "driver": driver,
        "pmd": {"pid": link.get("pid"), **said},
        "rmd": {"pid": None, **said},
        "ldsus": [_unit_status(group, unit, age) for unit in group.units],
        "latency": {unit.name: unit.latency.status() for unit in group.units},
        "knobs": group.answering.delayed.status(),
        "errors": list(group.notes),
    }


def _applied(group: DriverGroup) -> int:
    """Give the last GSN up to which every frame is on its data device (synced or not)."""
    failed = any(unit.errors for unit in group.units)
    done = group.all_applied and not failed
    return group.next_gsn - 1 if done else group.checkpoints.applied_gsn


def _unit_status(group: DriverGroup, unit: DriverUnit, age: float) -> dict[str, Any]:
    writelog = unit.writelog
    chain = group.extensions.chain(unit)
    waiting = unit.framed_point.sequence - unit.committed_point.sequence
    device = group.paths.dev / unit.name
    socket = quote(str(group.paths.nbd_socket(group.number)))
    return {
        "name": unit.name,
        "nbd_uri": f"nbd+unix:///{quote(unit.name)}?socket={socket}",
        "device": str(device) if device.exists() else None,
        "data_device": unit.config.data_device,
        "mirror_device": unit.config.mirror_device,
        "size": unit.size,
        "coherent": group.coherent,
        "dirty_bytes": unit.dirty_bytes if group.bypass.phase == ON else 0,
        "writelog": {
            "devices": [unit.config.writelog_device, *(one["device"] for one in chain)],
            "extensions": chain,
            "trusted": not unit.log_failed,
            "size": writelog.ring.size,
            "used_bytes": writelog.used_bytes,
            "used_ratio": round(writelog.used_bytes / writelog.ring.size, 4),
            "entries": waiting,
            "oldest_age_seconds": round(age, 3) if waiting else 0.0,
            "seconds_to_full": _seconds_to_full(unit),
        },
        "dead": bool(unit.dead),
        "closed": unit.closed,
        "errors": unit.errors,
    }


def _seconds_to_full(unit: DriverUnit) -> float | None:
    """Give when the writelog is full at its present rate; ``None`` while it is not filling."""
    if waits_for_room(unit):
        return 0.0
    seconds = unit.fill_rate.seconds_to_full(unit.writelog.free_bytes - unit.kept_bytes)
    return round(seconds, 1) if seconds is not None else None


def waits_for_room(unit: DriverUnit) -> bool:
    """Tell whether a write waits for room in the writelog, and for nothing else."""
    return bool(unit.waiting) and not unit.appending and unit.group.may_frame
