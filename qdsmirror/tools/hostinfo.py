"""qdshostinfo: a host's names, addresses and (of this host) its id."""

from __future__ import annotations

import ctypes
import hashlib
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdsmirror.errors import QdsError
from qdsmirror.tools import cli

_MACHINE_ID = Path("/etc/machine-id")
_IPV4_ROUTES = Path("/proc/net/fib_trie")
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")


def build_parser() -> cli.Parser:
    """Make the command's parser."""
    parser = cli.parser(
        "qdshostinfo", "Show a host's names and IP addresses, and the id of this host."
    )
    parser.add_argument("host", metavar="HOST", nargs="?", help="default: this host")
    return parser


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = build_parser().parse_args(argv)
    found = describe(arguments.host)
    if arguments.json:
        cli.print_json(found)
    else:
        print("\n".join(lines(found)))
    return 0


def describe(host: str | None = None) -> dict[str, Any]:
    """Find out about a host.

    :param host: a name or an IP address; ``None`` for this host.
    :return: what ``--json`` prints; ``host_id`` is ``None`` for any other host.
    :raises QdsError: the name has no address.
    """
    here = local_addresses()
    if host is None:
        name = socket.gethostname()
        names = _distinct([name, socket.getfqdn(name)])
        return _found(name, names, [one for one in here if not _is_loopback(one)], host_id())
    names, addresses = _look_up(host)
    local = all(_is_loopback(one) or one in here for one in addresses)
    return _found(host, names, addresses, host_id() if local else None)


def lines(found: dict[str, Any]) -> list[str]:
    """Put what :func:`describe` found into lines for people."""
    rows = [
        ("host", found["host"]),
        ("names", " ".join(found["names"])),
        ("addresses", " ".join(found["addresses"]) or "none"),
    ]
    if found["host_id"] is not None:
        rows.append(("host id", found["host_id"]))
    return [f"{name + ':':<12}{value}" for name, value in rows]


def host_id() -> str:
    """Give 16 hexadecimal digits that stay the same for this host.

    Derived from machine-id(5), which itself should not be shown to others; without one, from
    gethostid(3).
    """
    try:
        secret = _MACHINE_ID.read_bytes().strip()
    except OSError:
        secret = b""
    if not secret:
        secret = b"%08x" % (ctypes.CDLL(None).gethostid() & 0xFFFFFFFF)
    return hashlib.blake2s(secret, digest_size=8, key=b"qdsmirror host id").hexdigest()


def local_addresses() -> list[str]:
    """List the IP addresses of this host, loopback included, IPv4 first."""
    addresses = []
    candidate = ""
    for line in _lines(_IPV4_ROUTES):
        #    |-- 10.0.0.1
        #       /32 host LOCAL
        fields = line.split()
        if fields[:1] == ["|--"]:
            candidate = fields[1]
        elif fields == ["/32", "host", "LOCAL"]:
            addresses.append(candidate)
    for line in _lines(_IPV6_ADDRESSES):
        addresses.append(str(ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))))
    return _distinct(addresses)


def _look_up(host: str) -> tuple[list[str], list[str]]:
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise QdsError(
            f"host {host} has no address: {reason}", hint=f"see: getent hosts {host}"
        ) from error
    addresses = _distinct([str(answer[4][0]) for answer in answers])
    names = [host] if not _is_address(host) else []
    names += [answer[3] for answer in answers if answer[3] and not _is_address(answer[3])]
    try:
        name, aliases, _ = socket.gethostbyaddr(addresses[0])
        names += [name, *aliases]
    except OSError:
        pass  # it has no name but the one given
    return _distinct(names), addresses


def _found(
    host: str, names: list[str], addresses: list[str], identity: str | None
) -> dict[str, Any]:
    return {"host": host, "names": names, "addresses": addresses, "host_id": identity}


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _distinct(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
