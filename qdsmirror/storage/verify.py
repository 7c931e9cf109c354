"""Compares parts of a mirror device with the hashes that a VERIFY frame brought.

Everything here blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

from qdsmirror.core.verify import ZEROES, Range, Row, joined
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.limits import VERIFY_CHUNK_BYTES


def differing(device: IBlockDevice, rows: Sequence[Row]) -> list[Range]:
    """Give the ranges that differ from what was hashed, or that cannot be read.

    :param rows: at least one; neighbours.

    What is read comes from the disk, but for what is not yet synced: damage under a page that is
    cached would be found too late.
    """
    first = min(row.offset for row in rows)
    device.drop_cache(first, max(row.offset + row.length for row in rows) - first)
    found: list[Range] = []
    for offset, length, digest in rows:
        if digest == ZEROES:
            found += _not_zero(device, offset, length)
        elif not _holds(device, offset, length, digest):
            found.append((offset, length))
    return joined(found)


def _holds(device: IBlockDevice, offset: int, length: int, digest: bytes) -> bool:
    try:
        return blake3(device.pread(length, offset)).digest() == digest
    except OSError:
        return False


def _not_zero(device: IBlockDevice, offset: int, length: int) -> list[Range]:
    """Give the chunks of a range that hold anything but zeroes."""
    found: list[Range] = []
    end = offset + length
    while offset < end:
        try:
            offset += device.hole(offset, end - offset)
            size = min(VERIFY_CHUNK_BYTES, end - offset)
            differs = device.pread(size, offset) != bytes(size)
        except OSError:
            size = min(VERIFY_CHUNK_BYTES, end - offset)
            differs = True
        if differs:
            found.append((offset, size))
        offset += size
    return found
