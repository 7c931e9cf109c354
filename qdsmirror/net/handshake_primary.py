"""The primary's side of the handshake; ``net.handshake`` has the whole picture."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from twisted.internet.defer import Deferred, FirstError, gatherResults
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IProtocol, IReactorTime
from twisted.internet.protocol import ClientFactory
from twisted.logger import LogLevel
from twisted.protocols import amp
from twisted.python.failure import Failure

from qdsmirror.core.authentication import NONCE_BYTES, Role
from qdsmirror.core.compression import NONE
from qdsmirror.errors import IdentityError, ProtocolError, QdsError
from qdsmirror.net.handshake_channel import HandshakeChannel, Responders
from qdsmirror.net.handshake_checks import (
    HINT_VERSION,
    compare,
    compare_digest,
    hint_secret,
    transcript_of,
)
from qdsmirror.net.handshake_commands import (
    PROTOCOL_VERSION,
    Authenticate,
    Hello,
    Join,
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
from qdsmirror.paths import group_name

_ANSWER_SHOWN = 200


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
    :ivar session: 16 random bytes, new for each session.
    :ivar stream_factory: makes the protocol of the frame stream.
    :ivar compression: name of the algorithm that is wanted, or ``none``.
    :ivar agreed: told the one that the secondary agrees to, before there is a stream.
    :ivar joins: the connection is a further path of the session: nothing is mapped or decided.
    :ivar paths: how many the session may have.
    """

    group: int
    digest: bytes
    secret: bytes = field(repr=False)
    units: Sequence[UnitOffer]
    decide: Decision
    session: bytes
    stream_factory: ClientFactory
    compression: str = NONE
    agreed: Callable[[str], None] = lambda _name: None
    joins: bool = False
    paths: int = 1


class PrimaryHandshake(HandshakeChannel):
    """The primary's side; the protocol to give to a TLS client endpoint.

    :param offer: what this connection is for.
    :param reactor: for the deadline.
    :ivar done: fires with the connected protocol of the stream, or fails with a QdsError; when
        cancelled it aborts the connection.
    """

    #: The group logs them, not again at each try.
    verdict_level = LogLevel.debug

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
        if offer.joins:
            await self._ask(Join, offer.stream_factory, session=offer.session)
            return
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
        await self._ask(Start, offer.stream_factory, session=offer.session, paths=offer.paths)

    async def _authenticate(self) -> None:
        offer = self._offer
        nonce = secrets.token_bytes(NONCE_BYTES)
        answer = await self._ask(
            Hello,
            version=PROTOCOL_VERSION,
            group=offer.group,
            digest=offer.digest,
            nonce=nonce,
            compression=offer.compression,
        )
        compare("protocol version", PROTOCOL_VERSION, answer["version"], HINT_VERSION)
        compare_digest(offer.group, offer.digest, answer["digest"])
        transcript = transcript_of(self, offer.group, offer.digest, nonce, answer["nonce"])
        proof = await self._ask(Authenticate, mac=transcript.proof(offer.secret, Role.PRIMARY))
        if not transcript.verify(offer.secret, Role.SECONDARY, proof["mac"]):
            raise IdentityError(
                f"the secondary did not prove the secret of {group_name(offer.group)}",
                hint=hint_secret(offer.group),
            )
        compression = answer.get("compression") or NONE
        if compression not in (offer.compression, NONE):
            raise ProtocolError("the secondary agrees to a compression that was not offered")
        self.peer_authenticated()
        offer.agreed(compression)

    def _ask(self, command: type[amp.Command], *args: Any, **values: Any) -> Deferred[Any]:
        """Ask the secondary; fails with a QdsError where it answers with an error."""
        asked: Deferred[Any] = self.callRemote(command, *args, **values)  # type: ignore[no-untyped-call]
        return asked.addErrback(self._answered_error, command)

    def _answered_error(self, failure: Failure, command: type[amp.Command]) -> Any:
        error = failure.value
        if isinstance(error, QdsError):
            told = error_from(error.code, error.message)
            self.refuse(told, by_peer=True)
            raise told
        if isinstance(error, amp.RemoteAmpError | amp.UnhandledCommand):
            raise ProtocolError(one_line(f"the secondary answered: {error}"[:_ANSWER_SHOWN]))
        # An empty answer cannot be malformed: that is the stream failing after Start.
        if command.response and isinstance(error, KeyError | TypeError | ValueError):
            raise ProtocolError(f"malformed answer: {error}")
        return failure

    @staticmethod
    async def _all(asked: list[Deferred[Any]]) -> list[Any]:
        try:
            return await gatherResults(asked, consumeErrors=True)
        except FirstError as first:
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
