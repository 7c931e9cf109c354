"""A failed sync stays known across processes (rules.md 4)."""

from __future__ import annotations

from pathlib import Path

from twisted.trial.unittest import TestCase

from qdsmirror.errors import BrokenError, DeviceFailedError, QdsError
from qdsmirror.storage.latch import FailureLatch


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
