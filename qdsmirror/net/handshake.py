"""The patent's handshake between pmd and rmd, over mutual TLS, up to the frame stream.

::

    primary (TLS client)                         secondary (TLS server)
    Hello(version, group, digest, nonce)    ->   compare
                                            <-   version, digest, nonce
    Authenticate(proof as primary)          ->   verify
                                            <-   proof as secondary
    MapLDSU(index, name, size), each        ->   match with the mirror device
                                            <-   ACK: where its history ends, or ERR and reason
    [Rebase(...), each: a full refresh      ->   replace the history]
    Start(session)                          ->   switch
    frame stream                           <->   frame stream

A side that refuses says why: the secondary by an error answer, the primary by ``Refuse``.  Before
TLS is complete the reason travels as a TLS alert (``net.tls.why_lost``).

Source: architecture.md "Protocol", security.md 1-4, rules.md 7, 8 and 17.
"""

from __future__ import annotations

# Interfaces declare methods without ``self``.
# mypy: disable-error-code="empty-body"
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from twisted.internet.defer import Deferred, gatherResults, maybeDeferred
from twisted.internet.defer import FirstError as _FirstError
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IProtocol, IReactorTime
from twisted.internet.protocol import ClientFactory, Factory
from twisted.protocols import amp
from twisted.python.failure import Failure
from zope.interface import Attribute, Interface

from qdsmirror.core.authentication import NONCE_BYTES, Role, Transcript
from qdsmirror.errors import (
    DivergedError,
    IdentityError,
    MismatchError,
    ProtocolError,
    QdsError,
)
from qdsmirror.net.handshake_channel import HandshakeChannel, Responder, Responders
from qdsmirror.net.handshake_commands import (
    PROTOCOL_VERSION,
    Authenticate,
    Hello,
    MapLDSU,
    Rebase,
    RebasePosition,
    Refuse,
    Start,
    UnitPosition,
    error_from,
    error_text,
    internal_error,
    one_line,
)
from qdsmirror.net.tls import exporter
from qdsmirror.paths import group_name

__all__ = [
    "IRemoteAuthority",
    "PrimaryHandshake",
    "PrimaryOffer",
    "RebasePosition",
    "RemoteHandshake",
    "UnitOffer",
    "UnitPosition",
]


@dataclass(frozen=True)
class UnitOffer:
    """One LDSU of the primary: its index in the group's file, its name, its size in bytes."""

    index: int
    name: str
    size: int


Decision = Callable[[list[UnitPosition]], Awaitable[Sequence[RebasePosition]]]


@dataclass(frozen=True)
class PrimaryOffer:
    """What the primary brings to one handshake.

    :ivar group: number of the group.
    :ivar digest: 32 bytes, ``GroupConfig.identity_digest()``.
    :ivar secret: the group's 32 bytes.
    :ivar units: the LDSUs, in the group file's order.
    :ivar decide: given the secondary's positions in the units' order, gives (or fires with) no
        positions to resume, or one for each LDSU to begin a new history; may raise
        DivergedError, which both sides then report.
    :ivar session: 16 random bytes, new for each connection.
    :ivar stream_factory: makes the protocol of the frame stream.
    """

    group: int
    digest: bytes
    secret: bytes
    units: Sequence[UnitOffer]
    decide: Decision
    session: bytes
    stream_factory: ClientFactory


class IRemoteAuthority(Interface):
    """The secondary's group, as the handshake of one connection sees it.

    Of ``start`` (returning) and ``refused`` exactly one happens to each connection.
    """

    group: int = Attribute("number of the group")
    digest: bytes = Attribute("32 bytes, GroupConfig.identity_digest()")
    secret: bytes = Attribute("the group's 32 bytes")
    ldsus: int = Attribute("how many LDSUs the group has")

    def map_ldsu(index: int, name: str, size: int) -> UnitPosition:
        """Match an LDSU with its mirror device; raises MismatchError (or another QdsError)."""

    def rebase(positions: list[RebasePosition]) -> Deferred[None]:
        """Durably replace the history of every LDSU; fires when all superblocks have it."""

    def start(session: bytes) -> Factory:
        """Begin a session, superseding any other; gives the factory of the stream's protocol."""

    def refused(error: QdsError) -> None:
        """Take why this connection did not become a stream (it is in the log already)."""


