"""Good inputs of every target, from which fuzzing starts."""

from __future__ import annotations

import json
import struct

from qdsmirror.core import ampbox, frames, nbd, records, stream, superblock, watermark
from qdsmirror.core.compression import Method, Packer
from qdsmirror.core.records import BoundUnit, Generation
from qdsmirror.core.ring import Ring
from qdsmirror.core.superblock import Superblock
from tests.fuzz.targets import GENERATION, SIZE

_WHOLE = b"\0"


def _option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def _string(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def _request(command: int, offset: int, length: int, flags: int = 0, payload: bytes = b"") -> bytes:
    head = struct.pack(">IHHQQI", nbd.REQUEST_MAGIC, flags, command, 7, offset, length)
    return head + payload


def _frame(body: bytes) -> bytes:
    # 0xff: whatever a good header has (see targets.seal_frame).
    return b"\xff" * frames.HEADER_BYTES + body


def _text_frame() -> bytes:
    table = frames.ENTRY.pack(0, 512, frames.WRITE, 0, 0)
    body = [table, b"the same text, " * 34 + b"12"]
    head, _ = frames.build_header(
        kind=frames.ENTRIES, ldsu=0, generation=GENERATION, sequence=1, gsn_first=1, gsn_count=1,
        durable_gsn=0, time_ns=0, previous_chain=frames.GENESIS, entry_count=1, body=body,
    )  # fmt: skip
    return b"".join([head, *body])


def _hello(name: bytes) -> bytes:
    entry = b"\0" + struct.pack(">H", len(name)) + name
    names = struct.pack(">H", len(entry)) + entry
    extensions = struct.pack(">HH", 0, len(names)) + names
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0"
    body += struct.pack(">H", len(extensions)) + extensions
    message = b"\1" + len(body).to_bytes(3, "big") + body
    return b"\x16\3\1" + struct.pack(">H", len(message)) + message


def _superblock() -> bytes:
    made = Superblock(
        role="writelog", log=b"L" * 16, group=0, units=(BoundUnit(0, "qds0", SIZE, "/d"),),
        ring=Ring(65536, 1 << 20), device_bytes=1 << 21, generations=(Generation(GENERATION, 1),),
    )  # fmt: skip
    raw = superblock.pack_slot(made, 0)
    return raw[:32] + json.dumps(made.to_json()).encode()


def seeds() -> dict[str, list[bytes]]:
    """Give good inputs by target."""
    write = frames.ENTRY.pack(4096, 512, frames.WRITE, 0, 0) + bytes(512)
    trim = frames.ENTRY.pack(0, 8192, frames.TRIM, 0, 0)
    point = watermark.Committed(0, 4096, 2, bytes(16))
    flags = struct.pack(">I", 3)
    return {
        "nbd_options": [
            _WHOLE + flags + _option(8) + _option(10, _string(b"qds0") + struct.pack(">I", 1)
            + _string(b"base:allocation")) + _option(7, _string(b"qds0") + b"\0\1\0\3"),
            b"\x05" + flags + _option(3) + _option(6, _string(b"qds0") + b"\0\0") + _option(2),
            _WHOLE + flags + _option(1, b"qds0"),
        ],
        "nbd_requests": [
            b"\3\0" + _request(1, 0, 512, 1, bytes(512)) + _request(3, 0, 0) + _request(2, 0, 0),
            b"\3\x11" + _request(0, 512, 4096, 4) + _request(4, 0, 512) + _request(6, 0, 8192, 2),
            b"\2\x07" + _request(7, 0, SIZE, 8) + _request(1, SIZE - 512, 1024, 0, bytes(1024)),
        ],
        "stream_messages": [
            _WHOLE + stream.frame_header(4, True) + b"abcd" + stream.pack_ack(3, 2),
            b"\x03" + stream.pack_ping() + stream.pack_bye("why"),
            _WHOLE + stream.pack_letter(1, stream.pack_relayed(stream.REPORT, b"{}")),
            _WHOLE + stream.pack_received(1) + stream.pack_ack(3, 2, 1),
            *(_WHOLE + Packer(Method.of(name)).pack([_text_frame()]) for name in ("lz4", "zstd")),
        ],
        "frame_headers": [_frame(write), _frame(trim), _frame(write + trim)],
        "intake": [_frame(write), _frame(trim)],
        "placement_headers": [bytes(records.RECORD_HEADER_BYTES)],
        "superblocks": [_superblock()],
        "amp_boxes": [
            _WHOLE + ampbox.encode_box({b"_answer": b"1", b"json": b'{"a":1}'}),
            b"\4" + ampbox.encode_box({b"_error": b"1", b"_error_description": b"{}"}),
        ],
        "client_hellos": [_hello(b"dsgrp000.qdsmirror")],
        "watermarks": [
            _WHOLE + watermark.pack_durable(5, [(0, 4096)]),
            b"\6" + watermark.pack_committed(3, 2, 1, [point]),
            _WHOLE + watermark.pack_json(watermark.LINK, {"state": "connected"}),
        ],
    }  # fmt: skip
