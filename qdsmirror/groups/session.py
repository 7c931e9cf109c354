"""Session: the paths of a primary's session as one stream, at the secondary.

Frames arrive here compressed, over several paths, some of them twice; the group is given each of
them once, as it is in the primary's log, in the order of the global sequence numbers.
"""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from twisted.logger import Logger
from zope.interface import implementer

from qdsmirror.core import compression, stream
from qdsmirror.core.compression import INLINE_BYTES_MAX
from qdsmirror.core.frames import Buffer, parse_header
from qdsmirror.core.reorder import Reorder
from qdsmirror.core.stream import Message
from qdsmirror.errors import CorruptError, LimitError, ProtocolError, QdsError
from qdsmirror.groups.inorder import InOrder
from qdsmirror.groups.letters import Mail
from qdsmirror.groups.wire import Wire
from qdsmirror.interfaces import IWorker
from qdsmirror.limits import AHEAD_BYTES_MAX
from qdsmirror.net.link import ILinkOwner, Link, LinkFactory


class _Frame(NamedTuple):
    """A frame, and whether an ACK of it is asked for."""

    frame: Buffer
    ack: bool


class _Arrived(NamedTuple):
    """Frames that a message brought, unpacked; whether an ACK of the last is asked for."""

    frames: Sequence[Buffer]
    ack: bool


