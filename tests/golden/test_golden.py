"""Today's code reads the images of every format version, and writes those of its own."""

from __future__ import annotations

import gzip
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.frames import ENTRIES, REFRESH_BEGIN, REFRESH_END, VOID
from qdsmirror.storage.bitmap import load_bitmap
from qdsmirror.storage.journal import Mirror
from qdsmirror.storage.recovery import judge, open_units, replay
from tests.fakes import MemoryDevice
from tests.golden.make import DATA_BYTES, IMAGES, REFRESH_ID
from tests.storage.logworld import config, opener

HERE = Path(__file__).parent


def image(name: str) -> bytes:
    return gzip.decompress((HERE / name).read_bytes())


class GoldenTests(SynchronousTestCase):
    def test_reproduced_byte_for_byte(self) -> None:
        for name, make in IMAGES.items():
            self.assertEqual(make(), image(name), name)

    def test_the_writelog_is_read(self) -> None:
        raw = image("writelog-1.img.gz")
        devices = {
            "/log0": MemoryDevice(len(raw), content=raw),
            "/data0": MemoryDevice(DATA_BYTES, content=b"\xee" * DATA_BYTES),
        }
        (unit,) = open_units(config(1), opener(devices))
        superblock = unit.writelog.superblock
        self.assertEqual((superblock.counter, superblock.durable_gsn), (3, 3))
        self.assertEqual(superblock.refresh, {"id": REFRESH_ID.hex()})
        dirty, damage = load_bitmap(unit.writelog.device, superblock)
        self.assertEqual((dirty.dirty_bytes(), damage), (DATA_BYTES, ""))
        found = list(unit.writelog.reader(superblock.applied))
        self.assertEqual(
            [(f.header.kind, f.header.sequence, f.header.gsn_first) for f in found],
            [
                (ENTRIES, 4, 4),
                (ENTRIES, 5, 6),
                (ENTRIES, 6, 8),
                (VOID, 7, 10),
                (REFRESH_BEGIN, 8, 15),
                (ENTRIES, 9, 16),
                (REFRESH_END, 10, 20),
            ],
        )
        self.assertGreater(found[-1].end, unit.writelog.ring.size, "it went round")
        self.assertEqual(judge([unit]).next_gsn, 21)
        self.assertEqual(replay(unit), 7)
        expected = bytearray(b"\xee" * DATA_BYTES)
        for number in range(3):
            expected[4096 * number : 4096 * number + 20_000] = bytes([0x40 + number]) * 20_000
            expected[1024:1536] = bytes(512)
        expected[512:1024] = b"W" * 512
        expected[60_000:61_000] = bytes(1000)
        self.assertEqual(devices["/data0"].durable(), expected)

    def test_the_journal_is_read(self) -> None:
        raw = image("journal-1.img.gz")
        devices = {
            "/journal": MemoryDevice(len(raw), content=raw),
            "/mirror0": MemoryDevice(DATA_BYTES),
            "/mirror1": MemoryDevice(4096),
        }
        mirror = Mirror.open(config(2), opener(devices))
        self.assertEqual(mirror.replay(), 4)
        self.assertEqual(mirror.applied.gsn, 9)
        self.assertFalse(mirror.journal.superblock.coherent)
        self.assertEqual(mirror.journal.superblock.refresh, {"id": REFRESH_ID.hex()})
        self.assertEqual(devices["/mirror1"].durable(), b"r" * 512 + bytes(4096 - 512))
        self.assertEqual(devices["/mirror0"].durable()[9000:9700], b"w" * 700)
