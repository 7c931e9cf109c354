"""What two hosts that visit each other find to differ: configurations, sizes, clocks, versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdsmirror.core.findings import Finding, advice, error, warning
from qdsmirror.errors import EXIT_CONFIG

#: Clocks that differ by more make logs hard to compare, and certificates invalid too early.
SKEW_WARN_SECONDS = 2.0
SKEW_ERROR_SECONDS = 300.0
#: What says more, or is no number, is no clock.
_CLOCK_SECONDS_MAX = 1e12

#: Keys whose difference keeps the two from mirroring (``GroupConfig.identity_digest``).
IDENTITY_KEYS = ("primary.host", "secondary.host", "secondary.journal_device")
#: Keys that mean something to one of the two only; so do the tunables, which may differ.
_ONE_SIDED = ("secondary.port",)
_VALUE_CHARACTERS = 80


def compare_keys(
    name: str, number: int, peer: str, ours: Mapping[str, Any], theirs: Any, path: str
) -> list[Finding]:
    """Compare a group's file on both hosts, key by key.

    :param ours: ``GroupConfig.comparable``; ``theirs``: the peer's, not trusted.
    :param path: of our file.
    """
    if not isinstance(theirs, Mapping):
        return []
    found = []
    for key, value in ours.items():
        other = theirs.get(key)
        if key in _ONE_SIDED or key not in theirs or other == value:
            continue
        told = f"{name}.cfg: {key} is {_shown(value)} here and {_shown(other)} on {peer}"
        step = f"make it the same in {path} on both hosts, then: qdsconfigtool apply"
        if key in IDENTITY_KEYS:
            found.append(error("peer", told, step, number, EXIT_CONFIG))
        else:
            found.append(advice("peer", f"{told}; the primary's counts", step, number))
    return found


def compare_ldsus(
    name: str,
    number: int,
    peer: str,
    ours: Sequence[tuple[str, str, int | None]],
    theirs: Sequence[Mapping[str, Any]],
    path: str,
) -> list[Finding]:
    """Compare the LDSUs of a group on both hosts, and the sizes of what they map.

    :param ours: (name, mirror device, bytes of the data device or ``None``), in the file's order.
    :param theirs: what a visit has found, likewise.
    """
    step = f"make [ldsus] the same in {path} on both hosts, then: qdsconfigtool apply"
    if len(ours) != len(theirs):
        told = f"{name}.cfg has {len(ours)} LDSUs here and {len(theirs)} on {peer}"
        return [error("peer", told, step, number, EXIT_CONFIG)]
    found = []
    for index, ((ldsu, mirror, size), other) in enumerate(zip(ours, theirs, strict=True)):
        if ldsu != other["name"]:
            told = f"{name}.cfg: LDSU {index} is {ldsu} here and {_shown(other['name'])} on {peer}"
            found.append(error("peer", told, step, number, EXIT_CONFIG))
        elif mirror != other["mirror_device"]:
            told = (
                f"{name}.cfg: ldsus.{ldsu}.mirror_device is {_shown(mirror)} here and "
                f"{_shown(other['mirror_device'])} on {peer}"
            )
            found.append(error("peer", told, step, number, EXIT_CONFIG))
        elif size is not None and 0 < other["size"] < size:
            told = (
                f"{ldsu}: the mirror device {_shown(mirror)} on {peer} has {other['size']} bytes, "
                f"the data device here {size}"
            )
            step_size = f"give {ldsu} a mirror device at least as large, in {path} on both hosts"
            found.append(error("peer", told, step_size, number, EXIT_CONFIG))
    return found


def compare_clocks(
    peer: str, asked: float, answered: float, theirs: Any, number: int | None = None
) -> list[Finding]:
    """Compare the clocks: the peer looked at its own between our two looks.

    :param asked: seconds since 1970 here before; ``answered``: after.
    """
    if not isinstance(theirs, int | float) or isinstance(theirs, bool):
        return []
    if not -_CLOCK_SECONDS_MAX < theirs < _CLOCK_SECONDS_MAX:
        return []
    skew = theirs - (asked + answered) / 2
    # What the way there and back took says nothing of the clocks.
    sure = abs(skew) - abs(answered - asked) / 2
    if sure <= SKEW_WARN_SECONDS:
        return []
    which = "ahead of" if skew > 0 else "behind"
    told = f"the clock of {peer} is {abs(skew):.1f} s {which} this host's"
    step = "on both hosts: timedatectl set-ntp true; then: timedatectl status"
    if sure > SKEW_ERROR_SECONDS:
        consequence = "; certificates become valid, and expire, at other times there"
        return [error("clock", told + consequence, step, number)]
    return [warning("clock", told, step, number)]


def compare_versions(peer: str, ours: str, theirs: Any) -> list[Finding]:
    """Compare the versions that are installed."""
    if theirs == ours:
        return []
    told = f"qdsmirror {ours} is installed here and {_shown(theirs)} on {peer}"
    step = "install the same version on both hosts, the secondary first; see: qdsinfo --version"
    return [warning("peer", told, step)]


def _shown(value: Any) -> str:
    """Give a value of the peer for people: bounded, printable."""
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    text = text if len(text) <= _VALUE_CHARACTERS else text[:_VALUE_CHARACTERS] + "..."
    return f'"{text}"' if isinstance(value, str) else text
