"""Files that grow by lines: their one previous generation, and what any crash leaves of them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.storage.tracking import Directory, GrowingFile

HEAD = "# n text"


class PowerCut(BaseException):
    """The machine has no power any more."""


@dataclass
class Inode:
    """A file's content, and how much of it is durable."""

    data: bytearray = field(default_factory=bytearray)
    durable: int = 0


class Disk:
    """A directory whose power can be cut, and whose space can end.

    :param ops: so many operations go well.
    :param space: bytes that can be appended.
    :ivar cuts: files can be made shorter.
    """

    def __init__(self, seed: int = 0, ops: int = 1 << 30, space: int = 1 << 30) -> None:
        self.names: dict[str, Inode] = {}
        self.random = Random(seed)
        self.ops = ops
        self.space = space
        self.cuts = True
        self.opened: dict[int, Inode] = {}
        self.count = 0

    def _op(self) -> None:
        self.ops -= 1
        if self.ops < 0:
            raise PowerCut

    def power_back(self) -> None:
        """Show what a cut has left: any part of what was not synced."""
        self.ops = 1 << 30
        self.opened.clear()
        for inode in self.names.values():
            # Pages reach the disk in any order: what lacks before others reads as zeroes.
            lost, end = sorted(self.random.randint(inode.durable, len(inode.data)) for _ in "12")
            inode.data[lost:end] = bytes(end - lost)
            del inode.data[self.random.randint(lost, len(inode.data)) :]
            inode.durable = len(inode.data)

    def text(self, name: str) -> str:
        return self.names[name].data.decode() if name in self.names else ""

    # -- what a Directory does ----------------------------------------------------------------

    def open(self, name: str) -> int:
        if name not in self.names:
            # A cut in the middle of it leaves the name, or not.
            if self.ops <= 0 and self.random.random() < 0.5:
                self.names[name] = Inode()
            self._op()
            self.names[name] = Inode()
        self.count += 1
        self.opened[self.count] = self.names[name]
        return self.count

    def size(self, descriptor: int) -> int:
        return len(self.opened[descriptor].data)

    def read(self, descriptor: int, length: int, offset: int) -> bytes:
        return bytes(self.opened[descriptor].data[offset : offset + length])

    def append(self, descriptor: int, data: bytes) -> int:
        self._op()
        if not self.space:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(len(data), self.space)
        self.space -= taken
        self.opened[descriptor].data += data[:taken]
        return taken

    def truncate(self, descriptor: int, size: int) -> None:
        if not self.cuts:
            raise OSError(errno.EIO, "Input/output error")
        inode = self.opened[descriptor]
        del inode.data[size:]
        inode.durable = min(inode.durable, size)

    def sync(self, descriptor: int) -> None:
        self._op()
        inode = self.opened[descriptor]
        inode.durable = len(inode.data)

    def close(self, descriptor: int) -> None:
        del self.opened[descriptor]

    def is_there(self, name: str, descriptor: int) -> bool:
        return self.names.get(name) is self.opened[descriptor]

    def rename(self, name: str, to: str) -> None:
        if self.ops <= 0 and self.random.random() < 0.5:
            self.names[to] = self.names.pop(name)
        self._op()
        self.names[to] = self.names.pop(name)


def lines(disk: Disk, name: str) -> list[str]:
    return disk.text(name).splitlines()


def rows(disk: Disk) -> list[int]:
    """Give the numbers that stand in both generations; each line must be whole, its head above."""
    found = []
    for name in ("f.1", "f"):
        content = disk.text(name)
        assert not content or content.endswith("\n"), content[-40:]
        assert not content or content.startswith(HEAD + "\n"), content[:40]
        for line in content.splitlines():
            if line != HEAD:
                number, text = line.split(" ")
                assert text == "x" * (int(number) % 7), line
                found.append(int(number))
    return found


def row(number: int) -> str:
    return f"{number} " + "x" * (number % 7)


class GenerationTests(SynchronousTestCase):
    def test_one_previous_generation(self) -> None:
        disk = Disk()
        file = GrowingFile(disk, "f", 60, HEAD)  # type: ignore[arg-type]
        for number in range(1000, 1030):
            file.write([row(number)])
            self.assertLessEqual(len(disk.text("f")), 60)
        self.assertEqual(set(disk.names), {"f", "f.1"})
        found = rows(disk)
        self.assertEqual(found, list(range(found[0], 1030)))
        self.assertGreater(len(disk.text("f.1")), 45)

    def test_a_row_that_fills_it_exactly_stays(self) -> None:
        disk = Disk()
        file = GrowingFile(disk, "f", 40)  # type: ignore[arg-type]
        file.write(["x" * 19, "y" * 19])
        self.assertEqual(set(disk.names), {"f"})
        file.write(["z"])
        self.assertEqual((lines(disk, "f"), len(lines(disk, "f.1"))), (["z"], 2))

    def test_the_head_stands_again_where_it_changes(self) -> None:
        disk = Disk()
        GrowingFile(disk, "f", 1000, "# a").write(["1"])  # type: ignore[arg-type]
        GrowingFile(disk, "f", 1000, "# a").write(["2"])  # type: ignore[arg-type]
        GrowingFile(disk, "f", 1000, "# b").write(["3"])  # type: ignore[arg-type]
        GrowingFile(disk, "f", 1000, "# b").write(["4"])  # type: ignore[arg-type]
        self.assertEqual(lines(disk, "f"), ["# a", "1", "2", "# b", "3", "4"])

    def test_a_head_that_is_longer_than_the_limit(self) -> None:
        disk = Disk()
        file = GrowingFile(disk, "f", 10, "# " + "x" * 50)  # type: ignore[arg-type]
        for _ in range(20):
            file.write(["1" * 20])
        self.assertGreaterEqual(len(lines(disk, "f.1")), 5)

    def test_a_full_disk(self) -> None:
        """What does not fit is not there; what comes when there is room again is whole."""
        disk = Disk(space=len(HEAD) + 1 + 14)
        file = GrowingFile(disk, "f", 1000, HEAD)  # type: ignore[arg-type]
        file.write([row(1000)])
        self.assertRaises(OSError, file.write, [row(1003)])
        self.assertEqual(rows(disk), [1000])
        disk.space = 1000
        file.write([row(1004)])
        self.assertEqual(rows(disk), [1000, 1004])

    def test_a_row_that_cannot_be_taken_back(self) -> None:
        """What is behind a torn row is not glued to it."""
        disk = Disk(space=len(HEAD) + 1 + 14)
        file = GrowingFile(disk, "f", 1000, HEAD)  # type: ignore[arg-type]
        file.write([row(1000)])
        disk.cuts = False
        with self.assertRaises(OSError) as caught:
            file.write([row(1003)])
        self.assertEqual(caught.exception.errno, errno.ENOSPC)
        self.assertEqual(disk.opened, {})
        disk.space = 1000
        self.assertRaises(OSError, file.write, [row(1004)])
        disk.cuts = True
        file.write([row(1005)])
        self.assertEqual(rows(disk), [1000, 1005])


