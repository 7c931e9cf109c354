"""The secondary's side of the handshake; ``net.handshake`` has the whole picture."""

# Interfaces declare methods without ``self``.
# mypy: disable-error-code="empty-body"

from __future__ import annotations

import json
import secrets
from enum import Enum
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IProtocol, IReactorTime
from twisted.internet.protocol import Factory
from twisted.logger import LogLevel
from zope.interface import Attribute, Interface

from qdsmirror.core.authentication import NONCE_BYTES, Role, Transcript
from qdsmirror.core.compression import NONE, known
from qdsmirror.errors import (
    DivergedError,
    IdentityError,
    MismatchError,
    ProtocolError,
    QdsError,
)
from qdsmirror.net.handshake_channel import HandshakeChannel, Responder, Responders
from qdsmirror.net.handshake_checks import (
    HINT_VERSION,
    compare,
    compare_digest,
    hint_secret,
    transcript_of,
)
from qdsmirror.net.handshake_commands import (
    PROTOCOL_VERSION,
    VISIT_DIGEST,
    Authenticate,
    DescribeGroup,
    DescribeLDSU,
    Hello,
    Join,
    MapLDSU,
    Rebase,
    RebasePosition,
    Refuse,
    Start,
    UnitPosition,
    Visit,
    error_from,
)
from qdsmirror.paths import group_name


class IRemoteAuthority(Interface):
    """The secondary's group, as the handshake of one connection sees it.

    Of ``start``, ``join`` (returning), ``left`` and ``refused`` exactly one happens to each
    connection.
    """

    group: int = Attribute("number of the group")
    digest: bytes = Attribute("32 bytes, GroupConfig.identity_digest()")
    secret: bytes = Attribute("the group's 32 bytes")
    ldsus: int = Attribute("how many LDSUs the group has")

    def map_ldsu(index: int, name: str, size: int) -> UnitPosition:
        """Match an LDSU with its mirror device; raises MismatchError (or another QdsError)."""

    def rebase(positions: list[RebasePosition]) -> Deferred[None]:
        """Durably replace the history of every LDSU; fires when all superblocks have it."""

    def start(session: bytes, paths: int, compression: str) -> Factory:
        """Begin a session, superseding any other; gives the factory of the stream's protocol."""

    def join(session: bytes) -> Factory:
        """Give the factory for a further path of the present session; raises ProtocolError."""

    def refused(error: QdsError) -> None:
        """Take why this connection did not become a stream (it is in the log already)."""

    def describe() -> dict[str, Any]:
        """Give what an authenticated visitor is told of the group: plain JSON, no secrets."""

    def describe_ldsu(index: int) -> tuple[str, str, int]:
        """Give an LDSU's name, its mirror device and that one's bytes, 0 if not known."""

    def left() -> None:
        """Learn that a visitor, who wanted no stream, has gone."""


class _Step(Enum):
    """What the secondary waits for."""

    HELLO = "Hello or Visit"
    AUTHENTICATE = "Authenticate"
    VISITED = "what a visitor asks"
    MAP = "MapLDSU"
    DECISION = "Rebase or Start"
    REBASE = "the rest of Rebase"
    REBASING = "its own rebase"
    START = "Start"


