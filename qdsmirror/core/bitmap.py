"""The dirty bitmap of an LDSU: which chunks were written past the writelog (rules.md 12).

A bit is durable before the data-device write that it covers is issued.  A mark that is lost would
lose a change without a word, so each sector of the area has a CRC over itself, its number and the
log's UUID: of a sector that is damaged, another's or another log's, every bit counts as set.  A
sector is written as a whole or not at all, so that a torn write leaves only valid ones, each as it
was or as it was to be; where bits were being cleared, an old mark more does no harm.  Where it
stands: man page qdswritelog(5).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from crc32c import crc32c

from qdsmirror.limits import (
    BITMAP_BITS_MAX,
    BITMAP_BLOCK_BYTES,
    BITMAP_CHUNK_BYTES_MIN,
    BITMAP_LOG_SHARE,
)

#: A sector: magic, bits, CRC.  Without the magic, one of nothing but zeroes might be valid.
SECTOR_BYTES = 512
_MAGIC = b"QDSDIRTY"
_CRC_BYTES = 4
_SECTOR_BITS_BYTES = SECTOR_BYTES - len(_MAGIC) - _CRC_BYTES
SECTOR_BITS = 8 * _SECTOR_BITS_BYTES
_BLOCK_SECTORS = BITMAP_BLOCK_BYTES // SECTOR_BYTES
_BLOCK_BITS_BYTES = _BLOCK_SECTORS * _SECTOR_BITS_BYTES


class BitmapArea(NamedTuple):
    """Where a dirty bitmap stands on its log's device.

    :ivar start: byte offset on the device; ``size``: in bytes.
    :ivar chunk: bytes of the LDSU that one bit stands for.
    """

    start: int
    size: int
    chunk: int

    @property
    def blocks(self) -> int:
        """How many blocks it has: it is written in these."""
        return self.size // BITMAP_BLOCK_BYTES

    def covers(self, ldsu_bytes: int) -> bool:
        """Tell whether there is a bit for every byte of an LDSU of this size."""
        return (
            self.size % BITMAP_BLOCK_BYTES == 0
            and self.chunk >= BITMAP_CHUNK_BYTES_MIN
            and self.blocks * _BLOCK_BITS_BYTES * 8 * self.chunk >= ldsu_bytes
        )


def bitmap_area(start: int, ldsu_bytes: int, log_bytes: int, align: int) -> BitmapArea:
    """Give the area for an LDSU's bitmap.

    Chunks are the smallest power of two with which the bitmap has at most a million bits and takes
    at most a sixteenth of the log, yet at least one block.

    :param start: byte offset where the area begins.
    :param log_bytes: size of the log's device.
    :param align: the area's size is a multiple of this.
    """
    block_bits = _BLOCK_BITS_BYTES * 8
    log_blocks = log_bytes // (BITMAP_LOG_SHARE * BITMAP_BLOCK_BYTES)
    bits = max(min(BITMAP_BITS_MAX, log_blocks * block_bits), block_bits)
    chunk = BITMAP_CHUNK_BYTES_MIN
    while -(-ldsu_bytes // chunk) > bits:
        chunk *= 2
    blocks = max(1, -(-ldsu_bytes // (chunk * block_bits)))
    unit = max(align, BITMAP_BLOCK_BYTES)
    return BitmapArea(start, -(-blocks * BITMAP_BLOCK_BYTES // unit) * unit, chunk)


def _pack_sector(log: bytes, number: int, bits: bytes) -> bytes:
    head = _MAGIC + bits
    return head + crc32c(head, crc32c(log + number.to_bytes(8, "big"))).to_bytes(_CRC_BYTES, "big")


def _lowest(bits: int) -> int:
    """Give the number of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1


