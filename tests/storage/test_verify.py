"""What differs on a device from the hashes of it."""

from __future__ import annotations

from unittest import mock

from blake3 import blake3
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.verify import ZEROES, Row, rows_of
from qdsmirror.limits import VERIFY_CHUNK_BYTES as CHUNK
from qdsmirror.storage.hashing import chunk_digests
from qdsmirror.storage.verify import differing
from tests.fakes import MemoryDevice

SIZE = 8 * CHUNK


def device(content: bytes = b"") -> MemoryDevice:
    return MemoryDevice(SIZE, content=content)


def rows(content: bytes) -> list[Row]:
    return rows_of(0, SIZE, chunk_digests(device(content), 0, SIZE, CHUNK))


class DifferingTests(SynchronousTestCase):
    def test_equal_content_does_not_differ(self) -> None:
        for content in (b"", b"x" * SIZE, b"y" * 5):
            self.assertEqual(differing(device(content), rows(content)), [])

    def test_differing_chunks_are_named_neighbours_as_one(self) -> None:
        content = bytearray(b"x" * SIZE)
        expected = rows(bytes(content))
        content[CHUNK] = content[3 * CHUNK - 1] = content[7 * CHUNK] = 0
        self.assertEqual(
            differing(device(bytes(content)), expected), [(CHUNK, 2 * CHUNK), (7 * CHUNK, CHUNK)]
        )

    def test_a_hole_is_looked_through_by_chunks(self) -> None:
        content = bytearray(SIZE)
        content[2 * CHUNK + 5] = content[SIZE - 1] = 1
        found = differing(device(bytes(content)), [Row(0, SIZE, ZEROES)])
        for at in (2 * CHUNK + 5, SIZE - 1):
            self.assertTrue(any(first <= at < first + length for first, length in found))
        self.assertLessEqual(sum(length for _, length in found), 2 * CHUNK)
        self.assertEqual(differing(device(), [Row(0, SIZE, ZEROES)]), [])
        written = device()
        with mock.patch.object(written, "hole", lambda *_: 0):
            self.assertEqual(differing(written, [Row(512, SIZE - 1024, ZEROES)]), [])

    def test_what_cannot_be_read_differs(self) -> None:
        broken = device(b"x" * SIZE)
        broken.fail("pread")
        self.assertEqual(differing(broken, rows(b"x" * SIZE)), [(0, CHUNK)])
        broken.fail("pread")
        with mock.patch.object(broken, "hole", lambda *_: 0):
            self.assertEqual(differing(broken, [Row(CHUNK, CHUNK, ZEROES)]), [(CHUNK, CHUNK)])

    def test_the_disk_is_read_and_not_the_cache(self) -> None:
        rotten = device(b"x" * SIZE)
        rotten.pread(SIZE, 0)
        rotten._disk[CHUNK] ^= 1
        self.assertEqual(differing(rotten, rows(b"x" * SIZE)), [(CHUNK, CHUNK)])

    def test_digest(self) -> None:
        self.assertEqual(rows(b"x" * SIZE)[0].digest, blake3(b"x" * CHUNK).digest())
