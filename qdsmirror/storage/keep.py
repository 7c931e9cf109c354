"""Keeps what a backfresh is about to overwrite, and gives it back (man page qdskeep(5)).

A file of records, each durable before its blocks are overwritten.  Where a block was kept twice,
because a crash came before its overwriting was recorded, the first record has what stood there:
records are replayed from the last to the first.  Everything here blocks.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Any, NamedTuple

from crc32c import crc32c

from qdsmirror.errors import CorruptError, QdsError
from qdsmirror.limits import COMPARE_SPAN_BYTES, KEEP_HEADER_BYTES_MAX

KEEP_MAGIC = b"QDSKEEPF"
RECORD_MAGIC = b"QDSK"
KEEP_VERSION = 1

# magic version zero json_bytes, then the CRC of these and of the JSON
_HEADER = Struct(">8sHHI")
# magic ldsu offset length payload_crc, then the CRC of these
_RECORD = Struct(">4sIQII")
_CRC_BYTES = 4
_RECORD_BYTES = _RECORD.size + _CRC_BYTES


class Kept(NamedTuple):
    """Blocks as they were.

    :ivar ldsu: index in the group.
    :ivar offset: first byte, of the LDSU.
    """

    ldsu: int
    offset: int
    data: bytes


def _crc(data: bytes) -> bytes:
    return crc32c(data).to_bytes(_CRC_BYTES, "big")


def _pack(kept: Kept) -> bytes:
    head = _RECORD.pack(RECORD_MAGIC, kept.ldsu, kept.offset, len(kept.data), crc32c(kept.data))
    return head + _crc(head) + kept.data


class KeepWriter:
    """Appends to the file of one backfresh.

    :param about: what the file says of itself: group, id of the backfresh, LDSUs.
    """

    def __init__(self, path: str, about: dict[str, Any]) -> None:
        self.path = path
        self._about = about
        self._fd: int | None = None
        self._end = 0

    def create(self) -> None:
        """Make the file, durably; nobody but its owner may read it.

        :raises QdsError: it exists, or cannot be made.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        body = json.dumps(self._about).encode()
        head = _HEADER.pack(KEEP_MAGIC, KEEP_VERSION, 0, len(body)) + body
        try:
            self._fd = os.open(self.path, flags, 0o600)
            self._write(head + _crc(head))
            directory = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            self.close()
            raise QdsError(
                f"{self.path} cannot be made: {error.strerror}",
                hint="name a new file, where there is room for what differs",
            ) from error

    def discard(self) -> None:
        """Remove the file: nothing was overwritten."""
        self.close()
        os.unlink(self.path)

    def append(self, blocks: Sequence[Kept]) -> None:
        """Keep blocks, durably on return.

        :raises OSError: the file cannot be written; nothing counts as kept then.
        :raises CorruptError: it is not this backfresh's.
        """
        if self._fd is None:
            self._reopen()
        self._write(b"".join(map(_pack, blocks)))

    def _write(self, data: bytes) -> None:
        assert self._fd is not None
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], self._end + done)
        os.fdatasync(self._fd)
        self._end += len(data)

    def _reopen(self) -> None:
        """Go on with the file after a restart, behind its last intact record."""
        with KeepFile(self.path) as found:
            if found.about != self._about:
                raise CorruptError(f"{self.path} is the file of another backfresh")
            end = found.end
        self._fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.ftruncate(self._fd, end)
        self._end = end

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class KeepFile:
    """A file that was written, looked through from its beginning to its end.

    :ivar about: what it says of itself.
    :ivar count: of records; ``kept_bytes``: in them.
    :ivar end: behind the last intact record.
    :raises CorruptError: it is none, or damaged elsewhere than where its last append was cut off.
    :raises OSError: it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.kept_bytes = 0
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._places = array("Q")
        try:
            self._size = os.fstat(self._fd).st_size
            self.about, self.end = self._head()
            self._scan()
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        """How many records it has."""
        return len(self._places)

    def _head(self) -> tuple[dict[str, Any], int]:
        raw = os.pread(self._fd, _HEADER.size, 0)
        if len(raw) < _HEADER.size:
            raise CorruptError(f"{self.path} keeps nothing: it is too short")
        magic, version, _, length = _HEADER.unpack(raw)
        size = _HEADER.size + min(length, KEEP_HEADER_BYTES_MAX) + _CRC_BYTES
        whole = os.pread(self._fd, size, 0)
        if (magic, version) != (KEEP_MAGIC, KEEP_VERSION) or _crc(whole[:-4]) != whole[-4:]:
            raise CorruptError(f"{self.path} is no file that a backfresh has kept")
        about: dict[str, Any] = json.loads(whole[_HEADER.size : -_CRC_BYTES])
        return about, len(whole)

    def _scan(self) -> None:
        while self.end < self._size:
            kept = self._read(self.end)
            if kept is None:
                break
            self._places.append(self.end)
            self.kept_bytes += len(kept.data)
            self.end += _RECORD_BYTES + len(kept.data)
        # What was being appended when the power went was not overwritten.
        if self._size - self.end > 2 * COMPARE_SPAN_BYTES:
            raise CorruptError(
                f"{self.path} is damaged at byte {self.end}",
                hint="what it kept behind that cannot be given back",
            )

    def _read(self, at: int) -> Kept | None:
        """Read the record at a place; ``None`` if none is intact there."""
        raw = os.pread(self._fd, _RECORD_BYTES, at)
        if len(raw) < _RECORD_BYTES or _crc(raw[:-_CRC_BYTES]) != raw[-_CRC_BYTES:]:
            return None
        magic, ldsu, offset, length, crc = _RECORD.unpack_from(raw)
        if magic != RECORD_MAGIC or length > COMPARE_SPAN_BYTES:
            return None
        data = os.pread(self._fd, length, at + _RECORD_BYTES)
        return Kept(ldsu, offset, data) if len(data) == length and crc32c(data) == crc else None

    def backwards(self) -> Iterator[Kept]:
        """Give what is to be written back, in the order in which it is to be written.

        :raises CorruptError: the file reads differently than a moment ago.
        """
        for at in reversed(self._places):
            kept = self._read(at)
            if kept is None:
                raise CorruptError(f"{self.path} reads differently at byte {at} than a moment ago")
            yield kept

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> KeepFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
