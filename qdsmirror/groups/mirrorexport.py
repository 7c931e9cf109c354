"""The mirror devices as read-only NBD exports, while a checkpoint holds (rules.md 22).

They are read through the descriptors that the daemon has, never by another opener of the devices.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from twisted.internet.defer import inlineCallbacks
from zope.interface import implementer

from qdsmirror.core import nbd
from qdsmirror.core.extents import allocation
from qdsmirror.interfaces import IBlockDevice, IExport, INbdConnection, IWorker

if TYPE_CHECKING:
    from qdsmirror.core.nbd import Request
    from qdsmirror.groups.remote import RemoteGroup


@implementer(IExport)
class MirrorExport:
    """A mirror device; whatever would change it is refused.

    :param worker: reads it.
    """

    read_only = True
    closed = ""

    def __init__(self, name: str, device: IBlockDevice, worker: IWorker) -> None:
        self.name = name
        self.size = device.size
        self.minimum_block = device.logical_block
        self.preferred_block = max(4096, device.physical_block)
        self._device = device
        self._worker = worker

    def attach(self, connection: INbdConnection) -> None:
        """See :class:`IExport`."""

    def detach(self, connection: INbdConnection) -> None:
        """See :class:`IExport`."""

    def submit(self, requests: Sequence[Request]) -> None:
        """See :class:`IExport`."""
        for request in requests:
            if request.command == nbd.CMD_READ:
                read = partial(self._device.pread, request.length, request.offset)
                self._worker.run(read, partial(self._was_read, request))
            elif request.command == nbd.CMD_BLOCK_STATUS:
                find = partial(self._device.extents, request.offset, request.length)
                self._worker.run(find, partial(self._was_found, request))
            elif request.command == nbd.CMD_FLUSH:
                request.connection.answer([request])
            else:
                request.connection.answer_error(
                    request, errno.EPERM, "a checkpoint can only be read"
                )

    def _was_read(self, request: Request, data: bytes | None, error: BaseException | None) -> None:
        if data is None:
            request.connection.answer_error(request, errno.EIO, str(error))
        else:
            request.connection.answer_read(request, [data])

    def _was_found(
        self,
        request: Request,
        extents: list[tuple[int, bool]] | None,
        error: BaseException | None,
    ) -> None:
        if extents is None:
            request.connection.answer_error(request, errno.EIO, str(error))
        else:
            told = allocation(request.offset, request.length, extents, ())
            request.connection.answer_status(request, told)


class Exports:
    """The exports of a group's mirror devices: open or closed together."""

    def __init__(self, group: RemoteGroup) -> None:
        self._group = group
        self._path = group.paths.mirror_socket(group.number)
        self._socket: socket.socket | None = None
        self._server: Any = None
        self._worker: IWorker | None = None

    @property
    def clients(self) -> int:
        """How many connections there are."""
        return len(self._server.connections) if self._server is not None else 0

    def uris(self) -> dict[str, str]:
        """Give the NBD URIs of the exports, by LDSU; none while they are closed."""
        if self._server is None:
            return {}
        at = quote(os.fspath(self._path), safe="/")
        names = [ldsu.name for ldsu in self._group.config.ldsus]
        return {name: f"nbd+unix:///{quote(name, safe='')}?socket={at}" for name in names}

    def clear(self) -> None:
        """Remove what a killed daemon has left."""
        self._path.unlink(missing_ok=True)

    def open(self) -> None:
        """Let clients come, unless they may already.

        :raises OSError: the socket cannot be made.
        """
        group = self._group
        if self._server is not None or group.mirror is None:
            return
        runtime = group.runtime
        listening = self._socket = runtime.bind(self._path)
        worker = self._worker = runtime.read_worker(f"{group.name} checkpoint")
        exports = {
            ldsu.name: MirrorExport(ldsu.name, group.mirror.devices[ldsu.index], worker)
            for ldsu in group.config.ldsus
        }
        self._server = runtime.listen(runtime.reactor, listening.fileno(), exports, runtime.budget)

    @inlineCallbacks
    def close(self) -> Any:
        """End all clients; fires when nothing reads the mirror devices for them any more."""
        server, self._server = self._server, None
        worker, self._worker = self._worker, None
        if server is None or worker is None or self._socket is None:
            return
        yield server.stopListening()
        self.clear()
        self._socket.close()
        yield server.disconnect_all()
        yield worker.stop()
