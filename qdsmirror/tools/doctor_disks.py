"""Which disks a file or block device lies on, and what keeps a flush from reaching them.

Goes by sysfs: partitions to their disk, device-mapper, md and loop devices to what is below them,
files to the device of their file system.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

#: File systems that keep nothing when the power goes.
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs"})
#: File systems whose flushes another host, or a program, has to keep its word on.
FOREIGN_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs"})
#: Mount options that take the disk's cache for durable.
_NO_FLUSH = frozenset({"nobarrier", "barrier=0", "barrier=none"})
_STACKED_MAX = 16


@dataclass(frozen=True)
class Mount:
    """The file system that a file is in.

    :ivar kind: its type; ``source``: what is mounted; ``options``: of mount and file system.
    """

    kind: str
    source: str
    place: str
    options: frozenset[str]

    @property
    def flushes(self) -> bool:
        """Whether an fdatasync of its files reaches the disk."""
        return not self.options & _NO_FLUSH


class Disks:
    """What this host's kernel says of its block devices and mounts.

    :param sys: where sysfs is; ``mountinfo``: the mounts of this process.
    """

    def __init__(
        self, sys: Path = Path("/sys"), mountinfo: Path = Path("/proc/self/mountinfo")
    ) -> None:
        self._block = sys / "dev" / "block"
        self._mounts: dict[int, Mount] = {}
        for line in _text(mountinfo).splitlines():
            # 36 35 98:0 /root /mount options [optional ...] - type source options
            fields = line.split()
            if "-" not in fields[6:]:
                continue
            rest = fields[fields.index("-", 6) + 1 :]
            major, _, minor = fields[2].partition(":")
            options = frozenset(",".join([fields[5], *rest[2:3]]).split(","))
            number = os.makedev(int(major), int(minor))
            self._mounts[number] = Mount(rest[0], rest[1], fields[4], options)

    def mount_of(self, path: str) -> Mount | None:
        """Give the file system of a file; ``None`` for a block device or where it is not known.

        :raises OSError: the path cannot be looked at.
        """
        status = os.stat(path)
        return None if stat.S_ISBLK(status.st_mode) else self._mounts.get(status.st_dev)

    def below(self, path: str) -> frozenset[str]:
        """Give the disks that a file or block device lies on, by name, e.g. ``sda``.

        :returns: nothing where that cannot be known: a file system in memory, or of another host.
        :raises OSError: the path cannot be looked at.
        """
        status = os.stat(path)
        block = stat.S_ISBLK(status.st_mode)
        return self.below_device(status.st_rdev if block else status.st_dev)

    def below_device(self, device: int) -> frozenset[str]:
        """Give the disks below a device number, of a block device or of a file's file system."""
        return frozenset(self._disks(device, 0))

    def _directory(self, device: int) -> Path:
        return self._block / f"{os.major(device)}:{os.minor(device)}"

    def _disks(self, device: int, depth: int) -> set[str]:
        directory = self._directory(device)
        if depth > _STACKED_MAX:
            return set()
        if not directory.exists():
            return self._below_mount(device, depth)
        if (directory / "partition").exists():
            directory = directory.resolve().parent
        backing = _text(directory / "loop" / "backing_file").strip()
        if backing:
            return self._below_file(backing, depth)
        found: set[str] = set()
        for slave in _entries(directory / "slaves"):
            number = _number(_text(directory / "slaves" / slave / "dev"))
            if number is not None:
                found |= self._disks(number, depth + 1)
        return found or {directory.resolve().name}

    def _below_mount(self, device: int, depth: int) -> set[str]:
        """Find what is below a file system whose files have a device number of their own."""
        mount = self._mounts.get(device)
        if mount is None or not mount.source.startswith("/dev/"):
            return set()
        try:
            status = os.stat(mount.source)
        except OSError:
            return set()
        return self._disks(status.st_rdev, depth + 1) if stat.S_ISBLK(status.st_mode) else set()

    def _below_file(self, path: str, depth: int) -> set[str]:
        try:
            return self._disks(os.stat(path).st_dev, depth + 1)
        except OSError:
            return set()


def _number(text: str) -> int | None:
    major, colon, minor = text.strip().partition(":")
    if not (colon and major.isdecimal() and minor.isdecimal()):
        return None
    return os.makedev(int(major), int(minor))


def _entries(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
