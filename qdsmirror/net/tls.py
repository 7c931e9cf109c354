"""TLS 1.3 with certificates on both ends, and why a connection was refused.

A peer is accepted when its chain ends in the host's own CA (never the system's) *and* its
certificate is for the host that the group's configuration names (security.md 1, 2).  Both are
judged inside the TLS handshake, on both ends; sessions are never resumed, so that every connection
is judged again.  ``why_lost`` tells afterwards what failed: on the end that judged, from its own
judgement; on the end that was refused, from the TLS alert.

Source: RFC 8446, RFC 9525 (service identity, DNS-ID), RFC 9266 (channel binding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cryptography import x509
from OpenSSL import SSL, crypto
from service_identity import CertificateError, VerificationError
from service_identity.cryptography import extract_patterns
from service_identity.hazmat import DNS_ID, verify_service_identity
from twisted.internet.interfaces import (
    IOpenSSLClientConnectionCreator,
    IOpenSSLServerConnectionCreator,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from qdsmirror.core.authentication import EXPORTER_BYTES
from qdsmirror.errors import ConfigError, IdentityError, MismatchError, ProtocolError, QdsError
from qdsmirror.net.certificates import HINT_PKI, HostIdentity, describe
from qdsmirror.net.credentials import Credentials

#: RFC 9266 section 2.
EXPORTER_LABEL = b"EXPORTER-Channel-Binding"

_HINT_PORT = "check `port` and `address` in the group's file; what listens there: `ss -ltnp` on it"

# X509_V_ERR_* of OpenSSL's x509_vfy.h.
_NOT_YET_VALID = 9
_EXPIRED = 10
_NOT_OUR_CA = frozenset({2, 18, 19, 20, 21})
_WRONG_PURPOSE = 26

#: What OpenSSL says when this end ended the TLS handshake, other than over a certificate.
_LOCAL_REASONS = {
    "peer did not return a certificate": ("{peer} showed no certificate", HINT_PKI),
    "unsupported protocol": ("{peer} does not speak TLS 1.3", _HINT_PORT),
    "http request": ("what answers as {peer} does not speak TLS (plaintext)", _HINT_PORT),
    "wrong version number": ("what answers as {peer} does not speak TLS (plaintext)", _HINT_PORT),
    "packet length too long": ("what answers as {peer} does not speak TLS (plaintext)", _HINT_PORT),
    "bad signature": ("{peer} does not hold the key of its certificate", HINT_PKI),
}

#: What an alert says when the peer ended it (RFC 8446 section 6.2); {own} is our certificate.
_ALERTS = {
    "certificate expired": ("{peer} refuses {own}: expired, by its clock", HINT_PKI),
    "unknown ca": ("{peer} refuses {own}: not issued by its CA", HINT_PKI),
    "certificate required": ("{peer} requires a certificate and saw none", HINT_PKI),
    "bad certificate": ("{peer} refuses {own}", HINT_PKI),
    "unsupported certificate": ("{peer} refuses {own}: not made for this use", HINT_PKI),
    "certificate revoked": ("{peer} refuses {own}: revoked", HINT_PKI),
    "certificate unknown": ("{peer} refuses {own}", HINT_PKI),
    "access denied": ("{peer} refuses {own}", HINT_PKI),
    "decrypt error": ("{peer} could not verify our signature with {own}", HINT_PKI),
    "protocol version": ("{peer} does not speak TLS 1.3", _HINT_PORT),
    # What OpenSSL sends when a verification callback refuses a chain that is good in itself: here
    # that is the name, see _Judge.
    "internal error": (
        "{peer} refuses {own}: it is not for the host its group file names",
        "compare `host` in the group's file on both hosts, `name` in qds.cfg and the certificate: "
        "`qdsconfigtool show` and `qdsconfigtool check` on both",
    ),
}

#: What the master of the secondary says instead of a handshake (``daemons.routing``).
_TURNED_AWAY = {
    "unrecognized name": (
        "{peer} has no such group",
        "compare the group's file on both hosts; there: `qdsconfigtool apply`",
    ),
    "handshake failure": (
        "{peer} cannot serve this group with what is configured there; see qdsinfo on {peer}",
        "mend it there, then run `qdsconfigtool apply` there and here",
    ),
}


class JudgedConnection(SSL.Connection):
    """A TLS connection that remembers why its peer was refused.

    :ivar peer_name: the host that the peer's certificate must name.
    :ivar own_certificate: how messages call our own certificate.
    :ivar refusal: set when this end refused the peer's certificate.
    """

    peer_name: str = "the peer"
    own_certificate: str = "our certificate"
    refusal: IdentityError | None = None


@dataclass(frozen=True)
class _Judge:
    """Judges a peer's chain: OpenSSL's verdict, then the name."""

    expected: DNS_ID
    expected_peer: str
    ca_file: str

    def __call__(
        self, connection: SSL.Connection, certificate: crypto.X509, error: int, depth: int, ok: int
    ) -> bool:
        """Answer OpenSSL's question about one certificate of the chain (``set_verify``)."""
        refusal: IdentityError | None = None
        try:
            judged = certificate.to_cryptography()
            if not ok:
                refusal = self._chain_refusal(judged, error)
            elif depth == 0:
                refusal = self._name_refusal(judged)
        except Exception as problem:  # noqa: BLE001 - whatever cannot be judged is refused
            refusal = IdentityError(
                f"{self.expected_peer}'s certificate cannot be read: {problem}", hint=HINT_PKI
            )
        if refusal is not None and isinstance(connection, JudgedConnection):
            connection.refusal = refusal
        return refusal is None

    def _chain_refusal(self, certificate: x509.Certificate, error: int) -> IdentityError:
        what = f"the certificate that {self.expected_peer} shows ({describe(certificate)})"
        if error == _EXPIRED:
            why = f"expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        elif error == _NOT_YET_VALID:
            why = f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        elif error in _NOT_OUR_CA:
            why = f"was not issued by the CA in {self.ca_file}"
        elif error == _WRONG_PURPOSE:
            why = "is not made for this use (extended key usage)"
        else:
            why = f"does not verify (OpenSSL X509 error {error})"
        return IdentityError(f"{what} {why}", hint=HINT_PKI)

    def _name_refusal(self, certificate: x509.Certificate) -> IdentityError | None:
        try:
            verify_service_identity(extract_patterns(certificate), [self.expected], [])
        except (VerificationError, CertificateError):
            return IdentityError(
                f"the peer's certificate is for {describe(certificate)}, "
                f"not for the group's host {self.expected_peer}",
                hint="compare `host` in the group's file with the certificate on that host: "
                "`qdsconfigtool check` there",
            )
        return None


