"""The built-in authority: what it issues, what it writes, what it never replaces."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store
from twisted.trial.unittest import TestCase

from qdsmirror import limits, pki
from qdsmirror.config import load_secret
from qdsmirror.errors import ConfigError
from qdsmirror.paths import Paths

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


class DirectoryTestCase(TestCase):
    def setUp(self) -> None:
        self.out = Path(tempfile.mkdtemp(dir="/tmp"))
        self.addCleanup(shutil.rmtree, self.out)

    def snapshot(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.out)): path.read_bytes()
            for path in self.out.rglob("*")
            if path.is_file()
        }

    def mode(self, path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)


class AuthorityTests(TestCase):
    def setUp(self) -> None:
        self.authority = pki.Authority.create(now=NOW)
        pem, self.key = self.authority.issue("db1.example.com", days=100, now=NOW)
        self.certificate = x509.load_pem_x509_certificate(pem)

    def test_a_standard_verifier_takes_both_uses(self) -> None:
        builder = PolicyBuilder().store(Store([self.authority.certificate])).time(NOW)
        server = builder.build_server_verifier(x509.DNSName("db1.example.com"))
        server.verify(self.certificate, [])
        client = builder.build_client_verifier().verify(self.certificate, [])
        assert client.subjects is not None
        self.assertEqual([name.value for name in client.subjects], ["db1.example.com"])
        other = builder.build_server_verifier(x509.DNSName("db2.example.com"))
        self.assertRaises(x509.verification.VerificationError, other.verify, self.certificate, [])

    def test_another_authority_is_not_taken(self) -> None:
        store = Store([pki.Authority.create(now=NOW).certificate])
        verifier = PolicyBuilder().store(store).time(NOW).build_client_verifier()
        self.assertRaises(
            x509.verification.VerificationError, verifier.verify, self.certificate, []
        )

    def test_key(self) -> None:
        key = serialization.load_pem_private_key(self.key, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self.assertEqual(key.curve.name, "secp256r1")
        self.assertEqual(key.public_key(), self.certificate.public_key())

    def test_validity(self) -> None:
        self.assertEqual(self.certificate.not_valid_before_utc, NOW - timedelta(hours=1))
        self.assertEqual(self.certificate.not_valid_after_utc, NOW + timedelta(days=100))

    def test_a_host_does_not_outlive_its_authority(self) -> None:
        authority = pki.Authority.create(days=10, now=NOW)
        certificate = x509.load_pem_x509_certificate(authority.issue("a", 100, NOW)[0])
        self.assertEqual(certificate.not_valid_after_utc, NOW + timedelta(days=10))

    def test_a_host_cannot_sign(self) -> None:
        constraints = self.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        self.assertEqual((constraints.critical, constraints.value.ca), (True, False))

    def test_long_name(self) -> None:
        name = ".".join(["a" * 60] * 4)
        certificate = x509.load_pem_x509_certificate(self.authority.issue(name)[0])
        self.assertEqual(pki.certificate_names(certificate), [name])
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        self.assertTrue(extension.critical)

    def test_authorities_and_serials_differ(self) -> None:
        other = pki.Authority.create()
        self.assertNotEqual(other.certificate.subject, self.authority.certificate.subject)
        again = x509.load_pem_x509_certificate(self.authority.issue("db1.example.com")[0])
        self.assertNotEqual(again.serial_number, self.certificate.serial_number)


class WriteTests(DirectoryTestCase):
    def test_mode_whatever_the_umask(self) -> None:
        for umask in (0o000, 0o077, 0o277):
            self.addCleanup(os.umask, os.umask(umask))
            for mode in (0o600, 0o644):
                path = self.out / f"{umask:o}{mode:o}"
                pki.write_file(path, b"x", mode)
                self.assertEqual((self.mode(path), path.read_bytes()), (mode, b"x"))

    def test_existing_is_kept_unless_asked(self) -> None:
        path = self.out / "file"
        pki.write_file(path, b"one", 0o600)
        self.assertRaises(ConfigError, pki.write_file, path, b"two", 0o600)
        self.assertEqual(self.snapshot(), {"file": b"one"})
        pki.write_file(path, b"two", 0o600, overwrite=True)
        self.assertEqual(self.snapshot(), {"file": b"two"})

    def test_a_dangling_link_is_not_followed(self) -> None:
        (self.out / "link").symlink_to(self.out / "elsewhere")
        self.assertRaises(ConfigError, pki.write_file, self.out / "link", b"x", 0o600)
        self.assertFalse((self.out / "elsewhere").exists())

    def test_failure_leaves_nothing(self) -> None:
        def fail(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        self.patch(pki.os, "fsync", fail)
        self.assertRaises(OSError, pki.write_file, self.out / "file", b"x", 0o600)
        self.assertEqual(os.listdir(self.out), [])


class HostsTests(DirectoryTestCase):
    def test_a_pair(self) -> None:
        made = pki.make_hosts(self.out, ["db1", "dr1"], range(2))
        names = {"ca.pem", "ca.key"}
        for host in ("db1", "dr1"):
            for file in ("host.pem", "host.key", "ca.pem", "dsgrp000.secret", "dsgrp001.secret"):
                names.add(f"{host}/{file}")
            names.add(f"{host}/metrics.token")
        files = self.snapshot()
        self.assertEqual(set(files), names)
        self.assertEqual({str(p.relative_to(self.out)) for p in made.written}, names)
        self.assertEqual(made.kept, ())
        self.assertEqual(files["db1/dsgrp000.secret"], files["dr1/dsgrp000.secret"])
        self.assertNotEqual(files["db1/dsgrp000.secret"], files["db1/dsgrp001.secret"])
        self.assertNotEqual(files["db1/host.key"], files["dr1/host.key"])
        self.assertNotEqual(files["db1/metrics.token"], files["dr1/metrics.token"])
        self.assertEqual(files["db1/ca.pem"], files["ca.pem"])
        for path in self.out.rglob("*"):
            private = path.suffix in (".key", ".secret", ".token")
            wanted = 0o700 if path.is_dir() else 0o600 if private else 0o644
            self.assertEqual(self.mode(path), wanted, path)
        certificate = pki.read_certificate(self.out / "dr1" / "host.pem")
        self.assertEqual(pki.certificate_names(certificate), ["dr1"])

    def test_the_secret_is_one_that_config_takes(self) -> None:
        pki.make_hosts(self.out, ["a", "b"], [3])
        paths = Paths.of(self.out / "root")
        paths.etc.mkdir(parents=True)
        shutil.copy(self.out / "a" / "dsgrp003.secret", paths.etc)
        self.assertEqual(len(load_secret(paths, 3)), 32)

    def test_again_keeps_everything(self) -> None:
        pki.make_hosts(self.out, ["a", "b"], [0])
        before = self.snapshot()
        made = pki.make_hosts(self.out, ["a", "b"], [0])
        self.assertEqual(self.snapshot(), before)
        self.assertEqual((made.written, len(made.kept)), ((), len(before)))

    def test_another_host_and_group_later(self) -> None:
        pki.make_hosts(self.out, ["a", "b"], [0])
        before = self.snapshot()
        pki.make_hosts(self.out, ["a", "c"], [1])
        after = self.snapshot()
        self.assertEqual({name: after[name] for name in before}, before)
        new = {"a/dsgrp001.secret", "c/host.pem", "c/host.key", "c/ca.pem", "c/dsgrp001.secret"}
        new.add("c/metrics.token")
        self.assertEqual(set(after) - set(before), new)

    def test_overwrite_renews_hosts_not_the_authority(self) -> None:
        pki.make_hosts(self.out, ["a", "b"], [0])
        before = self.snapshot()
        pki.make_hosts(self.out, ["a", "b"], [0], overwrite=True)
        after = self.snapshot()
        changed = {name for name in before if before[name] != after[name]}
        kept = {"ca.pem", "ca.key", "a/ca.pem", "b/ca.pem"}
        self.assertEqual(changed, set(before) - kept)
        self.assertEqual(after["a/dsgrp000.secret"], after["b/dsgrp000.secret"])

    def test_halves_are_refused(self) -> None:
        for lost, part in (
            ("a/host.key", "host.key is not"),
            ("a/host.pem", "host.pem is not"),
            ("b/dsgrp000.secret", "b/dsgrp000.secret is not"),
            ("ca.key", "ca.key: No such file"),
            ("ca.pem", "ca.pem: No such file"),
        ):
            pki.make_hosts(self.out, ["a", "b"], [0])
            saved = (self.out / lost).read_bytes()
            (self.out / lost).unlink()
            error = self.assertRaises(ConfigError, pki.make_hosts, self.out, ["a", "b"], [0])
            self.assertIn(part, error.message)
            (self.out / lost).write_bytes(saved)

    def test_different_secrets_are_refused(self) -> None:
        pki.make_hosts(self.out, ["a", "b"], [0])
        (self.out / "b" / "dsgrp000.secret").write_bytes(pki.new_secret())
        error = self.assertRaises(ConfigError, pki.make_hosts, self.out, ["a", "b"], [0])
        self.assertIn("differ", error.message)

    def test_an_unusable_authority_is_refused(self) -> None:
        other = pki.Authority.create()
        for create, part in (
            (lambda: pki.Authority.create(days=1, now=NOW - timedelta(days=9)), "expired"),
            (lambda: pki.Authority(other.certificate, pki.Authority.create()._key), "not the key"),
        ):
            directory = Path(tempfile.mkdtemp(dir=self.out))
            create().save(directory)
            error = self.assertRaises(ConfigError, pki.Authority.load, directory)
            self.assertIn(part, error.message)
        (self.out / "ca.key").write_text("junk")
        self.assertRaises(ConfigError, pki.Authority.load, self.out)


class ReadTests(DirectoryTestCase):
    def test_expiry(self) -> None:
        path = self.out / "host.pem"
        path.write_bytes(pki.Authority.create(now=NOW).issue("a", 30, NOW)[0])
        self.assertEqual(pki.read_certificate(path).not_valid_after_utc, NOW + timedelta(days=30))

    def test_default_validity(self) -> None:
        pki.make_hosts(self.out, ["a"], [])
        made = pki.read_certificate(self.out / "a" / "host.pem")
        left = made.not_valid_after_utc - datetime.now(UTC)
        self.assertEqual(left.days, limits.HOST_CERTIFICATE_DAYS - 1)

    def test_refusals(self) -> None:
        path = self.out / "host.pem"
        self.assertRaises(ConfigError, pki.read_certificate, path)
        for content in (
            b"",
            b"junk",
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ):
            path.write_bytes(content)
            self.assertRaises(ConfigError, pki.read_certificate, path)

    def test_no_names(self) -> None:
        self.assertEqual(pki.certificate_names(pki.Authority.create().certificate), [])
