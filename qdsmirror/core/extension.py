"""What stands on an extension device of a writelog, and what a writelog says of it.

An extension device belongs to the pool of a group, or to the log that its header names and that
names it in its superblock; the log's word is the one that counts (man page qdswritelog(5)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qdsmirror.core.frames import Buffer
from qdsmirror.core.ring import Extent, align_up
from qdsmirror.core.slots import Form, seal, unseal
from qdsmirror.errors import DeviceError
from qdsmirror.limits import EXTENSION_RECORDS_MIN, KIB, RECORD_ALIGN_BYTES

EXTENSION_MAGIC = b"QDSEXTND"
#: Sizes that a header's slot may have: at least a physical block (rules.md 5).
EXTENSION_SLOT_BYTES = (4 * KIB, 64 * KIB, 1024 * KIB)
_FORM = Form("extension header", EXTENSION_MAGIC, 1, EXTENSION_SLOT_BYTES)


class Extension(NamedTuple):
    """An extension as its log's superblock names it.

    :ivar number: of the device in the log's extents, from 1.
    :ivar id: the device's own UUID; ``size`` in bytes.
    :ivar leaving: it is being freed: its extents go as the tail passes them.
    """

    number: int
    id: bytes
    size: int
    leaving: bool = False


@dataclass(frozen=True)
class ExtensionHeader:
    """What an extension device says of itself.

    :ivar id: its UUID, new at each initialisation; ``size``: of the device then, in bytes.
    :ivar group: in whose pool it is.
    :ivar log: UUID of the log that has it, or empty while it is free.
    :ivar slot_bytes: the second slot starts where the first ends.
    """

    id: bytes
    group: int
    size: int
    slot_bytes: int
    log: bytes = b""
    counter: int = 0

    def renewed(self, log: bytes) -> ExtensionHeader:
        """Give the next header, with another owner."""
        return replace(self, log=log, counter=self.counter + 1)

    def extent(self, number: int, align: int) -> Extent:
        """Give what a log with this alignment can use.

        :raises DeviceError: it is too little.
        """
        start = align_up(2 * self.slot_bytes, align)
        length = (self.size - start) // align * align
        if length < EXTENSION_RECORDS_MIN * align:
            raise DeviceError(
                f"an extension of a log on blocks of {align} bytes needs "
                f"{start + EXTENSION_RECORDS_MIN * align} bytes at least, not {self.size}",
                hint="give a larger device",
            )
        return Extent(number, start, length)


def extension_slot_bytes(physical_block: int) -> int:
    """Give the size of a header's slot on a device with such blocks.

    :raises DeviceError: they are larger than any slot.
    """
    for size in EXTENSION_SLOT_BYTES:
        if max(physical_block, RECORD_ALIGN_BYTES) <= size:
            return size
    raise DeviceError(f"no extension can be on blocks of {physical_block} bytes")


def pack_extension(header: ExtensionHeader, slot: int) -> bytes:
    """Make the bytes of an extension header's slot 0 or 1."""
    body = {
        "id": header.id.hex(),
        "group": header.group,
        "size": header.size,
        "log": header.log.hex() or None,
    }
    return seal(_FORM, slot, header.slot_bytes, header.counter, body)


def parse_extension(raw: Buffer, slot: int, slot_bytes: int) -> ExtensionHeader:
    """Read an extension header's slot.

    :param slot_bytes: the slot size that this place implies; ``0`` accepts any (slot 0).
    :raises CorruptError: it is not an intact header for this slot.
    """
    return unseal(_FORM, raw, slot, slot_bytes, _read)


def _read(body: Mapping[str, Any], counter: int, slot_bytes: int) -> ExtensionHeader:
    header = ExtensionHeader(
        id=bytes.fromhex(body["id"]),
        group=body["group"],
        size=body["size"],
        slot_bytes=slot_bytes,
        log=bytes.fromhex(body["log"]) if body["log"] is not None else b"",
        counter=counter,
    )
    if (
        len(header.id) != 16
        or len(header.log) not in (0, 16)
        or type(header.group) is not int
        or type(header.size) is not int
        or header.size < 2 * slot_bytes
    ):
        raise ValueError("a member is out of range")
    return header
