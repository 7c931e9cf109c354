"""What is fuzzed: each target takes arbitrary bytes into one parser and checks what it does.

A parser may raise the errors of its contract, or want more; it may neither raise anything else nor
hold more than its limit.  The suite feeds the targets by hypothesis (test_fuzz), ``make fuzz`` by
coverage.  Where a checksum would stop nearly everything at the door, the target puts the right one
in, so that what is behind it is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from crc32c import crc32c

from qdsmirror import limits
from qdsmirror.core import (
    ampbox,
    clienthello,
    compression,
    frames,
    nbd,
    questions,
    records,
    stream,
    superblock,
    verify,
    watermark,
)
from qdsmirror.core.frames import HEADER_BYTES
from qdsmirror.core.inbound import Intake
from qdsmirror.core.jsontext import parse_object
from qdsmirror.core.nbd_options import ExportInfo, Negotiation
from qdsmirror.core.nbd_requests import Budget, RequestParser
from qdsmirror.core.records import Cursor, Generation
from qdsmirror.errors import CorruptError, LimitError, ProtocolError, QdsError

SIZE = 1 << 20
INFO = ExportInfo("qds0", SIZE, 512, 4096)
GENERATION = b"G" * 16
_STRUCTURED, _STATUS = 1, 2


def pieces(data: bytes) -> Iterator[bytes]:
    """Cut bytes into what arrives at a time; the first byte says how."""
    if not data:
        return
    step = data[0] or len(data)
    for at in range(1, len(data), step):
        yield data[at : at + step]


def nbd_options(data: bytes) -> None:
    """The NBD negotiation: what a client says before it has an export."""
    talk = Negotiation(lambda: ["qds0", "qds1"], {"qds0": INFO}.get)
    said = 0
    try:
        for piece in pieces(data):
            said += len(talk.receive(piece))
            if talk.finished or talk.aborted:
                break
            assert len(talk.rest) <= 16 + limits.NBD_OPTION_BYTES_MAX + len(piece)
    except ProtocolError:
        pass
    assert said <= limits.NBD_OPTIONS_MAX * (limits.NBD_OPTION_BYTES_MAX + 4096)
    assert not talk.finished or talk.export is INFO


class _Taker:
    def budget_freed(self) -> None:
        """Nobody waits here."""

    def evict_if_stalled(self) -> None:
        """Nobody waits here."""


def nbd_requests(data: bytes) -> None:
    """NBD requests of one connection, with a budget of four largest payloads."""
    if not data:
        return
    limit = 4 * limits.NBD_PAYLOAD_BYTES_MAX
    parser = RequestParser(
        None,  # type: ignore[arg-type]
        INFO,
        _Taker(),
        Budget(limit),
        bool(data[0] & _STRUCTURED),
        bool(data[0] & _STATUS),
    )
    for piece in pieces(data[1:]):
        while piece and parser.rest is not None:
            count = min(len(piece), len(parser.rest))
            parser.rest[:count] = piece[:count]
            parser.filled(count)
            piece = piece[count:]
        if piece:
            parser.feed(piece)
        for request in parser.parse(limits.NBD_REQUESTS_MAX):
            assert request.offset + request.length <= SIZE
            assert request.command in range(8)
            assert request.command != nbd.CMD_WRITE or len(request.payload or b"") == request.length
        for request, code, message in parser.refused:
            assert code > 0 and message and request.cookie is not None
        parser.refused.clear()
        if parser.failure is not None or parser.disconnect or parser.blocked:
            break
    parser.abandon()


def stream_messages(data: bytes) -> None:
    """The frame stream of a link, and what its small messages carry."""
    parser = stream.MessageParser()
    try:
        for piece in pieces(data):
            for message in parser.feed(piece):
                assert len(message.payload) <= limits.STREAM_MESSAGE_BYTES_MAX
                if message.type == stream.ACK:
                    stream.parse_ack(message.payload)
                elif message.type == stream.ASK:
                    asked = questions.parse_question(message.payload)
                    assert asked.answer_bytes <= limits.QUESTION_READ_BYTES_MAX
                elif message.type == stream.ANSWER:
                    questions.parse_answer(message.payload)
                elif message.type == stream.LETTER:
                    letter = stream.parse_letter(message.payload)[1]
                    assert len(letter.payload) < len(message.payload)
                elif message.type == stream.RECEIVED:
                    stream.parse_received(message.payload)
                elif message.type == stream.FRAME and message.flags & stream.COMPRESSED:
                    unpack(message.payload)
    except ProtocolError:
        pass


def unpack(payload: frames.Buffer) -> None:
    """A compressed message: of whatever algorithm, it gives no more than a message may hold."""
    for name in compression.ALGORITHMS:
        try:
            found = compression.unpack(payload, name)
        except ProtocolError:
            continue
        assert sum(map(len, found)) == compression.declared_bytes(payload) <= limits.FRAME_BYTES_MAX


def frame_headers(data: bytes) -> None:
    """A frame whose header and body have right checksums, as a hostile peer would make it."""
    raw = seal_frame(data)
    try:
        header = frames.parse_header(raw)
        frames.check_body(header, raw)
        if header.kind == frames.ENTRIES:
            found = frames.entries(header, raw)
            assert len(found) == header.entry_count <= limits.FRAME_ENTRIES_MAX
            for entry in found:
                assert 0 < entry.length <= limits.ZERO_ENTRY_BYTES_MAX
                assert entry.offset + entry.length < frames.NUMBERS_END
        elif header.kind == frames.VERIFY:
            rows = verify.parse_rows(frames.control_payload(header, raw))
            assert 0 < len(rows) <= limits.VERIFY_ROWS_MAX
            for row in rows:
                assert 0 < row.length <= limits.VERIFY_ZERO_BYTES_MAX
        else:
            frames.control_payload(header, raw)
    except (CorruptError, LimitError):
        return
    assert header.frame_bytes == len(raw)


def intake(data: bytes) -> None:
    """The secondary's check of a frame: nothing beyond a device is ever let in."""
    taking = Intake(Cursor(), [SIZE, SIZE], [Generation(GENERATION, 1)])
    before = taking.gsn, taking.points
    try:
        _, found = taking.check(seal_frame(data))
    except QdsError:
        assert (taking.gsn, taking.points) == before
        return
    assert all(entry[0] + entry[1] <= SIZE for entry in found)


