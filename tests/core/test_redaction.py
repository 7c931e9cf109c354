"""No secret comes through; texts without one are left as they are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.redaction import REMOVED, parts_of, redact

SECRET = b"0123456789abcdef" * 4
KEY = (
    b"-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg\n"
    b"c2hvcnQ=\n-----END PRIVATE KEY-----\n"
)


class KnownTests(SynchronousTestCase):
    def test_parts(self) -> None:
        self.assertEqual(parts_of(SECRET + b"\n"), [SECRET])
        self.assertEqual(
            parts_of(KEY), [b"MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg", b"c2hvcnQ="]
        )
        self.assertEqual(parts_of(b"\nabc\n"), [])

    @given(st.binary(max_size=60), st.binary(min_size=8, max_size=40), st.binary(max_size=60))
    def test_wherever_it_stands(self, before: bytes, secret: bytes, after: bytes) -> None:
        for part in parts_of(secret):
            self.assertNotIn(part, redact(before + secret + after, parts_of(secret)))

    def test_in_another_case(self) -> None:
        self.assertNotIn(SECRET.upper(), redact(b"x" + SECRET.upper(), [SECRET]))


class UnknownTests(SynchronousTestCase):
    def test_by_what_it_looks_like(self) -> None:
        for text, secret in (
            (b"secret of the group: " + b"ab" * 32, b"ab" * 32),
            (b"log: " + KEY + b"more", b"MIGHAgEA"),
            (b"-----BEGIN EC PRIVATE KEY-----\nMIGHAgEA", b"MIGHAgEA"),
            (b"Authorization: Bearer abc123def456", b"abc123def456"),
            (b"https://admin:hunter22@mail.example/", b"hunter22"),
            (b"password = hunter22", b"hunter22"),
            (b'"passphrase": "hun ter22"', b"ter22"),
            (b"API_KEY=hunter22;", b"hunter22"),
            (b'exec "/bin/page --token=hunter22"', b"hunter22"),
            (b"api-token: 'hunter22'", b"hunter22"),
        ):
            found = redact(text, [])
            self.assertNotIn(secret, found, text)
            self.assertIn(REMOVED, found)

    def test_what_is_no_secret_stays(self) -> None:
        for text in (
            b"generation c750ac01ef5a446b8cb87ec0687bfce3",
            b"metrics_token_file = /etc/opt/QLIXds/token",
            b"dsgrp000: the primary did not prove the secret of dsgrp000",
            b"key = /etc/opt/QLIXds/host.key",
            b"nbd+unix:///qds0?socket=/run/qdsmirror/dsgrp000.nbd",
            b"port 575, 10.0.0.1>10.0.0.2",
        ):
            self.assertEqual(redact(text, []), text)
