"""The NBD server: connections of one group's clients, between the codec and the exports.

The protocol itself is in `qdsmirror.core.nbd`, `~qdsmirror.core.nbd_options` and
`~qdsmirror.core.nbd_requests`; what keeps a client within bounds (security.md 6) is here.
"""

# Twisted's transports have few annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from qdsmirror import limits
from qdsmirror.core import nbd
from qdsmirror.core.nbd import Request
from qdsmirror.core.nbd_options import ExportClosedError, ExportInfo, Negotiation
from qdsmirror.core.nbd_requests import Budget, RequestParser
from qdsmirror.errors import ProtocolError
from qdsmirror.interfaces import IExport, INbdConnection
from qdsmirror.net.nbd_transport import ShapedPort, ShapedServer

_log = Logger()

Exports = Mapping[str, IExport] | Callable[[], Mapping[str, IExport]]


def listen_nbd(
    reactor: Any, descriptor: int, exports: Exports, budget: Budget, multi_conn: bool = True
) -> NbdServer:
    """Serve NBD on a listening Unix socket.

    :param reactor: IReactorFDSet and IReactorTime.
    :param descriptor: the listening socket, duplicated; the caller goes on owning its own, and
        the socket's path is neither changed nor removed.
    :param exports: by name, or a callable that gives them (asked at each handshake).
    :param budget: bytes of requests, shared by all servers of the process.
    :param multi_conn: whether a flush on one connection covers the writes of all.
    """
    server = NbdServer(reactor, exports, budget, multi_conn)
    server.port = ShapedPort(reactor, descriptor, server)
    server.port.startListening()
    return server


class NbdServer:
    """All clients of one listening socket.

    :ivar port: the listening port.
    :ivar connections: the clients that are connected.
    """

    port: ShapedPort

    def __init__(
        self, clock: Any, exports: Exports, budget: Budget, multi_conn: bool = True
    ) -> None:
        self.clock = clock
        self.budget = budget
        self.connections: set[NbdConnection] = set()
        self._exports = exports
        self._multi_conn = multi_conn
        self._stopping = False
        self._gone: Deferred[None] | None = None

    def build(self) -> NbdConnection | None:
        """Make the protocol for a client, unless there are too many."""
        if self._stopping or len(self.connections) >= limits.NBD_CONNECTIONS_MAX:
            return None
        return NbdConnection(self)

    def exports(self) -> Mapping[str, IExport]:
        """Give the exports of now."""
        return self._exports() if callable(self._exports) else self._exports

    def find(self, name: str) -> ExportInfo | None:
        """Describe an export to a client.

        :raises ExportClosedError: it takes none now.
        """
        export = self.exports().get(name)
        if export is None:
            return None
        if export.closed:
            raise ExportClosedError(export.closed)
        return ExportInfo(
            export.name,
            export.size,
            export.minimum_block,
            export.preferred_block,
            self._multi_conn,
            export.read_only,
        )

    def getHost(self) -> UNIXAddress:
        """Give the listening socket's path (IListeningPort)."""
        return self.port.getHost()

    def stopListening(self) -> Deferred[None]:
        """Accept no more clients; those that are connected stay (IListeningPort)."""
        return self.port.stopListening()

    def disconnect_all(self) -> Deferred[None]:
        """End all connections: what was submitted is answered, nothing more is read.

        Fires when the last one is gone.  A client that does not read its replies is given
        `limits.NBD_STALL_SECONDS`.
        """
        self._stopping = True
        for connection in list(self.connections):
            connection.drain()
        if not self.connections:
            return succeed(None)
        if self._gone is None:
            self._gone = Deferred()
        waiter: Deferred[None] = Deferred()
        self._gone.chainDeferred(waiter)
        return waiter

    def lost(self, connection: NbdConnection) -> None:
        """Forget a connection."""
        self.connections.discard(connection)
        if not self.connections and self._gone is not None:
            gone, self._gone = self._gone, None
            gone.callback(None)


