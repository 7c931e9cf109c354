"""The lines that grow beside a group: its performance tracking file, and its events.

Both are ASCII files in the var directory (page qdsprf(5)).  One that has reached its
limit is renamed to ``NAME.1``, where it replaces the previous generation, and a new one begins
(patent: "These performance files are allowed to grow to a configurable limit ...  One previous
generation ... is retained").  Whatever moment a crash comes at, all lines that were synced, but
those of a generation that was given up, are in one of the two files, whole and in order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

#: More than this is not searched for the end of the last line at the start.
_TAIL_BYTES = 1 << 20


class Directory:
    """What a growing file needs of the file system; tests have one whose power can be cut.

    :param path: of the directory.
    :param mode: who may read the files that are made there.
    """

    def __init__(self, path: Path, mode: int = 0o644) -> None:
        self._path = path
        self._mode = mode

    def open(self, name: str) -> int:
        """Open a file for reading and appending, durably made where it is not there."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(self._path / name, flags)
        except FileNotFoundError:
            descriptor = os.open(self._path / name, flags | os.O_CREAT, self._mode)
        try:
            self._sync_names()
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def size(self, descriptor: int) -> int:
        """Give the bytes of an open file."""
        return os.fstat(descriptor).st_size

    def read(self, descriptor: int, length: int, offset: int) -> bytes:
        """Read from an open file."""
        return os.pread(descriptor, length, offset)

    def append(self, descriptor: int, data: bytes) -> int:
        """Append to an open file; give how many bytes it took."""
        return os.write(descriptor, data)

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut an open file."""
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        """Make an open file's content durable."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a file."""
        os.close(descriptor)

    def is_there(self, name: str, descriptor: int) -> bool:
        """Tell whether an open file still has its name."""
        try:
            named = os.stat(self._path / name, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(descriptor))

    def rename(self, name: str, to: str) -> None:
        """Give a file another name, durably, in place of what had it."""
        os.rename(self._path / name, self._path / to)
        self._sync_names()

    def _sync_names(self) -> None:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class GrowingFile:
    """A file of lines, one writer's, with its one previous generation.  Every call may block.

    :param directory: where it stands.
    :param limit: bytes; a line that would exceed them begins a new file.  (Not less than makes
        sense with the head.)
    :param head: the line that explains those below it, first in every file; empty: none.
    :param durable: each line is synced.
    """

    def __init__(
        self, directory: Directory, name: str, limit: int, head: str = "", durable: bool = False
    ) -> None:
        self.name = name
        self._directory = directory
        self._head = head
        self.go_by(limit)
        self._durable = durable
        self._descriptor: int | None = None
        self._size = 0

    def go_by(self, limit: int) -> None:
        """Have another limit from the next line on."""
        self.limit = max(limit, 4 * len(self._head))

    def write(self, lines: Sequence[str]) -> None:
        """Append lines, each without its end.

        :raises OSError: they are not written, or the last one is cut; the next call mends that.
        """
        if self._descriptor is not None and not self._directory.is_there(
            self.name, self._descriptor
        ):
            # Somebody has moved it away, or removed it.
            self.close()
        if self._descriptor is None:
            self._open()
        for line in lines:
            self._write((line + "\n").encode("ascii", "replace"))
        if self._durable:
            self._directory.sync(self._open_one())

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            self._directory.close(descriptor)

    def _open_one(self) -> int:
        assert self._descriptor is not None
        return self._descriptor

    def _open(self) -> None:
        """Open the file, cut what a crash has left behind its last whole line, add the head."""
        directory = self._directory
        self._descriptor = descriptor = directory.open(self.name)
        try:
            self._size = directory.size(descriptor)
            start = max(0, self._size - _TAIL_BYTES)
            content = directory.read(descriptor, self._size - start, start)
            # A file that was being extended when the power went may have zeroes for its new part.
            whole = content.partition(b"\0")[0]
            whole = whole[: whole.rfind(b"\n") + 1]
            if len(whole) != len(content):
                self._size = start + len(whole)
                directory.truncate(descriptor, self._size)
            if self._head and self._last_head(whole) != self._head:
                self._append((self._head + "\n").encode("ascii"))
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _last_head(content: bytes) -> str:
        line = content[content.rfind(b"\n#") + 1 :].partition(b"\n")[0]
        return line.decode("ascii", "replace") if line.startswith(b"#") else ""

    def _write(self, line: bytes) -> None:
        if self._size and self._size + len(line) > self.limit:
            self._rotate()
        self._append(line)

    def _append(self, line: bytes) -> None:
        """Append a line; one that was written in part is taken back."""
        descriptor = self._open_one()
        written = 0
        try:
            while written < len(line):
                written += self._directory.append(descriptor, line[written:])
        except OSError:
            if written:
                self._take_back()
            raise
        self._size += written

    def _take_back(self) -> None:
        try:
            self._directory.truncate(self._open_one(), self._size)
        except OSError:
            # The next line opens the file again, and that cuts it.
            self.close()

    def _rotate(self) -> None:
        """Make the file the previous generation: it is durable before it replaces that one."""
        self._directory.sync(self._open_one())
        self.close()
        self._directory.rename(self.name, f"{self.name}.1")
        self._open()


def replace_file(path: Path, text: str) -> None:
    """Give a file another content, all or nothing of it, for as long as the machine runs.

    :raises OSError: it has the old one.
    """
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)
