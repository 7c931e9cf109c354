"""What stands only in a log: placement headers, and the places that superblocks name.

A *record* is a placement header and a frame, padded to the ring's alignment (man page
qdswritelog(5)).  The placement header binds it to this log and this position, so that a misdirected
or stale write is recognised (rules.md 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from struct import Struct
from typing import Any, NamedTuple

from crc32c import crc32c

from qdsmirror.core.frames import GENESIS, Buffer, FrameHeader
from qdsmirror.errors import CorruptError
from qdsmirror.limits import FRAME_BYTES_MAX

RECORD_MAGIC = b"QDSRECRD"
RECORD_VERSION = 1
FRAME = 1
PAD = 2

# magic version kind zero record_bytes frame_bytes log_uuid position durable, then the CRC of these
_RECORD = Struct(">8sHBBII16sQQ")
RECORD_HEADER_BYTES = _RECORD.size + 4


class Record(NamedTuple):
    """A placement header.

    :ivar record_bytes: from this header to the next one.
    :ivar frame_bytes: of the frame behind it; 0 for a pad.
    :ivar position: where in the log it belongs.
    :ivar durable: every record of the log before this position was durable when this one was
        written (rules.md 6).
    """

    kind: int
    record_bytes: int
    frame_bytes: int
    position: int
    durable: int


def pack_record(record: Record, log: bytes) -> bytes:
    """Make a placement header for the log with this UUID."""
    head = _RECORD.pack(
        RECORD_MAGIC,
        RECORD_VERSION,
        record.kind,
        0,
        record.record_bytes,
        record.frame_bytes,
        log,
        record.position,
        record.durable,
    )
    return head + crc32c(head).to_bytes(4, "big")


def parse_record(raw: Buffer, log: bytes, position: int) -> Record:
    """Read and check a placement header.

    :raises CorruptError: it is not an intact header of this log and this position.
    """
    record = parse_placement(raw, log)
    if record.position != position:
        raise CorruptError(f"placement header: the record belongs to position {record.position}")
    return record


def parse_placement(raw: Buffer, log: bytes) -> Record:
    """Read and check a placement header, whatever position it belongs to.

    :raises CorruptError: it is not an intact header of this log.
    """
    view = memoryview(raw)[:RECORD_HEADER_BYTES]
    if len(view) < RECORD_HEADER_BYTES or view[:8] != RECORD_MAGIC:
        raise CorruptError("no record here")
    if crc32c(view[:-4]) != int.from_bytes(view[-4:], "big"):
        raise CorruptError("placement header: checksum mismatch")
    _, version, kind, _, record_bytes, frame_bytes, uuid, where, durable = _RECORD.unpack(view[:-4])
    if version != RECORD_VERSION or kind not in (FRAME, PAD):
        raise CorruptError(f"placement header: version {version}, kind {kind}")
    if uuid != log:
        raise CorruptError("placement header: the record belongs to another log")
    if record_bytes < RECORD_HEADER_BYTES + frame_bytes or frame_bytes > FRAME_BYTES_MAX:
        raise CorruptError("placement header: lengths do not fit")
    if durable > where:
        raise CorruptError(f"placement header: position {durable} cannot be durable before {where}")
    return Record(kind, record_bytes, frame_bytes, where, durable)


class Point(NamedTuple):
    """Where one LDSU's history stands: the next frame's number and the chain before it."""

    sequence: int
    chain: bytes


BEGINNING = Point(1, GENESIS)


@dataclass(frozen=True)
class Cursor:
    """A place between two records of a log, with what a scan from there must know.

    :ivar position: of the next record.
    :ivar gsn: every frame from here on has a first GSN of at least this.
    :ivar points: by LDSU index; an absent one stands at its beginning.
    """

    position: int = 0
    gsn: int = 1
    points: Mapping[int, Point] = field(default_factory=dict)

    def point(self, ldsu: int) -> Point:
        """Give where an LDSU's history stands here."""
        return self.points.get(ldsu, BEGINNING)

    def after(self, header: FrameHeader, end: int) -> Cursor:
        """Give the cursor behind a frame that ends at position ``end``."""
        points = dict(self.points)
        points[header.ldsu] = Point(header.sequence + 1, header.chain)
        return Cursor(end, header.gsn_first + header.gsn_count, points)

    def to_json(self) -> dict[str, Any]:
        """Give the form that stands in a superblock."""
        return {
            "position": self.position,
            "gsn": self.gsn,
            "points": {str(k): [p.sequence, p.chain.hex()] for k, p in self.points.items()},
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Cursor:
        """Read :meth:`to_json`'s form."""
        points = {int(k): Point(s, bytes.fromhex(c)) for k, (s, c) in body["points"].items()}
        return cls(body["position"], body["gsn"], points)


@dataclass(frozen=True)
class Generation:
    """One unbroken history on the list of a log's generations (rules.md 7).

    :ivar id: 16 random bytes.
    :ivar first_gsn: the first global sequence number that belongs to it.
    """

    id: bytes
    first_gsn: int


@dataclass(frozen=True)
class BoundUnit:
    """An LDSU that a log is bound to: its index in the group, name, size in bytes and device.

    :ivar device: the path it had when the log was initialised.
    :ivar identity: what tells it from others under any path (rules.md 24); empty where nothing
        does.
    """

    index: int
    name: str
    size: int
    device: str
    identity: str = ""

    def to_json(self) -> list[Any]:
        """Give the form that stands in a superblock."""
        bound = [self.index, self.name, self.size, self.device]
        return [*bound, self.identity] if self.identity else bound
