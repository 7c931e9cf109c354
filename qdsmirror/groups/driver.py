"""DriverGroup: a group's device driver at the primary.

It alone opens the group's data devices and writelogs, gives every entry its global sequence
number, and says what may be sent and which space may be reused.  Invariants kept here: NO-AHEAD
(only the group's contiguous durable GSN is announced), TAIL (the tail is the lesser of what is
committed and what is applied and synced), COHERENT, LOUD.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from zope.interface import implementer

from qdsmirror.config import GroupConfig, HostConfig
from qdsmirror.core.lag import LagClock
from qdsmirror.core.records import Cursor
from qdsmirror.core.states import Event, GroupModes, Mode
from qdsmirror.core.watermark import Committed
from qdsmirror.errors import DegradedError, DeviceFailedError, QdsError, UsageError
from qdsmirror.groups.attachment import DriverEnd
from qdsmirror.groups.driver_status import driver_status
from qdsmirror.groups.refresh import Refresh
from qdsmirror.groups.runtime import Runtime
from qdsmirror.groups.unit import DriverUnit, UnitFrame
from qdsmirror.interfaces import IGroup
from qdsmirror.limits import UNAPPLIED_BYTES_MAX
from qdsmirror.net.nbd import listen_nbd
from qdsmirror.paths import Paths
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.recovery import OpenUnit, close_units, judge, open_units, replay

_ERRORS_KEPT = 8


@implementer(IGroup)
class DriverGroup:
    """The driver's side of a group.

    :param nbd_listening_fd: the group's listening Unix socket, owned by the master.
    :ivar durable_gsn: every GSN up to this one is durable in its writelog.
    :ivar applied_gsn: every GSN up to this one is on the data devices, synced.
    :ivar committed_gsn: what the secondary has acknowledged; ``sent_gsn``, ``mirrored_gsn``
        likewise, ``None`` while no pmd has said so.
    """

    log = Logger()

    def __init__(
        self,
        config: GroupConfig,
        host: HostConfig,
        paths: Paths,
        reactor: Any,
        nbd_listening_fd: int,
        runtime: Runtime | None = None,
    ) -> None:
        self.config = config
        self.number = config.number
        self.name = config.name
        self.paths = paths
        self.runtime = runtime or Runtime.real(reactor)
        self.units: list[DriverUnit] = []
        self.always_durable = config.durability == "always"
        self.modes = GroupModes(self.runtime.wall())
        self.lag = LagClock()
        self.generation = b""
        self.coherent = False
        self.incoherent_reason = ""
        self.refresh_job: Refresh | None = None
        self.next_gsn = 1
        self.durable_gsn = self.applied_gsn = self.committed_gsn = 0
        self.sent_gsn: int | None = None
        self.mirrored_gsn: int | None = None
        self.link: dict[str, Any] = {"state": "stopped", "code": 0, "reason": ""}
        self.notes: deque[str] = deque(maxlen=_ERRORS_KEPT)
        self._latch = FailureLatch(paths.state_file(config.number))
        self._fd = nbd_listening_fd
        self._listener: Any = None
        self._serving = False
        self._unapplied_bytes = 0
        self._undurable: deque[UnitFrame] = deque()
        self._unapplied: deque[UnitFrame] = deque()
        self._checkpointing = False
        self._checkpoint_again = False
        self._wanting = False
        self._entries_at_checkpoint = 0
        self._timer: Any = None
        self._pmd: DriverEnd | None = None
        self._idle: list[Deferred[None]] = []

    # -- life ---------------------------------------------------------------------------------

    @inlineCallbacks
    def start(self) -> Any:
        """Recover every device, then serve the LDSUs."""
        for ldsu in self.config.ldsus:
            self._latch.check((ldsu.data_device, ldsu.writelog_device))
        pool = self.runtime.reactor.getThreadPool()
        opened: list[OpenUnit] = yield deferToThreadPool(
            self.runtime.reactor, pool, open_units, self.config, self.runtime.open_device
        )
        try:
            yield deferToThreadPool(self.runtime.reactor, pool, self._recover, opened)
            self._listener = listen_nbd(
                self.runtime.reactor, self._fd, {u.name: u for u in self.units}, self.runtime.budget
            )
        except BaseException:
            for unit in self.units:
                unit.close()
            close_units(opened)
            raise
        self._serving = True
        self.modes.happen(Event.DRIVER_STARTED, self.runtime.wall())
        if self.refresh_job is not None:
            self.modes.happen(Event.REFRESH_BEGUN, self.runtime.wall(), "resumed at start")
            self.refresh_job.poke()
        self._tick()

    def _recover(self, opened: Sequence[OpenUnit]) -> None:
        """Replay, record void ranges, and write every superblock (blocking)."""
        plan = judge(opened)
        for found in opened:
            replayed = replay(found)
            if replayed:
                self.log.info(
                    "{group} {unit}: replayed {count} frames",
                    group=self.name, unit=found.config.name, count=replayed,
                )  # fmt: skip
        superblocks = [unit.writelog.superblock for unit in opened]
        self.generation = superblocks[0].generation
        self.durable_gsn = self.applied_gsn = plan.next_gsn - 1
        self.committed_gsn = max(s.tail.gsn for s in superblocks) - 1
        self.next_gsn = plan.next_gsn
        self.units = [DriverUnit(self, u.config, u.device, u.writelog, u.reached) for u in opened]
        for void in plan.voids:
            self.log.warn(
                "{group}: GSN {first} to {last} were lost before they were durable; recorded as "
                "void", group=self.name, first=void.range.first, last=void.range.end - 1,
            )  # fmt: skip
            unit = self.units[void.ldsu]
            for offset, buffers in unit.void_writes(void.range.first, void.range.length):
                unit.writelog.device.pwritev(buffers, offset)
            unit.writelog.device.fdatasync()
        self.coherent = all(s.coherent for s in superblocks)
        self.incoherent_reason = next((s.reason for s in superblocks if s.reason), "")
        self.refresh_job = Refresh.resumed(self, [s.refresh for s in superblocks])
        if self.refresh_job is not None:
            self.coherent = False
        for unit in self.units:
            unit.writelog.update(both=True, **self._cursors(unit))
        self.lag.framed(self.committed_gsn + 1, self.runtime.reactor.seconds())

    @inlineCallbacks
    def stop(self) -> Any:
        """Answer what was accepted, make everything durable and applied, close the devices."""
        if not self._serving:
            return
        yield self._listener.stopListening()
        gone = self._listener.disconnect_all()
        if self.refresh_job is not None:
            self.refresh_job.stop()
        # With a full writelog they would wait for a secondary that may never come.
        for unit in self.units:
            unit.leave()
        yield gone
        while any(unit.busy for unit in self.units):
            idle: Deferred[None] = Deferred()
            self._idle.append(idle)
            yield idle
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        yield self._final_checkpoint()
        self._serving = False
        self.modes.happen(Event.DRIVER_STOPPED, self.runtime.wall())
        if self._pmd is not None:
            self._pmd.close()
        yield gatherResults([d for unit in self.units for d in unit.close()])
        for unit in self.units:
            unit.device.close()
            unit.writelog.device.close()

    def _final_checkpoint(self) -> Deferred[None]:
        finished: Deferred[None] = Deferred()
        self._idle.append(finished)
        self.checkpoint()
        return finished

    def _tick(self) -> None:
        self._timer = self.runtime.reactor.callLater(
            self.config.tunables.metadata_seconds, self._tick
        )
        self.checkpoint()

    # -- sequence numbers, and what the units tell ------------------------------------------------

    @property
    def may_frame(self) -> bool:
        """Whether more may be framed: what is not yet applied is bounded (BOUND)."""
        return self._unapplied_bytes < UNAPPLIED_BYTES_MAX and self._serving

    @property
    def hurry(self) -> bool:
        """Whether commits should not wait for company."""
        return self._unapplied_bytes > UNAPPLIED_BYTES_MAX // 4

    def take_gsns(self, count: int) -> tuple[int, int]:
        """Take the next global sequence numbers."""
        first = self.next_gsn
        self.next_gsn += count
        self.lag.framed(first, self.runtime.reactor.seconds())
        return first, count

    def framed(self, frame: UnitFrame) -> None:
        """Take a new frame into the group's order."""
        self._undurable.append(frame)
        self._unapplied.append(frame)
        self._unapplied_bytes += frame.weight

    def appended(self) -> None:
        """Learn that an append has ended."""
        if self.refresh_job is not None:
            self.refresh_job.poke()

    def became_durable(self, unit: DriverUnit) -> None:
        """Move the group's durable GSN over what is durable without a gap, and tell the pmd."""
        undurable = self._undurable
        before = self.durable_gsn
        while undurable and undurable[0].durable:
            self.durable_gsn = undurable.popleft().gsn_last
        if self._pmd is not None:
            self._pmd.durable(self.durable_gsn, unit)
        if self.refresh_job is not None and self.durable_gsn != before:
            self.refresh_job.became_durable(self.durable_gsn)

    def was_applied(self, weight: int) -> None:
        """Learn that frames of this many payload bytes are on their data device."""
        blocked = not self.may_frame
        self._unapplied_bytes -= weight
        if blocked and self.may_frame:
            for unit in self.units:
                unit.pump()
        if self._wanting or (
            self.next_gsn - self._entries_at_checkpoint > self.config.tunables.metadata_entries
        ):
            self.checkpoint()
        self._note_idle()

    def _note_idle(self) -> None:
        if self._idle and not self._checkpointing and not any(u.busy for u in self.units):
            waiting, self._idle = self._idle, []
            for idle in waiting:
                idle.callback(None)

    def note_error(self, text: str) -> None:
        """Keep an error for ``qdsinfo`` and the log."""
        self.notes.append(text)
        self.log.error("{group}: {text}", group=self.name, text=text)

    def unit_failed(self, path: str, reason: str, error: BaseException) -> None:
        """Learn that a device has failed; a failed sync is remembered for good (rules.md 4)."""
        self.notes.append(reason)
        try:
            self._latch.record(path, error)
        except QdsError as cause:
            self.note_error(cause.message)
        self._note_idle()

    # -- checkpoints: metadata, tail, space ----------------------------------------------------

    def want_space(self) -> None:
        """Learn that a writelog is full: free what can be freed, now or when an ACK allows it."""
        self._wanting = True
        if any(
            self._tail_end(unit) > unit.writelog.durable_tail
            or unit.applied_sequence > unit.synced_sequence
            for unit in self.units
            # A checkpoint leaves a failed one as it is: asking again would not end.
            if not unit.errors
        ):
            self.checkpoint()

    @staticmethod
    def _tail_end(unit: DriverUnit) -> int:
        return min(unit.committed_end, unit.applied_end)

    def checkpoint(self) -> None:
        """Sync the data devices, then record head, applied and tail in the superblocks."""
        if self._checkpointing:
            self._checkpoint_again = True
            return
        self._checkpointing = True
        self._checkpoint_again = False
        self._entries_at_checkpoint = self.next_gsn
        unsynced = [
            u for u in self.units if u.applied_sequence > u.synced_sequence and not u.errors
        ]
        _each(unsynced, self._sync_unit, self._synced)

    def _sync_unit(self, unit: DriverUnit, done: Callable[[], None]) -> None:
        def synced(upto: int, error: BaseException | None) -> None:
            if error is not None:
                unit.fail("data device", unit.config.data_device, error)
            else:
                unit.synced_sequence = upto
            done()

        unit.sync_data(synced)

    def _synced(self) -> None:
        unapplied = self._unapplied
        while unapplied:
            frame = unapplied[0]
            unit = frame.unit
            if not frame.applied or frame.sequence > unit.synced_sequence:
                break
            unapplied.popleft()
            self.applied_gsn = frame.gsn_last
            unit.applied_end = frame.end
            unit.applied_point = frame.next_point
        changed = [
            unit
            for unit in self.units
            if not unit.errors
            and (
                unit.writelog.superblock.tail.position != self._tail_end(unit)
                or unit.writelog.superblock.applied.position != unit.applied_end
                or unit.writelog.superblock.head.position != unit.durable_end
            )
        ]
        _each(changed, self._write_unit, self._checkpointed)

    def _cursors(self, unit: DriverUnit) -> dict[str, Any]:
        """Give what a superblock says of an LDSU's log and of its part of a refresh."""
        index = unit.index
        tail_gsn = min(self.applied_gsn, unit.committed_gsn) + 1
        if unit.committed_end <= unit.applied_end:
            tail = Cursor(unit.committed_end, tail_gsn, {index: unit.committed_point})
        else:
            tail = Cursor(unit.applied_end, tail_gsn, {index: unit.applied_point})
        changes: dict[str, Any] = {
            "tail": tail,
            "applied": Cursor(unit.applied_end, self.applied_gsn + 1, {index: unit.applied_point}),
            "head": Cursor(unit.durable_end, self.durable_gsn + 1, {index: unit.durable_point}),
            "durable_gsn": self.durable_gsn,
        }
        if self.refresh_job is not None:
            changes["refresh"] = self.refresh_job.state(unit)
        return changes

    def _write_unit(self, unit: DriverUnit, done: Callable[[], None]) -> None:
        def written(error: BaseException | None) -> None:
            if error is not None:
                unit.fail("writelog", unit.config.writelog_device, error)
            done()

        # Both slots before the space is used again (rules.md 5): losing either loses nothing.
        unit.update_superblock(self._cursors(unit), written)

    def _checkpointed(self) -> None:
        self._checkpointing = False
        if self._wanting:
            self._wanting = False
            for unit in self.units:
                unit.pump()
            if self.refresh_job is not None:
                self.refresh_job.poke()
        if self._checkpoint_again:
            self.checkpoint()
        self._note_idle()

    def _record_everywhere(self, **changes: Any) -> Deferred[None]:
        """Write changes to both slots of every superblock; fires when all are durable."""
        finished: Deferred[None] = Deferred()
        failed: list[BaseException] = []

        def write(unit: DriverUnit, done: Callable[[], None]) -> None:
            own = {key: value(unit) if callable(value) else value for key, value in changes.items()}

            def written(error: BaseException | None) -> None:
                if error is not None:
                    failed.append(error)
                    unit.fail("writelog", unit.config.writelog_device, error)
                done()

            unit.update_superblock(own, written)

        def finish() -> None:
            if failed:
                finished.errback(QdsError(f"{self.name}: cannot be recorded: {failed[0]}"))
            else:
                finished.callback(None)

        _each(self.units, write, finish)
        return finished

    # -- refresh ------------------------------------------------------------------------------

    def cut(self) -> dict[str, Any]:
        """Give the present end of every log: where a history can begin anew."""
        return {
            "gsn": self.next_gsn,
            "points": {
                str(u.index): [u.writelog.head, u.framed_point.sequence, u.framed_point.chain.hex()]
                for u in self.units
            },
        }

    @inlineCallbacks
    def refresh(self, kind: str) -> Any:
        """Begin a refresh; fires with its status once it has durably begun.

        :raises DegradedError: one is running already.
        """
        if kind != "full":
            raise UsageError(f"there is no {kind} refresh", hint="use --full")
        failed = next((error for unit in self.units for error in unit.errors), "")
        if failed:
            raise DeviceFailedError(
                f"{self.name}: no refresh while a device has failed: {failed}",
                hint="replace it and start the driver again",
            )
        if self.refresh_job is not None:
            raise DegradedError(
                f"{self.name}: a refresh is running already",
                hint=f"watch it with qdsinfo -g {self.number}, or end it with killrefresh",
            )
        status: dict[str, Any] = yield self._begin_refresh("asked for by the operator")
        return status

    @inlineCallbacks
    def _begin_refresh(self, reason: str) -> Any:
        """Mark the mirror incoherent durably, then begin (invariant COHERENT)."""
        job = self.refresh_job = Refresh(self)
        self.coherent = False
        self.incoherent_reason = "a refresh is in progress"
        yield self._record_everywhere(
            coherent=False, reason=self.incoherent_reason, refresh=job.state
        )
        self.modes.happen(Event.REFRESH_BEGUN, self.runtime.wall(), reason)
        job.poke()
        yield job.begun
        if self._pmd is not None and self.refresh_job is job:
            self._pmd.refresh(job.announcement())
        return job.status()

    @inlineCallbacks
    def _restart_refresh(self, lost: str) -> Any:
        """Begin anew: the secondary has lost part of what the refresh had sent it."""
        job = self.refresh_job
        if job is None or job.id.hex() != lost:
            return
        self.log.warn(
            "{group}: the secondary has lost part of the refresh; it begins anew", group=self.name
        )
        job.stop()
        try:
            yield self._begin_refresh("the secondary lost part of the one before")
        except QdsError as error:
            self.note_error(f"the refresh could not begin anew: {error.message}")

    @inlineCallbacks
    def kill_refresh(self) -> Any:
        """End a refresh; the mirror stays incoherent.

        :raises DegradedError: none is running.
        """
        job = self.refresh_job
        if job is None:
            raise DegradedError(f"{self.name}: no refresh is running")
        job.stop()
        self.refresh_job = None
        self.incoherent_reason = "the last refresh was ended before it was complete"
        yield self._record_everywhere(refresh=None, reason=self.incoherent_reason)
        self.modes.happen(Event.REFRESH_KILLED, self.runtime.wall(), self.incoherent_reason)
        if self._pmd is not None:
            self._pmd.refresh(None)
        if not job.begun.called:
            job.begun.errback(DegradedError(f"{self.name}: the refresh was ended"))
        return {}

    @inlineCallbacks
    def _end_refresh(self) -> Any:
        self.refresh_job = None
        try:
            yield self._record_everywhere(refresh=None, coherent=True, reason="")
        except QdsError as error:
            self.note_error(f"the refresh is complete, but that {error.message}")
            return
        self.coherent = True
        self.incoherent_reason = ""
        self.modes.happen(Event.REFRESH_ENDED, self.runtime.wall())
        self.log.info("{group}: refresh complete, the mirror is coherent", group=self.name)
        if self._pmd is not None:
            self._pmd.refresh(None)

    # -- the pmd --------------------------------------------------------------------------------

    def attach_pmd(self) -> tuple[dict[str, Any], list[int], int]:
        """Take a pmd; an earlier one is cut off (rules.md 17).

        :returns: what it must know; a read-only descriptor of each writelog, by LDSU (rules.md
            10); its end of the watermark socket.  The descriptors are the caller's to close.
        :raises QdsError: the driver does not serve this group (yet).
        """
        if not self._serving:
            raise QdsError(f"{self.name}: the driver does not serve this group yet")
        if self._pmd is not None:
            self._pmd.close()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._pmd = DriverEnd(self)
        self._pmd.adopt(self.runtime.reactor, ours)
        info = {
            "group": self.number,
            "generation": self.generation.hex(),
            "durable_gsn": self.durable_gsn,
            "committed_gsn": self.committed_gsn,
            "refresh": self.refresh_job.announcement() if self.refresh_job else None,
            "units": [
                {
                    "index": unit.index,
                    "name": unit.name,
                    "size": unit.size,
                    "log": unit.writelog.log.hex(),
                    "ring": [unit.writelog.ring.start, unit.writelog.ring.size,
                             unit.writelog.ring.align],
                    "tail": Cursor(
                        unit.committed_end,
                        unit.committed_gsn + 1,
                        {unit.index: unit.committed_point},
                    ).to_json(),
                    "durable": unit.durable_end,
                }
                for unit in self.units
            ],
        }  # fmt: skip
        descriptors = [unit.writelog.device.open_shared() for unit in self.units]
        return info, descriptors, theirs.detach()

    def pmd_committed(
        self, end: DriverEnd, sent: int, committed: int, mirrored: int, ends: Sequence[Committed]
    ) -> None:
        """Take the pmd's watermarks; only the latest attachment's count."""
        if end is not self._pmd:
            return
        self.sent_gsn = sent
        self.mirrored_gsn = mirrored
        if committed > self.durable_gsn:
            self.note_error(
                f"the pmd reports GSN {committed} as committed, only {self.durable_gsn} is durable"
            )
            return
        self.committed_gsn = max(committed, self.committed_gsn)
        for row in ends:
            if row.ldsu >= len(self.units):
                self.note_error(f"the pmd reports on LDSU {row.ldsu}, which does not exist")
                return
            unit = self.units[row.ldsu]
            if unit.committed_end <= row.position <= unit.durable_end:
                unit.committed_end = row.position
                unit.committed_point = row.point
                unit.committed_gsn = max(committed, unit.committed_gsn)
        job = self.refresh_job
        if job is not None and job.was_committed(committed):
            self._end_refresh()
        if self._wanting:
            self.want_space()

    def pmd_link(self, end: DriverEnd, link: dict[str, Any]) -> None:
        """Take the state of the pmd's link."""
        if end is not self._pmd:
            return
        was = self.link["state"]
        self.link = link
        if link.get("refresh_lost"):
            self._restart_refresh(link["refresh_lost"])
        if link.get("diverged") and self.coherent:
            self._lose_coherence(link["reason"])
        up = link["state"] == "connected"
        event = Event.LINK_UP if up else Event.LINK_DOWN
        self.modes.happen(event, self.runtime.wall(), link["reason"])
        if link["state"] != was:
            self.log.info(
                "{group}: link {state}: {reason}" if link["reason"] else "{group}: link {state}",
                group=self.name, state=link["state"], reason=link["reason"],
            )  # fmt: skip

    @inlineCallbacks
    def _lose_coherence(self, reason: str) -> Any:
        """Record that the secondary does not hold this group's mirror (any more)."""
        self.coherent = False
        self.incoherent_reason = reason
        try:
            yield self._record_everywhere(coherent=False, reason=reason)
        except QdsError as error:
            self.note_error(error.message)

    def pmd_lost(self, end: DriverEnd) -> None:
        """Learn that an attachment has ended."""
        if end is not self._pmd:
            return
        self._pmd = None
        self.sent_gsn = self.mirrored_gsn = None
        self.link = {"state": "stopped", "code": 0, "reason": "no pmd is attached"}
        self.modes.happen(Event.LINK_DOWN, self.runtime.wall(), "the pmd is gone")

    # -- status ---------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """See :class:`IGroup`."""
        return driver_status(self, os.getpid())

    @property
    def reason(self) -> str:
        """Why the state is what it is: the first that matters to an operator."""
        failed = next((e for unit in self.units for e in unit.errors), "")
        link = self.link["reason"] if self.link["state"] != "connected" else ""
        return failed or link or self.incoherent_reason

    @property
    def all_applied(self) -> bool:
        """Whether every accepted write is on its data device."""
        return not any(unit.busy for unit in self.units)

    @property
    def state(self) -> Mode:
        """The state that is shown."""
        return self.modes.state


def _each(
    units: Sequence[DriverUnit],
    action: Callable[[DriverUnit, Callable[[], None]], None],
    done: Callable[[], None],
) -> None:
    """Run an action for every unit at once; call ``done`` when all have ended."""
    left = len(units)
    if not left:
        done()
        return

    def one() -> None:
        nonlocal left
        left -= 1
        if not left:
            done()

    for unit in list(units):
        action(unit, one)
