"""What a backfresh keeps of what it overwrites."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.errors import CorruptError, QdsError
from qdsmirror.limits import COMPARE_SPAN_BYTES
from qdsmirror.storage.keep import KeepFile, KeepWriter, Kept

ABOUT = {"group": 0, "id": "11" * 16, "ldsus": [["qds0", 4096]]}
BLOCKS = [Kept(0, 4096 * n, bytes([n + 1]) * 4096) for n in range(4)]


class KeepTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.path = os.path.abspath(self.mktemp())

    def written(self, *appends: list[Kept]) -> KeepWriter:
        writer = KeepWriter(self.path, ABOUT)
        writer.create()
        for blocks in appends:
            writer.append(blocks)
        self.addCleanup(writer.close)
        return writer

    def found(self) -> tuple[dict[str, object], list[Kept]]:
        with KeepFile(self.path) as file:
            kept = list(file.backwards())
            self.assertEqual(file.count, len(kept))
            self.assertEqual(file.kept_bytes, sum(len(one.data) for one in kept))
            return file.about, kept

    def test_it_comes_back_last_first(self) -> None:
        self.written(BLOCKS[:3], BLOCKS[3:])
        self.assertEqual(self.found(), (ABOUT, BLOCKS[::-1]))
        self.assertEqual(Path(self.path).stat().st_mode & 0o777, 0o600)

    def test_an_existing_file_is_left_alone(self) -> None:
        Path(self.path).write_text("precious")
        with self.assertRaises(QdsError):
            KeepWriter(self.path, ABOUT).create()
        self.assertEqual(Path(self.path).read_text(), "precious")

    def test_each_append_is_durable_on_return(self) -> None:
        writer = self.written()
        calls: list[str] = []
        with (
            mock.patch.object(os, "pwrite", lambda fd, data, at: calls.append("w") or len(data)),
            mock.patch.object(os, "fdatasync", lambda fd: calls.append("s")),
        ):
            writer.append(BLOCKS[:1])
        self.assertEqual(calls, ["w", "s"])

    def test_what_failed_is_written_over(self) -> None:
        writer = self.written(BLOCKS[:1])
        real = os.pwrite

        def half(fd: int, data: bytes, at: int) -> int:
            real(fd, data[:100], at)
            raise OSError(28, "No space left on device")

        with mock.patch.object(os, "pwrite", half), self.assertRaises(OSError):
            writer.append(BLOCKS[1:3])
        writer.append(BLOCKS[3:])
        self.assertEqual(self.found()[1], [BLOCKS[3], BLOCKS[0]])

    def test_a_torn_end_is_cut_off_and_gone_on_behind(self) -> None:
        self.written(BLOCKS[:2]).close()
        whole = Path(self.path).read_bytes()
        for lost in (1, 4096, 4100, 4124):
            with self.subTest(lost=lost):
                Path(self.path).write_bytes(whole[:-lost])
                again = KeepWriter(self.path, ABOUT)
                again.append(BLOCKS[2:3])
                again.close()
                self.assertEqual(self.found()[1], [BLOCKS[2], BLOCKS[0]])

    def test_damage_before_the_end_is_told(self) -> None:
        large = [Kept(0, n * COMPARE_SPAN_BYTES, bytes(COMPARE_SPAN_BYTES)) for n in range(3)]
        self.written(*([one] for one in large)).close()
        with open(self.path, "r+b") as file:
            file.seek(1000)
            file.write(b"x")
        with self.assertRaises(CorruptError) as caught:
            KeepFile(self.path)
        self.assertIn("is damaged at byte", caught.exception.message)

    def test_another_backfreshs_file_is_not_gone_on_with(self) -> None:
        self.written(BLOCKS[:1]).close()
        with self.assertRaises(CorruptError):
            KeepWriter(self.path, ABOUT | {"id": "22" * 16}).append(BLOCKS[1:])
        self.assertEqual(self.found()[1], BLOCKS[:1])

    def test_what_is_no_such_file(self) -> None:
        for content in (b"", b"QDSKEEPF", b"x" * 5000, b"QDSKEEPF\x00\x01\x00\x00\xff\xff\xff\xff"):
            Path(self.path).write_bytes(content)
            with self.assertRaises(CorruptError):
                KeepFile(self.path)
