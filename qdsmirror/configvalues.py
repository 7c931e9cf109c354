"""Values in configuration files: sizes, times, names, paths; the checks that configspecs name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import Any, NamedTuple

from configobj.validate import ValidateError

from qdsmirror.limits import (
    DEVICE_PATH_BYTES_MAX,
    GIB,
    HOST_NAME_CHARS_MAX,
    KIB,
    MIB,
    RECORD_ALIGN_BYTES,
)

#: Where a host takes mail, unless another port is given (RFC 5321).
SMTP_PORT = 25
#: What a writelog's place begins with that stands in memory; its size follows.
MEMORY_PREFIX = "memory:"

#: What a Unix socket's place begins with.
UNIX_PREFIX = "unix:"

_HOST_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
_SIZE = re.compile(r"([0-9]{1,15}) ?([KMGT]?)", re.ASCII)
_SECONDS = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(ms|s|min|h|)", re.ASCII)
_DAYS = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(d|w)", re.ASCII)
_DAYS_UNITS = {"d": 86400.0, "w": 7 * 86400.0}
_SIZE_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1024 * GIB}
_SECONDS_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}


class NetworkPath(NamedTuple):
    """A way from the primary to the secondary.

    :ivar local: the primary's IP address from which it leads; empty: any.
    :ivar remote: IP address or host name of the secondary.
    :ivar port: TCP port; 0: the group's.
    """

    local: str
    remote: str
    port: int = 0

    def __str__(self) -> str:
        if not self.port:
            return f"{self.local}>{self.remote}"
        remote = f"[{self.remote}]" if ":" in self.remote else self.remote
        return f"{self.local}>{remote}:{self.port}"


class Relay(NamedTuple):
    """The host that takes mail for others.

    :ivar host: IP address or host name.
    :ivar port: TCP port.
    """

    host: str
    port: int = SMTP_PORT


class Listen(NamedTuple):
    """Where a server listens.

    :ivar host: IP address; empty where it is a Unix socket.
    :ivar port: TCP port.
    :ivar path: of the Unix socket; empty where it is none.
    """

    host: str
    port: int = 0
    path: str = ""

    @property
    def is_local(self) -> bool:
        """Whether only this host can connect to it."""
        return bool(self.path) or ip_address(self.host).is_loopback

    def __str__(self) -> str:
        if self.path:
            return f"{UNIX_PREFIX}{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def shown(value: str) -> str:
    """Quote a value for a message, shortened and without control characters."""
    short = value if len(value) <= 60 else value[:57] + "..."
    return '"' + "".join(c if c.isprintable() else "?" for c in short) + '"'


def nearest(name: str, valid: Iterable[str]) -> str:
    """Give ``; did you mean "x"?`` for the valid name nearest to ``name``, or nothing."""
    found = difflib.get_close_matches(name[:100].lower(), list(valid), n=1, cutoff=0.5)
    return f'; did you mean "{found[0]}"?' if found else ""


def parse_size(text: str) -> int:
    """Convert ``64K``, ``16M``, ``1G``, ``2T`` or plain bytes to bytes (1K = 1024 bytes).

    :raises ValueError: the text is not a size.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    if match is None:
        raise ValueError(f"{shown(text)} is not a size such as 65536, 64K, 16M or 1G")
    return int(match[1]) * _SIZE_UNITS[match[2]]


def parse_seconds(text: str) -> float:
    """Convert ``5 s``, ``200 ms``, ``2 min``, ``1 h`` or a plain number to seconds.

    :raises ValueError: the text is not a time.
    """
    match = _SECONDS.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{shown(text)} is not a time such as 5 s, 200 ms, 2 min or 1 h")
    return float(match[1]) * _SECONDS_UNITS[match[2]]


def valid_host_name(text: str) -> bool:
    """Tell whether ``text`` can be a host's name (letters, digits, ``-_.``; RFC 1123 labels)."""
    return len(text) <= HOST_NAME_CHARS_MAX and all(
        _HOST_LABEL.fullmatch(label) for label in text.split(".")
    )


