"""The primary's side of the handshake; ``net.handshake`` has the whole picture."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from twisted.internet.interfaces import IProtocol, IReactorTime
from twisted.internet.protocol import ClientFactory

from qdsmirror.core.authentication import NONCE_BYTES
from qdsmirror.core.compression import NONE
from qdsmirror.errors import ProtocolError
from qdsmirror.net.handshake_asking import Asking
from qdsmirror.net.handshake_checks import (
    HINT_VERSION,
    compare,
    compare_digest,
    transcript_of,
)
from qdsmirror.net.handshake_commands import (
    PROTOCOL_VERSION,
    Hello,
    Join,
    MapLDSU,
    Rebase,
    RebasePosition,
    Start,
    UnitPosition,
)

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


class PrimaryHandshake(Asking):
    """The primary's side; the protocol to give to a TLS client endpoint.

    :param offer: what this connection is for.
    :param reactor: for the deadline.
    :ivar done: fires with the connected protocol of the stream, or fails with a QdsError; when
        cancelled it aborts the connection.
    """

    def __init__(self, offer: PrimaryOffer, reactor: IReactorTime) -> None:
        super().__init__(reactor, offer.group)
        self._offer = offer

    async def converse(self) -> None:
        """Ask, step by step; any error ends it."""
        offer = self._offer
        await self._authenticate()
        if offer.joins:
            await self.ask(Join, offer.stream_factory, session=offer.session)
            return
        acks = await self.ask_all(
            [
                self.ask(MapLDSU, index=unit.index, name=unit.name, size=unit.size)
                for unit in offer.units
            ]
        )
        positions = [
            UnitPosition(unit.index, **ack) for unit, ack in zip(offer.units, acks, strict=True)
        ]
        rebases = await offer.decide(positions)
        await self.ask_all([self.ask(Rebase, **vars(rebase)) for rebase in rebases])
        await self.ask(Start, offer.stream_factory, session=offer.session, paths=offer.paths)

    async def _authenticate(self) -> None:
        offer = self._offer
        nonce = secrets.token_bytes(NONCE_BYTES)
        answer = await self.ask(
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
        await self.prove(transcript, offer.secret)
        compression = answer.get("compression") or NONE
        if compression not in (offer.compression, NONE):
            raise ProtocolError("the secondary agrees to a compression that was not offered")
        self.peer_authenticated()
        offer.agreed(compression)

    def conversed(self, _: object) -> IProtocol:
        """Give the stream's protocol."""
        stream = self.innerProtocol
        assert stream is not None
        return stream
