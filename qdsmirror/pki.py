"""The built-in certificate authority, host certificates and group secrets.

Certificates are X.509 v3 (RFC 5280) with ECDSA P-256 keys; a host's bears its name as a DNS
subjectAltName and serves both as client and as server, since either end of a link checks the
other.  Files are written whole or not at all, keys and secrets with mode 0600.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from qdsmirror.errors import ConfigError
from qdsmirror.limits import CA_CERTIFICATE_DAYS, HOST_CERTIFICATE_DAYS, SECRET_BYTES
from qdsmirror.paths import group_name

#: A certificate is valid from this much before it was made: clocks differ.
_CLOCK_SKEW = timedelta(hours=1)
_COMMON_NAME_CHARS_MAX = 64

TOKEN = "metrics.token"
CERTIFICATE, KEY, CA, CA_KEY = "host.pem", "host.key", "ca.pem", "ca.key"


@dataclass(frozen=True)
class Authority:
    """A certificate authority with its key.

    :ivar certificate: its own certificate.
    """

    certificate: x509.Certificate
    _key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, days: int = CA_CERTIFICATE_DAYS, now: datetime | None = None) -> Authority:
        """Make a new authority.

        :param days: how long its certificate is valid.
        :param now: when; default: now.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"qdsmirror CA {secrets.token_hex(4)}")
        builder = _builder(name, name, key.public_key(), days, now)
        builder = builder.add_extension(x509.BasicConstraints(True, 0), critical=True)
        builder = builder.add_extension(_key_usage(authority=True), critical=True)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """Load ``ca.pem`` and ``ca.key`` of a directory.

        :raises ConfigError: one is missing or unusable, they do not belong together, or the
            certificate has expired.
        """
        path = directory / CA_KEY
        try:
            key = serialization.load_pem_private_key(_read(path), password=None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: not an unencrypted PEM private key") from error
        certificate = read_certificate(directory / CA)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or (
            key.public_key() != certificate.public_key()
        ):
            raise ConfigError(f"{path}: not the key of {directory / CA}")
        end = certificate.not_valid_after_utc
        if end <= datetime.now(UTC):
            raise ConfigError(
                f"{directory / CA}: expired at {end:%Y-%m-%d %H:%M} UTC",
                "make a new authority in another directory",
            )
        return cls(certificate, key)

    def save(self, directory: Path) -> None:
        """Write ``ca.pem`` and ``ca.key``; existing ones are never replaced.

        :raises ConfigError: one exists.
        """
        write_file(directory / CA_KEY, _key_pem(self._key), 0o600)
        write_file(directory / CA, self.pem(), 0o644)

    def pem(self) -> bytes:
        """Give the authority's certificate in PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self, name: str, days: int = HOST_CERTIFICATE_DAYS, now: datetime | None = None
    ) -> tuple[bytes, bytes]:
        """Make a host's certificate and its key.

        :param name: the host's name as in its ``qds.cfg``.
        :param days: how long it is valid, at most as long as the authority's.
        :returns: certificate and private key, both PEM.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name) if len(name) <= _COMMON_NAME_CHARS_MAX else x509.Name([])
        builder = _builder(
            subject,
            self.certificate.subject,
            key.public_key(),
            days,
            now,
            self.certificate.not_valid_after_utc,
        )
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        alternative = x509.SubjectAlternativeName([x509.DNSName(name)])
        for extension, critical in (
            (x509.BasicConstraints(False, None), True),
            (_key_usage(authority=False), True),
            (x509.ExtendedKeyUsage(usages), False),
            # RFC 5280, 4.2.1.6: critical where the subject is empty.
            (alternative, not list(subject)),
            (authority, False),
        ):
            builder = builder.add_extension(extension, critical=critical)
        certificate = builder.sign(self._key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    days: int,
    now: datetime | None,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    begin = now or datetime.now(UTC)
    end = begin + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - _CLOCK_SKEW)
        .not_valid_after(min(end, latest) if latest else end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def new_secret() -> bytes:
    """Make a group's secret as its file holds it: 64 hexadecimal digits and a newline."""
    return secrets.token_hex(SECRET_BYTES).encode("ascii") + b"\n"


# -- all that a pair of hosts needs ----------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What :func:`make_hosts` did.

    :ivar written: the files that are new or replaced; ``kept``: those that stood there already.
    :ivar replaced: those of ``written`` that had been there before.
    """

    written: tuple[Path, ...]
    kept: tuple[Path, ...]
    replaced: tuple[Path, ...]


def make_hosts(
    out: Path,
    names: Sequence[str],
    groups: Iterable[int],
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Made:
    """Make certificates and secrets of hosts that mirror to each other, ready to be copied.

    ``out/ca.pem`` and ``out/ca.key`` are made unless they are there; ``out/NAME/`` gets
    ``host.pem``, ``host.key``, ``ca.pem`` and a ``dsgrpNNN.secret`` for each group, the same one
    for all the hosts; and a ``metrics.token`` of its own.  What exists is kept, so that a host can
    be added later.

    :param names: the hosts' names as in their ``qds.cfg``.
    :param groups: numbers of the groups that these hosts share.
    :param overwrite: renew the hosts' certificates, keys and secrets; the authority stays.
    :param dry_run: only find out what would be written, replaced and kept.
    :raises ConfigError: half of something exists, or hosts have different secrets of a group.
    """
    work = _Work(overwrite, dry_run)
    work.directory(out)
    if (out / CA).exists() or (out / CA_KEY).exists():
        authority = Authority.load(out)
        work.kept += [out / CA, out / CA_KEY]
    else:
        authority = Authority.create()
        if not dry_run:
            authority.save(out)
        work.written += [out / CA, out / CA_KEY]
    for name in names:
        work.directory(out / name)
        work.certificate(authority, out / name, name)
        work.token(out / name / TOKEN)
    for number in groups:
        work.secret([out / name / f"{group_name(number)}.secret" for name in names])
    return Made(tuple(work.written), tuple(work.kept), tuple(work.replaced))


class _Work:
    """Writes or keeps files, or does not even that, and remembers which."""

    def __init__(self, overwrite: bool, dry_run: bool) -> None:
        self._overwrite = overwrite
        self._dry_run = dry_run
        self.replaced: list[Path] = []
        self.written: list[Path] = []
        self.kept: list[Path] = []

    def directory(self, path: Path) -> None:
        if not self._dry_run:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def certificate(self, authority: Authority, directory: Path, name: str) -> None:
        pair = [directory / CERTIFICATE, directory / KEY]
        there = [path for path in pair if path.exists()]
        if len(there) == 1 and not self._overwrite:
            missing = next(path for path in pair if path not in there)
            raise ConfigError(f"{there[0]} is there, but {missing.name} is not", _OVERWRITE)
        if there and not self._overwrite:
            self.kept += pair
        else:
            certificate, key = authority.issue(name)
            self._write(directory / KEY, key, 0o600)
            self._write(directory / CERTIFICATE, certificate, 0o644)
        if (directory / CA).exists() and (directory / CA).read_bytes() == authority.pem():
            self.kept.append(directory / CA)
        else:
            self._write(directory / CA, authority.pem(), 0o644)

    def token(self, path: Path) -> None:
        if path.exists() and not self._overwrite:
            self.kept.append(path)
        else:
            self._write(path, new_secret(), 0o600)

    def secret(self, files: Sequence[Path]) -> None:
        there = [path for path in files if path.exists()]
        known = {_read(path) for path in there}
        if self._overwrite or not known:
            content = new_secret()
        elif len(known) == 1 and len(there) == len(files):
            self.kept += there
            return
        elif len(known) == 1:
            absent = next(path for path in files if path not in there)
            raise ConfigError(
                f"{there[0]} is there, but {absent} is not: that group may belong to other hosts",
                "remove it, or " + _OVERWRITE,
            )
        else:
            raise ConfigError(f"{there[0]} and {there[1]} differ", _OVERWRITE)
        for path in files:
            self._write(path, content, 0o600)

    def _write(self, path: Path, content: bytes, mode: int) -> None:
        if os.path.lexists(path):
            if not self._overwrite:
                raise ConfigError(f"{path} exists and is not replaced", _OVERWRITE)
            self.replaced.append(path)
        if not self._dry_run:
            write_file(path, content, mode, overwrite=self._overwrite)
        self.written.append(path)


_OVERWRITE = "use --overwrite to replace them"


# -- files -----------------------------------------------------------------------------------------


def write_file(path: Path, content: bytes, mode: int, *, overwrite: bool = False) -> None:
    """Write a file durably, whole or not at all; it never has another mode than ``mode``.

    :param overwrite: whether an existing file may be replaced.
    :raises ConfigError: it exists and may not be replaced.
    :raises OSError: it cannot be written.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        if overwrite:
            os.replace(temporary, path)
        else:
            # Unlike a rename, a link fails where the name is taken.
            os.link(temporary, path)
            os.unlink(temporary)
    except FileExistsError:
        os.unlink(temporary)
        raise ConfigError(f"{path} exists and is not replaced", _OVERWRITE) from None
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "make it with qdsconfigtool pki") from error


# -- reading ---------------------------------------------------------------------------------------


def read_certificates(path: Path) -> list[x509.Certificate]:
    """Read the certificates of a PEM file; the first is the host's own (or an authority's).

    :raises ConfigError: it cannot be read or holds none.
    """
    content = _read(path)
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise ConfigError(
            f"{path}: no certificate in PEM", "make it with qdsconfigtool pki"
        ) from error


def read_certificate(path: Path) -> x509.Certificate:
    """Read the first certificate of a PEM file.

    :raises ConfigError: it cannot be read or holds none.
    """
    return read_certificates(path)[0]


def certificate_names(certificate: x509.Certificate) -> list[str]:
    """Give the DNS names that a certificate bears, in lower case."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return []
    return [name.lower() for name in extension.value.get_values_for_type(x509.DNSName)]
