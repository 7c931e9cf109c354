"""The group objects of ``qdsinfo --json``: what driver, pmd and rmd say, merged, for this host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qdsmirror.config import GroupConfig, LdsuConfig
from qdsmirror.errors import (
    EXIT_BROKEN,
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_IDENTITY,
    BrokenError,
    ConfigError,
    IdentityError,
    QdsError,
    UnreachableError,
)
from qdsmirror.paths import Paths
from qdsmirror.tools.client import LAUNCHERS, ControlClient

#: For one daemon's answer.  They answer from memory, but a busy machine may not let them at once;
#: one that is taken for gone is a false alarm.
ASK_SECONDS = 5.0

Group = dict[str, Any]
#: Asks the daemon behind a control socket for its status.
Ask = Callable[[Path], dict[str, Any]]

_ERRORS: dict[int, type[QdsError]] = {
    EXIT_IDENTITY: IdentityError,
    EXIT_CONFIG: ConfigError,
    EXIT_BROKEN: BrokenError,
}
#: What daemons tell each other only.
_UNPUBLISHED = ("changes", "knobs", "latency", "traffic")
_GSN_PRIMARY = ("written", "durable", "applied", "sent", "committed", "mirrored")


def ask_status(path: Path) -> dict[str, Any]:
    """Ask one control socket.

    :raises UnreachableError: nobody answers there.
    """
    return ControlClient(path, ASK_SECONDS).call("Status")


def collect_groups(
    paths: Paths, host_name: str, configs: Iterable[GroupConfig], ask: Ask = ask_status
) -> list[Group]:
    """Give the group objects of these groups, as far as this host takes part in them.

    :raises UnreachableError: there may be daemons, but this user may not ask any of them.
    """
    if paths.run.exists() and not os.access(paths.run, os.X_OK):
        raise UnreachableError(
            f"no permission to ask the daemons in {paths.run}",
            hint="run as root or as the daemons' user",
        )
    daemons = _Daemons(paths, ask)
    groups = []
    for config in sorted(configs, key=lambda one: one.number):
        role = config.role_of(host_name)
        if role == "primary":
            groups.append(_primary(paths, config, daemons))
        elif role == "secondary":
            groups.append(_secondary(config, daemons))
    return groups


def nbd_uri(paths: Paths, config: GroupConfig, ldsu: LdsuConfig) -> str:
    """Give the NBD URI of an LDSU."""
    socket_path = quote(str(paths.nbd_socket(config.number)), safe="/")
    return f"nbd+unix:///{quote(ldsu.name, safe='')}?socket={socket_path}"


def failure_of(group: Group) -> tuple[int, str] | None:
    """Give (exit code, reason) when only an operator's act can end a group's failure.

    That is a link which one side refused, or a daemon's child that failed for good: waiting
    does not help.
    """
    for daemon in ("driver", "pmd", "rmd"):
        part = group[daemon]
        if part.get("state") in ("refused", "failed"):
            code = part.get("code")
            reason = str(part.get("reason") or group["reason"])
            return code if isinstance(code, int) and code else EXIT_FAILED, reason
    return None


def raise_failure(group: Group) -> None:
    """Raise what :func:`failure_of` finds, with that exit code.

    :raises IdentityError: likewise ConfigError, BrokenError, QdsError.
    """
    failure = failure_of(group)
    if failure is not None:
        code, reason = failure
        hint = _hint_of(group) or "qdsdoctor"
        raise _ERRORS.get(code, QdsError)(f"{group['name']}: {reason}", hint)


def _hint_of(group: Group) -> str:
    """Give the next step that a refused link has; "" where none is known."""
    parts = (group[daemon] for daemon in ("driver", "pmd", "rmd"))
    return next((str(one["hint"]) for one in parts if one.get("hint")), "")


class _Daemons:
    """What the daemons answer; each master is asked at most once."""

    def __init__(self, paths: Paths, ask: Ask) -> None:
        self._paths = paths
        self._ask = ask
        self._masters: dict[str, dict[str, Any] | None] = {}

    def group(self, config: GroupConfig, role: str) -> dict[str, Any] | None:
        """Ask a group's child; ``None`` when it does not answer."""
        return self._status(f"{config.name}.{role}")

    def trouble(self, config: GroupConfig, role: str) -> dict[str, Any]:
        """Say why a group's child does not answer: {state, reason, code}, perhaps a hint."""
        if role not in self._masters:
            self._masters[role] = self._status(f"qds{role}")
        master = self._masters[role]
        if master is None:
            launch = " ".join([LAUNCHERS[role], *self._paths.arguments()])
            reason = f"{role} not running"
            return {"state": "stopped", "reason": reason, "code": None, "hint": launch}
        for entry in master.get("groups", []):
            if isinstance(entry, dict) and entry.get("group") == config.number:
                if entry.get("state") == "failed":
                    reason = entry.get("reason") or f"{role} failed"
                    return {"state": "failed", "reason": reason, "code": entry.get("code")}
                if entry.get("reason"):
                    return {"state": "stopped", "reason": entry["reason"], "code": None}
        return {"state": "stopped", "reason": f"{role} is being relaunched", "code": None}

    def _status(self, name: str) -> dict[str, Any] | None:
        try:
            return self._ask(self._paths.control_socket(name))
        except QdsError:
            return None


