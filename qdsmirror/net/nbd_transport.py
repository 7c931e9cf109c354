"""A Unix socket port and transport shaped for NBD: few system calls, no copies of payloads.

Twisted's own transport hands out 64 KiB at a time as bytes that have to be joined, and sends
from the reactor's next turn.  This one receives up to `limits.NBD_RECEIVE_BYTES` at a time, or
straight into the rest of a payload that is still coming in, and sends at once what the socket
takes.  Twisted's own port makes the path of an adopted socket world-writable, and removes it at
the end; this one leaves it to the process that made it.
"""

# Twisted's transports have few annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import errno
import os
import select
import socket
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol

from twisted.internet import main, unix
from twisted.internet.abstract import FileDescriptor
from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IListeningPort
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from qdsmirror import limits

_log = Logger()

#: Receives of one turn, while they complete payloads: other connections wait meanwhile.
_RECEIVES_MAX = 16
#: Connections accepted in one turn.
_ACCEPTS_MAX = 16
#: Pieces that one sendmsg takes (IOV_MAX is 1024).
_PIECES_MAX = 512
#: Out of descriptors or memory: accepting again at once would only spin.
_ACCEPT_RETRY_SECONDS = 1.0


class ShapedProtocol(Protocol):
    """What `ShapedServer` asks of its protocol.

    :ivar rest: where to receive into, or ``None``: receive whatever comes.
    """

    rest: memoryview | None

    def makeConnection(self, transport: Any) -> None:
        """The connection stands (IProtocol)."""

    def dataReceived(self, data: bytes) -> None:
        """Take what came."""

    def filled(self, count: int) -> None:
        """Take note that ``count`` bytes were received into `rest`."""

    def process(self) -> None:
        """Deal with all that was received in this turn."""

    def drained(self) -> None:
        """Take note that some outgoing bytes have gone."""


