"""A log on a device: superblocks, appending, scanning.

The primary's writelogs and the secondary's journal are the same thing; only what a superblock is
bound to differs.  Every method that does I/O blocks: callers run it in a worker.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from qdsmirror.core.extension import EXTENSION_SLOT_BYTES, Extension
from qdsmirror.core.frames import ENTRY_BYTES, HEADER_BYTES, Buffer
from qdsmirror.core.records import (
    FRAME,
    PAD,
    RECORD_HEADER_BYTES,
    BoundUnit,
    Cursor,
    Generation,
    Record,
    pack_record,
)
from qdsmirror.core.ring import Extent, Place, Placement, Ring, align_up
from qdsmirror.core.superblock import SLOT_BYTES, RingMemory, Superblock, pack_slot, renewed
from qdsmirror.errors import DegradedError, DeviceError, LimitError, UsageError
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.limits import (
    EXTENSIONS_PER_LOG_MAX,
    WRITELOG_BYTES_MIN,
)
from qdsmirror.storage.bitmap import initialise_bitmap
from qdsmirror.storage.extension import PoolDevice, find_chained
from qdsmirror.storage.loglayout import layout_of, reserve_bytes
from qdsmirror.storage.logreader import LogReader
from qdsmirror.storage.memorylog import MemoryLogDevice
from qdsmirror.storage.partition import Partition
from qdsmirror.storage.superblock import read_superblock

_ZEROES = bytes(1 << 16)

#: Where, by device and offset, which buffers are to be written.
Writes = list[tuple[Place, list[Buffer]]]


class SharedDevice(NamedTuple):
    """A device of a log as another process reads it.

    :ivar number: in the log's extents.
    :ivar shift: where the device's first byte stands behind the descriptor.
    :ivar fd: belongs to whoever asked for it.
    """

    number: int
    shift: int
    fd: int


class Writelog:
    """An open log.

    :ivar device: its own; ``extensions``: those chained to it, by their numbers.
    :ivar superblock: as last written.
    :ivar head: position behind the last record placed.
    :ivar durable_tail: the tail in the durable superblock: space before it may be reused.
    :ivar released: devices that it has given back to the pool; whoever keeps that takes them.
    """

    def __init__(
        self,
        device: IBlockDevice,
        superblock: Superblock,
        extensions: Mapping[int, PoolDevice] | None = None,
    ) -> None:
        self.device = device
        self.extensions = dict(extensions or {})
        self.released: list[PoolDevice] = []
        self.superblock = superblock
        self.ring = superblock.ring
        self.log = superblock.log
        self.head = superblock.head.position
        self.durable_tail = superblock.tail.position
        # Workers of the same log may each have something to record.
        self._superblock_lock = threading.Lock()
        # Held while head, ring and tail are looked at together, or changed.
        self._place_lock = threading.Lock()
        self._held = self._undecided = False
        self._unsynced = set(self.extensions)

    @classmethod
    def open(
        cls, device: IBlockDevice, pool: Sequence[PoolDevice] = (), *, failed: bool = False
    ) -> Writelog:
        """Open an initialised log.

        What a killed process left in the page cache is made durable first, and the cache dropped:
        nothing is found that a power cut could still take away (rules.md 3).

        :param pool: the extension devices of the group that could be opened.
        :param failed: it is read for what can still be had of it, page cache included, and never
            written again (rules.md 13).
        :raises CorruptError: it is not initialised, or both superblocks are damaged.
        :raises DeviceError: the device is smaller than it was, or an extension is missing.
        """
        if not failed:
            device.fdatasync()
            device.drop_cache()
        superblock = read_superblock(device)
        if device.size < superblock.device_bytes:
            raise DeviceError(
                f"{device.path} has {device.size} bytes, but its log was made for "
                f"{superblock.device_bytes}",
                hint="restore the device to its size",
            )
        return cls(device, superblock, find_chained(device, superblock, pool, failed=failed))

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
        before_bytes: int = 0,
        backfresh: Mapping[str, Any] | None = None,
    ) -> Writelog:
        """Make a device an empty log, both slots durable on return (patent: qdswlinit).

        :param before_bytes: see :func:`layout_of`.
        :param backfresh: what its LDSU's data device lacks.
        :raises DeviceError: the device is too small.
        """
        if device.size < WRITELOG_BYTES_MIN:
            raise DeviceError(
                f"{device.path} has {device.size} bytes; a log needs {WRITELOG_BYTES_MIN} at least",
                hint="give a larger device",
            )
        slot_bytes, ring, bitmap = layout_of(device, role, units, before_bytes)
        superblock = Superblock(
            role=role,
            log=os.urandom(16),
            group=group,
            units=tuple(units),
            ring=ring,
            device_bytes=device.size,
            generations=tuple(generations),
            reason=reason,
            backfresh=backfresh,
            slot_bytes=slot_bytes,
            bitmap=bitmap,
            memory=RingMemory() if isinstance(device, MemoryLogDevice) else None,
        )
        end = device.start if isinstance(device, MemoryLogDevice) else device.size
        for place in {*SLOT_BYTES, *EXTENSION_SLOT_BYTES} - {slot_bytes}:
            # A forgotten second slot, of another size or an extension's, must not be found again.
            if place + 4096 <= end:
                device.pwritev([_ZEROES[:4096]], place)
        # Behind that: such a place may lie in the bitmap.
        initialise_bitmap(device, superblock)
        log = cls(device, superblock)
        log.write_superblock(renewed(superblock), both=True)
        return log

    def stand_at(self, superblock: Superblock) -> None:
        """Go by another superblock, which is not durable before the next :meth:`update`.

        To be called before anything is placed.  Extensions that it does not name are let go.
        """
        named = {e.number for e in superblock.extensions}
        self.extensions = {n: one for n, one in self.extensions.items() if n in named}
        self._unsynced &= named
        self.superblock = superblock
        self.ring = superblock.ring
        self.head = superblock.head.position
        self.durable_tail = superblock.tail.position

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
        with self._place_lock:
            self.superblock = superblock
            self.ring = superblock.ring
            self.durable_tail = superblock.tail.position

    def update(self, *, both: bool = False, **changes: Any) -> None:
        """Write a superblock with these changes; safe from several threads.

        Where the tail moves, what it has passed of extensions that leave goes from the ring.
        """
        with self._superblock_lock:
            leaving = {e.number for e in self.superblock.extensions if e.leaving}
            if leaving and "tail" in changes:
                old = self.superblock
                tail = changes["tail"].position
                # No record reaches further than a turn above the old tail.
                ring = old.ring.without(tail, old.tail.position + old.ring.size, leaving)
                both, changes = True, {**changes, **self._left(ring)}
            self._write_next(both=both, **changes)

    def _write_next(self, *, both: bool, **changes: Any) -> None:
        self.write_superblock(renewed(self.superblock, **changes), both=both)
        named = {e.number for e in self.superblock.extensions}
        for number in [n for n in self.extensions if n not in named]:
            gone = self.extensions.pop(number)
            gone.release()
            self.released.append(gone)

    @property
    def used_bytes(self) -> int:
        """Bytes of the ring that may not be reused yet."""
        return self.head - self.durable_tail

    @property
    def _reserve(self) -> int:
        return reserve_bytes(self.ring.align)

    def takes(self, frame_bytes: int) -> bool:
        """Tell whether a frame fits an empty log, wherever its head stands."""
        return self.ring.spare(RECORD_HEADER_BYTES + frame_bytes) >= self._reserve

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
        return max(0, self.ring.spare(RECORD_HEADER_BYTES + frame_bytes) - self._reserve)

    def place(
        self, frame_bytes: int, *, control: bool = False, kept_bytes: int = 0
    ) -> Placement | None:
        """Take the place of the next record.

        :param control: the frame may use the reserve (rules.md 9).
        :param kept_bytes: beside the reserve, so much must stay free behind it.
        :returns: ``None`` when the log is full.
        """
        with self._place_lock:
            if self._held:
                return None
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
        """Give the writes that put a frame at its place.

        :param durable: the position up to which the log is durable by now: should a scan stop
            before it, it has met damage, not the end (rules.md 6).
        """
        writes: Writes = []
        for at, length in placement.pads:
            pad = pack_record(Record(PAD, length, 0, at, durable), self.log)
            writes.append((self.ring.physical(at), [pad.ljust(self.ring.align, b"\0")]))
        head = pack_record(
            Record(FRAME, placement.record_bytes, frame_bytes, placement.position, durable),
            self.log,
        )
        fill = placement.record_bytes - len(head) - frame_bytes
        writes.append((self.ring.physical(placement.position), [head, *frame, _ZEROES[:fill]]))
        return writes

    def write(self, writes: Writes) -> None:
        """Do what :meth:`record` gave; durable with the next :meth:`sync`.

        :raises OSError: a device refuses.
        """
        for (number, offset), buffers in writes:
            self._device(number).pwritev(buffers, offset)
            if number:
                # Not before it: a sync that ran in between would have taken it for synced.
                with self._place_lock:
                    self._unsynced.add(number)

    def sync(self) -> None:
        """Make every record that was written before durable.

        :raises DeviceFailedError: a device did not, now or before.
        """
        if self.extensions:
            with self._place_lock:
                written, self._unsynced = self._unsynced, set()
            try:
                for extension in filter(None, map(self.extensions.get, written)):
                    extension.device.fdatasync()
            except (OSError, DeviceError):
                with self._place_lock:
                    self._unsynced |= written
                raise
        self.device.fdatasync()

    def _device(self, number: int) -> IBlockDevice:
        return self.extensions[number].device if number else self.device

    def pread(self, length: int, device: int, offset: int) -> bytes:
        """Read from one of its devices, by number."""
        return self._device(device).pread(length, offset)

    def clear_end(self, end: int) -> None:
        """Destroy what is left of lost records behind a log's end, durably on return.

        To be called before anything is appended to a log that was scanned: a record that was cut
        off from the log by the loss of the pad before it, or of a sector of its own, would follow
        again when that is written anew.

        :param end: the position behind the last record found.
        """
        last = self.durable_tail + self.ring.size - self.ring.align
        places = [at for at in (end, *self.ring.boundaries(end, last)) if at <= last]
        self.write([(self.ring.physical(at), [bytes(self.ring.align)]) for at in places])
        self.sync()

    def reader(self, cursor: Cursor, *, contiguous: bool = False) -> LogReader:
        """Read the log's frames from a cursor."""
        generations = frozenset(g.id for g in self.superblock.generations)
        return LogReader(
            self.pread, self.ring, self.log, cursor, generations, contiguous=contiguous
        )

    def open_shared(self) -> list[SharedDevice]:
        """Open its devices read-only once more, for the pmd (rules.md 10)."""
        device = self.device
        shift = device.offset if isinstance(device, Partition) else 0
        shift = device.shift if isinstance(device, MemoryLogDevice) else shift
        shared = [SharedDevice(0, shift, self.device.open_shared())]
        # A worker may take one away meanwhile; whoever reads is told to ask again then.
        for number, extension in list(self.extensions.items()):
            shared.append(SharedDevice(number, 0, extension.device.open_shared()))
        return shared

    def close(self) -> None:
        """Close its devices."""
        self.device.close()
        for extension in self.extensions.values():
            extension.device.close()

    # -- extensions ---------------------------------------------------------------------------

    def extend(self, extension: PoolDevice) -> None:
        """Chain a free device of the pool to the log; durable in both slots on return.

        Meanwhile :meth:`place` finds no room: whoever places asks again afterwards.

        :raises LimitError: there are too many already.
        :raises DeviceError: it does not fit this log, or is too small.
        :raises OSError: a device refuses; should it be the log's own, nothing is placed any more.
        """
        with self._superblock_lock, self._holding():
            old = self.superblock
            taken = {e.number for e in old.extensions}
            number = next(n for n in range(1, len(taken) + 2) if n not in taken)
            if number > EXTENSIONS_PER_LOG_MAX:
                raise LimitError(
                    f"{self.device.path} has {EXTENSIONS_PER_LOG_MAX} extensions already",
                    hint="give larger devices",
                )
            ring = self._inserted(extension.header.extent(number, self.ring.align))
            if extension.device.physical_block > ring.align:
                raise DeviceError(
                    f"{extension.device.path} has blocks of {extension.device.physical_block} "
                    f"bytes, the log {self.device.path} of {ring.align}",
                    hint="extend it by a device with blocks of that size",
                )
            extension.own(self.log)
            self.extensions[number] = extension
            with self._deciding():
                named = Extension(number, extension.id, extension.header.size)
                self._write_next(both=True, ring=ring, extensions=(*old.extensions, named))

    @property
    def is_undecided(self) -> bool:
        """Whether it is open which layout a crash would leave: nothing is placed any more."""
        return self._undecided

    def _inserted(self, extent: Extent) -> Ring:
        """Give the ring with one extent more, between two where the free space allows."""
        ring, tail = self.ring, self.durable_tail
        turn = tail + ring.size
        for at in (*ring.boundaries(self.head, turn), turn):
            found = ring.inserted(tail, at, extent)
            if self._takes_largest(found):
                return found
        raise DegradedError(
            f"the log {self.device.path} would be divided into too small parts now",
            hint="try again when its tail has moved on, or give a larger device",
        )

    def free(self, number: int) -> None:
        """Begin to take a device out of the log; durable in both slots on return.

        Its free space goes at once, the rest as the tail passes it; then it is in ``released``.
        Meanwhile :meth:`place` finds no room: whoever places asks again afterwards.

        :raises UsageError: the log has no such extension.
        :raises DegradedError: what is left would not hold what the log holds now.
        :raises OSError: the log's own device refuses; nothing is placed any more.
        """
        with self._superblock_lock, self._holding():
            old = self.superblock
            if number not in self.extensions:
                raise UsageError(f"{self.device.path} has no extension {number}")
            extensions = tuple(
                e._replace(leaving=True) if e.number == number else e for e in old.extensions
            )
            leaving = {e.number for e in extensions if e.leaving}
            ring = self.ring.without(self.durable_tail, self.head, leaving)
            if self.head + self._reserve - self.durable_tail > ring.size or not self._takes_largest(
                ring.without(self.durable_tail, self.durable_tail, leaving)
            ):
                raise DegradedError(
                    f"{self.device.path} cannot do without extension {number} now "
                    f"({self.extensions[number].device.path}): the rest is too small for what it "
                    "holds",
                    hint="try again when the secondary has committed more of it; see qdsinfo",
                )
            with self._deciding():
                self._write_next(both=True, **self._left(ring, extensions))

    def _takes_largest(self, ring: Ring) -> bool:
        frame = HEADER_BYTES + ring.entries_cap * ENTRY_BYTES + ring.payload_cap
        return ring.spare(RECORD_HEADER_BYTES + frame) >= self._reserve

    def _left(self, ring: Ring, extensions: Sequence[Extension] | None = None) -> dict[str, Any]:
        """Give the changes to a ring that some extensions may have left for good."""
        named = self.superblock.extensions if extensions is None else extensions
        return {"ring": ring, "extensions": tuple(e for e in named if e.number in ring.devices)}

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Let the head stand still."""
        with self._place_lock:
            held, self._held = self._held, True
        try:
            yield
        finally:
            with self._place_lock:
                self._held = held or self._undecided

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        """While it is open which layout a crash would leave, and ever after an error in it."""
        self._undecided = True
        yield
        self._undecided = False
