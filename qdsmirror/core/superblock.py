"""The superblock: what a log says of itself, and durably of its group (man page qdswritelog(5)).

A slot is a small fixed header and a JSON body under one CRC-32C; two slots are written in turn
(rules.md 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from blake3 import blake3

from qdsmirror.core.beforeimage import Period
from qdsmirror.core.bitmap import BitmapArea, bitmap_area
from qdsmirror.core.extension import Extension
from qdsmirror.core.failures import Failed
from qdsmirror.core.frames import NUMBERS_END, Buffer
from qdsmirror.core.held import Held
from qdsmirror.core.records import BoundUnit, Cursor, Generation, Point
from qdsmirror.core.ring import Ring, align_up
from qdsmirror.core.slots import Form, seal, unseal
from qdsmirror.errors import DeviceError, LimitError
from qdsmirror.limits import (
    BITMAP_LOG_SHARE,
    EXTENSIONS_PER_LOG_MAX,
    EXTENTS_MAX,
    GENERATIONS_MAX,
    KIB,
    LDSUS_PER_GROUP_MAX,
    MEMORY_HEADER_BYTES,
    MIB,
    RECORD_ALIGN_BYTES,
)


class RingMemory(NamedTuple):
    """The memory that a log's ring stands in.

    :ivar name: 16 bytes that the memory bears, in hexadecimal; empty before the log has had any.
    :ivar first_gsn: it holds, or held, every frame of the log from this number on.
    """

    name: str = ""
    first_gsn: int = 1


@dataclass(frozen=True)
class Superblock:
    """A log's metadata: an informed, normally out-of-date guess, and the group's durable states.

    :ivar role: ``writelog`` or ``journal``.
    :ivar log: the log's UUID.
    :ivar tail: nothing before it is needed; its space is free.
    :ivar applied: everything before it is on the devices, synced, for the whole group.
    :ivar head: a guess: everything before it is durable in this log.
    :ivar durable_gsn: the group's durable GSN when this was written (rules.md 6).
    :ivar coherent: whether the mirror is usable as of one instant (invariant COHERENT).
    :ivar tracked: of a mirror that is not: whether frames and dirty bitmaps have all it lacks.
    :ivar refresh: the refresh in progress, as the driver or the rmd describes it, or ``None``.
    :ivar bypass: the bypass that the group is in, by id, since and reason, or ``None``; in a
        journal the one at whose break the mirror stands.
    :ivar verify: the newest verify of a writelog's LDSU, running or ended, as the driver describes
        it, or ``None``.
    :ivar bitmap: where the dirty bitmap stands; ``None`` in a journal.
    :ivar fingerprints: by LDSU index what its device holds, from an orderly stop to the next start
        (rules.md 24); else ``None``.
    :ivar failures: the group's failed devices (:class:`~qdsmirror.core.failures.Failed`), or
        ``None``.
    :ivar degraded: since when and why more is answered than a synchronous operation promises, or
        ``None`` (rules.md 21).
    :ivar extensions: the devices beside its own that the ring has extents on.
    :ivar memory: the memory that the ring stands in; ``None`` where it stands on a device.
    :ivar checkpoint: of a journal: the checkpoint (:class:`~qdsmirror.core.held.Held`) at
        ``applied``, beyond which nothing is applied, or ``None``.
    :ivar backfresh: what the data device lacks, or is being fetched from the mirror
        (:class:`~qdsmirror.core.backfresh.BackfreshState`), or ``None``: it is a copy.
    :ivar before: of a journal whose mirror is being refreshed: what it can be rolled back to
        (:class:`~qdsmirror.core.beforeimage.Period`), or ``None``.
    :ivar counter: of updates; the larger one holds.
    :ivar slot_bytes: bytes of a slot: the second slot starts where the first ends.
    """

    role: str
    log: bytes
    group: int
    units: tuple[BoundUnit, ...]
    ring: Ring
    device_bytes: int
    generations: tuple[Generation, ...] = ()
    tail: Cursor = field(default_factory=Cursor)
    applied: Cursor = field(default_factory=Cursor)
    head: Cursor = field(default_factory=Cursor)
    durable_gsn: int = 0
    coherent: bool = False
    tracked: bool = False
    reason: str = ""
    refresh: Mapping[str, Any] | None = None
    bypass: Mapping[str, Any] | None = None
    verify: Mapping[str, Any] | None = None
    bitmap: BitmapArea | None = None
    fingerprints: Mapping[str, Any] | None = None
    failures: Mapping[str, Any] | None = None
    degraded: Mapping[str, Any] | None = None
    extensions: tuple[Extension, ...] = ()
    memory: RingMemory | None = None
    checkpoint: Mapping[str, Any] | None = None
    backfresh: Mapping[str, Any] | None = None
    before: Mapping[str, Any] | None = None
    counter: int = 0
    slot_bytes: int = 8 * KIB

    @property
    def before_area(self) -> tuple[int, int]:
        """Where before-images stand on a journal's device: first byte and length."""
        start = align_up(2 * self.slot_bytes, self.ring.align)
        return start, self.ring.start - start

    @property
    def generation(self) -> bytes:
        """The current generation's id; empty before there is one."""
        return self.generations[-1].id if self.generations else b""

    def to_json(self) -> dict[str, Any]:
        """Give the body of a slot."""
        body: dict[str, Any] = {
            "role": self.role,
            "log": self.log.hex(),
            "group": self.group,
            "units": [unit.to_json() for unit in self.units],
            "ring": self.ring.to_json(),
            "extensions": [[e.number, e.id.hex(), e.size, e.leaving] for e in self.extensions],
            "device_bytes": self.device_bytes,
            "generations": [[g.id.hex(), g.first_gsn] for g in self.generations],
            "tail": self.tail.to_json(),
            "applied": self.applied.to_json(),
            "head": self.head.to_json(),
            "durable_gsn": self.durable_gsn,
            "coherent": self.coherent,
            "reason": self.reason,
            "refresh": dict(self.refresh) if self.refresh is not None else None,
            "bypass": dict(self.bypass) if self.bypass is not None else None,
            "bitmap": list(self.bitmap) if self.bitmap is not None else None,
        }
        if self.tracked:
            body["tracked"] = True
        if self.verify is not None:
            body["verify"] = dict(self.verify)
        if self.fingerprints is not None:
            body["fingerprints"] = dict(self.fingerprints)
        if self.failures is not None:
            body["failures"] = dict(self.failures)
        if self.memory is not None:
            body["memory"] = list(self.memory)
        if self.checkpoint is not None:
            body["checkpoint"] = dict(self.checkpoint)
        if self.backfresh is not None:
            body["backfresh"] = dict(self.backfresh)
        if self.degraded is not None:
            body["degraded"] = dict(self.degraded)
        if self.before is not None:
            body["before"] = dict(self.before)
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any], counter: int, slot_bytes: int) -> Superblock:
        """Read :meth:`to_json`'s form.

        :raises ValueError: a value is out of range; KeyError, TypeError, AttributeError: of
            another form.
        """
        superblock = cls(
            role=body["role"],
            log=bytes.fromhex(body["log"]),
            group=body["group"],
            units=tuple(BoundUnit(*u) for u in body["units"]),
            ring=Ring.from_json(body["ring"]),
            device_bytes=body["device_bytes"],
            generations=tuple(Generation(bytes.fromhex(i), n) for i, n in body["generations"]),
            tail=Cursor.from_json(body["tail"]),
            applied=Cursor.from_json(body["applied"]),
            head=Cursor.from_json(body["head"]),
            durable_gsn=body["durable_gsn"],
            coherent=body["coherent"],
            reason=body["reason"],
            refresh=body["refresh"],
            bypass=body["bypass"],
            tracked=body.get("tracked", False) is True,
            bitmap=BitmapArea(*body["bitmap"]) if body["bitmap"] is not None else None,
            verify=body.get("verify"),
            fingerprints=body.get("fingerprints"),
            failures=body.get("failures"),
            checkpoint=body.get("checkpoint"),
            backfresh=body.get("backfresh"),
            degraded=body.get("degraded"),
            before=body.get("before"),
            extensions=tuple(
                Extension(n, bytes.fromhex(i), size, leaving)
                for n, i, size, leaving in body["extensions"]
            ),
            memory=RingMemory(*body["memory"]) if "memory" in body else None,
            counter=counter,
            slot_bytes=slot_bytes,
        )
        superblock._check()
        return superblock

    def _check(self) -> None:
        """Check what a reader relies on; the checksum proves only that nothing changed."""
        ring = self.ring
        cursors = (self.tail, self.applied, self.head)
        numbers = [ring.start, ring.size, ring.align, self.device_bytes, self.durable_gsn]
        numbers += [n for c in cursors for n in (c.position, c.gsn)]
        numbers += [point.sequence for c in cursors for point in c.points.values()]
        numbers += [n for unit in self.units for n in (unit.index, unit.size)]
        numbers += self.bitmap or ()
        if self.memory is not None:
            numbers.append(self.memory.first_gsn)
            if len(bytes.fromhex(self.memory.name)) not in (0, 16):
                raise ValueError("the memory's name cannot be read")
        if not all(type(n) is int and 0 <= n < NUMBERS_END for n in numbers):
            raise ValueError("a number is out of range")
        if (
            not self.units
            or len(self.log) != 16
            or ring.align < RECORD_ALIGN_BYTES
            or ring.start < 2 * self.slot_bytes
        ):
            raise ValueError("the layout is impossible")
        if self.fingerprints is not None and not isinstance(self.fingerprints, dict):
            raise ValueError("the fingerprints cannot be read")
        if self.backfresh is not None and not isinstance(self.backfresh, dict):
            raise ValueError("the record of a backfresh cannot be read")
        if self.degraded is not None and not isinstance(self.degraded, dict):
            raise ValueError("the degraded state cannot be read")
        Failed.from_json(self.failures)
        Held.from_json(self.checkpoint)
        Period.from_json(self.before)
        area = self.bitmap
        if area is not None and not (
            2 * self.slot_bytes <= area.start
            and area.start + area.size <= ring.start
            and area.covers(self.units[0].size)
        ):
            raise ValueError("the dirty bitmap's place is impossible")
        self._check_extents()
        if any(c.position % ring.align for c in cursors) or not (
            self.tail.position <= self.applied.position <= self.head.position
            <= self.tail.position + ring.size
        ):  # fmt: skip
            raise ValueError("tail, applied and head are not in this order")

    def _check_extents(self) -> None:
        ring, align = self.ring, self.ring.align
        rooms = {0: (ring.start, self.device_bytes)}
        rooms |= {e.number: (2 * RECORD_ALIGN_BYTES, e.size) for e in self.extensions}
        devices = [extent.device for extent in ring.extents]
        numbers = [e.number for e in self.extensions]
        if (
            len(ring.extents) > EXTENTS_MAX
            or len(numbers) != len(set(numbers))
            or not all(type(n) is int and 1 <= n <= EXTENSIONS_PER_LOG_MAX for n in numbers)
            or set(devices) != set(rooms)
            or any(len(e.id) != 16 or type(e.size) is not int for e in self.extensions)
            or any(type(e.leaving) is not bool for e in self.extensions)
            or (self.extensions and self.role != "writelog")
        ):
            raise ValueError("the extensions are impossible")
        end: dict[int, int] = {}
        for device, offset, length in sorted(ring.extents):
            first, last = rooms[device]
            if (
                offset % align
                or length % align
                or length < align
                or offset < end.get(device, first)
                or offset + length > last
            ):
                raise ValueError("the layout is impossible")
            end[device] = offset + length


