"""DriverGroup: a group's device driver at the primary.

It alone opens the group's data devices and writelogs, gives every entry its global sequence
number, and says what may be sent.  Invariants kept here: NO-AHEAD (only the group's contiguous
durable GSN is announced), LOUD.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.logger import Logger
from zope.interface import implementer

from qdsmirror.config import GroupConfig, HostConfig
from qdsmirror.core.lag import LagClock
from qdsmirror.core.records import Cursor
from qdsmirror.core.states import Event, GroupModes, Mode
from qdsmirror.core.watermark import Committed
from qdsmirror.groups.answering import Answering
from qdsmirror.groups.attachment import Attachment
from qdsmirror.groups.backfresh import Backfresh
from qdsmirror.groups.bypass import OFF, ON, Bypass
from qdsmirror.groups.checkpoint import Checkpoints
from qdsmirror.groups.coherence import Coherence
from qdsmirror.groups.devices import leave_devices
from qdsmirror.groups.driver_status import driver_status
from qdsmirror.groups.extensions import Extensions
from qdsmirror.groups.failures import Failures
from qdsmirror.groups.framing import UnitFrame
from qdsmirror.groups.live import LiveSettings
from qdsmirror.groups.marks import Marks
from qdsmirror.groups.memory import MemoryLogs
from qdsmirror.groups.refresh import Refresh
from qdsmirror.groups.restart import open_devices, recover
from qdsmirror.groups.runtime import Runtime
from qdsmirror.groups.unit import DriverUnit
from qdsmirror.groups.verifying import Verifying
from qdsmirror.groups.wayout import WayOut
from qdsmirror.interfaces import IGroup
from qdsmirror.paths import Paths
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.memory import OpenMemory
from qdsmirror.storage.recovery import OpenUnit, close_units

_ERRORS_KEPT = 8


@implementer(IGroup)
class DriverGroup:
    """The driver's side of a group.

    :param nbd_listening_fd: the group's listening Unix socket, owned by the master.
    :param latch: knows the group's failed devices, and learns of more.
    :param open_memory: gives the memory of writelogs that stand there.
    :ivar durable_gsn: every GSN up to this one is durable in its writelog.
    :ivar committed_gsn: what the secondary has acknowledged; ``last_commit``: when it last
        acknowledged more, seconds since 1970; ``None``: not since the start.
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
        open_memory: OpenMemory | None = None,
    ) -> None:
        self.config = config
        self.number = config.number
        self.name = config.name
        self.paths = paths
        self.runtime = runtime or Runtime.real(reactor)
        self.units: list[DriverUnit] = []
        self.settings = LiveSettings(self, "driver", self._go_by_settings)
        self.always_durable = config.durability == "always"
        self.modes = GroupModes(self.name, self.number, self.runtime.wall())
        self.lag = LagClock()
        self.generation = b""
        self.memory = MemoryLogs(self, open_memory)
        self.coherence = Coherence(self)
        self.checkpoints = Checkpoints(self)
        self.bypass = Bypass(self)
        self.way_out = WayOut(self)
        self.backfresh = Backfresh(self)
        self.answering = Answering(self)
        self.pmd = Attachment(self)
        self.verifying = Verifying(self)
        self.marks = Marks(self)
        self.next_gsn = 1
        self.durable_gsn = self.committed_gsn = 0
        self.last_commit: float | None = None
        self.notes: deque[str] = deque(maxlen=_ERRORS_KEPT)
        self._latch = latch or FailureLatch(paths.state_file(config.number))
        self.failures = Failures(self, self._latch)
        self.extensions = Extensions(self, self._latch)
        self._fd = nbd_listening_fd
        self._listener: Any = None
        self._serving = False
        self._undurable: deque[UnitFrame] = deque()
        self._timer: Any = None
        self._idle: list[Deferred[None]] = []

    # -- life ---------------------------------------------------------------------------------

    @inlineCallbacks
    def start(self) -> Any:
        """Recover every device, then serve the LDSUs."""
        blocking = self.runtime.blocking
        opened: list[OpenUnit] = yield blocking(open_devices, self, self._latch)
        try:
            yield blocking(recover, self, opened, self._latch)
            yield blocking(self.extensions.settle, opened)
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
        self.modes.happen(Event.DRIVER_STARTED, self.runtime.wall(), "no pmd is attached")
        if self.bypass.phase == ON:
            self.modes.happen(Event.BYPASS_BEGUN, self.bypass.since, self.bypass.reason)
        elif self.refresh_job is not None:
            started = self.refresh_job.started
            self.modes.happen(Event.REFRESH_BEGUN, started, "resumed when the driver started")
            self.refresh_job.poke()
        self.backfresh.begin_again()
        self.answering.begin()
        self._tick()

    @inlineCallbacks
    def stop(self) -> Any:
        """Answer what was accepted, make everything durable and applied, close the devices."""
        if not self._serving:
            return
        yield self._listener.stopListening()
        gone = self._listener.disconnect_all()
        if self.refresh_job is not None:
            self.refresh_job.stop()
        self.verifying.stop()
        yield self.backfresh.stop()
        yield self.bypass.stop()
        yield self.failures.stop()
        yield self.extensions.stop()
        if self.refresh_job is not None:
            # A bypass that was just being left has begun one.
            self.refresh_job.stop()
        # With a full writelog they would wait for a secondary that may never come.
        for unit in self.units:
            unit.leave()
        self.answering.leave()
        yield gone
        self.answering.left()
        while any(unit.busy for unit in self.units):
            idle: Deferred[None] = Deferred()
            self._idle.append(idle)
            yield idle
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.bypass.phase == ON:
            yield self.bypass.sync()
        yield self.memory.drain()
        yield self._final_checkpoint()
        while self.failures.busy:
            yield self.failures.stop()
            yield self._final_checkpoint()
        self._serving = False
        self.modes.happen(Event.DRIVER_STOPPED, self.runtime.wall())
        self.pmd.close()
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
        now = self.runtime.reactor.seconds()
        for unit in self.units:
            unit.fill_rate.note(now, unit.writelog.used_bytes)
        self.checkpoints.take()
        self.verifying.tick()

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
            and not self.backfresh.stops_framing
        )

    @property
    def hurry(self) -> bool:
        """Whether commits should not wait for company."""
        return self.runtime.unapplied.is_much(self)

    @property
    def unapplied_bytes(self) -> int:
        """What is framed and not yet applied."""
        return self.runtime.unapplied.held_by(self)

    def stand_at(self, places: Sequence[Cursor]) -> None:
        """Go on from another place of a history, in every LDSU; nothing is under way."""
        for unit, place in zip(self.units, places, strict=True):
            unit.stand_at(place)
        self.next_gsn = places[0].gsn
        self.durable_gsn = self.committed_gsn = self.next_gsn - 1
        self.checkpoints.stand_at(self.durable_gsn)
        self.lag = LagClock()

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
        self.answering.framed(frame)

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
        if self.pmd.end is not None:
            self.pmd.end.durable(self.durable_gsn, unit)
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

    @property
    def log_gsn(self) -> int:
        """The sequence number that lines of the log bear: what is written."""
        return self.next_gsn - 1

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

    def verify(self, how: str) -> Deferred[dict[str, Any]]:
        """See :meth:`Verifying.order`."""
        return self.verifying.order(how)

    def switch_bypass(self, to: str) -> Deferred[dict[str, Any]]:
        """See :meth:`Bypass.switch`."""
        return self.bypass.switch(to)

    def mark(self, name: str) -> Deferred[dict[str, Any]]:
        """See :meth:`Marks.set`."""
        return self.marks.set(name)

    def begin_backfresh(self, options: str, keep: str) -> Deferred[dict[str, Any]]:
        """See :meth:`Backfresh.begin`.

        :param options: those of ``dry-run``, ``discard`` and ``force`` that are wanted.
        """
        wanted = options.split()
        begun: Deferred[dict[str, Any]] = self.backfresh.begin(
            dry_run="dry-run" in wanted,
            discard="discard" in wanted,
            force="force" in wanted,
            keep=keep,
        )
        return begun

    def kill_backfresh(self, options: str) -> Deferred[dict[str, Any]]:
        """See :meth:`Backfresh.kill`.

        :param options: ``online``, or nothing.
        """
        ended: Deferred[dict[str, Any]] = self.backfresh.kill(online="online" in options.split())
        return ended

    def set_live(self, settings: str) -> Deferred[dict[str, Any]]:
        """See :meth:`LiveSettings.set`."""
        return self.settings.set(settings)

    def _go_by_settings(self) -> Deferred[None]:
        self.always_durable = self.config.durability == "always"
        self.answering.look()
        for unit in self.units:
            # What waits for room may be an overflow now.
            unit.pump()
            unit.direct.go_on()
        self.bypass.heal()
        self.verifying.set_due()
        return self.answering.settled()

    def set_knobs(self, knobs: str) -> dict[str, Any]:
        """Take what throttles hold writes up by: ``writesleep_us``; see :func:`parse_knobs`."""
        return {"knobs": self.answering.delayed.set(knobs)}

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
        """See :meth:`Attachment.attach`."""
        return self.pmd.attach()

    def committed(self, gsn: int, ends: Sequence[Committed]) -> None:
        """Learn what the secondary has committed, and by LDSU where that ends."""
        if gsn > self.durable_gsn:
            self.note_error(
                f"the pmd reports GSN {gsn} as committed, only {self.durable_gsn} is durable"
            )
            return
        if gsn > self.committed_gsn:
            self.committed_gsn = gsn
            self.last_commit = self.runtime.wall()
        for row in ends:
            if row.ldsu >= len(self.units):
                self.note_error(f"the pmd reports on LDSU {row.ldsu}, which does not exist")
                return
            self.units[row.ldsu].committed(gsn, row)
        self.answering.committed(gsn)
        self.coherence.committed(gsn)
        self.bypass.heal()
        self.memory.look()
        if self.checkpoints.wanted:
            self.checkpoints.want_space()

    # -- status ---------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """See :class:`IGroup`."""
        return driver_status(self, os.getpid())

    @property
    def reason(self) -> str:
        """Why the state is what it is: the first that matters to an operator."""
        failed = next((e for unit in self.units for e in unit.errors), "")
        link = "" if self.pmd.is_connected else self.pmd.link["reason"]
        mode = self.backfresh.reason or self.bypass.reason
        return failed or mode or link or self.coherence.reason

    @property
    def all_applied(self) -> bool:
        """Whether every accepted write is on its data device."""
        return not any(unit.busy for unit in self.units)

    @property
    def state(self) -> Mode:
        """The state that is shown."""
        return self.modes.state
