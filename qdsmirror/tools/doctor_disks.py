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

    def unflushed(self, path: str) -> tuple[str, str] | None:
        """Find what keeps flushes of a file or block device from a disk's volatile cache.

        The kernel sends none to a device whose ``queue/write_cache`` says ``write through``.  It
        sets that by the device's own word, and for stacked ones by what is below them; where a
        disk has a volatile cache nonetheless, somebody has written it there.  FUA (``queue/fua``)
        says only whether a flush follows a write or comes with it.

        :returns: names of the device that gets no flushes, and of the disk; ``None``: all is well,
            or not known.
        :raises OSError: the path cannot be looked at.
        """
        status = os.stat(path)
        block = stat.S_ISBLK(status.st_mode)
        return self._unflushed(status.st_rdev if block else status.st_dev, "", 0)

    def _unflushed(self, device: int, above: str, depth: int) -> tuple[str, str] | None:
        """Go down; ``above``: the first device on the way that gets no flushes."""
        if depth > _STACKED_MAX:
            return None
        directory = self._whole(device)
        if directory is None:
            below = self._number_of_mount(device)
            return None if below is None else self._unflushed(below, above, depth + 1)
        name = directory.resolve().name
        cache = _text(directory / "queue" / "write_cache").strip()
        if cache == "write through":
            above = above or name
        # What a SCSI disk itself says stays when the kernel is told otherwise.
        own = [_text(one).strip() for one in directory.glob("device/scsi_disk/*/cache_type")]
        if above and any(one.startswith("write back") for one in (cache, *own)):
            return above, name
        ways = (self._unflushed(one, above, depth + 1) for one in self._lower(directory))
        return next((found for found in ways if found is not None), None)

    def _whole(self, device: int) -> Path | None:
        """Give a block device's directory, of a partition its disk's; ``None``: it has none."""
        directory = self._block / f"{os.major(device)}:{os.minor(device)}"
        if not directory.exists():
            return None
        return directory.resolve().parent if (directory / "partition").exists() else directory

    def _disks(self, device: int, depth: int) -> set[str]:
        if depth > _STACKED_MAX:
            return set()
        directory = self._whole(device)
        if directory is None:
            # A file system whose files have a device number of their own.
            below = self._number_of_mount(device)
            return set() if below is None else self._disks(below, depth + 1)
        found = {disk for one in self._lower(directory) for disk in self._disks(one, depth + 1)}
        return found or {directory.resolve().name}

    def _lower(self, directory: Path) -> list[int]:
        """Give the devices that one lies on: of a loop device its file's; none: it is a disk."""
        backing = _text(directory / "loop" / "backing_file").strip()
        if backing:
            try:
                return [os.stat(backing).st_dev]
            except OSError:
                return []
        slaves = directory / "slaves"
        numbers = (_number(_text(slaves / slave / "dev")) for slave in _entries(slaves))
        return [number for number in numbers if number is not None]

    def _number_of_mount(self, device: int) -> int | None:
        """Give the device that a file system is mounted from."""
        mount = self._mounts.get(device)
        if mount is None or not mount.source.startswith("/dev/"):
            return None
        try:
            status = os.stat(mount.source)
        except OSError:
            return None
        return status.st_rdev if stat.S_ISBLK(status.st_mode) else None


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
