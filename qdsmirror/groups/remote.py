"""RemoteGroup: a group's remote mirror daemon, its one writer at the secondary (rules.md 17).

What arrives is checked, appended to the secondary journal, made durable, acknowledged, and applied
to the mirror devices in order.  A newer authenticated connection supersedes an older one; where it
goes on is what is durable in the journal then.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.internet.protocol import Factory
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOFactory
from zope.interface import implementer

from qdsmirror.config import GroupConfig, HostConfig, load_secret
from qdsmirror.core import stream
from qdsmirror.core.frames import control_payload
from qdsmirror.core.generations import grown
from qdsmirror.core.inbound import Intake
from qdsmirror.core.records import Cursor, Generation, Point
from qdsmirror.core.ring import Placement
from qdsmirror.core.stream import Message
from qdsmirror.errors import (
    BrokenError,
    ConfigError,
    DeviceFailedError,
    IdentityError,
    ProtocolError,
    QdsError,
)
from qdsmirror.groups.authority import Authority
from qdsmirror.groups.remote_status import remote_status
from qdsmirror.groups.runtime import Runtime
from qdsmirror.interfaces import IGroup, IWorker
from qdsmirror.limits import (
    RECEIVED_BYTES_MAX,
    UNAUTHENTICATED_MAX,
    UNMIRRORED_BYTES_MAX,
)
from qdsmirror.net.handshake import (
    RebasePosition,
    RemoteHandshake,
    UnitPosition,
)
from qdsmirror.net.link import ILinkOwner, Link
from qdsmirror.paths import Paths
from qdsmirror.storage.journal import Change, Mirror
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.writelog import Writes

_ERRORS_KEPT = 8


class _Received:
    """A checked frame on its way; ``end`` is known once it is placed in the journal.

    :ivar brings: the generation that begins with it.
    """

    __slots__ = ("brings", "change", "end", "frame", "points")

    def __init__(self, change: Change, frame: bytes | bytearray | memoryview) -> None:
        self.change = change
        self.frame = frame
        self.end = 0
        self.brings: Generation | None = None
        self.points: dict[int, Point] = {}


@implementer(IGroup, ILinkOwner)
class RemoteGroup:
    """The remote mirror daemon of one group.

    :ivar committed_gsn: durable in the journal; ``mirrored_gsn``: on the mirror devices.
    :ivar since: when the link's state was entered, seconds since 1970.
    :ivar notes: the last errors, for ``qdsinfo``.
    :ivar unmirrored_bytes: durable in the journal and not yet on the mirror devices.
    :ivar epoch: counts what invalidates positions that a handshake was told.
    """

    log = Logger()

    def __init__(
        self,
        config: GroupConfig,
        host: HostConfig,
        paths: Paths,
        reactor: Any,
        runtime: Runtime | None = None,
        latch: FailureLatch | None = None,
    ) -> None:
        self.config = config
        self.host = host
        self.paths = paths
        self.number = config.number
        self.name = config.name
        self.runtime = runtime or Runtime.real(reactor)
        self._reactor = self.runtime.reactor
        self._latch = latch or FailureLatch(paths.state_file(config.number))
        self.secret = b""
        self.mirror: Mirror | None = None
        self.epoch = 0
        self.committed_gsn = self.mirrored_gsn = 0
        self.failed = ""
        self.link_state: dict[str, Any] = {"state": "stopped", "code": 0, "reason": ""}
        self.since = self.runtime.wall()
        self.notes: deque[str] = deque(maxlen=_ERRORS_KEPT)
        self._intake: Intake | None = None
        self._durable = Cursor()
        self._journal_worker: IWorker
        self._mirror_worker: IWorker
        self._link: Link | None = None
        self._handshakes = 0
        self._received: deque[_Received] = deque()
        self._received_bytes = 0
        self._journaling = False
        self._journal_full = False
        self._ack_wanted = False
        self._to_mirror: deque[_Received] = deque()
        self.unmirrored_bytes = 0
        self._mirroring = False
        self._checkpointing = False
        self._paused = False
        self._entries_at_checkpoint = 0
        self._timer: Any = None
        self._idle: list[Deferred[None]] = []

    # -- life ---------------------------------------------------------------------------------

    @inlineCallbacks
    def start(self) -> Any:
        """Open and lock everything, replay the journal, then take connections."""
        self.secret = load_secret(self.paths, self.number)
        self._latch.check(
            (self.config.journal_device, *(ldsu.mirror_device for ldsu in self.config.ldsus))
        )
        self.runtime.server_tls(self.host, self.config.primary_host)
        pool = self._reactor.getThreadPool()
        mirror: Mirror = yield deferToThreadPool(
            self._reactor, pool, Mirror.open, self.config, self.runtime.open_device
        )
        try:
            replayed = yield deferToThreadPool(self._reactor, pool, mirror.replay)
        except BaseException:
            mirror.close()
            raise
        for text in mirror.told:
            self.log.error("{group}: {text}", group=self.name, text=text)
        if replayed:
            self.log.info(
                "{group}: replayed {count} frames of the journal", group=self.name, count=replayed
            )
        self.mirror = mirror
        self._journal_worker = self.runtime.quick_worker(f"{self.name} journal")
        self._mirror_worker = self.runtime.quick_worker(f"{self.name} mirror")
        self._stand_at(mirror.applied)
        self._say("connecting", "waiting for the primary")
        self._tick()

    def _stand_at(self, cursor: Cursor) -> None:
        """Take a place as the end of what is durable, applied and expected next."""
        assert self.mirror is not None
        self.epoch += 1
        self._durable = cursor
        self.committed_gsn = self.mirrored_gsn = cursor.gsn - 1
        self._new_intake()

    def _new_intake(self) -> None:
        assert self.mirror is not None
        generations = self.mirror.journal.superblock.generations
        sizes = [unit.size for unit in self.mirror.journal.superblock.units]
        self._intake = Intake(self._durable, sizes, generations)

    @inlineCallbacks
    def stop(self) -> Any:
        """End the link, commit and apply what has arrived, close the devices."""
        if self.mirror is None:
            return
        self._drop_link("the remote mirror daemon was stopped")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._journal()
        yield self._quiet()
        if not self.failed:
            self._checkpoint()
            yield self._quiet()
        yield gatherResults([self._journal_worker.stop(), self._mirror_worker.stop()])
        if not self.failed:
            yield self._leave_devices()
        mirror, self.mirror = self.mirror, None
        mirror.close()
        self._say("stopped", "the rmd was stopped")

    def _leave_devices(self) -> Deferred[None]:
        assert self.mirror is not None
        pool = self._reactor.getThreadPool()
        done: Deferred[None] = deferToThreadPool(self._reactor, pool, self.mirror.seal)
        return done.addErrback(
            lambda failure: self.log.warn(
                "{group}: changes made while it is stopped will not be noticed: {why}",
                group=self.name, why=failure.getErrorMessage(),
            )
        )  # fmt: skip

    @property
    def _busy(self) -> bool:
        return (
            self._journaling
            or self._mirroring
            or self._checkpointing
            or bool(not self.failed and (self._received or self._to_mirror))
        )

    def _quiet(self) -> Deferred[None]:
        """Fire when nothing that was received is under way."""
        quiet: Deferred[None] = Deferred()
        self._idle.append(quiet)
        self._note_idle()
        return quiet

    def _note_idle(self) -> None:
        if self._idle and not self._busy:
            waiting, self._idle = self._idle, []
            for quiet in waiting:
                quiet.callback(None)

    def _tick(self) -> None:
        self._timer = self._reactor.callLater(self.config.tunables.metadata_seconds, self._tick)
        self._checkpoint()

    def _say(self, state: str, reason: str, code: int = 0) -> None:
        if state != self.link_state["state"]:
            self.since = self.runtime.wall()
        self.link_state = {"state": state, "code": code, "reason": reason}

    # -- connections --------------------------------------------------------------------------

    def adopt(self, fd: int, ended: Callable[[], None] = lambda: None) -> None:
        """Take an accepted connection: TLS and authentication happen here.

        :param fd: a connected TCP socket; closed here.
        :param ended: called once, when its handshake has succeeded or come to nothing.
        """
        with socket.socket(fileno=fd) as accepted:
            handshake = self.handshake(ended)
            if handshake is None:
                ended()
                return
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            factory = Factory.forProtocol(lambda: handshake)
            factory.noisy = False
            tls = TLSMemoryBIOFactory(
                self.runtime.server_tls(self.host, self.config.primary_host), False, factory
            )
            tls.noisy = False
            self._reactor.adoptStreamConnection(accepted.fileno(), accepted.family, tls)

    def handshake(self, ended: Callable[[], None] = lambda: None) -> RemoteHandshake | None:
        """Make the protocol of an accepted connection, to go inside TLS.

        :param ended: as for :meth:`adopt`; not called where nothing is made.
        :returns: ``None`` while no more are taken.
        """
        if self.mirror is None or self._handshakes >= UNAUTHENTICATED_MAX:
            return None
        self._handshakes += 1
        authority = Authority(self, partial(self._handshake_ended, ended))
        return RemoteHandshake(authority, self._reactor)

    def _handshake_ended(self, ended: Callable[[], None]) -> None:
        self._handshakes -= 1
        ended()

    def refused(self, error: QdsError) -> None:
        """Learn why a connection did not become a stream."""
        refused = isinstance(error, (IdentityError, ConfigError, BrokenError))
        note = f"refused: {error.message}" if refused else error.message
        if note not in self.notes:
            self.notes.append(note)
        if self._link is not None or self.failed:
            # With a failed device every connection is refused, for that reason only.
            return
        if refused:
            self._say("refused", error.message, error.exit_code)
        else:
            # A connection that broke says nothing about the next one.
            self._say("connecting", error.message)

    def supersede(self) -> None:
        """End the present session: an authenticated peer is about to begin another.

        :raises ProtocolError: what the old one sent is being committed; the peer tries again.
        """
        self._drop_link("superseded by a newer connection")
        if self._journaling:
            raise ProtocolError("the last session's frames are being committed; try again")
        if self.failed:
            raise DeviceFailedError(self.failed, hint="see qdsinfo on the secondary")
        # What was received and not made durable counts as never received.
        self._received.clear()
        self._received_bytes = 0
        self._new_intake()

    def position(self, index: int) -> UnitPosition:
        """Give where an LDSU's durable history ends."""
        assert self.mirror is not None
        sequence, chain = self._durable.point(index)
        return UnitPosition(
            index, self.mirror.journal.superblock.generation, sequence, chain, self._durable.gsn
        )

    @inlineCallbacks
    def rebase(self, positions: Sequence[RebasePosition]) -> Any:
        """Replace the history: durably incoherent, then the new place (rules.md 7)."""
        mirror = self.mirror
        assert mirror is not None
        yield self._quiet()
        first = positions[0]
        self.log.warn(
            "{group}: a full refresh replaces the history of generation {old}",
            group=self.name, old=first.predecessor.hex() or "(none)",
        )  # fmt: skip
        cursor = Cursor(
            mirror.journal.head,
            first.next_gsn,
            {p.index: Point(p.next_sequence, p.chain) for p in positions},
        )
        yield deferToThreadPool(
            self._reactor,
            self._reactor.getThreadPool(),
            lambda: mirror.mark_incoherent(
                first.refresh_id,
                generations=(Generation(first.generation, first.next_gsn),),
                tail=cursor,
                applied=cursor,
                head=cursor,
                durable_gsn=first.next_gsn - 1,
            ),
        )
        mirror.applied = cursor
        self._stand_at(cursor)

    def _drop_link(self, reason: str) -> None:
        link, self._link = self._link, None
        if link is not None:
            self.epoch += 1
            link.close(reason)

    # -- ILinkOwner ---------------------------------------------------------------------------

    def link_made(self, link: Link) -> None:
        """See :class:`ILinkOwner`."""
        self._drop_link("superseded by a newer connection")
        self._link = link
        self._paused = False
        self._say("connected", "")
        self.log.info("{group}: connected", group=self.name)
        self._ack()

    def link_message(self, link: Link, message: Message) -> None:
        """See :class:`ILinkOwner`."""
        if link is not self._link or self._intake is None:
            return
        if message.type != stream.FRAME:
            raise ProtocolError(f"the primary sent a message of type {message.type}")
        self._check_fits(len(message.payload))
        known = self._intake.generations
        header, entries = self._intake.check(message.payload)
        control = b"" if entries else control_payload(header, message.payload)
        received = _Received(Change(header, entries, control), message.payload)
        if self._intake.generations != known:
            received.brings = self._intake.generations[-1]
        self._received.append(received)
        self._received_bytes += len(message.payload)
        if message.flags & stream.ACK_REQUESTED:
            self._ack_wanted = True
        self._press()
        # The whole of what a buffer brought is journaled at once: one sync for all of it.
        if self._ack_wanted or self._received_bytes > RECEIVED_BYTES_MAX // 4:
            self._journal()

    def _check_fits(self, frame_bytes: int) -> None:
        """Check that the empty journal takes a frame, wherever its head stands.

        :raises BrokenError: it does not, so it would be waited for without end.
        """
        assert self.mirror is not None
        journal = self.mirror.journal
        if not journal.takes(frame_bytes):
            raise BrokenError(
                f"journal {self.config.journal_device} of {journal.ring.size} bytes is too small "
                f"for the primary's frames of {frame_bytes} bytes",
                hint="give a larger journal, initialise it with qdswlinit, and refresh",
            )

    def link_writable(self, link: Link) -> None:
        """See :class:`ILinkOwner`."""

    def link_lost(self, link: Link, reason: str) -> None:
        """See :class:`ILinkOwner`."""
        if link is self._link:
            self._link = None
            self.epoch += 1
            self._say("connecting", reason)
            self.log.info("{group}: link lost: {reason}", group=self.name, reason=reason)
            self._journal()

    def _press(self) -> None:
        """Pause or resume the peer as what is under way grows or shrinks (BOUND)."""
        full = (
            self._received_bytes > RECEIVED_BYTES_MAX
            or self.unmirrored_bytes > UNMIRRORED_BYTES_MAX
        )
        if full != self._paused and self._link is not None:
            self._paused = full
            if full:
                self._link.pause_reading()
            else:
                self._link.resume_reading()

    # -- journal ------------------------------------------------------------------------------

    def _journal(self) -> None:
        """Append what has arrived to the journal, and make it durable."""
        if self._journaling or not self._received or self.failed or self.mirror is None:
            return
        journal = self.mirror.journal
        writes: Writes = []
        batch: list[_Received] = []
        generations = known = journal.superblock.generations
        while self._received:
            received = self._received[0]
            more: tuple[Generation, ...] | None = generations
            if received.brings is not None:
                applied = journal.superblock.applied.gsn - 1
                more = grown(generations, received.brings, applied)
            placement: Placement | None = None
            if more is not None:
                placement = journal.place(len(received.frame))
            if more is None or placement is None:
                self._journal_full = True
                break
            generations = more
            self._received.popleft()
            received.end = placement.end
            writes += journal.record(
                placement, len(received.frame), [received.frame], self._durable.position
            )
            batch.append(received)
        if not batch:
            self._checkpoint()
            return
        self._journaling = True

        def job() -> None:
            if generations != known:
                # A scan must know a generation by the time it meets its first frame.
                journal.update(both=True, generations=generations)
            journal.write(writes)
            journal.sync()

        self._journal_worker.run(job, partial(self._journaled, batch))

    def _journaled(
        self, batch: list[_Received], _result: None, error: BaseException | None
    ) -> None:
        self._journaling = False
        if error is not None:
            self._fail(f"journal {self.config.journal_device} failed: {error}", error)
            return
        points = dict(self._durable.points)
        size = 0
        for received in batch:
            header = received.change.header
            points[header.ldsu] = Point(header.sequence + 1, header.chain)
            size += len(received.frame)
        last = batch[-1]
        last.points = points
        self._durable = Cursor(last.end, last.change.header.gsn_last + 1, points)
        self.committed_gsn = last.change.header.gsn_last
        self._received_bytes -= size
        self.unmirrored_bytes += size
        self._to_mirror.extend(batch)
        if self._ack_wanted:
            # What came meanwhile and asked for one is in the next batch.
            self._ack_wanted = bool(self._received)
            self._ack()
        self._press()
        self._apply()
        self._journal()
        self._note_idle()

    def _ack(self) -> None:
        if self._link is not None:
            self._link.send(stream.pack_ack(self.committed_gsn, self.mirrored_gsn))

    # -- mirror devices -----------------------------------------------------------------------

    def _apply(self) -> None:
        if self._mirroring or not self._to_mirror or self.failed or self.mirror is None:
            return
        self._mirroring = True
        batch = list(self._to_mirror)
        self._to_mirror.clear()
        changes = [received.change for received in batch]
        self._mirror_worker.run(partial(self.mirror.apply, changes), partial(self._applied, batch))

    def _applied(self, batch: list[_Received], _result: None, error: BaseException | None) -> None:
        self._mirroring = False
        if error is not None or self.mirror is None:
            self._fail(f"a mirror device of {self.name} failed: {error}", error)
            return
        last = batch[-1]
        # Batches end where journal batches end, so the last frame knows every LDSU's point.
        self.mirror.applied = Cursor(last.end, last.change.header.gsn_last + 1, last.points)
        self.mirrored_gsn = last.change.header.gsn_last
        self.unmirrored_bytes -= sum(len(received.frame) for received in batch)
        self._press()
        self._apply()
        if not self._mirroring:
            self._ack()
        done = self.mirrored_gsn - self._entries_at_checkpoint
        ring = self.mirror.journal.ring.size
        if (
            self._journal_full
            or done > self.config.tunables.metadata_entries
            or self.mirror.journal.used_bytes > ring // 2
        ):
            self._checkpoint()
        self._note_idle()

    def _checkpoint(self) -> None:
        """Sync the mirror devices and free what the journal held for them."""
        mirror = self.mirror
        if self._checkpointing or self.failed or mirror is None:
            return
        upto = mirror.applied
        if upto.position == mirror.journal.superblock.applied.position:
            return
        self._checkpointing = True
        self._entries_at_checkpoint = self.mirrored_gsn
        self._mirror_worker.run(partial(mirror.checkpoint, upto, self._durable), self._checkpointed)

    def _checkpointed(self, _result: None, error: BaseException | None) -> None:
        self._checkpointing = False
        if error is not None:
            self._fail(f"a mirror device or the journal of {self.name} failed: {error}", error)
            return
        self._journal_full = False
        self._journal()
        self._note_idle()

    def _fail(self, reason: str, error: BaseException | None) -> None:
        """Latch a failure: nothing is acknowledged any more (LOUD)."""
        self.failed = self.failed or reason
        self.notes.append(reason)
        if isinstance(error, DeviceFailedError):
            try:
                self._latch.record(error.path, error)
            except QdsError as cause:
                self.notes.append(cause.message)
        self.log.error("{group}: {reason}", group=self.name, reason=reason)
        self._drop_link(reason)
        self._say("refused", reason, DeviceFailedError.exit_code)
        self._note_idle()

    # -- status -------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """See :class:`IGroup`."""
        return remote_status(self, os.getpid())
