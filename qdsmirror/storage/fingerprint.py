"""Finds out whether a device was changed while nobody of ours had it open (rules.md 24).

At an orderly stop, when everything is applied and synced, the hashes of what each device then holds
in some places are recorded in its log's superblock: of its first and last MiB, which whoever makes
a file system or partitions touches, and of what was written last, which an older copy lacks.  The
next start compares them and removes them, durably, before anything is written: after a crash there
are none, and nothing is claimed.  Everything here blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from qdsmirror.core.superblock import Superblock, pack_slot
from qdsmirror.errors import CorruptError, LimitError
from qdsmirror.limits import (
    FINGERPRINT_CHUNK_BYTES,
    FINGERPRINT_CHUNKS_MAX,
    FINGERPRINT_END_BYTES,
    FINGERPRINT_RANGES_SHOWN,
)

if TYPE_CHECKING:
    from qdsmirror.interfaces import IBlockDevice

_HASH_BYTES = 16
#: Of the superblock's slot; what stands there later may be longer.
_SLOT_KEPT_BYTES = 2048
#: Of one LDSU's JSON: the two ends with their names, and one chunk.
_ENDS_BYTES = 128
_CHUNK_JSON_BYTES = 60


def fingerprint(device: IBlockDevice, chunks_max: int = FINGERPRINT_CHUNKS_MAX) -> dict[str, Any]:
    """Hash what a device holds at its ends and where it was written last.

    :param chunks_max: of how many chunks at most.
    :raises OSError: it cannot be read.
    """
    return {
        "first": _hash(device, 0, FINGERPRINT_END_BYTES),
        "last": _hash(device, device.size - FINGERPRINT_END_BYTES, FINGERPRINT_END_BYTES),
        "chunks": [[n, _chunk(device, n)] for n in sorted(device.recent.chunks()[:chunks_max])],
    }


def changed_ranges(device: IBlockDevice, recorded: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Give the (first, end) byte ranges that hold something else than was recorded.

    :raises CorruptError: the record cannot be read.
    :raises OSError: the device cannot be read.
    """
    found = []
    try:
        if _hash(device, 0, FINGERPRINT_END_BYTES) != recorded["first"]:
            found.append((0, min(FINGERPRINT_END_BYTES, device.size)))
        for number, known in recorded["chunks"]:
            if _chunk(device, int(number)) != known:
                start = int(number) * FINGERPRINT_CHUNK_BYTES
                found.append((start, min(start + FINGERPRINT_CHUNK_BYTES, device.size)))
        start = device.size - FINGERPRINT_END_BYTES
        if _hash(device, start, FINGERPRINT_END_BYTES) != recorded["last"]:
            found.append((max(0, start), device.size))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{device.path}: its fingerprints cannot be read: {error!r}") from error
    return merged(found)


def ranges_text(ranges: list[tuple[int, int]]) -> str:
    """Name byte ranges in words, the first few of them."""
    shown = [f"{first} to {end - 1}" for first, end in ranges[:FINGERPRINT_RANGES_SHOWN]]
    more = len(ranges) - len(shown)
    return "bytes " + ", ".join(shown) + (f" and {more} more ranges" if more else "")


def chunks_for(superblock: Superblock) -> int | None:
    """Give how many chunks of each LDSU a superblock has room for; ``None``: not even the ends."""
    try:
        # Its body ends with a brace; what follows fills the last block.
        used = len(pack_slot(superblock, 0).rstrip(b"\0"))
    except LimitError:
        return None
    room = superblock.slot_bytes - used - _SLOT_KEPT_BYTES
    each = room // len(superblock.units) - _ENDS_BYTES
    return min(each // _CHUNK_JSON_BYTES, FINGERPRINT_CHUNKS_MAX) if each >= 0 else None


def _chunk(device: IBlockDevice, number: int) -> str:
    return _hash(device, number * FINGERPRINT_CHUNK_BYTES, FINGERPRINT_CHUNK_BYTES)


def _hash(device: IBlockDevice, start: int, length: int) -> str:
    """Hash the part of a range that the device has."""
    first = max(0, start)
    data = device.pread(max(0, min(start + length, device.size) - first), first)
    return blake3(data).hexdigest(length=_HASH_BYTES)


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that touch or overlap, in order."""
    joined: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((first, end))
    return joined
