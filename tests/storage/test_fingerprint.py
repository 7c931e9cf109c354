"""What is hashed at an orderly stop, and how a change is named."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.recent import Recent
from qdsmirror.core.records import BoundUnit
from qdsmirror.core.superblock import pack_slot
from qdsmirror.errors import CorruptError
from qdsmirror.limits import (
    FINGERPRINT_CHUNK_BYTES,
    FINGERPRINT_CHUNKS_MAX,
    FINGERPRINT_WRITES_MAX,
    KIB,
    MIB,
)
from qdsmirror.storage.fingerprint import (
    changed_ranges,
    chunks_for,
    fingerprint,
    ranges_text,
)
from tests.fakes import MemoryDevice
from tests.storage.logworld import initialise

CHUNK = FINGERPRINT_CHUNK_BYTES


class RecentTests(SynchronousTestCase):
    def test_the_latest_first_each_once(self) -> None:
        recent = Recent()
        for offset, length in ((0, 512), (5 * CHUNK - 512, 1024), (100, 1), (9 * CHUNK, 0)):
            recent.note((offset, length))
        self.assertEqual(recent.chunks(), [0, 5, 4])

    def test_bounded(self) -> None:
        recent = Recent()
        for number in range(3 * FINGERPRINT_WRITES_MAX):
            recent.note((number * CHUNK, 512))
        last = 3 * FINGERPRINT_WRITES_MAX - 1
        self.assertEqual(recent.chunks(), list(range(last, last - FINGERPRINT_CHUNKS_MAX, -1)))

    def test_one_write_of_more_chunks_than_are_kept(self) -> None:
        recent = Recent()
        recent.note((0, 1000 * CHUNK))
        self.assertEqual(len(recent.chunks()), FINGERPRINT_CHUNKS_MAX)


class FingerprintTests(SynchronousTestCase):
    def device(self, size: int = 8 * MIB) -> MemoryDevice:
        device = MemoryDevice(size)
        device.pwritev([b"w" * 4096], 3 * MIB)
        return device

    def test_unchanged(self) -> None:
        device = self.device()
        found = fingerprint(device)
        self.assertEqual([number for number, _ in found["chunks"]], [3 * MIB // CHUNK])
        self.assertEqual(changed_ranges(device, found), [])

    def test_each_place_is_named(self) -> None:
        for at, first, end in (
            (MIB - 1, 0, MIB),
            (3 * MIB + 70, 3 * MIB, 3 * MIB + CHUNK),
            (7 * MIB, 7 * MIB, 8 * MIB),
        ):
            device = self.device()
            found = fingerprint(device)
            device.corrupt(at, b"X")
            self.assertEqual(changed_ranges(device, found), [(first, end)])

    @given(st.integers(1, 9).map(lambda n: n * 300 * KIB), st.floats(0, 0.999))
    def test_any_size_is_covered_by_its_ends(self, size: int, part: float) -> None:
        device = MemoryDevice(size)
        found = fingerprint(device)
        at = int(size * part)
        device.corrupt(at, b"X")
        covered = at < MIB or at >= size - MIB
        ranges = changed_ranges(device, found)
        self.assertEqual(any(first <= at < end for first, end in ranges), covered)
        self.assertTrue(all(0 <= first < end <= size for first, end in ranges))

    def test_a_record_that_cannot_be_read(self) -> None:
        for broken in ({}, {"first": "", "chunks": 3, "last": ""}, {"first": 1, "chunks": [["x"]]}):
            with self.assertRaisesRegex(CorruptError, "cannot be read"):
                changed_ranges(self.device(), broken)

    def test_in_words(self) -> None:
        self.assertEqual(ranges_text([(0, 10)]), "bytes 0 to 9")
        text = ranges_text([(n, n + 1) for n in range(0, 10, 2)])
        self.assertEqual(text, "bytes 0 to 0, 2 to 2, 4 to 4 and 2 more ranges")

    def test_fits_every_superblock(self) -> None:
        log = initialise(MemoryDevice(MIB))
        for units in (1, 2, 3, 5, 9, 40, 200):
            bound = tuple(BoundUnit(n, f"qds{n}", 8 * MIB, "/d") for n in range(units))
            for slot in (8 * KIB, 64 * KIB, 512 * KIB):
                superblock = replace(log.superblock, units=bound, slot_bytes=slot)
                chunks = chunks_for(superblock)
                if chunks is None:
                    continue
                device = MemoryDevice(1 << 23)
                for number in range(FINGERPRINT_CHUNKS_MAX):
                    device.recent.note((number * CHUNK + (1 << 22), 512))
                made = {str(n): fingerprint(device, chunks) for n in range(units)}
                pack_slot(replace(superblock, fingerprints=made, reason="r" * 1500), 0)

    def test_room_for_all_where_there_is_one_ldsu(self) -> None:
        log = initialise(MemoryDevice(MIB), sizes=[8 * MIB])
        self.assertGreater(chunks_for(log.superblock) or 0, 48)
