"""Placement headers and superblocks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import slots
from qdsmirror.core.extension import Extension
from qdsmirror.core.records import (
    FRAME,
    PAD,
    RECORD_HEADER_BYTES,
    BoundUnit,
    Cursor,
    Generation,
    Point,
    Record,
    pack_record,
    parse_placement,
    parse_record,
)
from qdsmirror.core.ring import Extent, Ring
from qdsmirror.core.superblock import (
    SLOT_BYTES,
    Superblock,
    layout,
    pack_slot,
    parse_slot,
    renewed,
    slot_bytes_for,
)
from qdsmirror.errors import CorruptError, DeviceError, LimitError
from qdsmirror.limits import (
    EXTENTS_MAX,
    FRAME_BYTES_MAX,
    GENERATIONS_MAX,
    KIB,
    LDSUS_PER_GROUP_MAX,
    MIB,
    WRITELOG_BYTES_MIN,
)

LOG = bytes(range(16))
OTHER = bytes(16)
KEY = bytes(range(16, 32))
POSITION = st.integers(0, (1 << 63) - 1)

SUPER = Superblock(
    role="writelog",
    log=LOG,
    group=3,
    units=(BoundUnit(1, "qds1", 1 << 30, "/dev/disk/by-id/x"),),
    ring=Ring(16 * KIB, 64 * KIB),
    device_bytes=100 * KIB,
    generations=(Generation(KEY, 1),),
    tail=Cursor(4096, 7, {1: Point(3, KEY)}),
    applied=Cursor(8192, 9, {1: Point(5, KEY)}),
    head=Cursor(16384, 12, {1: Point(6, KEY)}),
    durable_gsn=11,
    coherent=True,
    reason="because",
    refresh={"id": "00"},
    counter=9,
)


def ring(*extents: list[int], start: int = 16384, align: int = 4096, base: int = 0) -> Any:
    return {"start": start, "align": align, "base": base, "extents": list(extents)}


#: What no log can have: too little, too much, crooked, one over the other, or beyond its device.
RINGS = (
    [16384, 65536, 4096],
    ring(),
    ring([0, 16384, 0]),
    ring([0, 16384, 65536], align=0),
    ring([0, 0, 65536], start=0),
    ring([0, 8192, 65536]),
    ring([0, 16384, 65536 + 1]),
    ring([0, 16384 + 512, 65536]),
    ring([0, 16384, 1 << 40]),
    ring([0, 16384, 32768], [0, 45056, 32768]),
    ring([0, 16384, 65536], base=-1),
    ring([0, 16384, 65536], base=0.5),
    ring([0, 16384, 65536], [1, 8192, 65536]),
    ring([1, 8192, 65536]),
    ring(*([0, 16384 + 4096 * (2 * n % 40), 4096] for n in range(20)), *[[0, 1, 1]] * 20),
)
#: A good superblock with an extension, and what no extension can be.
EXTENDED = {
    "ring": ring([0, 16384, 65536], [1, 8192, 65536]),
    "extensions": [[1, OTHER.hex(), 128 * KIB, False]],
}
EXTENSIONS = (
    [0, OTHER.hex(), 128 * KIB, False],
    [16, OTHER.hex(), 128 * KIB, False],
    [1, "00", 128 * KIB, False],
    [1, OTHER.hex(), 64 * KIB, False],
    [1, OTHER.hex(), 128 * KIB, 1],
    [1, OTHER.hex(), 128.0 * KIB, False],
    [1, OTHER.hex(), 128 * KIB],
)


def forge(body: bytes, *, slot: int = 0, slot_bytes: int = 8 * KIB, version: int = 1) -> bytes:
    """Make a slot with a right checksum, whatever its body."""
    head = slots._HEADER.pack(b"QDSSUPER", version, slot, 0, len(body), slot_bytes, 1)
    return head + crc32c(body, crc32c(head)).to_bytes(4, "big") + body


class RecordTests(SynchronousTestCase):
    @given(
        st.sampled_from([FRAME, PAD]),
        st.integers(0, FRAME_BYTES_MAX),
        st.integers(0, 9),
        POSITION,
        st.floats(0, 1),
    )
    def test_round_trip(
        self, kind: int, frame: int, more: int, position: int, durable: float
    ) -> None:
        size = RECORD_HEADER_BYTES + frame + more
        record = Record(kind, size, frame, position, min(position, int(position * durable)))
        raw = pack_record(record, LOG)
        self.assertEqual(len(raw), RECORD_HEADER_BYTES)
        self.assertEqual(parse_record(raw, LOG, position), record)
        self.assertEqual(parse_placement(raw, LOG), record)

    def test_durable_behind_itself(self) -> None:
        raw = pack_record(Record(FRAME, 4096, 200, 8192, 8193), LOG)
        with self.assertRaisesRegex(CorruptError, "8193 cannot be durable before 8192"):
            parse_record(raw, LOG, 8192)

    def test_elsewhere(self) -> None:
        raw = pack_record(Record(FRAME, 4096, 200, 8192, 0), LOG)
        with self.assertRaisesRegex(CorruptError, "position 8192"):
            parse_record(raw, LOG, 4096)
        with self.assertRaisesRegex(CorruptError, "another log"):
            parse_record(raw, OTHER, 8192)

    def test_every_flipped_bit_is_noticed(self) -> None:
        raw = pack_record(Record(FRAME, 4096, 200, 8192, 4096), LOG)
        for bit in range(8 * len(raw)):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            with self.assertRaises(CorruptError):
                parse_record(flipped, LOG, 8192)

    @given(st.binary(max_size=100))
    def test_arbitrary_bytes(self, raw: bytes) -> None:
        with self.assertRaises(CorruptError):
            parse_record(raw, LOG, 0)

    @given(st.binary(min_size=42, max_size=42))
    def test_arbitrary_fields_with_a_right_checksum(self, raw: bytes) -> None:
        head = b"QDSRECRD\0\1" + raw
        try:
            record = parse_record(head + crc32c(head).to_bytes(4, "big"), raw[10:26], 0)
        except CorruptError:
            return
        self.assertLessEqual(record.frame_bytes, FRAME_BYTES_MAX)
        self.assertLessEqual(record.durable, record.position)

    def test_lengths_that_cannot_be(self) -> None:
        for size, frame in ((4096, 4096), (0, 0), (1 << 31, FRAME_BYTES_MAX + 1)):
            with self.assertRaises(CorruptError):
                parse_record(pack_record(Record(FRAME, size, frame, 0, 0), LOG), LOG, 0)


class SlotTests(SynchronousTestCase):
    def test_round_trip_of_what_need_not_be_there(self) -> None:
        unit = replace(SUPER.units[0], identity="scsi:naa.5000c5")
        more = replace(SUPER, units=(unit,), fingerprints={"1": {"first": "aa", "chunks": []}})
        self.assertEqual(parse_slot(pack_slot(more, 0), 0, 0), more)
        plain = SUPER.to_json()
        self.assertNotIn("fingerprints", plain)
        self.assertEqual(len(plain["units"][0]), 4)

    def test_fingerprints_of_another_form(self) -> None:
        body = {**SUPER.to_json(), "fingerprints": [1]}
        with self.assertRaisesRegex(CorruptError, "fingerprints cannot be read"):
            parse_slot(forge(json.dumps(body).encode()), 0, 0)

    def test_round_trip(self) -> None:
        for slot in (0, 1):
            raw = pack_slot(SUPER, slot)
            self.assertEqual(len(raw) % 4096, 0)
            self.assertEqual(parse_slot(raw, slot, 8 * KIB), SUPER)
            self.assertEqual(parse_slot(raw, slot, 0), SUPER)

    def test_in_the_other_slot_or_at_another_size(self) -> None:
        raw = pack_slot(SUPER, 1)
        with self.assertRaisesRegex(CorruptError, "holds slot 1"):
            parse_slot(raw, 0, 8 * KIB)
        with self.assertRaises(CorruptError):
            parse_slot(raw, 1, 64 * KIB)

    def test_every_flipped_bit_is_noticed(self) -> None:
        raw = pack_slot(SUPER, 0)
        used = len(raw.rstrip(b"\0"))
        for bit in range(8 * used):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            with self.assertRaises(CorruptError):
                parse_slot(flipped, 0, 8 * KIB)

    def test_torn_at_every_sector(self) -> None:
        long = replace(SUPER, reason="r" * 5000)
        new, old = (
            pack_slot(long, 0),
            pack_slot(replace(long, reason="s" * 5000, refresh={"id": "11"}), 0),
        )
        for at in range(512, len(new.rstrip(b"\0")), 512):
            with self.assertRaisesRegex(CorruptError, "checksum"):
                parse_slot(new[:at] + old[at:], 0, 8 * KIB)

    @given(st.binary(max_size=200))
    def test_arbitrary_bytes(self, raw: bytes) -> None:
        with self.assertRaises(CorruptError):
            parse_slot(raw, 0, 0)

    @settings(max_examples=200)
    @given(st.binary(max_size=60))
    def test_arbitrary_body_with_a_right_checksum(self, body: bytes) -> None:
        with self.assertRaisesRegex(CorruptError, "cannot be read"):
            parse_slot(forge(body), 0, 0)

    @settings(max_examples=300)
    @given(
        st.sampled_from(sorted(SUPER.to_json())),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["position", "gsn", "points", "1"]), inner)
            ),
            max_leaves=6,
        ),
    )
    def test_any_value_of_a_member(self, name: str, value: Any) -> None:
        body = {**SUPER.to_json(), name: value}
        try:
            parse_slot(forge(json.dumps(body).encode()), 0, 0)
        except CorruptError:
            pass

    def test_bodies_that_mean_nothing(self) -> None:
        good = SUPER.to_json()
        for change in (
            *({"ring": ring} for ring in RINGS),
            {"extensions": [[2, OTHER.hex(), MIB, False]]},
            {"extensions": [[1, OTHER.hex(), MIB, False]]},
            {"role": "journal", **EXTENDED},
            *({**EXTENDED, "extensions": [row]} for row in EXTENSIONS),
            {**EXTENDED, "extensions": EXTENDED["extensions"] * 2},
            {**EXTENDED, "extensions": []},
            {"units": []},
            {"log": "00"},
            {"durable_gsn": -1},
            {"durable_gsn": 1.5},
            {"tail": {"position": 12288, "gsn": 1, "points": {}}},
            {"head": {"position": 4096, "gsn": 1, "points": {}}},
            {"head": {"position": 16385, "gsn": 1, "points": {}}},
            {"head": {"position": 1 << 20, "gsn": 1, "points": {}}},
            {"head": {"position": 16384, "gsn": 1, "points": []}},
        ):
            with self.assertRaisesRegex(CorruptError, "cannot be read", msg=str(change)):
                parse_slot(forge(json.dumps({**good, **change}).encode()), 0, 0)
        with self.assertRaises(CorruptError):
            parse_slot(forge(b"[" * 100_000, slot_bytes=512 * KIB), 0, 0)

    def test_with_extensions(self) -> None:
        found = parse_slot(forge(json.dumps({**SUPER.to_json(), **EXTENDED}).encode()), 0, 0)
        self.assertEqual(found.extensions, (Extension(1, OTHER, 128 * KIB, False),))
        self.assertEqual(found.ring.extents, (Extent(0, 16384, 65536), Extent(1, 8192, 65536)))
        self.assertEqual(found.ring.size, 2 * 65536)
        self.assertEqual(parse_slot(pack_slot(found, 1), 1, 0), found)

    def test_the_most_that_a_writelog_has_fits_its_least_slot(self) -> None:
        at = Cursor(1 << 50, 1 << 50, {4095: Point(1 << 50, KEY)})
        ring = Ring(1 << 40, EXTENTS_MAX << 40, 4096, 1 << 45, tuple(
            Extent(n % 16, (n + 1) << 40, 1 << 40) for n in range(EXTENTS_MAX)
        ))  # fmt: skip
        full = replace(
            SUPER, ring=ring, device_bytes=1 << 60, tail=at, applied=at, head=at,
            extensions=tuple(Extension(n, KEY, 1 << 50, True) for n in range(1, 16)),
            generations=tuple(Generation(KEY, 1 << 50) for _ in range(GENERATIONS_MAX)),
            units=(BoundUnit(4095, "n" * 64, 1 << 50, "/dev/disk/by-id/" + "x" * 200),),
            durable_gsn=1 << 50,
        )  # fmt: skip
        self.assertEqual(parse_slot(pack_slot(full, 0), 0, SLOT_BYTES[0]), full)

    def test_another_version_is_named(self) -> None:
        with self.assertRaisesRegex(CorruptError, "version 2 is unknown here"):
            parse_slot(forge(b"{}", version=2), 0, 0)

    def test_a_body_that_does_not_fit(self) -> None:
        with self.assertRaises(LimitError):
            pack_slot(replace(SUPER, reason="r" * 8192), 0)

    def test_renewed(self) -> None:
        self.assertEqual(renewed(SUPER, reason="x"), replace(SUPER, reason="x", counter=10))


class LayoutTests(SynchronousTestCase):
    def test_the_smallest_log(self) -> None:
        slot, ring, _ = layout(WRITELOG_BYTES_MIN, 1, 512)
        self.assertEqual((slot, ring.start, ring.align), (8 * KIB, 16 * KIB, 4096))
        self.assertEqual(ring.size, 33 * 4096)

    def test_slots_never_share_a_physical_block(self) -> None:
        for physical in (512, 4096, 16 * KIB, 64 * KIB, 512 * KIB):
            device = max(WRITELOG_BYTES_MIN, 24 * physical)
            slot, ring, _ = layout(device, 1, physical)
            self.assertGreaterEqual(slot, physical)
            self.assertEqual(slot % physical, 0)
            self.assertEqual(ring.start % ring.align, 0)
            self.assertGreaterEqual(ring.start, 2 * slot)
            self.assertLessEqual(ring.start + ring.size, device)
            self.assertEqual(ring.align, max(4096, physical))

    def test_too_small(self) -> None:
        for size, physical in ((16 * KIB, 512), (81919, 4096), (150 * KIB, 16 * KIB), (0, 512)):
            with self.assertRaises(DeviceError):
                layout(size, 1, physical)

    def test_a_slot_names_every_ldsu_it_is_for(self) -> None:
        self.assertIn(slot_bytes_for(LDSUS_PER_GROUP_MAX, 0, 0), SLOT_BYTES)
        with self.assertRaises(LimitError):
            slot_bytes_for(10 * LDSUS_PER_GROUP_MAX, 0, 0)
        for units in (1, 8, 100, LDSUS_PER_GROUP_MAX):
            points = {i: Point(1 << 40, KEY) for i in range(units)}
            at = Cursor(1 << 50, 1 << 50, points)
            full = replace(
                SUPER,
                units=tuple(
                    BoundUnit(i, f"volume{i}", 1 << 44, f"/dev/disk/by-id/scsi-{i:040}")
                    for i in range(units)
                ),
                tail=at,
                applied=at,
                head=at,
                slot_bytes=slot_bytes_for(units, 0, 0),
            )
            pack_slot(full, 0)

    def test_room_for_the_cut_of_a_large_group(self) -> None:
        # A writelog is bound to one LDSU, but a refresh's cut names all of the group's.
        for units, size in ((200, 4 * MIB), (LDSUS_PER_GROUP_MAX, 32 * MIB)):
            slot, _, _ = layout(size, 1, 4096)
            cut = {str(i): [1 << 40, 1 << 40, KEY.hex()] for i in range(units)}
            pack_slot(replace(SUPER, refresh={"cut": {"points": cut}}, slot_bytes=slot), 0)
