"""What the handshake of one connection may ask of the secondary's group."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from zope.interface import implementer

from qdsmirror.errors import MismatchError, ProtocolError, QdsError
from qdsmirror.groups.describing import facts
from qdsmirror.net.handshake import IRemoteAuthority, RebasePosition, UnitPosition

if TYPE_CHECKING:
    from qdsmirror.groups.remote import RemoteGroup


@implementer(IRemoteAuthority)
class Authority:
    """The group, as the handshake of one connection sees it.

    :param ended: called once, when the handshake has succeeded or come to nothing.
    """

    def __init__(self, group: RemoteGroup, ended: Callable[[], None]) -> None:
        self._group = group
        self._ended = ended
        self._epoch: int | None = None
        self.group = group.number
        self.digest = group.config.identity_digest()
        self.secret = group.secret
        self.ldsus = len(group.config.ldsus)

    def map_ldsu(self, index: int, name: str, size: int) -> UnitPosition:
        """Match an LDSU with its mirror device; the first one ends any older session.

        :param size: of the data device, bytes.
        :raises MismatchError: another LDSU has that index here, or the mirror device is smaller.
        :raises ProtocolError: the daemon is stopping.
        """
        group = self._group
        if group.mirror is None:
            raise ProtocolError("the remote mirror daemon is stopping")
        if self._epoch is None:
            group.supersede()
            self._epoch = group.epoch
        ldsu = group.config.ldsus[index]
        device = group.mirror.devices[index]
        if ldsu.name != name:
            raise MismatchError(
                f"LDSU {index} is {name} at the primary and {ldsu.name} at the secondary",
                hint="compare the group's file on both hosts: `qdsconfigtool show`",
            )
        if device.size < size:
            raise MismatchError(
                f"mirror device {ldsu.mirror_device} of {name} has {device.size} bytes, the data "
                f"device {size}",
                hint="give the mirror a device at least as large",
            )
        return group.position(index)

    def rebase(self, positions: list[RebasePosition]) -> Deferred[None]:
        """Replace the group's history."""
        self._check_epoch()
        done: Deferred[None] = self._group.rebase(positions)

        def renew(_: None) -> None:
            self._epoch = self._group.epoch

        return done.addCallback(renew)

    def start(self, session: bytes, paths: int, compression: str) -> Factory:
        """Begin the stream."""
        self._check_epoch()
        self._ended()
        return self._group.new_session(session, paths, compression).factory()

    def join(self, session: bytes) -> Factory:
        """Let the connection be a further path of the present session."""
        factory = self._group.joined(session).factory()
        self._ended()
        return factory

    def describe(self) -> dict[str, Any]:
        """Tell a visitor of the group: it supersedes nothing."""
        group = self._group
        return facts(
            group.config,
            group.host,
            group.runtime.wall(),
            state=str(group.link_state["state"]),
            notes=[*group.notes, *([group.failed] if group.failed else [])],
            journal_bytes=group.mirror.journal.ring.size if group.mirror is not None else 0,
        )

    def describe_ldsu(self, index: int) -> tuple[str, str, int]:
        """Tell a visitor of one LDSU."""
        ldsu = self._group.config.ldsus[index]
        mirror = self._group.mirror
        size = mirror.devices[index].size if mirror is not None else 0
        return ldsu.name, ldsu.mirror_device, size

    def left(self) -> None:
        """Count the visit as over."""
        self._ended()

    def _check_epoch(self) -> None:
        if self._epoch != self._group.epoch:
            raise ProtocolError("another connection came first; try again")

    def refused(self, error: QdsError) -> None:
        """Pass on why nothing came of this connection."""
        self._ended()
        self._group.refused(error)
