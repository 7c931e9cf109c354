"""The dirty bitmap on its writelog's device (rules.md 12).  Everything here blocks."""

from __future__ import annotations

from collections.abc import Sequence

from qdsmirror.core.bitmap import BitmapArea
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.limits import BITMAP_BLOCK_BYTES


def read_bitmap(device: IBlockDevice, area: BitmapArea) -> bytes:
    """Read the whole area.

    :raises OSError: the device cannot be read.
    """
    return device.pread(area.size, area.start)


def write_blocks(
    device: IBlockDevice, area: BitmapArea, blocks: Sequence[tuple[int, bytes]]
) -> None:
    """Write blocks, given by number, and make them durable with one sync for all.

    :raises OSError: the device refused.
    """
    for number, data in blocks:
        device.pwritev([data], area.start + number * BITMAP_BLOCK_BYTES)
    device.fdatasync()


def clear_bitmap(device: IBlockDevice, area: BitmapArea) -> None:
    """Clear every bit, durably.

    :raises OSError: the device refused.
    """
    device.zero(area.start, area.size, False)
    device.fdatasync()
