"""No secret comes through; texts without one are left as they are."""

from __future__ import annotations

from hypothesis import assume, given
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
            assume(part not in REMOVED)
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
            (b"exec /usr/bin/page --token hunter22", b"hunter22"),
            (b"--secret --password hunter22", b"hunter22"),
            (b"openssl rsa -pass 'hun ter22'", b"ter22"),
            (b"curl --api-key=hunter22 x", b"hunter22"),
            (b'["page", "--key", "hunter22"]', b"hunter22"),
            (b"curl -u admin:hunter22", b"hunter22"),
            (b"curl --user=admin:hun,ter22 x", b"ter22"),
            (b"curl -uadmin:hunter22 x", b"hunter22"),
            (b"Authorization: Basic YWRtaW46aHVudGVyMjI=", b"YWRtaW46aHVudGVyMjI"),
            (b"MIGHAgEA\nc2hvcnQ=\n-----END EC PRIVATE KEY-----\n", b"c2hvcnQ="),
            (KEY + b"MIGHAgEA\n-----END PRIVATE KEY-----\n", b"MIGHAgEA"),
            (b"password = hunter,tail22", b"tail22"),
            (b"password = hunter;tail22\n", b"tail22"),
            (b'password = "hun\\"tail22"', b"tail22"),
            (b'{"message": "password = \\"hun tail22\\""}', b"tail22"),
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
            b"see journalctl -u qdsrmd: it says why",
            b"X509v3 Basic Constraints; basic authentication",
            b"qdsconfigtool pki --overwrite --out DIR db1 dr1",
        ):
            self.assertEqual(redact(text, []), text)

    def test_what_stands_around_it_stays(self) -> None:
        for text, left in (
            (
                b'{"a": "exec /page --token hunter22", "b": 1}',
                b'{"a": "exec /page --token [removed]", "b": 1}',
            ),
            (b'{"token": "hunter22",\n"b": 1}', b'{"token": [removed],\n"b": 1}'),
            (b"exec '/page --token=hunter22' and on", b"exec '/page --token=[removed]' and on"),
            (b"curl -u admin:hunter22 url", b"curl -u admin:[removed] url"),
        ):
            self.assertEqual(redact(text, []), left)
