"""The extension devices of a group's pool: their headers, and who has them.

Before a log's superblock names a device, the device's header names the log; after the superblock
names it no more, the header calls it free.  A crash in between leaves a header that claims what no
superblock grants: the device is free (man page qdswritelog(5)).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from qdsmirror.core.extension import (
    EXTENSION_SLOT_BYTES,
    ExtensionHeader,
    extension_slot_bytes,
    pack_extension,
    parse_extension,
)
from qdsmirror.core.superblock import SLOT_BYTES, Superblock
from qdsmirror.errors import BrokenError, CorruptError, DeviceError, QdsError
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.limits import EXTENSIONS_PER_GROUP_MAX

_BLOCK = 4096


class PoolDevice:
    """An open device of a group's pool, free or chained to a log.

    :ivar header: as last written.
    :ivar failure: why its header could not be written when it was freed; ``None`` if it could.
    """

    def __init__(self, device: IBlockDevice, header: ExtensionHeader) -> None:
        self.device = device
        self.header = header
        self.failure: OSError | QdsError | None = None

    def __repr__(self) -> str:
        return f"<PoolDevice {self.device.path} {self.id.hex()}>"

    @property
    def id(self) -> bytes:
        """The device's own UUID."""
        return self.header.id

    @classmethod
    def open(cls, device: IBlockDevice, group: int, *, failed: bool = False) -> PoolDevice:
        """Take a device that was made an extension of this group.

        What a killed process left in the page cache is made durable first (rules.md 3).

        :param failed: a log that may have it has failed, and is read for what can still be had of
            it, page cache included (rules.md 13).
        :raises CorruptError: it holds no intact header.
        :raises BrokenError: it is of another group's pool.
        :raises DeviceError: it is smaller than it was.
        """
        if not failed:
            _make_durable(device)
        header = read_extension(device)
        if header.group != group:
            raise BrokenError(
                f"{device.path} is an extension of dsgrp{header.group:03d}'s pool, "
                f"not of dsgrp{group:03d}'s",
                hint="name the right device",
            )
        if device.size < header.size:
            raise DeviceError(
                f"{device.path} has {device.size} bytes, but was made an extension with "
                f"{header.size}",
                hint="restore the device to its size",
            )
        return cls(device, header)

    @classmethod
    def initialise(cls, device: IBlockDevice, group: int) -> PoolDevice:
        """Make a device a free extension of a group's pool; durable on return.

        :raises DeviceError: its blocks are too large, or it is too small.
        """
        slot_bytes = check_extension(device)
        header = ExtensionHeader(os.urandom(16), group, device.size, slot_bytes)
        for place in {*EXTENSION_SLOT_BYTES, *SLOT_BYTES} - {slot_bytes}:
            # A forgotten second slot, of another size or a log's, must not be found again.
            if place + _BLOCK <= device.size:
                device.pwritev([bytes(_BLOCK)], place)
        extension = cls(device, header)
        extension.own(b"")
        return extension

    def own(self, log: bytes) -> None:
        """Record in both slots, one after the other, which log has it; empty: none.

        :raises OSError: the device refuses.
        """
        header = self.header.renewed(log)
        for turn in range(2):
            slot = (header.counter + turn) % 2
            self.device.pwritev([pack_extension(header, slot)], slot * header.slot_bytes)
            self.device.fdatasync()
        self.header = header

    def release(self) -> None:
        """Record that no log has it any more; what fails is kept in ``failure``.

        No superblock names it by now, so that it counts as free whatever its header says.
        """
        try:
            self.own(b"")
        except (OSError, QdsError) as error:
            self.failure = error


def _make_durable(device: IBlockDevice) -> None:
    device.fdatasync()
    device.drop_cache()


def check_extension(device: IBlockDevice) -> int:
    """Look whether a device can be an extension; give the size of its header's slots.

    :raises DeviceError: its blocks are too large, or it is too small.
    """
    slot_bytes = extension_slot_bytes(device.physical_block)
    header = ExtensionHeader(bytes(16), 0, device.size, slot_bytes)
    header.extent(1, max(_BLOCK, device.physical_block))
    return slot_bytes


def read_extension(device: IBlockDevice) -> ExtensionHeader:
    """Find the newest intact header of an extension device.

    :raises CorruptError: neither slot is intact.
    :raises OSError: the device cannot be read.
    """
    found: list[ExtensionHeader] = []
    places = [(0, 0), *((1, size) for size in EXTENSION_SLOT_BYTES)]
    for slot, place in places:
        length = min(_BLOCK, device.size - place)
        if length <= 0:
            continue
        try:
            header = parse_extension(device.pread(length, place), slot, place)
        except CorruptError:
            continue
        # Larger places may lie in what a log has written.
        if not found or header.slot_bytes == found[0].slot_bytes:
            found.append(header)
    if not found:
        raise CorruptError(
            f"{device.path} holds no intact extension header",
            hint="make it an extension again; a log that needs it is lost",
        )
    return max(found, key=lambda header: header.counter)


def open_pool(
    paths: Sequence[str],
    group: int,
    open_device: Callable[..., IBlockDevice],
    *,
    failed: bool = False,
) -> tuple[list[PoolDevice], dict[str, QdsError]]:
    """Open and lock what can be opened of a group's pool.

    :param failed: see :meth:`PoolDevice.open`.
    :returns: the devices, and by their paths what is wrong with the others: only a log that needs
        one of these is refused.
    """
    assert len(paths) <= EXTENSIONS_PER_GROUP_MAX
    found: list[PoolDevice] = []
    problems: dict[str, QdsError] = {}
    for path in paths:
        try:
            device = open_device(path, writable=True, role="extension")
        except QdsError as error:
            problems[path] = error
            continue
        try:
            found.append(PoolDevice.open(device, group, failed=failed))
        except (OSError, QdsError) as error:
            device.close()
            problems[path] = (
                error if isinstance(error, QdsError) else DeviceError(f"extension {path}: {error}")
            )
    return found, problems


def find_chained(
    device: IBlockDevice, superblock: Superblock, pool: Sequence[PoolDevice], *, failed: bool
) -> dict[int, PoolDevice]:
    """Find the extensions of the log on a device among those of the pool; give them by number.

    :param failed: see :meth:`PoolDevice.open`.
    :raises DeviceError: one is missing.
    :raises CorruptError: one is not as the log has left it.
    """
    by_id = {extension.id: extension for extension in pool}
    found = {}
    for number, identity, size, _ in superblock.extensions:
        extension = by_id.get(identity)
        if extension is None:
            raise DeviceError(
                f"extension {number} ({identity.hex()}) of the log {device.path} is missing",
                hint="bring the device back; the log cannot be read without it",
            )
        header = extension.header
        if header.log != superblock.log or header.size != size:
            raise CorruptError(
                f"{extension.device.path} is not what extension {number} of the log {device.path} "
                "was last: its header is of another time",
                hint="bring the right device back, not an older copy of it",
            )
        if not failed:
            # Where another log of the group has failed, nobody else has done it.
            _make_durable(extension.device)
        found[number] = extension
    return found
