"""The handshake's AMP commands, their values, and how errors travel in them.

Every value has its length or range checked as it is parsed.  An error's code is the ``code`` of
the QdsError; its description is the message and, on a second line, the hint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from twisted.protocols import amp

from qdsmirror import errors
from qdsmirror.core.authentication import NONCE_BYTES, PROOF_BYTES
from qdsmirror.errors import ProtocolError, QdsError
from qdsmirror.limits import (
    DEVICE_PATH_BYTES_MAX,
    LDSUS_PER_GROUP_MAX,
    NBD_NAME_BYTES_MAX,
    PATHS_MAX,
    PEER_FACTS_BYTES_MAX,
    PEER_TEXT_CHARACTERS_MAX,
)

#: Raised whenever the handshake or the stream after it changes incompatibly.
PROTOCOL_VERSION = 1

GENERATION_BYTES = 16
CHAIN_BYTES = 16
SESSION_BYTES = 16
REFRESH_ID_BYTES = 16
DIGEST_BYTES = 32
COMPRESSION_NAME_BYTES_MAX = 16

#: What a visit proves the secret over, where a session has the digest of its configuration.
VISIT_DIGEST = b"qdsmirror: a visit, no session 1"
assert len(VISIT_DIGEST) == DIGEST_BYTES


@dataclass(frozen=True)
class UnitPosition:
    """Where the secondary's history of one LDSU ends (rules.md 8).

    :ivar index: the LDSU's position in the group's file.
    :ivar generation: 16 bytes; empty when the secondary has no history (blank).
    :ivar next_sequence: local sequence number of the next frame it expects.
    :ivar chain: 16 bytes, the chain just before that frame.
    :ivar next_gsn: the next group sequence number it expects.
    """

    index: int
    generation: bytes
    next_sequence: int
    chain: bytes
    next_gsn: int


@dataclass(frozen=True)
class RebasePosition:
    """A new history of one LDSU, begun by a full refresh (rules.md 7).

    :ivar index: the LDSU's position in the group's file.
    :ivar generation: 16 bytes, the new history.
    :ivar predecessor: the generation that it replaces; empty for a blank secondary.
    :ivar next_sequence: local sequence number of its first frame.
    :ivar chain: 16 bytes, the chain before that frame.
    :ivar next_gsn: its first group sequence number.
    :ivar refresh_id: 16 bytes, the refresh that fills the mirror.
    """

    index: int
    generation: bytes
    predecessor: bytes
    next_sequence: int
    chain: bytes
    next_gsn: int
    refresh_id: bytes


class _Number(amp.Argument):
    """An integer of 0..maximum, in plain decimal digits."""

    def __init__(self, maximum: int, *, optional: bool = False) -> None:
        super().__init__(optional)  # type: ignore[no-untyped-call]
        self._maximum = maximum

    def fromString(self, text: bytes) -> int:
        if len(text) > 20 or not text.isdigit() or int(text) > self._maximum:
            raise ValueError(f"not a number of 0..{self._maximum}: {text[:24]!r}")
        return int(text)

    def toString(self, value: int) -> bytes:
        return b"%d" % value


class _Fixed(amp.Argument):
    """Bytes of one of the given lengths."""

    def __init__(self, *lengths: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lengths = lengths

    def fromString(self, value: bytes) -> bytes:
        if len(value) not in self._lengths:
            raise ValueError(f"{len(value)} bytes instead of {self._lengths[-1]}")
        return value

    def toString(self, value: bytes) -> bytes:
        return self.fromString(value)


class _Text(amp.Unicode):
    """UTF-8 of at most so many bytes."""

    def __init__(self, bytes_max: int, *, optional: bool = False) -> None:
        super().__init__(optional)  # type: ignore[no-untyped-call]
        self._bytes_max = bytes_max

    def fromString(self, text: bytes) -> str:
        if len(text) > self._bytes_max:
            raise ValueError(f"longer than {self._bytes_max} bytes")
        return text.decode("utf-8")


_COUNT = _Number(2**64 - 1)
_INDEX = _Number(LDSUS_PER_GROUP_MAX - 1)

#: The errors that a side may tell the other, by their code; any other code becomes a QdsError.
_WIRE_ERRORS: dict[type[Exception], bytes] = {
    kind: kind.code.encode("ascii")
    for kind in (
        errors.MismatchError,
        errors.ConfigError,
        errors.IdentityError,
        errors.DivergedError,
        errors.CorruptError,
        errors.BrokenError,
        errors.DeviceFailedError,
        errors.DeviceError,
        errors.LimitError,
        errors.ProtocolError,
        errors.QdsError,
    )
}


class HandshakeCommand(amp.Command):
    """A command whose errors are QdsErrors."""

    errors = _WIRE_ERRORS


class Hello(HandshakeCommand):
    """Compare version, group and configuration; exchange nonces; agree on a compression.

    The primary names the one it wants, the secondary answers with it, or with ``none``; who says
    nothing means that.
    """

    arguments = [
        (b"version", _Number(2**32 - 1)),
        (b"group", _Number(2**32 - 1)),
        (b"digest", _Fixed(DIGEST_BYTES)),
        (b"nonce", _Fixed(NONCE_BYTES)),
        (b"compression", _Text(COMPRESSION_NAME_BYTES_MAX, optional=True)),
    ]
    response = [
        (b"version", _Number(2**32 - 1)),
        (b"digest", _Fixed(DIGEST_BYTES)),
        (b"nonce", _Fixed(NONCE_BYTES)),
        (b"compression", _Text(COMPRESSION_NAME_BYTES_MAX, optional=True)),
    ]


class Authenticate(HandshakeCommand):
    """Prove the group's secret: the primary first, the secondary in its answer."""

    arguments = [(b"mac", _Fixed(PROOF_BYTES))]
    response = [(b"mac", _Fixed(PROOF_BYTES))]


