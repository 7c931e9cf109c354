"""Disks whose power can be cut and whose operations can be made to fail: a FUSE file system.

``python -m tests.integration.fusedisk MOUNTPOINT IMAGES CONTROL`` shows the files of the directory
IMAGES at MOUNTPOINT, in one process and one thread, so that a cut is one instant for all of them.
What is written is kept in memory until an fsync; an image holds what an fsync has covered, as the
platter of a disk with a volatile cache does.  There is neither fallocate nor SEEK_HOLE.

Requests come on the Unix socket CONTROL, one JSON object and its answer a connection:

- ``cut``: nothing is answered from now on; of the unsynced writes each persists wholly, not at
  all, as a prefix, or as some of its sectors, as ``seed`` and ``keep`` (how likely) decide.
- ``fault``: an operation (``read``, ``write``, ``fsync``) of a file fails with ``errno`` from the
  one after ``after`` on, ``times`` times (never ending without); or writes only ``short`` bytes.
  A failed fsync loses what it should have made durable; the next one knows nothing of it.
- ``lie``: an fsync is called good from now on, and makes nothing durable.
- ``heal``: no more faults.  ``count``: how many operations a fault has failed.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import select
import socket
import stat
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECTOR_BYTES = 512
WRITE_BYTES_MAX = 1 << 20
_MS_NOSUID, _MS_NODEV = 2, 4

# linux/fuse.h
_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _STATFS = 1, 2, 3, 4, 14, 15, 16, 17
_RELEASE, _FSYNC, _FLUSH, _INIT, _OPENDIR, _READDIR, _RELEASEDIR = 18, 20, 25, 26, 27, 28, 29
_ACCESS, _INTERRUPT, _DESTROY, _BATCH_FORGET = 34, 36, 38, 42
_IN = struct.Struct("=IIQQIIII")
_OUT = struct.Struct("=IiQ")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("=QQQQII")
_IO = struct.Struct("=QQIIQII")
_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22
_DIRECT_IO = 1
_ROOT = 1
_SETATTR_SIZE = 1 << 3


class Disk:
    """One file: what it shows, and what of it no fsync has covered yet."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.image = os.open(path, os.O_RDWR)
        self.shown = bytearray(path.read_bytes())
        self.unsynced: list[tuple[int, bytes]] = []

    def write(self, offset: int, data: bytes) -> None:
        self.shown[offset : offset + len(data)] = data
        self.unsynced.append((offset, data))

    def sync(self) -> None:
        for offset, data in self.unsynced:
            os.pwrite(self.image, data, offset)
        self.unsynced.clear()

    def cut(self, source: random.Random, keep: float) -> None:
        """Let chance decide what of the unsynced writes was on the platter already."""
        for offset, data in self.unsynced:
            if source.random() < keep:
                for start, piece in _survivors(data, source):
                    os.pwrite(self.image, piece, offset + start)
        self.unsynced.clear()


def _survivors(data: bytes, source: random.Random) -> list[tuple[int, bytes]]:
    how = source.randrange(4)
    if how == 0:
        return [(0, data[: source.randrange(0, len(data) + 1, SECTOR_BYTES)])]
    if how == 1:
        starts = [s for s in range(0, len(data), SECTOR_BYTES) if source.random() < 0.5]
        return [(start, data[start : start + SECTOR_BYTES]) for start in starts]
    return [(0, data)]