_ANSWER_SHOWN = 200
_HINT_VERSION = "install the same version of qdsmirror on both hosts"


def _hint_secret(group: int) -> str:
    return (
        f"compare {group_name(group)}.secret on both hosts; `qdsconfigtool pki` makes one for both"
    )


def _compare(what: str, ours: int, theirs: int, hint: str) -> None:
    if ours != theirs:
        raise MismatchError(f"{what} {ours} here, {theirs} on the other side", hint=hint)


def _compare_digest(group: int, ours: bytes, theirs: bytes) -> None:
    if ours != theirs:
        name = group_name(group)
        raise MismatchError(
            f"{name}.cfg differs between the two hosts (digest {ours.hex()[:16]} here, "
            f"{theirs.hex()[:16]} on the other side)",
            hint=f"run `qdsconfigtool check` on both hosts and compare {name}.cfg",
        )


def _transcript(
    channel: HandshakeChannel, group: int, digest: bytes, primary_nonce: bytes, answer_nonce: bytes
) -> Transcript:
    try:
        return Transcript(
            group,
            PROTOCOL_VERSION,
            digest,
            primary_nonce,
            answer_nonce,
            exporter(channel.transport),
        )
    except ValueError as error:
        raise ProtocolError(f"the handshake's nonces: {error}") from None


class PrimaryHandshake(HandshakeChannel):
    """The primary's side; the protocol to give to a TLS client endpoint.

    :param offer: what this connection is for.
    :param reactor: for the deadline.
    :ivar done: fires with the connected protocol of the stream, or fails with a QdsError; when
        cancelled it aborts the connection.
    """

    def __init__(self, offer: PrimaryOffer, reactor: IReactorTime) -> None:
        super().__init__(reactor, f"{group_name(offer.group)} primary")
        self._offer = offer
        self._conversation: Deferred[None] | None = None
        self.done: Deferred[IProtocol] = Deferred(self._abandoned)

    def secured(self) -> None:
        """Say Hello: the secondary's certificate was accepted."""
        self._conversation = Deferred.fromCoroutine(self._converse())
        self._conversation.addCallbacks(self._switched, self._failed)

    def responders(self) -> Responders:
        """Answer nothing: the primary asks."""
        return {}

    def ended(self, error: QdsError) -> None:
        """Fail ``done``, and stop a decision that is under way."""
        done, conversation = self.done, self._conversation
        if not done.called:
            done.errback(error)
        if conversation is not None and not conversation.called:
            conversation.cancel()

    async def _converse(self) -> None:
        """Ask, step by step; any error ends it."""
        offer = self._offer
        await self._authenticate()
        acks = await self._all(
            [
                self._ask(MapLDSU, index=unit.index, name=unit.name, size=unit.size)
                for unit in offer.units
            ]
        )
        positions = [
            UnitPosition(unit.index, **ack) for unit, ack in zip(offer.units, acks, strict=True)
        ]
        rebases = await offer.decide(positions)
        await self._all([self._ask(Rebase, **vars(rebase)) for rebase in rebases])
        await self._ask(Start, offer.stream_factory, session=offer.session)

    async def _authenticate(self) -> None:
        offer = self._offer
        nonce = secrets.token_bytes(NONCE_BYTES)
        answer = await self._ask(
            Hello, version=PROTOCOL_VERSION, group=offer.group, digest=offer.digest, nonce=nonce
        )
        _compare("protocol version", PROTOCOL_VERSION, answer["version"], _HINT_VERSION)
        _compare_digest(offer.group, offer.digest, answer["digest"])
        transcript = _transcript(self, offer.group, offer.digest, nonce, answer["nonce"])
        proof = await self._ask(Authenticate, mac=transcript.proof(offer.secret, Role.PRIMARY))
        if not transcript.verify(offer.secret, Role.SECONDARY, proof["mac"]):
            raise IdentityError(
                f"the secondary did not prove the secret of {group_name(offer.group)}",
                hint=_hint_secret(offer.group),
            )
        self.peer_authenticated()

    def _ask(self, command: type[amp.Command], *args: Any, **values: Any) -> Deferred[Any]:
        """Ask the secondary; fails with a QdsError where it answers with an error."""
        asked: Deferred[Any] = self.callRemote(command, *args, **values)  # type: ignore[no-untyped-call]
        return asked.addErrback(self._answered_error)

    def _answered_error(self, failure: Failure) -> Any:
        error = failure.value
        if isinstance(error, QdsError):
            told = error_from(error.code, error.message)
            self.refuse(told, by_peer=True)
            raise told
        if isinstance(error, amp.RemoteAmpError | amp.UnhandledCommand):
            raise ProtocolError(one_line(f"the secondary answered: {error}"[:_ANSWER_SHOWN]))
        if isinstance(error, KeyError | TypeError | ValueError):
            raise ProtocolError(f"malformed answer: {error}")
        return failure

    @staticmethod
    async def _all(asked: list[Deferred[Any]]) -> list[Any]:
        try:
            return await gatherResults(asked, consumeErrors=True)
        except _FirstError as first:
            first.subFailure.raiseException()

    def _switched(self, _: None) -> None:
        stream = self.innerProtocol
        assert stream is not None
        self.done.callback(stream)

    def _failed(self, failure: Failure) -> None:
        """End the connection with the error that ended the conversation, telling the peer."""
        error = failure.value
        if self.verdict is not None:
            return
        if not isinstance(error, QdsError):
            self.log.failure("{side}: handshake", failure, side=self._side)
            error = internal_error(self._side)
        self._tell(error)
        self.refuse(error)
        if not self.done.called:
            # The stream's protocol failed in the middle of the switch.
            self.done.errback(error)
            self.transport.abortConnection()

    def _tell(self, error: QdsError) -> None:
        # Nobody waits for an answer: the connection ends behind it.
        try:
            self.callRemote(Refuse, code=error.code, text=error_text(error))  # type: ignore[no-untyped-call]
        except (amp.ProtocolSwitched, ConnectionLost):
            pass

    def _abandoned(self, _: Deferred[IProtocol]) -> None:
        self.verdict = ProtocolError("the connection attempt was given up")
        if self._conversation is not None:
            self._conversation.cancel()
        if self.transport is not None:
            self.transport.abortConnection()


