"""The geometry of a circular log: where a record goes, and what is free.

Positions count bytes since the log was initialised and never wrap; a position's place on the
device is ``start + position % size``.  A record never wraps: a pad fills the end of the ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from qdsmirror.limits import (
    FRAME_BYTES_MAX,
    FRAME_PAYLOAD_BYTES_MAX,
    KIB,
    RECORD_ALIGN_BYTES,
)


def align_up(value: int, unit: int) -> int:
    """Round up to a multiple of ``unit``."""
    return -(-value // unit) * unit


class Placement(NamedTuple):
    """Where a record goes.

    :ivar pad_bytes: length of the pad record that goes before it (0: none).
    :ivar position: of the record itself.
    :ivar record_bytes: its length, padding included.
    """

    pad_bytes: int
    position: int
    record_bytes: int

    @property
    def end(self) -> int:
        """The position after the record."""
        return self.position + self.record_bytes


@dataclass(frozen=True)
class Ring:
    """A circular log's place on its device.

    :ivar start: byte offset of the ring on the device.
    :ivar size: bytes, a multiple of ``align``.
    :ivar align: records start on multiples of this.
    """

    start: int
    size: int
    align: int = RECORD_ALIGN_BYTES

    def physical(self, position: int) -> int:
        """Give the byte offset on the device of a position."""
        return self.start + position % self.size

    def contiguous(self, position: int) -> int:
        """Give how many bytes follow a position before the ring's end."""
        return self.size - position % self.size

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
        rest = self.contiguous(head)
        pad = 0 if record <= rest else rest
        if head + pad + record + reserve - tail > self.size:
            return None
        return Placement(pad, head + pad, record)

    @property
    def payload_cap(self) -> int:
        """Payload bytes of the largest frame that this ring takes.

        At most a quarter of the ring, so that a record and the pad before it always fit.
        """
        if self.size >= 4 * FRAME_BYTES_MAX + 16 * KIB:
            return FRAME_PAYLOAD_BYTES_MAX
        return max(RECORD_ALIGN_BYTES, (self.size // 4 - 8 * KIB) // 4096 * 4096)

    @property
    def entries_cap(self) -> int:
        """Entries of the largest frame: their table must not outgrow a small ring."""
        return min(4096, max(16, self.size // 4096))
