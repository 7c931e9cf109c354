"""What ``qdsconfigtool check`` looks at: files, their modes, certificate, key, secrets, user."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from qdsmirror.config import (
    GroupConfig,
    HostConfig,
    Problem,
    load_secret,
    load_token,
    read_group,
    read_host,
    scan_groups,
)
from qdsmirror.errors import ConfigError, QdsError
from qdsmirror.limits import CERTIFICATE_WARN_DAYS
from qdsmirror.paths import Paths

if TYPE_CHECKING:
    from cryptography import x509


_RENEW = "renew it beside the authority: qdsconfigtool pki --overwrite --out DIR PRIMARY SECONDARY"
_TOGETHER = "copy host.pem, host.key and ca.pem together, of one run of qdsconfigtool pki --out DIR"


_NEW_AUTHORITY = "make a new authority and certificates: qdsconfigtool pki --out NEW ..."


def check_files(files: Sequence[Path]) -> list[Problem]:
    """Check files by themselves: ``qds.cfg`` or a group's, told apart by their names."""
    problems: list[Problem] = []
    for file in files:
        found = read_host(file)[1] if file.name == "qds.cfg" else read_group(file)[1]
        problems += found
    return problems


def check_all(paths: Paths) -> list[Problem]:
    """Check everything that the daemons of this host will read.

    :raises ConfigError: the directory of the files cannot be read.
    """
    groups, wrong = scan_groups(paths)
    host, problems = read_host(paths.host_config)
    problems += wrong
    if host is not None:
        problems += _user(paths, host)
        problems += _certificate(host)
        problems += _token(host)
        problems += [one for group in groups for one in _group(paths, host, group)]
    if not groups and not wrong:
        problems.append(
            Problem(
                paths.etc,
                0,
                "",
                "no group's file (dsgrp000.cfg) here yet",
                "warning",
                "write one, or copy the other host's (scp), see dsgrp.cfg(5); "
                "then: qdsconfigtool apply",
            )
        )
    return problems


def check_peer(paths: Paths) -> list[tuple[Problem, int]]:
    """Compare the groups' files with those of their other hosts, as far as these can be asked.

    :returns: each problem with its exit code; 0 where it is a warning.
    """
    from qdsmirror.core.findings import Severity
    from qdsmirror.tools import doctor_peer

    host, _ = read_host(paths.host_config)
    if host is None:
        return []
    found: list[tuple[Problem, int]] = []
    groups, _ = scan_groups(paths)
    primaries = [group for group in groups if group.role_of(host.name) == "primary"]
    try:
        visits = doctor_peer.visit(paths, primaries)
    except QdsError as error:
        told = Problem(paths.etc, 0, "", error.message, hint=error.hint)
        return [(told, error.exit_code)]
    for group in primaries:
        for one in doctor_peer.compare(group, visits.get(group.number, [])):
            is_error = one.severity is Severity.ERROR
            severity = "error" if is_error else "warning"
            message = one.message.removeprefix(f"{group.name}.cfg: ")
            told = Problem(group.path, 0, "", message, severity, one.next_step)
            found.append((told, one.code if is_error else 0))
    others = [group for group in groups if group.role_of(host.name) == "secondary"]
    for one in doctor_peer.one_sided(others):
        step = one.next_step.replace("qdsdoctor --peer", "qdsconfigtool check --against-peer")
        found.append((Problem(paths.etc, 0, "", one.message, "warning", step), 0))
    return found


def _user(paths: Paths, host: HostConfig) -> list[Problem]:
    if host.user and _uid(host) is None:
        message = f'there is no user "{host.user}"'
        make = f"useradd --system {host.user}, or correct user"
        return [Problem(paths.host_config, 0, "user", message, hint=make)]
    return []


def _uid(host: HostConfig) -> int | None:
    """Find the user whom the daemons become; ``None``: nobody, or there is no such user."""
    try:
        return pwd.getpwnam(host.user).pw_uid if host.user else None
    except KeyError:
        return None


def _owner(host: HostConfig, path: Path, owner: int) -> list[Problem]:
    """Check that the daemons can still read a private file once they have become their user."""
    uid = _uid(host)
    if uid in (None, 0, owner):
        return []
    message = f"does not belong to {host.user}, whom the daemons become"
    return [Problem(path, 0, "", message, hint=f"chown {host.user} {path}")]


def _group(paths: Paths, host: HostConfig, group: GroupConfig) -> list[Problem]:
    if group.role_of(host.name) is None:
        message = (
            f'neither primary "{group.primary_host}" nor secondary "{group.secondary_host}" '
            f'is this host "{host.name}": the group does not run here'
        )
        return [
            Problem(
                group.path, 0, "", message, "warning",
                f"compare name in {paths.host_config} with host there: qdsconfigtool show",
            )
        ]  # fmt: skip
    path = paths.group_secret(group.number)
    return _secret(host, path, lambda owners: load_secret(paths, group.number, owners))