SUPER_MAGIC = b"QDSSUPER"
SUPER_VERSION = 1
#: Sizes that a slot may have: the second slot starts where the first ends.
SLOT_BYTES = (8 * KIB, 64 * KIB, 512 * KIB, 4 * MIB)
_FORM = Form("superblock", SUPER_MAGIC, SUPER_VERSION, SLOT_BYTES)
#: Larger slots are taken where both are at most this part of the device: a superblock may have to
#: name every LDSU of the group (a refresh's cut).
_SLOTS_DEVICE_PART = 32
_SLOT_BYTES_ROOMY = 512 * KIB


def slot_bytes_for(units: int, device_bytes: int, physical_block: int) -> int:
    """Give the size of a slot that describes this many LDSUs.

    At least a physical block, so that one torn block cannot take both slots (rules.md 5).

    :raises LimitError: there are too many for the largest slot.
    """
    need = max(2 * KIB + 100 * GENERATIONS_MAX + units * 512, physical_block)
    fitting = [size for size in SLOT_BYTES if need <= size]
    if not fitting:
        raise LimitError(f"{units} LDSUs are too many for one log's superblock")
    roomy = [
        size
        for size in fitting
        if size <= _SLOT_BYTES_ROOMY and 2 * size * _SLOTS_DEVICE_PART <= device_bytes
    ]
    return max(roomy, default=fitting[0])


