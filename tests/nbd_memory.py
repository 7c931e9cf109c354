"""An export in memory, and what tests of the NBD server are built from."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Generator, Sequence
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.endpoints import UNIXClientEndpoint, connectProtocol
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from qdsmirror.core import nbd
from qdsmirror.core.nbd import Request
from qdsmirror.interfaces import IExport, INbdConnection

BLOCK = 4096


@implementer(IExport)
class MemoryExport:
    """A block device in memory that answers at once, unless `held` is a list.

    :ivar written: the blocks that were written since they were last zeroed.
    :ivar batches: how many requests came with each submit.
    :ivar held: requests kept back for `release`; ``None`` answers them at once.
    """

    def __init__(self, name: str = "qds0", size: int = 1 << 20, minimum_block: int = 1) -> None:
        self.name = name
        self.size = size
        self.minimum_block = minimum_block
        self.preferred_block = 4096
        self.read_only = False
        self.closed = ""
        self.data = bytearray(size)
        self.written: set[int] = set()
        self.attached: list[INbdConnection] = []
        self.detached: list[INbdConnection] = []
        self.batches: list[int] = []
        self.held: list[Request] | None = None
        self.flushes = 0

    def attach(self, connection: INbdConnection) -> None:
        self.attached.append(connection)

    def detach(self, connection: INbdConnection) -> None:
        self.detached.append(connection)

    def submit(self, requests: Sequence[Request]) -> None:
        self.batches.append(len(requests))
        if self.held is not None:
            self.held += requests
            return
        self._answer(requests)

    def release(self) -> None:
        """Answer what was held."""
        held, self.held = self.held or [], None
        self._answer(held)

    def _answer(self, requests: Sequence[Request]) -> None:
        done: list[Request] = []
        for request in requests:
            if request.command in (nbd.CMD_READ, nbd.CMD_BLOCK_STATUS):
                request.connection.answer(done)
                done = []
            if request.command == nbd.CMD_READ:
                end = request.offset + request.length
                request.connection.answer_read(request, [bytes(self.data[request.offset : end])])
            elif request.command == nbd.CMD_BLOCK_STATUS:
                request.connection.answer_status(request, self._extents(request))
            else:
                self._change(request)
                done.append(request)
        if done:
            done[0].connection.answer(done)

    def _change(self, request: Request) -> None:
        start, length = request.offset, request.length
        blocks = range(start // BLOCK, (start + length - 1) // BLOCK + 1)
        if request.command == nbd.CMD_FLUSH:
            self.flushes += 1
        elif request.command == nbd.CMD_WRITE:
            assert request.payload is not None
            self.data[start : start + length] = request.payload
            self.written.update(blocks)
        else:
            self.data[start : start + length] = bytes(length)
            for block in blocks:
                if not any(self.data[block * BLOCK : (block + 1) * BLOCK]):
                    self.written.discard(block)

    def _extents(self, request: Request) -> list[tuple[int, int]]:
        extents = []
        position, end = request.offset, request.offset + request.length
        while position < end:
            stop = min((position // BLOCK + 1) * BLOCK, end)
            hole = position // BLOCK not in self.written
            extents.append((stop - position, nbd.STATE_HOLE | nbd.STATE_ZERO if hole else 0))
            position = stop
        return extents


class ListeningSocket:
    """A listening Unix socket in a directory of its own, as a master would pass it on."""

    def __init__(self, case: Any) -> None:
        self.directory = tempfile.mkdtemp(dir="/tmp", prefix="nbd")
        case.addCleanup(shutil.rmtree, self.directory, True)
        self.path = os.path.join(self.directory, "s")
        self.socket = socket.socket(socket.AF_UNIX)
        case.addCleanup(self.socket.close)
        self.socket.bind(self.path)
        os.chmod(self.path, 0o660)
        self.socket.listen(100)

    def fileno(self) -> int:
        return self.socket.fileno()

    def uri(self, name: str = "qds0") -> str:
        return f"nbd+unix:///{name}?socket={self.path}"


class Client(Protocol):
    """A client that tests drive: sends bytes, and waits for a number of bytes or the end."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.closed: Deferred[None] = Deferred()
        self._wanted: tuple[int, Deferred[bytes]] | None = None

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        self._give()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.closed.callback(None)
        if self._wanted is not None:
            self._wanted[1].errback(reason)

    def read(self, count: int) -> Deferred[bytes]:
        """Wait for the next ``count`` bytes."""
        wanted: Deferred[bytes] = Deferred()
        self._wanted = (count, wanted)
        self._give()
        return wanted

    def _give(self) -> None:
        if self._wanted is not None and len(self.received) >= self._wanted[0]:
            (count, wanted), self._wanted = self._wanted, None
            data = bytes(self.received[:count])
            del self.received[:count]
            wanted.callback(data)

    def send(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)


@inlineCallbacks
def connect(reactor: Any, path: str) -> Generator[Deferred[Any], Any, Client]:
    """Connect and read the greeting."""
    client = yield connectProtocol(UNIXClientEndpoint(reactor, path), Client())
    greeting = yield client.read(18)
    assert greeting == b"NBDMAGICIHAVEOPT\0\3"
    return client


def handshake(name: bytes = b"qds0", structured: bool = False) -> tuple[bytes, int]:
    """Give what a client says until transmission, and how many bytes it gets for that."""
    said, length = b"\0\0\0\3", 0
    if structured:
        query = b"base:allocation"
        data = struct.pack(">I", len(name)) + name + struct.pack(">II", 1, len(query)) + query
        said += b"IHAVEOPT" + struct.pack(">II", 8, 0)
        said += b"IHAVEOPT" + struct.pack(">II", 10, len(data)) + data
        length += 20 + 20 + 4 + len(query) + 20
    return said + b"IHAVEOPT" + struct.pack(">II", 1, len(name)) + name, length + 10
