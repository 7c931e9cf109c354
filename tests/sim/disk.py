"""Disks that outlive processes and power cuts, and the devices that processes open on them.

A disk keeps apart what is on its platters, what the host's page cache shows, and the writes in
between.  The suite of tests/storage/test_device.py runs against :class:`SimDevice` too.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Protocol

from zope.interface import implementer

from qdsmirror.core.recent import Recent
from qdsmirror.errors import DeviceError, DeviceFailedError
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.storage.identity import Identity
from tests.fakes import Choice, Unsynced, extents_in, first_hole, nothing

_numbers = itertools.count(1)


class Gone(BaseException):
    """The process ended in the middle of this call: no code of it runs any more."""


class Owner(Protocol):
    """The process that has a device open."""

    def before_io(self, device: SimDevice, method: str) -> bool:
        """Learn that a write or sync begins; raise Gone to end before it, give True to end
        behind it."""

    def gone(self) -> Gone:
        """Give what to raise when the process ends behind a call."""


class _Nobody:
    """An owner that lives for ever."""

    def before_io(self, device: SimDevice, method: str) -> bool:
        return False

    def gone(self) -> Gone:  # pragma: no cover
        return Gone()


class Disk:
    """A disk and the page cache of its host.

    :ivar durable: what a power cut leaves for certain.
    :ivar seen: what reads see.
    :ivar unsynced: the writes in between, oldest first.
    :ivar faults: by method name, how many of its next calls fail with EIO.
    :ivar wrote: told of every write (offset, data) before it happens; ``written``: when it has
        happened; ``synced``: of every completed sync.
    """

    def __init__(self, path: str, size: int, content: bytes = b"") -> None:
        self.path = path
        self.size = size
        self.durable = bytearray(content)
        self.durable += bytes(size - len(content))
        self.seen: bytearray | mmap.mmap = bytearray(self.durable)
        self.unsynced: list[Unsynced] = []
        self.faults: dict[str, int] = {}
        self.identity = Identity("memory", 0, next(_numbers))
        self.opened: SimDevice | None = None
        self.wrote: Callable[[int, bytes], None] | None = None
        self.written: Callable[[], None] | None = None
        self.synced: Callable[[], None] | None = None
        self._memory: int | None = None

    def write(self, offset: int, data: bytes) -> None:
        if self.wrote is not None:
            self.wrote(offset, data)
        self.seen[offset : offset + len(data)] = data
        self.unsynced.append(Unsynced(offset, data))
        if self.written is not None:
            self.written()

    def sync(self) -> None:
        durable = self.durable
        for offset, data in self.unsynced:
            durable[offset : offset + len(data)] = data
        self.unsynced.clear()
        if self.synced is not None:
            self.synced()

    def lose_unsynced(self) -> None:
        """What Linux does on a failed sync: pages count as clean and stay readable."""
        self.unsynced.clear()

    def drop_cache(self) -> None:
        self.seen[:] = self.durable
        for offset, data in self.unsynced:
            self.seen[offset : offset + len(data)] = data

    def power_cut(self, choose: Choice = nothing) -> None:
        """Keep of each unsynced write the pieces that ``choose`` gives, and nothing cached."""
        for write in self.unsynced:
            for start, end in choose(write):
                self.durable[write.offset + start : write.offset + end] = write.data[start:end]
        self.unsynced.clear()
        self.seen[:] = self.durable

    def shared(self) -> int:
        """Give a read-only descriptor that shows what reads see."""
        if self._memory is None:
            self._memory = os.memfd_create("qds-sim")
            os.truncate(self._memory, self.size)
            shared = mmap.mmap(self._memory, self.size)
            shared[:] = bytes(self.seen)
            self.seen = shared
        return os.open(f"/proc/self/fd/{self._memory}", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def inode(self) -> int | None:
        """The inode behind :meth:`shared`'s descriptors."""
        return os.fstat(self._memory).st_ino if self._memory is not None else None

    def discard(self) -> None:
        """Free what the disk takes."""
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None


class Memory(Disk):
    """What the driver's master holds: it outlives the driver, not the master, nor a power cut."""

    def write(self, offset: int, data: bytes) -> None:
        self.seen[offset : offset + len(data)] = data

    def sync(self) -> None:
        """There is nothing to sync."""

    def drop_cache(self) -> None:
        """There is nothing else."""

    def power_cut(self, choose: Choice = nothing) -> None:
        raise AssertionError("memory is made anew")


@implementer(IBlockDevice)
class SimDevice:
    """A disk as one process has it open."""

    is_block = False

    def __init__(
        self,
        disk: Disk,
        owner: Owner | None = None,
        role: str = "data device",
        logical_block: int = 512,
        physical_block: int = 4096,
    ) -> None:
        if disk.opened is not None:
            raise DeviceError(f"{role} {disk.path} is in use")
        disk.opened = self
        self.disk = disk
        self.path = disk.path
        self.role = role
        self.size = disk.size
        self.logical_block = logical_block
        self.physical_block = physical_block
        self.identity = disk.identity
        self.stable = ""
        self.recent = Recent()
        self.failed: str | None = None
        self.closed = False
        self._owner: Owner = owner or _Nobody()

    def latch(self, reason: str) -> None:
        if self.failed is None:
            self.failed = reason

    def pread(self, length: int, offset: int) -> bytes:
        self._enter("pread")
        data = bytes(memoryview(self.disk.seen)[offset : offset + length])
        if len(data) != length:
            raise OSError(errno.EIO, "read past the end", self.path)
        return data

    def pread_nowait(self, length: int, offset: int) -> bytes | None:
        self._enter("pread_nowait")
        if offset + length > self.size:
            return None
        return bytes(self.disk.seen[offset : offset + length])

    def pwritev(self, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        self._write("pwritev", offset, b"".join(buffers))

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        self._write("zero", offset, bytes(length))

    def _write(self, method: str, offset: int, data: bytes) -> None:
        last = self._enter(method, writes=True)
        if offset < 0 or offset + len(data) > self.size:
            raise OSError(errno.ENOSPC, "range exceeds the device", self.path)
        if data:
            self.recent.note((offset, len(data)))
            self.disk.write(offset, data)
        if last:
            raise self._owner.gone()

    def fdatasync(self) -> None:
        last = self._enter("fdatasync", writes=True, faulty=False)
        if self._fails("fdatasync"):
            self.disk.lose_unsynced()
            self.latch("fdatasync: " + os.strerror(errno.EIO))
            raise self._refusal()
        self.disk.sync()
        if last:
            raise self._owner.gone()

    def drop_cache(self, offset: int = 0, length: int = 0) -> None:
        self._enter("drop_cache")
        self.disk.drop_cache()

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        self._enter("extents")
        return extents_in(self.disk.seen, offset, length)

    def hole(self, offset: int, length: int) -> int:
        return first_hole(self.extents(offset, length))

    def open_shared(self) -> int:
        self._enter("open_shared")
        return self.disk.shared()

    def close(self) -> None:
        self.closed = True
        if self.disk.opened is self:
            self.disk.opened = None

    def _enter(self, method: str, writes: bool = False, faulty: bool = True) -> bool:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.path)
        if writes and self.failed is not None:
            raise self._refusal()
        last = writes and self._owner.before_io(self, method)
        if faulty and self._fails(method):
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.path)
        return last

    def _fails(self, method: str) -> bool:
        waiting = self.disk.faults
        if not waiting.get(method):
            return False
        waiting[method] -= 1
        return True

    def _refusal(self) -> DeviceFailedError:
        return DeviceFailedError(f"{self.role} {self.path} failed ({self.failed})", path=self.path)
