"""What of a group's configuration may change while its daemons run (``qdsset``).

A change lasts until the daemon's next start, which reads the file again.  Values are checked as
those in the file are.  The numbers of throttles have keys of their own (livethrottles).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from configobj import ConfigObj
from configobj.validate import ValidateError, Validator

from qdsmirror import livethrottles
from qdsmirror.configmodel import GroupConfig, Tunables
from qdsmirror.configvalues import CHECKS, nearest, shown
from qdsmirror.errors import UsageError

_GROUP, _TUNABLES = "", "tunables"
_THROTTLES = "throttles"


class Setting(NamedTuple):
    """A key that may be changed.

    :ivar section: where it stands in the file; "" for no section.
    :ivar daemons: which of the group's daemons go by it.
    :ivar role: of the host on which they do; "" for whichever they run on.
    """

    section: str
    daemons: tuple[str, ...]
    role: str = ""

    def is_of(self, daemon: str, role: str) -> bool:
        """Tell whether a daemon goes by it; ``role``: of its host, "" where it has one only."""
        return daemon in self.daemons and (not role or self.role in ("", role))


#: The process for statistics and throttles, which each side has.
STATISTICS = "stats"

#: Every key that ``qdsset`` takes; one that comes to the configuration is added here.
SETTINGS: Mapping[str, Setting] = {
    "operation": Setting(_GROUP, ("driver",)),
    "on_disconnect": Setting(_GROUP, ("driver",)),
    "near_sync_entries": Setting(_GROUP, ("driver",)),
    "durability": Setting(_GROUP, ("driver",)),
    "on_overflow": Setting(_GROUP, ("driver",)),
    "metadata_entries": Setting(_TUNABLES, ("driver", "rmd")),
    "metadata_seconds": Setting(_TUNABLES, ("driver", "rmd")),
    "auto_refresh": Setting(_TUNABLES, ("driver",)),
    "verify_every": Setting(_TUNABLES, ("driver",)),
    "verify_rate": Setting(_TUNABLES, ("driver",)),
    "chunk_size": Setting(_TUNABLES, ("driver",)),
    "checkpoint_hold": Setting(_TUNABLES, ("rmd",)),
    "before_images_full": Setting(_TUNABLES, ("rmd",)),
    "compression": Setting(_TUNABLES, ("pmd",)),
    "send_window": Setting(_TUNABLES, ("pmd",)),
    "reconnect_max": Setting(_TUNABLES, ("pmd",)),
    "perf_interval": Setting(_TUNABLES, (STATISTICS,)),
    "prf_limit": Setting(_TUNABLES, (STATISTICS,)),
    "throttle_interval": Setting(_TUNABLES, (STATISTICS,), "primary"),
}
_THROTTLE = Setting(_THROTTLES, (STATISTICS,), "primary")
#: What the keys of throttles' numbers look like.
THROTTLE_KEYS = ("THROTTLE.value", "THROTTLE.limit")

#: The daemons that go by settings, by the part that a host plays.
DAEMONS = {"primary": ("driver", "pmd", STATISTICS), "secondary": ("rmd", STATISTICS)}


def setting(key: str) -> Setting | None:
    """Give the setting of a key; ``None``: there is none."""
    return _THROTTLE if livethrottles.is_key(key) else SETTINGS.get(key)


def parse_settings(words: Iterable[str]) -> dict[str, str]:
    """Take ``KEY=VALUE`` words apart, and check them.

    :raises UsageError: one has no such form, or a key or value that may not be; the nearest valid
        key is named.
    """
    settings: dict[str, str] = {}
    for word in words:
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals or not key:
            raise UsageError(f"{shown(word)} is not KEY=VALUE", hint="qdsset --help")
        if key in settings:
            raise UsageError(f"{key} is given twice", hint="give it once")
        _check(key, value)
        settings[key] = value
    return settings


def _check(key: str, value: str) -> Any:
    """Convert a value as the file's are.

    :raises UsageError: there is no such key, or it takes no such value.
    """
    if livethrottles.is_key(key):
        livethrottles.check(key, value)
        return value
    known = SETTINGS.get(key)
    spec = _spec()
    if known is None:
        if any(key in section for section in spec.values() if isinstance(section, dict)):
            raise UsageError(
                f"{key} does not change while the daemons run",
                hint="change the group's file on both systems, then qdsconfigtool apply",
            )
        raise UsageError(
            f"there is no setting {shown(key)}{nearest(key, SETTINGS)}",
            hint=f"settings: {', '.join((*SETTINGS, *THROTTLE_KEYS))}",
        )
    check = (spec[known.section] if known.section else spec)[key]
    try:
        return Validator(CHECKS).check(check, value)
    except ValidateError as error:
        raise UsageError(f"{key}: {error}", hint="see dsgrp.cfg(5)") from None


def _spec() -> ConfigObj:
    return ConfigObj(
        Path(__file__).with_name("dsgrp.ini").read_text("utf-8").splitlines(),
        interpolation=False,
        list_values=False,
        raise_errors=True,
        _inspec=True,
    )


def changed(config: GroupConfig, settings: Mapping[str, str], daemon: str) -> GroupConfig:
    """Give a group's configuration with other settings: those that a daemon goes by.

    :raises UsageError: a key or value that may not be.
    """
    own: dict[str, Any] = {}
    tunables: dict[str, Any] = {}
    throttles = config.throttles
    for key, value in settings.items():
        checked, known = _check(key, value), setting(key)
        if known is None or daemon not in known.daemons:
            continue
        if known.section == _THROTTLES:
            throttles = livethrottles.turned(throttles, key, value)
        else:
            (tunables if known.section == _TUNABLES else own)[key] = checked
    return dataclasses.replace(
        config,
        tunables=dataclasses.replace(config.tunables, **tunables),
        throttles=throttles,
        **own,
    )


def values(config: GroupConfig, daemon: str, role: str = "") -> dict[str, Any]:
    """Give the present values of the settings that a daemon goes by.

    :param role: of its host, where that makes a difference.
    """
    found = {
        key: getattr(config.tunables if one.section == _TUNABLES else config, key)
        for key, one in SETTINGS.items()
        if one.is_of(daemon, role)
    }
    if _THROTTLE.is_of(daemon, role):
        found |= livethrottles.numbers(config.throttles)
    return found


def differing(
    config: GroupConfig, started_with: GroupConfig, daemon: str, role: str = ""
) -> dict[str, Any]:
    """Give the settings that are others than those at the daemon's start."""
    before = values(started_with, daemon, role)
    return {key: now for key, now in values(config, daemon, role).items() if now != before[key]}


assert all(
    hasattr(Tunables(), key) if one.section == _TUNABLES else key in GroupConfig.__annotations__
    for key, one in SETTINGS.items()
)
