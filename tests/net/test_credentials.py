"""What a process keeps of its host's certificate, key and CA."""

from __future__ import annotations

import dataclasses

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.errors import ConfigError
from qdsmirror.net.credentials import Credentials, KeptCredentials
from tests.net.tlsworld import PRIMARY, authority, host, issue


class KeptCredentialsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.files = host(self.mktemp(), PRIMARY)
        self.kept = KeptCredentials()

    def serial(self) -> int:
        return self.kept.of(self.files).chain[0].serial_number

    def renew(self, *parts: str) -> int:
        """Put a new certificate, its key, or both in place; give its serial number."""
        leaf = authority("ours").issue_cert(PRIMARY)
        if "certificate" in parts:
            self.files.certificate.write_bytes(leaf.cert_chain_pems[0].bytes())
        if "key" in parts:
            self.files.key.write_bytes(leaf.private_key_pem.bytes())
        return Credentials.load(self.files).chain[0].serial_number if len(parts) == 2 else 0

    def test_files_count_when_they_are_reloaded(self) -> None:
        first = self.serial()
        second = self.renew("certificate", "key")
        self.assertEqual(self.serial(), first)
        self.kept.reload(self.files)
        self.assertEqual(self.serial(), second)

    def test_what_is_no_pair_changes_nothing(self) -> None:
        first = self.serial()
        for part in ("certificate", "key"):
            self.renew(part)
            error = self.assertRaises(ConfigError, self.kept.reload, self.files)
            self.assertIn("not the key of the certificate", error.message)
            self.assertEqual(self.serial(), first)
        self.files.key.chmod(0o644)
        self.assertRaises(ConfigError, self.kept.reload, self.files)
        self.assertEqual(self.serial(), first)

    def test_files_that_were_never_good_are_tried_again(self) -> None:
        self.files.ca.write_text("nothing")
        self.assertRaises(ConfigError, self.kept.of, self.files)
        self.files.ca.write_bytes(authority("ours").cert_pem.bytes())
        self.assertEqual(self.kept.of(self.files).name, PRIMARY)

    def test_other_files_of_the_same_host(self) -> None:
        self.serial()
        other = host(self.mktemp(), PRIMARY, issue(PRIMARY, "theirs"))
        self.kept.reload(other)
        self.assertEqual(self.serial(), Credentials.load(other).chain[0].serial_number)

    def test_the_key_is_in_no_text(self) -> None:
        leaf = issue(PRIMARY)
        files = dataclasses.replace(self.files, key=self.files.certificate)
        error = self.assertRaises(ConfigError, Credentials.load, files)
        self.assertNotIn(leaf.private_key_pem.bytes().decode()[40:80], error.message)
        self.assertNotIn("PRIVATE", repr(self.kept.of(self.files)))