class Fault:
    """Operations of one file that are to fail."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.file = told["file"]
        self.operation = told["operation"]
        self.errno = told.get("errno", errno.EIO)
        self.after = told.get("after", 0)
        self.times = told.get("times")
        self.short = told.get("short")
        self.failed = 0

    def strikes(self, disk: Disk, operation: str) -> bool:
        if disk.name != self.file or operation != self.operation:
            return False
        if self.after:
            self.after -= 1
            return False
        if self.times is not None and self.failed >= self.times:
            return False
        self.failed += 1
        return True


class Server:
    """The file system: files of one directory, by node number."""

    def __init__(self, fuse: int, images: Path) -> None:
        self.fuse = fuse
        paths = sorted(images.iterdir())
        self.disks = {number: Disk(path) for number, path in enumerate(paths, _ROOT + 1)}
        self.faults: list[Fault] = []
        self.dead = False
        self.lies = False

    def run(self, control: socket.socket) -> None:
        waiting = [self.fuse, control.fileno()]
        while True:
            ready, _, _ = select.select(waiting, [], [])
            if control.fileno() in ready:
                self._control(control)
                if self.dead:
                    waiting = [control.fileno()]
                    continue
            if self.fuse in ready:
                try:
                    request = os.read(self.fuse, WRITE_BYTES_MAX + (1 << 16))
                except OSError as error:
                    if error.errno == errno.ENODEV:
                        return
                    continue
                self._serve(request)

    def _control(self, control: socket.socket) -> None:
        connection, _ = control.accept()
        with connection, connection.makefile("rw") as stream:
            told = json.loads(stream.readline())
            answer: dict[str, Any] = {}
            if told["do"] == "cut":
                source = random.Random(told["seed"])
                answer["unsynced"] = sum(len(disk.unsynced) for disk in self.disks.values())
                for disk in self.disks.values():
                    disk.cut(source, told["keep"])
                self.dead = True
            elif told["do"] == "fault":
                self.faults.append(Fault(told))
            elif told["do"] == "lie":
                self.lies = True
            elif told["do"] == "heal":
                self.faults.clear()
            answer["count"] = sum(fault.failed for fault in self.faults)
            stream.write(json.dumps(answer) + "\n")

    def _serve(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = _IN.unpack_from(request)
        if opcode in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            return
        try:
            answer = self._answer(opcode, node, request[_IN.size :])
            code = 0
        except OSError as error:
            answer, code = b"", -int(error.errno or errno.EIO)
        try:
            os.write(self.fuse, _OUT.pack(_OUT.size + len(answer), code, unique) + answer)
        except OSError:
            pass  # who asked was killed meanwhile

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes:
        if opcode == _INIT:
            flags = _BIG_WRITES | _MAX_PAGES
            pages = WRITE_BYTES_MAX // 4096
            return struct.pack(
                "=IIIIHHIIHHI28x", 7, 31, 1 << 17, flags, 64, 48, WRITE_BYTES_MAX, 1, pages, 0, 0
            )
        if opcode == _LOOKUP:
            return self._lookup(body.rstrip(b"\0").decode())
        if opcode in (_GETATTR, _SETATTR):
            if opcode == _SETATTR and struct.unpack_from("=I", body)[0] & _SETATTR_SIZE:
                raise OSError(errno.EPERM, "a disk has its size")
            return struct.pack("=QII", 1, 0, 0) + self._attributes(node)
        if opcode == _OPEN:
            return struct.pack("=QII", node, _DIRECT_IO, 0)
        if opcode == _OPENDIR:
            return struct.pack("=QII", node, 0, 0)
        if opcode == _STATFS:
            return struct.pack("=QQQQQIIII24x", 1 << 30, 0, 0, 64, 0, 4096, 255, 4096, 0)
        if opcode == _READDIR:
            return self._names(struct.unpack_from("=QQI", body)[1])
        if opcode in (_RELEASE, _RELEASEDIR, _ACCESS, _DESTROY, _FLUSH):
            return b""
        if opcode in (_READ, _WRITE, _FSYNC):
            return self._transfer(opcode, self.disks[node], body)
        raise OSError(errno.ENOSYS, "not offered")

    def _lookup(self, name: str) -> bytes:
        for node, disk in self.disks.items():
            if disk.name == name:
                return _ENTRY.pack(node, 0, 1, 1, 0, 0) + self._attributes(node)
        raise OSError(errno.ENOENT, name)

    def _attributes(self, node: int) -> bytes:
        disk = self.disks.get(node)
        size, mode = (len(disk.shown), stat.S_IFREG | 0o600) if disk else (0, stat.S_IFDIR | 0o700)
        uid, gid = os.getuid(), os.getgid()
        return _ATTR.pack(
            node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, uid, gid, 0, 4096, 0
        )  # fmt: skip

    def _names(self, offset: int) -> bytes:
        listed = b""
        for number, (node, disk) in enumerate(self.disks.items(), 1):
            name = disk.name.encode()
            if number > offset:
                entry = struct.pack("=QQII", node, number, len(name), stat.S_IFREG >> 12) + name
                listed += entry.ljust((len(entry) + 7) & ~7, b"\0")
        return listed

    def _transfer(self, opcode: int, disk: Disk, body: bytes) -> bytes:
        name = {_READ: "read", _WRITE: "write", _FSYNC: "fsync"}[opcode]
        fault = next((one for one in self.faults if one.strikes(disk, name)), None)
        if opcode == _FSYNC:
            if fault is not None:
                disk.unsynced.clear()
                raise OSError(fault.errno, disk.name)
            if not self.lies:
                disk.sync()
            return b""
        _, offset, size, *_ = _IO.unpack_from(body)
        if fault is not None and fault.short is None:
            raise OSError(fault.errno, disk.name)
        if opcode == _READ:
            return bytes(disk.shown[offset : offset + size])
        if fault is not None:
            size = min(size, fault.short)
        disk.write(offset, body[_IO.size : _IO.size + size])
        return struct.pack("=II", size, 0)


def mount(place: Path) -> int:
    """Mount a FUSE file system; give the descriptor of its requests.

    :raises OSError: it is not allowed, or the kernel has none.
    """
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _MS_NOSUID | _MS_NODEV
    if libc.mount(b"qdsdisks", os.fsencode(place), b"fuse", flags, options.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(place))
    return fuse


def main(arguments: Sequence[str]) -> int:
    place, images, address = (Path(one) for one in arguments)
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(address))
        control.listen()
        Server(mount(place), images).run(control)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