@implementer(INbdConnection)
class NbdConnection(Protocol):
    """One client.

    Requests that arrive together are submitted together; replies that the export gives meanwhile
    are sent together.  Reading pauses while too much is unanswered, unread by the client, or held
    by all (the budget).

    :ivar rest: where the transport receives the rest of a payload, or ``None``.
    """

    transport: ShapedServer

    def __init__(self, server: NbdServer) -> None:
        self.rest: memoryview | None = None
        self._server = server
        self._budget = server.budget
        self._negotiation = Negotiation(lambda: sorted(server.exports()), server.find)
        self._structured = False
        self._parser: RequestParser | None = None
        self._export: IExport | None = None
        self._batch: list[Request] = []
        self._unanswered = 0
        # Bytes of read replies that the socket has not taken: they keep their budget.
        self._owed_bytes = 0
        self._corked: list[bytes | memoryview] | None = None
        self._paused = False
        self._draining = False
        self._lost = False
        self._moves = 0
        self._moves_seen = -1
        self._deadline: IDelayedCall | None = None
        self._turn: IDelayedCall | None = None
        self._look: IDelayedCall | None = None

    # -- receiving ----------------------------------------------------------------------------

    def connectionMade(self) -> None:
        """Greet, and expect the handshake's end in time."""
        self._server.connections.add(self)
        self._deadline = self._server.clock.callLater(
            limits.NBD_HANDSHAKE_SECONDS, self._abort, "the handshake took too long"
        )
        self.transport.send([self._negotiation.greeting()])

    def dataReceived(self, data: bytes) -> None:
        """Take what the transport received."""
        if self._parser is None:
            self._negotiate(data)
        elif not self._draining:
            self._parser.feed(data)
            self._parse()

    def filled(self, count: int) -> None:
        """Take note that ``count`` bytes were received into `rest`."""
        parser = self._parser
        assert parser is not None
        self._moves += 1
        parser.filled(count)
        self.rest = parser.rest
        if self.rest is None:
            self._parse()

    def _negotiate(self, data: bytes) -> None:
        negotiation = self._negotiation
        try:
            reply = negotiation.receive(data)
        except ProtocolError as error:
            self._abort(error.message)
            return
        if reply:
            self.transport.send([reply])
        if negotiation.aborted:
            self.drain()
        elif negotiation.finished:
            self._enter_transmission()

    def _enter_transmission(self) -> None:
        negotiation = self._negotiation
        info = negotiation.export
        assert info is not None
        export = self._server.exports().get(info.name)
        if export is None or export.closed:
            self._abort(f"{info.name} is gone")
            return
        self._cancel_deadline()
        self._structured = negotiation.structured
        self._parser = RequestParser(
            self, info, self, self._budget, negotiation.structured, negotiation.block_status
        )
        self._export = export
        self._budget.takers.add(self)
        export.attach(self)
        if negotiation.rest:
            self.dataReceived(negotiation.rest)

    def _parse(self) -> None:
        parser = self._parser
        assert parser is not None
        batch = parser.parse(limits.NBD_REQUESTS_MAX - self._unanswered - len(self._batch))
        self._batch = self._batch + batch if self._batch else batch
        self.rest = parser.rest

    def process(self) -> None:
        """Submit what has been parsed, send what was answered at once, and pause or go on."""
        parser = self._parser
        export = self._export
        if parser is None or export is None or self._draining or self._lost:
            return
        while True:
            self._corked = corked = []
            try:
                for request, code, message in parser.refused:
                    corked.append(nbd.error_reply(request, code, message, self._structured))
                parser.refused.clear()
                batch = self._batch
                if batch:
                    self._batch = []
                    self._unanswered += len(batch)
                    export.submit(batch)
            finally:
                self._corked = None
                if corked:
                    self.transport.send(corked)
                    self._settle()
            if not parser.blocked or self._is_congested():
                break
            self._parse()
            if not self._batch and not parser.refused:
                break
        if self._draining:
            self._close_if_answered()
        elif parser.failure is not None:
            self._abort(parser.failure.message)
        elif parser.disconnect:
            self.drain()
        else:
            self._pace(parser)

    # -- pausing ------------------------------------------------------------------------------

    def _is_congested(self) -> bool:
        return self.transport.outgoing_bytes > limits.NBD_OUTGOING_BYTES_MAX

    def _pace(self, parser: RequestParser) -> None:
        """Stop or start reading."""
        congested = self._is_congested()
        if congested:
            # Whoever cannot use his turn must not keep others from theirs.
            self._budget.forget(self)
        if parser.blocked or congested:
            if not self._paused:
                self._paused = True
                self.transport.stopReading()
            if self._look is None and self._budget.is_waiting(self):
                self._look = self._server.clock.callLater(
                    limits.NBD_STALL_SECONDS, self._look_for_stalled
                )
        elif self._paused:
            self._paused = False
            self.transport.startReading()

    def _go_on_soon(self) -> None:
        if self._turn is None and not self._lost and not self._draining:
            self._turn = self._server.clock.callLater(0, self._go_on)

    def _go_on(self) -> None:
        self._turn = None
        if self._is_congested():
            self._budget.forget(self)
            return
        try:
            self._parse()
            self.process()
        except BaseException:
            self._abort("the export failed")
            raise

    def budget_freed(self) -> None:
        """It is this connection's turn to take from the budget."""
        self._go_on_soon()

    def _look_for_stalled(self) -> None:
        self._look = None
        if not self._budget.is_waiting(self):
            return
        for taker in list(self._budget.takers):
            taker.evict_if_stalled()
        self._look = self._server.clock.callLater(limits.NBD_STALL_SECONDS, self._look_for_stalled)

    def evict_if_stalled(self) -> None:
        """Disconnect if this client holds budget and has moved no byte since the last look."""
        if self.rest is None and not self._owed_bytes:
            self._moves_seen = -1
        elif self._moves == self._moves_seen:
            self._abort("the client has stalled and others wait")
        else:
            self._moves_seen = self._moves

    def drained(self) -> None:
        """Take note that the socket took outgoing bytes."""
        self._moves += 1
        self._settle()
        if self._paused and not self._is_congested():
            self._go_on_soon()

    # -- answering ----------------------------------------------------------------------------

    def answer(self, requests: Sequence[Request]) -> None:
        """Answer requests without payload with success, at once."""
        if not requests:
            return
        self._unanswered -= len(requests)
        held = sum([request.length for request in requests if request.payload is not None])
        if held:
            self._budget.give(held)
        self._reply([nbd.success_replies(requests)])

    def answer_read(self, request: Request, pieces: Sequence[bytes | memoryview]) -> None:
        """Answer a read with its data."""
        assert sum([len(piece) for piece in pieces]) == request.length
        self._unanswered -= 1
        if self._lost:
            self._budget.give(request.length)
            return
        self._owed_bytes += request.length
        self._reply([nbd.read_header(request, self._structured), *pieces])

    def answer_error(self, request: Request, errno_code: int, message: str) -> None:
        """Answer with an error."""
        self._unanswered -= 1
        self._budget.give(_held_bytes(request))
        self._reply([nbd.error_reply(request, errno_code, message, self._structured)])

    def abandon(self, requests: Sequence[Request]) -> None:
        """Leave requests unanswered for good, and cut the client off: it asks again elsewhere."""
        self._unanswered -= len(requests)
        held = sum(_held_bytes(request) for request in requests)
        self._abort("its requests are left to its next connection")
        self._budget.give(held)

    def release(self, request: Request) -> None:
        """Keep a write's payload no longer: others may have its part of the budget."""
        held, request.payload = request.payload, None
        if held is not None:
            self._budget.give(request.length)

    def answer_status(self, request: Request, extents: Sequence[tuple[int, int]]) -> None:
        """Answer a block status."""
        if not any(length > 0 for length, _ in extents):
            self.answer_error(request, errno.EIO, "nothing is known of this range")
            return
        self._unanswered -= 1
        self._reply([nbd.status_reply(request, extents)])

    def _reply(self, pieces: list[bytes | memoryview]) -> None:
        if self._corked is not None:
            self._corked.extend(pieces)
            return
        if self._lost:
            return
        self.transport.send(pieces)
        if self._owed_bytes:
            self._settle()
        if self._draining:
            self._close_if_answered()
        elif self._paused:
            self._go_on_soon()

    def _settle(self) -> None:
        """Give back the budget of read replies that the socket has taken."""
        gone = self._owed_bytes - self.transport.outgoing_bytes
        if gone > 0:
            self._owed_bytes -= gone
            self._budget.give(gone)

    def hung_up(self) -> bool:
        """Tell whether the client's end is gone."""
        return self._lost or self.transport.hung_up()

    # -- the end ------------------------------------------------------------------------------

    def drain(self) -> None:
        """Read no more; close once everything submitted is answered."""
        if self._draining or self._lost:
            return
        self._draining = True
        self._cancel_deadline()
        self.transport.stopReading()
        self._release()
        self._close_if_answered()

    def _close_if_answered(self) -> None:
        if self._unanswered or self._lost or self._deadline is not None:
            return
        self._deadline = self._server.clock.callLater(
            limits.NBD_STALL_SECONDS, self._abort, "the client does not read its replies"
        )
        self.transport.loseConnection()

    def _abort(self, reason: str) -> None:
        if not self._lost:
            name = self._export.name if self._export is not None else None
            of = f" of {name}" if name is not None else ""
            _log.info("NBD client{of} disconnected: {reason}", of=of, ldsu=name, reason=reason)
            self._lost = True
            self.transport.abortConnection()

    def _release(self) -> None:
        """Give back what was taken for requests that will not be submitted."""
        self._budget.forget(self)
        held = sum(nbd.request_cost(request) for request in self._batch)
        self._batch = []
        if self._parser is not None:
            held += self._parser.abandon()
        self.rest = None
        self._budget.give(held)

    def _cancel_deadline(self) -> None:
        deadline, self._deadline = self._deadline, None
        if deadline is not None and deadline.active():
            deadline.cancel()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The client is gone: what it asked is answered by the export, and goes nowhere."""
        self._lost = True
        self._cancel_deadline()
        for call in (self._turn, self._look):
            if call is not None and call.active():
                call.cancel()
        self._release()
        self._budget.takers.discard(self)
        owed, self._owed_bytes = self._owed_bytes, 0
        self._budget.give(owed)
        if self._export is not None:
            self._export.detach(self)
        self._server.lost(self)
        if not reason.check(ConnectionDone):
            _log.debug("NBD client lost: {reason}", reason=reason.getErrorMessage())


def _held_bytes(request: Request) -> int:
    """Give what a submitted request still holds of the budget."""
    if request.command == nbd.CMD_WRITE and request.payload is None:
        return 0
    return nbd.request_cost(request)
