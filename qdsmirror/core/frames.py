"""The frame: a batch of entries, the same bytes in writelog, stream and secondary journal.

A frame is a header, an entry table and the entries' payloads (man page qdswritelog(5)).  Two
CRC-32C protect it: one over header, one over table and payloads.  ``chain`` ties it to every frame
before it in its LDSU's history (rules.md 2): it is the first 16 bytes of blake3 over the previous
chain and the header's bytes before the chain, which hold the body's CRC.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from struct import Struct
from typing import NamedTuple

from blake3 import blake3
from crc32c import crc32c

from qdsmirror.errors import CorruptError, LimitError
from qdsmirror.limits import (
    CHECKPOINT_NAME_BYTES_MAX,
    FRAME_ENTRIES_MAX,
    FRAME_PAYLOAD_BYTES_MAX,
    VERIFY_ROWS_MAX,
    ZERO_ENTRY_BYTES_MAX,
)

Buffer = bytes | bytearray | memoryview

MAGIC = b"QDSFRAME"
VERSION = 1
CHAIN_BYTES = 16
GENERATION_BYTES = 16
#: The chain before the first frame of a history.
GENESIS = bytes(CHAIN_BYTES)
#: Sequence numbers stay below, so that what follows one still fits its eight bytes.
NUMBERS_END = 1 << 63

# Frame kinds.
ENTRIES = 1
#: A GSN range that no log holds, because a crash lost it before it was durable.
VOID = 2
REFRESH_BEGIN = 3
REFRESH_END = 4
#: The group enters bypass: what lies before is complete, and nothing after it was journaled.
BREAK = 5
#: The first frame of a generation: it names the one before (rules.md 7).
SWITCH = 6
#: What parts of an LDSU hold at this place of the order, as hashes (:mod:`qdsmirror.core.verify`).
VERIFY = 7
#: An application's marker: the secondary takes a checkpoint behind it.
MARK = 8
_KINDS = frozenset((ENTRIES, VOID, REFRESH_BEGIN, REFRESH_END, BREAK, SWITCH, VERIFY, MARK))

#: A part's offset, length and hash.
VERIFY_ROW = Struct(">QI32s")
#: Payload bytes that a control frame may have: an id of a refresh, bypass or generation, nothing,
#: hashes, or a mark's name.
_CONTROL_PAYLOAD_BYTES: dict[int, Container[int]] = {
    VOID: (0,),
    REFRESH_BEGIN: (16,),
    REFRESH_END: (16,),
    BREAK: (16,),
    SWITCH: (16,),
    VERIFY: range(VERIFY_ROW.size, VERIFY_ROWS_MAX * VERIFY_ROW.size + 1, VERIFY_ROW.size),
    MARK: (CHECKPOINT_NAME_BYTES_MAX,),
}

# Entry kinds.
WRITE = 1
ZEROES = 2
TRIM = 3
REFRESH = 4
REFRESH_ZEROES = 5
#: A write of zeroes that says so instead of having a payload; it is applied as a write.
ZERO_WRITE = 6
WITH_PAYLOAD = frozenset((WRITE, REFRESH))
_ENTRY_KINDS = frozenset((WRITE, ZEROES, TRIM, REFRESH, REFRESH_ZEROES, ZERO_WRITE))

# magic version kind flags ldsu entry_count payload_bytes generation sequence gsn_first gsn_count
# durable_gsn time_ns body_crc
_HEAD = Struct(">8sHBBIII16sQQQQQI")
_HEADER = Struct(">8sHBBIII16sQQQQQI16sI")
HEADER_BYTES = _HEADER.size
_GSNS = Struct(">QQ")
_GSNS_AT = Struct(">8sHBBIII16sQ").size
#: offset length kind flags reserved
ENTRY = Struct(">QIBBH")
ENTRY_BYTES = ENTRY.size


class FrameHeader(NamedTuple):
    """A frame's header as it stands on disk and on the wire.

    :ivar ldsu: index of the LDSU in its group.
    :ivar sequence: the frame's number in its LDSU's history, from 1.
    :ivar gsn_first: the global sequence number of its first entry, from 1.
    :ivar gsn_count: how many global sequence numbers it takes.
    :ivar durable_gsn: the group's durable GSN when the frame was made (rules.md 6).
    :ivar time_ns: wall-clock nanoseconds since 1970, for people only (rules.md 26).
    """

    magic: bytes
    version: int
    kind: int
    flags: int
    ldsu: int
    entry_count: int
    payload_bytes: int
    generation: bytes
    sequence: int
    gsn_first: int
    gsn_count: int
    durable_gsn: int
    time_ns: int
    body_crc: int
    chain: bytes
    header_crc: int

    @property
    def frame_bytes(self) -> int:
        """Length of the whole frame."""
        return HEADER_BYTES + self.entry_count * ENTRY_BYTES + self.payload_bytes

    @property
    def gsn_last(self) -> int:
        """The last global sequence number that the frame takes."""
        return self.gsn_first + self.gsn_count - 1


class Entry(NamedTuple):
    """One change of an LDSU.

    :ivar offset: bytes from the LDSU's start.
    :ivar length: bytes changed.
    :ivar payload: the new content, ``None`` for zeroes and trims.
    """

    offset: int
    length: int
    kind: int
    payload: bytes | memoryview | None


def entry_table(entries: Iterable[Entry]) -> bytes:
    """Give the table that stands in a frame before the payloads of its entries."""
    return b"".join([ENTRY.pack(one[0], one[1], one[2], 0, 0) for one in entries])


def build_header(
    *,
    kind: int,
    ldsu: int,
    generation: bytes,
    sequence: int,
    gsn_first: int,
    gsn_count: int,
    durable_gsn: int,
    time_ns: int,
    previous_chain: bytes,
    entry_count: int = 0,
    body: Sequence[Buffer] = (),
) -> tuple[bytes, bytes]:
    """Make the header of a frame.

    :param body: the entry table (as one piece or several) and the payloads, in order.
    :returns: the header's bytes and the frame's chain.
    """
    crc = 0
    size = 0
    for piece in body:
        crc = crc32c(piece, crc)
        size += len(piece)
    head = _HEAD.pack(
        MAGIC,
        VERSION,
        kind,
        0,
        ldsu,
        entry_count,
        size - entry_count * ENTRY_BYTES,
        generation,
        sequence,
        gsn_first,
        gsn_count,
        durable_gsn,
        time_ns,
        crc,
    )
    chain = next_chain(previous_chain, head)
    head += chain
    return head + crc32c(head).to_bytes(4, "big"), chain


def next_chain(previous: bytes, head: Buffer) -> bytes:
    """Give the chain of a frame from the one before it and its header's bytes up to the chain."""
    return blake3(previous + bytes(head)).digest(length=CHAIN_BYTES)