def pack_slot(superblock: Superblock, slot: int) -> bytes:
    """Make the bytes of slot 0 or 1, padded to whole 4096-byte blocks.

    :raises LimitError: the body does not fit the slot.
    """
    return seal(_FORM, slot, superblock.slot_bytes, superblock.counter, superblock.to_json())


def parse_slot(raw: Buffer, slot: int, slot_bytes: int) -> Superblock:
    """Read a slot; no field is believed before the checksum matches.

    :param slot: which slot these bytes were read from.
    :param slot_bytes: the slot size that this place implies; ``0`` accepts any (slot 0).
    :raises CorruptError: it is not an intact superblock for this slot.
    """
    return unseal(_FORM, raw, slot, slot_bytes, Superblock.from_json)


def layout(
    device_bytes: int,
    units: int,
    physical_block: int,
    covered_bytes: int | None = None,
    before_bytes: int = 0,
) -> tuple[int, Ring, BitmapArea | None]:
    """Divide a device into two slots, the dirty bitmap's or before-images' area, and the ring.

    :param covered_bytes: size of the LDSU that the bitmap is for; ``None``: there is no bitmap.
    :param before_bytes: what the before-images get, a multiple of the ring's alignment.
    :returns: the slot size, the ring, and the bitmap's area.
    :raises DeviceError: the device is too small.
    """
    slot_bytes = slot_bytes_for(units, device_bytes, physical_block)
    align = max(RECORD_ALIGN_BYTES, physical_block)
    start = align_up(2 * slot_bytes, align) + before_bytes
    area = None
    if covered_bytes is not None:
        area = bitmap_area(start, covered_bytes, device_bytes, align)
        start += area.size
    size = (device_bytes - start) // align * align
    if size < 16 * align:
        raise DeviceError(
            f"a log for {units} LDSUs on blocks of {align} bytes needs {start + 16 * align} bytes "
            f"at least, not {device_bytes}",
            hint="give a larger device",
        )
    return slot_bytes, Ring(start, size, align), area


def layout_with_memory(
    device_bytes: int, memory_bytes: int, physical_block: int, covered_bytes: int
) -> tuple[int, Ring, BitmapArea]:
    """Divide the bitmap device of a log whose ring stands in memory.

    Offsets go on from the device's end (rounded down) into the memory, whose first
    ``MEMORY_HEADER_BYTES`` say whose it is.  The bitmap may have all that the slots leave.

    :param covered_bytes: size of the LDSU that the bitmap is for.
    :returns: as :func:`layout`.
    :raises DeviceError: the device is too small.
    """
    align = max(RECORD_ALIGN_BYTES, physical_block)
    whole = device_bytes // align * align
    slot_bytes = slot_bytes_for(1, whole, physical_block)
    start = align_up(2 * slot_bytes, align)
    area = bitmap_area(start, covered_bytes, BITMAP_LOG_SHARE * max(0, whole - start), align)
    if area.start + area.size > whole:
        raise DeviceError(
            f"a bitmap device with blocks of {align} bytes needs {area.start + area.size} bytes at "
            f"least, not {device_bytes}",
            hint="give a larger device",
        )
    ring_start = whole + MEMORY_HEADER_BYTES
    size = (memory_bytes - MEMORY_HEADER_BYTES) // align * align
    return slot_bytes, Ring(ring_start, size, align), area


def after_loss(superblock: Superblock, gsn: int) -> Superblock:
    """Give the superblock of a log whose memory was lost, with all that it held.

    The log goes on empty, where nothing of it was before: at a position and with a local sequence
    that it cannot have reached, and under a chain of its own.  (Between two superblocks, which tell
    the durable tail, it takes no more than its ring holds.)  The tail keeps its GSN: of what came
    later, everything is in the dirty bitmap.  Extensions are given back.

    :param gsn: the next one, above any that the group can have given.
    """
    ring = superblock.ring
    position = superblock.tail.position + ring.size
    points = {}
    for unit in superblock.units:
        sequence, chain = superblock.head.point(unit.index)
        other = blake3(chain + b"lost" + gsn.to_bytes(8, "big")).digest(len(chain))
        points[unit.index] = Point(sequence + ring.size // ring.align + 1, other)
    here = Cursor(position, gsn, points)
    own = Ring(ring.start, ring.own_bytes, ring.align)
    return replace(
        superblock,
        ring=own,
        extensions=(),
        tail=Cursor(position, superblock.tail.gsn, points),
        applied=here,
        head=here,
        durable_gsn=gsn - 1,
        refresh=None,
    )


def renewed(superblock: Superblock, **changes: Any) -> Superblock:
    """Give the next superblock: changed, and with the next counter."""
    return replace(superblock, counter=superblock.counter + 1, **changes)


assert slot_bytes_for(LDSUS_PER_GROUP_MAX, 0, 0) <= SLOT_BYTES[-1]