class Visit(HandshakeCommand):
    """In place of Hello: come to look, not to mirror; nothing is claimed of the configuration.

    The transcript has ``VISIT_DIGEST`` where that of a session has the configuration's digest, so
    that the proof of one is worth nothing in the other.
    """

    arguments = [
        (b"version", _Number(2**32 - 1)),
        (b"group", _Number(2**32 - 1)),
        (b"nonce", _Fixed(NONCE_BYTES)),
    ]
    response = [
        (b"version", _Number(2**32 - 1)),
        (b"nonce", _Fixed(NONCE_BYTES)),
    ]


class DescribeGroup(HandshakeCommand):
    """Tell a visitor what this end has of the group: one JSON object."""

    response = [(b"facts", _Text(PEER_FACTS_BYTES_MAX))]


class DescribeLDSU(HandshakeCommand):
    """Tell a visitor what this end has of one LDSU; a size of 0 is not known."""

    arguments = [(b"index", _INDEX)]
    response = [
        (b"name", _Text(NBD_NAME_BYTES_MAX)),
        (b"mirror_device", _Text(DEVICE_PATH_BYTES_MAX)),
        (b"size", _COUNT),
    ]


class MapLDSU(HandshakeCommand):
    """Map an LDSU to its mirror device; the answer is the patent's ACK, an error its ERR."""

    arguments = [
        (b"index", _INDEX),
        (b"name", _Text(NBD_NAME_BYTES_MAX)),
        (b"size", _COUNT),
    ]
    response = [
        (b"generation", _Fixed(0, GENERATION_BYTES)),
        (b"next_sequence", _COUNT),
        (b"chain", _Fixed(CHAIN_BYTES)),
        (b"next_gsn", _COUNT),
    ]


class Rebase(HandshakeCommand):
    """Replace the secondary's history of an LDSU by a new one that a full refresh fills."""

    arguments = [
        (b"index", _INDEX),
        (b"generation", _Fixed(GENERATION_BYTES)),
        (b"predecessor", _Fixed(0, GENERATION_BYTES)),
        (b"next_sequence", _COUNT),
        (b"chain", _Fixed(CHAIN_BYTES)),
        (b"next_gsn", _COUNT),
        (b"refresh_id", _Fixed(REFRESH_ID_BYTES)),
    ]


class Start(amp.ProtocolSwitchCommand):
    """Begin the frame stream; ``session`` supersedes every earlier one of the group.

    ``paths`` says how many paths it may have, this one among them.
    """

    arguments = [(b"session", _Fixed(SESSION_BYTES)), (b"paths", _Number(PATHS_MAX, optional=True))]
    errors = _WIRE_ERRORS


class Join(amp.ProtocolSwitchCommand):
    """Make this connection a further path of the session that there is (rules.md 17)."""

    arguments = [(b"session", _Fixed(SESSION_BYTES))]
    errors = _WIRE_ERRORS


class Refuse(HandshakeCommand):
    """Tell the secondary why the primary ends the handshake."""

    arguments = [
        (b"code", _Text(32)),
        (b"text", _Text(4 * PEER_TEXT_CHARACTERS_MAX)),
    ]
    requiresAnswer = False


def error_text(error: QdsError) -> str:
    """Give an error as it travels: message and hint, a line each."""
    return f"{one_line(error.message)}\n{one_line(error.hint)}"[:PEER_TEXT_CHARACTERS_MAX]


def error_from(code: str, text: str) -> QdsError:
    """Make the error that the peer sent; its text is not trusted to be printable or short."""
    message, _, hint = text[:PEER_TEXT_CHARACTERS_MAX].partition("\n")
    kinds = {known.decode("ascii"): kind for kind, known in _WIRE_ERRORS.items()}
    kind: Any = kinds.get(code, QdsError)
    error: QdsError = kind(one_line(message) or "refused without a reason", one_line(hint))
    return error


def wire_error(error: QdsError) -> amp.RemoteAmpError:
    """Make AMP's form of an error, which ends the connection once it is sent."""
    return amp.RemoteAmpError(  # type: ignore[no-untyped-call]
        error.code.encode("ascii"), error_text(error), fatal=True
    )


def internal_error(where: str) -> ProtocolError:
    """Make the error for a fault of our own, whose traceback is in the log."""
    return ProtocolError(f"{where} failed internally", hint="see its log")


def one_line(text: str) -> str:
    """Strip what could break a log line or a terminal."""
    return "".join(c if c.isprintable() else " " for c in text).strip()
