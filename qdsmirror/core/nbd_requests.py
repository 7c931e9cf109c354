"""Parse a client's requests out of received bytes, in place, within a budget.

Source: the NBD project's protocol description, sections "Request message" and "Request types".
Everything about a request is checked here, so that an export sees valid requests only.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

from qdsmirror import limits
from qdsmirror.core import nbd
from qdsmirror.core.nbd import Request
from qdsmirror.errors import LimitError, ProtocolError

if TYPE_CHECKING:
    from qdsmirror.core.nbd_options import ExportInfo
    from qdsmirror.interfaces import INbdConnection

_RANGED = {nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES, nbd.CMD_BLOCK_STATUS}
_GROWING = {nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES}
#: Below this part of a received buffer, its payloads are copied, so as not to pin the buffer.
_PINNED_SHARE = 8


class BudgetTaker(Protocol):
    """Whoever takes from a `Budget`."""

    def budget_freed(self) -> None:
        """Try again: it is this taker's turn.  Called from within another's `Budget.give`."""

    def evict_if_stalled(self) -> None:
        """Give all back if nothing has moved since the last call and the client is to blame."""


class Budget:
    """Bytes that all connections of a process share; takers that find too little wait in turn.

    :param limit_bytes: how many there are.

    :ivar free_bytes: how many nobody holds.
    :ivar takers: everyone who may hold some.
    """

    def __init__(self, limit_bytes: int = limits.REQUEST_BUDGET_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.free_bytes = limit_bytes
        self.takers: set[BudgetTaker] = set()
        self._waiting: OrderedDict[BudgetTaker, None] = OrderedDict()

    def take(self, amount_bytes: int, taker: BudgetTaker) -> bool:
        """Take bytes, or queue up and be told by `BudgetTaker.budget_freed` when to try again."""
        waiting = self._waiting
        if not waiting:
            if amount_bytes <= self.free_bytes:
                self.free_bytes -= amount_bytes
                return True
        elif next(iter(waiting)) is taker and amount_bytes <= self.free_bytes:
            self.free_bytes -= amount_bytes
            self.forget(taker)
            return True
        waiting[taker] = None
        return False

    def give(self, amount_bytes: int) -> None:
        """Give bytes back."""
        self.free_bytes += amount_bytes
        assert self.free_bytes <= self.limit_bytes
        if self._waiting and amount_bytes:
            next(iter(self._waiting)).budget_freed()

    def forget(self, taker: BudgetTaker) -> None:
        """Take ``taker`` out of the queue, if it waits."""
        if taker in self._waiting:
            first = next(iter(self._waiting)) is taker
            del self._waiting[taker]
            if first and self._waiting:
                next(iter(self._waiting)).budget_freed()

    def is_waiting(self, taker: BudgetTaker) -> bool:
        """Tell whether ``taker`` stands in the queue."""
        return taker in self._waiting


class RequestParser:
    """The requests of one connection.

    Received bytes go in by `feed`, or straight into `rest` (then `filled`) while a payload is
    incomplete; `parse` gives the requests that are whole.  A payload is a slice of the bytes that
    were fed, or a buffer of its own, and nothing is ever written to either again.

    :param connection: what the requests name as their connection.
    :param export: the bounds they are checked against.
    :param taker: who waits when ``budget`` is exhausted.
    :param budget: where a write's or read's length is taken from, before anything is allocated.
    :param structured: whether structured replies were negotiated (reads may carry DF).
    :param block_status: whether ``base:allocation`` was selected.

    :ivar rest: the part of a payload that is still to come, to be received into; else ``None``.
    :ivar refused: requests to be answered with an error: (request, errno number, message).
    :ivar blocked: the last `parse` stopped for want of room or budget; do not receive.
    :ivar disconnect: the client said DISC; nothing after it is looked at.
    :ivar failure: the client speaks something else, or announces an absurd payload; nothing after
        it is looked at; close the connection.
    """

    def __init__(
        self,
        connection: INbdConnection,
        export: ExportInfo,
        taker: BudgetTaker,
        budget: Budget,
        structured: bool = False,
        block_status: bool = False,
    ) -> None:
        self._connection = connection
        self._size = export.size
        self._mask = export.minimum_block - 1
        self._taker = taker
        self._budget = budget
        self._data = b""
        self._view = memoryview(b"")
        self._position = 0
        self._skip = 0
        self._incomplete: Request | None = None
        fua = nbd.CMD_FLAG_FUA
        self._flags = {
            nbd.CMD_READ: fua | (nbd.CMD_FLAG_DF if structured else 0),
            nbd.CMD_WRITE: fua,
            nbd.CMD_FLUSH: fua,
            nbd.CMD_TRIM: fua,
            nbd.CMD_WRITE_ZEROES: fua | nbd.CMD_FLAG_NO_HOLE,
        }
        if block_status:
            self._flags[nbd.CMD_BLOCK_STATUS] = fua | nbd.CMD_FLAG_REQ_ONE
        self.rest: memoryview | None = None
        self.refused: list[tuple[Request, int, str]] = []
        self.blocked = False
        self.disconnect = False
        self.failure: ProtocolError | None = None

    def abandon(self) -> int:
        """Forget what was received; give the bytes of budget that an unfinished payload holds."""
        held = self._incomplete.length if self._incomplete is not None else 0
        self._incomplete = None
        self.rest = None
        self._end(None)
        return held

    def feed(self, data: bytes) -> None:
        """Take received bytes; only while `rest` is ``None`` and not `blocked`."""
        if self._position < len(self._data):
            data = self._data[self._position :] + data
        self._data = data
        self._view = memoryview(data)
        self._position = 0

    def filled(self, count: int) -> None:
        """Tell that ``count`` bytes were received into the start of `rest`."""
        assert self.rest is not None
        rest = self.rest[count:]
        self.rest = rest if len(rest) else None

    def parse(self, room: int) -> list[Request]:
        """Give the requests that are whole, in order, at most ``room`` of them."""
        requests: list[Request] = []
        self.blocked = False
        if self._incomplete is not None:
            if self.rest is not None:
                return requests
            requests.append(self._incomplete)
            self._incomplete = None
        data = self._data
        end = len(data)
        if self._skip:
            self._skip_received()
        if self._position >= end:
            return requests
        first = len(requests)
        payload_bytes = self._parse_into(requests, room, data, end)
        if payload_bytes and payload_bytes * _PINNED_SHARE < end:
            _unpin(requests[first:])
        if self._position == end:
            # The buffer now lives as long as its slices do, and no longer.
            self._data = b""
            self._view = memoryview(b"")
            self._position = 0
        return requests

    def _parse_into(self, requests: list[Request], room: int, data: bytes, end: int) -> int:
        """Parse while there are whole requests; give the bytes of payload among them."""
        unpack_from = nbd.REQUEST.unpack_from
        take = self._budget.take
        connection = self._connection
        taker = self._taker
        view = self._view
        size = self._size
        mask = self._mask
        longest = limits.NBD_PAYLOAD_BYTES_MAX
        request_magic = nbd.REQUEST_MAGIC
        position = self._position
        payload_bytes = 0
        # One loop with few calls: this is the path of every request.  Commands 0 and 1 are READ
        # and WRITE, flag 1 is FUA.
        while end - position >= 28:
            if len(requests) >= room:
                self.blocked = True
                break
            magic, flags, command, cookie, offset, length = unpack_from(data, position)
            if (
                command > 1
                or flags > 1
                or magic != request_magic
                or not 0 < length <= longest
                or offset + length > size
                or (offset | length) & mask
            ):
                self._position = position
                request = Request(connection, cookie, command, flags, offset, length)
                if not self._uncommon(request, magic, requests):
                    return payload_bytes
                position = self._position
                continue
            if not take(length, taker):
                self.blocked = True
                break
            position += 28
            if command:
                body = position
                position += length
                if position > end:
                    self._position = end
                    request = Request(connection, cookie, command, flags, offset, length)
                    self._begin_payload(request, view[body:end])
                    return payload_bytes
                payload_bytes += length
                requests.append(
                    Request(connection, cookie, 1, flags, offset, length, view[body:position])
                )
            else:
                requests.append(Request(connection, cookie, 0, flags, offset, length))
        self._position = position
        return payload_bytes

    def _begin_payload(self, request: Request, received: memoryview) -> None:
        buffer = bytearray(request.length)
        view = memoryview(buffer)
        view[: len(received)] = received
        request.payload = view.toreadonly()
        self._incomplete = request
        self.rest = view[len(received) :]

    def _uncommon(self, request: Request, magic: int, requests: list[Request]) -> bool:
        """Deal with what the loop leaves: other commands, flags, and what is refused."""
        if magic != nbd.REQUEST_MAGIC:
            return self._end(ProtocolError(f"NBD request magic is {magic:#010x}"))
        if request.command == nbd.CMD_DISC:
            self.disconnect = True
            return self._end(None)
        fault = self._fault(request)
        if fault is None and not self._budget.take(nbd.request_cost(request), self._taker):
            self.blocked = True
            return False
        self._position += nbd.REQUEST.size
        if fault is None:
            requests.append(request)
            return True
        self.refused.append((request, *fault))
        if request.command == nbd.CMD_WRITE:
            if request.length > limits.NBD_SKIP_BYTES_MAX:
                return self._end(LimitError(f"NBD write announces {request.length} bytes"))
            self._skip = request.length
            self._skip_received()
        return True

    def _end(self, failure: ProtocolError | None) -> bool:
        self.failure = failure
        self._position = len(self._data)
        return False

    def _skip_received(self) -> None:
        count = min(self._skip, len(self._data) - self._position)
        self._skip -= count
        self._position += count

    def _fault(self, request: Request) -> tuple[int, str] | None:
        """Say what is wrong with a request, as an errno number and a message."""
        command, offset, length = request.command, request.offset, request.length
        allowed = self._flags.get(command)
        if allowed is None:
            return errno.EINVAL, f"command {command} is unknown or was not negotiated"
        if request.flags & ~allowed:
            return errno.EINVAL, f"flags {request.flags:#x} do not belong to command {command}"
        if command not in _RANGED:
            if offset or length:
                return errno.EINVAL, "a flush has neither offset nor length"
            return None
        if not length:
            return errno.EINVAL, "the length is zero"
        if command <= nbd.CMD_WRITE and length > limits.NBD_PAYLOAD_BYTES_MAX:
            return errno.EINVAL, f"{length} bytes are over {limits.NBD_PAYLOAD_BYTES_MAX}"
        if offset + length > self._size:
            code = errno.ENOSPC if command in _GROWING else errno.EINVAL
            return code, f"offset {offset} + {length} is beyond the end at {self._size}"
        if (offset | length) & self._mask:
            return errno.EINVAL, f"offset or length is no multiple of {self._mask + 1}"
        return None


def _unpin(requests: list[Request]) -> None:
    """Copy payloads that would keep a much larger buffer alive."""
    for request in requests:
        if request.payload is not None:
            request.payload = bytes(request.payload)