# -- checks named by the configspecs: each takes the text and gives the value ------------------


def _one_of(value: str, *choices: str) -> str:
    if value not in choices:
        raise ValidateError(
            f"{shown(value)} is not one of: {', '.join(choices)}{nearest(value, choices)}"
        )
    return value


def _yes_no(value: str) -> bool:
    return _one_of(value.lower(), "yes", "no") == "yes"


def _whole_number(value: str, low: str, high: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) <= 15):
        raise ValidateError(f"{shown(value)} is not a whole number from {low} to {high}")
    if not int(low) <= int(value) <= int(high):
        raise ValidateError(f"{value} is not from {low} to {high}")
    return int(value)


def _seconds(value: str, low: str, high: str) -> float:
    try:
        seconds = parse_seconds(value)
    except ValueError as error:
        raise ValidateError(str(error)) from None
    if not float(low) <= seconds <= float(high):
        raise ValidateError(f"{value} is not from {low} s to {high} s")
    return seconds


def _interval(value: str, low: str, high: str) -> float:
    """Read a time, which may be in days or weeks, or ``never``: 0."""
    if value.strip().lower() == "never":
        return 0.0
    match = _DAYS.fullmatch(value.strip())
    try:
        seconds = float(match[1]) * _DAYS_UNITS[match[2]] if match else parse_seconds(value)
    except ValueError:
        raise ValidateError(
            f"{shown(value)} is not never, or a time such as 12 h, 7 d or 2 w"
        ) from None
    if not float(low) <= seconds <= float(high):
        raise ValidateError(f"{value} is not from {low} s to {int(high) // 86400} d")
    return seconds


def _byte_size(value: str, low: str, high: str) -> int:
    try:
        size = parse_size(value)
    except ValueError as error:
        raise ValidateError(str(error)) from None
    if not parse_size(low) <= size <= parse_size(high):
        raise ValidateError(f"{value} is not from {low} to {high} bytes")
    return size


def _power_of_two(value: str, low: str, high: str) -> int:
    size = _byte_size(value, low, high)
    if size & (size - 1):
        raise ValidateError(f"{value} is not a power of two")
    return size


def _absolute_path(value: str) -> str:
    if not value.startswith("/"):
        raise ValidateError(f"{shown(value)} is not an absolute path (it must begin with /)")
    if len(value.encode()) > DEVICE_PATH_BYTES_MAX:
        raise ValidateError(f"the path is longer than {DEVICE_PATH_BYTES_MAX} bytes")
    if value.endswith("/"):
        raise ValidateError(f"{shown(value)} is a directory's path")
    return value


def _writelog(value: str, low: str, high: str) -> str:
    """Check a writelog's place: a path, or memory and its size."""
    if not value.startswith(MEMORY_PREFIX):
        if value.split(":")[0].strip().lower() == "memory":
            raise ValidateError(f"{shown(value)} is not memory:SIZE, such as memory:128M")
        return _absolute_path(value)
    _byte_size(value.removeprefix(MEMORY_PREFIX), low, high)
    return value


def memory_bytes(writelog: str) -> int:
    """Give how much memory a writelog takes, by its configured place; 0 where it is a device."""
    if not writelog.startswith(MEMORY_PREFIX):
        return 0
    size = parse_size(writelog.removeprefix(MEMORY_PREFIX))
    return size // RECORD_ALIGN_BYTES * RECORD_ALIGN_BYTES


def _path_list(value: str, high: str) -> tuple[str, ...]:
    paths = tuple(part.strip() for part in value.split(","))
    if not all(paths):
        raise ValidateError("a path is missing before or after a comma")
    if len(paths) > int(high):
        raise ValidateError(f"{len(paths)} devices are more than {high}")
    return tuple(_absolute_path(path) for path in paths)


def _host_name(value: str) -> str:
    if not valid_host_name(value):
        raise ValidateError(f"{shown(value)} is not a host name (letters, digits, -_.)")
    return value.lower()


def _address(value: str) -> str:
    try:
        return str(ip_address(value))
    except ValueError:
        if not valid_host_name(value):
            raise ValidateError(f"{shown(value)} is not an IP address or host name") from None
        return value


