"""What a group needs of the machine it runs on, so that tests can give it another one."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.threads import deferToThreadPool

from qdsmirror.config import GroupConfig, HostConfig
from qdsmirror.configvalues import NetworkPath
from qdsmirror.core.clienthello import server_name_for
from qdsmirror.core.nbd_requests import Budget
from qdsmirror.groups.unapplied import Unapplied
from qdsmirror.interfaces import IBlockDevice, IWorker
from qdsmirror.limits import HANDSHAKE_SECONDS
from qdsmirror.net.asking import attach_to_driver
from qdsmirror.net.credentials import Credentials, KeptCredentials
from qdsmirror.net.nbd import listen_nbd
from qdsmirror.net.nbd_socket import bind_nbd
from qdsmirror.net.sending import TlsEndpoint
from qdsmirror.net.tls import client_options, server_context_factory
from qdsmirror.storage.device import open_device
from qdsmirror.storage.worker import AdaptiveWorker, ReadWorkers, ThreadWorker

_T = TypeVar("_T")

#: Application reads of one LDSU that may wait for its data device at the same time.
READ_THREADS = 4


def tls_endpoint(
    reactor: Any, host: HostConfig | Credentials, config: GroupConfig, way: NetworkPath
) -> IStreamClientEndpoint:
    """Give the way to a group's secondary: TCP, and TLS with our certificate.

    :param host: whose files are loaded now; or what was loaded from them.
    :param way: the network path.
    :raises ConfigError: certificate or key cannot be used.
    """
    options = client_options(host, config.secondary_host, server_name_for(config.number))
    tcp = HostnameEndpoint(
        reactor,
        way.remote,
        way.port,
        timeout=HANDSHAKE_SECONDS,
        bindAddress=(way.local, 0) if way.local else None,
    )
    return TlsEndpoint(options, tcp)


@dataclass
class Runtime:
    """Reactor, clocks, devices, workers, and the ways to others.

    :ivar reactor: timers and sockets.
    :ivar open_device: as :func:`qdsmirror.storage.device.open_device`.
    :ivar quick_worker: for I/O that mostly ends in the page cache: inline while that is quick.
    :ivar slow_worker: for I/O that blocks (bulk reads).
    :ivar read_worker: for application reads, several at once.
    :ivar wall: seconds since 1970, for people only.
    :ivar budget: bytes of unanswered requests, shared by all groups of a child.
    :ivar unapplied: bytes framed and not yet applied, of all groups of a child.
    :ivar listen: serves LDSUs to clients; as :func:`qdsmirror.net.nbd.listen_nbd`.
    :ivar bind: makes a listening Unix socket; as :func:`qdsmirror.net.nbd_socket.bind_nbd`.
    :ivar attach: attaches a pmd to its driver; as :func:`qdsmirror.net.asking.attach_to_driver`.
    :ivar endpoint: from reactor, host, group and network path, the way of a pmd to its secondary.
    :ivar server_tls: from the host and the peer's name, what makes TLS around an accepted
        connection; as :func:`qdsmirror.net.tls.server_context_factory`.
    :ivar credentials: what a daemon's sessions are begun with.
    """

    reactor: Any
    open_device: Callable[..., IBlockDevice]
    quick_worker: Callable[[str], IWorker]
    slow_worker: Callable[[str], IWorker]
    read_worker: Callable[[str], IWorker]
    wall: Callable[[], float] = time.time
    budget: Budget = field(default_factory=Budget)
    unapplied: Unapplied = field(default_factory=Unapplied)
    listen: Callable[..., Any] = listen_nbd
    bind: Callable[[Path], socket.socket] = bind_nbd
    attach: Callable[..., Any] = attach_to_driver
    endpoint: Callable[[Any, HostConfig, GroupConfig, NetworkPath], IStreamClientEndpoint] = (
        tls_endpoint
    )
    server_tls: Callable[[HostConfig, str], Any] = server_context_factory
    credentials: KeptCredentials = field(default_factory=KeptCredentials)

    @classmethod
    def real(cls, reactor: Any) -> Runtime:
        """Give the runtime of a daemon."""
        kept = KeptCredentials()
        return cls(
            credentials=kept,
            endpoint=lambda reactor, host, config, way: tls_endpoint(
                reactor, kept.of(host), config, way
            ),
            server_tls=lambda host, peer: server_context_factory(kept.of(host), peer),
            reactor=reactor,
            open_device=open_device,
            quick_worker=lambda name: AdaptiveWorker(reactor, name),
            slow_worker=lambda name: ThreadWorker(reactor, name),
            read_worker=lambda name: ReadWorkers(reactor, READ_THREADS, name),
        )

    def blocking(self, job: Callable[..., _T], *args: Any) -> Deferred[_T]:
        """Run a job that may block in a thread of the reactor's pool: one that is rare."""
        return deferToThreadPool(self.reactor, self.reactor.getThreadPool(), job, *args)

    def wall_ns(self) -> int:
        """Give nanoseconds since 1970, for a frame's header."""
        return int(self.wall() * 1e9)
