"""An export in memory, and what tests of the NBD server are built from."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

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
        done = []
        for request in requests:
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


Clean = Callable[[], Any]
