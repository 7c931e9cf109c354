"""The header of an extension device."""

from __future__ import annotations

import json
from typing import Any

from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import slots
from qdsmirror.core.extension import (
    EXTENSION_SLOT_BYTES,
    ExtensionHeader,
    extension_slot_bytes,
    pack_extension,
    parse_extension,
)
from qdsmirror.core.ring import Extent
from qdsmirror.errors import CorruptError, DeviceError
from qdsmirror.limits import EXTENSION_RECORDS_MIN

KIB = 1024
ID, LOG = bytes(range(16)), bytes(range(16, 32))
HEADER = ExtensionHeader(ID, 3, 1 << 30, 4 * KIB, LOG, 9)


def forge(body: bytes, *, slot: int = 0, slot_bytes: int = 4 * KIB, version: int = 1) -> bytes:
    """Make a slot with a right checksum, whatever its body."""
    head = slots._HEADER.pack(b"QDSEXTND", version, slot, 0, len(body), slot_bytes, 1)
    return head + crc32c(body, crc32c(head)).to_bytes(4, "big") + body


class ExtensionHeaderTests(SynchronousTestCase):
    def test_round_trip(self) -> None:
        for header in (HEADER, HEADER.renewed(b"")):
            for slot in (0, 1):
                raw = pack_extension(header, slot)
                self.assertEqual(parse_extension(raw, slot, 4 * KIB), header)
                self.assertEqual(parse_extension(raw, slot, 0), header)
                with self.assertRaises(CorruptError):
                    parse_extension(raw, 1 - slot, 0)
                with self.assertRaises(CorruptError):
                    parse_extension(raw, slot, 64 * KIB)
        self.assertEqual(HEADER.renewed(b"").counter, 10)

    def test_every_flipped_bit_is_noticed(self) -> None:
        raw = pack_extension(HEADER, 0)
        for bit in range(8 * len(raw.rstrip(b"\0"))):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            with self.assertRaises(CorruptError):
                parse_extension(flipped, 0, 0)

    @settings(max_examples=200)
    @given(st.binary(max_size=100), st.binary(max_size=60))
    def test_arbitrary_bytes(self, raw: bytes, body: bytes) -> None:
        for one in (raw, forge(body)):
            with self.assertRaises(CorruptError):
                parse_extension(one, 0, 0)

    @given(
        st.sampled_from(["id", "group", "size", "log"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=33),
    )
    def test_any_value_of_a_member(self, name: str, value: Any) -> None:
        body = {"id": ID.hex(), "group": 1, "size": 1 << 20, "log": None, name: value}
        try:
            found = parse_extension(forge(json.dumps(body).encode()), 0, 0)
        except CorruptError:
            return
        self.assertEqual(len(found.id), 16)
        self.assertIn(len(found.log), (0, 16))
        self.assertGreaterEqual(found.size, 8 * KIB)

    def test_another_version_is_named(self) -> None:
        with self.assertRaisesRegex(CorruptError, "version 2 is unknown here"):
            parse_extension(forge(b"{}", version=2), 0, 0)

    def test_what_a_log_can_use(self) -> None:
        self.assertEqual(HEADER.extent(4, 4096), Extent(4, 8192, (1 << 30) - 8192))
        self.assertEqual(HEADER.extent(4, 64 * KIB), Extent(4, 64 * KIB, (1 << 30) - 64 * KIB))
        least = 8192 + EXTENSION_RECORDS_MIN * 4096
        small = ExtensionHeader(ID, 3, least, 4 * KIB)
        self.assertEqual(small.extent(1, 4096).length, EXTENSION_RECORDS_MIN * 4096)
        with self.assertRaisesRegex(DeviceError, f"needs {least} bytes at least, not {least - 1}"):
            ExtensionHeader(ID, 3, least - 1, 4 * KIB).extent(1, 4096)

    def test_slots_never_share_a_physical_block(self) -> None:
        for physical in (512, 4096, 16 * KIB, 1024 * KIB):
            self.assertGreaterEqual(extension_slot_bytes(physical), max(4096, physical))
            self.assertIn(extension_slot_bytes(physical), EXTENSION_SLOT_BYTES)
        with self.assertRaises(DeviceError):
            extension_slot_bytes(2048 * KIB)
