from __future__ import annotations

import ssl

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.clienthello import Peek, group_hint, peek_server_name, server_name_for
from qdsmirror.limits import CLIENT_HELLO_BYTES_MAX, GROUPS_MAX


def real_hello(server_name: str | None) -> bytes:
    """What OpenSSL sends."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=server_name)
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


def vector(length_bytes: int, body: bytes) -> bytes:
    return len(body).to_bytes(length_bytes, "big") + body


def extension(kind: int, body: bytes) -> bytes:
    return kind.to_bytes(2, "big") + vector(2, body)


def sni(name: bytes, name_type: int = 0) -> bytes:
    return extension(0, vector(2, bytes([name_type]) + vector(2, name)))


def hello(extensions: bytes | None) -> bytes:
    """A handshake message of one ClientHello, without records."""
    body = b"\x03\x03" + bytes(32) + vector(1, b"s") + vector(2, b"\x13\x01") + vector(1, b"\0")
    if extensions is not None:
        body += vector(2, extensions)
    return b"\x01" + vector(3, body)


def records(message: bytes, piece: int = 16384) -> bytes:
    return b"".join(
        b"\x16\x03\x01" + vector(2, message[start : start + piece])
        for start in range(0, len(message), piece)
    )


HELLO = real_hello("dsgrp007.qdsmirror")


class PeekTests(SynchronousTestCase):
    def test_openssl(self) -> None:
        self.assertEqual(peek_server_name(HELLO), "dsgrp007.qdsmirror")

    def test_openssl_without_a_name(self) -> None:
        self.assertEqual(peek_server_name(real_hello(None)), "")

    def test_every_prefix_needs_more(self) -> None:
        for length in range(len(HELLO)):
            self.assertIs(peek_server_name(HELLO[:length]), Peek.NEED_MORE, length)

    def test_what_follows_does_not_matter(self) -> None:
        self.assertEqual(peek_server_name(HELLO + b"anything"), "dsgrp007.qdsmirror")

    def test_no_extensions_at_all(self) -> None:
        self.assertEqual(peek_server_name(records(hello(None))), "")

    def test_other_extensions_before(self) -> None:
        message = hello(extension(43, b"\x02\x03\x04") + sni(b"A.Example"))
        self.assertEqual(peek_server_name(records(message)), "a.example")

    def test_other_name_types_are_skipped(self) -> None:
        names = b"\x07" + vector(2, b"x") + b"\x00" + vector(2, b"y")
        self.assertEqual(peek_server_name(records(hello(extension(0, vector(2, names))))), "y")

    def test_spread_over_records(self) -> None:
        for piece in (1, 3, 50):
            data = records(hello(sni(b"dsgrp000.qdsmirror")), piece)
            self.assertEqual(peek_server_name(data), "dsgrp000.qdsmirror")
            self.assertIs(peek_server_name(data[:-1]), Peek.NEED_MORE)

    def test_not_tls(self) -> None:
        for data in (
            b"GET / HTTP/1.1\r\n",
            b"\x16\x02",  # not version 3.x
            b"\x16\x03\x01\x00\x00",  # an empty record
            b"\x16\x03\x01\x40\x01",  # a record above 2^14
            b"\x16\x03\x01\x00\x04\x02\x00\x00\x01",  # a ServerHello
            b"\x16\x03\x01\x00\x04\x01\xff\xff\xff",  # 16 MiB of ClientHello
            records(hello(sni(b"\xff\xfe"))),
            records(hello(b"\x00\x00\x00\xff")),  # a length that points outside
            records(b"\x01" + vector(3, b"\x03\x03")),  # ends within
        ):
            self.assertIs(peek_server_name(data), Peek.NOT_TLS, data)

    def test_nothing_yet(self) -> None:
        self.assertIs(peek_server_name(b""), Peek.NEED_MORE)

    def test_bound(self) -> None:
        message = hello(extension(21, bytes(CLIENT_HELLO_BYTES_MAX - 100)))
        tiny = records(message, 1)
        self.assertIs(peek_server_name(tiny), Peek.NOT_TLS)
        self.assertIs(peek_server_name(tiny[:1000]), Peek.NEED_MORE)

    @given(st.binary(max_size=300))
    def test_any_bytes(self, data: bytes) -> None:
        self.assertIsInstance(peek_server_name(data), str | Peek)

    @given(st.integers(0, len(HELLO) - 1), st.integers(1, 255))
    def test_any_flipped_byte(self, position: int, flip: int) -> None:
        data = bytearray(HELLO)
        data[position] ^= flip
        self.assertIsInstance(peek_server_name(bytes(data)), str | Peek)

    @given(st.binary(max_size=400))
    def test_any_extensions(self, data: bytes) -> None:
        self.assertNotEqual(peek_server_name(records(hello(data))), Peek.NEED_MORE)

    @given(st.binary(min_size=1, max_size=64), st.integers(0, 400))
    def test_a_verdict_is_final(self, data: bytes, cut: int) -> None:
        # Once decided, later bytes change nothing: the master may route on the first verdict.
        first = peek_server_name((HELLO + data)[:cut])
        if first is not Peek.NEED_MORE:
            self.assertEqual(peek_server_name(HELLO + data), first)


class NameTests(SynchronousTestCase):
    def test_round_trip(self) -> None:
        for number in (0, 7, GROUPS_MAX - 1):
            self.assertEqual(group_hint(server_name_for(number)), number)
        self.assertEqual(server_name_for(0), "dsgrp000.qdsmirror")

    def test_no_such_group(self) -> None:
        for number in (-1, GROUPS_MAX):
            self.assertRaises(ValueError, server_name_for, number)

    def test_other_names(self) -> None:
        for name in (
            "",
            "dsgrp0.qdsmirror",
            "dsgrp512.qdsmirror",
            "dsgrp999.qdsmirror",
            "dsgrp0000.qdsmirror",
            "dsgrp000.qdsmirror.example.com",
            "xdsgrp000.qdsmirror",
            "dsgrp000-qdsmirror",
            "dsgrp٠٠٠.qdsmirror",
            "dsgrp000.qdsmirror\n",
        ):
            self.assertIsNone(group_hint(name), name)

    def test_case_does_not_matter(self) -> None:
        self.assertEqual(group_hint("DSGRP003.QDSmirror"), 3)
