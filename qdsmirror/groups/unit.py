"""One LDSU in the driver: from a client's requests to frames, and from frames to the data device.

The way of a write (man page qdsmirror-architecture(7)): queued, framed and appended to the
writelog, answered, durable by the committer, applied to the data device.  A frame is applied only
after it is durable (invariant NO-HIDDEN).
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from zope.interface import implementer

from qdsmirror.config import LdsuConfig
from qdsmirror.core import frames, nbd
from qdsmirror.core.bitmap import DirtyBitmap
from qdsmirror.core.frames import ENTRY_BYTES, HEADER_BYTES, Entry
from qdsmirror.core.pending import PendingIndex
from qdsmirror.core.records import Cursor, Point
from qdsmirror.groups import bypass
from qdsmirror.groups.direct import Direct, answer_all
from qdsmirror.groups.framing import Framing, UnitFrame
from qdsmirror.groups.reading import Reading
from qdsmirror.groups.waiting import WaitingRequests
from qdsmirror.interfaces import IBlockDevice, IExport, INbdConnection
from qdsmirror.limits import (
    COMMIT_DELAY_SECONDS,
    COMMIT_INTERVAL_SECONDS,
)
from qdsmirror.storage.apply import apply_entries
from qdsmirror.storage.bitmap import write_blocks
from qdsmirror.storage.writelog import Writelog, Writes

if TYPE_CHECKING:
    from qdsmirror.core.nbd import Request
    from qdsmirror.core.watermark import Committed
    from qdsmirror.groups.driver import DriverGroup


@implementer(IExport)
class DriverUnit:
    """An LDSU: an NBD export over a data device and a writelog.

    :ivar errors: what has failed, for ``qdsinfo``; empty while all is well.
    :ivar refusal: why every request is answered with an error; empty while none is.
    :ivar log_failed: why the writelog is not used any more; empty while it is.
    :ivar unlogged: the failed writelog is durably recorded as such: writes go past it.
    :ivar dead: the data device has failed; ``exempt``: that is durable, so nothing waits for it.
    :ivar dirty: what was written past the writelog, by chunks.
    :ivar full_since: since when an application's write has waited for room (the reactor's seconds).
    """

    log = Logger()

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
        self.errors: list[str] = []
        self.refusal = self.log_failed = ""
        self.unlogged = self.dead = self.exempt = False
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
        self.waiting = WaitingRequests(self.payload_cap, self._entries_cap, self.minimum_block)
        self._appending = False
        self._turns: deque[Callable[[], None]] = deque()
        self._pumping = False
        self._pump_again = False
        self._committing = False
        self._commit_call: Any = None
        self._committed_at = 0.0
        self._applying = False
        self._appended: deque[UnitFrame] = deque()
        self._durable: deque[UnitFrame] = deque()
        self._flushes: deque[tuple[int, Request]] = deque()
        #: Answered once what a failed writelog was to hold is safe.
        self._late: list[Request] = []
        self._urgent = False
        self._leaving = False
        self._reset(reached)

    @property
    def framed_point(self) -> Point:
        """Where the history stands behind the last frame made."""
        return self._framing.point

    def _reset(self, cursor: Cursor) -> None:
        """Stand at the end of what recovery found."""
        point = cursor.point(self.index)
        self._framing = Framing(self, point)
        self.durable_end = cursor.position
        self.durable_point = point
        self.applied_sequence = point.sequence - 1
        self.synced_sequence = point.sequence - 1
        #: Everything before is applied and synced, for the whole group.
        self.applied_end = cursor.position
        self.applied_point = point
        #: Everything before is committed at the secondary.
        tail = self.writelog.superblock.tail
        self.committed_end = tail.position
        self.committed_point = tail.point(self.index)
        #: Every frame behind that place has a later GSN.  Not the group's committed GSN: a crash
        #: between two superblocks leaves tails of different age.
        self.committed_gsn = tail.gsn - 1
        self.writelog.head = cursor.position

    # -- IExport ------------------------------------------------------------------------------

    def attach(self, connection: INbdConnection) -> None:
        """See :class:`IExport`."""
        self.connections.add(connection)

    def detach(self, connection: INbdConnection) -> None:
        """See :class:`IExport`."""
        self.connections.discard(connection)

    def submit(self, requests: Sequence[Request]) -> None:
        """See :class:`IExport`."""
        past: list[Request] = []
        for request in requests:
            command = request.command
            if self.refusal:
                request.connection.answer_error(request, errno.EIO, self.refusal)
            elif command == nbd.CMD_READ:
                self.reading.read(request)
            elif command == nbd.CMD_BLOCK_STATUS:
                self.reading.block_status(request)
            elif self.group.bypass.phase == bypass.ON:
                request.state = 0
                past.append(request)
            elif command != nbd.CMD_FLUSH:
                self.waiting.add(request)
            elif self.group.bypass.phase == bypass.LEAVING:
                self.direct.held.append(request)
            else:
                self._flush(request)
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
                while self.waiting and not self._appending and self.group.may_frame:
                    if not self._append_batch():
                        break
        finally:
            self._pumping = False

    def _append_batch(self) -> bool:
        """Make one frame of what is queued; tell whether there was room for it."""
        self.waiting.drop_dead()
        entries, finished, taken = self.waiting.gather()
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
        frame, writes = self._framing.make(frames.ENTRIES, placement, entries)
        self.group.framed(frame)
        self.pending.add(entries)
        self._append(frame, writes, finished)
        return True

    def leave(self) -> None:
        """Wait for space no more: the driver stops, and clients ask again when it is back."""
        self._leaving = True
        self.pump()

    def _append(self, frame: UnitFrame, writes: Writes, finished: Sequence[Request]) -> None:
        self._appending = True
        self._append_worker.run(
            partial(self.writelog.write, writes),
            partial(self._was_appended, frame, finished),
        )

    def _was_appended(
        self,
        frame: UnitFrame,
        finished: Sequence[Request],
        _result: None,
        error: BaseException | None,
    ) -> None:
        self._appending = False
        if error is not None:
            frame.waiting.extend(finished)
            self._appended.append(frame)
            self.fail("writelog", self.config.writelog_device, error)
            self._give_turns()
            self.group.bypass.poke()
            return
        self._appended.append(frame)
        if self.log_failed:
            frame.waiting.extend(finished)
            self._give_turns()
            self.group.bypass.poke()
            return
        now: dict[INbdConnection, list[Request]] = {}
        for request in finished:
            if self.group.always_durable or request.flags & nbd.CMD_FLAG_FUA:
                frame.waiting.append(request)
                self._urgent = True
            else:
                now.setdefault(request.connection, []).append(request)
        for connection, requests in now.items():
            connection.answer(requests)
        self._commit()
        self._give_turns()
        self.pump()
        self.group.appended()

    def when_free(self, turn: Callable[[], None]) -> None:
        """Call ``turn`` when no append is under way, before the application's next frame."""
        self._turns.append(turn)
        self._give_turns()

    def _give_turns(self) -> None:
        while self._turns and not self._appending:
            self._turns.popleft()()

    def append_control(self, kind: int, payload: bytes = b"") -> UnitFrame | None:
        """Append a control frame, from the reserve if need be (rules.md 9).

        To be called when no append is under way (see :meth:`when_free`).

        :returns: ``None`` while there is no room, or when a writelog has failed.
        """
        if self.group.failures.stops_framing:
            return None
        placement = self.writelog.place(HEADER_BYTES + len(payload), control=True)
        if placement is None:
            self.group.checkpoints.want_space()
            return None
        frame, writes = self._framing.make(kind, placement, (), [payload])
        self.group.framed(frame)
        self._urgent = True
        self._append(frame, writes, ())
        return frame

    def void_writes(self, first: int, count: int) -> Writes:
        """Give the writes that record a GSN range as lost (recovery only)."""
        return self._recovered(frames.VOID, b"", first, count)

    def switch_writes(self, predecessor: bytes) -> Writes:
        """Give the writes of the frame that begins a generation (recovery only; rules.md 7)."""
        return self._recovered(frames.SWITCH, predecessor, *self.group.take_gsns(1))

    def _recovered(self, kind: int, payload: bytes, first: int, count: int) -> Writes:
        placement = self.writelog.place(HEADER_BYTES + len(payload), control=True)
        assert placement is not None, "the reserve holds room for what recovery records"
        frame, writes = self._framing.make(kind, placement, (), [payload], (first, count))
        self.durable_end = self.applied_end = frame.end
        self.durable_point = self.applied_point = self._framing.point
        self.applied_sequence = self.synced_sequence = frame.sequence
        return writes

    def committed(self, gsn: int, end: Committed) -> None:
        """Learn where the part of the log ends that the secondary has committed."""
        if self.committed_end <= end.position <= self.durable_end:
            self.committed_end = end.position
            self.committed_point = end.point
            self.committed_gsn = max(gsn, self.committed_gsn)

    # -- bypass -------------------------------------------------------------------------------

    @property
    def has_frames(self) -> bool:
        """Whether a frame is under way that is not yet applied."""
        return bool(self._appending or self._appended or self._durable or self._applying)

    def hasten(self) -> None:
        """Make what is appended durable without waiting for company."""
        self._urgent = True
        self._commit()

    def clear_dirty(self) -> Deferred[None]:
        """Clear the dirty bitmap; fires when that is durable, or the LDSU has failed."""
        blocks = self.dirty.blocks(self.dirty.clear())
        cleared: Deferred[None] = Deferred()

        def done(_result: None, error: BaseException | None) -> None:
            if error is not None:
                self.fail("writelog", self.config.writelog_device, error)
            cleared.callback(None)

        self.run_on_log(partial(write_blocks, self.writelog.device, self.dirty.area, blocks), done)
        return cleared

    def run_on_log(
        self, job: Callable[[], None], done: Callable[[None, BaseException | None], None]
    ) -> None:
        """Run a job that writes and syncs the writelog's device."""
        self._sync_worker.run(job, done)

    def run_on_data(
        self, job: Callable[[], None], done: Callable[[None, BaseException | None], None]
    ) -> None:
        """Run a job that writes the data device."""
        self._apply_worker.run(job, done)

    def go_direct(self) -> None:
        """Write past the writelog what waits: the group is in bypass."""
        waiting = [*self.waiting.drop(), *self.direct.held]
        self.direct.held = []
        if waiting:
            self.direct.take(waiting)

    # -- refresh ------------------------------------------------------------------------------

    @property
    def is_locked(self) -> bool:
        """Whether a refresh that was ended still reads its last chunk."""
        return self.waiting.is_locked

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

    def append_chunk(self, offset: int, data: bytes | None, length: int) -> UnitFrame | None:
        """Append one refresh entry: ``data``, or zeroes where it is ``None``.

        To be called when no append is under way (see :meth:`when_free`).

        :returns: ``None`` while there is no room, or when the LDSU has failed.
        """
        if self.errors or self.group.failures.stops_framing:
            return None
        size = HEADER_BYTES + ENTRY_BYTES + (len(data) if data is not None else 0)
        placement = self.writelog.place(size)
        if placement is None:
            self.group.checkpoints.want_space()
            return None
        kind = frames.REFRESH_ZEROES if data is None else frames.REFRESH
        payload = None if data is None else memoryview(data)
        frame, writes = self._framing.make(
            frames.ENTRIES, placement, [Entry(offset, length, kind, payload)]
        )
        frame.entries = ()
        self.group.framed(frame)
        self._append(frame, writes, ())
        return frame

    # -- committing ---------------------------------------------------------------------------

    def _commit(self) -> None:
        """Make what is appended durable: at once if somebody waits, else in company."""
        if self._committing or not self._appended or self.log_failed:
            return
        if self._urgent or self.group.hurry:
            if self._commit_call is not None:
                self._commit_call.cancel()
                self._commit_call = None
            self._commit_now()
        elif self._commit_call is None:
            reactor = self.group.runtime.reactor
            since = reactor.seconds() - self._committed_at
            self._commit_call = reactor.callLater(
                max(COMMIT_DELAY_SECONDS, COMMIT_INTERVAL_SECONDS - since), self._commit_later
            )

    def _commit_later(self) -> None:
        self._commit_call = None
        if not self._committing and self._appended and not self.log_failed:
            self._commit_now()

    def _commit_now(self) -> None:
        self._committing = True
        self._urgent = False
        self._sync_worker.run(self.writelog.sync, partial(self._committed, len(self._appended)))

    def _committed(self, count: int, _result: None, error: BaseException | None) -> None:
        self._committing = False
        self._committed_at = self.group.runtime.reactor.seconds()
        if error is not None:
            self.fail("writelog", self.config.writelog_device, error)
            self.group.bypass.poke()
            return
        answers: dict[INbdConnection, list[Request]] = {}
        frame = None
        for _ in range(count):
            frame = self._appended.popleft()
            frame.durable = True
            self._durable.append(frame)
            for request in frame.waiting:
                answers.setdefault(request.connection, []).append(request)
            frame.waiting = []
        if frame is not None:
            self.durable_end = frame.end
            self.durable_point = frame.next_point
            while self._flushes and self._flushes[0][0] <= frame.sequence:
                request = self._flushes.popleft()[1]
                answers.setdefault(request.connection, []).append(request)
        for connection, requests in answers.items():
            connection.answer(requests)
        self.group.became_durable(self)
        self._apply()
        if self._flushes or any(f.waiting for f in self._appended):
            self._urgent = True
        self._commit()

    # -- applying -----------------------------------------------------------------------------

    def _apply(self) -> None:
        if self._applying or not self._durable or (self.dead and not self.exempt):
            return
        self._applying = True
        batch = list(self._durable)
        self._durable.clear()
        if self.exempt:
            self._applied(batch, None, None)
            return
        self._apply_worker.run(
            partial(apply_entries, self.device, [e for f in batch for e in f.entries]),
            partial(self._applied, batch),
        )

    def _applied(self, batch: list[UnitFrame], _result: None, error: BaseException | None) -> None:
        self._applying = False
        if error is not None:
            self._durable.extendleft(reversed(batch))
            self.fail("data device", self.config.data_device, error)
            self._apply()
            return
        for frame in batch:
            self.pending.remove(frame.entries)
            frame.entries = ()
            frame.applied = True
        self.applied_sequence = batch[-1].sequence
        if self.exempt:
            self.synced_sequence = self.applied_sequence
        self.group.was_applied(sum(frame.weight for frame in batch))
        self._apply()

    # -- reading ------------------------------------------------------------------------------

    def _flush(self, request: Request) -> None:
        if self.log_failed:
            self._flushes.append((self._framing.sequence - 1, request))
            return
        if not self._appended and not self._appending:
            request.connection.answer([request])
            return
        self._flushes.append((self._framing.sequence - 1, request))
        self._urgent = True
        self._commit()

    # -- checkpoints and the end ----------------------------------------------------------------

    def sync_data(self, done: Callable[[int, BaseException | None], None]) -> None:
        """Make what is applied durable on the data device.

        :param done: called with the last local sequence that this covers.
        """
        upto = self.applied_sequence
        self._apply_worker.run(self.device.fdatasync, lambda _result, error: done(upto, error))

    def update_superblock(
        self, changes: dict[str, Any], done: Callable[[BaseException | None], None]
    ) -> None:
        """Write both slots of the writelog's superblock with these changes, durably."""
        self._sync_worker.run(
            partial(self.writelog.update, both=True, **changes),
            lambda _result, error: done(error),
        )

    def fail(self, what: str, path: str, error: BaseException) -> None:
        """Latch a failure: see :class:`qdsmirror.groups.failures.Failures`."""
        self.group.failures.happened(self, what, path, error)

    def refuse(self, reason: str) -> None:
        """Answer what waits, and all that comes, with an error (invariant LOUD)."""
        if self.refusal:
            return
        self.refusal = reason
        waiting = [r for f in self._appended for r in f.waiting]
        waiting += [*self._late, *(r for _, r in self._flushes)]
        waiting += [*self.waiting.drop(), *self.direct.drop()]
        self._late.clear()
        self._flushes.clear()
        for frame in self._appended:
            frame.waiting = []
        for request in waiting:
            request.connection.answer_error(request, errno.EIO, reason)

    def be_exempt(self) -> None:
        """Count everything as applied: it is durable that the data device is dead (rules.md 16)."""
        self.exempt = True
        self.synced_sequence = self.applied_sequence
        self._apply()
        self.group.checkpoints.take()

    @property
    def dirty_bytes(self) -> int:
        """What was written past the writelog; everything, where nobody knows."""
        return self.size if self.unlogged else self.dirty.dirty_bytes

    @property
    def is_on_log(self) -> bool:
        """Whether the writelog's device is at work on a frame."""
        return self._appending or self._committing

    def write_past_log(self) -> None:
        """Write to the data device what the failed writelog was to hold, in order (rules.md 13)."""
        for frame in self._appended:
            self._late.extend(frame.waiting)
            frame.waiting = []
        self._durable.extend(self._appended)
        self._appended.clear()
        self._apply()

    def answer_drained(self) -> None:
        """Answer what waited for the failed writelog: all of it is safe without."""
        waiting = [*self._late, *(request for _, request in self._flushes)]
        self._late.clear()
        self._flushes.clear()
        answer_all(waiting)

    @property
    def busy(self) -> bool:
        """Whether something accepted is not yet applied."""
        return bool(
            not self.refusal
            and (self.waiting.any or self._late or self.has_frames or self.direct.busy)
        )  # fmt: skip

    def close(self) -> list[Any]:
        """Stop the workers; the devices are closed by the group.

        :returns: the workers' Deferreds.
        """
        if self._commit_call is not None:
            self._commit_call.cancel()
            self._commit_call = None
        workers = (self._append_worker, self._sync_worker, self._apply_worker, self._read_worker)
        return [worker.stop() for worker in workers]
