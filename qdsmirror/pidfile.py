"""Pid files that cannot lie: who runs holds a lock on its file, so a stale one is recognised."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from struct import Struct

from qdsmirror.errors import QdsError

_PID_BYTES_MAX = 32
#: struct flock, fcntl(2).  Locks of the open file description outlive twistd's forks and, unlike
#: flock(2)'s, can be asked for without being taken.
_FLOCK = Struct("hhqqi")


class PidFile:
    """One process's claim to be the only one of its name.

    :param path: e.g. ``Paths.pid_file("qdsdriver")``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock; a stale file is taken over.

        :raises QdsError: another process holds it, or the file cannot be made.
        """
        while self._descriptor is None:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise QdsError(
                    f"{self.path}: {error.strerror}", hint="create the directory, or run as root"
                ) from None
            try:
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
            except OSError:
                pid = _read(descriptor)
                os.close(descriptor)
                raise QdsError(
                    f"{self.path.stem} is already running (pid {pid or 'unknown'})",
                    hint=f"end that one first; what it is: ps -fp {pid}" if pid else "qdsdoctor",
                ) from None
            # Its last owner may have unlinked it between our open and our lock.
            if _same_file(descriptor, self.path):
                os.ftruncate(descriptor, 0)
                self._descriptor = descriptor
            else:
                os.close(descriptor)

    def write(self) -> None:
        """Put this process's pid into the file that :meth:`acquire` locked."""
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, b"%d\n" % os.getpid(), 0)

    def release(self) -> None:
        """Remove the file and give up the lock, in this order."""
        if self._descriptor is None:
            return
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        os.close(self._descriptor)
        self._descriptor = None


def running_pid(path: Path) -> int | None:
    """Give the pid of the process that holds the file's lock, ``None`` if there is none.

    A process between its lock and its first write counts as not running yet.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0)
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
        held = _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK
        return _read(descriptor) if held else None
    finally:
        os.close(descriptor)


def clear_stale(path: Path) -> None:
    """Remove a pid file that nobody holds."""
    stale = PidFile(path)
    if path.exists():
        try:
            stale.acquire()
        except QdsError:
            return
        stale.release()


def _read(descriptor: int) -> int | None:
    text = os.pread(descriptor, _PID_BYTES_MAX, 0).strip()
    return int(text) if text.isdigit() else None


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
