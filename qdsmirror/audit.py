"""The audit log: who asked for what change, when, and what came of it (security.md 12).

One JSON object a line.  Each record is written by one appending write to the file as it is found at
that moment, so several processes share it, and it is rotated by renaming alone.  Daemons write a
record when a command arrives and one when it is answered (daemons.auditing); commands that work
without a daemon write theirs themselves.
"""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qdsmirror.limits import AUDIT_TEXT_CHARACTERS_MAX
from qdsmirror.paths import Paths

MODE = 0o640
#: What the kernel says of a process that nobody logged in to start.
_NOBODY = 2**32 - 1


def now() -> str:
    """Give the time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def process(pid: int, uid: int) -> dict[str, Any]:
    """Describe a process that asks, while it lives.

    :param uid: as the kernel told it of the socket; the process itself is not asked.
    :returns: ``uid``, ``pid``, and where known ``program`` and ``login_uid``, who logged in
        before he became ``uid``.
    """
    found: dict[str, Any] = {"uid": uid, "pid": pid}
    with suppress(OSError):
        found["program"] = Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    with suppress(OSError, ValueError):
        login = int(Path(f"/proc/{pid}/loginuid").read_text())
        if login != _NOBODY:
            found["login_uid"] = login
    return found


def encode(record: Mapping[str, Any]) -> bytes:
    """Make the line of a record; users get their names, and long texts are cut.

    It may ask for users' names, and so wait.
    """
    told = {key: _bounded(value) for key, value in record.items()}
    for key, name in (("uid", "user"), ("login_uid", "login")):
        if isinstance(told.get(key), int):
            with suppress(KeyError):
                told[name] = pwd.getpwuid(told[key]).pw_name
    return json.dumps(told).encode("ascii") + b"\n"


def _bounded(value: Any) -> Any:
    if isinstance(value, str):
        return value[:AUDIT_TEXT_CHARACTERS_MAX]
    if isinstance(value, Mapping):
        return {str(key): _bounded(one) for key, one in value.items()}
    return value


def append(path: Path, data: bytes) -> None:
    """Write a line, durably.

    :raises OSError: that is not possible.
    """
    descriptor = os.open(
        path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, MODE
    )
    try:
        if os.geteuid() == 0:
            # The daemons, which may be another user's, write here too.
            owner, found = path.parent.stat(), os.fstat(descriptor)
            if (owner.st_uid, owner.st_gid) != (found.st_uid, found.st_gid):
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
        os.write(descriptor, data)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def append_own(
    paths: Paths, command: str, arguments: Mapping[str, Any], code: int, message: str = ""
) -> None:
    """Write what this process, a command of a user's, has done or was refused.

    :param code: the exit code, errors.py.
    :raises OSError: as for :func:`append`.
    """
    record = {
        "time": now(),
        "event": "done" if code == 0 else "refused",
        **process(os.getpid(), os.getuid()),
        "program": command,
        "command": command,
        "arguments": dict(arguments),
        "code": code,
        "message": message,
    }
    paths.var.mkdir(mode=0o755, parents=True, exist_ok=True)
    append(paths.audit_log, encode(record))
