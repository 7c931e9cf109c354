"""How fast bare Twisted moves bytes through TLS 1.3 over the loopback: the drain rate's measure.

Two processes, as pmd and rmd are; the sender writes 1 MiB at a time as its transport asks for more,
the receiver counts and drops.  ``python bench/tlsrate.py`` prints MB/s.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from OpenSSL import SSL
from twisted.internet import endpoints, interfaces, protocol, reactor, ssl
from zope.interface import implementer

MIB = 1 << 20


def make_identity(path: Path) -> None:
    """Write a key and a certificate signed by itself into one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    encoded = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(encoded + certificate.public_bytes(serialization.Encoding.PEM))


class _ClientContext(ssl.ClientContextFactory):
    """TLS without judging the server: only the speed matters here."""

    def getContext(self) -> SSL.Context:
        """Make the context."""
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        return context


@implementer(interfaces.IPullProducer)
class Sender(protocol.Protocol):
    """Sends what was asked for, then waits for the receiver to close."""

    remaining = 0
    started = 0.0
    _block = bytes(MIB)

    def connectionMade(self) -> None:
        """Begin."""
        self.started = time.monotonic()
        self.transport.registerProducer(self, False)

    def resumeProducing(self) -> None:
        """Write the next piece."""
        self.transport.write(self._block)
        self.remaining -= MIB
        if self.remaining <= 0:
            self.transport.unregisterProducer()

    def stopProducing(self) -> None:
        """Nothing to give up."""

    def connectionLost(self, reason: Any = None) -> None:
        """Stop: the receiver has everything."""
        reactor.stop()  # type: ignore[attr-defined]


class Receiver(protocol.Protocol):
    """Counts, and closes when everything is there."""

    def __init__(self, total: int) -> None:
        self._remaining = total

    def dataReceived(self, data: bytes) -> None:
        """Drop it."""
        self._remaining -= len(data)
        if self._remaining <= 0:
            self.transport.loseConnection()

    def connectionLost(self, reason: Any = None) -> None:
        """One transfer is enough."""
        reactor.stop()  # type: ignore[attr-defined]


def serve(identity: str, total: int) -> None:
    """Be the receiver: print the port, take one transfer."""
    certificate = ssl.PrivateCertificate.loadPEM(Path(identity).read_bytes())
    factory = protocol.Factory.forProtocol(lambda: Receiver(total))  # type: ignore[arg-type]
    endpoint = endpoints.SSL4ServerEndpoint(
        reactor, 0, certificate.options(), interface="127.0.0.1"
    )
    endpoint.listen(factory).addCallback(lambda port: print(port.getHost().port, flush=True))
    reactor.run()  # type: ignore[attr-defined]


def send(port: int, total: int) -> None:
    """Be the sender: print MB/s."""
    sender = Sender()
    sender.remaining = total
    factory = protocol.Factory.forProtocol(lambda: sender)  # type: ignore[arg-type]
    endpoint = endpoints.SSL4ClientEndpoint(reactor, "127.0.0.1", port, _ClientContext())
    endpoint.connect(factory)
    reactor.run()  # type: ignore[attr-defined]
    print(total / 1e6 / (time.monotonic() - sender.started))


def measure(total: int = 512 * MIB) -> float:
    """Move ``total`` bytes between two processes and give MB/s."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        identity = Path(directory) / "identity.pem"
        make_identity(identity)
        program = [sys.executable, __file__]
        with subprocess.Popen(
            [*program, "serve", str(identity), str(total)], stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            done = subprocess.run(
                [*program, "send", port, str(total)], capture_output=True, text=True, timeout=300
            )
        return float(done.stdout)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ["send"]:
        send(int(sys.argv[2]), int(sys.argv[3]))
    else:
        print(f"{measure():.0f} MB/s")
