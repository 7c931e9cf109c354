"""The dirty bitmap of an LDSU: which chunks were written past the writelog (rules.md 12).

A bit is durable before the data-device write that it covers is issued.  Bits are only set: a torn
write of the area leaves each bit as it was or as it was to be, so that it needs no checksum to be
safe.  Where it stands: man page qdswritelog(5).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from qdsmirror.limits import (
    BITMAP_BITS_MAX,
    BITMAP_BLOCK_BYTES,
    BITMAP_CHUNK_BYTES_MIN,
    BITMAP_LOG_SHARE,
)


class BitmapArea(NamedTuple):
    """Where a dirty bitmap stands on its log's device.

    :ivar start: byte offset on the device; ``size``: in bytes.
    :ivar chunk: bytes of the LDSU that one bit stands for.
    """

    start: int
    size: int
    chunk: int

    def covers(self, ldsu_bytes: int) -> bool:
        """Tell whether there is a bit for every byte of an LDSU of this size."""
        return (
            self.size % BITMAP_BLOCK_BYTES == 0
            and self.chunk >= BITMAP_CHUNK_BYTES_MIN
            and self.size * 8 * self.chunk >= ldsu_bytes
        )


def bitmap_area(start: int, ldsu_bytes: int, log_bytes: int, align: int) -> BitmapArea:
    """Give the area for an LDSU's bitmap.

    Chunks are the smallest power of two with which the bitmap has at most a million bits and takes
    at most a sixteenth of the log, yet at least one block.

    :param start: byte offset where the area begins.
    :param log_bytes: size of the log's device.
    :param align: the area's size is a multiple of this.
    """
    block_bits = BITMAP_BLOCK_BYTES * 8
    bits = min(BITMAP_BITS_MAX, log_bytes // BITMAP_LOG_SHARE * 8 // block_bits * block_bits)
    bits = max(bits, block_bits)
    chunk = BITMAP_CHUNK_BYTES_MIN
    while -(-ldsu_bytes // chunk) > bits:
        chunk *= 2
    unit = max(align, BITMAP_BLOCK_BYTES)
    return BitmapArea(start, max(1, -(-ldsu_bytes // (8 * chunk * unit))) * unit, chunk)


class DirtyBitmap:
    """The bits of one LDSU in memory.

    :param area: its place on the log's device.
    :param ldsu_bytes: size of the LDSU.
    :param stored: the area's content; all clear where it is ``None``.
    """

    def __init__(self, area: BitmapArea, ldsu_bytes: int, stored: bytes | None = None) -> None:
        self.area = area
        self._ldsu_bytes = ldsu_bytes
        self._bytes = bytearray(stored if stored is not None else area.size)
        assert len(self._bytes) == area.size

    def mark(self, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """Set the bits of byte ranges, given as (offset, length).

        :returns: the area's blocks that changed, by number, in order.
        """
        changed: set[int] = set()
        chunk, stored = self.area.chunk, self._bytes
        for offset, length in ranges:
            first, last = offset // chunk, (offset + length - 1) // chunk
            while first <= last:
                at, bit = divmod(first, 8)
                if not bit and last - first >= 7:
                    # Whole bytes at once: a trim may cover a whole device.
                    end = (last + 1) // 8
                    before = stored[at:end]
                    full = b"\xff" * (end - at)
                    if before != full:
                        stored[at:end] = full
                        changed.update(range(at // BITMAP_BLOCK_BYTES,
                                             (end - 1) // BITMAP_BLOCK_BYTES + 1))  # fmt: skip
                    first = end * 8
                    continue
                if not stored[at] >> bit & 1:
                    stored[at] |= 1 << bit
                    changed.add(at // BITMAP_BLOCK_BYTES)
                first += 1
        return sorted(changed)

    def block(self, number: int) -> bytes:
        """Give one block of the area as it is to be stored."""
        start = number * BITMAP_BLOCK_BYTES
        return bytes(self._bytes[start : start + BITMAP_BLOCK_BYTES])

    def is_marked(self, offset: int) -> bool:
        """Tell whether the chunk of this byte is dirty."""
        at, bit = divmod(offset // self.area.chunk, 8)
        return bool(self._bytes[at] >> bit & 1)

    def clear(self) -> None:
        """Clear every bit."""
        self._bytes[:] = bytes(len(self._bytes))

    @property
    def dirty_bytes(self) -> int:
        """Bytes of the LDSU in dirty chunks."""
        count = int.from_bytes(self._bytes, "little").bit_count()
        if count and self.is_marked(self._ldsu_bytes - 1):
            # The last chunk may end with the device.
            short = -self._ldsu_bytes % self.area.chunk
            return count * self.area.chunk - short
        return count * self.area.chunk