class DirtyBitmap:
    """The bits of one LDSU in memory.

    :param area: its place on the log's device.
    :param ldsu_bytes: size of the LDSU.
    :param log: the log's UUID.
    :param stored: the area's content; all clear where it is ``None``.
    :ivar damaged: the numbers of the sectors in ``stored`` that were not valid: everything that
        they stand for is marked, here only.
    """

    def __init__(
        self, area: BitmapArea, ldsu_bytes: int, log: bytes, stored: bytes | None = None
    ) -> None:
        self.area = area
        self.damaged: list[int] = []
        self._ldsu_bytes = ldsu_bytes
        self._log = log
        self._bits = bytearray(area.blocks * _BLOCK_BITS_BYTES)
        if stored is not None:
            self._load(stored)

    def _load(self, stored: bytes) -> None:
        assert len(stored) == self.area.size
        for number in range(self.area.blocks * _BLOCK_SECTORS):
            sector = stored[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES]
            bits = sector[len(_MAGIC) : -_CRC_BYTES]
            if sector == _pack_sector(self._log, number, bits):
                at = number * _SECTOR_BITS_BYTES
                self._bits[at : at + _SECTOR_BITS_BYTES] = bits
            else:
                self.damaged.append(number)
        self.mark((first, end - first) for first, end in self.damaged_ranges)

    @property
    def damaged_ranges(self) -> list[tuple[int, int]]:
        """The (first, end) bytes of the LDSU that ``damaged`` stands for, in order."""
        covered = SECTOR_BITS * self.area.chunk
        firsts = [covered * sector for sector in self.damaged]
        # The area's last sectors may stand for nothing.
        return [(at, min(at + covered, self._ldsu_bytes)) for at in firsts if at < self._ldsu_bytes]

    def mark(self, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """Set the bits of byte ranges, given as (offset, length).

        :returns: the area's blocks that changed, by number, in order.
        """
        changed: set[int] = set()
        chunk, bits = self.area.chunk, self._bits
        for offset, length in ranges:
            first, last = offset // chunk, (offset + length - 1) // chunk
            while first <= last:
                at, bit = divmod(first, 8)
                if not bit and last - first >= 7:
                    # A block's whole bytes at once: a trim may cover a whole device.
                    block = at // _BLOCK_BITS_BYTES
                    end = min((last + 1) // 8, (block + 1) * _BLOCK_BITS_BYTES)
                    full = b"\xff" * (end - at)
                    if bits[at:end] != full:
                        bits[at:end] = full
                        changed.add(block)
                    first = end * 8
                    continue
                if not bits[at] >> bit & 1:
                    bits[at] |= 1 << bit
                    changed.add(at // _BLOCK_BITS_BYTES)
                first += 1
        return sorted(changed)

    def keep(self, other: DirtyBitmap) -> list[int]:
        """Clear the bits that are not set in another bitmap of the same LDSU and area.

        :returns: the area's blocks that changed, by number, in order.
        """
        changed = []
        for block in range(self.area.blocks):
            at = block * _BLOCK_BITS_BYTES
            end = at + _BLOCK_BITS_BYTES
            ours = int.from_bytes(self._bits[at:end], "little")
            kept = ours & int.from_bytes(other._bits[at:end], "little")
            if kept != ours:
                self._bits[at:end] = kept.to_bytes(_BLOCK_BITS_BYTES, "little")
                changed.append(block)
        return changed

    def clear(self) -> list[int]:
        """Clear every bit.

        :returns: the area's blocks, all of them: what is stored there does not matter any more.
        """
        self._bits[:] = bytes(len(self._bits))
        return list(range(self.area.blocks))

    def blocks(self, numbers: Iterable[int]) -> list[tuple[int, bytes]]:
        """Give blocks of the area, by number, as they are to be stored."""
        return [(number, self._block(number)) for number in numbers]

    def _block(self, number: int) -> bytes:
        packed = []
        for sector in range(number * _BLOCK_SECTORS, (number + 1) * _BLOCK_SECTORS):
            at = sector * _SECTOR_BITS_BYTES
            bits = bytes(self._bits[at : at + _SECTOR_BITS_BYTES])
            packed.append(_pack_sector(self._log, sector, bits))
        return b"".join(packed)

    def is_marked(self, offset: int) -> bool:
        """Tell whether the chunk of this byte is dirty."""
        at, bit = divmod(offset // self.area.chunk, 8)
        return bool(self._bits[at] >> bit & 1)

    def dirty_bytes(self, offset: int = 0) -> int:
        """Give the bytes of the LDSU in dirty chunks, from a byte on."""
        chunk = self.area.chunk
        bits = self._bits_from(offset // chunk)
        count = bits.bit_count() * chunk - (offset % chunk if bits & 1 else 0)
        # The last chunk may end with the device.
        last = bits and self.is_marked(self._ldsu_bytes - 1)
        return count - (-self._ldsu_bytes % chunk if last else 0)

    def next_dirty(self, offset: int) -> tuple[int, int] | None:
        """Give the first and the end byte of what is dirty without a gap, from a byte on.

        :returns: ``None`` where nothing is.
        """
        first = offset // self.area.chunk
        bits = self._bits_from(first)
        if not bits or offset >= self._ldsu_bytes:
            return None
        gap = _lowest(bits)
        end = first + gap + _lowest(~(bits >> gap))
        start = max(offset, (first + gap) * self.area.chunk)
        return start, min(end * self.area.chunk, self._ldsu_bytes)

    def _bits_from(self, chunk: int) -> int:
        """Give the bits as a number, the first of them of this chunk."""
        return int.from_bytes(self._bits[chunk // 8 :], "little") >> chunk % 8
