"""Which device it really is, whatever its path, and who uses it (security.md 7)."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from qdsmirror.storage import ioctl

_PROC_LOCKS = Path("/proc/locks")
_MOUNTINFO = Path("/proc/self/mountinfo")
_SWAPS = Path("/proc/swaps")
_SYS_BLOCK = Path("/sys/dev/block")


class Identity(NamedTuple):
    """What stays the same through links, renames and other nodes of one device.

    :ivar kind: ``file`` or ``block``.
    :ivar device: st_dev of a file, st_rdev of a block device.
    :ivar inode: st_ino of a file, 0 for a block device.
    """

    kind: str
    device: int
    inode: int


def identity_of(fd: int) -> Identity:
    """Identify what a descriptor refers to.

    A loop device that holds a whole file is that file: both are the same bytes.

    :raises OSError: the descriptor is not open.
    """
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return Identity("file", status.st_dev, status.st_ino)
    backing = ioctl.loop_backing(fd)
    if backing is not None:
        return Identity("file", *backing)
    return Identity("block", status.st_rdev, 0)


def identify(path: str) -> Identity:
    """Identify a file or block device by its path.

    :raises OSError: it cannot be opened for reading.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return identity_of(fd)
    finally:
        os.close(fd)


def users_of(fd: int) -> list[str]:
    """Tell in words who holds a file or block device, without touching its locks.

    Finds locks on files, mounts, swap and devices stacked on a block device.  A process that only
    claimed a block device with O_EXCL cannot be found this way.

    :return: e.g. ``["locked by process 812 (qdsdriver)"]``; empty when nobody is found.
    """
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return _block_users(status.st_rdev)
    return _file_users(status.st_dev, status.st_ino)


def _file_users(device: int, inode: int) -> list[str]:
    wanted = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
    found = []
    for line in _lines(_PROC_LOCKS):
        # 1: FLOCK  ADVISORY  WRITE 812 fe:00:2146583 0 EOF; "->" marks one that waits.
        fields = line.split()
        if len(fields) >= 6 and fields[1] != "->" and fields[5] == wanted:
            found.append(f"locked by process {_process(fields[4])}")
    return found


def _block_users(device: int) -> list[str]:
    number = f"{os.major(device)}:{os.minor(device)}"
    found = []
    for line in _lines(_MOUNTINFO):
        fields = line.split()
        if len(fields) > 4 and fields[2] == number:
            found.append(f"mounted on {fields[4]}")
    for line in _lines(_SWAPS)[1:]:
        name = line.split()[0]
        try:
            if os.stat(name).st_rdev == device:
                found.append("used as swap")
        except OSError:
            continue
    try:
        stacked = sorted(os.listdir(_SYS_BLOCK / number / "holders"))
    except OSError:
        stacked = []
    return found + [f"held by {name}" for name in stacked]


def _process(pid: str) -> str:
    name = " ".join(_lines(Path("/proc") / pid / "comm"))
    return f"{pid} ({name})" if name else pid


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
