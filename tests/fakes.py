"""Verified fakes: the suites in tests/storage run against these and against the real things."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred
from zope.interface import implementer

from qdsmirror.core.recent import Recent
from qdsmirror.errors import DeviceFailedError
from qdsmirror.interfaces import IBlockDevice, IWorker
from qdsmirror.storage.identity import Identity

SECTOR = 512
_numbers = itertools.count(1)


class Unsynced(NamedTuple):
    """A write that no completed fdatasync covers.

    :ivar data: what it makes the range hold; zeroes for a zero.
    """

    offset: int
    data: bytes


#: Gives the (start, end) pieces of an unsynced write that a power cut leaves on the disk.
Choice = Callable[[Unsynced], Iterable[tuple[int, int]]]


def nothing(write: Unsynced) -> list[tuple[int, int]]:
    """A power cut that loses every unsynced write."""
    return []


def everything(write: Unsynced) -> list[tuple[int, int]]:
    """A power cut just after all was written back."""
    return [(0, len(write.data))]


def at_random(random: Random) -> Choice:
    """Not at all, wholly, as a prefix, or torn at sectors: each as likely."""

    def choose(write: Unsynced) -> list[tuple[int, int]]:
        length = len(write.data)
        sectors = [(at, min(at + SECTOR, length)) for at in range(0, length, SECTOR)]
        match random.randrange(4):
            case 0:
                return []
            case 1:
                return [(0, length)]
            case 2:
                return sectors[: random.randrange(len(sectors) + 1)]
            case _:
                return [piece for piece in sectors if random.random() < 0.5]

    return choose


_ZEROES = bytes(4096)


def extents_in(content: bytearray | mmap.mmap, offset: int, length: int) -> list[tuple[int, bool]]:
    """Give the (length, allocated) pieces of a range: blocks of nothing but zeroes are holes."""
    pairs: list[tuple[int, bool]] = []
    end = offset + length
    while offset < end:
        step = min(4096 - offset % 4096, end - offset)
        allocated = content[offset : offset + step] != _ZEROES[:step]
        if pairs and pairs[-1][1] == allocated:
            pairs[-1] = (pairs[-1][0] + step, allocated)
        else:
            pairs.append((step, allocated))
        offset += step
    return pairs


def first_hole(pairs: Sequence[tuple[int, bool]]) -> int:
    """Give how many bytes from the start of these pieces on are a hole."""
    length, allocated = next(iter(pairs), (0, True))
    return 0 if allocated else length


@implementer(IBlockDevice)
class MemoryDevice:
    """A disk with a page cache in front of it.

    ``crash`` is a power cut, ``reopen`` what a kill -9 leaves: the cache survives it.  Both give
    a new device and close this one, so that whoever still holds it cannot write.

    :ivar unsynced: the writes a power cut may lose, oldest first.
    :ivar faults: by method name, the errors that its next calls raise, first one first.
    :ivar syncs: completed fdatasyncs.
    """

    def __init__(
        self,
        size: int,
        *,
        logical_block: int = 512,
        physical_block: int = 4096,
        path: str = "memory",
        role: str = "data device",
        content: bytes = b"",
    ) -> None:
        self.path = path
        self.role = role
        self.size = size
        self.logical_block = logical_block
        self.physical_block = physical_block
        self.failed: str | None = None
        self.is_block = False
        self.identity = Identity("memory", 0, next(_numbers))
        self.stable = ""
        self.recent = Recent()
        self.unsynced: list[Unsynced] = []
        self.faults: dict[str, deque[OSError]] = {}
        self.syncs = 0
        self.cached = True
        self.closed = False
        self._disk = bytearray(content.ljust(size, b"\0"))
        self._seen: bytearray | mmap.mmap = bytearray(self._disk)
        self._memory: int | None = None

    # -- what happens to a disk ---------------------------------------------------------------

    def fail(self, method: str, code: int = errno.EIO) -> None:
        """Let one more call of this method fail."""
        error = OSError(code, os.strerror(code), self.path)
        self.faults.setdefault(method, deque()).append(error)

    def crash(self, choose: Choice = nothing) -> MemoryDevice:
        """Cut the power; give the device as it is found afterwards."""
        disk = bytearray(self._disk)
        for write in self.unsynced:
            for start, end in choose(write):
                disk[write.offset + start : write.offset + end] = write.data[start:end]
        return self._successor(disk, disk, [])

    def reopen(self) -> MemoryDevice:
        """Kill the process that has it open; give the device as another process opens it."""
        return self._successor(self._disk, self._seen, self.unsynced)

    def durable(self) -> bytes:
        """Give what the disk holds for certain."""
        return bytes(self._disk)

    def content(self) -> bytes:
        """Give what reads see."""
        return bytes(self._seen)

    def corrupt(self, offset: int, data: bytes) -> None:
        """Change the disk behind everybody's back."""
        self._disk[offset : offset + len(data)] = data
        self._seen[offset : offset + len(data)] = data

    def _successor(
        self, disk: bytearray, seen: bytearray | mmap.mmap, unsynced: list[Unsynced]
    ) -> MemoryDevice:
        self.close()
        device = MemoryDevice(
            self.size,
            logical_block=self.logical_block,
            physical_block=self.physical_block,
            path=self.path,
            role=self.role,
        )
        device.identity = self.identity
        device.stable = self.stable
        device._disk[:] = disk
        device._seen[:] = seen
        device.unsynced = list(unsynced)
        return device

    # -- IBlockDevice ---------------------------------------------------------------------------

    def latch(self, reason: str) -> None:
        if self.failed is None:
            self.failed = reason

    def pread(self, length: int, offset: int) -> bytes:
        self._enter("pread")
        data = bytes(self._seen[offset : offset + length])
        if len(data) != length:
            raise OSError(errno.EIO, "read past the end", self.path)
        return data

    def pread_nowait(self, length: int, offset: int) -> bytes | None:
        self._enter("pread_nowait")
        if not self.cached or offset + length > self.size:
            return None
        return bytes(self._seen[offset : offset + length])

    def pwritev(self, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        self._enter("pwritev", writes=True)
        self._write(offset, b"".join(buffers))

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        self._enter("zero", writes=True)
        self._write(offset, bytes(length))

    def fdatasync(self) -> None:
        self._enter("fdatasync", writes=True, faulty=False)
        waiting = self.faults.get("fdatasync")
        if waiting:
            # As Linux does: the pages count as clean and stay readable until they are evicted.
            error = waiting.popleft()
            self.unsynced.clear()
            self.latch(f"fdatasync: {error.strerror}")
            raise self._refusal() from error
        for write in self.unsynced:
            self._disk[write.offset : write.offset + len(write.data)] = write.data
        self.unsynced.clear()
        self.syncs += 1

    def drop_cache(self, offset: int = 0, length: int = 0) -> None:
        self._enter("drop_cache")
        self._seen[:] = self._disk
        for write in self.unsynced:
            self._seen[write.offset : write.offset + len(write.data)] = write.data

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        self._enter("extents")
        return extents_in(self._seen, offset, length)

    def hole(self, offset: int, length: int) -> int:
        return first_hole(self.extents(offset, length))

    def open_shared(self) -> int:
        self._enter("open_shared")
        if self._memory is None:
            # From now on the page cache lies in a file, which the descriptor shows as it changes.
            self._memory = os.memfd_create("qds-test")
            os.truncate(self._memory, self.size)
            shared = mmap.mmap(self._memory, self.size)
            shared[:] = bytes(self._seen)
            self._seen = shared
        return os.open(f"/proc/self/fd/{self._memory}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        self.closed = True
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

    def discard(self) -> None:
        """Give the memory back at once: a closed daemon and its devices hold on to each other."""
        self.close()
        self._disk, self._seen = bytearray(), bytearray()
        self.unsynced = []

    def _write(self, offset: int, data: bytes) -> None:
        if offset < 0 or offset + len(data) > self.size:
            raise OSError(errno.ENOSPC, "range exceeds the device", self.path)
        if data:
            self.recent.note((offset, len(data)))
            self._seen[offset : offset + len(data)] = data
            self.unsynced.append(Unsynced(offset, data))

    def _enter(self, method: str, writes: bool = False, faulty: bool = True) -> None:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.path)
        if writes and self.failed is not None:
            raise self._refusal()
        if faulty and self.faults.get(method):
            raise self.faults[method].popleft()

    def _refusal(self) -> DeviceFailedError:
        return DeviceFailedError(f"{self.role} {self.path} failed ({self.failed})", path=self.path)


@implementer(IWorker)
class StepWorker:
    """Jobs wait until they are stepped, one at a time."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Callable[[], Any], Callable[..., None]]] = deque()
        self._stopped: list[Deferred[None]] | None = None
        self._stepping = 0

    def run(self, job: Callable[[], Any], done: Callable[..., None]) -> None:
        if self._stopped is not None:
            raise RuntimeError("a stopped worker takes no jobs")
        self.waiting.append((job, done))

    def step(self) -> bool:
        """Run the oldest job and tell its owner; ``False`` when there is none."""
        if not self.waiting:
            return False
        job, done = self.waiting.popleft()
        self._stepping += 1
        try:
            result, error = _perform(job)
            done(result, error)
        finally:
            self._stepping -= 1
            self._check_stopped()
        return True

    def step_all(self) -> int:
        """Run jobs until none is left, those that come meanwhile included."""
        count = 0
        while self.step():
            count += 1
        return count

    def drop(self) -> None:
        """Forget the jobs that wait, as a kill -9 does."""
        self.waiting.clear()

    def stop(self) -> Deferred[None]:
        fired: Deferred[None] = Deferred()
        if self._stopped is None:
            self._stopped = []
        self._stopped.append(fired)
        self._check_stopped()
        return fired

    def _check_stopped(self) -> None:
        if self._stopped and not self.waiting and not self._stepping:
            fired, self._stopped = self._stopped, []
            for deferred in fired:
                deferred.callback(None)


@implementer(IWorker)
class ImmediateWorker:
    """Runs each job at once; a job given by a ``done`` runs after that ``done`` returned."""

    def __init__(self) -> None:
        self._steps = StepWorker()
        self._running = False

    def run(self, job: Callable[[], Any], done: Callable[..., None]) -> None:
        self._steps.run(job, done)
        if self._running:
            return
        self._running = True
        try:
            self._steps.step_all()
        finally:
            self._running = False

    def stop(self) -> Deferred[None]:
        return self._steps.stop()


def _perform(job: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return job(), None
    except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the job's owner
        return None, error