class CrashTests(SynchronousTestCase):
    @given(st.lists(st.integers(0, 120), min_size=1, max_size=4), st.integers(), st.booleans())
    @settings(max_examples=300, deadline=None)
    def test_power_cut_anywhere(self, cuts: list[int], seed: int, durable: bool) -> None:
        """Whole lines, in order, none missing between; with ``durable`` all that were written."""
        disk = Disk(seed)
        number = 1000
        for ops in cuts:
            disk.ops = ops
            written = 0
            file = GrowingFile(disk, "f", 100, HEAD, durable=durable)  # type: ignore[arg-type]
            with contextlib.suppress(PowerCut):
                for each in range(number, 2000):
                    file.write([row(each)])
                    written = each
            disk.power_back()
            GrowingFile(disk, "f", 100, HEAD).write([])  # type: ignore[arg-type]
            found = rows(disk)
            if durable and written:
                self.assertIn(written, found)
            if found:
                self.assertEqual(found, list(range(found[0], found[-1] + 1)))
            number = found[-1] + 1 if found else 1000


class RealTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.base = Path(tempfile.mkdtemp(dir="/tmp", prefix="qdst"))
        self.addCleanup(shutil.rmtree, self.base)

    def test_rotation(self) -> None:
        file = GrowingFile(Directory(self.base), "f", 64, HEAD)
        for number in range(1000, 1030):
            file.write([row(number)])
        file.close()
        self.assertEqual(sorted(os.listdir(self.base)), ["f", "f.1"])
        last = (self.base / "f").read_text().splitlines()
        self.assertEqual((last[0], last[-1]), (HEAD, row(1029)))
        self.assertEqual((self.base / "f").stat().st_mode & 0o777, 0o644)

    def test_the_mode_of_each_generation(self) -> None:
        self.addCleanup(os.umask, os.umask(0o022))
        file = GrowingFile(Directory(self.base, 0o640), "f", 64, HEAD)
        for number in range(1000, 1030):
            file.write([row(number)])
        modes = [(self.base / name).stat().st_mode & 0o777 for name in ("f", "f.1")]
        self.assertEqual(modes, [0o640, 0o640])

    def test_a_file_that_was_moved_away(self) -> None:
        file = GrowingFile(Directory(self.base), "f", 640, HEAD)
        file.write([row(1000)])
        (self.base / "f").rename(self.base / "mine")
        file.write([row(1001)])
        (self.base / "f").unlink()
        file.write([row(1002)])
        self.assertEqual((self.base / "f").read_text().splitlines(), [HEAD, row(1002)])

    def test_a_link_is_not_followed(self) -> None:
        (self.base / "f").symlink_to(self.base / "elsewhere")
        file = GrowingFile(Directory(self.base), "f", 640, HEAD)
        self.assertRaises(OSError, file.write, [row(1000)])

    def test_kill(self) -> None:
        """A writer that is killed at any moment leaves whole lines, none missing."""
        program = (
            "import sys; from pathlib import Path\n"
            "from qdsmirror.storage.tracking import *\n"
            f"f = GrowingFile(Directory(Path({str(self.base)!r})), 'f', 400, {HEAD!r})\n"
            "n = int(sys.argv[1])\n"
            "while True:\n"
            "    f.write([f'{n} ' + 'x' * (n % 7)]); print(n, flush=True); n += 1\n"
        )
        number = 1000
        for turn in range(5):
            with subprocess.Popen(
                [sys.executable, "-c", program, str(number)], stdout=subprocess.PIPE, text=True
            ) as writer:
                assert writer.stdout is not None
                for _ in range(40 + 13 * turn):
                    number = int(writer.stdout.readline())
                writer.send_signal(signal.SIGKILL)
                number = int(writer.stdout.read().split("\n")[-2:][0] or number)
            disk = Disk()
            for name in os.listdir(self.base):
                disk.names[name] = Inode(bytearray((self.base / name).read_bytes()))
            found = rows(disk)
            self.assertIn(number, found)
            self.assertEqual(found, list(range(found[0], found[-1] + 1)))
            number = found[-1] + 1
