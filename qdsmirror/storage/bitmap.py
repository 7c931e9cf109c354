"""The dirty bitmap on its writelog's device (rules.md 12).  Everything here blocks."""

from __future__ import annotations

from collections.abc import Sequence

from qdsmirror.core.bitmap import SECTOR_BYTES, BitmapArea, DirtyBitmap
from qdsmirror.core.superblock import Superblock
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.limits import BITMAP_BLOCK_BYTES
from qdsmirror.storage.fingerprint import merged, ranges_text


def empty_bitmap(superblock: Superblock) -> DirtyBitmap:
    """Give a writelog's bitmap without a mark; nothing is read or written."""
    assert superblock.bitmap is not None, "a writelog has a dirty bitmap"
    return DirtyBitmap(superblock.bitmap, superblock.units[0].size, superblock.log)


def initialise_bitmap(device: IBlockDevice, superblock: Superblock) -> None:
    """Write a new log's bitmap, without a mark, durable on return; a journal has none.

    :raises OSError: the device refused.
    """
    if superblock.bitmap is not None:
        bitmap = empty_bitmap(superblock)
        write_blocks(device, bitmap.area, bitmap.blocks(bitmap.clear()))


def read_bitmap(device: IBlockDevice, superblock: Superblock) -> tuple[DirtyBitmap, str]:
    """Read a writelog's bitmap; what of it is damaged, or cannot be read, is marked.

    :returns: the bitmap; what an operator should know of it, or "".
    """
    area, unit = superblock.bitmap, superblock.units[0]
    assert area is not None, "a writelog has a dirty bitmap"
    bitmap = DirtyBitmap(area, unit.size, superblock.log, _read_area(device, area))
    if not bitmap.damaged:
        return bitmap, ""
    places = [area.start + sector * SECTOR_BYTES for sector in bitmap.damaged]
    where = ranges_text(merged([(place, place + SECTOR_BYTES) for place in places]))
    lost = merged(bitmap.damaged_ranges)
    counts = f"{ranges_text(lost)} of the LDSU count as changed" if lost else "nothing stood there"
    return bitmap, (
        f"the dirty bitmap of {unit.name} on {device.path} is damaged ({where}): {counts}; "
        "check that device"
    )


def _read_area(device: IBlockDevice, area: BitmapArea) -> bytes:
    """Read a bitmap's area; zeroes, which no sector of it ever is, for what cannot be read."""
    try:
        return device.pread(area.size, area.start)
    except OSError:
        starts = range(area.start, area.start + area.size, BITMAP_BLOCK_BYTES)
        return b"".join(_read_block(device, start) for start in starts)


def _read_block(device: IBlockDevice, offset: int) -> bytes:
    try:
        return device.pread(BITMAP_BLOCK_BYTES, offset)
    except OSError:
        return bytes(BITMAP_BLOCK_BYTES)


def load_bitmap(device: IBlockDevice, superblock: Superblock) -> tuple[DirtyBitmap, str]:
    """Read a writelog's bitmap, and write anew what of it is damaged, all of it marked.

    :returns: as :func:`read_bitmap`.
    :raises OSError: the device refused a write.
    """
    bitmap, damage = read_bitmap(device, superblock)
    if damage:
        blocks = {sector * SECTOR_BYTES // BITMAP_BLOCK_BYTES for sector in bitmap.damaged}
        write_blocks(device, bitmap.area, bitmap.blocks(sorted(blocks)))
    return bitmap, damage


def write_blocks(
    device: IBlockDevice, area: BitmapArea, blocks: Sequence[tuple[int, bytes]]
) -> None:
    """Write blocks, given by number, and make them durable with one sync for all.

    :raises OSError: the device refused.
    """
    for number, data in blocks:
        device.pwritev([data], area.start + number * BITMAP_BLOCK_BYTES)
    device.fdatasync()
