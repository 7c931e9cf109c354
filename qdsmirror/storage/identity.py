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
_BY_ID = Path("/dev/disk/by-id")

#: What sysfs has of a block device that no other has, the surest first, and what we call it.
_ATTRIBUTES = (
    ("dm/uuid", "dm"),
    ("md/uuid", "md"),
    ("wwid", "wwid"),
    ("device/wwid", "wwid"),
    ("serial", "serial"),
    ("device/serial", "serial"),
)
#: File systems that give a file the same inode number for life, on disks.
_LASTING_INODES = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs"})
_IDENTITY_CHARACTERS_MAX = 100


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


def stable_identity(fd: int) -> str:
    """Tell in a word what this device is under any path, on any boot (rules.md 24).

    That of a device-mapper or md device is its UUID, of a disk its wwid or serial number or its
    name in /dev/disk/by-id, of a partition its disk's and its number; of a file, and of a loop
    device that holds a whole one, its inode number.  UUIDs of file systems tell nothing: they are
    content.

    :return: words, the surest first, e.g. ``dm:LVM-8Qx...``, ``ext4:131074`` or
        ``wwid:naa.5000c500a1b2c3d4-part1 serial:WD-1234-part1``; empty where nothing is known that
        lasts.
    :raises OSError: the descriptor is not open.
    """
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        backing = ioctl.loop_backing(fd)
        if backing is None:
            return _shortened(_block_identity(status.st_rdev))
        device, inode = backing
    else:
        device, inode = status.st_dev, status.st_ino
    kind = file_system_of(device)
    return f"{kind}:{inode}" if kind in _LASTING_INODES else ""


def is_same(one: str, other: str) -> bool:
    """Tell whether two results of :func:`stable_identity` are of one device.

    By the surest word that both have: others may appear with another kernel.
    """
    known = dict(word.split(":", 1) for word in other.split())
    for word in one.split():
        kind, _, value = word.partition(":")
        if kind in known:
            return known[kind] == value
    return False


def _shortened(words: str) -> str:
    """Keep the words that a superblock has room for, the first at any length there is."""
    kept = words[:_IDENTITY_CHARACTERS_MAX]
    return kept if len(kept) == len(words) or " " not in kept else kept.rpartition(" ")[0]


def file_system_of(device: int) -> str:
    """Give the type of the mounted file system with this st_dev, or an empty string."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in _lines(_MOUNTINFO):
        # 36 35 98:0 /root /mount options [optional ...] - type source options
        fields = line.split()
        if fields[2] == number and "-" in fields[6:]:
            return fields[fields.index("-", 6) + 1]
    return ""


def _block_identity(device: int) -> str:
    directory = _SYS_BLOCK / f"{os.major(device)}:{os.minor(device)}"
    words: dict[str, str] = {}
    for attribute, kind in _ATTRIBUTES:
        text = "_".join(" ".join(_lines(directory / attribute)).split())
        if text:
            words.setdefault(kind, f"{kind}:{text}")
    part = " ".join(_lines(directory / "partition"))
    # The directory of a partition lies in its disk's.
    major, _, minor = " ".join(_lines(directory / ".." / "dev")).partition(":")
    if not words and part and minor:
        disk = _block_identity(os.makedev(int(major), int(minor)))
        return " ".join(f"{word}-part{part}" for word in disk.split())
    if not words:
        return " ".join(f"by-id:{name}" for name in _names_by_id(device)[:1])
    return " ".join(words.values())


def _names_by_id(device: int) -> list[str]:
    """Give the names that udev has for a device, in an order that does not change."""
    found = []
    try:
        entries = sorted(os.listdir(_BY_ID))
    except OSError:
        return []
    for name in entries:
        try:
            if os.stat(_BY_ID / name).st_rdev == device:
                found.append(name)
        except OSError:
            continue
    return found


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
        return path.read_text(errors="replace").replace("\0", "").splitlines()
    except OSError:
        return []
