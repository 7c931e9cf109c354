"""The seams between the layers, as zope interfaces."""

# Interfaces declare methods without ``self``.
# mypy: disable-error-code="empty-body"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from zope.interface import Attribute, Interface

if TYPE_CHECKING:
    from twisted.internet.defer import Deferred

    from qdsmirror.core.nbd import Request
    from qdsmirror.core.recent import Recent

_T = TypeVar("_T")


class IGroup(Interface):
    """What a child does for a group: DriverGroup, PrimaryGroup, RemoteGroup, StatisticsGroup."""

    number: int = Attribute("the group's number, e.g. 0 for dsgrp000")

    def start() -> Deferred[None]:
        """Recover and begin to serve; fails with a QdsError."""

    def stop() -> Deferred[None]:
        """End in order: nothing answered is lost."""

    def status() -> dict[str, Any]:
        """Give this side's part of ``qdsinfo --json``."""


class IWorker(Interface):
    """Runs blocking jobs in order, off the reactor thread or (where they cannot block) on it."""

    def run(job: Callable[[], _T], done: Callable[[_T | None, BaseException | None], None]) -> None:
        """Run ``job()``; then, on the reactor thread, ``done(result, error)``.

        Jobs of one worker run one at a time, in the order given; ``done`` calls come in the same
        order.  ``error`` is ``None`` or the exception that ``job`` raised.  ``done`` is never
        called before ``run`` was entered, but may be called before it returns.
        """

    def stop() -> Deferred[None]:
        """End the worker after the jobs it has."""


class IBlockDevice(Interface):
    """A file or block device as bytes at offsets.  Every call may block; errors are OSError."""

    path: str = Attribute("the path as configured")
    role: str = Attribute("what it is for, e.g. 'data device of qds0'")
    size: int = Attribute("bytes")
    logical_block: int = Attribute("bytes: what offsets and lengths are multiples of")
    physical_block: int = Attribute("bytes: what the hardware writes as one")
    stable: str = Attribute("what it is under any path, storage.identity; empty if unknown")
    recent: Recent = Attribute("the last writes")
    failed: str | None = Attribute("why nothing is written any more, once a sync has failed")

    def pread(length: int, offset: int) -> bytes:
        """Read exactly ``length`` bytes; a short read is an OSError(EIO)."""

    def pread_nowait(length: int, offset: int) -> bytes | None:
        """Read what can be had without blocking: all of it, or ``None``."""

    def pwritev(buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        """Write the buffers one after another from ``offset``: all of them, or OSError."""

    def zero(offset: int, length: int, unmap: bool) -> None:
        """Make the range read as zeroes (rules.md 25); ``unmap`` allows to free the space."""

    def fdatasync() -> None:
        """Make every completed write durable."""

    def drop_cache(offset: int = 0, length: int = 0) -> None:
        """Forget cached pages, so that the next reads come from the disk (rules.md 3).

        Those of a range, or, where its length is 0, of the whole device.
        """

    def extents(offset: int, length: int) -> list[tuple[int, bool]]:
        """Give (length, allocated) pairs that cover the range."""

    def hole(offset: int, length: int) -> int:
        """Give how many of the range's first bytes are not allocated, and read as zeroes."""

    def open_shared() -> int:
        """Give a new read-only descriptor with no lock on it, for another process (rules.md 10)."""

    def close() -> None:
        """Release locks and the descriptor."""


class IExport(Interface):
    """One LDSU as the NBD server sees it."""

    name: str = Attribute("export name, e.g. 'qds0'")
    size: int = Attribute("bytes")
    minimum_block: int = Attribute("bytes: logical block of the data device")
    preferred_block: int = Attribute("bytes")
    read_only: bool = Attribute("whether whatever would change it is refused")
    closed: str = Attribute("why it takes no clients now; empty while it does")

    def attach(connection: INbdConnection) -> None:
        """A client has entered transmission on this export."""

    def detach(connection: INbdConnection) -> None:
        """That client is gone: its unframed requests must not be framed (rules.md 19)."""

    def submit(requests: Sequence[Request]) -> None:
        """Take valid requests of one connection in arrival order.

        Ranges, alignment, command flags and lengths were checked.  Each request is answered once,
        in any order, through its ``connection``.
        """


class INbdConnection(Interface):
    """What an export may do with a client's connection."""

    def answer(requests: Sequence[Request]) -> None:
        """Answer requests without payload (write, flush, trim, zeroes) with success, at once."""

    def answer_read(request: Request, pieces: Sequence[bytes | memoryview]) -> None:
        """Answer a read with its data, ``request.length`` bytes in all."""

    def answer_error(request: Request, errno_code: int, message: str) -> None:
        """Answer with an error: a Python ``errno`` number, mapped to NBD's, and one line."""

    def abandon(requests: Sequence[Request]) -> None:
        """Leave requests unanswered for good and cut the client off, so that it asks again."""

    def release(request: Request) -> None:
        """Keep the payload of a request no longer: only its answer is still to come."""

    def answer_status(request: Request, extents: Sequence[tuple[int, int]]) -> None:
        """Answer a block status: (length, flags) pairs, flags of ``base:allocation``."""

    def hung_up() -> bool:
        """Tell whether the client's end is gone (polls the socket, never blocks)."""