class ShapedServer(unix.Server):
    """The accepted side of a connection.

    :ivar outgoing_bytes: what was given to `send` and the socket has not taken yet.
    """

    def __init__(
        self, skt: socket.socket, protocol: ShapedProtocol, sessionno: int, reactor: Any
    ) -> None:
        self._outgoing: deque[bytes | memoryview] = deque()
        self.outgoing_bytes = 0
        self.repstr = f"<{type(self).__name__} #{sessionno}>"
        super().__init__(skt, protocol, "", None, sessionno, reactor)
        self._hang_up = select.poll()
        self._hang_up.register(skt.fileno(), select.POLLRDHUP)

    def doRead(self) -> ConnectionLost | ConnectionDone | None:  # type: ignore[override]
        """Receive, and let the protocol deal with all of it once."""
        protocol: Any = self.protocol
        skt = self.socket
        for _ in range(_RECEIVES_MAX):
            rest = protocol.rest
            try:
                if rest is None:
                    data = skt.recv(limits.NBD_RECEIVE_BYTES)
                    if not data:
                        return main.CONNECTION_DONE
                    protocol.dataReceived(data)
                else:
                    count = skt.recv_into(rest)
                    if not count:
                        return main.CONNECTION_DONE
                    protocol.filled(count)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                return main.CONNECTION_LOST
            if protocol.rest is None:
                break
        protocol.process()
        return None

    def send(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Send pieces in order: now what the socket takes, the rest when it takes more."""
        if not self.connected or self._aborting:
            return
        if self._outgoing:
            self._queue(pieces)
            return
        taken = self._offer(pieces if len(pieces) <= _PIECES_MAX else pieces[:_PIECES_MAX])
        self._queue(pieces)
        self._drop(taken)
        if self._outgoing:
            self.startWriting()

    def _queue(self, pieces: Sequence[bytes | memoryview]) -> None:
        self._outgoing.extend(pieces)
        self.outgoing_bytes += sum([len(piece) for piece in pieces])

    def _offer(self, pieces: Sequence[bytes | memoryview]) -> int:
        """Give pieces to the socket; tell how many bytes it took."""
        try:
            if len(pieces) == 1:
                return self.socket.send(pieces[0])
            return self.socket.sendmsg(pieces)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                # Whoever sends is in the middle of something else: the loss is told later.
                self.abortConnection()
            return 0

    def _drop(self, count: int) -> None:
        """Forget the first ``count`` outgoing bytes."""
        outgoing = self._outgoing
        self.outgoing_bytes -= count
        while outgoing and count >= len(outgoing[0]):
            count -= len(outgoing.popleft())
        if count:
            outgoing[0] = memoryview(outgoing[0])[count:]

    def write(self, data: bytes) -> None:
        """Send one piece (ITransport)."""
        if data:
            self.send([data])

    def writeSequence(self, iovec: Any) -> None:
        """Send pieces (ITransport)."""
        self.send(list(iovec))

    def doWrite(self) -> Exception | None:  # type: ignore[override]
        """Send on; tell the protocol that something has gone."""
        if self._outgoing:
            self._drop(self._offer(list(islice(self._outgoing, _PIECES_MAX))))
        if self._aborting:
            return None
        if not self._outgoing:
            self.stopWriting()
            if self.disconnecting:
                return main.CONNECTION_DONE
        protocol: Any = self.protocol
        protocol.drained()
        return None

    def hung_up(self) -> bool:
        """Tell whether the other end is gone or will send no more; never blocks."""
        return not self.connected or bool(self._hang_up.poll(0))

    def connectionLost(self, reason: Failure) -> None:
        """Forget what could not be sent."""
        self._outgoing.clear()
        self.outgoing_bytes = 0
        super().connectionLost(reason)


class ProtocolSource(Protocol):
    """What makes the protocols of a `ShapedPort`."""

    def build(self) -> ShapedProtocol | None:
        """Make a protocol for a client; ``None`` closes its connection at once."""


@implementer(IListeningPort)
class ShapedPort(FileDescriptor):
    """Accept from a listening Unix socket that another process made and goes on holding.

    :param reactor: IReactorFDSet and IReactorTime.
    :param descriptor: the listening socket; it is duplicated, and stays the caller's.
    :param source: makes the protocols.
    """

    def __init__(self, reactor: Any, descriptor: int, source: ProtocolSource) -> None:
        super().__init__(reactor)
        self._clock = reactor
        self._socket = socket.socket(fileno=os.dup(descriptor))
        self._socket.setblocking(False)
        self._source = source
        self._sessions = 0

    def fileno(self) -> int:
        """Give the descriptor for the reactor."""
        return self._socket.fileno()

    def startListening(self) -> None:
        """Begin to accept."""
        self.connected = 1
        self.startReading()

    def stopListening(self) -> Deferred[None]:
        """End accepting; clients wait in the socket's backlog for whoever accepts next."""
        self.stopReading()
        return deferLater(self._clock, 0, self._close)

    def _close(self) -> None:
        if self.connected:
            self.connected = 0
            self.disconnected = 1
            self._socket.close()

    def getHost(self) -> UNIXAddress:
        """Give the socket's path."""
        return UNIXAddress(self._socket.getsockname())

    def doRead(self) -> None:
        """Accept who waits."""
        for _ in range(_ACCEPTS_MAX):
            try:
                skt, _address = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.error("NBD: cannot accept a client: {reason}", reason=error.strerror)
                self.stopReading()
                self._clock.callLater(_ACCEPT_RETRY_SECONDS, self._accept_again)
                return
            protocol = self._source.build()
            if protocol is None:
                skt.close()
                continue
            self._sessions += 1
            protocol.makeConnection(ShapedServer(skt, protocol, self._sessions, self.reactor))

    def _accept_again(self) -> None:
        if self.connected:
            self.startReading()

    def connectionLost(self, reason: Failure) -> None:
        """The reactor gives this socket up."""
        super().connectionLost(reason)
        self._socket.close()
