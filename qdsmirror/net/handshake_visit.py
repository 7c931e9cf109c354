"""A visit: the primary's end of a handshake that looks at the secondary, and mirrors nothing.

It goes the pmd's way, so that whatever keeps the pmd from a session keeps the visitor out, in the
same words; but it supersedes no session, and claims nothing of the configuration: what differs can
be named (``core.peering``).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509
from twisted.internet.interfaces import IReactorTime

from qdsmirror.core.authentication import NONCE_BYTES
from qdsmirror.core.jsontext import parse_object
from qdsmirror.errors import ProtocolError
from qdsmirror.limits import LDSUS_PER_GROUP_MAX
from qdsmirror.net.handshake_asking import Asking
from qdsmirror.net.handshake_checks import HINT_VERSION, compare, transcript_of
from qdsmirror.net.handshake_commands import (
    PROTOCOL_VERSION,
    VISIT_DIGEST,
    DescribeGroup,
    DescribeLDSU,
    Visit,
    one_line,
)


@dataclass(frozen=True)
class Visited:
    """What a visit has found.

    :ivar facts: what the secondary says of the group, as ``IRemoteAuthority.describe`` gives it;
        not trusted to be of any form but that of a JSON object.
    :ivar ldsus: of each LDSU, in its own file's order: name, mirror_device, size (0: not known).
    :ivar asked: wall clock here when it was asked, ``answered`` when the answer came; seconds.
    :ivar certificate_ends: when the certificate that it showed ends, seconds since 1970.
    """

    facts: dict[str, Any]
    ldsus: list[dict[str, Any]]
    asked: float
    answered: float
    certificate_ends: float


@dataclass(frozen=True)
class VisitorsPass:
    """What a visitor brings.

    :ivar group: number of the group; ``secret``: its 32 bytes.
    :ivar wall: seconds since 1970, to be compared with the secondary's clock.
    """

    group: int
    secret: bytes = field(repr=False)
    wall: Callable[[], float]


class VisitHandshake(Asking):
    """The visitor's end; the protocol to give to a TLS client endpoint.

    :ivar done: fires with a :class:`Visited`, or fails with a QdsError.
    """

    def __init__(self, brought: VisitorsPass, reactor: IReactorTime) -> None:
        super().__init__(reactor, brought.group)
        self._brought = brought

    async def converse(self) -> Visited:
        """Authenticate, ask, and hang up."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        group = self._brought.group
        hello = await self.ask(Visit, version=PROTOCOL_VERSION, group=group, nonce=nonce)
        compare("protocol version", PROTOCOL_VERSION, hello["version"], HINT_VERSION)
        transcript = transcript_of(self, group, VISIT_DIGEST, nonce, hello["nonce"])
        await self.prove(transcript, self._brought.secret)
        self.peer_authenticated()
        asked = self._brought.wall()
        answer = await self.ask(DescribeGroup)
        answered = self._brought.wall()
        facts = parse_object(answer["facts"], "what the secondary says of the group")
        count = facts.get("ldsus")
        if not isinstance(count, int) or not 0 <= count <= LDSUS_PER_GROUP_MAX:
            raise ProtocolError("the secondary does not say how many LDSUs it has")
        ldsus = await self.ask_all([self.ask(DescribeLDSU, index=one) for one in range(count)])
        certificate: x509.Certificate = (
            self.transport.getPeerCertificate().to_cryptography()  # it was judged
        )
        ends = certificate.not_valid_after_utc.timestamp()
        return Visited(facts, [_shown(one) for one in ldsus], asked, answered, ends)

    def conversed(self, result: Visited) -> Visited:
        """Give what was found; nothing more is wanted of the secondary."""
        self.transport.loseConnection()
        return result


def _shown(ldsu: dict[str, Any]) -> dict[str, Any]:
    """Make an LDSU's texts fit for a terminal."""
    return {
        key: one_line(value) if isinstance(value, str) else value for key, value in ldsu.items()
    }
