"""Drop-ins for the systemd units: which devices the daemons of this host may open.

The units let them open no device at all (``DevicePolicy=closed``) and write below /var/opt/QLIXds
only; what the group files name is added here (security.md 11).
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path

from qdsmirror.config import GroupConfig
from qdsmirror.errors import QdsError

#: The daemons that open devices, and the part that their groups' host plays.
SERVICES = {"qdsdriver": "primary", "qdsrmd": "secondary"}
_NAME = "qdsmirror-devices.conf"


def drop_ins(host: str, groups: Iterable[GroupConfig]) -> dict[str, str]:
    """Make the drop-ins.

    :param host: this host's name.
    :returns: by path below /etc/systemd/system, the text; only for services that have a group.
    """
    known = list(groups)
    found = {}
    for service, side in SERVICES.items():
        paths = _paths(host, side, known)
        if paths:
            found[f"{service}.service.d/{_NAME}"] = _text(paths)
    return found


def _paths(host: str, side: str, groups: Iterable[GroupConfig]) -> list[str]:
    return sorted(
        {
            path
            for group in groups
            if group.role_of(host) == side
            for _, owner, path in group.devices()
            if owner == host
        }
    )


def _text(paths: Iterable[str]) -> str:
    lines = [
        '# Made by "qdsconfigtool units" from the group files: when they change, again.',
        "[Service]",
    ]
    for path in paths:
        # systemd's specifiers, and its quotes.
        quoted = path.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
        if _is_file(path):
            lines.append(f'ReadWritePaths="-{quoted}"')
        else:
            lines.append(f'DeviceAllow="{quoted}" rw')
    return "\n".join(lines) + "\n"


def _is_file(path: str) -> bool:
    """Tell whether a path is a file's: what is not there will be a device."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except OSError:
        return False


def outdated(
    host: str, groups: Iterable[GroupConfig], directories: Iterable[Path]
) -> list[tuple[str, str]]:
    """Name the services that may not open, or write, all that the group files name.

    :param directories: where systemd looks for units.
    :returns: service and a device, or file, that its drop-in lacks; not where the unit is not
        installed, or leaves all devices to it.
    """
    places = list(directories)
    found = []
    for name, text in drop_ins(host, groups).items():
        service = name.partition(".")[0]
        units = [place / f"{service}.service" for place in places]
        unit = next((one for one in units if one.exists()), None)
        if unit is None or "DevicePolicy=closed" not in unit.read_text():
            continue
        given: set[str] = set()
        for place in places:
            for path in place.glob(f"{service}.service.d/*.conf"):
                given.update(path.read_text().splitlines())
        missing = [line for line in text.splitlines()[2:] if line not in given]
        if missing:
            found.append((service, missing[0].split('"')[1].removeprefix("-")))
    return found


def write(directory: Path, texts: dict[str, str]) -> list[Path]:
    """Write drop-ins below a directory.

    :raises QdsError: that is not possible.
    """
    written = []
    for name, text in texts.items():
        path = directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise QdsError(f"{path}: {error.strerror}", hint="run it as root") from None
        written.append(path)
    return written


__all__ = ["SERVICES", "drop_ins", "write"]
