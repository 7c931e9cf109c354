"""A master's eye on the host's certificate: is there a new one, does it expire (security.md 11).

It is looked at once a day, and when a new one was taken up: a warning in the log from 30 days
before it or its CA's expires, an error from 7 days.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography.x509 import Certificate
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger, LogLevel

from qdsmirror.config import HostConfig
from qdsmirror.errors import QdsError
from qdsmirror.limits import (
    CERTIFICATE_ALARM_DAYS,
    CERTIFICATE_LOOK_SECONDS,
    CERTIFICATE_WARN_DAYS,
    DAY_SECONDS,
)
from qdsmirror.net.certificates import describe, load_certificates
from qdsmirror.net.credentials import KeptCredentials
from qdsmirror.paths import file_identity

_log = Logger()

_HINTS = {
    "certificate": "renew it with qdsconfigtool pki --overwrite",
    "ca": "add its successor to the file on all hosts, and renew their certificates",
}
_SUCCEEDED = "its successor is in the file: renew what it has issued, and remove it on all hosts"


class HostCertificate:
    """The certificate, key and CA of a host, as files.

    :param reactor: provides IReactorTime.
    :param host: the configuration in effect.
    :param wall: seconds since 1970.
    :ivar kept: what the master's own sessions are begun with.
    """

    def __init__(
        self, reactor: Any, host: HostConfig, wall: Callable[[], float] = time.time
    ) -> None:
        self._reactor = reactor
        self._host = host
        self._wall = wall
        self._timer: IDelayedCall | None = None
        self._taken = _files(host)
        self.kept = KeptCredentials()

    def begin(self) -> None:
        """Look when they expire, now and from now on once a day."""
        self.end()
        self._timer = self._reactor.callLater(CERTIFICATE_LOOK_SECONDS, self.begin)
        with suppress(QdsError):
            # Whoever needs it says so.
            self.kept.of(self._host)
        self._look(self._host.certificate, "certificate")
        self._look(self._host.ca, "ca")

    def renew(self, host: HostConfig) -> bool:
        """Tell whether there are others than those that were taken up last, and good ones.

        :raises ConfigError: they cannot be used.
        """
        found = _files(host)
        if found == self._taken:
            return False
        self.kept.reload(host)
        self._host, self._taken = host, found
        self.begin()
        return True

    def end(self) -> None:
        """Look no more."""
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None

    def _look(self, path: Path, key: str) -> None:
        try:
            found = load_certificates(path, key)
        except QdsError:
            # Whoever needs it says so.
            return
        first = min(found, key=lambda one: one.not_valid_after_utc)
        days = self._days(first)
        if days > CERTIFICATE_WARN_DAYS:
            return
        succeeded = key == "ca" and any(self._days(one) > CERTIFICATE_WARN_DAYS for one in found)
        _log.emit(
            LogLevel.error if days <= CERTIFICATE_ALARM_DAYS else LogLevel.warn,
            "{path}: the certificate of {names} {when}; {hint}, then run qdsconfigtool apply",
            path=str(path),
            hint=_SUCCEEDED if succeeded else _HINTS[key],
            names=describe(first),
            when=f"expires in {days:.0f} days" if days > 0 else "has expired",
        )

    def _days(self, certificate: Certificate) -> float:
        """Give how long a certificate is valid yet."""
        return (certificate.not_valid_after_utc.timestamp() - self._wall()) / DAY_SECONDS


def _files(host: HostConfig) -> tuple[object, ...]:
    """Give what changes with other files, or with the same ones that were written anew."""
    return tuple((path, file_identity(path)) for path in (host.certificate, host.key, host.ca))
