"""A writelog in memory: its superblock and dirty bitmap on a device, its ring in memory.

The patent's second embodiment ("cache memory and a dirty bit map disk drive device"; rules.md 23).
The memory belongs to the driver's master: it outlives the child that uses it, and ends with the
master or the host's power.  Everything here blocks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from crc32c import crc32c
from zope.interface import implementer

from qdsmirror.core.bitmap import BitmapArea
from qdsmirror.core.recent import Recent
from qdsmirror.core.ring import Ring
from qdsmirror.core.superblock import Superblock, layout_with_memory
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.limits import MEMORY_HEADER_BYTES
from qdsmirror.storage.partition import Partition

_MAGIC = b"QDSMEMRY"
_ID_BYTES = 16


@implementer(IBlockDevice)
class MemoryLogDevice:
    """A bitmap device and the memory behind it, as one device for a log.

    :param durable: the bitmap device, open and locked.
    :param memory: of the configured size.
    :ivar start: byte offset of the memory; what is before is on the bitmap device.
    """

    is_block = False

    def __init__(self, durable: IBlockDevice, memory: IBlockDevice, start: int | None = None):
        self.durable = durable
        self.memory = memory
        align = max(MEMORY_HEADER_BYTES, durable.physical_block)
        self.start = durable.size // align * align if start is None else start
        self.path = durable.path
        self.role = durable.role
        self.size = self.start + memory.size
        self.stable = durable.stable
        self.recent = Recent()
        self.logical_block = durable.logical_block
        self.physical_block = durable.physical_block

    @property
    def failed(self) -> str | None:
        """See :class:`IBlockDevice`."""
        return self.durable.failed or self.memory.failed

    def __repr__(self) -> str:
        return f"<MemoryLogDevice {self.durable!r} and {self.memory!r}>"

    def layout(self, covered_bytes: int) -> tuple[int, Ring, BitmapArea]:
        """Divide it; see :func:`~qdsmirror.core.superblock.layout_with_memory`."""
        return layout_with_memory(
            self.durable.size, self.memory.size, self.physical_block, covered_bytes
        )

    def _at(self, offset: int) -> tuple[IBlockDevice, int]:
        if offset >= self.start:
            return self.memory, offset - self.start
        return self.durable, offset

    def pread(self, length: int, offset: int) -> bytes:
        """See :class:`IBlockDevice`."""
        before = self.start - offset
        if 0 < before < length:
            # Who looks for a superblock does not know where it ends.
            return self.durable.pread(before, offset) + self.memory.pread(length - before, 0)
        device, at = self._at(offset)
        return device.pread(length, at)

    def pread_nowait(self, length: int, offset: int) -> bytes | None:
        """See :class:`IBlockDevice`."""
        device, at = self._at(offset)
        return device.pread_nowait(length, at)

    def pwritev(self, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        """See :class:`IBlockDevice`."""
        device, at = self._at(offset)
        device.pwritev(buffers, at)

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        """See :class:`IBlockDevice`."""
        device, at = self._at(offset)
        device.zero(at, length, unmap)

    def fdatasync(self) -> None:
        """Make durable what can be: what is on the bitmap device."""
        self.durable.fdatasync()

    def drop_cache(self, offset: int = 0, length: int = 0) -> None:
        """See :class:`IBlockDevice`; what is in memory is nowhere else."""
        if offset < self.start:
            self.durable.drop_cache(offset, length)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """See :class:`IBlockDevice`."""
        return [(length, True)] if length else []

    def hole(self, offset: int, length: int) -> int:
        """See :class:`IBlockDevice`."""
        return 0

    @property
    def shift(self) -> int:
        """Where offset 0 lies behind the descriptors of :meth:`open_shared`: before them."""
        inside = self.memory.offset if isinstance(self.memory, Partition) else 0
        return inside - self.start

    def open_shared(self) -> int:
        """See :class:`IBlockDevice`; of the memory: the pmd reads nothing else."""
        return self.memory.open_shared()

    def close(self) -> None:
        """See :class:`IBlockDevice`."""
        self.durable.close()
        self.memory.close()

    # -- whose memory it is ---------------------------------------------------------------------

    def owner(self) -> str:
        """Tell by which name a log has taken this memory; empty where none has."""
        try:
            raw = self.memory.pread(MEMORY_HEADER_BYTES, 0)
        except OSError:
            return ""
        body = raw[: len(_MAGIC) + _ID_BYTES]
        crc = int.from_bytes(raw[len(body) : len(body) + 4], "big")
        return body[len(_MAGIC) :].hex() if body.startswith(_MAGIC) and crc == crc32c(body) else ""

    def take(self) -> str:
        """Take the memory, empty, under a new name; give that.

        :raises OSError: the memory cannot be had.
        """
        name = os.urandom(_ID_BYTES)
        if self.owner():
            self.memory.zero(0, self.memory.size, unmap=False)
        body = _MAGIC + name
        self.memory.pwritev([body + crc32c(body).to_bytes(4, "big")], 0)
        return name.hex()


class Loss(NamedTuple):
    """What has become of a log's memory at its opening.

    :ivar taken: the memory is the one that the superblock names.
    :ivar lost: with the other one something was lost that the secondary may not have.
    """

    taken: bool
    lost: bool


def loss_of(device: IBlockDevice, superblock: Superblock) -> Loss:
    """Find out whether a log still has its memory, and whether that matters.

    Nothing is lost where nothing was ever written, or where an orderly stop left the log empty and
    nobody has begun since: then the fingerprints still stand.
    """
    memory = superblock.memory
    if not isinstance(device, MemoryLogDevice) or memory is None:
        return Loss(True, False)
    if not memory.name:
        return Loss(False, False)
    if device.owner() == memory.name:
        return Loss(True, False)
    left_empty = (
        superblock.fingerprints is not None
        and superblock.tail.position == superblock.applied.position == superblock.head.position
    )
    return Loss(False, not left_empty)


def next_gsn_after(superblocks: Sequence[Superblock], entry_bytes: int) -> int:
    """Give a GSN above any that a group can have given whose memory was lost.

    Above the durable one that its superblocks tell, there were no more entries than its rings
    hold.

    :param entry_bytes: the least that an entry takes.
    """
    held = sum(superblock.ring.size // entry_bytes for superblock in superblocks)
    return max(superblock.durable_gsn for superblock in superblocks) + held + 1
