"""Keeps a child going while the kernel is short of memory (rules.md 20).

Where a kernel on the same host is the client, its dirty pages wait for the driver while the driver
waits for memory.  Driver and pmd therefore tell the kernel that they are on the way to the disk
(PR_SET_IO_FLUSHER), keep their pages (mlockall) and are the last that the OOM killer takes.  Each
is done where permission allows, always: who attaches a kernel later need not restart them.
"""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

_PR_SET_IO_FLUSHER = 57
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAP_IPC_LOCK = 14
_OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")
_STATUS = Path("/proc/self/status")
_OOM_SCORE_WANTED = -1000


class Protection(NamedTuple):
    """What the kernel granted this process.

    :ivar refused: why not all of it, a line each.
    """

    io_flusher: bool
    locked: bool
    oom_score_adj: int | None
    refused: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Give the ``memory`` object of a child in the master's Status."""
        return {**self._asdict(), "refused": list(self.refused)}


def protect() -> Protection:
    """Ask for all of it, before the first thread is started: threads inherit it."""
    library = ctypes.CDLL(None, use_errno=True)
    refused: list[str] = []
    score = _lower_oom_score(refused)
    flusher = _call("PR_SET_IO_FLUSHER", refused, library.prctl, _PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    return Protection(flusher, _lock(library, refused), score, tuple(refused))


def unprotect() -> None:
    """Give up what a unit for systemd grants for the sake of the others.

    To be called by a process that runs programs (throttles' ``exec``): they would inherit the
    OOM score and the ambient capabilities (capabilities(7)), and be spared in place of others.
    """
    with suppress(OSError):
        if int(_OOM_SCORE_ADJ.read_text()) < 0:
            _OOM_SCORE_ADJ.write_text("0")
    # Refused only by a kernel that has none.
    ctypes.CDLL(None).prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)


def _lock(library: ctypes.CDLL, refused: list[str]) -> bool:
    """Lock what is touched, from now on too.

    With ONFAULT: locking a thread's whole stack or a reserve of malloc's would cost memory that is
    never used.  Under a limit nothing is locked: it counts what is mapped, and once it is reached
    no thread could be started and nothing allocated.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and not _has_capability(_CAP_IPC_LOCK):
        refused.append(f"mlockall: RLIMIT_MEMLOCK is {limit} bytes, not unlimited")
        return False
    flags = _MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT
    return _call("mlockall", refused, library.mlockall, flags)


def _call(name: str, refused: list[str], function: Any, *arguments: int) -> bool:
    if function(*arguments) == 0:
        return True
    refused.append(f"{name}: {os.strerror(ctypes.get_errno())}")
    return False


def _lower_oom_score(refused: list[str]) -> int | None:
    """Set the least score; give the one that holds then."""
    try:
        held = int(_OOM_SCORE_ADJ.read_text())
        if held != _OOM_SCORE_WANTED:
            with _OOM_SCORE_ADJ.open("wb", buffering=0) as file:
                file.write(b"%d" % _OOM_SCORE_WANTED)
            held = int(_OOM_SCORE_ADJ.read_text())
    except OSError as error:
        refused.append(f"oom_score_adj {_OOM_SCORE_WANTED}: {error.strerror}")
        try:
            held = int(_OOM_SCORE_ADJ.read_text())
        except OSError:
            return None
    return held


def _has_capability(number: int) -> bool:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return False
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> number & 1)
