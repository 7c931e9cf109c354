"""The frame stream of one connection, the same at both ends (man page qdsmirror-protocol(7)).

Keeps the connection alive by pings, aborts a silent peer, and passes on messages and pressure.
"""

from __future__ import annotations

# Interfaces declare methods without ``self``.
# mypy: disable-error-code="empty-body"
import socket
from typing import Any

from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import ClientFactory, Protocol, connectionDone
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import Interface, implementer

from qdsmirror.core import stream
from qdsmirror.core.stream import Message
from qdsmirror.errors import QdsError
from qdsmirror.limits import PATH_UNSENT_BYTES_MAX, PING_SECONDS, SILENT_PEER_SECONDS
from qdsmirror.net.addresses import plain_address
from qdsmirror.net.sending import send_now

#: include/uapi/linux/tcp.h
_TCP_NOTSENT_LOWAT = 25


class ILinkOwner(Interface):
    """Who is told of what happens on a link: a :class:`Link`, or several of them as one."""

    def link_made(link: Any) -> None:
        """The stream has begun."""

    def link_message(link: Any, message: Message) -> None:
        """A FRAME or an ACK has arrived; a QdsError raised here ends the connection."""

    def link_writable(link: Any) -> None:
        """More may be sent."""

    def link_lost(link: Any, reason: str) -> None:
        """The connection is gone."""


@implementer(IPushProducer)
class Link(Protocol):
    """One connection's stream.

    :ivar can_send: whether the transport's buffer has room.
    :ivar sent_bytes: written to it, before TLS; ``received_bytes``: read from it.
    """

    log = Logger()
    transport: Any

    def __init__(self, owner: ILinkOwner, reactor: Any) -> None:
        self._owner = owner
        self._parser = stream.MessageParser()
        self._reactor = reactor
        self._pinger = LoopingCall(self._ping)
        self._pinger.clock = reactor
        self._heard = 0.0
        self._reason = ""
        self._deadline: Any = None
        self._deaf = False
        self.can_send = True
        self.ended = False
        self.sent_bytes = 0
        self.received_bytes = 0

    def connectionMade(self) -> None:  # noqa: N802
        """See :class:`Protocol`."""
        self._heard = self._reactor.seconds()
        plain = self._socket()
        if plain is not None:
            # The end of a frame must not wait for the acknowledgement of the one before.
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.transport.registerProducer(self, True)
        self._pinger.start(PING_SECONDS, now=False)
        self._owner.link_made(self)

    def send(self, data: bytes) -> None:
        """Send a packed message."""
        if not self.ended:
            self.sent_bytes += len(data)
            self.transport.write(data)
            if self.can_send:
                send_now(getattr(self.transport, "transport", None))

    def keep_unsent_short(self) -> None:
        """Have the kernel take no more than it can send soon: another path may be quicker."""
        plain = self._socket()
        if plain is not None:
            plain.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, PATH_UNSENT_BYTES_MAX)

    def _socket(self) -> socket.socket | None:
        """Give the socket below TLS, where there is one."""
        connection: Any = getattr(self.transport, "transport", None)
        plain: socket.socket | None = getattr(connection, "socket", None)
        return plain

    @property
    def peer(self) -> str:
        """The other end's address, for people."""
        address = self.transport.getPeer() if self.transport is not None else None
        return plain_address(f"{getattr(address, 'host', address)}")

    def pause_reading(self) -> None:
        """Take nothing more from the peer for a while."""
        if not self.ended:
            self._deaf = True
            self.transport.pauseProducing()

    def resume_reading(self) -> None:
        """Take from the peer again."""
        if not self.ended:
            self._deaf = False
            self._heard = self._reactor.seconds()
            self.transport.resumeProducing()

    def close(self, reason: str) -> None:
        """End the connection in order: the peer is told why."""
        if not self.ended and self._deadline is None:
            self._reason = self._reason or reason
            self.send(stream.pack_bye(reason))
            self.transport.unregisterProducer()
            self.transport.loseConnection()
            # A peer that does not read cannot hold up the end.
            self._deadline = self._reactor.callLater(PING_SECONDS, self.transport.abortConnection)

    def abort(self, reason: str) -> None:
        """End the connection at once."""
        self._reason = self._reason or reason
        if not self.ended:
            self.transport.abortConnection()

    def _ping(self) -> None:
        # While we do not read, its silence says nothing of the peer.
        if not self._deaf and self._reactor.seconds() - self._heard > SILENT_PEER_SECONDS:
            self.abort(f"the peer was silent for {SILENT_PEER_SECONDS:.0f} s")
        else:
            self.send(stream.pack_ping())

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        """See :class:`Protocol`."""
        self._heard = self._reactor.seconds()
        self.received_bytes += len(data)
        try:
            for message in self._parser.feed(data):
                if message.type == stream.BYE:
                    # The peer reads no more.  Closing gently would wait for our producer, which
                    # waits for the peer.
                    self.abort(f"the peer said: {bytes(message.payload).decode(errors='replace')}")
                    return
                if message.type != stream.PING:
                    self._owner.link_message(self, message)
        except QdsError as error:
            self.log.error("link ended: {error}", error=error.message)
            self.close(error.message)

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: N802
        """See :class:`Protocol`."""
        self.ended = True
        if self._pinger.running:
            self._pinger.stop()
        if self._deadline is not None and self._deadline.active():
            self._deadline.cancel()
        self._owner.link_lost(self, self._reason or reason.getErrorMessage())

    def pauseProducing(self) -> None:  # noqa: N802
        """See :class:`IPushProducer`."""
        self.can_send = False

    def resumeProducing(self) -> None:  # noqa: N802
        """See :class:`IPushProducer`."""
        self.can_send = True
        self._owner.link_writable(self)

    def stopProducing(self) -> None:  # noqa: N802
        """See :class:`IPushProducer`."""
        self.can_send = False


class LinkFactory(ClientFactory):
    """Makes the protocol that the handshake switches to."""

    noisy = False

    def __init__(self, owner: ILinkOwner, reactor: Any) -> None:
        self._owner = owner
        self._reactor = reactor

    def buildProtocol(self, addr: object) -> Link:  # noqa: N802
        """See :class:`ClientFactory`."""
        return Link(self._owner, self._reactor)