class _Step(Enum):
    """What the secondary waits for."""

    HELLO = "Hello"
    AUTHENTICATE = "Authenticate"
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
        self._mapped: dict[int, UnitPosition] = {}
        self._rebases: dict[int, RebasePosition] = {}

    def responders(self) -> Responders:
        """Give the commands of this step: the whole order of the handshake stands here."""
        hello = (Hello, self._hello)
        authenticate = (Authenticate, self._authenticate)
        map_ldsu = (MapLDSU, self._map_ldsu)
        rebase = (Rebase, self._rebase)
        start = (Start, self._start)
        by_step: dict[_Step, list[Responder]] = {
            _Step.HELLO: [hello],
            _Step.AUTHENTICATE: [authenticate],
            _Step.MAP: [map_ldsu],
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
        """Tell the group."""
        self._authority.refused(error)

    def _hello(self, version: int, group: int, digest: bytes, nonce: bytes) -> dict[str, Any]:
        authority = self._authority
        _compare("protocol version", PROTOCOL_VERSION, version, _HINT_VERSION)
        _compare("group", authority.group, group, "check the port and the group's file")
        _compare_digest(group, authority.digest, digest)
        answer = secrets.token_bytes(NONCE_BYTES)
        self._transcript = _transcript(self, group, digest, nonce, answer)
        self._step = _Step.AUTHENTICATE
        return {"version": PROTOCOL_VERSION, "digest": authority.digest, "nonce": answer}

    def _authenticate(self, mac: bytes) -> dict[str, Any]:
        authority, transcript = self._authority, self._transcript
        assert transcript is not None
        if not transcript.verify(authority.secret, Role.PRIMARY, mac):
            raise IdentityError(
                f"the primary did not prove the secret of {group_name(authority.group)}",
                hint=_hint_secret(authority.group),
            )
        self.peer_authenticated()
        self._step = _Step.MAP if authority.ldsus else _Step.DECISION
        return {"mac": transcript.proof(authority.secret, Role.SECONDARY)}

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

    def _start(self, session: bytes) -> IProtocol:
        factory: Factory = self._authority.start(session)
        stream = factory.buildProtocol(self.transport.getPeer())
        assert stream is not None
        return stream

    def _refuse(self, code: str, text: str) -> dict[str, Any]:
        self.refuse(error_from(code, text), by_peer=True)
        return {}
