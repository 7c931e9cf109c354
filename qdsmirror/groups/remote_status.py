"""The rmd's part of ``qdsinfo --json`` (man page qdsinfo(1))."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qdsmirror.core.states import Event, Mode

if TYPE_CHECKING:
    from qdsmirror.groups.committing import Committing
    from qdsmirror.groups.remote import RemoteGroup


def remote_status(group: RemoteGroup, pid: int) -> dict[str, Any]:
    """Describe a group as the secondary sees it."""
    committing = group.committing
    mirror = group.mirror
    superblock = mirror.journal.superblock if mirror is not None else None
    connected = group.link_state["state"] == "connected"
    coherent = superblock is not None and superblock.coherent
    bypass = superblock.bypass if superblock is not None else None
    modes = _modes(group)
    uris = group.holding.uris()
    reason = group.failed or ("" if connected else str(group.link_state["reason"]))
    return {
        "group": group.number,
        "name": group.name,
        "role": "secondary",
        "operation": group.config.operation,
        "degraded": None,
        "synchronous": None,
        "settings": group.settings.status(),
        "state": modes[0]["mode"],
        "modes": [one["mode"] for one in modes],
        "mode_details": modes,
        "since": group.since,
        "reason": reason or (superblock.reason if superblock else "") or _break_text(bypass),
        "coherent": coherent,
        "generation": superblock.generation.hex() if superblock is not None else "",
        "peer": group.config.primary_host,
        "gsn": {
            "written": None,
            "durable": None,
            "applied": None,
            "sent": None,
            "committed": committing.committed_gsn if committing is not None else None,
            "mirrored": committing.mirrored_gsn if committing is not None else None,
        },
        "lag": {
            "entries": _unmirrored(committing),
            "bytes": _unmirrored_bytes(committing),
            "seconds": _age(committing),
        },
        "last_commit": committing.last_commit if committing is not None else None,
        "refresh": None,
        "bypass": dict(bypass) if bypass is not None else None,
        "verify": None,
        "checkpoint": group.holding.status(),
        "before_images": mirror.images.status() if mirror is not None else None,
        "driver": {"pid": None},
        "pmd": {**group.link_state, "pid": None},
        "rmd": {"pid": pid, **group.link_state},
        "ldsus": [
            {
                "name": ldsu.name,
                "nbd_uri": uris.get(ldsu.name),
                "device": None,
                "data_device": ldsu.data_device,
                "mirror_device": ldsu.mirror_device,
                "size": mirror.devices[ldsu.index].size if mirror is not None else None,
                "coherent": coherent,
                "errors": [group.failed] if group.failed else [],
            }
            for ldsu in group.config.ldsus
        ],
        "journal": _journal_status(committing),
        "wire": group.wire.status(group.network_paths),
        "traffic": committing.traffic.status() if committing is not None else None,
        "errors": list(group.notes),
    }


def _modes(group: RemoteGroup) -> list[dict[str, Any]]:
    """Give the modes that hold: those of the primary as the journal has them, and the link's."""
    if group.mirror is None:
        reason = group.failed or "the rmd does not serve the group"
        return [{"mode": Mode.SETUP.value, "since": group.since, "reason": reason}]
    link, superblock = group.link_state, group.mirror.journal.superblock
    told: list[tuple[Mode, float | None, str]] = []
    if superblock.refresh is not None:
        told.append((Mode.REFRESH, None, superblock.reason or Event.REFRESH_BEGUN.value))
    elif superblock.bypass is not None:
        told.append((Mode.BYPASS, superblock.bypass["since"], superblock.bypass["reason"]))
    up = link["state"] == "connected"
    mode, event = (Mode.CONNECTED, Event.LINK_UP) if up else (Mode.ACCUMULATING, Event.LINK_DOWN)
    told.append((mode, group.since, str(link["reason"]) or event.value))
    return [{"mode": one.value, "since": since, "reason": why} for one, since, why in told]


def _break_text(bypass: Mapping[str, Any] | None) -> str:
    if bypass is None:
        return ""
    then = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(bypass["since"]))
    return f"{bypass['reason']} since {then}: the mirror is complete up to then, and usable"


def _unmirrored(committing: Committing | None) -> int:
    return committing.committed_gsn - committing.mirrored_gsn if committing is not None else 0


def _unmirrored_bytes(committing: Committing | None) -> int:
    if committing is None:
        return 0
    return committing.durable.position - committing.mirror.applied.position


def _age(committing: Committing | None) -> float:
    return round(committing.age_seconds, 3) if committing is not None else 0.0


def _journal_status(committing: Committing | None) -> dict[str, Any] | None:
    if committing is None:
        return None
    journal = committing.mirror.journal
    full = committing.seconds_to_full
    return {
        "devices": [committing.mirror.config.journal_device],
        "size": journal.ring.size,
        "used_bytes": journal.used_bytes,
        "used_ratio": round(journal.used_bytes / journal.ring.size, 4),
        "seconds_to_full": None if full is None else round(full, 1),
        "entries": _unmirrored(committing),
        "oldest_age_seconds": _age(committing),
    }
