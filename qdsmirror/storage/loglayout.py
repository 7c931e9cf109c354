"""How a device is divided for a new log: slots, dirty bitmap, before-images and ring."""

from __future__ import annotations

from collections.abc import Sequence

from qdsmirror.core.beforeimage import area_bytes
from qdsmirror.core.bitmap import BitmapArea
from qdsmirror.core.records import RECORD_HEADER_BYTES, BoundUnit
from qdsmirror.core.ring import Ring, align_up
from qdsmirror.core.superblock import layout
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.limits import (
    BEFORE_JOURNAL_SHARE,
    CONTROL_RECORDS_MIN,
    CONTROL_RESERVE_BYTES,
    FRAME_BYTES_MAX,
)
from qdsmirror.storage.memorylog import MemoryLogDevice


def reserve_bytes(align: int) -> int:
    """Give what of a ring serves control frames only (rules.md 9)."""
    return max(CONTROL_RESERVE_BYTES, CONTROL_RECORDS_MIN * align)


def layout_of(
    device: IBlockDevice, role: str, units: Sequence[BoundUnit], before_bytes: int = 0
) -> tuple[int, Ring, BitmapArea | None]:
    """Divide a device for a new log: the slots' size, the ring, the dirty bitmap's area.

    :param before_bytes: of a journal, what the before-images get (:func:`before_bytes_for`).
    :raises DeviceError: it is too small.
    """
    if isinstance(device, MemoryLogDevice):
        return device.layout(units[0].size)
    covered = units[0].size if role == "writelog" else None
    return layout(device.size, len(units), device.physical_block, covered, before_bytes)


def before_bytes_for(device: IBlockDevice, units: Sequence[BoundUnit], wanted: int) -> int:
    """Give what the before-images of a new journal get (rules.md 15).

    At most half of the device, and nothing that the primary's largest frames need; no more than
    the mirror devices can need.

    :param wanted: bytes, at most.
    :raises DeviceError: the device is too small for a journal.
    """
    _, ring, _ = layout_of(device, "journal", units)
    spare = ring.size - ring_bytes_for(FRAME_BYTES_MAX, ring.align)
    spare = min(spare, int(device.size * BEFORE_JOURNAL_SHARE))
    return area_bytes(wanted, [unit.size for unit in units], spare, ring.align)


def ring_bytes_for(frame_bytes: int, align: int) -> int:
    """Give the size of a ring that, empty, takes a frame wherever its head stands.

    :param frame_bytes: of the largest frame; ``align``: of the ring's records.
    """
    return 2 * align_up(RECORD_HEADER_BYTES + frame_bytes, align) + reserve_bytes(align)
