"""Band: the network paths of a session as one stream, at the primary.

The patent: "banding of multiple physical networks into a logical connection with additive bandwidth
increases".  Buffers of frames (stripes) go over whichever path takes more; the secondary puts them
in order again.  What was not acknowledged on a path that is lost, or that is much slower than the
others, goes over another as well.  Frames are compressed on their way here, off the reactor thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from zope.interface import implementer

from qdsmirror.core import stream
from qdsmirror.core.compression import INLINE_BYTES_MAX, NONE, Method, Packer
from qdsmirror.core.frames import last_gsn
from qdsmirror.core.stream import Ack, Message
from qdsmirror.errors import QdsError
from qdsmirror.groups.holdback import HoldBack
from qdsmirror.groups.inorder import InOrder
from qdsmirror.groups.letters import Mail
from qdsmirror.groups.pace import Pace
from qdsmirror.groups.wire import Wire
from qdsmirror.interfaces import IWorker
from qdsmirror.limits import (
    COMPRESSION_BUFFERS_MAX,
    PATH_LOOK_SECONDS,
    PATH_PATIENCE,
    PATH_PATIENCE_SECONDS_MIN,
    PATH_STRIPE_SECONDS_MAX,
    STRIPE_BYTES,
)
from qdsmirror.net.link import ILinkOwner, Link

#: Weight of the newest stripe in the moving average of how long they need.
_AVERAGE_WEIGHT = 0.125


@dataclass(eq=False)
class Stripe:
    """A buffer of frames, as it goes over a path.

    :ivar gsn_last: of the last of them.
    :ivar data: the messages' bytes.
    :ivar link: where it was sent last; ``None`` while it waits.
    :ivar sent_at: when; seconds of the reactor.
    :ivar twice: it was sent again though its path was not lost.
    :ivar done: acknowledged.
    """

    gsn_last: int
    data: bytes
    link: Link | None = None
    sent_at: float = 0.0
    twice: bool = False
    done: bool = False


@implementer(ILinkOwner)
class Band:
    """The primary's end of a session; to its owner it is a link.

    :param several: more paths than the first one may join.
    :param method: the compression that is wanted.
    :param compressors: gives the workers for it, once it is agreed on.
    :param wire: counts.
    :param hold_back: what throttles hold it back by.
    :ivar method: the compression that was agreed on.
    :ivar ended: nothing is sent any more.
    """

    log = Logger()

    def __init__(
        self,
        owner: ILinkOwner,
        reactor: Any,
        wire: Wire,
        *,
        several: bool = False,
        method: Method | None = None,
        compressors: Callable[[], Sequence[IWorker]] = tuple,
        hold_back: HoldBack | None = None,
    ) -> None:
        self._hold_back = hold_back
        self._owner = owner
        self._reactor = reactor
        self._wire = wire
        self._several = several
        self._wanted = method or Method()
        self.method = Method()
        self._compressors = compressors
        self._packers: list[Packer] = []
        self._packing: InOrder[Stripe] | None = None
        self._inline = Packer(Method())
        self._links: dict[Link, list[Deferred[str]]] = {}
        self._paces: dict[Link, Pace] = {}
        self._slow: set[Link] = set()
        self._waiting: deque[Stripe] = deque()
        self._unacknowledged: deque[Stripe] = deque()
        self._seconds = 0.0
        self._mail = Mail(self._good_links, several)
        self._passed = (-1, -1)
        self._early: tuple[Ack, Message] | None = None
        self._look: Any = None
        self._sending = False
        self._closed = False
        self.ended = False

    # -- for who sends ------------------------------------------------------------------------

    def agreed(self, name: str) -> None:
        """Learn what compression the secondary takes; before anything is sent."""
        if name == NONE or self._packing is not None:
            return
        self.method = self._wanted
        workers = self._compressors()
        self._packers = [Packer(self.method) for _ in workers]
        self._inline = Packer(self.method)
        self._packing = InOrder(workers, self._take, self._broken)

    @property
    def can_send(self) -> bool:
        """Whether more frames may be given."""
        if self._packing is not None:
            return len(self._packing) + len(self._waiting) < COMPRESSION_BUFFERS_MAX
        return not self._waiting and self._free(STRIPE_BYTES) is not None

    def send_frames(self, frames: Sequence[memoryview]) -> None:
        """Send frames in one stripe; the last one asks for an ACK (patent: the flag)."""
        size = sum(map(len, frames))
        self._wire.frame_bytes += size
        gsn = last_gsn(frames[-1])
        packing = self._packing
        self._sending = True
        if packing is None:
            self._take(Stripe(gsn, self._inline.pack(frames)))
        elif not packing and size <= INLINE_BYTES_MAX and self.method.is_quick:
            packing.put(Stripe(gsn, self._inline.pack(frames)))
        else:
            packers = self._packers
            packing.run(lambda number: Stripe(gsn, packers[number].pack(frames)))
        self._sending = False

    def send(self, message: bytes) -> None:
        """Send a small message; it arrives as long as the session lasts."""
        try:
            self._mail.send(message)
        except QdsError as error:
            self.close(error.message)

    def close(self, reason: str) -> None:
        """End the session in order."""
        self._closed = True
        self._forget()
        for link in list(self._links):
            link.close(reason)

    def abort(self, reason: str) -> None:
        """End it at once."""
        self._closed = True
        self._forget()
        for link in list(self._links):
            link.abort(reason)

    def go_on(self) -> None:
        """Send what waits: there is room, or a limit lets more through."""
        if not self._closed and not self.ended:
            self._flush()
            if self.can_send:
                self._owner.link_writable(self)

    # -- for who looks after the paths --------------------------------------------------------

    def lost(self, link: Link) -> Deferred[str]:
        """Fire with the reason when a path is lost, which may be so already."""
        gone: Deferred[str] = Deferred()
        if link in self._links:
            self._links[link].append(gone)
        else:
            gone.callback("it was lost at once")
        return gone

    # -- stripes ------------------------------------------------------------------------------

    def _take(self, stripe: Stripe) -> None:
        """Send what is ready, after what was before it."""
        if self._closed or self.ended:
            return
        self._waiting.append(stripe)
        if self._several:
            self._unacknowledged.append(stripe)
        self._flush()
        if not self._sending and self.can_send:
            self._owner.link_writable(self)

    def _free(self, size: int) -> Link | None:
        """Choose a path that takes more: not one that would keep others waiting, nor the fullest.

        :param size: bytes that are to be sent.
        """
        links = [link for link in self._links if not link.ended]
        if len(links) > 1:
            links = [link for link in links if link not in self._slow] or links
        free = [link for link in links if link.can_send]
        if len(links) > 1 and free:
            now = self._reactor.seconds()
            paces = self._paces
            least = min(paces[link].seconds(size, now) for link in links)
            longest = max(least, PATH_STRIPE_SECONDS_MAX)
            free = [link for link in free if paces[link].seconds(size, now) <= longest]
        return min(free, key=lambda link: self._paces[link].under_way, default=None)

    def _good_links(self) -> Sequence[Link]:
        return sorted(self._links, key=self._slow.__contains__)

    def _flush(self) -> None:
        while self._waiting:
            if self._waiting[0].done:
                self._waiting.popleft()
                continue
            size = len(self._waiting[0].data)
            link = self._free(size)
            if link is None or (self._hold_back is not None and not self._hold_back.may_send()):
                break
            stripe = self._waiting.popleft()
            self._move(stripe, link)
            stripe.sent_at = self._reactor.seconds()
            self._wire.wire_bytes += size
            if self._hold_back is not None:
                self._hold_back.sent(size)
            link.send(stripe.data)
            if not link.can_send:
                self._paces[link].begun(stripe.sent_at, size)
        self._look_soon()

    def _move(self, stripe: Stripe, link: Link | None) -> None:
        """Note where a stripe is under way, for as long as it is."""
        if self._several:
            if stripe.link in self._paces:
                self._paces[stripe.link].under_way -= len(stripe.data)
            if link is not None:
                self._paces[link].under_way += len(stripe.data)
        stripe.link = link

    def _again(self, stripes: Sequence[Stripe]) -> None:
        """Send stripes again, in their place among what waits."""
        for stripe in stripes:
            self._move(stripe, None)
        self._waiting = deque(
            sorted((*stripes, *self._waiting), key=lambda stripe: stripe.gsn_last)
        )
        self._flush()

    def _take_ack(self, ack: Ack, message: Message) -> None:
        """Pass an ACK on, once, behind the letters that were written before it."""
        self._acknowledged(ack.committed)
        if self._several and (ack.committed, ack.mirrored) <= self._passed:
            return
        if ack.letters > self._mail.read:
            if self._early is None or self._early[0] < ack:
                self._early = ack, message
            return
        self._early = None
        self._passed = ack.committed, ack.mirrored
        self._owner.link_message(self, message)

    def _acknowledged(self, gsn: int) -> None:
        now = self._reactor.seconds()
        while self._unacknowledged and self._unacknowledged[0].gsn_last <= gsn:
            stripe = self._unacknowledged.popleft()
            stripe.done = True
            if stripe.link is not None and not stripe.twice:
                self._seconds += (now - stripe.sent_at - self._seconds) * _AVERAGE_WEIGHT
            self._move(stripe, None)

    # -- paths that keep others waiting -------------------------------------------------------

    def _look_soon(self) -> None:
        if self._look is None and len(self._links) > 1 and self._unacknowledged:
            self._look = self._reactor.callLater(PATH_LOOK_SECONDS, self._look_for_late)

    def _look_for_late(self) -> None:
        """Send what is late over another path too, if that one has nothing to do."""
        self._look = None
        self._flush()
        oldest = self._unacknowledged[0] if self._unacknowledged else None
        if oldest is None or oldest.link is None or oldest.twice:
            return
        patience = max(PATH_PATIENCE_SECONDS_MIN, PATH_PATIENCE * self._seconds)
        before = self._reactor.seconds() - patience
        if oldest.sent_at > before:
            return
        slow = oldest.link
        if not any(link.can_send for link in self._links if link not in {slow, *self._slow}):
            return
        self._slow.add(slow)
        late = [
            stripe
            for stripe in self._unacknowledged
            if stripe.link is slow and stripe.sent_at <= before and not stripe.twice
        ]
        for stripe in late:
            stripe.twice = True
        self._again(late)

    # -- ILinkOwner, of each path -------------------------------------------------------------

    def link_made(self, link: Link) -> None:
        """See :class:`ILinkOwner`."""
        if self._closed or self.ended:
            link.abort("its session is over")
            return
        first = not self._links
        self._links[link] = []
        self._paces[link] = Pace()
        if self._several:
            link.keep_unsent_short()
        if first:
            self._owner.link_made(self)
        else:
            self._flush()
            self._owner.link_writable(self)

    def link_message(self, link: Link, message: Message) -> None:
        """See :class:`ILinkOwner`."""
        if self._closed or self.ended:
            return
        self._slow.discard(link)
        try:
            if message.type == stream.ACK:
                self._take_ack(stream.parse_ack(message.payload), message)
            else:
                for one in self._mail.take(link, message):
                    self._owner.link_message(self, one)
                if self._early is not None:
                    self._take_ack(*self._early)
        except QdsError as error:
            self.log.error("session ended: {error}", error=error.message)
            self.close(error.message)

    def link_writable(self, link: Link) -> None:
        """See :class:`ILinkOwner`."""
        if link in self._paces:
            self._paces[link].drained(self._reactor.seconds())
        self.go_on()

    def link_lost(self, link: Link, reason: str) -> None:
        """See :class:`ILinkOwner`."""
        if link not in self._links:
            return
        waiting = self._links.pop(link)
        self._slow.discard(link)
        if not self._links:
            self.ended = True
            self._forget()
            self._owner.link_lost(self, reason)
        elif not self._closed:
            self._again([one for one in self._unacknowledged if one.link is link])
            self._mail.again()
        self._paces.pop(link, None)
        for gone in waiting:
            gone.callback(reason)

    def _broken(self, error: BaseException) -> None:
        self.close(f"frames could not be compressed: {error}")

    def _forget(self) -> None:
        if self._packing is not None:
            self._packing.forget()
        if self._look is not None and self._look.active():
            self._look.cancel()
        self._look = None
        self._waiting.clear()
        self._unacknowledged.clear()
