"""A host's credentials as they are in memory: loaded together, checked, and replaced together.

Sessions are begun with what was loaded last, not with what lies on the disk at that moment: while
an administrator puts a new certificate and then its key in place, or puts one there that is wrong,
links that come and go are not disturbed (security.md 11).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from OpenSSL import SSL, crypto

from qdsmirror.errors import ConfigError
from qdsmirror.net.certificates import (
    HINT_PKI,
    CredentialsError,
    HostIdentity,
    check_own_name,
    load_certificates,
    load_key,
)


@dataclass(frozen=True)
class Credentials:
    """What a host shows to its peers, and what it judges them by.

    :ivar name: the host's identity.
    :ivar chain: the host's certificate, then intermediate ones, if any.
    :ivar key: its private key; in no text ever.
    :ivar authorities: the certificates that a peer's chain may end in.
    :ivar ca_file: where those came from, for messages.
    """

    name: str
    chain: tuple[x509.Certificate, ...]
    key: Any = field(repr=False)
    authorities: tuple[x509.Certificate, ...]
    ca_file: str

    @classmethod
    def load(cls, host: HostIdentity) -> Credentials:
        """Load the files of a host, and check that certificate and key are a pair.

        :raises ConfigError: a file is missing, unreadable, wrong, or the key's mode is not 0600.
        :raises CredentialsError: they are no whole set, as while they are being replaced.
        """
        loaded = cls(
            host.name,
            tuple(load_certificates(Path(host.certificate), "certificate")),
            load_key(host),
            tuple(load_certificates(Path(host.ca), "ca")),
            os.fspath(host.ca),
        )
        try:
            loaded.apply_to(SSL.Context(SSL.TLS_METHOD))
        except (SSL.Error, TypeError, ValueError):
            raise CredentialsError(
                f"{os.fspath(host.key)}: not the key of the certificate in "
                f"{os.fspath(host.certificate)}",
                hint=HINT_PKI,
            ) from None
        check_own_name(host, loaded.chain[0])
        return loaded

    def apply_to(self, context: SSL.Context) -> None:
        """Give a context all that is here.

        :raises SSL.Error: certificate and key are no pair.
        """
        context.use_certificate(self.chain[0])
        for intermediate in self.chain[1:]:
            context.add_extra_chain_cert(intermediate)
        context.use_privatekey(self.key)
        context.check_privatekey()
        store = context.get_cert_store()
        if store is None:  # pragma: no cover - a new context always has one
            raise ConfigError("OpenSSL has no certificate store")
        for authority in self.authorities:
            store.add_cert(crypto.X509.from_cryptography(authority))


class KeptCredentials:
    """The credentials of this process: those that were good last.

    :param load: gives a host's; they are loaded when they are first asked for.
    """

    def __init__(self, load: Callable[[HostIdentity], Credentials] = Credentials.load) -> None:
        self._load = load
        self._kept: Credentials | None = None

    def of(self, host: HostIdentity) -> Credentials:
        """Give what was loaded last; load the host's files where that has never succeeded.

        :raises ConfigError: as for :meth:`Credentials.load`.
        """
        if self._kept is None:
            self._kept = self._load(host)
        return self._kept

    def reload(self, host: HostIdentity) -> None:
        """Load the host's files again, for the sessions to come; those that run go on.

        :raises ConfigError: they cannot be used; the former ones stay.
        """
        self._kept = self._load(host)


__all__ = ["Credentials", "KeptCredentials"]