@implementer(ILinkOwner)
class Session:
    """The secondary's end of a session; to its owner it is a link.

    :param ident: the session's id, which the primary chose.
    :param paths: how many paths it may have.
    :param method: name of the compression that was agreed on.
    :param wire: counts.
    :param unpacker: gives the worker that unpacks what is not small.
    :param next_gsn: gives the number of the frame that the group wants next.
    :ivar method: that compression.
    :ivar links: the paths that are up.
    """

    log = Logger()

    def __init__(
        self,
        owner: ILinkOwner,
        reactor: Any,
        ident: bytes,
        *,
        paths: int,
        method: str,
        wire: Wire,
        unpacker: Callable[[], IWorker],
        next_gsn: Callable[[], int],
    ) -> None:
        self._owner = owner
        self._reactor = reactor
        self._ident = ident
        self._paths = max(1, paths)
        self.method = method
        self._wire = wire
        self._unpacker = unpacker
        self._next_gsn = next_gsn
        self._unpacking: InOrder[_Arrived] | None = None
        self._queue: deque[_Frame] = deque()
        self._reorder: Reorder[_Frame] | None = None
        self._ahead_bytes = 0
        self._giving = False
        self._paused = False
        self._closed = False
        self._mail = Mail(lambda: self.links, self._paths > 1)
        self._last_ack = b""
        self.links: list[Link] = []

    # -- paths --------------------------------------------------------------------------------

    def factory(self) -> LinkFactory:
        """Give what makes the stream of one more path."""
        return LinkFactory(self, self._reactor)

    def check_join(self, ident: bytes) -> None:
        """Check that a path may join.

        :raises ProtocolError: it is of another session, or there are too many.
        """
        if self._closed or not hmac.compare_digest(self._ident, ident):
            raise ProtocolError("the session that the path is for is over")
        # Those that were lost may not have been missed yet.
        if self._paths < 2 or len(self.links) >= 2 * self._paths:
            raise ProtocolError(f"the session has {len(self.links)} paths already")

    def paths_status(self) -> list[dict[str, Any]]:
        """Describe the paths that are up, for ``qdsinfo``."""
        return [
            {
                "remote": link.peer,
                "state": "connected",
                "sent_bytes": link.sent_bytes,
                "received_bytes": link.received_bytes,
            }
            for link in self.links
        ]

    # -- for the group ------------------------------------------------------------------------

    def acknowledge(self, committed: int, mirrored: int) -> None:
        """Send an ACK over all paths: whichever hangs or is lost, one brings it."""
        self._last_ack = stream.pack_ack(committed, mirrored, self._mail.written)
        for link in self.links:
            link.send(self._last_ack)

    def send(self, message: bytes) -> None:
        """Send a small message; it arrives as long as the session lasts."""
        try:
            self._mail.send(message)
        except QdsError as error:
            self._fail(error)

    def pause_reading(self) -> None:
        """Give nothing more, and take nothing more, for a while."""
        self._paused = True
        for link in self.links:
            link.pause_reading()

    def resume_reading(self) -> None:
        """Give and take again."""
        self._paused = False
        self._guarded(self._give)
        if not self._paused:
            for link in self.links:
                link.resume_reading()

    def close(self, reason: str) -> None:
        """End the session in order."""
        self._forget()
        for link in list(self.links):
            link.close(reason)

    def abort(self, reason: str) -> None:
        """End it at once."""
        self._forget()
        for link in list(self.links):
            link.abort(reason)

    # -- frames -------------------------------------------------------------------------------

    def _take(self, link: Link, message: Message) -> None:
        if message.type == stream.FRAME:
            self._take_frame(message)
        else:
            for one in self._mail.take(link, message):
                self._owner.link_message(self, one)

    def _take_frame(self, message: Message) -> None:
        payload = message.payload
        ack = bool(message.flags & stream.ACK_REQUESTED)
        packed = bool(message.flags & stream.COMPRESSED)
        size = compression.declared_bytes(payload) if packed else len(payload)
        self._wire.frame_bytes += size
        self._wire.wire_bytes += stream.HEADER_BYTES + len(payload)
        if self._reorder is None and not packed and not self._unpacking and not self._ahead_bytes:
            # Nothing can be before it.
            self._owner.link_message(self, message)
            return
        self._ahead_bytes += size
        if self._ahead_bytes > AHEAD_BYTES_MAX:
            raise LimitError(f"{self._ahead_bytes} bytes came ahead of what can be taken")
        if not packed:
            self._in_order().put(_Arrived((payload,), ack))
        elif size <= INLINE_BYTES_MAX and not self._unpacking:
            self._in_order().put(_Arrived(compression.unpack(payload, self.method), ack))
        else:
            # The parser's buffer is the message's own; a part of what was read is not.
            data = payload if isinstance(payload, bytearray) else bytes(payload)
            self._in_order().run(lambda _: _Arrived(compression.unpack(data, self.method), ack))

    def _in_order(self) -> InOrder[_Arrived]:
        if self._unpacking is None:
            self._unpacking = InOrder((self._unpacker(),), self._arrived, self._broken)
        return self._unpacking

    def _arrived(self, arrived: _Arrived) -> None:
        self._guarded(partial(self._sort, arrived))

    def _sort(self, arrived: _Arrived) -> None:
        last = len(arrived.frames) - 1
        for index, frame in enumerate(arrived.frames):
            one = _Frame(frame, arrived.ack and index == last)
            if self._reorder is None:
                self._queue.append(one)
                continue
            try:
                header = parse_header(frame)
            except CorruptError as error:
                raise ProtocolError(f"damaged frame: {error.message}") from error
            if not self._reorder.put(header.gsn_first, header.gsn_count, one):
                self._ahead_bytes -= len(frame)
        self._give()

    def _give(self) -> None:
        """Give the group what comes next, as long as it takes it."""
        if self._giving:
            return
        self._giving = True
        try:
            while not self._paused and not self._closed:
                one = self._next()
                if one is None:
                    return
                self._ahead_bytes -= len(one.frame)
                flags = stream.ACK_REQUESTED if one.ack else 0
                self._owner.link_message(self, Message(stream.FRAME, flags, one.frame))
        finally:
            self._giving = False

    def _next(self) -> _Frame | None:
        if self._reorder is not None:
            return self._reorder.take()
        return self._queue.popleft() if self._queue else None

    def _guarded(self, action: Callable[[], None]) -> None:
        """End the whole session over an error: the path that it came by is not to blame."""
        try:
            action()
        except QdsError as error:
            self._fail(error)

    def _broken(self, error: BaseException) -> None:
        if not isinstance(error, QdsError):
            error = ProtocolError(f"a compressed message could not be unpacked: {error}")
        self._fail(error)

    def _fail(self, error: QdsError) -> None:
        if not self._closed:
            self.log.error("session ended: {error}", error=error.message)
            self.close(error.message)

    def _forget(self) -> None:
        self._closed = True
        self._queue.clear()
        if self._unpacking is not None:
            self._unpacking.forget()

    # -- ILinkOwner, of each path -------------------------------------------------------------

    def link_made(self, link: Link) -> None:
        """See :class:`ILinkOwner`."""
        if self._closed:
            link.abort("its session is over")
            return
        first = not self.links
        self.links.append(link)
        if first:
            if self._paths > 1:
                self._reorder = Reorder(self._next_gsn())
            self._owner.link_made(self)
            return
        if self._last_ack:
            # Those that were here before may all be lost, and what they were to bring with them.
            link.send(self._last_ack)
        if self._paused:
            link.pause_reading()

    def link_message(self, link: Link, message: Message) -> None:
        """See :class:`ILinkOwner`."""
        if not self._closed:
            self._guarded(partial(self._take, link, message))

    def link_writable(self, link: Link) -> None:
        """See :class:`ILinkOwner`."""

    def link_lost(self, link: Link, reason: str) -> None:
        """See :class:`ILinkOwner`."""
        if link not in self.links:
            return
        self.links.remove(link)
        if not self.links:
            self._forget()
            self._owner.link_lost(self, reason)
        elif not self._closed:
            self.log.info("path from {peer} lost: {reason}", peer=link.peer, reason=reason)
            self._mail.again()
