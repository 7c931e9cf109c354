"""Before-images: what parts of a mirror held before a refresh began to change them (rules.md 15).

They stand in an area of their own on the journal's device, one record behind the other from its
start (man page qdswritelog(5)).  A record is a block of 4096 bytes, its header and a table of the
parts, and their contents; one CRC-32C protects the block, another the contents.  The log's UUID,
the period's id and the record's number tell it from others that stood there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from struct import Struct
from typing import Any, NamedTuple

from crc32c import crc32c

from qdsmirror.core.frames import NUMBERS_END, Buffer
from qdsmirror.core.ring import align_up
from qdsmirror.errors import CorruptError
from qdsmirror.limits import BEFORE_AREA_BYTES_MIN, BEFORE_CHUNK_BYTES

_MAGIC = b"QDSBEFOR"
_VERSION = 1
#: magic, version, zero, parts, bytes of the contents, log, period, number, CRC of the contents
_HEAD = Struct(">8sHHII16s16sQI")
#: LDSU, length, offset, 1 where a content follows (0: zeroes)
_ROW = Struct(">IIQI")
_CRC_BYTES = 4
BLOCK_BYTES = 4096
#: Parts of one record.
ROWS_MAX = (BLOCK_BYTES - _HEAD.size - _CRC_BYTES) // _ROW.size


class Image(NamedTuple):
    """What a part of a mirror device held.

    :ivar offset: in bytes, and ``length``.
    :ivar data: ``None`` for zeroes.
    """

    ldsu: int
    offset: int
    length: int
    data: bytes | None


class Part(NamedTuple):
    """A row of a record: an image without its content."""

    ldsu: int
    offset: int
    length: int
    has_data: bool


class Table(NamedTuple):
    """A record's block, read.

    :ivar payload_bytes: of the contents, which follow the block; ``payload_crc``: of these.
    """

    parts: list[Part]
    payload_bytes: int
    payload_crc: int


def record_bytes(images: Sequence[Image], align: int) -> int:
    """Give the bytes that a record of these takes, rounded up to ``align``."""
    return align_up(BLOCK_BYTES + sum(one.length for one in images if one.data is not None), align)


def pack_record(log: bytes, period: bytes, number: int, images: Sequence[Image]) -> list[Buffer]:
    """Make a record, at most ROWS_MAX images: its block and the contents."""
    contents: list[Buffer] = [one.data for one in images if one.data is not None]
    crc = 0
    for content in contents:
        crc = crc32c(content, crc)
    head = _HEAD.pack(
        _MAGIC, _VERSION, 0, len(images), sum(map(len, contents)), log, period, number, crc
    )
    rows = [_ROW.pack(i.ldsu, i.length, i.offset, i.data is not None) for i in images]
    block = b"".join([head, *rows]).ljust(BLOCK_BYTES - _CRC_BYTES, b"\0")
    return [block + crc32c(block).to_bytes(_CRC_BYTES, "big"), *contents]


def parse_block(raw: Buffer, log: bytes, period: bytes) -> tuple[int, Table]:
    """Read a record's block; give its number too.

    :param raw: BLOCK_BYTES.
    :raises CorruptError: it is not an intact one of this log and this period.
    """
    block = memoryview(raw)[: BLOCK_BYTES - _CRC_BYTES]
    if block[:8] != _MAGIC:
        raise CorruptError("no before-images here")
    if crc32c(block) != int.from_bytes(raw[BLOCK_BYTES - _CRC_BYTES : BLOCK_BYTES], "big"):
        raise CorruptError("before-images: checksum mismatch")
    _, version, _, count, size, log_found, period_found, number, crc = _HEAD.unpack_from(block)
    if version != _VERSION or count > ROWS_MAX:
        raise CorruptError(f"before-images: version {version}, {count} parts")
    if (log_found, period_found) != (log, period):
        raise CorruptError("before-images of another time")
    rows = _ROW.iter_unpack(block[_HEAD.size : _HEAD.size + count * _ROW.size])
    parts = [Part(ldsu, offset, length, bool(data)) for ldsu, length, offset, data in rows]
    if size != sum(part.length for part in parts if part.has_data):
        raise CorruptError("before-images: table and contents differ in length")
    return number, Table(parts, size, crc)


class Period(NamedTuple):
    """The time since a mirror was last usable, as the journal's superblock has it.

    :ivar id: 16 random bytes, hexadecimal: of its before-images.
    :ivar gsn: the last one on the mirror when it was usable.
    :ivar bypass: as the superblock said then.
    :ivar lost: why it cannot be rolled back any more; empty while it can.
    """

    id: str
    gsn: int
    bypass: Mapping[str, Any] | None = None
    lost: str = ""

    def to_json(self) -> dict[str, Any]:
        """Give the form that stands in a superblock."""
        return self._asdict()

    @classmethod
    def from_json(cls, body: Mapping[str, Any] | None) -> Period | None:
        """Read :meth:`to_json`'s form.

        :raises ValueError: a value is out of range; TypeError: of another form.
        """
        if body is None:
            return None
        period = cls(**body)
        if (
            len(bytes.fromhex(period.id)) != 16
            or type(period.gsn) is not int
            or not 0 <= period.gsn < NUMBERS_END
            or not isinstance(period.bypass, dict | None)
            or type(period.lost) is not str
        ):
            raise ValueError("the before-images cannot be read")
        return period


def area_bytes(wanted: int, mirrors: Sequence[int], spare: int, align: int) -> int:
    """Give the size of the area for before-images.

    :param wanted: as configured; ``mirrors``: sizes of the mirror devices, in bytes: no more than
        they need is given.
    :param spare: what a journal can do without.
    :returns: bytes, a multiple of ``align``; 0 where there is no use in it.
    """
    chunks = sum(-(-size // BEFORE_CHUNK_BYTES) for size in mirrors)
    needed = chunks * (BEFORE_CHUNK_BYTES + BLOCK_BYTES)
    size = max(0, min(wanted, needed, spare)) // align * align
    return size if size >= min(BEFORE_AREA_BYTES_MIN, needed // align * align) else 0
