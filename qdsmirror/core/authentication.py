"""The "cipher" of the patent's handshake: proof of the group's secret, bound to one connection.

Each side sends an HMAC-SHA256, under the group's machine-made 256-bit secret, of a transcript:
who proves (role), to what end (group, configuration digest, protocol version), when (both
nonces) and over which TLS connection (its exporter value, RFC 9266).  So a proof is worth nothing
on another connection (relay, replay), in the other direction (reflection) or for the other role.

Source: the patent's handshake between pmd and rmd; security.md 3; RFC 2104; RFC 9266.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from enum import Enum

from qdsmirror.limits import SECRET_BYTES

#: Names the construction: a proof can never be one of another protocol or version of this one.
_DOMAIN = b"qdsmirror proof of the group's secret, 1"

NONCE_BYTES = 32
EXPORTER_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size


class Role(Enum):
    """Which side proves."""

    PRIMARY = b"primary"
    SECONDARY = b"secondary"


@dataclass(frozen=True)
class Transcript:
    """What both sides must agree on, byte for byte.

    :ivar group: number of the logical group.
    :ivar version: version of the protocol.
    :ivar digest: digest of the group's configuration.
    :ivar primary_nonce: 32 random bytes of the primary, new for each connection.
    :ivar secondary_nonce: likewise of the secondary.
    :ivar exporter: 32 bytes, the connection's ``EXPORTER-Channel-Binding``.
    :raises ValueError: a nonce or the exporter value has another length, or the nonces are equal.
    """

    group: int
    version: int
    digest: bytes
    primary_nonce: bytes
    secondary_nonce: bytes
    exporter: bytes

    def __post_init__(self) -> None:
        if {len(self.primary_nonce), len(self.secondary_nonce)} != {NONCE_BYTES}:
            raise ValueError(f"a nonce has {NONCE_BYTES} bytes")
        if self.primary_nonce == self.secondary_nonce:
            raise ValueError("the nonces are equal")
        if len(self.exporter) != EXPORTER_BYTES:
            raise ValueError(f"the exporter value has {EXPORTER_BYTES} bytes")

    def proof(self, secret: bytes, role: Role) -> bytes:
        """Prove, as ``role``, to know the secret: 32 bytes.

        :param secret: the group's 32 bytes.
        :raises ValueError: the secret has another length.
        """
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a group's secret has {SECRET_BYTES} bytes")
        return hmac.digest(secret, self._encode(role), "sha256")

    def verify(self, secret: bytes, role: Role, proof: bytes) -> bool:
        """Tell, in constant time, whether ``proof`` is the one of ``role``."""
        return hmac.compare_digest(self.proof(secret, role), proof)

    def _encode(self, role: Role) -> bytes:
        # Every field has its length before it, so that no two transcripts encode alike.
        fields = (
            _DOMAIN,
            role.value,
            self.group.to_bytes(4, "big"),
            self.version.to_bytes(4, "big"),
            self.digest,
            self.primary_nonce,
            self.secondary_nonce,
            self.exporter,
        )
        return b"".join(len(field).to_bytes(4, "big") + field for field in fields)