def seal_frame(data: bytes) -> bytes:
    """Make a frame of arbitrary header fields and body, with right magic, lengths and checksums.

    The fields come from ``data`` where that is long enough, else from a good header.
    """
    body = data[HEADER_BYTES:].ljust(frames.ENTRY_BYTES, b"\0")
    head, _ = frames.build_header(
        kind=frames.ENTRIES, ldsu=0, generation=GENERATION, sequence=1, gsn_first=1, gsn_count=1,
        durable_gsn=0, time_ns=0, previous_chain=frames.GENESIS, entry_count=1, body=[body],
    )  # fmt: skip
    mixed = bytearray(head)
    # A byte of 0xff leaves the good header's in its place.
    for at, byte in enumerate(data[:HEADER_BYTES]):
        if byte != 0xFF:
            mixed[at] = byte
    mixed[: len(frames.MAGIC)] = frames.MAGIC
    mixed[-4:] = crc32c(bytes(mixed[:-4])).to_bytes(4, "big")
    return bytes(mixed) + body


def placement_headers(data: bytes) -> None:
    """A placement header with a right checksum."""
    head = records.RECORD_MAGIC + data[8 : records.RECORD_HEADER_BYTES - 4].ljust(
        records.RECORD_HEADER_BYTES - 12, b"\0"
    )
    for raw in (data, head + crc32c(head).to_bytes(4, "big")):
        try:
            record = records.parse_placement(raw, head[20:36])
        except CorruptError:
            continue
        assert record.frame_bytes <= limits.FRAME_BYTES_MAX
        assert record.record_bytes >= record.frame_bytes


def superblocks(data: bytes) -> None:
    """A superblock slot whose body is arbitrary and whose checksum is right."""
    head = bytearray(data[:32].ljust(32, b"\0"))
    head[:8] = superblock.SUPER_MAGIC
    body = data[32:]
    head[16:20] = len(body).to_bytes(4, "big")
    crc = crc32c(body, crc32c(bytes(head)))
    try:
        found = superblock.parse_slot(bytes(head) + crc.to_bytes(4, "big") + body, head[10], 0)
    except CorruptError:
        return
    assert replace(found, counter=found.counter + 1) != found
    assert found.tail.position <= found.applied.position <= found.head.position


def amp_boxes(data: bytes) -> None:
    """The control protocol's boxes, on either end."""
    decoder = ampbox.BoxDecoder()
    try:
        for piece in pieces(data):
            for box in decoder.feed(piece):
                ampbox.decode_error(box.get(b"_error_description", b""))
                parse_object(ampbox.gather(b"json", box), "answer")
    except QdsError:
        pass


def client_hellos(data: bytes) -> None:
    """What the secondary's master peeks at before anything is proved."""
    found = clienthello.peek_server_name(data)
    if isinstance(found, str):
        assert len(found) <= len(data)
        clienthello.group_hint(found)


def watermarks(data: bytes) -> None:
    """The driver's and the pmd's socket."""
    parser = watermark.WatermarkParser()
    try:
        for piece in pieces(data):
            for kind, payload in parser.feed(piece):
                if kind == watermark.DURABLE:
                    watermark.parse_durable(payload)
                elif kind == watermark.COMMITTED:
                    watermark.parse_committed(payload)
                else:
                    watermark.parse_json(payload)
    except ProtocolError:
        pass


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        nbd_options, nbd_requests, stream_messages, frame_headers, intake, placement_headers,
        superblocks, amp_boxes, client_hellos, watermarks,
    )
}  # fmt: skip