def _skeleton(config: GroupConfig, role: str, peer: str) -> Group:
    """Give a group object as it is while nothing is known but the configuration."""
    return {
        "group": config.number,
        "name": config.name,
        "role": role,
        "operation": config.operation,
        "degraded": None,
        "synchronous": None,
        "settings": {},
        "state": "setup",
        "modes": ["setup"],
        "mode_details": [{"mode": "setup", "since": None, "reason": ""}],
        "since": None,
        "reason": "",
        "coherent": None,
        "generation": None,
        "peer": peer,
        "gsn": dict.fromkeys(_GSN_PRIMARY),
        "lag": {"entries": None, "bytes": None, "seconds": None},
        "last_commit": None,
        "refresh": None,
        "bypass": None,
        "backfresh": None,
        "verify": None,
        "checkpoint": None,
        "wire": None,
        "throttled": None,
        "before_images": None,
        "pool": None,
        "driver": {"pid": None},
        "pmd": {"pid": None, "state": "stopped"},
        "rmd": {"pid": None, "state": "stopped"},
        "ldsus": [],
    }


def _merge(base: Any, news: Any) -> Any:
    """Lay what a daemon says over what was known; ``None`` says nothing new."""
    if isinstance(base, dict) and isinstance(news, dict):
        merged = dict(base)
        for key, value in news.items():
            merged[key] = _merge(base.get(key), value)
        return merged
    return base if news is None else news


def _overlay(group: Group, status: dict[str, Any], ldsus: list[dict[str, Any]]) -> Group:
    """Lay a daemon's status over the skeleton; LDSUs are matched by name."""
    told = {one.get("name"): one for one in status.get("ldsus") or []}
    own = {k: v for k, v in status.items() if k != "ldsus" and k not in _UNPUBLISHED}
    merged: Group = _merge(group, own)
    merged["ldsus"] = [_merge(one, told.get(one["name"])) for one in ldsus]
    return merged


def _primary(paths: Paths, config: GroupConfig, daemons: _Daemons) -> Group:
    group = _skeleton(config, "primary", config.secondary_host)
    group["pool"] = {"devices": [_pool_device(path) for path in config.pool]}
    group["pool"] |= {"free": None, "used": None}
    ldsus = [_primary_ldsu(paths, config, one) for one in config.ldsus]
    driver = daemons.group(config, "driver")
    pmd = daemons.group(config, "pmd")
    if driver is None:
        if pmd is not None:
            group = _overlay(group, {"pmd": pmd.get("pmd"), "gsn": pmd.get("gsn")}, ldsus)
        group["ldsus"] = ldsus
        trouble = daemons.trouble(config, "driver")
        _be_set_up(group, trouble["reason"])
        if trouble.get("hint"):
            group["driver"]["hint"] = trouble["hint"]
        if trouble["state"] == "failed":
            group["driver"] |= {"state": "failed", "code": trouble["code"]}
            group["driver"]["reason"] = trouble["reason"]
    else:
        group = _overlay(group, driver, ldsus)
    _link(group, config, pmd, daemons)
    group["settings"] = _settings(driver, pmd, daemons.group(config, "stats"))
    group["throttled"] = _throttled(driver, pmd)
    return group


