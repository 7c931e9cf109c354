"""``qdsdoctor --bundle FILE``: an archive for whoever is asked for help, without secrets.

Only what is listed here goes in, and all of it through ``core.redaction``: keys, group secrets and
token files are read to know what must not be in it, and never put there.
"""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from qdsmirror import __version__
from qdsmirror.config import HostConfig
from qdsmirror.core.redaction import parts_of, redact
from qdsmirror.errors import QdsError
from qdsmirror.limits import BUNDLE_LOG_BYTES, BUNDLE_TEXT_BYTES
from qdsmirror.paths import Paths

#: Of the directories of configuration and state, and how much of the end of each file.
_ETC = ("qds.cfg", "dsgrp[0-9][0-9][0-9].cfg")
_VAR = ("dsgrp[0-9][0-9][0-9].state", "*.prf", "*.prf.1", "*.evt", "*.evt.1")
_LOGS = ("*.log", "*.log.1")
_SECRETS = ("*.key", "*.secret", "*token*")
#: What the kernel says that bears on storage, time and network; nothing of other programs.
_PROC = ("mounts", "partitions", "mdstat", "swaps", "uptime", "meminfo", "loadavg", "net/dev")
_UNITS = ("qdsdriver", "qdspmd", "qdsrmd", "qdsconsole")
_COMMANDS = {
    "lsblk.txt": ["lsblk", "-o", "NAME,MAJ:MIN,TYPE,SIZE,RO,FSTYPE,MOUNTPOINT,PHY-SEC,LOG-SEC"],
    "df.txt": ["df", "-hT"],
    "addresses.txt": ["ip", "-brief", "address"],
    "listening.txt": ["ss", "-ltn"],
    "timedatectl.txt": ["timedatectl", "status"],
    "units.txt": ["systemctl", "status", "--no-pager", *_UNITS],
    "journal.txt": ["journalctl", "--no-pager", "-n", "5000", *(f"-u{unit}" for unit in _UNITS)],
}
_COMMAND_SECONDS = 10.0
_SECRET_BYTES_MAX = 64 * 1024


def refuse_existing(target: Path) -> None:
    """Make sure that nothing is where the archive is to be.

    :raises QdsError: something is.
    """
    if os.path.lexists(target):
        raise QdsError(f"{target} exists already", f"give another name, or: rm {target}")


def write_bundle(
    target: Path, paths: Paths, host: HostConfig | None, told: dict[str, dict[str, Any]]
) -> list[str]:
    """Write the archive, for its owner alone, whole or not at all.

    :param target: where; nothing may be there yet.
    :param told: JSON objects by the name of their file, e.g. what qdsdoctor itself has found.
    :returns: the names of its members.
    :raises QdsError: it cannot be written.
    """
    refuse_existing(target)
    known = known_secrets(paths, host)
    top = f"qdsdoctor-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    temporary = target.with_name(f".{target.name}.new")
    names = []
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        temporary.unlink(missing_ok=True)
        with (
            open(os.open(temporary, flags, 0o600), "wb") as file,
            tarfile.open(fileobj=file, mode="w:gz") as archive,
        ):
            for name, content, most in _members(paths, told):
                clean = _end(redact(content, known), most)
                member = tarfile.TarInfo(f"{top}/{name}")
                member.size, member.mtime, member.mode = len(clean), int(time.time()), 0o600
                archive.addfile(member, io.BytesIO(clean))
                names.append(name)
        os.link(temporary, target)
    except OSError as problem:
        raise QdsError(
            f"{target}: {problem.strerror or problem}",
            f"give a directory with room: df -h {target}",
        ) from problem
    finally:
        temporary.unlink(missing_ok=True)
    return names


def known_secrets(paths: Paths, host: HostConfig | None) -> list[bytes]:
    """Give what every secret file of this host may be found by."""
    files = {path for pattern in _SECRETS for path in paths.etc.glob(pattern)}
    if host is not None:
        files |= {host.key, host.metrics_token_file}
    found: list[bytes] = []
    for path in sorted(files):
        # What we may not read we cannot have put into the archive either.
        with suppress(OSError), open(path, "rb") as file:
            found += parts_of(file.read(_SECRET_BYTES_MAX))
    return found


def _members(
    paths: Paths, told: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, bytes, int | None]]:
    """Give the name, the content as it is, and how much of its end is wanted."""
    yield "about.json", _json(_about(paths)), None
    for name, value in told.items():
        yield f"{name}.json", _json(value), None
    for directory, patterns, most in (
        (paths.etc, _ETC, BUNDLE_TEXT_BYTES),
        (paths.var, _VAR, BUNDLE_TEXT_BYTES),
        (paths.var, _LOGS, BUNDLE_LOG_BYTES),
    ):
        for path in sorted({one for pattern in patterns for one in directory.glob(pattern)}):
            if path.is_file() and not path.is_symlink():
                yield f"{directory.name}/{path.name}", _read(path, most), most
    yield "files.txt", _listing((paths.etc, paths.var, paths.run)), None
    for name in _PROC:
        content = _read(Path("/proc") / name, BUNDLE_TEXT_BYTES)
        yield f"proc/{name.replace('/', '-')}", content, BUNDLE_TEXT_BYTES
    for name, command in _COMMANDS.items():
        yield f"host/{name}", _output(command), BUNDLE_LOG_BYTES


def _about(paths: Paths) -> dict[str, Any]:
    return {
        "qdsmirror": __version__,
        "python": sys.version,
        "system": platform.platform(),
        "time": time.time(),
        "root": str(paths.root) if paths.root is not None else None,
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _read(path: Path, most: int) -> bytes:
    """Read the end of a file; why not, where it cannot be read.

    A secret that stands across the place where it will be cut has to be seen whole: what precedes
    that place is read too.
    """
    most += _SECRET_BYTES_MAX
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                file.seek(size - most)
                file.readline()
            return file.read(most)
    except OSError as problem:
        return f"[cannot be read: {problem.strerror}]\n".encode()


def _end(text: bytes, most: int | None) -> bytes:
    """Cut a text to whole lines of its end, at most so many bytes."""
    if most is None or len(text) <= most:
        return text
    # The first byte too many tells whether a line begins after it.
    return text[-most - 1 :].partition(b"\n")[2]


def _listing(directories: tuple[Path, ...]) -> bytes:
    """List names, modes, owners and sizes; no contents."""
    lines = []
    for directory in directories:
        for path in sorted([directory, *directory.glob("*")]):
            try:
                status = path.lstat()
            except OSError:
                continue
            owner = f"{status.st_uid}:{status.st_gid}"
            lines.append(f"{status.st_mode:06o} {owner:>11} {status.st_size:>12} {path}\n")
    return "".join(lines).encode(errors="replace")


def _output(command: list[str]) -> bytes:
    """Run a program that only looks; what it says, or why it could not."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMMAND_SECONDS,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        return f"[{' '.join(command)}: {problem}]\n".encode()
    return done.stdout + done.stderr
