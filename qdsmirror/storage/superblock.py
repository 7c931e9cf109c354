"""Finds the superblock of a log on its device."""

from __future__ import annotations

from contextlib import suppress

from qdsmirror.core.superblock import SLOT_BYTES, Superblock, parse_slot
from qdsmirror.errors import CorruptError
from qdsmirror.interfaces import IBlockDevice


def read_superblock(device: IBlockDevice) -> Superblock:
    """Find the newest intact superblock of a log.

    :raises CorruptError: neither slot is intact.
    :raises OSError: the device cannot be read.
    """
    try:
        first = _read_slot(device, 0, 0, SLOT_BYTES[-1])
    except CorruptError as error:
        # Where the slots are small, the larger places lie in the ring, and what stands there may
        # have been written by an application: the first that holds a slot is the one.
        for place in SLOT_BYTES:
            try:
                return _read_slot(device, 1, place, place)
            except CorruptError:
                continue
        raise CorruptError(
            f"{device.path} holds no intact log: {error.message}",
            hint="initialise it with qdswlinit(1) if it was never used",
        ) from error
    try:
        second = _read_slot(device, 1, first.slot_bytes, first.slot_bytes)
    except CorruptError:
        return first
    return max(first, second, key=lambda s: s.counter)


def _read_slot(device: IBlockDevice, slot: int, place: int, slot_bytes: int) -> Superblock:
    room = max(0, min(slot_bytes, device.size - place)) // 512 * 512
    # Most bodies are short, however large the slot: the checksum says whether this one is.
    with suppress(CorruptError):
        return parse_slot(device.pread(min(room, 4096), place), slot, place)
    return parse_slot(device.pread(room, place), slot, place)