def _token(host: HostConfig) -> list[Problem]:
    """Check the token of the metrics; without one the console does not start, and all else does."""
    path = host.metrics_token_file
    if not path.exists():
        return []
    return _secret(host, path, lambda owners: load_token(path, owners))


def _secret(
    host: HostConfig, path: Path, load: Callable[[Collection[int]], object]
) -> list[Problem]:
    uid = _uid(host)
    try:
        load(() if uid is None else (uid,))
        return _owner(host, path, path.stat().st_uid)
    except ConfigError as error:
        return [_problem(path, error)]


def _problem(path: Path, error: ConfigError) -> Problem:
    message = error.message.removeprefix(f"{path}: ")
    return Problem(path, 0, "", message, hint=error.hint)


# -- certificate and key ---------------------------------------------------------------------------


def _certificate(host: HostConfig) -> list[Problem]:
    """Check the host's certificate against its name, key and authority."""
    from qdsmirror import pki

    problems: list[Problem] = []
    try:
        chain = pki.read_certificates(host.certificate)
    except ConfigError as error:
        problems.append(_problem(host.certificate, error))
        return problems + _key(host, None)
    own = chain[0]
    names = pki.certificate_names(own)
    if host.name not in names:
        bears = " ".join(names) or "no DNS name"
        problems.append(
            Problem(
                host.certificate,
                0,
                "",
                f'bears {bears}, but this host is "{host.name}"',
                hint=f"correct name in qds.cfg, or {_RENEW}",
            )
        )
    problems += _dates(host.certificate, own) + _usage(host.certificate, own)
    problems += _key(host, own) + _issuer(host, chain)
    return problems


def _dates(path: Path, certificate: x509.Certificate) -> list[Problem]:
    now = datetime.now(UTC)
    end = certificate.not_valid_after_utc
    if end <= now:
        message = f"expired at {end:%Y-%m-%d %H:%M} UTC"
        return [Problem(path, 0, "", message, hint=_RENEW)]
    if certificate.not_valid_before_utc > now:
        begin = certificate.not_valid_before_utc
        message = f"not valid before {begin:%Y-%m-%d %H:%M} UTC"
        return [Problem(path, 0, "", message, hint="timedatectl status: is this clock right?")]
    if end - now < timedelta(days=CERTIFICATE_WARN_DAYS):
        message = f"expires in {(end - now).days} days"
        return [Problem(path, 0, "", message, "warning", _RENEW)]
    return []


def _usage(path: Path, certificate: x509.Certificate) -> list[Problem]:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    try:
        usages = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return []  # RFC 5280, 4.2.1.12: without the extension every use is allowed
    except ValueError as error:
        return [Problem(path, 0, "", f"an extension cannot be read: {error}")]
    needed = {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    if needed <= usages or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usages:
        return []
    message = "its uses are not both clientAuth and serverAuth"
    return [Problem(path, 0, "", message, hint=_RENEW)]


def _key(host: HostConfig, certificate: x509.Certificate | None) -> list[Problem]:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path = host.key
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return [Problem(path, 0, "", "not a regular file", hint=_RENEW)]
            content = file.read()
    except OSError as error:
        step = "correct key in qds.cfg, or " + _RENEW
        return [Problem(path, 0, "", str(error.strerror), hint=step)]
    problems = _owner(host, path, status.st_uid)
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        message = f"mode {mode:04o} lets others read the key"
        problems.append(Problem(path, 0, "", message, hint=f"chmod 600 {path}"))
    try:
        key = load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        message = "not an unencrypted PEM private key"
        return [*problems, Problem(path, 0, "", message, hint=_RENEW)]
    if certificate is not None and key.public_key() != certificate.public_key():
        message = f"not the key of {host.certificate}"
        problems.append(Problem(path, 0, "", message, hint=_TOGETHER))
    return problems


def _issuer(host: HostConfig, chain: Sequence[x509.Certificate]) -> list[Problem]:
    """Check that the chain ends at one of the authorities; the handshake checks it in full."""
    from cryptography.exceptions import InvalidSignature

    from qdsmirror import pki

    try:
        authorities = pki.read_certificates(host.ca)
    except ConfigError as error:
        return [_problem(host.ca, error)]
    for authority in authorities:
        for certificate in chain:
            try:
                certificate.verify_directly_issued_by(authority)
            except (ValueError, TypeError, InvalidSignature):
                continue
            return [replace(problem, hint=_NEW_AUTHORITY) for problem in _dates(host.ca, authority)]
    message = f"not issued by an authority of {host.ca}"
    return [Problem(host.certificate, 0, "", message, hint=_TOGETHER)]
