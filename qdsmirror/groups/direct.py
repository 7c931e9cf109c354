"""Writes of an LDSU in bypass: past the writelog, straight to the data device.

In arrival order, a batch at a time.  For each batch the dirty bits of what it covers are durable
before its first write is issued (NO-HIDDEN, rules.md 12); a flush in it is answered once the data
device is synced behind everything before it.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred

from qdsmirror.core import frames, nbd
from qdsmirror.core.frames import Entry
from qdsmirror.core.latency import note_end
from qdsmirror.interfaces import INbdConnection
from qdsmirror.storage.apply import apply_entries
from qdsmirror.storage.bitmap import write_blocks

if TYPE_CHECKING:
    from qdsmirror.core.nbd import Request
    from qdsmirror.groups.unit import DriverUnit


class Direct:
    """The direct path of one LDSU.

    :ivar held: flushes that came while bypass was being left; answered by :meth:`release`.
    """

    def __init__(self, unit: DriverUnit) -> None:
        self._unit = unit
        self._queue: deque[Request] = deque()
        self._running = False
        self._written: list[Request] = []
        self.held: list[Request] = []

    @property
    def busy(self) -> bool:
        """Whether something taken is not yet answered."""
        return self._running or bool(self._queue or self._written)

    @property
    def waiting(self) -> int:
        """How many requests are not answered."""
        return len(self._queue) + len(self._written)

    def begin(self) -> None:
        """Take over what waits: the group is in bypass."""
        waiting = [*self._unit.waiting.drop(), *self.held]
        self.held = []
        self.take(waiting)

    def take(self, requests: Sequence[Request]) -> None:
        """Take writes, trims, zeroes and flushes, in order."""
        self._queue.extend(requests)
        self.go_on()

    def release(self) -> None:
        """Answer the flushes held: everything answered before them is durable by now."""
        held, self.held = self.held, []
        answer_all(held, self._now())

    def drop(self) -> list[Request]:
        """Give up what is not under way; the caller answers it."""
        dropped = [*self._written, *self._queue, *self.held]
        self._written = []
        self._queue.clear()
        self.held = []
        return dropped

    def go_on(self) -> None:
        """Take the next batch, unless one is under way."""
        if self._running:
            return
        self._answer()
        self._drop_dead()
        unit = self._unit
        if not self._queue or unit.refusal or (unit.log_failed and not unit.unlogged):
            return
        if not unit.group.answering.may_go_past:
            # It looks again when they may.
            return
        self._running = True
        batch = list(self._queue)
        self._queue.clear()
        entries = [_entry(request) for request in batch if request.command != nbd.CMD_FLUSH]
        dirty = unit.dirty
        changed = dirty.mark((entry.offset, entry.length) for entry in entries)
        # Of a failed writelog's LDSU everything counts as dirty.
        if changed and not unit.unlogged:
            unit.run_on_bitmap(
                partial(write_blocks, unit.writelog.device, dirty.area, dirty.blocks(changed)),
                partial(self._marked, batch, entries),
            )
        else:
            self._marked(batch, entries, None, None)

    def _drop_dead(self) -> None:
        """Forget the requests of connections that are gone (rules.md 19)."""
        gone = {c for c in {r.connection for r in self._queue} if c.hung_up()}
        for connection in gone:
            connection.abandon([r for r in self._queue if r.connection is connection])
        if gone:
            self._queue = deque(r for r in self._queue if r.connection not in gone)

    def clear_dirty(self) -> Deferred[None]:
        """Clear the dirty bitmap; fires when that is durable, or the writelog has failed."""
        unit = self._unit
        blocks = unit.dirty.blocks(unit.dirty.clear())
        cleared: Deferred[None] = Deferred()

        def done(_result: None, error: BaseException | None) -> None:
            if error is not None:
                unit.fail_log(error)
            cleared.callback(None)

        unit.run_on_bitmap(
            partial(write_blocks, unit.writelog.device, unit.dirty.area, blocks), done
        )
        return cleared

    def _marked(
        self,
        batch: list[Request],
        entries: list[Entry],
        _result: None,
        error: BaseException | None,
    ) -> None:
        unit = self._unit
        if error is not None:
            self._running = False
            self._queue.extendleft(reversed(batch))
            unit.fail_log(error)
            return
        late = [request for request in batch if self._needs_sync(request)]

        def job() -> None:
            apply_entries(unit.device, entries)
            if late:
                unit.device.fdatasync()

        unit.run_on_data(job, partial(self._were_written, batch))

    def _needs_sync(self, request: Request) -> bool:
        return (
            self._unit.group.always_durable
            or request.command == nbd.CMD_FLUSH
            or bool(request.flags & nbd.CMD_FLAG_FUA)
        )

    def _were_written(
        self, batch: list[Request], _result: None, error: BaseException | None
    ) -> None:
        if error is not None:
            self._running = False
            for request in batch:
                request.connection.answer_error(request, errno.EIO, str(error))
            self._unit.fail_data(error)
            return
        self._running = False
        self._written += batch
        self.go_on()
        self._unit.group.bypass.poke()

    def _now(self) -> float:
        now: float = self._unit.group.runtime.reactor.seconds()
        return now

    def _answer(self) -> None:
        """Answer what was written, unless a change of operation must first be durable (SYNC)."""
        if self._written and self._unit.group.answering.may_go_past:
            written, self._written = self._written, []
            answer_all(written, self._now())


def _entry(request: Request) -> Entry:
    """Give what is left to do of a request: a part of it may be in the writelog already."""
    done: int = request.state
    offset, length = request.offset + done, request.length - done
    payload = request.payload
    if payload is not None:
        return Entry(offset, length, frames.WRITE, payload[done:] if done else payload)
    kept = request.flags & nbd.CMD_FLAG_NO_HOLE
    return Entry(offset, length, frames.ZEROES if kept else frames.TRIM, None)


def abandon_all(requests: Sequence[Request]) -> None:
    """Leave requests unanswered, and cut their clients off: they ask again elsewhere."""
    for connection, own in _by_connection(requests).items():
        connection.abandon(own)


def answer_all(requests: Sequence[Request], now: float) -> None:
    """Answer requests with success, each connection's at once.

    :param now: seconds of the reactor.
    """
    note_end(requests, now)
    for connection, own in _by_connection(requests).items():
        connection.answer(own)


def _by_connection(requests: Sequence[Request]) -> dict[INbdConnection, list[Request]]:
    sorted_out: dict[INbdConnection, list[Request]] = {}
    for request in requests:
        sorted_out.setdefault(request.connection, []).append(request)
    return sorted_out
