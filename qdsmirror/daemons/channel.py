"""The line between a master and one child: messages with descriptors, and the sign of life.

A pair of Unix sockets that keep message boundaries (``SOCK_SEQPACKET``).  The master sends
orders (``start``, ``stop``, ``restart``, ``hint``, ``adopt``, ``remember``, ``forget``), the child
reports the states of its groups, devices whose sync has failed, and handshakes that are over.  It
is also the *control pipe*: its end tells a child that the master is gone, however it died.
"""

from __future__ import annotations

import array
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor, IWriteDescriptor
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from qdsmirror import limits
from qdsmirror.core.jsontext import dump_json, parse_object
from qdsmirror.errors import ProtocolError

_log = Logger()

Message = dict[str, Any]


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Make the two ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@implementer(IReadDescriptor, IWriteDescriptor)
class Channel:
    """One end of the line.

    :param reactor: provides IReactorFDSet.
    :param end: the socket; belongs to the channel then.
    :param received: called with each message and the descriptors that came with it, which
        belong to the callee.
    :param lost: called once when the other end is gone; not after :meth:`close`.
    """

    def __init__(
        self,
        reactor: IReactorFDSet,
        end: socket.socket,
        received: Callable[[Message, list[int]], None],
        lost: Callable[[], None],
    ) -> None:
        end.setblocking(False)
        self._reactor = reactor
        self._socket = end
        self._received = received
        self._lost = lost
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._open = True
        reactor.addReader(self)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> bool:
        """Send a message; the descriptors are duplicated and stay the caller's.

        :returns: ``False`` if the line is down or CHANNEL_MESSAGES_MAX wait already; nothing is
            sent then.
        """
        if not self._open or len(self._queue) >= limits.CHANNEL_MESSAGES_MAX:
            return False
        data = dump_json(message)
        assert len(data) <= limits.CHANNEL_MESSAGE_BYTES_MAX, message
        self._queue.append((data, [os.dup(one) for one in descriptors]))
        self.doWrite()
        return True

    def drain(self) -> None:
        """Receive what the other end, whose process is reaped, still sent; then close."""
        if not self._open:
            return
        readable = select.poll()
        readable.register(self._socket, select.POLLIN)
        while self._open and readable.poll(0) and self.doRead() is None:
            pass
        self.close()

    def close(self) -> None:
        """Close this end; the other one is told by its end of file."""
        if self._open:
            self._open = False
            self._reactor.removeReader(self)
            self._reactor.removeWriter(self)
            self._socket.close()
            while self._queue:
                _close_all(self._queue.popleft()[1])

    def fileno(self) -> int:
        """Give the socket's descriptor; part of IFileDescriptor."""
        return self._socket.fileno()

    def logPrefix(self) -> str:  # noqa: N802
        """Name this in Twisted's log; part of ILoggingContext."""
        return "channel"

    def doRead(self) -> Any:  # noqa: N802
        """Receive one message; part of IReadDescriptor."""
        try:
            data, descriptors, _flags, _address = socket.recv_fds(
                self._socket, limits.CHANNEL_MESSAGE_BYTES_MAX, limits.CHANNEL_DESCRIPTORS_MAX
            )
        except BlockingIOError:
            return None
        except OSError:
            return CONNECTION_LOST
        if not data:
            _close_all(descriptors)
            return CONNECTION_DONE
        for one in descriptors:
            os.set_inheritable(one, False)
        try:
            message = parse_object(data, "a message between master and child")
        except ProtocolError as error:
            _close_all(descriptors)
            _log.error("{error}", error=error)
            return CONNECTION_LOST
        self._received(message, descriptors)
        return None

    def doWrite(self) -> Any:  # noqa: N802
        """Send what waits; part of IWriteDescriptor."""
        while self._queue and self._open:
            data, descriptors = self._queue[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
            try:
                self._socket.sendmsg([data], rights if descriptors else [])
            except BlockingIOError:
                self._reactor.addWriter(self)
                return None
            except OSError:
                # The end is noticed by reading, where what the other end sent last still is.
                break
            self._queue.popleft()
            _close_all(descriptors)
        self._reactor.removeWriter(self)
        return None

    def connectionLost(self, reason: Failure) -> None:  # noqa: N802
        """Take note of the end; part of IFileDescriptor."""
        if self._open:
            self.close()
            self._lost()


def _close_all(descriptors: Sequence[int]) -> None:
    for one in descriptors:
        os.close(one)