@implementer(IOpenSSLClientConnectionCreator, IOpenSSLServerConnectionCreator)
class _Creator:
    """Makes the OpenSSL connection of a TLSMemoryBIOProtocol, for either end."""

    def __init__(
        self, host: HostIdentity | Credentials, expected_peer: str, sni: str | None = None
    ) -> None:
        self._expected_peer = expected_peer
        self._sni = sni
        self._context, self._own_certificate = _context(host, expected_peer)

    def clientConnectionForTLS(self, tlsProtocol: object) -> JudgedConnection:
        """Make the client's connection; the server name hints at the group."""
        connection = self._connection()
        if self._sni is not None:
            connection.set_tlsext_host_name(self._sni.encode("ascii"))
        return connection

    def serverConnectionForTLS(self, tlsProtocol: object) -> JudgedConnection:
        """Make the server's connection."""
        return self._connection()

    def _connection(self) -> JudgedConnection:
        connection = JudgedConnection(self._context, None)
        connection.peer_name = self._expected_peer
        connection.own_certificate = self._own_certificate
        return connection


def client_options(host: HostIdentity | Credentials, expected_peer: str, sni: str) -> _Creator:
    """Make what ``wrapClientTLS`` wants, for the primary's end.

    :param host: whose files are loaded now; or what was loaded from them.
    :param expected_peer: the secondary's ``host``; the server's certificate must be for it.
    :param sni: server name that routes the connection (``core.clienthello.server_name_for``).
    :raises ConfigError: a file is missing, unreadable, wrong, or the key's mode is not 0600.
    """
    return _Creator(host, expected_peer, sni)


def server_context_factory(host: HostIdentity | Credentials, expected_peer: str) -> _Creator:
    """Make what ``TLSMemoryBIOFactory`` wants, for the secondary's end.

    :param host: as for ``client_options``.
    :param expected_peer: the primary's ``host``; the client's certificate must be for it.
    :raises ConfigError: as for ``client_options``.
    """
    return _Creator(host, expected_peer)


def exporter(transport: Any) -> bytes:
    """Give the connection's channel binding: the same 32 bytes on both ends, on no other.

    :param transport: a TLS transport whose handshake is complete.
    """
    value: bytes = transport.getHandle().export_keying_material(EXPORTER_LABEL, EXPORTER_BYTES, b"")
    return value


def why_lost(transport: Any, reason: Failure) -> QdsError:
    """Tell why a connection that never became a stream was lost.

    :param transport: its TLS transport, as in the protocol's ``connectionLost``.
    :param reason: what ``connectionLost`` was given.
    :returns: an IdentityError if either end refused the other's certificate, TLS version or
        plaintext, a MismatchError if the secondary's master turned us away, else a ProtocolError:
        then it is worth another try.
    """
    connection = transport.getHandle() if hasattr(transport, "getHandle") else None
    if not isinstance(connection, JudgedConnection):
        return ProtocolError(f"connection lost: {reason.getErrorMessage()}")
    if connection.refusal is not None:
        return connection.refusal
    said = _openssl_reason(reason)
    _, is_alert, alert = said.rpartition(" alert ")
    for ending, words in _TURNED_AWAY.items():
        if said.endswith(ending):
            text, next_step = (one.format(peer=connection.peer_name) for one in words)
            return MismatchError(text, hint=next_step)
    message, hint = _ALERTS.get(alert, ("", "")) if is_alert else _LOCAL_REASONS.get(said, ("", ""))
    names = {"peer": connection.peer_name, "own": connection.own_certificate}
    if message:
        return IdentityError(message.format(**names), hint=hint)
    return ProtocolError(
        f"connection with {connection.peer_name} lost during the handshake: "
        f"{said or reason.getErrorMessage()}"
    )


def _openssl_reason(reason: Failure) -> str:
    """Give OpenSSL's words, e.g. ``tlsv1 alert unknown ca``; empty for any other failure."""
    error = reason.value
    if not isinstance(error, SSL.Error) or not error.args or not isinstance(error.args[0], list):
        return ""
    return str(error.args[0][-1][2]) if error.args[0] else ""


def _context(host: HostIdentity | Credentials, expected_peer: str) -> tuple[SSL.Context, str]:
    """Make the context of either end, and the words for our own certificate."""
    own = host if isinstance(host, Credentials) else Credentials.load(host)
    try:
        expected = DNS_ID(expected_peer)
    except ValueError:
        raise ConfigError(
            f"the host {expected_peer!r} is not a DNS name that a certificate could be for",
            hint="set `host` in the group's file to the name in that host's certificate",
        ) from None
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    # No session outlives its connection: a resumed one would skip the certificates.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    own.apply_to(context)
    context.set_verify(
        SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT,
        _Judge(expected, expected_peer, own.ca_file),
    )
    return context, f"our certificate (for {describe(own.chain[0])})"
