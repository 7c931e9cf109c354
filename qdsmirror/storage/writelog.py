"""A log on a device: superblocks, appending, scanning.

The primary's writelogs and the secondary's journal are the same thing; only what a superblock is
bound to differs.  Every method that does I/O blocks: callers run it in a worker.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

from qdsmirror.core.frames import Buffer
from qdsmirror.core.records import (
    FRAME,
    PAD,
    RECORD_HEADER_BYTES,
    SLOT_BYTES,
    BoundUnit,
    Cursor,
    Generation,
    Record,
    Superblock,
    layout,
    pack_record,
    pack_slot,
    parse_slot,
    renewed,
)
from qdsmirror.core.ring import Placement, align_up
from qdsmirror.errors import CorruptError, DeviceError
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.limits import CONTROL_RECORDS_MIN, CONTROL_RESERVE_BYTES, WRITELOG_BYTES_MIN
from qdsmirror.storage.logreader import LogReader

_ZEROES = bytes(1 << 16)

Writes = list[tuple[int, list[Buffer]]]


def read_superblock(device: IBlockDevice) -> Superblock:
    """Find the newest intact superblock of a log.

    :raises CorruptError: neither slot is intact.
    :raises OSError: the device cannot be read.
    """
    try:
        first = _read_slot(device, 0, 0, SLOT_BYTES[-1])
    except CorruptError as error:
        # Where the slots are small, the larger places lie in the ring, and what stands there may
        # have been written by an application: the first that holds a slot is the one.
        for place in SLOT_BYTES:
            try:
                return _read_slot(device, 1, place, place)
            except CorruptError:
                continue
        raise CorruptError(
            f"{device.path} holds no intact log: {error.message}",
            hint="initialise it with qdswlinit(1) if it was never used",
        ) from error
    try:
        second = _read_slot(device, 1, first.slot_bytes, first.slot_bytes)
    except CorruptError:
        return first
    return max(first, second, key=lambda s: s.counter)


def _reserve(align: int) -> int:
    return max(CONTROL_RESERVE_BYTES, CONTROL_RECORDS_MIN * align)


def ring_bytes_for(frame_bytes: int, align: int) -> int:
    """Give the size of a ring that, empty, takes a frame wherever its head stands.

    :param frame_bytes: of the largest frame; ``align``: of the ring's records.
    """
    return 2 * align_up(RECORD_HEADER_BYTES + frame_bytes, align) + _reserve(align)


def _read_slot(device: IBlockDevice, slot: int, place: int, slot_bytes: int) -> Superblock:
    raw = device.pread(max(0, min(slot_bytes, device.size - place)) // 512 * 512, place)
    return parse_slot(raw, slot, place)


class Writelog:
    """An open log.

    :ivar superblock: as last written.
    :ivar head: position behind the last record placed.
    :ivar durable_tail: the tail in the durable superblock: space before it may be reused.
    """

    def __init__(self, device: IBlockDevice, superblock: Superblock) -> None:
        self.device = device
        self.superblock = superblock
        self.ring = superblock.ring
        self.log = superblock.log
        self.head = superblock.head.position
        self.durable_tail = superblock.tail.position
        # Workers of the same log may each have something to record.
        self._superblock_lock = threading.Lock()

    @classmethod
    def open(cls, device: IBlockDevice) -> Writelog:
        """Open an initialised log.

        What a killed process left in the page cache is made durable first, and the cache dropped:
        nothing is found that a power cut could still take away (rules.md 3).

        :raises CorruptError: it is not initialised, or both superblocks are damaged.
        :raises DeviceError: the device is smaller than it was.
        """
        device.fdatasync()
        device.drop_cache()
        superblock = read_superblock(device)
        if device.size < superblock.device_bytes:
            raise DeviceError(
                f"{device.path} has {device.size} bytes, but its log was made for "
                f"{superblock.device_bytes}",
                hint="restore the device to its size",
            )
        return cls(device, superblock)

    @classmethod
    def initialise(
        cls,
        device: IBlockDevice,
        *,
        role: str,
        group: int,
        units: Sequence[BoundUnit],
        generations: Sequence[Generation] = (),
        reason: str = "never mirrored",
    ) -> Writelog:
        """Make a device an empty log, both slots durable on return (patent: qdswlinit).

        :raises DeviceError: the device is too small.
        """
        if device.size < WRITELOG_BYTES_MIN:
            raise DeviceError(
                f"{device.path} has {device.size} bytes; a log needs {WRITELOG_BYTES_MIN} at least",
                hint="give a larger device",
            )
        covered = units[0].size if role == "writelog" else None
        slot_bytes, ring, bitmap = layout(device.size, len(units), device.physical_block, covered)
        superblock = Superblock(
            role=role,
            log=os.urandom(16),
            group=group,
            units=tuple(units),
            ring=ring,
            device_bytes=device.size,
            generations=tuple(generations),
            reason=reason,
            slot_bytes=slot_bytes,
            bitmap=bitmap,
        )
        if bitmap is not None:
            device.zero(bitmap.start, bitmap.size, False)
        for size in SLOT_BYTES:
            # A forgotten second slot of another size must not be found again.
            if size != slot_bytes and size + 4096 <= device.size:
                device.pwritev([_ZEROES[:4096]], size)
        log = cls(device, superblock)
        log.write_superblock(renewed(superblock), both=True)
        return log

    def write_superblock(self, superblock: Superblock, *, both: bool = False) -> None:
        """Write the next superblock and make it durable.

        :param superblock: with the counter after the present one's.
        :param both: also write the other slot, after the first is durable, so that the change
            survives the loss of either (rules.md 5).
        """
        for turn in range(2 if both else 1):
            slot = (superblock.counter + turn) % 2
            self.device.pwritev([pack_slot(superblock, slot)], slot * superblock.slot_bytes)
            self.device.fdatasync()
        self.superblock = superblock
        self.durable_tail = superblock.tail.position

    def update(self, *, both: bool = False, **changes: Any) -> None:
        """Write a superblock with these changes; safe from several threads."""
        with self._superblock_lock:
            self.write_superblock(renewed(self.superblock, **changes), both=both)

    @property
    def used_bytes(self) -> int:
        """Bytes of the ring that may not be reused yet."""
        return self.head - self.durable_tail

    @property
    def _reserve(self) -> int:
        return _reserve(self.ring.align)

    def takes(self, frame_bytes: int) -> bool:
        """Tell whether a frame fits an empty log, wherever its head stands."""
        return ring_bytes_for(frame_bytes, self.ring.align) <= self.ring.size

    @property
    def free_bytes(self) -> int:
        """Bytes of the ring that are free, without the reserve."""
        return self.ring.size - self._reserve - self.used_bytes

    def control_room(self, frame_bytes: int) -> int:
        """Give how many control frames of this length there is room for (rules.md 9)."""
        record = align_up(RECORD_HEADER_BYTES + frame_bytes, self.ring.align)
        return (self.ring.size - self.used_bytes) // record

    def spare_bytes(self, frame_bytes: int) -> int:
        """Give what an empty log has beside a frame of this length, wherever its head stands."""
        record = align_up(RECORD_HEADER_BYTES + frame_bytes, self.ring.align)
        return max(0, self.ring.size - self._reserve - 2 * record)

    def place(
        self, frame_bytes: int, *, control: bool = False, kept_bytes: int = 0
    ) -> Placement | None:
        """Take the place of the next record.

        :param control: the frame may use the reserve (rules.md 9).
        :param kept_bytes: beside the reserve, so much must stay free behind it.
        :returns: ``None`` when the log is full.
        """
        placement = self.ring.place(
            self.head,
            self.durable_tail,
            RECORD_HEADER_BYTES + frame_bytes,
            0 if control else self._reserve + kept_bytes,
        )
        if placement is not None:
            self.head = placement.end
        return placement

    def record(
        self, placement: Placement, frame_bytes: int, frame: Sequence[Buffer], durable: int
    ) -> Writes:
        """Give the writes, as (device offset, buffers), that put a frame at its place.

        :param durable: the position up to which the log is durable by now: should a scan stop
            before it, it has met damage, not the end (rules.md 6).
        """
        writes: Writes = []
        if placement.pad_bytes:
            at = placement.position - placement.pad_bytes
            pad = pack_record(Record(PAD, placement.pad_bytes, 0, at, durable), self.log)
            writes.append((self.ring.physical(at), [pad.ljust(self.ring.align, b"\0")]))
        head = pack_record(
            Record(FRAME, placement.record_bytes, frame_bytes, placement.position, durable),
            self.log,
        )
        fill = placement.record_bytes - len(head) - frame_bytes
        writes.append((self.ring.physical(placement.position), [head, *frame, _ZEROES[:fill]]))
        return writes

    def reader(self, cursor: Cursor, *, contiguous: bool = False) -> LogReader:
        """Read the log's frames from a cursor."""
        generations = frozenset(g.id for g in self.superblock.generations)
        return LogReader(
            self.device.pread, self.ring, self.log, cursor, generations, contiguous=contiguous
        )