def _settings(*said: dict[str, Any] | None) -> dict[str, Any]:
    """Give what was set at a group's daemons and differs from its file."""
    found: dict[str, Any] = {}
    for one in said:
        found |= (one or {}).get("settings") or {}
    return found


def _throttled(driver: dict[str, Any] | None, pmd: dict[str, Any] | None) -> dict[str, Any] | None:
    """Give what throttles hold the group back by; ``None`` while they do not."""
    knobs = {"sleep_us": None, "writesleep_us": None, "limit_kbps": None}
    for said in (driver, pmd):
        knobs |= (said or {}).get("knobs") or {}
    return knobs if any(knobs.values()) else None


def _be_set_up(group: Group, reason: str) -> None:
    """Say why the group's daemon does not answer, which leaves it in setup."""
    group["reason"] = group["mode_details"][0]["reason"] = reason


def _link(group: Group, config: GroupConfig, pmd: dict[str, Any] | None, daemons: _Daemons) -> None:
    """Set the pmd's part: its own word counts before the driver's."""
    if pmd is not None and isinstance(pmd.get("pmd"), dict):
        group["pmd"] = _merge(group["pmd"], pmd["pmd"])
        group["wire"] = pmd.get("wire")
        return
    group["pmd"] = {"pid": None, **daemons.trouble(config, "pmd")}
    if group["rmd"]["state"] == "connected":
        group["rmd"]["state"] = "stopped"


def _pool_device(path: str) -> dict[str, Any]:
    return {"device": path, "state": None, "ldsu": None, "reason": ""}


def _primary_ldsu(paths: Paths, config: GroupConfig, ldsu: LdsuConfig) -> dict[str, Any]:
    device = paths.dev / ldsu.name
    return {
        "name": ldsu.name,
        "nbd_uri": nbd_uri(paths, config, ldsu),
        "device": str(device) if device.exists() else None,
        "data_device": ldsu.data_device,
        "mirror_device": ldsu.mirror_device,
        "size": None,
        "coherent": None,
        "dirty_bytes": None,
        "writelog": {
            "devices": [ldsu.writelog_device],
            "extensions": [],
            "size": None,
            "used_bytes": None,
            "used_ratio": None,
            "entries": None,
            "oldest_age_seconds": None,
            "seconds_to_full": None,
        },
        "errors": [],
    }


def _secondary(config: GroupConfig, daemons: _Daemons) -> Group:
    group = _skeleton(config, "secondary", config.primary_host)
    group["journal"] = {
        "devices": [config.journal_device],
        "size": None,
        "used_bytes": None,
        "used_ratio": None,
        "seconds_to_full": None,
        "entries": None,
        "oldest_age_seconds": None,
    }
    ldsus: list[dict[str, Any]] = [
        {
            "name": one.name,
            "nbd_uri": None,
            "device": None,
            "data_device": one.data_device,
            "mirror_device": one.mirror_device,
            "size": None,
            "coherent": None,
            "errors": [],
        }
        for one in config.ldsus
    ]
    rmd = daemons.group(config, "rmd")
    if rmd is not None:
        group = _overlay(group, rmd, ldsus)
        group["settings"] = _settings(rmd, daemons.group(config, "stats"))
        return group
    group["ldsus"] = ldsus
    trouble = daemons.trouble(config, "rmd")
    _be_set_up(group, trouble["reason"])
    group["rmd"] = {"pid": None, **trouble}
    return group
