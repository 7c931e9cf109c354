"""Sectors that a disk changes while the power is off, or that were written to another place.

Only where the format promises to notice: in a slot of the superblock, in the dirty bitmap, and from
the tail up to where the superblock or any record says that the log is durable.  What was changed is
put right again when it has been refused, or when the start has gone past it.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import NamedTuple

from qdsmirror.core.records import parse_placement
from qdsmirror.core.superblock import Superblock
from qdsmirror.errors import CorruptError
from qdsmirror.storage.superblock import read_superblock
from tests.sim.disk import Disk, SimDevice
from tests.sim.history import SECTOR


class _Damage(NamedTuple):
    disk: Disk
    offset: int
    before: bytes
    after: bytes


class Corruption:
    """What is wrong with the logs of one site.

    :param logs: the paths of its writelogs, or of its journal.
    :param others: of its data or mirror devices: a refused start leaves them alone.
    """

    def __init__(
        self, disks: Mapping[str, Disk], logs: list[str], others: list[str], random: Random
    ) -> None:
        self._disks = disks
        self._logs = logs
        self._others = others
        self._random = random
        self._damages: list[_Damage] = []
        self._contents: list[bytes] = []

    @property
    def any(self) -> bool:
        """Whether something is still damaged."""
        return bool(self._damages)

    def strike(self) -> str:
        """Damage a sector, or a block; tell what was done, or nothing."""
        random = self._random
        disk = self._disks[random.choice(self._logs)]
        try:
            superblock = self._superblock(disk)
        except CorruptError:
            return ""
        offset, length = self._place(disk, superblock)
        if not length:
            return ""
        before = bytes(disk.durable[offset : offset + length])
        after = bytearray(before)
        match random.randrange(3):
            case 0:
                after[random.randrange(length)] ^= 1 << random.randrange(8)
            case 1:
                after[:] = bytes(length)
            case 2:
                other = random.randrange(disk.size // length) * length
                after[:] = disk.durable[other : other + length]
        if after == before:
            return ""
        self._put(disk, offset, before, bytes(after))
        self._damages.append(_Damage(disk, offset, before, bytes(after)))
        self._contents = [bytes(self._disks[path].durable) for path in self._others]
        return f"{length} bytes of {disk.path} at {offset} change"

    def _superblock(self, disk: Disk) -> Superblock:
        return read_superblock(SimDevice(Disk(disk.path, disk.size, bytes(disk.durable))))

    def _place(self, disk: Disk, superblock: Superblock) -> tuple[int, int]:
        random = self._random
        ring, tail = superblock.ring, superblock.tail.position
        head = self._durable_end(disk, superblock)
        if superblock.bitmap is not None and random.random() < 0.2:
            area = superblock.bitmap
            return area.start + random.randrange(area.size // SECTOR) * SECTOR, SECTOR
        if random.random() < 0.3 or head == tail or superblock.memory is not None:
            slot = random.randrange(2) * superblock.slot_bytes
            return slot + random.randrange(4096 // SECTOR) * SECTOR, SECTOR
        number, offset = ring.physical(random.randrange(tail, head) // ring.align * ring.align)
        if number:
            return 0, 0
        if random.random() < 0.5:
            return offset, ring.align
        return offset + random.randrange(ring.align // SECTOR) * SECTOR, SECTOR

    @staticmethod
    def _durable_end(disk: Disk, superblock: Superblock) -> int:
        """Give the position up to which anything says that the log is durable."""
        end = superblock.head.position
        ring = superblock.ring
        for at in range(ring.start, disk.size - ring.align + 1, ring.align):
            try:
                record = parse_placement(disk.durable[at : at + ring.align], superblock.log)
            except CorruptError:
                continue
            if (
                record.position >= superblock.tail.position
                and ring.physical(record.position) == (0, at)
            ):  # fmt: skip
                end = max(end, record.durable)
        return end

    @staticmethod
    def _put(disk: Disk, offset: int, known: bytes, new: bytes) -> None:
        for content in (disk.durable, disk.seen):
            if content[offset : offset + len(known)] == known:
                content[offset : offset + len(new)] = new

    def is_told_by(self, error: BaseException) -> bool:
        """Tell whether this explains why a daemon does not start."""
        return bool(self._damages) and isinstance(error, CorruptError)

    def has_spread(self) -> bool:
        """Tell whether a start that was refused has changed another device."""
        return self._contents != [bytes(self._disks[path].seen) for path in self._others]

    def heal(self) -> None:
        """Give back what nobody has overwritten."""
        while self._damages:
            disk, offset, before, after = self._damages.pop()
            self._put(disk, offset, after, before)
