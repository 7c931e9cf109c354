"""Read the server name out of a TLS ClientHello that has only been peeked at.

The rmd master routes an accepted connection by this name (rules.md 17).  The name is a hint: it
proves nothing, and the child that gets the connection authenticates the peer.

Source: RFC 8446 sections 4.1.2 and 5.1 (ClientHello, record layer), RFC 6066 section 3 (SNI).
"""

from __future__ import annotations

import re
from enum import Enum

from qdsmirror.limits import CLIENT_HELLO_BYTES_MAX, GROUPS_MAX

_RECORD_HANDSHAKE = 22
_RECORD_HEADER_BYTES = 5
_RECORD_BYTES_MAX = 1 << 14
_HANDSHAKE_CLIENT_HELLO = 1
_HANDSHAKE_HEADER_BYTES = 4
_EXTENSION_SERVER_NAME = 0
_NAME_TYPE_HOST = 0

_GROUP_NAME = re.compile(r"dsgrp([0-9]{3})\.qdsmirror")


class Peek(Enum):
    """Why there is no server name to give."""

    NEED_MORE = "the ClientHello is not complete yet"
    NOT_TLS = "these bytes do not begin a TLS connection"


class _MalformedError(Exception):
    """A length inside the message points outside of it."""


class _Reader:
    """Fields of a message, front to back; never beyond its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        return self._position < len(self._data)

    def take(self, length: int) -> bytes:
        end = self._position + length
        if end > len(self._data):
            raise _MalformedError
        piece = self._data[self._position : end]
        self._position = end
        return piece

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "big")

    def vector(self, length_bytes: int) -> _Reader:
        return _Reader(self.take(self.number(length_bytes)))

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._position)


def peek_server_name(data: bytes) -> str | Peek:
    """Find the server name in the first bytes of a connection.

    :param data: the bytes received so far; at most ``CLIENT_HELLO_BYTES_MAX`` are looked at.
    :returns: the name as sent, in lower case, or ``""`` where a complete hello has none;
        ``Peek.NEED_MORE`` while the hello is incomplete; ``Peek.NOT_TLS`` as soon as the bytes
        cannot become a ClientHello within the bound.
    """
    data = bytes(data[:CLIENT_HELLO_BYTES_MAX])
    message = _handshake_message(data)
    if message is Peek.NEED_MORE and len(data) >= CLIENT_HELLO_BYTES_MAX:
        return Peek.NOT_TLS
    if isinstance(message, Peek):
        return message
    try:
        return _server_name(_Reader(message))
    except _MalformedError:
        return Peek.NOT_TLS


def _handshake_message(data: bytes) -> bytes | Peek:
    """Join the first handshake message from the records it may be spread over."""
    joined = bytearray()
    position = 0
    while True:
        header = data[position : position + _RECORD_HEADER_BYTES]
        length = int.from_bytes(header[3:5], "big")
        if header[:1] not in (b"", bytes([_RECORD_HANDSHAKE])) or header[1:2] not in (b"", b"\x03"):
            return Peek.NOT_TLS
        if len(header) == _RECORD_HEADER_BYTES and not 0 < length <= _RECORD_BYTES_MAX:
            return Peek.NOT_TLS
        position += _RECORD_HEADER_BYTES
        joined += data[position : position + length]
        if joined and joined[0] != _HANDSHAKE_CLIENT_HELLO:
            return Peek.NOT_TLS
        if len(joined) >= _HANDSHAKE_HEADER_BYTES:
            end = _HANDSHAKE_HEADER_BYTES + int.from_bytes(joined[1:4], "big")
            if end > CLIENT_HELLO_BYTES_MAX:
                return Peek.NOT_TLS
            if len(joined) >= end:
                return bytes(joined[_HANDSHAKE_HEADER_BYTES:end])
        position += length
        if len(header) < _RECORD_HEADER_BYTES or position > len(data):
            return Peek.NEED_MORE


def _server_name(hello: _Reader) -> str:
    """Walk a complete ClientHello to its server_name extension."""
    hello.take(2 + 32)  # legacy_version, random
    hello.vector(1)  # legacy_session_id
    hello.vector(2)  # cipher_suites
    hello.vector(1)  # legacy_compression_methods
    if not hello:
        return ""
    extensions = hello.vector(2)
    while extensions:
        kind = extensions.number(2)
        body = extensions.vector(2)
        if kind != _EXTENSION_SERVER_NAME:
            continue
        names = body.vector(2)
        while names:
            name_type = names.number(1)
            name = names.vector(2).rest()
            if name_type == _NAME_TYPE_HOST:
                return _text(name)
    return ""


def _text(name: bytes) -> str:
    try:
        return name.decode("ascii").lower()
    except UnicodeDecodeError:
        raise _MalformedError from None


def server_name_for(number: int) -> str:
    """Give the server name that asks for a group, e.g. ``dsgrp000.qdsmirror`` for 0.

    :raises ValueError: there is no group of that number.
    """
    if not 0 <= number < GROUPS_MAX:
        raise ValueError(f"group number {number} is not in 0..{GROUPS_MAX - 1}")
    return f"dsgrp{number:03d}.qdsmirror"


def group_hint(server_name: str) -> int | None:
    """Give the number of the group that a server name asks for, or ``None``."""
    match = _GROUP_NAME.fullmatch(server_name.lower())
    if match is None or int(match[1]) >= GROUPS_MAX:
        return None
    return int(match[1])
