"""What the secondary's master answers for a group that cannot be served: the reason, in private.

The group's child has failed or is between two attempts, so nobody else can tell the primary why.
The reason names devices and files; so it travels as the handshake's ERR, after both ends have
authenticated (security.md 2, 4).  Where that is not possible an alert must do (daemons.routing).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any, NoReturn

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.protocols.tls import TLSMemoryBIOFactory
from zope.interface import implementer

from qdsmirror import errors
from qdsmirror.config import GroupConfig, HostConfig, load_secret
from qdsmirror.errors import QdsError
from qdsmirror.groups.describing import facts
from qdsmirror.net.credentials import KeptCredentials
from qdsmirror.net.handshake import (
    IRemoteAuthority,
    RebasePosition,
    RemoteHandshake,
    UnitPosition,
)
from qdsmirror.net.tls import server_context_factory
from qdsmirror.paths import Paths

_KINDS: dict[int, type[QdsError]] = {
    errors.EXIT_CONFIG: errors.ConfigError,
    errors.EXIT_IDENTITY: errors.IdentityError,
    errors.EXIT_BROKEN: errors.BrokenError,
}


def refusal_of(host: str, group: str, reason: str, code: int) -> QdsError:
    """Make the error that the primary is told.

    :param reason: the child's, perhaps with its hint.
    :param code: the exit code that goes with it, errors.py; any but 4, 10 and 12 is one that the
        primary tries again after soon.
    """
    mend = f"mend it on {host}, then run `qdsconfigtool apply` there and here"
    if code not in _KINDS:
        # Perhaps its child was only killed.
        mend = f"{host} tries again by itself; if that does not help: {mend}"
    kind = _KINDS.get(code, QdsError)
    return kind(f"{host} cannot serve {group}: {reason}", hint=mend)


@implementer(IRemoteAuthority)
class RefusingAuthority:
    """A group that maps no LDSU, as the handshake of one connection sees it."""

    def __init__(
        self,
        config: GroupConfig,
        host: HostConfig,
        secret: bytes,
        error: QdsError,
        ended: Callable[[], None],
    ) -> None:
        self._config = config
        self._host = host
        self.group = config.number
        self.digest = config.identity_digest()
        self.secret = secret
        self.ldsus = len(config.ldsus)
        self._error = error
        self._ended = ended

    def map_ldsu(self, index: int, name: str, size: int) -> UnitPosition:
        """Tell why not."""
        raise self._error

    def rebase(self, positions: list[RebasePosition]) -> Deferred[None]:
        """Never asked: nothing is mapped."""
        self._never()

    def start(self, session: bytes, paths: int, compression: str) -> Factory:
        """Never asked: nothing is mapped."""
        self._never()

    def join(self, session: bytes) -> Factory:
        """Tell why not."""
        self._never()

    def describe(self) -> dict[str, Any]:
        """Tell a visitor why the group is not served."""
        notes = [self._error.message]
        return facts(self._config, self._host, time.time(), state="failed", notes=notes)

    def describe_ldsu(self, index: int) -> tuple[str, str, int]:
        """Tell a visitor what is configured; nobody has looked at the devices."""
        ldsu = self._config.ldsus[index]
        return ldsu.name, ldsu.mirror_device, 0

    def left(self) -> None:
        """Count the visit as over."""
        self._ended()

    def _never(self) -> NoReturn:
        raise self._error

    def refused(self, error: QdsError) -> None:
        """Count the handshake as over."""
        self._ended()


def refuse(
    reactor: Any,
    paths: Paths,
    host: HostConfig,
    config: GroupConfig,
    error: QdsError,
    descriptor: int,
    ended: Callable[[], None],
    kept: KeptCredentials,
) -> bool:
    """Begin the handshake that ends with this error.

    :param reactor: provides IReactorSocket and IReactorTime.
    :param descriptor: an accepted connection; it stays the caller's.
    :param ended: called once when the handshake is over, if it was begun.
    :param kept: what the master's sessions are begun with.
    :returns: ``False`` if this host's own identity is what is wrong.
    """
    try:
        secret = load_secret(paths, config.number)
        context = server_context_factory(kept.of(host), config.primary_host)
    except QdsError:
        return False
    authority = RefusingAuthority(config, host, secret, error, ended)
    factory = Factory.forProtocol(lambda: RemoteHandshake(authority, reactor))
    factory.noisy = False
    tls = TLSMemoryBIOFactory(context, False, factory)
    tls.noisy = False
    with socket.socket(fileno=os.dup(descriptor)) as accepted:
        accepted.setblocking(False)
        reactor.adoptStreamConnection(accepted.fileno(), accepted.family, tls)
    return True
