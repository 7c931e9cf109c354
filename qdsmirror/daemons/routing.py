"""Accepted connections, routed to groups by the server name of their TLS ClientHello.

The hello is only peeked at: the child that gets the connection does TLS from byte 0 and
authenticates; the name proves nothing (rules.md 17).  While UNAUTHENTICATED_MAX connections are
being looked at here or have not ended their handshakes in the children, others wait in the backlog;
those of an address with UNAUTHENTICATED_PER_ADDRESS_MAX of them are set aside, so that one address
keeps nobody else waiting.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.main import CONNECTION_LOST
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from qdsmirror import limits
from qdsmirror.core.clienthello import Peek, group_hint, peek_server_name
from qdsmirror.net.addresses import plain_address
from qdsmirror.paths import group_name

_log = Logger()

#: After these a connection is gone or resources are short; the listening socket is good.
_PASSING = frozenset({errno.ECONNABORTED, errno.EPERM, errno.EINTR, errno.EAGAIN})
#: How often a connection looks whether its group has started.
_START_POLL_SECONDS = 0.05
#: So long accepting pauses when the process is out of descriptors or memory.
_SHORTAGE_SECONDS = 1.0

#: A child ends a handshake by its own two deadlines; one that hangs is not waited for.
_ADOPTED_SECONDS = 2 * limits.HANDSHAKE_SECONDS + 1.0

Ended = Callable[[], None]
Route = Callable[[int, int, Ended], bool]
Starting = Callable[[int], bool]

#: TLS alerts (RFC 8446, section 6) with which a master turns a connection away before TLS.
ALERT_HANDSHAKE_FAILURE = 40
ALERT_UNRECOGNIZED_NAME = 112
_FATAL_ALERT = b"\x15\x03\x03\x00\x02\x02%c"


def turn_away(descriptor: int, alert: int) -> None:
    """Answer a ClientHello with a fatal alert, so that the peer can tell its operator more.

    :param descriptor: a connection whose hello was peeked at; its caller closes it.
    """
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        try:
            # Closing with bytes unread would reset the connection, and the alert with it.
            connection.recv(limits.CLIENT_HELLO_BYTES_MAX)
            connection.send(_FATAL_ALERT % alert)
        except OSError as error:
            _log.debug("no alert sent: {error}", error=error)


class Router:
    """Takes connections from listening sockets and passes each to its group.

    :param reactor: provides IReactorFDSet and IReactorTime.
    :param route: called with (group number, descriptor, ended); passes a duplicate on, whose
        handshake is over when ``ended`` is called, or gives ``False``: then the connection is
        closed.
    :param starting: tells whether a group is only now being started: its connections wait for
        that, HANDSHAKE_SECONDS at most, as a peer turned away would come again much later.
    """

    def __init__(
        self, reactor: Any, route: Route, starting: Starting = lambda _number: False
    ) -> None:
        self.reactor = reactor
        self.starting = starting
        self._route = route
        self._listeners: list[_Listener] = []
        self._peeking: dict[_Peeked, str] = {}
        self._paused = False
        self._open = True
        #: Unauthenticated connections: peeked at, or in a child's handshake.
        self._addresses: Counter[str] = Counter()
        self._adopted: set[_Adopted] = set()
        self._parked: deque[_Parked] = deque()

    def listen(self, listening: socket.socket) -> None:
        """Begin to accept; the socket belongs to the router then."""
        listening.setblocking(False)
        listener = _Listener(self, listening)
        self._listeners.append(listener)
        if not self._paused:
            self.reactor.addReader(listener)

    def ports(self) -> set[int]:
        """Give the TCP ports listened on."""
        return {listener.listening.getsockname()[1] for listener in self._listeners}

    def close(self, port: int | None = None) -> None:
        """Stop accepting, on one port or (with all connections not yet routed) everywhere."""
        for listener in list(self._listeners):
            if port is None or listener.listening.getsockname()[1] == port:
                self._listeners.remove(listener)
                self.reactor.removeReader(listener)
                listener.listening.close()
        if port is None:
            self._open = False
            for parked in list(self._parked):
                parked.give_up()
            for peeked in list(self._peeking):
                peeked.finish(None)
            for adopted in list(self._adopted):
                adopted.end()

    def accept(self, listening: socket.socket) -> None:
        """Accept what waits, as far as the limits allow."""
        while self._has_room():
            try:
                connection, address = listening.accept()
            except OSError as error:
                if error.errno not in _PASSING:
                    _log.error("cannot accept: {error}", error=error)
                    self._pause()
                    self.reactor.callLater(_SHORTAGE_SECONDS, self._resume)
                return
            connection.setblocking(False)
            self._begin(connection, plain_address(str(address[0])))
        self._pause()

    def _has_room(self, address: str | None = None) -> bool:
        if address and self._addresses[address] >= limits.UNAUTHENTICATED_PER_ADDRESS_MAX:
            return False
        return self._addresses.total() < limits.UNAUTHENTICATED_MAX

    def _begin(self, connection: socket.socket, address: str) -> None:
        if self._has_room(address):
            self._peek(connection, address)
        elif len(self._parked) < limits.PARKED_CONNECTIONS_MAX:
            self._parked.append(_Parked(self, connection, address))
        else:
            connection.close()
            _log.warn("too many unauthenticated connections from {address}", address=address)

    def _peek(self, connection: socket.socket, address: str) -> None:
        self._addresses[address] += 1
        peeked = _Peeked(self, connection)
        self._peeking[peeked] = address
        peeked.start()

    def unpark(self, parked: _Parked) -> None:
        """Forget a connection that was set aside."""
        self._parked.remove(parked)

    def finished(self, peeked: _Peeked, connection: socket.socket, number: int | None) -> None:
        """Route a connection (``None``: nowhere), or make room for the next."""
        adopted = _Adopted(self, self._peeking.pop(peeked))
        self._adopted.add(adopted)
        with connection:
            if number is None:
                if self._open:
                    _log.warn("{address} {said}", address=adopted.address, said=peeked.complaint)
            elif self._route(number, connection.fileno(), adopted.end):
                return
            else:
                _log.info(
                    "{name} takes no connection from {address} now",
                    name=group_name(number),
                    address=adopted.address,
                )
        adopted.end()

    def ended(self, adopted: _Adopted) -> None:
        """Make room: a connection has authenticated, or has come to nothing."""
        self._adopted.remove(adopted)
        self._addresses[adopted.address] -= 1
        if not self._addresses[adopted.address]:
            del self._addresses[adopted.address]
        for parked in list(self._parked):
            if self._has_room(parked.address):
                self._peek(parked.take(), parked.address)
        self._resume()

    def _pause(self) -> None:
        self._paused = True
        for listener in self._listeners:
            self.reactor.removeReader(listener)

    def _resume(self) -> None:
        if self._paused and self._has_room():
            self._paused = False
            for listener in self._listeners:
                self.reactor.addReader(listener)


class _Adopted:
    """One unauthenticated connection's place, from the end of its peeking."""

    def __init__(self, router: Router, address: str) -> None:
        self.address = address
        self._router = router
        self._timer = router.reactor.callLater(_ADOPTED_SECONDS, self.end)

    def end(self) -> None:
        """Give the place to another; again: nothing."""
        if self._timer is not None:
            timer, self._timer = self._timer, None
            if timer.active():
                timer.cancel()
            self._router.ended(self)


