"""Sending at once: transports of Twisted that do not wait for the reactor's next turn.

Twisted sends what is written when the turn of the reactor is over, TLS a turn later still.  Where
somebody waits for the answer of another process, that is the time of all else that the turn holds,
at each hop: of a synchronous write there are four.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IOpenSSLClientConnectionCreator,
    IProtocolFactory,
    IStreamClientEndpoint,
    IWriteDescriptor,
)
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from zope.interface import implementer


def send_now(transport: Any) -> None:
    """Give the kernel what was written to a transport, as far as the socket takes it.

    Not for a transport whose producer is paused: that would go on from within.  A lost connection
    is told as ever, by the reactor.

    :param transport: of a socket; another is left alone.
    """
    has_socket: bool = IWriteDescriptor.providedBy(transport)
    if has_socket and transport.connected and not transport.disconnecting:
        transport.doWrite()


class UnbufferedTlsFactory(TLSMemoryBIOFactory):
    """TLS that encrypts each write at once; its users join small writes themselves."""

    protocol = TLSMemoryBIOProtocol
    noisy = False


@implementer(IStreamClientEndpoint)
class TlsEndpoint:
    """As ``twisted.internet.endpoints.wrapClientTLS``, with :class:`UnbufferedTlsFactory`.

    :param creator: makes the connections of OpenSSL.
    :param plain: the way below TLS.
    """

    def __init__(
        self, creator: IOpenSSLClientConnectionCreator, plain: IStreamClientEndpoint
    ) -> None:
        self._creator = creator
        self._plain = plain

    def connect(self, protocol_factory: IProtocolFactory) -> Deferred[Any]:
        """See :class:`IStreamClientEndpoint`."""
        tls = UnbufferedTlsFactory(self._creator, True, protocol_factory)
        connecting: Deferred[Any] = self._plain.connect(tls)
        return connecting.addCallback(lambda wrapper: wrapper.wrappedProtocol)
