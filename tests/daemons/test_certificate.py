"""What the daemons say of certificates that are about to expire."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, LogPublisher, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.daemons import certificate
from qdsmirror.errors import ConfigError
from qdsmirror.limits import CERTIFICATE_LOOK_SECONDS, DAY_SECONDS
from tests.net.tlsworld import PRIMARY, authority, host


class HostCertificateTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.events: list[LogEvent] = []
        self.patch(certificate._log, "observer", LogPublisher(self.events.append))
        self.clock = Clock()
        self.files: Any = host(self.mktemp(), PRIMARY)
        # Of the CA only what a test puts there.
        self.files.ca.write_text("")
        self.now = datetime.datetime.now(datetime.UTC).timestamp()
        self.expiry = certificate.HostCertificate(
            self.clock, self.files, lambda: self.now + self.clock.seconds()
        )

    def certify(self, days: float, path: Path | None = None) -> None:
        """Put a certificate in place that expires in so many days."""
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        leaf = authority("ours").issue_cert(PRIMARY, not_after=end)
        (path or self.files.certificate).write_bytes(leaf.cert_chain_pems[0].bytes())

    def told(self) -> list[tuple[LogLevel, str]]:
        found = [(event["log_level"], formatEvent(event)) for event in self.events]
        self.events.clear()
        return found

    def test_how_long_before(self) -> None:
        for days, level, words in (
            (31, None, ""),
            (29.9, LogLevel.warn, "expires in 30 days"),
            (7.1, LogLevel.warn, "expires in 7 days"),
            (6.9, LogLevel.error, "expires in 7 days"),
            (-0.1, LogLevel.error, "has expired"),
        ):
            self.certify(days)
            self.expiry.begin()
            told = self.told()
            if level is None:
                self.assertEqual(told, [])
                continue
            ((found, text),) = told
            self.assertIs(found, level, days)
            self.assertIn(f"the certificate of {PRIMARY} {words}; renew it", text)
            self.assertIn(str(self.files.certificate), text)

    def test_once_a_day(self) -> None:
        self.certify(32)
        self.expiry.begin()
        levels = []
        for _ in range(33):
            self.clock.advance(CERTIFICATE_LOOK_SECONDS)
            levels.append([level for level, _ in self.told()])
        self.assertEqual(levels[0], [])
        self.assertEqual(levels.count([LogLevel.warn]), 23)
        self.assertEqual(levels[-1], [LogLevel.error])
        self.expiry.end()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_the_authoritys_own(self) -> None:
        self.certify(100)
        self.certify(3, self.files.ca)
        self.expiry.begin()
        ((level, text),) = self.told()
        self.assertIs(level, LogLevel.error)
        self.assertIn(str(self.files.ca), text)

    def test_an_old_authority_beside_its_successor(self) -> None:
        self.certify(100)
        self.certify(3, self.files.ca)
        old = self.files.ca.read_bytes()
        self.certify(20, self.files.ca)
        young = self.files.ca.read_bytes()
        self.files.ca.write_bytes(old + young)
        self.expiry.begin()
        ((_, text),) = self.told()
        self.assertIn("; add its successor to the file", text)
        self.certify(3000, self.files.ca)
        self.files.ca.write_bytes(old + self.files.ca.read_bytes())
        self.expiry.begin()
        ((level, text),) = self.told()
        self.assertIs(level, LogLevel.error)
        self.assertIn("; its successor is in the file: renew what it has issued, and remove", text)

    def test_files_that_are_not_there(self) -> None:
        self.files.certificate.unlink()
        self.expiry.begin()
        self.assertEqual(self.told(), [])
        self.assertEqual(CERTIFICATE_LOOK_SECONDS, DAY_SECONDS)

    def test_new_ones(self) -> None:
        good = host(self.mktemp(), PRIMARY)
        self.assertFalse(self.expiry.renew(self.files))
        self.files.ca.write_bytes(authority("ours").cert_pem.bytes())
        self.certify(20)
        error = self.assertRaises(ConfigError, self.expiry.renew, self.files)
        self.assertIn("not the key of the certificate", error.message)
        # It is refused as long as it is so.
        self.assertRaises(ConfigError, self.expiry.renew, self.files)
        self.assertTrue(self.expiry.renew(good))
        self.assertFalse(self.expiry.renew(good))
        self.assertEqual(self.told(), [])