def _compression(value: str, low: str, high: str) -> str:
    name, colon, level = value.lower().partition(":")
    _one_of(name, "none", "lz4", "zstd")
    if not colon:
        return name
    if name != "zstd":
        raise ValidateError(f"{shown(value)}: only zstd has a level (zstd:{low} to zstd:{high})")
    return f"zstd:{_whole_number(level.strip(), low, high)}"


def _network_paths(value: str, high: str) -> tuple[NetworkPath, ...]:
    paths = tuple(_network_path(part.strip()) for part in value.split(","))
    if len(paths) > int(high):
        raise ValidateError(f"{len(paths)} paths are more than {high}")
    return paths


def _network_path(text: str) -> NetworkPath:
    if not text:
        raise ValidateError("a path is missing before or after a comma")
    local, arrow, remote = (part.strip() for part in text.partition(">"))
    if not arrow or not remote or ">" in remote:
        raise ValidateError(f"{shown(text)} is not a path: write local>remote or local>remote:port")
    try:
        source = ip_address(local)
    except ValueError:
        raise ValidateError(
            f"{shown(text)}: {shown(local)} is not an IP address of the primary"
        ) from None
    host, port = _host_and_port(remote)
    address = _address(host)
    try:
        versions = {source.version, ip_address(address).version}
    except ValueError:
        versions = {source.version}
    if len(versions) > 1:
        raise ValidateError(f"{shown(text)}: one end is an IPv4 address and the other an IPv6 one")
    return NetworkPath(str(source), address, port)


def _host_and_port(text: str) -> tuple[str, int]:
    """Take a port off an address: ``10.1.0.2:575``, ``[fd00::2]:575``; 0 where there is none."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValidateError(f"{shown(text)} is not an address: write [IPv6]:port")
        return host, _whole_number(rest[1:], "1", "65535") if rest else 0
    host, colon, port = text.partition(":")
    if ":" in port:
        # An IPv6 address needs brackets before a port.
        return text, 0
    return host, _whole_number(port, "1", "65535") if colon else 0


def parse_relay(text: str) -> Relay:
    """Read ``HOST`` or ``HOST:PORT``.

    :raises ValidateError: it is neither.
    """
    host, port = _host_and_port(text)
    return Relay(_address(host), port or SMTP_PORT)


def _relay(value: str) -> str:
    parse_relay(value)
    return value


def _listen(value: str) -> Listen:
    if value.startswith(UNIX_PREFIX):
        return Listen("", 0, _absolute_path(value.removeprefix(UNIX_PREFIX)))
    host, port = _host_and_port(value)
    try:
        address = str(ip_address(host))
    except ValueError:
        address = ""
    if not address or not port:
        raise ValidateError(
            f"{shown(value)} is not where to listen: write ADDRESS:PORT, [IPv6]:PORT or unix:/PATH"
        )
    return Listen(address, port)


def _user_name(value: str) -> str:
    if not _USER.fullmatch(value):
        raise ValidateError(f"{shown(value)} is not a user's name")
    return value


def _or_default(check: Callable[..., Any]) -> Callable[..., Any]:
    # An empty default means "derived elsewhere"; an empty value in the file is refused before.
    return lambda value, *bounds: value if value == "" else check(value, *bounds)


CHECKS: dict[str, Callable[..., Any]] = {
    # Taken apart elsewhere.
    "text": str,
    "one_of": _one_of,
    "yes_no": _yes_no,
    "whole_number": _whole_number,
    "seconds": _seconds,
    "interval": _interval,
    "byte_size": _byte_size,
    "power_of_two": _power_of_two,
    "absolute_path": _or_default(_absolute_path),
    "writelog": _writelog,
    "path_list": _or_default(_path_list),
    "host_name": _host_name,
    "address": _or_default(_address),
    "user_name": _or_default(_user_name),
    "compression": _compression,
    "listen": _listen,
    "network_paths": _or_default(_network_paths),
    "relay": _or_default(_relay),
}
