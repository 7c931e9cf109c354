"""An open file or block device as bytes at offsets; once its sync failed it stays failed."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Sequence
from enum import Enum

from zope.interface import implementer

from qdsmirror import limits
from qdsmirror.core.recent import Recent
from qdsmirror.core.ring import align_up
from qdsmirror.errors import DeviceFailedError
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.storage import ioctl
from qdsmirror.storage.identity import Identity, file_system_of, identity_of, stable_identity

#: What a file is treated as: the smallest sector there is, and the page that is written as one.
FILE_LOGICAL_BLOCK = 512
FILE_PHYSICAL_BLOCK = 4096

#: File systems in memory: reading never waits for a disk.
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM})
_ZEROES = bytes(limits.DEVICE_ZERO_WRITE_BYTES)
#: Buffers that no thread is reading into; as many come to be as threads read at once.
_scratches: list[bytearray] = []


class Nowait(Enum):
    """What a device can read without waiting: nothing, what is cached, or everything."""

    NEVER = 0
    CACHED = 1
    ALWAYS = 2


@implementer(IBlockDevice)
class FileDevice:
    """One open regular file or block device.

    Writes and reads may be issued from several threads at once.

    :ivar role: what it is for, e.g. ``data device``; used in messages.
    :ivar is_block: whether it is a block device.
    :ivar failed: why nothing is written any more (rules.md 4), or ``None``.  A failed fdatasync
        latches it, since the kernel calls the next one good; reads go on.
    """

    def __init__(self, fd: int, path: str, role: str = "device") -> None:
        """Take over a descriptor.

        :raises OSError: its size or blocks cannot be found out.
        """
        self.path = path
        self.role = role
        self.failed: str | None = None
        self.is_block = stat.S_ISBLK(os.fstat(fd).st_mode)
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self.logical_block = ioctl.logical_block(fd) if self.is_block else FILE_LOGICAL_BLOCK
        self.physical_block = ioctl.physical_block(fd) if self.is_block else FILE_PHYSICAL_BLOCK
        self.identity: Identity = identity_of(fd)
        self.stable: str = stable_identity(fd)
        self.recent = Recent()
        self._note = self.recent.note
        self._fd = fd
        self._nowait = Nowait.CACHED
        if not self.is_block and file_system_of(os.fstat(fd).st_dev) in _MEMORY_FILE_SYSTEMS:
            self._nowait = Nowait.ALWAYS
        self._syncing = threading.Lock()

    def __repr__(self) -> str:
        return f"<FileDevice {self.role} {self.path} {self.size} bytes>"

    def fileno(self) -> int:
        """Give the descriptor, -1 once closed."""
        return self._fd

    def latch(self, reason: str) -> None:
        """Refuse every write and sync from now on; the first reason stays."""
        if self.failed is None:
            self.failed = reason

    def pread(self, length: int, offset: int) -> bytes:
        """Read exactly ``length`` bytes.

        :raises OSError: EIO also where the device ends before.
        """
        data = self._read(length, offset)
        if len(data) == length:
            return data
        pieces = [data]
        got = len(data)
        while got < length:
            data = self._read(length - got, offset + got)
            if not data:
                raise OSError(errno.EIO, f"read past the end at byte {offset + got}", self.path)
            pieces.append(data)
            got += len(data)
        return b"".join(pieces)

    def pread_nowait(self, length: int, offset: int) -> bytes | None:
        """Read what the page cache holds (preadv2's RWF_NOWAIT): all of it, or ``None``.

        More than ``DEVICE_NOWAIT_BYTES_MAX`` is always ``None``: copying it alone takes long.
        """
        if self._nowait is Nowait.NEVER or length > limits.DEVICE_NOWAIT_BYTES_MAX:
            return None
        if self._nowait is Nowait.ALWAYS:
            data = os.pread(self._fd, length, offset)
            return data if len(data) == length else None
        # A fresh buffer of a MiB costs twenty times the read: its pages are faulted in one by one.
        scratch = _scratches.pop() if _scratches else bytearray(limits.DEVICE_NOWAIT_BYTES_MAX)
        view = memoryview(scratch)[:length]
        try:
            got = os.preadv(self._fd, (view,), offset, os.RWF_NOWAIT)
            return bytes(view) if got == length else None
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            self._nowait = Nowait.NEVER
            return None
        finally:
            _scratches.append(scratch)

    def pwritev(self, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        """Write the buffers (views of single bytes) one after another from ``offset``.

        :raises OSError: ENOSPC where they reach beyond the end; a file is never made longer.
        :raises DeviceFailedError: the device was latched.
        """
        if self.failed is not None:
            self._refuse()
        total = sum(map(len, buffers))
        self._check_range(offset, total)
        self._note((offset, total))
        if len(buffers) <= limits.DEVICE_IOV_MAX:
            written = self._write(buffers, offset)
            if written == total:
                return
        else:
            written = 0
        self._write_rest(buffers, offset, written)

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        """Make the range read as zeroes: zero-out, never a plain discard (rules.md 25).

        :param unmap: the space may be freed, where a hole reads as zeroes for certain.
        :raises OSError: as for :meth:`pwritev`.
        :raises DeviceFailedError: the device was latched.
        """
        if self.failed is not None:
            self._refuse()
        self._check_range(offset, length)
        if length == 0:
            return
        self._note((offset, length))
        # On a block device PUNCH_HOLE is a zero-out that the device must offer by itself, and
        # ZERO_RANGE one that the kernel falls back to writing for.
        modes = [ioctl.FALLOC_FL_ZERO_RANGE | ioctl.FALLOC_FL_KEEP_SIZE]
        if unmap:
            modes.insert(0, ioctl.FALLOC_FL_PUNCH_HOLE | ioctl.FALLOC_FL_KEEP_SIZE)
        for mode in modes:
            try:
                ioctl.fallocate(self._fd, mode, offset, length)
                return
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        for start in range(offset, offset + length, len(_ZEROES)):
            piece = memoryview(_ZEROES)[: min(len(_ZEROES), offset + length - start)]
            self._write_rest([piece], start, 0)

    def fdatasync(self) -> None:
        """Make every completed write durable.

        :raises DeviceFailedError: it failed, now or ever before: the device is latched.
        """
        # One at a time: the kernel reports a lost write to one caller only.
        with self._syncing:
            if self.failed is not None:
                self._refuse()
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self.latch(f"fdatasync: {error.strerror}")
                self._refuse(error)

    def preallocate(self) -> None:
        """Give a sparse file all its blocks, so that a later write cannot want for space.

        :raises OSError: the file system has not got them.
        """
        if not self.is_block:
            os.posix_fallocate(self._fd, 0, self.size)

    def drop_cache(self, offset: int = 0, length: int = 0) -> None:
        """Forget cached pages; only those already durable can be, so fdatasync comes first.

        :param length: bytes from ``offset`` on; 0: of the whole device.
        """
        if length:
            # A large folio that is not wholly in the range would stay.
            end = align_up(offset + length, limits.DEVICE_FOLIO_BYTES_MAX)
            offset -= offset % limits.DEVICE_FOLIO_BYTES_MAX
            length = end - offset
        if self.is_block and not length:
            try:
                ioctl.flush_buffers(self._fd)
            except PermissionError:
                pass  # posix_fadvise does the same but for pages in use
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Give (length, allocated) pairs that cover the range, neighbours merged.

        After ``DEVICE_EXTENTS_MAX`` pairs the rest counts as allocated, and so does the whole of
        a block device.  What is not allocated reads as zeroes.
        """
        if self.is_block:
            return [(length, True)] if length else []
        pairs: list[tuple[int, bool]] = []
        position, end = offset, offset + length
        while position < end:
            if len(pairs) + 2 > limits.DEVICE_EXTENTS_MAX:
                # The last pair is data.
                pairs[-1] = (pairs[-1][0] + end - position, True)
                break
            start = min(self._seek(position, os.SEEK_DATA), end)
            if start > position:
                pairs.append((start - position, False))
            if start < end:
                position = min(self._seek(start, os.SEEK_HOLE), end)
                pairs.append((position - start, True))
            else:
                position = end
        return pairs

    def hole(self, offset: int, length: int) -> int:
        """Give how many of the range's first bytes are a hole; costs no look at what is not.

        (Where a file's data ends is slow to find: SEEK_HOLE walks over all of it.)
        """
        if self.is_block:
            return 0
        return min(self._seek(offset, os.SEEK_DATA) - offset, length)

    def open_shared(self) -> int:
        """Open the same device again, read-only, with neither lock nor claim (rules.md 10).

        :return: a descriptor that the caller owns; it can be passed to another process.
        :raises OSError: it cannot be opened.
        """
        # The path may lead elsewhere by now; the descriptor cannot.
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Release lock, claim and descriptor; doing it again changes nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _seek(self, offset: int, whence: int) -> int:
        try:
            return os.lseek(self._fd, offset, whence)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return self.size

    def _read(self, length: int, offset: int) -> bytes:
        try:
            return os.pread(self._fd, length, offset)
        except OSError as error:
            # Who is told of it does not always know which of several devices it was.
            error.filename = self.path
            raise

    def _write(self, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> int:
        try:
            return os.pwritev(self._fd, buffers, offset)
        except OSError as error:
            error.filename = self.path
            raise

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise OSError(errno.ENOSPC, f"range {offset}+{length} exceeds the device", self.path)

    def _write_rest(
        self, buffers: Sequence[bytes | bytearray | memoryview], offset: int, written: int
    ) -> None:
        pending = _skip([memoryview(buffer) for buffer in buffers if len(buffer)], written)
        position = offset + written
        while pending:
            count = self._write(pending[: limits.DEVICE_IOV_MAX], position)
            if count == 0:
                raise OSError(errno.EIO, f"nothing could be written at byte {position}", self.path)
            pending = _skip(pending, count)
            position += count

    def _refuse(self, cause: OSError | None = None) -> None:
        raise DeviceFailedError(
            f"{self.role} {self.path} failed earlier and takes no more writes ({self.failed})"
            if cause is None
            else f"{self.role} {self.path}: {self.failed}",
            hint="check the disk (dmesg); writes since its last sync may be lost",
            path=self.path,
        ) from cause


def _skip(views: list[memoryview], count: int) -> list[memoryview]:
    """Give the views without their first ``count`` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []
