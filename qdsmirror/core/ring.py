"""The geometry of a circular log: where a record goes, and what is free.

Positions count bytes since the log was initialised and never wrap.  The ring is a circular list of
extents, on the log's own device and its extensions; where ``base`` stands at the first one's start,
a position's place is found ``(position - base) % size`` bytes further.  A record never crosses the
end of an extent: a pad fills it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from qdsmirror.core.frames import NUMBERS_END
from qdsmirror.limits import (
    FRAME_BYTES_MAX,
    FRAME_PAYLOAD_BYTES_MAX,
    KIB,
    RECORD_ALIGN_BYTES,
)


def align_up(value: int, unit: int) -> int:
    """Round up to a multiple of ``unit``."""
    return -(-value // unit) * unit


class Extent(NamedTuple):
    """A stretch of one of a log's devices.

    :ivar device: 0 for the log's own device, else the number of an extension.
    :ivar offset: in bytes on that device, and ``length`` in bytes.
    """

    device: int
    offset: int
    length: int


class Place(NamedTuple):
    """Where a position is found: the device's number and the byte offset on it."""

    device: int
    offset: int


class Placement(NamedTuple):
    """Where a record goes.

    :ivar pads: position and length of the pad records that go before it.
    :ivar position: of the record itself.
    :ivar record_bytes: its length, padding included.
    """

    pads: tuple[tuple[int, int], ...]
    position: int
    record_bytes: int

    @property
    def end(self) -> int:
        """The position after the record."""
        return self.position + self.record_bytes


@dataclass(frozen=True)
class Ring:
    """A circular log's places on its devices.

    :ivar start: byte offset on the log's own device where its part begins.
    :ivar size: bytes of all extents, a multiple of ``align``.
    :ivar align: records start on multiples of this.
    :ivar base: a position that stands at the start of the first extent.
    :ivar extents: in ring order; by default all of it is on the log's own device.
    """

    start: int
    size: int
    align: int = RECORD_ALIGN_BYTES
    base: int = 0
    extents: tuple[Extent, ...] = ()

    def __post_init__(self) -> None:
        if not self.extents:
            object.__setattr__(self, "extents", (Extent(0, self.start, self.size),))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(extent.length for extent in self.extents))

    def _find(self, position: int) -> tuple[Extent, int]:
        """Give the extent of a position, and how far into it that is."""
        distance = (position - self.base) % self.size
        index = bisect_right(self._ends, distance)
        extent = self.extents[index]
        return extent, distance - self._ends[index] + extent.length

    def physical(self, position: int) -> Place:
        """Give the place of a position."""
        extent, into = self._find(position)
        return Place(extent.device, extent.offset + into)

    def contiguous(self, position: int) -> int:
        """Give how many bytes follow a position before its extent's end."""
        extent, into = self._find(position)
        return extent.length - into

    def place(
        self, head: int, tail: int, unaligned_bytes: int, reserve: int = 0
    ) -> Placement | None:
        """Find the place of the next record.

        :param head: position after the last record.
        :param tail: the tail *in the durable superblock* (rules.md 5).
        :param unaligned_bytes: the record's length before padding.
        :param reserve: bytes that must stay free after it (rules.md 9).
        :returns: ``None`` when there is no room.
        """
        record = align_up(unaligned_bytes, self.align)
        limit = tail + self.size - reserve
        pads: list[tuple[int, int]] = []
        while head + record <= limit:
            rest = self.contiguous(head)
            if record <= rest:
                return Placement(tuple(pads), head, record)
            pads.append((head, rest))
            head += rest
        return None

    def spare(self, unaligned_bytes: int) -> int:
        """Give what an empty log has beside a record and its pads, wherever its head stands.

        :returns: bytes; negative where there is no room for the record.
        """
        record = align_up(unaligned_bytes, self.align)
        lengths = [extent.length for extent in self.extents]
        if max(lengths) < record:
            return -record
        worst = 0
        for index, length in enumerate(lengths):
            # The longest rest of this extent that is too short, then extents that are.
            pads = min(length, record - self.align)
            following = index + 1
            while lengths[following % len(lengths)] < record:
                pads += lengths[following % len(lengths)]
                following += 1
            worst = max(worst, pads)
        return self.size - record - worst

    def to_json(self) -> dict[str, Any]:
        """Give the form that stands in a superblock and is told to the pmd."""
        return {
            "start": self.start,
            "align": self.align,
            "base": self.base,
            "extents": [list(extent) for extent in self.extents],
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Ring:
        """Read :meth:`to_json`'s form.

        :raises ValueError: a number is out of range, or there is no extent; KeyError, TypeError:
            it is of another form.
        """
        extents = tuple(Extent(*extent) for extent in body["extents"])
        numbers = [body["start"], body["align"], body["base"], *(n for e in extents for n in e)]
        if not all(type(n) is int and 0 <= n < NUMBERS_END for n in numbers):
            raise ValueError("a number is out of range")
        size = sum(extent.length for extent in extents)
        if not body["align"] or not size:
            raise ValueError("the ring is empty")
        return cls(body["start"], size, body["align"], body["base"], extents)

    # -- extensions: every live position keeps its place ----------------------------------------

    def inserted(self, tail: int, at: int, extent: Extent) -> Ring:
        """Give the ring with one extent more.

        :param at: the position from which on places change, at most one turn above the tail; no
            record may reach beyond it under the present layout.
        """
        before, after = _cut(self._from(tail), at - tail)
        return self._made(tail, [*before, extent, *after])

    def without(self, tail: int, at: int, devices: Collection[int]) -> Ring:
        """Give the ring without these devices' extents from position ``at`` on.

        Those between the tail and ``at`` hold records and stay.
        """
        before, after = _cut(self._from(tail), at - tail)
        return self._made(tail, [*before, *(e for e in after if e.device not in devices)])

    def boundaries(self, first: int, last: int) -> list[int]:
        """Give the positions between two, at most a turn apart, where an extent ends."""
        found = []
        position = first
        while (position := position + self.contiguous(position)) <= last:
            found.append(position)
        return found

    @property
    def devices(self) -> frozenset[int]:
        """The numbers of the devices that it has extents on."""
        return frozenset(extent.device for extent in self.extents)

    def bytes_between(self, first: int, last: int) -> dict[int, int]:
        """Give by device how many bytes lie between two positions, at most a turn apart."""
        found: dict[int, int] = {}
        for extent in _cut(self._from(first), last - first)[0]:
            found[extent.device] = found.get(extent.device, 0) + extent.length
        return found

    def _from(self, position: int) -> list[Extent]:
        before, after = _cut(self.extents, (position - self.base) % self.size)
        return after + before

    def _made(self, base: int, extents: Sequence[Extent]) -> Ring:
        merged: list[Extent] = []
        for extent in extents:
            if merged and _adjoin(merged[-1], extent):
                extent = _joined(merged.pop(), extent)
            merged.append(extent)
        if len(merged) > 1 and _adjoin(merged[-1], merged[0]):
            base -= merged[-1].length
            merged[0] = _joined(merged.pop(), merged[0])
        size = sum(extent.length for extent in merged)
        return Ring(self.start, size, self.align, base % size, tuple(merged))

    @property
    def own_bytes(self) -> int:
        """Bytes on the log's own device: the same for as long as the log exists."""
        return sum(extent.length for extent in self.extents if extent.device == 0)

    @property
    def payload_cap(self) -> int:
        """Payload bytes of the largest frame that this ring takes, extended or not.

        At most a quarter of the log's own part, so that a record and the pad before it always fit.
        """
        if self.own_bytes >= 4 * FRAME_BYTES_MAX + 16 * KIB:
            return FRAME_PAYLOAD_BYTES_MAX
        return max(RECORD_ALIGN_BYTES, (self.own_bytes // 4 - 8 * KIB) // 4096 * 4096)

    @property
    def entries_cap(self) -> int:
        """Entries of the largest frame: their table must not outgrow a small ring."""
        return min(4096, max(16, self.own_bytes // 4096))


def _cut(extents: Sequence[Extent], distance: int) -> tuple[list[Extent], list[Extent]]:
    """Divide a list of extents after so many bytes."""
    before: list[Extent] = []
    after: list[Extent] = []
    for extent in extents:
        here = min(max(distance, 0), extent.length)
        if here:
            before.append(extent._replace(length=here))
        if here < extent.length:
            after.append(Extent(extent.device, extent.offset + here, extent.length - here))
        distance -= extent.length
    return before, after


def _adjoin(left: Extent, right: Extent) -> bool:
    return left.device == right.device and left.offset + left.length == right.offset


def _joined(left: Extent, right: Extent) -> Extent:
    return left._replace(length=left.length + right.length)