class RemoteHandshake(HandshakeChannel):
    """The secondary's side; the protocol of an adopted connection, inside TLS.

    :param authority: the group that the connection is for.
    :param reactor: for the deadline.
    """

    def __init__(self, authority: IRemoteAuthority, reactor: IReactorTime) -> None:
        super().__init__(reactor, f"{group_name(authority.group)} secondary")
        self._authority = authority
        self._step = _Step.HELLO
        self._transcript: Transcript | None = None
        self._visiting = False
        self._compression = NONE
        self._mapped: dict[int, UnitPosition] = {}
        self._rebases: dict[int, RebasePosition] = {}

    def responders(self) -> Responders:
        """Give the commands of this step: the whole order of the handshake stands here."""
        hello = (Hello, self._hello)
        visit = (Visit, self._visit)
        authenticate = (Authenticate, self._authenticate)
        map_ldsu = (MapLDSU, self._map_ldsu)
        rebase = (Rebase, self._rebase)
        start = (Start, self._start)
        join = (Join, self._join)
        describe = (DescribeGroup, self._describe)
        describe_ldsu = (DescribeLDSU, self._describe_ldsu)
        by_step: dict[_Step, list[Responder]] = {
            _Step.HELLO: [hello, visit],
            _Step.AUTHENTICATE: [authenticate],
            # Until it hangs up.
            _Step.VISITED: [describe, describe_ldsu],
            # A new session, or a further path of the one that there is.
            _Step.MAP: [map_ldsu] if self._mapped else [map_ldsu, join],
            # Every LDSU is mapped: resume, or a new history for all of them.
            _Step.DECISION: [rebase, start],
            _Step.REBASE: [rebase],
            _Step.REBASING: [],
            _Step.START: [start],
        }
        # The primary may give up at any step.
        allowed: list[Responder] = [*by_step[self._step], (Refuse, self._refuse)]
        return {item[0].commandName: item for item in allowed}

    def ended(self, error: QdsError) -> None:
        """Tell the group; a visitor who hangs up has been refused nothing."""
        if self._step is _Step.VISITED:
            self._authority.left()
        else:
            self._authority.refused(error)

    def _hello(
        self, version: int, group: int, digest: bytes, nonce: bytes, compression: str | None = None
    ) -> dict[str, Any]:
        authority = self._authority
        compare("protocol version", PROTOCOL_VERSION, version, HINT_VERSION)
        compare("group", authority.group, group, "check the port and the group's file")
        compare_digest(group, authority.digest, digest)
        answer = secrets.token_bytes(NONCE_BYTES)
        self._transcript = transcript_of(self, group, digest, nonce, answer)
        self._compression = known(compression or NONE)
        self._step = _Step.AUTHENTICATE
        return {
            "version": PROTOCOL_VERSION,
            "digest": authority.digest,
            "nonce": answer,
            "compression": self._compression,
        }

    def _visit(self, version: int, group: int, nonce: bytes) -> dict[str, Any]:
        authority = self._authority
        compare("protocol version", PROTOCOL_VERSION, version, HINT_VERSION)
        compare("group", authority.group, group, "check the port and the group's file")
        answer = secrets.token_bytes(NONCE_BYTES)
        self._transcript = transcript_of(self, group, VISIT_DIGEST, nonce, answer)
        self._visiting = True
        self._step = _Step.AUTHENTICATE
        return {"version": PROTOCOL_VERSION, "nonce": answer}

    def _authenticate(self, mac: bytes) -> dict[str, Any]:
        authority, transcript = self._authority, self._transcript
        assert transcript is not None
        if not transcript.verify(authority.secret, Role.PRIMARY, mac):
            raise IdentityError(
                f"the primary did not prove the secret of {group_name(authority.group)}",
                hint=hint_secret(authority.group),
            )
        self.peer_authenticated()
        if self._visiting:
            self._step = _Step.VISITED
            # It ends when the visitor hangs up, and that is no news.
            self.verdict_level = LogLevel.debug
        else:
            self._step = _Step.MAP if authority.ldsus else _Step.DECISION
        return {"mac": transcript.proof(authority.secret, Role.SECONDARY)}

    def _describe(self) -> dict[str, Any]:
        facts = json.dumps(self._authority.describe(), ensure_ascii=False)
        return {"facts": facts}

    def _describe_ldsu(self, index: int) -> dict[str, Any]:
        if index >= self._authority.ldsus:
            raise MismatchError(f"LDSU {index}: the group has {self._authority.ldsus} here")
        name, device, size = self._authority.describe_ldsu(index)
        return {"name": name, "mirror_device": device, "size": size}

    def _map_ldsu(self, index: int, name: str, size: int) -> dict[str, Any]:
        ldsus = self._authority.ldsus
        if index >= ldsus:
            raise MismatchError(f"LDSU {index} ({name}): the group has {ldsus} here")
        if index in self._mapped:
            raise ProtocolError(f"LDSU {index} is mapped twice")
        position: UnitPosition = self._authority.map_ldsu(index, name, size)
        self._mapped[index] = position
        if len(self._mapped) == ldsus:
            self._step = _Step.DECISION
        return {
            "generation": position.generation,
            "next_sequence": position.next_sequence,
            "chain": position.chain,
            "next_gsn": position.next_gsn,
        }

    def _rebase(self, **values: Any) -> Any:
        position = RebasePosition(**values)
        mapped = self._mapped.get(position.index)
        if mapped is None or position.index in self._rebases:
            raise ProtocolError(f"LDSU {position.index} cannot be rebased (unmapped, or twice)")
        if position.predecessor != mapped.generation:
            raise DivergedError(
                f"LDSU {position.index}: the new history would replace generation "
                f"{position.predecessor.hex() or '(none)'}, the secondary has "
                f"{mapped.generation.hex() or '(none)'}",
                hint="see `qdsinfo` on both hosts; then `qdsrefresh --full`",
            )
        self._rebases[position.index] = position
        if len(self._rebases) < self._authority.ldsus:
            self._step = _Step.REBASE
            return {}
        self._step = _Step.REBASING
        positions = [self._rebases[index] for index in sorted(self._rebases)]
        return maybeDeferred(self._authority.rebase, positions).addCallback(self._rebased)

    def _rebased(self, _: object) -> dict[str, Any]:
        self._step = _Step.START
        return {}

    def _start(self, session: bytes, paths: int | None = None) -> IProtocol:
        return self._stream(self._authority.start(session, paths or 1, self._compression))

    def _join(self, session: bytes) -> IProtocol:
        return self._stream(self._authority.join(session))

    def _stream(self, factory: Factory) -> IProtocol:
        stream = factory.buildProtocol(self.transport.getPeer())
        assert stream is not None
        return stream

    def _refuse(self, code: str, text: str) -> dict[str, Any]:
        self.refuse(error_from(code, text), by_peer=True)
        return {}
