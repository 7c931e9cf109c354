"""TLS for the console's clients: they judge the host's certificate, and show none themselves."""

from __future__ import annotations

from OpenSSL import SSL
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from zope.interface import implementer

from qdsmirror.net.certificates import HostIdentity
from qdsmirror.net.credentials import Credentials


@implementer(IOpenSSLServerConnectionCreator)
class HttpsServer:
    """Makes the server's end of TLS 1.3 connections, with the certificate that was loaded last.

    :raises ConfigError: see :meth:`Credentials.load`.
    """

    def __init__(self, host: HostIdentity) -> None:
        self.reload(host)

    def reload(self, host: HostIdentity) -> None:
        """Load the host's files, for the connections to come.

        :raises ConfigError: they cannot be used; the former ones stay.
        """
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        Credentials.load(host).apply_to(context)
        self._context = context

    def serverConnectionForTLS(self, tlsProtocol: object) -> SSL.Connection:  # noqa: N802
        """Make a connection (IOpenSSLServerConnectionCreator)."""
        return SSL.Connection(self._context, None)
