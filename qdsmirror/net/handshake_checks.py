"""What both sides of the handshake compare, and prove, in the same words."""

from __future__ import annotations

from qdsmirror.core.authentication import Transcript
from qdsmirror.errors import MismatchError, ProtocolError
from qdsmirror.net.handshake_channel import HandshakeChannel
from qdsmirror.net.handshake_commands import PROTOCOL_VERSION
from qdsmirror.net.tls import exporter
from qdsmirror.paths import group_name

HINT_VERSION = "install the same version of qdsmirror on both hosts"


def hint_secret(group: int) -> str:
    """Give the next step when a proof of the group's secret is wrong."""
    return (
        f"compare {group_name(group)}.secret on both hosts; `qdsconfigtool pki` makes one for both"
    )


def compare(what: str, ours: int, theirs: int, hint: str) -> None:
    """Raise a MismatchError, which both sides report, unless the numbers are equal."""
    if ours != theirs:
        raise MismatchError(f"{what} {ours} here, {theirs} on the other side", hint=hint)


def compare_digest(group: int, ours: bytes, theirs: bytes) -> None:
    """Raise a MismatchError unless both hosts have the same configuration of the group."""
    if ours != theirs:
        name = group_name(group)
        raise MismatchError(
            f"{name}.cfg differs between the two hosts (digest {ours.hex()[:16]} here, "
            f"{theirs.hex()[:16]} on the other side)",
            hint=f"on the primary: `qdsdoctor --peer -g {group}` names what differs",
        )


def transcript_of(
    channel: HandshakeChannel, group: int, digest: bytes, primary_nonce: bytes, answer_nonce: bytes
) -> Transcript:
    """Make what both sides prove the secret over, for this TLS connection.

    :raises ProtocolError: the peer returned our own nonce.
    """
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
