"""DriverGroup: a group's device driver at the primary.

It alone opens the group's data devices and writelogs, gives every entry its global sequence
number, and says what may be sent.  Invariants kept here: NO-AHEAD (only the group's contiguous
durable GSN is announced), LOUD.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from zope.interface import implementer

from qdsmirror.config import GroupConfig, HostConfig
from qdsmirror.core.generations import awaits_switch, settle
from qdsmirror.core.lag import LagClock
from qdsmirror.core.records import Cursor
from qdsmirror.core.states import Event, GroupModes, Mode
from qdsmirror.core.watermark import Committed
from qdsmirror.errors import QdsError
from qdsmirror.groups.attachment import DriverEnd
from qdsmirror.groups.bypass import OFF, ON, Bypass
from qdsmirror.groups.checkpoint import Checkpoints
from qdsmirror.groups.coherence import Coherence
from qdsmirror.groups.devices import leave_devices, take_over_devices
from qdsmirror.groups.driver_status import driver_status
from qdsmirror.groups.extensions import Extensions
from qdsmirror.groups.failures import Failures
from qdsmirror.groups.framing import UnitFrame
from qdsmirror.groups.refresh import Refresh
from qdsmirror.groups.restart import (
    failures_found,
    go_on_past,
    known_failures,
    open_devices,
    record_failures,
    replay_all,
)
from qdsmirror.groups.runtime import Runtime
from qdsmirror.groups.unit import DriverUnit
from qdsmirror.interfaces import IGroup
from qdsmirror.paths import Paths
from qdsmirror.storage.bitmap import empty_bitmap, load_bitmap
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.recovery import OpenUnit, close_units, judge

_ERRORS_KEPT = 8


@implementer(IGroup)
class DriverGroup:
    """The driver's side of a group.

    :param nbd_listening_fd: the group's listening Unix socket, owned by the master.
    :param latch: knows the group's failed devices, and learns of more.
    :ivar durable_gsn: every GSN up to this one is durable in its writelog.
    :ivar committed_gsn: what the secondary has acknowledged; ``sent_gsn``, ``mirrored_gsn``
        likewise, ``None`` while no pmd has said so.
    :ivar failed_since: when the first of its devices failed, seconds since 1970; 0 if none has.
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
        latch: FailureLatch | None = None,
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
        self.coherence = Coherence(self)
        self.checkpoints = Checkpoints(self)
        self.bypass = Bypass(self)
        self.next_gsn = 1
        self.durable_gsn = self.committed_gsn = 0
        self.sent_gsn: int | None = None
        self.mirrored_gsn: int | None = None
        self.link: dict[str, Any] = {"state": "stopped", "code": 0, "reason": ""}
        self.notes: deque[str] = deque(maxlen=_ERRORS_KEPT)
        self.failed_since = 0.0
        self._latch = latch or FailureLatch(paths.state_file(config.number))
        self.failures = Failures(self, self._latch)
        self.extensions = Extensions(self, self._latch)
        self._fd = nbd_listening_fd
        self._listener: Any = None
        self._serving = False
        self._undurable: deque[UnitFrame] = deque()
        self._timer: Any = None
        self._pmd: DriverEnd | None = None
        self._idle: list[Deferred[None]] = []

    # -- life ---------------------------------------------------------------------------------

    @inlineCallbacks
    def start(self) -> Any:
        """Recover every device, then serve the LDSUs."""
        known = known_failures(self, self._latch)
        pool = self.runtime.reactor.getThreadPool()
        opened: list[OpenUnit] = yield deferToThreadPool(
            self.runtime.reactor, pool, open_devices, self, known
        )
        try:
            yield deferToThreadPool(self.runtime.reactor, pool, self._recover, opened)
            yield deferToThreadPool(self.runtime.reactor, pool, self.extensions.settle, opened)
            self._listener = self.runtime.listen(
                self.runtime.reactor, self._fd, {u.name: u for u in self.units}, self.runtime.budget
            )
        except BaseException:
            for unit in self.units:
                unit.close()
            close_units(opened)
            self.extensions.close()
            raise
        self._serving = True
        self.modes.happen(Event.DRIVER_STARTED, self.runtime.wall())
        if self.bypass.phase == ON:
            self.modes.happen(Event.BYPASS_BEGUN, self.bypass.since, self.bypass.reason)
        elif self.refresh_job is not None:
            self.modes.happen(Event.REFRESH_BEGUN, self.runtime.wall(), "resumed at start")
            self.refresh_job.poke()
        self._tick()

    def _recover(self, opened: Sequence[OpenUnit]) -> None:
        """Replay, record void ranges, and write every superblock (blocking)."""
        plan = judge(opened)
        take_over_devices(self, opened)
        replay_all(self, opened, self._latch)
        if any(one.untrusted for one in opened):
            go_on_past(self, opened, plan, self._latch)
            return
        for one in opened:
            one.writelog.clear_end(one.reached.position)
        superblocks = [unit.writelog.superblock for unit in opened]
        settled = settle(superblocks)
        self.generation = settled.generations[-1].id
        self.durable_gsn = self.checkpoints.applied_gsn = plan.next_gsn - 1
        self.committed_gsn = max(s.tail.gsn for s in superblocks) - 1
        self.next_gsn = plan.next_gsn
        self.units = [self.make_unit(one) for one in opened]
        for void in plan.voids:
            self.log.warn(
                "{group}: GSN {first} to {last} were lost before they were durable; recorded as "
                "void", group=self.name, first=void.range.first, last=void.range.end - 1,
            )  # fmt: skip
            unit = self.units[void.ldsu]
            unit.writelog.write(unit.void_writes(void.range.first, void.range.length))
            unit.writelog.sync()
        self.bypass.resume(settled)
        self.coherence.resume(settled)
        common: dict[str, Any] = {}
        if settled.uneven:
            # A crash came while bypass was being entered or left: complete it in all.
            common = {
                "generations": settled.generations,
                "bypass": settled.bypass,
                "coherent": settled.coherent,
                "reason": settled.reason,
                "refresh": None,
            }
        failed = failures_found(opened)
        if failed:
            record_failures(self, failed, self._latch)
            common["failures"] = failed.to_json()
        for unit in self.units:
            unit.writelog.update(both=True, **common | self.checkpoints.cursors(unit))
        if awaits_switch(settled.generations, self.next_gsn):
            self._switch(settled.generations[-2].id)
        self.failures.resume(failed)
        self.lag.framed(self.committed_gsn + 1, self.runtime.reactor.seconds())

    def make_unit(self, opened: OpenUnit) -> DriverUnit:
        """Make an LDSU of its devices (blocking)."""
        superblock = opened.writelog.superblock
        if opened.untrusted is None:
            dirty, damage = load_bitmap(opened.writelog.device, superblock)
            if damage:
                self.note_error(damage)
        else:
            # All is dirty where the bitmap has failed with its writelog.
            dirty = empty_bitmap(superblock)
        return DriverUnit(
            self, opened.config, opened.device, opened.writelog, opened.reached, dirty
        )

    def _switch(self, predecessor: bytes) -> None:
        """Begin the newest generation with its switch, durably, before anything else (blocking)."""
        unit = self.units[0]
        unit.writelog.write(unit.switch_writes(predecessor))
        unit.writelog.sync()
        self.durable_gsn = self.checkpoints.applied_gsn = self.next_gsn - 1

    @inlineCallbacks
    def stop(self) -> Any:
        """Answer what was accepted, make everything durable and applied, close the devices."""
        if not self._serving:
            return
        yield self._listener.stopListening()
        gone = self._listener.disconnect_all()
        if self.refresh_job is not None:
            self.refresh_job.stop()
        yield self.bypass.stop()
        yield self.failures.stop()
        yield self.extensions.stop()
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
        if self.bypass.phase == ON:
            yield self.bypass.sync()
        yield self._final_checkpoint()
        self._serving = False
        self.modes.happen(Event.DRIVER_STOPPED, self.runtime.wall())
        if self._pmd is not None:
            self._pmd.close()
        yield gatherResults([d for unit in self.units for d in unit.close()])
        self.runtime.unapplied.leave(self)
        yield leave_devices(self)
        for unit in self.units:
            unit.device.close()
            unit.writelog.close()
        self.extensions.close()

    def _final_checkpoint(self) -> Deferred[None]:
        finished: Deferred[None] = Deferred()
        self._idle.append(finished)
        self.checkpoints.take()
        return finished

    def _tick(self) -> None:
        self._timer = self.runtime.reactor.callLater(
            self.config.tunables.metadata_seconds, self._tick
        )
        self.checkpoints.take()

    @property
    def is_serving(self) -> bool:
        """Whether it has started, and not yet stopped."""
        return self._serving

    # -- sequence numbers, and what the units tell ------------------------------------------------

    @property
    def may_frame(self) -> bool:
        """Whether more may be framed: what is not yet applied is bounded (BOUND)."""
        return (
            self._serving
            and self.runtime.unapplied.has_room(self)
            and self.bypass.phase == OFF
            and not self.failures.stops_framing
        )

    @property
    def hurry(self) -> bool:
        """Whether commits should not wait for company."""
        return self.runtime.unapplied.is_much(self)

    @property
    def unapplied_bytes(self) -> int:
        """What is framed and not yet applied."""
        return self.runtime.unapplied.held_by(self)

    def take_gsns(self, count: int) -> tuple[int, int]:
        """Take the next global sequence numbers."""
        first = self.next_gsn
        self.next_gsn += count
        self.lag.framed(first, self.runtime.reactor.seconds())
        return first, count

    def framed(self, frame: UnitFrame) -> None:
        """Take a new frame into the group's order."""
        self._undurable.append(frame)
        self.checkpoints.framed(frame)
        self.runtime.unapplied.take(self, frame.weight)

    def appended(self) -> None:
        """Learn that an append has ended."""
        self.bypass.poke()
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
        self.bypass.poke()
        if self.refresh_job is not None and self.durable_gsn != before:
            self.refresh_job.became_durable(self.durable_gsn)

    def was_applied(self, weight: int) -> None:
        """Learn that frames of this many payload bytes are on their data device."""
        blocked = not self.may_frame
        self.runtime.unapplied.give(self, weight)
        if blocked:
            self.frame_again()
        if self.checkpoints.due:
            self.checkpoints.take()
        self.bypass.poke()
        self.note_idle()

    def frame_again(self) -> None:
        """Frame what waits, if that may go on: there is room again."""
        if self.may_frame:
            if self.refresh_job is not None:
                self.refresh_job.poke()
            for unit in self.units:
                unit.pump()

    def note_idle(self) -> None:
        """Tell who waits for the group to have nothing under way."""
        if self._idle and not self.checkpoints.running and not any(u.busy for u in self.units):
            waiting, self._idle = self._idle, []
            for idle in waiting:
                idle.callback(None)

    def last_sendable(self) -> int:
        """Give the last GSN below all that a failed writelog has not made durable (rules.md 13)."""
        before = self.durable_gsn
        for frame in self._undurable:
            if frame.unit.log_failed and not frame.durable:
                return before
            before = frame.gsn_last
        return self.next_gsn - 1

    def note_error(self, text: str) -> None:
        """Keep an error for ``qdsinfo`` and the log."""
        self.notes.append(text)
        self.log.error("{group}: {text}", group=self.name, text=text)

    def unit_failed(self, path: str, reason: str, error: BaseException) -> None:
        """Learn that a device has failed; a failed sync is remembered for good (rules.md 4)."""
        self.failed_since = self.failed_since or self.runtime.wall()
        self.notes.append(reason)
        try:
            self._latch.record(path, error)
        except QdsError as cause:
            self.note_error(cause.message)
        self.bypass.poke()
        self.note_idle()

    # -- coherence ----------------------------------------------------------------------------

    @property
    def coherent(self) -> bool:
        """Whether the mirror is usable as of one instant (invariant COHERENT)."""
        return self.coherence.coherent

    @property
    def refresh_job(self) -> Refresh | None:
        """The refresh in progress."""
        return self.coherence.job

    def refresh(self, kind: str) -> Deferred[dict[str, Any]]:
        """See :meth:`Coherence.refresh`."""
        return self.coherence.refresh(kind)

    def kill_refresh(self) -> Deferred[dict[str, Any]]:
        """See :meth:`Coherence.kill_refresh`."""
        return self.coherence.kill_refresh()

    def switch_bypass(self, to: str) -> Deferred[dict[str, Any]]:
        """See :meth:`Bypass.switch`."""
        return self.bypass.switch(to)

    def extend(self, ldsu: str, device: str) -> Deferred[dict[str, Any]]:
        """See :meth:`Extensions.extend`."""
        return self.extensions.extend(ldsu, device)

    def free(self, ldsu: str, device: str) -> Deferred[dict[str, Any]]:
        """See :meth:`Extensions.free`."""
        return self.extensions.free(ldsu, device)

    def cut(self) -> dict[str, Any]:
        """Give the present end of every log: where a history can begin anew."""
        return {
            "gsn": self.next_gsn,
            "points": {
                str(u.index): [u.writelog.head, u.framed_point.sequence, u.framed_point.chain.hex()]
                for u in self.units
            },
        }

    # -- the pmd --------------------------------------------------------------------------------

    def attach_pmd(self) -> tuple[dict[str, Any], list[int], int]:
        """Take a pmd; an earlier one is cut off (rules.md 17).

        :returns: what it must know; read-only descriptors of the writelogs' devices, by LDSU
            (rules.md 10); its end of the watermark socket.  The caller closes the descriptors.
        :raises QdsError: the driver does not serve this group (yet).
        """
        if not self._serving:
            raise QdsError(f"{self.name}: the driver does not serve this group yet")
        if self.failures.restarted:
            raise QdsError(
                f"{self.name}: nothing is sent: {self.bypass.reason}",
                hint="see Failed devices in qdsmirror-architecture(7)",
            )
        if self._pmd is not None:
            self._pmd.close()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._pmd = DriverEnd(self)
        self._pmd.adopt(self.runtime.reactor, ours)
        shared = [unit.writelog.open_shared() for unit in self.units]
        info = {
            "group": self.number,
            "generations": [
                one.id.hex() for one in self.units[0].writelog.superblock.generations
            ],
            "durable_gsn": self.durable_gsn,
            "committed_gsn": self.committed_gsn,
            "refresh": self.refresh_job.announcement() if self.refresh_job else None,
            "units": [
                {
                    "index": unit.index,
                    "name": unit.name,
                    "size": unit.size,
                    "log": unit.writelog.log.hex(),
                    "ring": self._pmd.rings[unit.index].to_json(),
                    "devices": [[one.number, one.shift] for one in shared[unit.index]],
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
        return info, [one.fd for row in shared for one in row], theirs.detach()

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
        self.coherence.committed(committed)
        if self.checkpoints.wanted:
            self.checkpoints.want_space()

    def pmd_link(self, end: DriverEnd, link: dict[str, Any]) -> None:
        """Take the state of the pmd's link."""
        if end is not self._pmd:
            return
        was = self.link["state"]
        self.link = link
        if link.get("refresh_lost"):
            self.coherence.restart(link["refresh_lost"])
        if link.get("diverged"):
            self.coherence.lose(link["reason"])
        up = link["state"] == "connected"
        event = Event.LINK_UP if up else Event.LINK_DOWN
        self.modes.happen(event, self.runtime.wall(), link["reason"])
        if link["state"] != was:
            self.log.info(
                "{group}: link {state}: {reason}" if link["reason"] else "{group}: link {state}",
                group=self.name, state=link["state"], reason=link["reason"],
            )  # fmt: skip

    def pmd_lost(self, end: DriverEnd) -> None:
        """Learn that an attachment has ended."""
        if end is not self._pmd:
            return
        self._pmd = None
        self.sent_gsn = self.mirrored_gsn = None
        self.link = {"state": "stopped", "code": 0, "reason": "no pmd is attached"}
        self.modes.happen(Event.LINK_DOWN, self.runtime.wall(), "the pmd is gone")

    def tell_generations(self, ids: Sequence[bytes]) -> None:
        """Tell an attached pmd of which generations frames may be."""
        if self._pmd is not None:
            self._pmd.generations(ids)

    def tell_refresh(self, announcement: dict[str, Any] | None) -> None:
        """Tell an attached pmd which refresh is in progress."""
        if self._pmd is not None:
            self._pmd.refresh(announcement)

    # -- status ---------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """See :class:`IGroup`."""
        return driver_status(self, os.getpid())

    @property
    def reason(self) -> str:
        """Why the state is what it is: the first that matters to an operator."""
        failed = next((e for unit in self.units for e in unit.errors), "")
        link = self.link["reason"] if self.link["state"] != "connected" else ""
        return failed or self.bypass.reason or link or self.coherence.reason

    @property
    def all_applied(self) -> bool:
        """Whether every accepted write is on its data device."""
        return not any(unit.busy for unit in self.units)

    @property
    def state(self) -> Mode:
        """The state that is shown."""
        return self.modes.state
