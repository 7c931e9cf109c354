"""What waits to be framed: an LDSU's requests in order, and those that a refresh holds back."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from qdsmirror.core import frames, nbd
from qdsmirror.core.frames import Entry
from qdsmirror.core.nbd import Request
from qdsmirror.core.zeroes import is_zero
from qdsmirror.interfaces import INbdConnection
from qdsmirror.limits import ZERO_ENTRY_BYTES_MAX


class Gathered(NamedTuple):
    """What one frame takes.

    :ivar entries: the frame's.
    :ivar finished: requests that end in it; ``ends``: behind which of its entries each does.
    :ivar taken: each request that was touched, and how many of its bytes were taken before.
    :ivar split: likewise, those that do not fit into one frame.
    """

    entries: list[Entry]
    finished: list[Request]
    ends: list[int]
    taken: list[tuple[Request, int]]
    split: list[tuple[Request, int]]


class WaitingRequests:
    """Requests of one LDSU; a request's ``state`` is how many of its bytes were framed.

    :param payload_cap: payload bytes of the largest frame.
    :param entries_cap: entries of the largest frame.
    :param minimum_block: a write is split at multiples of this only.
    """

    def __init__(self, payload_cap: int, entries_cap: int, minimum_block: int) -> None:
        self._payload_cap = payload_cap
        self._entries_cap = entries_cap
        self._minimum_block = minimum_block
        self._queue: deque[Request] = deque()
        self._held: list[Request] = []
        self._locked: tuple[int, int] | None = None

    def __bool__(self) -> bool:
        """Whether something may be framed now."""
        return bool(self._queue)

    @property
    def any(self) -> bool:
        """Whether something waits, held back or not."""
        return bool(self._queue or self._held)

    def add(self, request: Request) -> None:
        """Take a request: the last in the order."""
        request.state = 0
        self._queue.append(request)

    def drop(self) -> list[Request]:
        """Give all that waits, in order, and forget it."""
        waiting = [*self._held, *self._queue]
        self._held.clear()
        self._queue.clear()
        return waiting

    # -- connections --------------------------------------------------------------------------

    def drop_dead(self) -> None:
        """Forget requests of connections that are gone (rules.md 19)."""
        gone = {c for c in {r.connection for r in self._queue} if c.hung_up()}
        if gone:
            self._abandon(gone)

    def abandon_all(self) -> None:
        """Let go of every connection that waits to be framed: its client asks again elsewhere."""
        self._abandon({request.connection for request in self._queue})

    def _abandon(self, connections: Collection[INbdConnection]) -> None:
        dropped: dict[INbdConnection, list[Request]] = {one: [] for one in connections}
        for request in (*self._queue, *self._held):
            if request.connection in dropped:
                dropped[request.connection].append(request)
        self._queue = deque(r for r in self._queue if r.connection not in dropped)
        self._held = [r for r in self._held if r.connection not in dropped]
        for connection, requests in dropped.items():
            connection.abandon(requests)

    # -- framing ------------------------------------------------------------------------------

    def gather(self) -> Gathered:
        """Take what goes into the next frame."""
        queue = self._queue
        entries: list[Entry] = []
        finished: list[Request] = []
        ends: list[int] = []
        taken: list[tuple[Request, int]] = []
        split: list[tuple[Request, int]] = []
        room = self._payload_cap
        while queue and len(entries) < self._entries_cap:
            request = queue[0]
            if self._locked is not None and self._overlaps_lock(request):
                taken.append((request, request.state))
                self._held.append(queue.popleft())
                continue
            done: int = request.state
            length = request.length - done
            payload = request.payload
            if payload is None:
                take = min(length, ZERO_ENTRY_BYTES_MAX)
                kind = frames.ZEROES if request.flags & nbd.CMD_FLAG_NO_HOLE else frames.TRIM
                entries.append(Entry(request.offset + done, take, kind, None))
            else:
                take = length
                if take > room:
                    if entries and request.length <= self._payload_cap:
                        break
                    take = room // self._minimum_block * self._minimum_block
                    if not take:
                        break
                piece = payload if take == request.length else payload[done : done + take]
                if is_zero(piece):
                    entries.append(Entry(request.offset + done, take, frames.ZERO_WRITE, None))
                else:
                    entries.append(Entry(request.offset + done, take, frames.WRITE, piece))
                room -= take
            taken.append((request, done))
            if take != request.length:
                split.append((request, done))
            if take == length:
                queue.popleft()
                finished.append(request)
                ends.append(len(entries))
            else:
                request.state = done + take
        return Gathered(entries, finished, ends, taken, split)

    def put_back(self, taken: Sequence[tuple[Request, int]]) -> None:
        """Undo the last :meth:`gather`: there was no room."""
        for request, state in reversed(taken):
            request.state = state
            if self._held and self._held[-1] is request:
                # What it must not overtake goes back as well.
                self._held.pop()
            if not self._queue or self._queue[0] is not request:
                self._queue.appendleft(request)

    # -- a refresh's lock -----------------------------------------------------------------------

    @property
    def is_locked(self) -> bool:
        """Whether writes to some range are held back."""
        return self._locked is not None

    def lock(self, offset: int, length: int) -> None:
        """Hold back writes to a range until :meth:`unlock` (rules.md 14)."""
        assert self._locked is None, "one refresh chunk at a time"
        self._locked = (offset, offset + length)

    def unlock(self) -> None:
        """Put what was held back before what waits, in its order."""
        self._locked = None
        self._queue.extendleft(reversed(self._held))
        self._held.clear()

    def _overlaps_lock(self, request: Request) -> bool:
        assert self._locked is not None
        first, last = self._locked
        end = request.offset + request.length
        # What overlaps a write that is held back must not overtake it.
        return (request.offset < last and first < end) or any(
            request.offset < held.offset + held.length and held.offset < end for held in self._held
        )
