"""The device driver's master as a twistd plugin: ``twistd -n qdsdriver [--root DIR]``.

It owns the listening NBD sockets, so that a client which reconnects while a child is being
relaunched waits in the backlog instead of being refused.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from qdsmirror.config import GroupConfig
from qdsmirror.daemons.master import Master, Options, make_service
from qdsmirror.errors import QdsError
from qdsmirror.limits import NBD_CONNECTIONS_MAX

_SOCKET_MODE = 0o660


class DriverMaster(Master):
    """Supervises the children that serve the LDSUs of this host's primary groups."""

    daemon = "qdsdriver"
    role = "driver"
    side = "primary"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._sockets: dict[int, socket.socket] = {}

    def open_group(self, group: GroupConfig) -> None:
        """Listen on the group's NBD socket, unless that is so already.

        :raises QdsError: the socket cannot be made.
        """
        if group.number in self._sockets:
            return
        path = self.paths.nbd_socket(group.number)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o777 & ~_SOCKET_MODE)
        try:
            path.unlink(missing_ok=True)
            listening.bind(os.fspath(path))
            # Not every kernel minds the umask here; nobody can connect before we listen.
            path.chmod(_SOCKET_MODE)
            listening.listen(NBD_CONNECTIONS_MAX)
            listening.setblocking(False)
        except OSError as error:
            listening.close()
            raise QdsError(f"{path}: {error.strerror}", hint="free the path") from None
        finally:
            os.umask(mask)
        self._sockets[group.number] = listening

    def close_group(self, number: int) -> None:
        """Close and remove the group's NBD socket."""
        listening = self._sockets.pop(number, None)
        if listening is not None:
            listening.close()
            self.paths.nbd_socket(number).unlink(missing_ok=True)

    def listening(self, number: int) -> int | None:
        """Give the group's listening NBD socket."""
        return self._sockets[number].fileno()


def makeService(options: Any) -> DriverMaster:  # noqa: N802
    """Make the service for twistd."""
    return make_service(DriverMaster, options)


__all__ = ["DriverMaster", "Options", "makeService"]