def parse_header(buffer: Buffer, offset: int = 0) -> FrameHeader:
    """Read and check a header; nothing in it is believed before its CRC matches.

    :param buffer: at least ``offset + HEADER_BYTES`` bytes.
    :raises CorruptError: these are not an intact header.
    :raises LimitError: its lengths are beyond limits.py.
    """
    raw = memoryview(buffer)[offset : offset + HEADER_BYTES]
    if len(raw) < HEADER_BYTES or raw[:8] != MAGIC:
        raise CorruptError("not a frame: its magic is missing")
    if crc32c(raw[:-4]) != int.from_bytes(raw[-4:], "big"):
        raise CorruptError("frame header: checksum mismatch")
    header = FrameHeader(*_HEADER.unpack(raw))
    if header.version != VERSION:
        raise CorruptError(
            f"frame format version {header.version} is unknown here (this is version {VERSION})"
        )
    if header.kind not in _KINDS:
        raise CorruptError(f"frame kind {header.kind} is unknown")
    if header.entry_count > FRAME_ENTRIES_MAX or header.payload_bytes > FRAME_PAYLOAD_BYTES_MAX:
        raise LimitError(
            f"frame of {header.entry_count} entries, {header.payload_bytes} payload bytes is over "
            f"the limit ({FRAME_ENTRIES_MAX} entries, {FRAME_PAYLOAD_BYTES_MAX} bytes)"
        )
    if header.gsn_first < 1 or header.gsn_count < 1 or header.sequence < 1:
        raise CorruptError("frame header: numbers start at 1")
    if header.gsn_first + header.gsn_count > NUMBERS_END or header.sequence >= NUMBERS_END:
        raise CorruptError("frame header: numbers out of range")
    if header.kind == ENTRIES:
        if header.gsn_count != header.entry_count:
            raise CorruptError("frame header: entries and sequence numbers differ in count")
    elif header.entry_count or header.payload_bytes not in _CONTROL_PAYLOAD_BYTES[header.kind]:
        raise CorruptError(f"frame header: a frame of kind {header.kind} has no such body")
    return header


def last_gsn(frame: Buffer) -> int:
    """Give a frame's last GSN; the frame is one of ours, and was checked."""
    first, count = _GSNS.unpack_from(frame, _GSNS_AT)
    return int(first + count - 1)


def chain_follows(header: FrameHeader, raw: Buffer, previous_chain: bytes) -> bool:
    """Tell whether a frame continues the history that ends with ``previous_chain``.

    :param raw: the frame's bytes (at least its header).
    """
    return header.chain == next_chain(previous_chain, memoryview(raw)[: _HEAD.size])


def check_body(header: FrameHeader, frame: Buffer) -> None:
    """Check the table and payloads of a whole frame against the CRC in its header.

    :raises CorruptError: they differ.
    """
    if len(frame) != header.frame_bytes:
        raise CorruptError(f"frame {header.sequence}: {len(frame)} bytes, not {header.frame_bytes}")
    if crc32c(memoryview(frame)[HEADER_BYTES:]) != header.body_crc:
        raise CorruptError(
            f"frame {header.sequence} (GSN {header.gsn_first}): body checksum mismatch"
        )


def entries(header: FrameHeader, frame: Buffer) -> list[Entry]:
    """Read the entries of an intact frame; payloads are views into it.

    :raises CorruptError: table and payloads do not fit each other, or an entry is of no range that
        a device can have.
    """
    view = memoryview(frame)
    position = HEADER_BYTES + header.entry_count * ENTRY_BYTES
    found: list[Entry] = []
    for offset, length, kind, _flags, _reserved in ENTRY.iter_unpack(view[HEADER_BYTES:position]):
        if not length or offset + length >= NUMBERS_END:
            raise CorruptError(f"frame {header.sequence}: entry of {length} bytes at {offset}")
        if kind in WITH_PAYLOAD:
            end = position + length
            found.append(Entry(offset, length, kind, view[position:end]))
            position = end
        elif kind in _ENTRY_KINDS and length <= ZERO_ENTRY_BYTES_MAX:
            found.append(Entry(offset, length, kind, None))
        else:
            raise CorruptError(f"frame {header.sequence}: entry kind {kind}, {length} bytes")
    if header.kind == ENTRIES and position != header.frame_bytes:
        raise CorruptError(f"frame {header.sequence}: payloads and entry table differ in length")
    return found


def control_payload(header: FrameHeader, frame: Buffer) -> bytes:
    """Give the payload of a control frame: the id or name that it has, hashes, or nothing."""
    return bytes(memoryview(frame)[HEADER_BYTES + header.entry_count * ENTRY_BYTES :])
