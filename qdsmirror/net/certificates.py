"""The certificate, key and CA files that ``qds.cfg`` names, and certificates in words."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Protocol

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from service_identity import CertificateError, VerificationError
from service_identity.cryptography import extract_patterns
from service_identity.hazmat import DNS_ID, verify_service_identity
from twisted.logger import Logger

from qdsmirror.errors import ConfigError
from qdsmirror.limits import CERTIFICATE_FILE_BYTES_MAX

_log = Logger()

HINT_PKI = "see `qdsconfigtool check` on both hosts; `qdsconfigtool pki` makes certificates"

_NAMES_SHOWN = 3
_NAME_CHARACTERS_SHOWN = 80


class HostIdentity(Protocol):
    """What this module needs of a host's configuration (``config.HostConfig``)."""

    @property
    def name(self) -> str:
        """The host's identity."""

    @property
    def certificate(self) -> str | os.PathLike[str]:
        """PEM file: the host's certificate, then intermediate ones, if any."""

    @property
    def key(self) -> str | os.PathLike[str]:
        """PEM file, mode 0600: the certificate's private key."""

    @property
    def ca(self) -> str | os.PathLike[str]:
        """PEM file: the certificates that a peer's chain may end in."""


class CredentialsError(ConfigError):
    """A file is no whole one, or they do not fit each other: as while they are being replaced.

    What begins at that moment tries again by itself.
    """


def describe(certificate: x509.Certificate) -> str:
    """Name a certificate for people: its DNS names, else its subject; bounded and printable."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = extension.value.get_values_for_type(x509.DNSName)
    except (x509.ExtensionNotFound, ValueError):
        names = []
    if not names:
        names = [f"{certificate.subject.rfc4514_string() or 'nobody'}, no DNS name"]
    shown = [
        "".join(c if c.isprintable() else "?" for c in name)[:_NAME_CHARACTERS_SHOWN]
        for name in names[:_NAMES_SHOWN]
    ]
    return ", ".join(shown) + (", …" if len(names) > _NAMES_SHOWN else "")


def load_certificates(path: Path, key: str) -> list[x509.Certificate]:
    """Load the certificates of a PEM file that ``key`` of ``qds.cfg`` names.

    :raises ConfigError: the file is unreadable.
    :raises CredentialsError: it holds none.
    """
    try:
        return x509.load_pem_x509_certificates(_read(path, key))
    except ValueError:
        raise CredentialsError(f"{path}: no certificate in PEM form", hint=HINT_PKI) from None


def _read(path: Path, key: str, *, secret: bool = False) -> bytes:
    """Read one file of ``qds.cfg``; a secret's mode is checked on the opened descriptor."""
    try:
        # A FIFO in its place must not hang the daemon.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path}: not a regular file", hint=f"check `{key}` in qds.cfg")
            if secret and status.st_mode & 0o077:
                raise ConfigError(
                    f"{path}: mode {stat.S_IMODE(status.st_mode):04o} lets others read the key",
                    hint=f"chmod 0600 {path}",
                )
            data = file.read(CERTIFICATE_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}", hint=f"check `{key}` in qds.cfg"
        ) from None
    if len(data) > CERTIFICATE_FILE_BYTES_MAX:
        raise ConfigError(f"{path}: longer than {CERTIFICATE_FILE_BYTES_MAX} bytes")
    return data


def load_key(host: HostIdentity) -> Any:
    """Load the host's private key; its file's mode is checked on the opened descriptor.

    :raises ConfigError: it is unreadable, or open to others.
    :raises CredentialsError: it is no private key.
    """
    path = Path(host.key)
    try:
        return load_pem_private_key(_read(path, "key", secret=True), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Nothing of the file goes into the message: it is a secret.
        raise CredentialsError(
            f"{path}: not a private key in PEM form without a passphrase", hint=HINT_PKI
        ) from None


def check_own_name(host: HostIdentity, certificate: x509.Certificate) -> None:
    """Warn where the peer is going to refuse us: it tells its side too, so it has the last word."""
    try:
        verify_service_identity(extract_patterns(certificate), [DNS_ID(host.name)], [])
    except (VerificationError, CertificateError, ValueError):
        _log.warn(
            "{path}: the certificate is for {names}, not for this host's name {name}: "
            "the peer will refuse it",
            path=os.fspath(host.certificate),
            names=describe(certificate),
            name=host.name,
        )
