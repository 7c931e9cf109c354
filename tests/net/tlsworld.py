"""Certificates and in-memory TLS connections for the tests of TLS and the handshake."""

from __future__ import annotations

import datetime
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme
from twisted.internet.address import IPv4Address
from twisted.internet.interfaces import IProtocol
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.test import iosim

from qdsmirror.net.sending import UnbufferedTlsFactory

PRIMARY = "primary.example"
SECONDARY = "secondary.example"


@functools.cache
def authority(which: str) -> trustme.CA:
    return trustme.CA()


@functools.cache
def issue(
    name: str, ca: str = "ours", *, expired: bool = False, early: bool = False
) -> trustme.LeafCert:
    """Make a certificate; ``expired`` yesterday, or ``early``: valid from tomorrow on."""
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    return authority(ca).issue_cert(
        name, not_after=now - day if expired else None, not_before=now + day if early else None
    )


@dataclass(frozen=True)
class HostFiles:
    """What net.tls needs of a HostConfig."""

    name: str
    certificate: Path
    key: Path
    ca: Path


def host(directory: str | Path, name: str, leaf: trustme.LeafCert | None = None) -> HostFiles:
    """Write a host's files; ``leaf`` is its certificate, by default a good one."""
    base = Path(directory)
    base.mkdir(parents=True, exist_ok=True)
    leaf = leaf or issue(name)
    files = HostFiles(name, base / "host.crt", base / "host.key", base / "ca.crt")
    files.certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    files.key.write_bytes(leaf.private_key_pem.bytes())
    files.key.chmod(0o600)
    files.ca.write_bytes(authority("ours").cert_pem.bytes())
    return files


class _OneFactory(Factory):
    """Makes the one protocol it was given."""

    noisy = False

    def __init__(self, protocol: IProtocol) -> None:
        self._protocol = protocol

    def buildProtocol(self, addr: object) -> Any:
        return self._protocol


def tls(creator: Any, protocol: Any, clock: Clock, *, client: bool) -> Any:
    """Wrap a protocol in TLS, as an endpoint does."""
    factory = UnbufferedTlsFactory(creator, client, _OneFactory(protocol), clock)
    return factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 575))


def connect(client: Any, server: Any, clock: Clock, *, greet: bool = True) -> iosim.IOPump:
    """Connect two protocols (usually ``tls``) in memory."""
    address = IPv4Address("TCP", "192.0.2.1", 575)
    return iosim.connect(
        server,
        iosim.FakeTransport(server, True, address, address),
        client,
        iosim.FakeTransport(client, False, address, address),
        greet=greet,
        clock=clock,
    )


def settle(*pumps: iosim.IOPump, rounds: int = 20) -> None:
    """Flush several connections that feed each other."""
    for _ in range(rounds):
        for pump in pumps:
            pump.flush()
