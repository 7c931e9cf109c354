"""A failed sync stays known across processes (rules.md 4)."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from twisted.trial.unittest import TestCase

from qdsmirror.errors import BrokenError, DeviceFailedError, QdsError
from qdsmirror.storage.latch import FailureLatch, FailureMemory


class LatchTests(TestCase):
    def setUp(self) -> None:
        self.path = Path(self.mktemp())

    def test_nothing_failed(self) -> None:
        latch = FailureLatch(self.path)
        latch.check(["/dev/a"])
        latch.record("/dev/a", OSError(28, "No space left on device"))
        self.assertFalse(self.path.exists())

    def test_a_failed_sync_is_refused_by_the_next_process(self) -> None:
        FailureLatch(self.path).record("/dev/a", DeviceFailedError("fdatasync: EIO"))
        FailureLatch(self.path).record("/dev/b", DeviceFailedError("fdatasync: EIO"))
        later = FailureLatch(self.path)
        later.check(["/dev/c"])
        for device in ("/dev/a", "/dev/b"):
            error = self.assertRaises(BrokenError, later.check, [device])
            self.assertIn(device, error.message)
            self.assertIn("EIO", error.message)
            self.assertIn("qdswlinit", error.hint)

    def test_only_the_operator_clears(self) -> None:
        latch = FailureLatch(self.path)
        latch.record("/dev/a", DeviceFailedError("fdatasync: EIO"))
        latch.clear()
        latch.check(["/dev/a"])
        latch.clear()

    def test_unreadable_file_is_no_permission(self) -> None:
        for text in ("", "{", "[]", '{"failed": 3}'):
            self.path.write_text(text)
            self.assertRaises(BrokenError, FailureLatch(self.path).check, ["/dev/a"])

    def test_cannot_be_written(self) -> None:
        latch = FailureLatch(self.path / "missing" / "x.state")
        self.assertRaises(QdsError, latch.record, "/dev/a", DeviceFailedError("EIO"))

    def test_written_whole_before_it_has_its_name_and_then_the_name(self) -> None:
        """A power cut leaves the file as it was or as it shall be."""
        FailureLatch(self.path).record("/dev/a", DeviceFailedError("fdatasync: EIO"))
        calls: list[tuple[str, bool, bytes]] = []
        fsync, replace = os.fsync, os.replace

        def synced(fd: int) -> None:
            mode = os.fstat(fd).st_mode
            # Through another descriptor: this one is for writing only.
            content = b"" if stat.S_ISDIR(mode) else Path(f"/proc/self/fd/{fd}").read_bytes()
            calls.append(("sync", stat.S_ISDIR(mode), content))
            fsync(fd)

        def replaced(old: Path, new: Path) -> None:
            self.assertNotIn(b"/dev/b", self.path.read_bytes())
            calls.append(("rename", False, old.read_bytes()))
            replace(old, new)

        self.patch(os, "fsync", synced)
        self.patch(os, "replace", replaced)
        FailureLatch(self.path).record("/dev/b", DeviceFailedError("fdatasync: EIO"))
        self.assertEqual([call[:2] for call in calls],
                         [("sync", False), ("rename", False), ("sync", True)])  # fmt: skip
        self.assertEqual(calls[0][2], calls[1][2])
        self.assertEqual(self.path.read_bytes(), calls[1][2])


class MemoryTests(TestCase):
    def setUp(self) -> None:
        self.path = Path(self.mktemp())
        self.memory = FailureMemory()
        self.told: list[tuple[str, str]] = []

    def latch(self, path: Path | None = None) -> FailureLatch:
        return FailureLatch(path or self.path, lambda: self.memory.of(3), self.tell)

    def tell(self, device: str, reason: str) -> None:
        self.told.append((device, reason))
        self.memory.remember(3, device, reason)

    def test_refused_where_no_file_can_be_written(self) -> None:
        latch = self.latch(self.path / "missing" / "x.state")
        self.assertRaises(QdsError, latch.record, "/dev/a", DeviceFailedError("fdatasync: EIO"))
        self.assertEqual(self.told, [("/dev/a", "fdatasync: EIO")])
        error = self.assertRaises(BrokenError, latch.check, ["/dev/a"])
        self.assertIn("/dev/a has failed: fdatasync: EIO", error.message)
        latch.check(["/dev/b"])

    def test_told_before_it_is_written(self) -> None:
        self.path.mkdir()
        self.assertRaises(QdsError, self.latch().record, "/dev/a", DeviceFailedError("EIO"))
        self.assertEqual(self.told, [("/dev/a", "EIO")])

    def test_in_two_parts_of_which_the_first_never_blocks(self) -> None:
        latch, error = self.latch(), DeviceFailedError("EIO")
        self.assertFalse(latch.tell("/dev/b", OSError("EIO")))
        self.assertTrue(latch.tell("/dev/a", error))
        self.assertEqual(self.told, [("/dev/a", "EIO")])
        self.assertFalse(self.path.exists())
        latch.write("/dev/a", error)
        self.assertEqual(len(self.told), 1)
        self.assertEqual(FailureLatch(self.path).failures(), {"/dev/a": "EIO"})

    def test_written_as_soon_as_that_is_possible(self) -> None:
        self.memory.remember(3, "/dev/a", "fdatasync: EIO")
        self.latch().check(["/dev/b"])
        self.assertEqual(FailureLatch(self.path).failures(), {"/dev/a": "fdatasync: EIO"})

    def test_what_need_not_be_written_is_not(self) -> None:
        self.latch().check(["/dev/b"])
        self.assertFalse(self.path.exists())
        self.memory.remember(3, "/dev/a", "EIO")
        self.latch().keep()
        before = self.path.stat().st_ino
        self.latch().keep()
        self.assertEqual(self.path.stat().st_ino, before)

    def test_the_files_other_devices_stay(self) -> None:
        FailureLatch(self.path).record("/dev/a", DeviceFailedError("first"))
        self.latch().record("/dev/b", DeviceFailedError("second"))
        self.assertEqual(
            FailureLatch(self.path).failures(), {"/dev/a": "first", "/dev/b": "second"}
        )

    def test_handed_over(self) -> None:
        self.assertIsNone(self.memory.hand_over([3]))
        self.memory.remember(3, "/dev/a", "EIO")
        self.memory.remember(4, "/dev/b", "EIO")
        descriptor = self.memory.hand_over([2, 3])
        assert descriptor is not None
        other = FailureMemory()
        other.take(descriptor)
        self.assertEqual((other.groups(), other.of(3)), ([3], {"/dev/a": "EIO"}))
        self.assertRaises(OSError, os.fstat, descriptor)
        self.assertEqual(self.memory.forget(3), ["/dev/a"])
        self.assertEqual(self.memory.forget(3), [])
        self.assertEqual(self.memory.groups(), [4])
