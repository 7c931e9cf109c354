"""The master remote mirror daemon as a twistd plugin: ``twistd -n qdsrmd [--root DIR]``.

It listens on the ports of this host's secondary groups, or takes the listening sockets of a
service manager (``LISTEN_FDS``, sd_listen_fds(3)) or of inetd (``wait``: descriptor 0), and
routes each connection to the child that hosts its group (daemons.routing).
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from twisted.logger import Logger

from qdsmirror.config import GroupConfig
from qdsmirror.daemons import service
from qdsmirror.daemons.master import Master
from qdsmirror.daemons.refusal import refusal_of, refuse
from qdsmirror.daemons.routing import (
    ALERT_HANDSHAKE_FAILURE,
    ALERT_UNRECOGNIZED_NAME,
    Ended,
    Router,
    turn_away,
)
from qdsmirror.errors import QdsError
from qdsmirror.paths import group_name

_log = Logger()

_LISTEN_FDS_START = 3
_BACKLOG = 128


class Options(service.Options):
    """What the rmd's master takes on twistd's command line."""

    optFlags: ClassVar[list[list[str | None]]] = [
        ["inetd", None, "Descriptor 0 is the listening socket (inetd's wait)."],
    ]


class RmdMaster(Master):
    """Supervises the children that host this host's secondary groups, and accepts for them.

    :ivar inherited: listening sockets given by whoever started this process.
    """

    daemon = "qdsrmd"
    role = "rmd"
    side = "secondary"
    has_statistics = True
    has_certificate = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.inherited: list[socket.socket] = []
        self._router = Router(self.reactor, self._route, self._is_starting)
        self._given_ports: set[int] = set()

    def open_privileged(self) -> None:
        """Listen; ports below 1024 need root or CAP_NET_BIND_SERVICE.

        :raises QdsError: a port is in use or not permitted.
        """
        for listening in self.inherited:
            self._router.listen(listening)
        self._given_ports = self._router.ports()
        for group in self.groups.values():
            self.open_group(group)

    def open_group(self, group: GroupConfig) -> None:
        """Listen on the group's port, unless that is so already.

        :raises QdsError: the port is in use or not permitted.
        """
        if group.port not in self._router.ports():
            self._router.listen(_listen(group.port))
        self._close_unused({**self.groups, group.number: group})

    def close_group(self, number: int) -> None:
        """Stop listening on a port that no other group uses."""
        self._close_unused({one: group for one, group in self.groups.items() if one != number})

    def _close_unused(self, groups: dict[int, GroupConfig]) -> None:
        used = {group.port for group in groups.values()} | self._given_ports
        for port in self._router.ports() - used:
            self._router.close(port)

    def close(self) -> None:
        """Stop accepting."""
        self._router.close()

    def depends_on(self, number: int) -> list[Path]:
        """Name the group's secret: a new one takes effect by apply."""
        return [self.paths.group_secret(number)]

    def _is_starting(self, number: int) -> bool:
        return number in self.groups and self._supervisor.is_starting(number)

    def _route(self, number: int, descriptor: int, ended: Ended) -> bool:
        """Pass a connection to its group's child, or tell the peer why that is not possible."""
        if number not in self.groups:
            _log.warn(
                "{name}: refused: a primary asks for it, and {host} has no such group",
                name=group_name(number),
                host=self._host.name,
            )
            turn_away(descriptor, ALERT_UNRECOGNIZED_NAME)
            return False
        trouble = self._trouble(number)
        if trouble is not None and self._refuse(number, trouble, descriptor, ended):
            return True
        if self._supervisor.has_failed(number):
            turn_away(descriptor, ALERT_HANDSHAKE_FAILURE)
            return False
        return self._supervisor.adopt(number, descriptor, ended)

    def _refuse(self, number: int, trouble: QdsError, descriptor: int, ended: Ended) -> bool:
        assert self._certificate is not None
        group, kept = self.groups[number], self._certificate.kept
        return refuse(self.reactor, self.paths, self._host, group, trouble, descriptor, ended, kept)

    def _trouble(self, number: int) -> QdsError | None:
        """Say why a group is not served, if it has failed or waits for its next attempt."""
        child = self._supervisor.child_of(number)
        state = child.groups[number] if child is not None else None
        if state is None or state.state not in ("failed", "retrying"):
            return None
        return refusal_of(self._host.name, group_name(number), state.reason, state.code)


def _listen(port: int) -> socket.socket:
    """Listen on a TCP port of every address, IPv6 and IPv4 alike where there is IPv6."""
    try:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
                )
            except OSError as error:
                # Compiled in, but switched off on this machine.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
        return socket.create_server(("", port), backlog=_BACKLOG)
    except OSError as error:
        raise QdsError(
            f"port {port}: {os.strerror(error.errno or 0)}",
            hint="a port below 1024 needs root or socket activation; who has it: "
            f"ss -ltnp sport = {port}",
        ) from None


def initial_environment() -> dict[str, str]:
    """Give the environment that this process was started with.

    Twisted removes ``LISTEN_FDS`` from ``os.environ`` when its endpoints are imported, which
    ``twistd`` does before any service is made.
    """
    entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    pairs = (os.fsdecode(entry).partition("=") for entry in entries if entry)
    return {name: value for name, _, value in pairs}


def inherited_sockets(
    inetd: bool, environment: Mapping[str, str] | None = None
) -> list[socket.socket]:
    """Take the listening sockets that a service manager or inetd gave to this process.

    :param inetd: descriptor 0 is one.
    :param environment: with ``LISTEN_PID`` and ``LISTEN_FDS``, sd_listen_fds(3); default: the
        one that the process was started with.
    :raises QdsError: a descriptor given is no listening socket.
    """
    given = initial_environment() if environment is None else environment
    numbers = [0] if inetd else []
    if given.get("LISTEN_PID") == str(os.getpid()):
        count = int(given.get("LISTEN_FDS", "0"))
        numbers += range(_LISTEN_FDS_START, _LISTEN_FDS_START + count)
    found = []
    for number in numbers:
        try:
            one = socket.socket(fileno=os.dup(number))
            accepting = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise QdsError(f"descriptor {number}: {error.strerror}") from None
        if not accepting:
            one.close()
            raise QdsError(
                f"descriptor {number} is no listening socket",
                hint="inetd: use wait; systemd: Accept=no",
            )
        found.append(one)
    return found


def makeService(options: Any) -> RmdMaster:  # noqa: N802
    """Make the service for twistd."""
    master = service.make_service(RmdMaster, options)
    master.inherited = service.exiting(lambda: inherited_sockets(bool(options["inetd"])))
    return master


__all__ = ["Options", "RmdMaster", "inherited_sockets", "makeService"]
