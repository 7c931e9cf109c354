"""Bypass of a group: entered by an overflow or the operator, left by a refresh.

Entering (rules.md 11): framing stops; a break is framed; every frame is made durable, applied and
synced; the dirty bitmaps are cleared, if the mirror was coherent; mode and ``applied`` are made
durable everywhere; only then writes go past the writelog.  Leaving: :mod:`qdsmirror.groups.wayout`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.logger import Logger

from qdsmirror.core.frames import BREAK
from qdsmirror.core.generations import Settled
from qdsmirror.core.states import Event
from qdsmirror.errors import DegradedError, QdsError, UsageError
from qdsmirror.limits import OVERFLOW_AGAIN_SECONDS, OVERFLOW_WAIT_SECONDS

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit

OFF, ENTERING, ON, LEAVING = "off", "entering", "on", "leaving"

#: Control frames that must still find room after a break: switch, begin and end of a refresh.
_ROOM_AFTER_BREAK = 3


class Bypass:
    """A group's bypass.

    :ivar phase: OFF, ENTERING, ON or LEAVING; framing goes on only in OFF.
    :ivar state: the bypass as the superblocks have it: id, since (seconds since 1970), reason,
        whether an overflow has begun it, and whether writelogs in memory were lost.
    """

    log = Logger()

    def __init__(self, group: DriverGroup) -> None:
        self._group = group
        self.phase = OFF
        self.state: dict[str, Any] | None = None
        self._waits: list[tuple[Callable[[], bool], Deferred[None]]] = []
        #: When it was left, or could not be entered.
        self._ended_at: float | None = None
        #: Whether it was tried to leave by itself since bypass, or the link, began.
        self._tried = False
        self._stopping = False
        self._timer: Any = None

    def resume(self, settled: Settled) -> None:
        """Take up what the superblocks say."""
        if settled.bypass is not None:
            self.begin(settled.bypass)

    def begin(self, state: Mapping[str, Any]) -> None:
        """Be in bypass: it is durable."""
        self.state = dict(state)
        self._tried = False
        self.become(ON)

    @property
    def reason(self) -> str:
        """Why the group is in bypass; "" while it is not."""
        return str(self.state["reason"]) if self.state is not None else ""

    @property
    def since(self) -> float:
        """Since when, in seconds since 1970, whatever was restarted since."""
        return float(self.state["since"]) if self.state is not None else 0.0

    def status(self) -> dict[str, Any] | None:
        """Give the ``bypass`` object of ``qdsinfo --json``."""
        if self.state is None:
            return None
        dirty = sum(unit.dirty_bytes for unit in self._group.units)
        told = {key: self.state[key] for key in ("id", "since", "reason")}
        return {**told, "dirty_bytes": dirty, "lost": bool(self.state.get("lost"))}

    # -- what the group tells -------------------------------------------------------------------

    def poke(self) -> None:
        """Look again at what is waited for: something has changed."""
        for wait in list(self._waits):
            happened, fired = wait
            try:
                # Asking may act, and so poke again from within.
                if wait not in self._waits or not happened() or wait not in self._waits:
                    continue
            except QdsError as error:
                self._waits.remove(wait)
                fired.errback(error)
                continue
            self._waits.remove(wait)
            fired.callback(None)

    def until(self, happened: Callable[[], bool]) -> Deferred[None]:
        """Fire when something is so.

        :param happened: may act as well; raises QdsError where it can never be so.
        """
        fired: Deferred[None] = Deferred()
        wait = (happened, fired)
        self._waits.append(wait)
        self.poke()
        return fired

    def become(self, phase: str) -> None:
        """Be in another phase.

        :param phase: OFF, ENTERING, ON or LEAVING.
        """
        self.phase = phase
        self._group.answering.look()
        self.poke()

    def stop(self) -> Deferred[None]:
        """Fire when nothing is half-way: the driver stops."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return self.until(lambda: self.phase in (OFF, ON))

    # -- overflow -------------------------------------------------------------------------------

    def no_room(self, unit: DriverUnit) -> None:
        """Learn that an application's write does not fit this writelog.

        An overflow is it only when nothing but the secondary can free space, and, while there is
        hope that it will, after a moment.
        """
        group = self._group
        if self.phase != OFF or group.config.on_overflow != "bypass" or not group.may_frame:
            return
        if group.answering.waits_for_room:
            return
        if (
            group.checkpoints.running
            or group.extensions.changes(unit)
            or unit.committed_end > unit.writelog.durable_tail
            or unit.applied_end <= unit.committed_end
        ):
            return
        now = group.runtime.reactor.seconds()
        if unit.full_since is None:
            unit.full_since = now
        left = unit.full_since + self._patience(now) - now
        if left > 0:
            self._look_in(left)
            return
        self._begin_overflow(unit)

    def _patience(self, now: float) -> float:
        if self._ended_at is not None and now < self._ended_at + OVERFLOW_AGAIN_SECONDS:
            return OVERFLOW_AGAIN_SECONDS
        return OVERFLOW_WAIT_SECONDS if self._group.pmd.is_connected else 0.0

    def _look_in(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = self._group.runtime.reactor.callLater(seconds, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._tried = False
        self.heal()
        for unit in self._group.units:
            if unit.full_since is not None:
                unit.pump()

    @inlineCallbacks
    def _begin_overflow(self, unit: DriverUnit) -> Any:
        try:
            yield self._enter(f"the writelog of {unit.name} is full", overflow=True)
        except QdsError as error:
            self._group.note_error(f"bypass cannot be entered: {error.message}")

    # -- entering -------------------------------------------------------------------------------

    def check_logs(self) -> None:
        """Refuse to go on where the writelogs cannot.

        :raises DeviceFailedError: a device has failed.
        """
        self._group.failures.check_logs("way into or out of bypass")

    def switch(self, to: str) -> Deferred[dict[str, Any]]:
        """Do what ``qdsbypass`` asks for: ``on`` or ``off``.

        :returns: fires with the bypass, or the refresh that has begun.
        :raises DegradedError: the group is so already, or on its way.
        :raises UsageError: it asks for something else.
        """
        if to == "on":
            return self.enter("asked for by the operator")
        if to != "off":
            raise UsageError(f"bypass cannot be {to}", hint="qdsbypass on, or qdsbypass off")
        return self._group.coherence.leave_bypass()

    def refuse_half_way(self) -> None:
        """Refuse what cannot be on the way into or out of bypass.

        :raises DegradedError: the group is on one.
        """
        if self.phase in (ENTERING, LEAVING):
            name, number = self._group.name, self._group.number
            raise DegradedError(
                f"{name}: it is {self.phase} bypass", hint=f"watch it with qdsinfo -g {number}"
            )

    @inlineCallbacks
    def enter(self, reason: str) -> Any:
        """Enter bypass; fires with its status when writes go past the writelog.

        :raises DegradedError: the group is in bypass already.
        :raises DeviceFailedError: a device has failed.
        """
        group = self._group
        self.refuse_half_way()
        group.modes.refuse(Event.BYPASS_BEGUN, *group.backfresh.coming)
        self.check_logs()
        yield self._enter(reason)
        return self.status()

    @inlineCallbacks
    def _enter(self, reason: str, overflow: bool = False) -> Any:
        group = self._group
        self.phase = ENTERING
        bypass = os.urandom(16)
        state = {
            "id": bypass.hex(),
            "since": group.runtime.wall(),
            "reason": reason,
            "overflow": overflow,
        }
        self.log.warn("{group}: entering bypass: {reason}", group=group.name, reason=reason)
        try:
            # What is being recorded of the mirror comes first.
            yield self.until(lambda: not group.checkpoints.recording)
            group.coherence.end_for_bypass()
            yield self._frame_break(bypass)
            for unit in group.units:
                unit.syncing.hasten()
            yield self.until(self.is_all_applied)
            # Over what stands in memory only, the bits stay.
            if group.coherent and not group.memory.used:
                yield gatherResults([unit.direct.clear_dirty() for unit in group.units])
                self.check_logs()
            yield group.checkpoints.record_everywhere(
                bypass=state,
                refresh=None,
                coherent=group.coherent,
                reason=group.coherence.reason,
                **group.checkpoints.each_cursor(),
            )
        except Exception:
            # Nothing was written past the writelogs: whatever was recorded, they hold it all.
            self._ended_at = group.runtime.reactor.seconds()
            for unit in group.units:
                unit.full_since = None
            self._resume_framing()
            raise
        self.begin(state)
        group.modes.happen(Event.BYPASS_BEGUN, group.runtime.wall(), reason)
        group.pmd.tell_refresh(None)
        for unit in group.units:
            unit.full_since = None
            unit.direct.begin()
        # The secondary may have fetched all of it meanwhile.
        self.heal()

    def _frame_break(self, bypass: bytes) -> Deferred[None]:
        """Tell the secondary, in the order of things, that nothing comes after."""
        unit = max(self._group.units, key=lambda u: u.own_frames.control_room)
        framed: Deferred[None] = Deferred()

        def turn() -> None:
            room = unit.own_frames.control_room - _ROOM_AFTER_BREAK
            if room <= 0 or unit.own_frames.control(BREAK, bypass) is None:
                self.log.warn(
                    "{group}: no room for a break in its writelogs: the secondary will not know",
                    group=self._group.name,
                )
            framed.callback(None)

        unit.own_frames.when_free(turn)
        return framed

    def is_all_applied(self) -> bool:
        """Whether everything framed is durable, applied and synced, and the superblocks say so."""
        group = self._group
        self.check_logs()
        group.failures.check_recorded()
        checkpoints = group.checkpoints
        if checkpoints.running or any(unit.has_frames for unit in group.units):
            return False
        if checkpoints.applied_gsn == group.next_gsn - 1:
            return True
        checkpoints.take()
        return False

    def _resume_framing(self) -> None:
        self.become(OFF)
        if self._group.refresh_job is not None:
            self._group.refresh_job.poke()
        for unit in self._group.units:
            unit.pump()

    # -- leaving --------------------------------------------------------------------------------

    def link_up(self) -> None:
        """Learn that the secondary is connected."""
        self._tried = False
        self.heal()

    def heal(self) -> None:
        """Leave an overflow's bypass where that is wanted: the secondary has all before the break.

        What came before would fill the writelog again; but of writelogs that were lost nothing
        comes any more.
        """
        group = self._group
        if (
            self.phase == ON
            and not self._stopping
            and group.config.tunables.auto_refresh
            and self.state is not None
            and (self.state.get("overflow") or self.state.get("lost"))
            and not self._tried
            and not group.failures.stops_framing
            and (self._is_mirror_up_to_date() or group.pmd.awaits_refresh)
        ):
            self._tried = True
            self._leave_by_itself()

    def _is_mirror_up_to_date(self) -> bool:
        group = self._group
        return group.pmd.is_connected and group.committed_gsn == group.next_gsn - 1

    @inlineCallbacks
    def _leave_by_itself(self) -> Any:
        group = self._group
        self.log.info("{group}: the secondary is back: leaving bypass", group=group.name)
        try:
            yield group.coherence.leave_bypass()
        except DegradedError as error:
            # What is committed is not free yet, or somebody has been faster.
            self.log.info("{group}: not yet: {why}", group=group.name, why=error.message)
            self._look_in(OVERFLOW_AGAIN_SECONDS)
        except QdsError as error:
            group.note_error(f"bypass cannot be left: {error.message}")

    def ended(self) -> None:
        """Learn that bypass is left: the new generation has begun, durably."""
        self._ended_at = self._group.runtime.reactor.seconds()
        for unit in self._group.units:
            unit.direct.release()

    def left(self) -> None:
        """Go back to the writelogs: the refresh stands that leads out."""
        self._resume_framing()

    def sync(self) -> Deferred[Any]:
        """Make every direct write durable."""
        return gatherResults([self._sync_unit(u) for u in self._group.units if not u.dead])

    def _sync_unit(self, unit: DriverUnit) -> Deferred[None]:
        synced: Deferred[None] = Deferred()

        def done(_upto: int, error: BaseException | None) -> None:
            if error is not None:
                unit.fail_data(error)
            synced.callback(None)

        unit.applying.sync(done)
        return synced
