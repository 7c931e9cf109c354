"""The memory that a driver's master holds for a group's writelogs (rules.md 23).

It outlives the child that uses it, and ends with the master or the host's power.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

from qdsmirror.config import GroupConfig, LdsuConfig
from qdsmirror.errors import DeviceError, MismatchError
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.limits import MEMORY_HEADER_BYTES
from qdsmirror.storage.absent import AbsentDevice
from qdsmirror.storage.filedevice import FileDevice
from qdsmirror.storage.memorylog import MemoryLogDevice
from qdsmirror.storage.partition import part_of
from qdsmirror.storage.superblock import read_superblock

#: Gives an LDSU's part of the group's memory.
OpenMemory = Callable[[LdsuConfig], IBlockDevice]


def make_memory(group: GroupConfig) -> int:
    """Make the memory of all of a group's writelogs, every page of it; give its descriptor.

    :raises OSError: there is not so much.
    """
    size = sum(ldsu.memory_bytes for ldsu in group.ldsus)
    fd = os.memfd_create(group.name, os.MFD_CLOEXEC)
    try:
        # Now, not in the middle of a write that the application waits for.
        os.posix_fallocate(fd, 0, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


class GroupMemory:
    """The memory that a driver's master holds for a group's writelogs.

    :param fd: of :func:`make_memory`; stays the caller's.  ``None``: the master could not get any.
    """

    def __init__(self, group: GroupConfig, fd: int | None) -> None:
        self._group = group
        self._fd = fd

    def open(self, ldsu: LdsuConfig) -> IBlockDevice:
        """Open an LDSU's part.

        :raises DeviceError: there is none.
        """
        if self._fd is None:
            raise DeviceError(
                f"{ldsu.name}: the driver's master could get no memory for {ldsu.writelog_device}",
                hint="see the driver's log; free memory, or give less to the writelogs, then "
                "qdsconfigtool apply",
            )
        role = f"memory of {ldsu.name}"
        before = sum(one.memory_bytes for one in self._group.ldsus[: ldsu.index])
        whole = _Mapped(os.dup(self._fd), ldsu, before, role)
        return part_of(whole, before, ldsu.memory_bytes, role)


class _Mapped(FileDevice):
    """The memory, of which an LDSU's part is mapped as long as it is open.

    Where this process locks its memory (rules.md 20), that part is locked too: no page of it has to
    be brought back from a swap device while an application waits.
    """

    def __init__(self, fd: int, ldsu: LdsuConfig, offset: int, role: str) -> None:
        super().__init__(fd, ldsu.writelog_device, role)
        self._map = mmap.mmap(
            fd, ldsu.memory_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ,
            offset=offset,
        )  # fmt: skip

    def close(self) -> None:
        """Close it; doing it again changes nothing."""
        self._map.close()
        super().close()


def open_memory_log(
    durable: IBlockDevice, ldsu: LdsuConfig, open_memory: OpenMemory | None
) -> MemoryLogDevice:
    """Put a writelog in memory together.

    :param open_memory: ``None`` where there is none to be had: then everything in it is lost.
    :raises MismatchError: the bitmap device was initialised for another kind or size of writelog.
    :raises CorruptError: it holds no intact superblock.
    """
    superblock = read_superblock(durable)
    size = ldsu.memory_bytes
    device = None
    if superblock.memory is not None:
        start = superblock.ring.start - MEMORY_HEADER_BYTES
        memory = absent_memory(ldsu) if open_memory is None else open_memory(ldsu)
        device = MemoryLogDevice(durable, memory, start)
    if device is None or superblock.device_bytes != device.start + size:
        if device is not None:
            device.memory.close()
        raise MismatchError(
            f"{durable.path} was not initialised as the bitmap device of {ldsu.name} with "
            f"{ldsu.writelog_device}",
            hint="restore the group's file; or, if the change is meant, run qdswlinit --yes for "
            "the group, then qdsrefresh --full",
        )
    return device


class _NoMemory(AbsentDevice):
    """Memory that nobody has written to yet, and nobody will."""

    def pread(self, length: int, offset: int) -> bytes:
        """Give zeroes."""
        return bytes(length)


def absent_memory(ldsu: LdsuConfig) -> IBlockDevice:
    """Give what stands for a writelog's memory in a process that has none: it reads as unused."""
    return _NoMemory(ldsu.writelog_device, f"memory of {ldsu.name}", ldsu.memory_bytes)
