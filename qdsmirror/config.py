"""The configuration of a host (``qds.cfg``) and of its groups (``dsgrpNNN.cfg``), checked.

Man pages qds.cfg(5) and dsgrp.cfg(5) describe the keys.  A group's file is the same on both
systems (patent: "logical group configuration files, including primary and secondary computer
systems"); which part a host plays follows from its name.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qdsmirror.configmodel import POOL_KEY, GroupConfig, HostConfig, LdsuConfig, Role, Tunables
from qdsmirror.configsource import Problem, ProblemsError, Source, parse, read_text
from qdsmirror.configthrottles import read_throttles
from qdsmirror.configvalues import Listen, parse_seconds, parse_size, shown
from qdsmirror.core.throttles import Throttle
from qdsmirror.errors import ConfigError
from qdsmirror.limits import (
    GROUPS_MAX,
    LDSU_NAME_CHARS_MAX,
    LDSUS_PER_GROUP_MAX,
    SECRET_BYTES,
    TOKEN_CHARS_MAX,
    TOKEN_CHARS_MIN,
)
from qdsmirror.paths import Paths, group_name

__all__ = [
    "POOL_KEY",
    "GroupConfig",
    "HostConfig",
    "LdsuConfig",
    "Problem",
    "ProblemsError",
    "Role",
    "Tunables",
    "load_group",
    "load_groups",
    "load_host",
    "load_secret",
    "load_token",
    "parse_seconds",
    "parse_size",
    "read_group",
    "read_host",
    "scan_groups",
]

_LDSU_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{LDSU_NAME_CHARS_MAX - 1}}}")
_GROUP_FILE = re.compile(r"dsgrp([0-9]{3})\.cfg", re.ASCII)
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/-]{%d,%d}=*" % (TOKEN_CHARS_MIN, TOKEN_CHARS_MAX))
_SECRET_FILE_BYTES_MAX = 2 * TOKEN_CHARS_MAX
_SECRET = re.compile(rb"[0-9a-fA-F]{%d}" % (2 * SECRET_BYTES))


# -- loading ---------------------------------------------------------------------------------------


def load_host(paths: Paths) -> HostConfig:
    """Load ``qds.cfg``.

    :raises ConfigError: it is missing, unreadable or wrong; names file, line and key.
    """
    host, problems = read_host(paths.host_config)
    if host is None:
        raise ProblemsError(problems, _check_command(paths))
    return host


def load_group(paths: Paths, number: int) -> GroupConfig:
    """Load ``dsgrpNNN.cfg`` by itself; :func:`load_groups` also compares it with the others.

    :raises ConfigError: it is missing, unreadable or wrong; names file, line and key.
    """
    group, problems = read_group(paths.group_config(number))
    if group is None:
        raise ProblemsError(problems, _check_command(paths))
    return group


def load_groups(paths: Paths) -> list[GroupConfig]:
    """Load every group file, in number order; none at all is an empty list.

    :raises ConfigError: one of them is wrong, or two of them clash.
    """
    groups, problems = scan_groups(paths)
    if problems:
        raise ProblemsError(problems, _check_command(paths))
    return groups


def scan_groups(paths: Paths) -> tuple[list[GroupConfig], list[Problem]]:
    """Load the group files that are good, and name what is wrong in the others.

    Of two groups that clash (an LDSU's name, a device of one host) the lower number stands.

    :raises ConfigError: the directory cannot be read.
    """
    try:
        names = sorted(name for name in os.listdir(paths.etc) if name.endswith(".cfg"))
    except OSError as error:
        raise ConfigError(
            f"{paths.etc}: {error.strerror}", "create it with qds.cfg and the group files in it"
        ) from error
    groups: list[GroupConfig] = []
    problems: list[Problem] = []
    names_seen: dict[str, str] = {}
    devices_seen: dict[tuple[str, str], str] = {}
    for name in names:
        if not name.startswith("dsgrp"):
            continue
        group, wrong = read_group(paths.etc / name)
        if group is not None:
            wrong = _clashes(group, names_seen, devices_seen)
            if not wrong:
                groups.append(group)
                names_seen.update((ldsu.name, group.name) for ldsu in group.ldsus)
                devices_seen.update(((h, p), group.name) for _key, h, p in group.devices())
        problems += wrong
    return groups, problems


def load_secret(paths: Paths, number: int, owners: Collection[int] = ()) -> bytes:
    """Load a group's 256-bit secret: 64 hexadecimal digits in a file of mode 0600.

    The mode is checked on the opened descriptor; what the file holds never reaches a message.

    :param owners: user ids that may own the file besides root and this process's own.
    :raises ConfigError: it is missing, open to others, or not 64 hexadecimal digits.
    """
    path = paths.group_secret(number)
    content = _read_secret(path, owners, _MAKE_SECRET)
    if not _SECRET.fullmatch(content):
        raise ConfigError(
            f"{path}: not a secret of {2 * SECRET_BYTES} hexadecimal digits", _MAKE_SECRET
        )
    return bytes.fromhex(content.decode("ascii"))


def load_token(path: Path, owners: Collection[int] = ()) -> bytes:
    """Load the token that whoever reads the metrics shows: a file of mode 0600.

    :param owners: as of :func:`load_secret`.
    :raises ConfigError: it is missing, open to others, or no token (RFC 6750) that is long enough.
    """
    content = _read_secret(path, owners, _MAKE_TOKEN)
    if not _TOKEN.fullmatch(content):
        raise ConfigError(
            f"{path}: not a token of {TOKEN_CHARS_MIN} to {TOKEN_CHARS_MAX} letters, digits, "
            "-._~+/ in one line",
            _MAKE_TOKEN,
        )
    return content


def _read_secret(path: Path, owners: Collection[int], make: str) -> bytes:
    """Read a file that nobody else may read; its mode is checked on the opened descriptor.

    :param make: the hint where it is not there.
    """
    hint = f"chmod 600 {path}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path}: not a regular file", make)
            if stat.S_IMODE(status.st_mode) & 0o077:
                mode = stat.S_IMODE(status.st_mode)
                raise ConfigError(f"{path}: mode {mode:04o} lets others read the secret", hint)
            if status.st_uid not in (0, os.geteuid(), *owners):
                raise ConfigError(f"{path}: belongs to another user", f"chown it; {hint}")
            return file.read(_SECRET_FILE_BYTES_MAX).strip()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", make) from error


_MAKE_TOKEN = "make one with qdsconfigtool pki, or with: (umask 077; openssl rand -hex 32 > FILE)"
_MAKE_SECRET = "make one with qdsconfigtool pki and copy it to both hosts"


def _check_command(paths: Paths) -> str:
    return " ".join(["qdsconfigtool check", *paths.arguments()])


# -- reading one file ------------------------------------------------------------------------------


def read_host(path: Path) -> tuple[HostConfig | None, list[Problem]]:
    """Read a host's file; either the configuration or what is wrong with it."""
    source = _source(path, "qds.ini")
    if source.problems:
        return None, source.problems
    values = source.values
    return HostConfig(
        name=values["name"],
        certificate=Path(values["certificate"] or path.absolute().parent / "host.pem"),
        key=Path(values["key"] or path.absolute().parent / "host.key"),
        ca=Path(values["ca"] or path.absolute().parent / "ca.pem"),
        user=values["user"],
        children=values["children"],
        mail_relay=values["mail_relay"],
        allow_exec=values["allow_exec"],
        # ConfigObj gives plain tuples.
        console=Listen(*values["console"]),
        metrics_token_file=Path(
            values["metrics_token_file"] or path.absolute().parent / "metrics.token"
        ),
    ), []


def read_group(path: Path) -> tuple[GroupConfig | None, list[Problem]]:
    """Read a group's file, its number from its name; either the group or what is wrong."""
    match = _GROUP_FILE.fullmatch(path.name)
    if match is None or int(match[1]) >= GROUPS_MAX:
        first, last = group_name(0), group_name(GROUPS_MAX - 1)
        message = f"a group's file is named {first}.cfg to {last}.cfg"
        return None, [Problem(path, 0, "", message)]
    source = _source(path, "dsgrp.ini")
    if source.problems:
        return None, source.problems
    group = _group(int(match[1]), path, source.values, read_throttles(source))
    _judge(group, source)
    return (None, source.problems) if source.problems else (group, [])


def _source(path: Path, spec: str) -> Source:
    try:
        return parse(path, read_text(path), spec)
    except ProblemsError as error:
        return Source(path, problems=list(error.problems))
    except ConfigError as error:
        message = error.message.removeprefix(f"{path}: ")
        return Source(path, problems=[Problem(path, 0, "", message, hint=error.hint)])


def _group(
    number: int, path: Path, values: dict[str, Any], throttles: tuple[Throttle, ...]
) -> GroupConfig:
    primary, secondary = values["primary"], values["secondary"]
    return GroupConfig(
        number=number,
        name=group_name(number),
        path=path,
        operation=values["operation"],
        durability=values["durability"],
        on_overflow=values["on_overflow"],
        primary_host=primary["host"],
        primary_address=primary["address"] or primary["host"],
        secondary_host=secondary["host"],
        secondary_address=secondary["address"] or secondary["host"],
        port=secondary["port"],
        journal_device=secondary["journal_device"],
        tunables=Tunables(**values["tunables"]),
        ldsus=tuple(
            LdsuConfig(index, name, **devices)
            for index, (name, devices) in enumerate(values["ldsus"].items())
        ),
        pool=values["pool"]["devices"] or (),
        on_disconnect=values["on_disconnect"],
        near_sync_entries=values["near_sync_entries"],
        paths=secondary["paths"] or (),
        throttles=throttles,
    )


def _judge(group: GroupConfig, source: Source) -> None:
    """Complain about what no single key can show."""
    if group.primary_host == group.secondary_host:
        source.complain(
            ("secondary", "host"), f"{shown(group.secondary_host)} is the primary's name too"
        )
        return
    if not group.ldsus:
        source.complain(("ldsus",), "no LDSU: give at least one [[name]] section")
    if len(group.ldsus) > LDSUS_PER_GROUP_MAX:
        source.complain(("ldsus",), f"more than {LDSUS_PER_GROUP_MAX} LDSUs")
    for ldsu in group.ldsus:
        if not _LDSU_NAME.fullmatch(ldsu.name):
            source.complain(
                ("ldsus", ldsu.name),
                f"an LDSU's name has at most {LDSU_NAME_CHARS_MAX} letters, digits, -_. "
                "and begins with a letter or digit",
            )
    _judge_memory(group, source)
    seen: dict[tuple[str, str], tuple[str, ...]] = {}
    for key, host, path in group.devices():
        other = seen.get((host, path))
        # Writelogs may share a device: each has a part of it.
        if other is None or other[-1] == key[-1] in ("writelog_device", "bitmap_device"):
            seen.setdefault((host, path), key)
        else:
            source.complain(key, f"{path} is {'.'.join(other)} of the same host already")


def _judge_memory(group: GroupConfig, source: Source) -> None:
    """Complain about writelogs in memory that lack what they need."""
    for ldsu in group.ldsus:
        place = ("ldsus", ldsu.name)
        if ldsu.memory_bytes and not ldsu.bitmap_device:
            source.complain(
                (*place, "writelog_device"),
                f"{ldsu.writelog_device} needs a bitmap_device: a small device or file that says "
                "after a crash what must be sent again",
            )
        elif ldsu.bitmap_device and not ldsu.memory_bytes:
            source.complain(
                (*place, "bitmap_device"),
                "only a writelog in memory has one (writelog_device = memory:SIZE); that of a "
                "device stands on it",
            )
        elif group.in_memory and not ldsu.memory_bytes:
            source.complain(
                (*place, "writelog_device"),
                "other LDSUs of this group have their writelogs in memory; have all of a group's "
                "there, or none",
            )


def _clashes(
    group: GroupConfig, names: dict[str, str], devices: dict[tuple[str, str], str]
) -> list[Problem]:
    source = Source(group.path)
    source.lines = parse(group.path, read_text(group.path), "dsgrp.ini").lines
    for ldsu in group.ldsus:
        if ldsu.name in names:
            source.complain(
                ("ldsus", ldsu.name),
                f"{names[ldsu.name]} has an LDSU of this name; names are unique on a host",
            )
    for key, host, path in group.devices():
        if (host, path) in devices:
            source.complain(key, f"{devices[host, path]} uses {path} of {host} already")
    return source.problems
