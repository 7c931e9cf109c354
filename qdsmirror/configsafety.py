"""Whether a file that can have programs run is in safe hands (security.md 9)."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def why_unsafe(path: Path) -> str:
    """Say why nobody should run what a configuration file says; empty if it is safe.

    It is, if it belongs to root or to this process's user, and nobody else can write it.
    """
    try:
        # Of the opened file, whatever its name means meanwhile.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"{path}: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is not a regular file"
    if status.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {status.st_uid}, neither root nor the daemons' user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        return f"{path} can be written by others (mode {mode:04o})"
    return ""
