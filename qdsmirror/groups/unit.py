"""One LDSU in the driver: from a client's requests to frames, and from frames to the data device.

The way of a write (man page qdsmirror-architecture(7)): queued, framed and appended to the
writelog, answered (here); durable (:mod:`qdsmirror.groups.syncing`); on the data device
(:mod:`qdsmirror.groups.applying`).  In bypass they go another way (:mod:`qdsmirror.groups.direct`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.logger import Logger
from zope.interface import implementer

from qdsmirror.config import LdsuConfig
from qdsmirror.core import frames, nbd
from qdsmirror.core.allowance import SplitNumber
from qdsmirror.core.bitmap import DirtyBitmap
from qdsmirror.core.filling import FillRate
from qdsmirror.core.frames import ENTRY_BYTES, HEADER_BYTES
from qdsmirror.core.latency import LatencyHistogram
from qdsmirror.core.pending import PendingIndex
from qdsmirror.core.records import Cursor, Point
from qdsmirror.groups import bypass
from qdsmirror.groups.applying import Applying
from qdsmirror.groups.direct import Direct
from qdsmirror.groups.failures import DATA_DEVICE, WRITELOG
from qdsmirror.groups.framing import Framing, UnitFrame
from qdsmirror.groups.memory import Cover, MemorySyncing
from qdsmirror.groups.ownframes import OwnFrames
from qdsmirror.groups.reading import Reading
from qdsmirror.groups.syncing import Syncing
from qdsmirror.groups.waiting import WaitingRequests
from qdsmirror.interfaces import IBlockDevice, IExport, INbdConnection
from qdsmirror.storage.writelog import Writelog, Writes

if TYPE_CHECKING:
    from qdsmirror.core.nbd import Request
    from qdsmirror.core.watermark import Committed
    from qdsmirror.groups.driver import DriverGroup


@implementer(IExport)
class DriverUnit:
    """An LDSU: an NBD export over a data device and a writelog.

    :ivar log_failed: why the writelog is not used any more; empty while it is.
    :ivar dead: why the data device is not used any more; empty while it is.
    :ivar refusal: why every request is answered with an error; empty while none is.
    :ivar closed: why it is closed to applications, for a backfresh; empty while it is not.
    :ivar dirty: what was written past the writelog, by chunks.
    :ivar full_since: since when an application's write has waited for room (the reactor's seconds).
    :ivar fill_rate: of the writelog.
    :ivar latency: from the arrival of writes, trims and zeroes to their answers.
    :ivar requests: how many were submitted.
    :ivar appending: whether an append is under way.
    :ivar last_number: of the last entry that the application's frames had (see
        :class:`Answering`).
    :ivar durable_end: where the log is durable up to; ``applied_end``: what is before is applied
        and synced, for the whole group; ``committed_end``: ... is committed at the secondary.
    """

    log = Logger()
    read_only = False

    def __init__(
        self,
        group: DriverGroup,
        config: LdsuConfig,
        device: IBlockDevice,
        writelog: Writelog,
        reached: Cursor,
        dirty: DirtyBitmap,
    ) -> None:
        runtime = group.runtime
        self.group = group
        self.index = config.index
        self.config = config
        self.name = config.name
        self.device = device
        self.size = device.size
        self.minimum_block = device.logical_block
        self.preferred_block = max(4096, device.physical_block)
        self.writelog = writelog
        self.log_failed = self.dead = self.refusal = self.closed = ""
        self.connections: set[INbdConnection] = set()
        self.pending = PendingIndex()
        self.payload_cap = writelog.ring.payload_cap
        self._entries_cap = writelog.ring.entries_cap
        #: Space of the log that the application does not get (rules.md 14).
        self.kept_bytes = 0
        self._append_worker = runtime.quick_worker(f"{self.name} writelog")
        self._sync_worker = runtime.quick_worker(f"{self.name} commit")
        self._apply_worker = runtime.quick_worker(f"{self.name} data")
        self._read_worker = runtime.read_worker(f"{self.name} read")
        self.reading = Reading(self.name, device, self.pending, self._read_worker, group.note_error)
        self.dirty = dirty
        self.direct = Direct(self)
        self.full_since: float | None = None
        self.fill_rate = FillRate()
        self.latency = LatencyHistogram()
        self.requests = 0
        self.waiting = WaitingRequests(self.payload_cap, self._entries_cap, self.minimum_block)
        self.appending = False
        self.last_number = 0
        self._pumping = False
        self._pump_again = False
        self._leaving = False
        point = reached.point(self.index)
        self.framing = Framing(self, point)
        self.own_frames = OwnFrames(self)
        #: Of a writelog in memory.
        self.cover = Cover(self) if config.memory_bytes else None
        syncing = Syncing if self.cover is None else MemorySyncing
        self.syncing = syncing(self, self._sync_worker)
        self.applying = Applying(self, self._apply_worker, point.sequence - 1)
        self.durable_end = self.applied_end = writelog.head = reached.position
        self.durable_point = self.applied_point = point
        tail = writelog.superblock.tail
        self.committed_end = tail.position
        self.committed_point = tail.point(self.index)
        #: Every frame behind that place has a later GSN.  Not the group's committed GSN: a crash
        #: between two superblocks leaves tails of different age.
        self.committed_gsn = tail.gsn - 1

    @property
    def framed_point(self) -> Point:
        """Where the history stands behind the last frame made."""
        return self.framing.point

    # -- IExport ------------------------------------------------------------------------------

    def attach(self, connection: INbdConnection) -> None:
        """See :class:`IExport`."""
        self.connections.add(connection)

    def detach(self, connection: INbdConnection) -> None:
        """See :class:`IExport`."""
        self.connections.discard(connection)
        self.group.answering.forget(connection)

    def submit(self, requests: Sequence[Request]) -> None:
        """See :class:`IExport`."""
        past: list[Request] = []
        refusal = self.refusal or self.closed
        self.requests += len(requests)
        begun = self.latency, self.group.runtime.reactor.seconds()
        for request in requests:
            command = request.command
            if refusal:
                request.connection.answer_error(request, errno.EIO, refusal)
            elif command == nbd.CMD_READ:
                self.reading.read(request)
            elif command == nbd.CMD_BLOCK_STATUS:
                self.reading.block_status(request)
            elif self.group.bypass.phase == bypass.ON:
                request.state = 0
                if command != nbd.CMD_FLUSH:
                    request.begun = begun
                past.append(request)
            elif command != nbd.CMD_FLUSH:
                request.begun = begun
                self.waiting.add(request)
            elif self.group.bypass.phase == bypass.LEAVING:
                self.direct.held.append(request)
            else:
                self.syncing.flush(request)
        if past:
            self.direct.take(past)
        elif self.waiting:
            self.pump()

    # -- framing ------------------------------------------------------------------------------

    def pump(self) -> None:
        """Frame and append what is queued, a batch at a time, while the worker is free."""
        self._pump_again = True
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._pump_again:
                # Whoever makes room from within (a checkpoint that ends at once) asks again.
                self._pump_again = False
                while self.waiting and not self.appending and self.group.may_frame:
                    if not self._append_batch():
                        break
        finally:
            self._pumping = False

    def _append_batch(self) -> bool:
        """Make one frame of what is queued; tell whether there was room for it."""
        self.waiting.drop_dead()
        entries, finished, ends, taken, split = self.waiting.gather()
        if not entries:
            return False
        payload = sum(e.length for e in entries if e.payload is not None)
        placement = self.writelog.place(
            HEADER_BYTES + len(entries) * ENTRY_BYTES + payload, kept_bytes=self.kept_bytes
        )
        if placement is None:
            self.waiting.put_back(taken)
            if self._leaving:
                self.waiting.abandon_all()
            else:
                self.group.checkpoints.want_space()
                self.group.bypass.no_room(self)
            return False
        self.full_since = None
        frame, writes = self.framing.make(frames.ENTRIES, placement, entries)
        self.group.framed(frame)
        self.last_number = self.group.answering.last_number
        for request, end in zip(finished, ends, strict=True):
            request.state = self.last_number - len(entries) + end
        for request, before in split:
            # Where this is its beginning, it is the frame's last entry.
            first = before.first if isinstance(before, SplitNumber) else self.last_number
            request.state = SplitNumber(request.state, first)
        self.pending.add(entries)
        self.append(frame, writes, finished)
        return True

    def leave(self) -> None:
        """Wait for space no more: the driver stops, and clients ask again when it is back."""
        self._leaving = True
        self.pump()

    def append(self, frame: UnitFrame, writes: Writes, finished: Sequence[Request] = ()) -> None:
        """Append a frame to the writelog; no other append is under way.

        :param finished: requests that end in it.
        """
        self.appending = True
        append = partial(self.writelog.write, writes)
        self._append_worker.run(
            append if self.cover is None else self.cover.around(frame.entries, append),
            partial(self._was_appended, frame, finished),
        )

    def _was_appended(
        self,
        frame: UnitFrame,
        finished: Sequence[Request],
        _result: None,
        error: BaseException | None,
    ) -> None:
        self.appending = False
        self.syncing.take(frame)
        if error is not None or self.log_failed:
            frame.waiting.extend(finished)
            if error is not None:
                self.fail_log(error)
            self.own_frames.give_turns()
            self.group.bypass.poke()
            return
        answering = self.group.answering
        now: list[Request] = []
        for request in finished:
            if self.group.always_durable or request.flags & nbd.CMD_FLAG_FUA:
                frame.waiting.append(request)
                self.syncing.urgent = True
            else:
                now.append(request)
        if answering.is_prompt:
            self.syncing.urgent = True
        answering.give(self, now)
        self.syncing.go_on()
        self.own_frames.give_turns()
        self.pump()
        self.group.appended()

    def stand_behind(self, frame: UnitFrame) -> None:
        """Go on behind a frame that the start has recorded, durably; it holds nothing to apply."""
        self.durable_end = self.applied_end = frame.end
        self.durable_point = self.applied_point = frame.next_point
        self.applying.applied_sequence = self.applying.synced_sequence = frame.sequence

    # -- the rooms ------------------------------------------------------------------------------

    def became_durable(self, durable: Sequence[UnitFrame]) -> None:
        """Learn that frames are durable, and may be applied."""
        for frame in durable:
            frame.durable = True
        self.durable_end = durable[-1].end
        self.durable_point = durable[-1].next_point
        self.applying.take(durable)

    def committed(self, gsn: int, end: Committed) -> None:
        """Learn where the part of the log ends that the secondary has committed."""
        if self.committed_end <= end.position <= self.durable_end:
            self.committed_end = end.position
            self.committed_point = end.point
            self.committed_gsn = max(gsn, self.committed_gsn)

    @property
    def has_frames(self) -> bool:
        """Whether a frame is under way that is not yet applied."""
        return self.appending or self.syncing.has_frames or self.applying.busy

    @property
    def is_on_log(self) -> bool:
        """Whether the writelog's device is at work on a frame."""
        return self.appending or self.syncing.running

    @property
    def busy(self) -> bool:
        """Whether something accepted is not yet applied."""
        return not self.refusal and (
            self.waiting.any
            or self.syncing.has_late
            or self.has_frames
            or self.direct.busy
        )  # fmt: skip

    def run_on_log(
        self, job: Callable[[], None], done: Callable[[None, BaseException | None], None]
    ) -> None:
        """Run a job that writes and syncs the writelog's device."""
        self._sync_worker.run(job, done)

    def run_on_bitmap(
        self, job: Callable[[], None], done: Callable[[None, BaseException | None], None]
    ) -> None:
        """Run a job that writes the dirty bitmap: in turn with all others that do."""
        worker = self._sync_worker if self.cover is None else self._append_worker
        worker.run(job, done)

    def run_on_data(
        self, job: Callable[[], None], done: Callable[[None, BaseException | None], None]
    ) -> None:
        """Run a job that writes the data device."""
        self._apply_worker.run(job, done)

    def update_superblock(
        self, changes: dict[str, Any], done: Callable[[BaseException | None], None]
    ) -> None:
        """Write both slots of the writelog's superblock with these changes, durably."""
        update = partial(self.writelog.update, both=True, **changes)
        self.run_on_log(update, lambda _result, error: done(error))

    # -- refresh ------------------------------------------------------------------------------

    @property
    def spare_bytes(self) -> int:
        """What an empty log has beside the application's largest frame."""
        largest = HEADER_BYTES + self._entries_cap * ENTRY_BYTES + self.payload_cap
        return self.writelog.spare_bytes(largest)

    def lock(self, offset: int, length: int) -> None:
        """Hold back writes to a range until :meth:`unlock` (rules.md 14)."""
        self.waiting.lock(offset, length)

    def unlock(self) -> None:
        """Let the writes go on that were held back, in their order."""
        self.waiting.unlock()
        self.pump()

    # -- failures and the end -------------------------------------------------------------------

    def fail_log(self, error: BaseException) -> None:
        """Learn that the writelog has failed: see :class:`Failures`."""
        self.group.failures.happened(self, WRITELOG, error)

    def fail_data(self, error: BaseException) -> None:
        """Learn that the data device has failed: see :class:`Failures`."""
        self.group.failures.happened(self, DATA_DEVICE, error)

    @property
    def errors(self) -> list[str]:
        """What has failed, for ``qdsinfo``; empty while all is well."""
        return [reason for reason in (self.log_failed, self.dead) if reason]

    @property
    def unlogged(self) -> bool:
        """Whether it is durable that nothing is lost with the failed writelog: writes go past."""
        recorded = self.group.failures.recorded.untrusted.get(self.index)
        return recorded is not None and recorded.drained

    @property
    def exempt(self) -> bool:
        """Whether it is durable that the data device is dead: nothing waits for it any more."""
        return self.index in self.group.failures.recorded.dead

    @property
    def dirty_bytes(self) -> int:
        """What was written past the writelog; everything, where nobody knows."""
        return self.size if self.unlogged else self.dirty.dirty_bytes()

    def refuse(self, reason: str) -> None:
        """Answer what waits, and all that comes, with an error (invariant LOUD)."""
        if self.refusal:
            return
        self.refusal = reason
        late = self.group.answering.drop(self)
        for request in (*late, *self.syncing.drop(), *self.waiting.drop(), *self.direct.drop()):
            request.connection.answer_error(request, errno.EIO, reason)

    def close_export(self, reason: str) -> None:
        """Close the LDSU to applications: what waits is refused, and its clients are cut off.

        :param reason: what whoever asks is told.
        """
        self.closed = reason
        late = self.group.answering.drop(self)
        for request in (*late, *self.waiting.drop(), *self.direct.drop()):
            request.connection.answer_error(request, errno.EIO, reason)
        for connection in list(self.connections):
            connection.abandon([])

    def open_export(self) -> None:
        """Open it to applications again."""
        self.closed = ""

    def stand_at(self, place: Cursor) -> None:
        """Go on from another place of a history; nothing is under way."""
        point = place.point(self.index)
        self.framing.sequence, self.framing.chain = point
        self.durable_end = self.applied_end = self.committed_end = place.position
        self.durable_point = self.applied_point = self.committed_point = point
        self.committed_gsn = place.gsn - 1
        self.applying.applied_sequence = self.applying.synced_sequence = point.sequence - 1

    def write_past_log(self) -> None:
        """Write to the data device what the failed writelog was to hold, in order (rules.md 13)."""
        self.applying.take(self.syncing.hand_on())
        self.applying.go_on()

    def close(self) -> list[Any]:
        """Stop the workers; the devices are closed by the group.

        :returns: the workers' Deferreds.
        """
        self.syncing.stop()
        workers = (self._append_worker, self._sync_worker, self._apply_worker, self._read_worker)
        return [worker.stop() for worker in workers]
