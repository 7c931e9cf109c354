"""The device driver's master as a twistd plugin: ``twistd -n qdsdriver [--root DIR]``.

It owns the listening NBD sockets, so that a client which reconnects while a child is being
relaunched waits in the backlog instead of being refused; and the memory of writelogs that stand
there, so that a child's death loses nothing (rules.md 23).
"""

from __future__ import annotations

import os
import socket
from typing import Any

from twisted.logger import Logger

from qdsmirror.config import GroupConfig
from qdsmirror.daemons.master import Master
from qdsmirror.daemons.service import Options, make_service
from qdsmirror.errors import QdsError
from qdsmirror.net.nbd_socket import bind_nbd
from qdsmirror.storage.memory import make_memory

_log = Logger()


class DriverMaster(Master):
    """Supervises the children that serve the LDSUs of this host's primary groups."""

    daemon = "qdsdriver"
    role = "driver"
    side = "primary"
    has_statistics = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._sockets: dict[int, socket.socket] = {}
        #: By group: the sizes that its memory is divided into, and its descriptor.
        self._memories: dict[int, tuple[tuple[int, ...], int]] = {}

    def open_group(self, group: GroupConfig) -> None:
        """Listen on the group's NBD socket, and make its memory, unless that is so already.

        :raises QdsError: the socket cannot be made.
        """
        self._hold_memory(group)
        if group.number in self._sockets:
            return
        path = self.paths.nbd_socket(group.number)
        try:
            listening = bind_nbd(path)
        except OSError as error:
            raise QdsError(f"{path}: {error.strerror}", hint="free the path") from None
        self._sockets[group.number] = listening

    def _hold_memory(self, group: GroupConfig) -> None:
        """Have the memory that a group's writelogs need; without, its start fails and says so."""
        sizes = tuple(ldsu.memory_bytes for ldsu in group.ldsus)
        held = self._memories.get(group.number)
        if held is not None and held[0] == sizes:
            return
        # What it held is in dirty bits; a child that still runs keeps it for as long.
        self._let_memory_go(group.number)
        if not group.in_memory:
            return
        try:
            self._memories[group.number] = sizes, make_memory(group)
        except OSError as error:
            _log.error(
                "{group}: no memory of {size} bytes for its writelogs: {why}",
                group=group.name,
                size=sum(sizes),
                why=error.strerror,
            )

    def _let_memory_go(self, number: int) -> None:
        held = self._memories.pop(number, None)
        if held is not None:
            os.close(held[1])

    def close_group(self, number: int) -> None:
        """Close and remove the group's NBD socket, and let its memory go."""
        self._let_memory_go(number)
        listening = self._sockets.pop(number, None)
        if listening is not None:
            listening.close()
            self.paths.nbd_socket(number).unlink(missing_ok=True)

    def memory(self, number: int) -> int | None:
        """Give the descriptor of the group's memory, where it has any."""
        held = self._memories.get(number)
        return None if held is None else held[1]

    def listening(self, number: int) -> int | None:
        """Give the group's listening NBD socket."""
        return self._sockets[number].fileno()


def makeService(options: Any) -> DriverMaster:  # noqa: N802
    """Make the service for twistd."""
    return make_service(DriverMaster, options)


__all__ = ["DriverMaster", "Options", "makeService"]
