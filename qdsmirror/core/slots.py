"""A block of metadata under one checksum, as it stands in a slot (man page qdswritelog(5)).

A slot is a fixed header and a JSON body; two slots are written in turn, and the larger counter
holds.  Superblocks of logs and the headers of extension devices have this form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from struct import Struct
from typing import Any, NamedTuple, TypeVar

from crc32c import crc32c

from qdsmirror.core.frames import Buffer
from qdsmirror.core.ring import align_up
from qdsmirror.errors import CorruptError, LimitError
from qdsmirror.limits import RECORD_ALIGN_BYTES

# magic version slot zero body_bytes slot_bytes counter, then the CRC of these and the body
_HEADER = Struct(">8sHBBIIQ")
HEADER_BYTES = _HEADER.size + 4


_T = TypeVar("_T")


class Form(NamedTuple):
    """A kind of metadata block: what it is called in messages, its magic, its version.

    :ivar sizes: those that a slot of it may have, in bytes.
    """

    name: str
    magic: bytes
    version: int
    sizes: tuple[int, ...]


def seal(form: Form, slot: int, slot_bytes: int, counter: int, body: Mapping[str, Any]) -> bytes:
    """Make the bytes of slot 0 or 1, padded to whole 4096-byte blocks.

    :raises LimitError: the body does not fit the slot.
    """
    raw = json.dumps(body, separators=(",", ":")).encode()
    length = HEADER_BYTES + len(raw)
    if length > slot_bytes:
        raise LimitError(f"{form.name} of {length} bytes is over its slot's {slot_bytes}")
    head = _HEADER.pack(form.magic, form.version, slot, 0, len(raw), slot_bytes, counter)
    sealed = head + crc32c(raw, crc32c(head)).to_bytes(4, "big") + raw
    return sealed.ljust(align_up(length, RECORD_ALIGN_BYTES), b"\0")


def unseal(
    form: Form, raw: Buffer, slot: int, slot_bytes: int, read: Callable[[Any, int, int], _T]
) -> _T:
    """Read a slot; no field is believed before the checksum matches.

    :param slot: which slot these bytes were read from.
    :param slot_bytes: the slot size that this place implies; ``0`` accepts any (slot 0).
    :param read: makes the result of the body, the counter and the slot's size; what it finds wrong
        it says by the exceptions of reading what is not there, or a ValueError.
    :raises CorruptError: it is not an intact block of this form and version for this slot.
    """
    view = memoryview(raw)
    if len(view) < HEADER_BYTES or view[:8] != form.magic:
        raise CorruptError(f"{form.name} slot {slot}: not initialised")
    _, version, number, _, body_bytes, size, counter = _HEADER.unpack(view[: _HEADER.size])
    body = view[HEADER_BYTES : HEADER_BYTES + body_bytes]
    stored = int.from_bytes(view[_HEADER.size : HEADER_BYTES], "big")
    if len(body) != body_bytes or crc32c(body, crc32c(view[: _HEADER.size])) != stored:
        raise CorruptError(f"{form.name} slot {slot}: checksum mismatch")
    if number != slot:
        raise CorruptError(f"{form.name} slot {slot}: holds slot {number} of {size} bytes")
    if version != form.version:
        raise CorruptError(
            f"{form.name} format version {version} is unknown here (this is version {form.version})"
        )
    if size not in form.sizes or slot_bytes not in (0, size):
        raise CorruptError(f"{form.name} slot {slot}: of {size} bytes")
    try:
        return read(json.loads(bytes(body)), counter, size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{form.name} slot {slot}: body cannot be read: {error}") from error
