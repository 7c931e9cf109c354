"""Reading an LDSU: the data device, and over it what is accepted and not yet applied there."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from qdsmirror.core.extents import allocation
from qdsmirror.core.frames import Entry
from qdsmirror.core.pending import PendingIndex, overlay
from qdsmirror.interfaces import IBlockDevice, IWorker
from qdsmirror.storage.hashing import chunk_digests

if TYPE_CHECKING:
    from qdsmirror.core.nbd import Request


class Reading:
    """Answers reads of one LDSU.

    :param pending: what is accepted and not yet applied.
    :param worker: for reads that would block.
    :param note_error: told of failed reads.
    """

    def __init__(
        self,
        name: str,
        device: IBlockDevice,
        pending: PendingIndex,
        worker: IWorker,
        note_error: Callable[[str], None],
    ) -> None:
        self._name = name
        self._device = device
        self._pending = pending
        self._worker = worker
        self._note_error = note_error

    def read(self, request: Request) -> None:
        """Answer a read."""
        pending = self._pending.overlapping(request.offset, request.length) if self._pending else ()
        if len(pending) == 1:
            only = pending[0]
            skip = request.offset - only.offset
            if only.payload is not None and skip >= 0 and skip + request.length <= only.length:
                request.connection.answer_read(
                    request, [only.payload[skip : skip + request.length]]
                )
                return
        try:
            data = self._device.pread_nowait(request.length, request.offset)
        except OSError as error:
            self._was_read(request, pending, None, error)
            return
        if data is not None:
            self._was_read(request, pending, data, None)
            return
        self._worker.run(
            partial(self._device.pread, request.length, request.offset),
            partial(self._was_read, request, pending),
        )

    def _was_read(
        self,
        request: Request,
        pending: Sequence[Entry],
        data: bytes | None,
        error: BaseException | None,
    ) -> None:
        if error is not None or data is None:
            # A read error is the client's answer, not the LDSU's end: other blocks may be well.
            self._note_error(f"{self._name}: read at {request.offset}: {error}")
            request.connection.answer_error(request, errno.EIO, str(error))
            return
        if pending:
            base = bytearray(data)
            overlay(base, request.offset, pending)
            data = bytes(base)
        request.connection.answer_read(request, [data])

    def block_status(self, request: Request) -> None:
        """Answer a block status request (NBD: base:allocation)."""
        pending = self._pending.overlapping(request.offset, request.length)

        def found(extents: list[tuple[int, bool]] | None, error: BaseException | None) -> None:
            if error is not None or extents is None:
                request.connection.answer_error(request, errno.EIO, str(error))
                return
            request.connection.answer_status(
                request, allocation(request.offset, request.length, extents, pending)
            )

        self._worker.run(partial(self._device.extents, request.offset, request.length), found)

    def find_hole(self, offset: int, length: int, done: Callable[[int], None]) -> None:
        """Tell ``done`` how many bytes from ``offset`` on are a hole with nothing pending."""
        if self._pending.overlapping(offset, length):
            done(0)
            return

        def found(hole: int | None, _error: BaseException | None) -> None:
            # An error here is met again, and told, by the read that follows.
            done(hole or 0)

        self._worker.run(partial(self._device.hole, offset, length), found)

    def digests(
        self,
        offset: int,
        length: int,
        chunk: int,
        done: Callable[[bytes | None, BaseException | None], None],
    ) -> None:
        """Hash what applications see of a range, chunk by chunk; see :func:`chunk_digests`.

        Without a lock on the range: of each byte, what it was at some instant until ``done``.
        """
        pending = self._pending.overlapping(offset, length)
        self._worker.run(partial(chunk_digests, self._device, offset, length, chunk, pending), done)

    def read_chunk(
        self, offset: int, length: int, done: Callable[[bytes | None, BaseException | None], None]
    ) -> None:
        """Read what applications see of a range, for a refresh."""
        pending = self._pending.overlapping(offset, length)

        def finish(data: bytes | None, error: BaseException | None) -> None:
            if data is not None and pending:
                base = bytearray(data)
                overlay(base, offset, pending)
                data = bytes(base)
            done(data, error)

        self._worker.run(partial(self._device.pread, length, offset), finish)
