"""Stands in for a device that has failed for good, so that the rest of its group can be served.

Nothing of it is read or written: whoever tries meets an error.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from zope.interface import implementer

from qdsmirror.core.bitmap import bitmap_area
from qdsmirror.core.recent import Recent
from qdsmirror.core.records import BoundUnit, Generation
from qdsmirror.core.ring import Ring, align_up
from qdsmirror.core.superblock import Superblock
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.limits import MIB, RECORD_ALIGN_BYTES
from qdsmirror.storage.filedevice import FILE_LOGICAL_BLOCK, FILE_PHYSICAL_BLOCK
from qdsmirror.storage.writelog import Writelog

_RING_BYTES = MIB


@implementer(IBlockDevice)
class AbsentDevice:
    """A device without a descriptor.

    :param size: what it has, or had, in bytes.
    """

    is_block = False
    stable = ""
    failed: str | None = "it is not used since it has failed"

    def __init__(self, path: str, role: str, size: int) -> None:
        self.path = path
        self.role = role
        self.size = size
        self.logical_block = FILE_LOGICAL_BLOCK
        self.physical_block = FILE_PHYSICAL_BLOCK
        self.recent = Recent()

    def pread(self, length: int, offset: int) -> bytes:
        """Raise EIO."""
        raise self._absent()

    def pread_nowait(self, length: int, offset: int) -> bytes | None:
        """Raise EIO."""
        raise self._absent()

    def pwritev(self, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        """Raise EIO."""
        raise self._absent()

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        """Raise EIO."""
        raise self._absent()

    def fdatasync(self) -> None:
        """Raise EIO."""
        raise self._absent()

    def drop_cache(self, offset: int = 0, length: int = 0) -> None:
        """Raise EIO."""
        raise self._absent()

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Raise EIO."""
        raise self._absent()

    def hole(self, offset: int, length: int) -> int:
        """Raise EIO."""
        raise self._absent()

    def open_shared(self) -> int:
        """Raise EIO."""
        raise self._absent()

    def close(self) -> None:
        """There is nothing to close."""

    def _absent(self) -> OSError:
        return OSError(errno.EIO, f"{self.role} is not used since it has failed", self.path)


def absent_log(path: str, role: str, group: int, unit: BoundUnit, generation: bytes) -> Writelog:
    """Give a writelog that holds nothing and takes nothing.

    :param generation: the group's.
    """
    start = align_up(2 * Superblock.slot_bytes, RECORD_ALIGN_BYTES)
    area = bitmap_area(start, unit.size, _RING_BYTES, RECORD_ALIGN_BYTES)
    ring = Ring(start + area.size, _RING_BYTES, RECORD_ALIGN_BYTES)
    superblock = Superblock(
        role="writelog",
        log=bytes(16),
        group=group,
        units=(unit,),
        ring=ring,
        device_bytes=ring.start + ring.size,
        generations=(Generation(generation, 1),),
        reason="what was known of the mirror was in a writelog that has failed",
        bitmap=area,
    )
    return Writelog(AbsentDevice(path, role, superblock.device_bytes), superblock)