class _Parked:
    """A connection that is accepted and waits for others of its address to end."""

    def __init__(self, router: Router, connection: socket.socket, address: str) -> None:
        self.address = address
        self._router = router
        self._connection = connection
        self._timer = router.reactor.callLater(limits.HANDSHAKE_SECONDS, self.give_up)

    def take(self) -> socket.socket:
        """Leave, to be looked at."""
        self._router.unpark(self)
        if self._timer.active():
            self._timer.cancel()
        return self._connection

    def give_up(self) -> None:
        """Leave, closed: its peer's own deadline is over."""
        self.take().close()


class _Descriptor:
    """A socket in the reactor."""

    def __init__(self, router: Router, one: socket.socket) -> None:
        self.router = router
        self.socket = one

    def fileno(self) -> int:
        return self.socket.fileno()

    def logPrefix(self) -> str:  # noqa: N802
        return "router"

    def connectionLost(self, reason: Failure) -> None:  # noqa: N802
        """Follow doRead's own verdict."""


@implementer(IReadDescriptor)
class _Listener(_Descriptor):
    @property
    def listening(self) -> socket.socket:
        return self.socket

    def doRead(self) -> None:  # noqa: N802
        self.router.accept(self.socket)


@implementer(IReadDescriptor)
class _Peeked(_Descriptor):
    """One connection whose hello is not complete.

    :ivar complaint: what is to be said of it when it gets nowhere.
    """

    def start(self) -> None:
        """Wait for the hello, HELLO_SECONDS at most."""
        self.complaint = "has sent no TLS ClientHello"
        self._seen = 0
        self._poll: Any = None
        reactor = self.router.reactor
        self._timer = reactor.callLater(limits.HELLO_SECONDS, self.finish, None)
        reactor.addReader(self)

    def doRead(self) -> Any:  # noqa: N802
        """Look at what has arrived without taking it."""
        try:
            data = self.socket.recv(limits.CLIENT_HELLO_BYTES_MAX, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError:
            return CONNECTION_LOST
        name = peek_server_name(data)
        if isinstance(name, str):
            self.router.reactor.removeReader(self)
            self.complaint = f"asks for no group of ours: {name[: limits.HOST_NAME_CHARS_MAX]!r}"
            self._timer.reset(limits.HANDSHAKE_SECONDS)
            self._offer(group_hint(name))
        elif name is Peek.NOT_TLS or len(data) <= self._seen:
            # Woken without a byte more than last time: the peer has hung up.
            self.finish(None)
        else:
            self._seen = len(data)
            # Peeked bytes keep a socket readable: only more of them are to wake us again.
            self._wake_at(len(data) + 1)
        return None

    def connectionLost(self, reason: Failure) -> None:  # noqa: N802
        self.finish(None)

    def _offer(self, number: int | None) -> None:
        """Hand the connection back as soon as its group can take it or is known not to."""
        if number is not None and self.router.starting(number):
            self.complaint = f"waited in vain for {group_name(number)}, which is being started"
            self._poll = self.router.reactor.callLater(_START_POLL_SECONDS, self._offer, number)
        else:
            self.finish(number)

    def finish(self, number: int | None) -> None:
        """Leave the reactor and hand the connection back."""
        if self._timer is None:
            return
        if self._poll is not None and self._poll.active():
            self._poll.cancel()
        if self._timer.active():
            self._timer.cancel()
        self._timer = None
        self.router.reactor.removeReader(self)
        if number is not None:
            self._wake_at(1)
        self.router.finished(self, self.socket, number)

    def _wake_at(self, count: int) -> None:
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
        except OSError as error:
            _log.debug("SO_RCVLOWAT: {error}", error=os.strerror(error.errno or 0))
