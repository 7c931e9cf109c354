"""What a primary's group makes of a failed device (rules.md 13, 16).

A failed writelog: framing stops.  That the log is not to be trusted is made durable in the other
superblocks and in the state file.  What the log held or was to hold is then written past it to the
data device, and synced.  When that is durable too, the group goes on in bypass for good: nothing
after the break is ever sent, and only new writelogs and a full refresh lead out.

A failed data device: its LDSU answers errors.  Once that is durable everywhere, it counts as
applied, so that the group and its tail go on.

Where it cannot be recorded: errors, and no second try.  What a crash interrupts is completed at the
next start (:mod:`qdsmirror.groups.restart`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, DeferredLock, inlineCallbacks
from twisted.logger import Logger

from qdsmirror.core.failures import Dead, Failed, Untrusted
from qdsmirror.core.states import Event
from qdsmirror.errors import DeviceFailedError, QdsError
from qdsmirror.groups.bypass import ENTERING, OFF, ON
from qdsmirror.limits import FAILURE_REASON_CHARS_MAX

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit
    from qdsmirror.storage.latch import FailureLatch

WRITELOG, DATA_DEVICE = "writelog", "data device"


class Failures:
    """The failed devices of a group.

    :ivar recorded: what is durable of them, and what the LDSUs go by.
    :ivar stops_framing: a writelog has failed: nothing may be framed any more.
    :ivar restarted: a writelog failed before this start, so that it is not there to be sent.
    """

    log = Logger()

    def __init__(self, group: DriverGroup, latch: FailureLatch) -> None:
        self._group = group
        self._latch = latch
        self.recorded = Failed()
        self.stops_framing = False
        self.restarted = False
        #: What could not be recorded.
        self._refused: Failed | None = None
        #: By device and LDSU, in seconds since 1970.
        self._since: dict[tuple[str, int], float] = {}
        self._working = False
        #: One after the other writes the state file.
        self._file = DeferredLock()

    @property
    def since(self) -> float:
        """When the first device failed, in seconds since 1970; 0 if none has."""
        return min(self._since.values(), default=0.0)

    def happened(self, unit: DriverUnit, what: str, error: BaseException) -> None:
        """Learn that a device has failed, for good (invariant LOUD)."""
        if unit.log_failed if what == WRITELOG else unit.dead:
            return
        group, config = self._group, unit.config
        path = config.log_device if what == WRITELOG else config.data_device
        reason = f"{what} {path} failed: {error}"
        self._since[what, unit.index] = group.runtime.wall()
        self.log.error("{group} {unit}: {reason}", group=group.name, unit=unit.name, reason=reason)
        group.notes.append(reason)
        self._latched(unit, what, reason)
        self.remember(path, error)
        if what == WRITELOG:
            group.backfresh.log_failed()
        group.bypass.poke()
        group.note_idle()
        if not self._working:
            self._work()

    def _latched(self, unit: DriverUnit, what: str, reason: str) -> None:
        if what == WRITELOG:
            unit.log_failed = reason
            self.stops_framing = True
        else:
            unit.dead = reason
            unit.refuse(reason)

    def remember(self, path: str, error: BaseException) -> None:
        """Remember a failed sync for good: the master at once, then the state file (rules.md 4).

        The file is written in a thread, so that other groups go on however long that takes;
        whatever is made of the failure is written after it.
        """
        if self._latch.tell(path, error):
            self._in_file(self._latch.write, path, error).addErrback(
                lambda failure: self._group.note_error(str(failure.value))
            )

    def _in_file(self, job: Callable[..., None], *args: Any) -> Deferred[None]:
        return self._file.run(self._group.runtime.blocking, job, *args)

    @property
    def busy(self) -> bool:
        """Whether something is half-way, or not yet in the state file."""
        return self._working or bool(self._file.locked)

    @inlineCallbacks
    def stop(self) -> Any:
        """Fire when nothing is half-way: the driver stops."""
        yield self._group.bypass.until(lambda: not self._working)
        yield self._file.run(lambda: None)

    def check_logs(self, doing: str) -> None:
        """Check that every writelog is as it should be.

        :param doing: what is not possible otherwise.
        :raises DeviceFailedError: one has failed.
        """
        group = self._group
        failed = next((unit.log_failed for unit in group.units if unit.log_failed), "")
        if failed:
            raise DeviceFailedError(
                f"{group.name}: no {doing} while a writelog has failed: {failed}",
                hint=f"replace it, run qdswlinit -g {group.number} --yes, then qdsrefresh "
                f"-g {group.number} --full",
            )

    def check_data(self, doing: str) -> None:
        """Check that every data device is as it should be, and holds what it should.

        :param doing: what is not possible otherwise.
        :raises DeviceFailedError: one has failed.
        :raises DegradedError: one lacks blocks (:meth:`Backfresh.check_whole`).
        """
        self.check_alive(doing)
        self._group.backfresh.check_whole(doing)

    def check_alive(self, doing: str) -> None:
        """Check that no data device has failed.

        :param doing: what is not possible otherwise.
        :raises DeviceFailedError: one has failed.
        """
        group = self._group
        failed = next((unit.dead for unit in group.units if unit.dead), "")
        if failed:
            raise DeviceFailedError(
                f"{group.name}: no {doing} while a data device has failed: {failed}",
                hint="replace it; see Failed devices in qdsmirror-architecture(7)",
            )

    def check_recorded(self) -> None:
        """Check that no failed data device is in the way of the others.

        :raises DeviceFailedError: one is, since its failure could not be recorded.
        """
        if self._refused is not None and not self._working:
            self.check_alive("way on")

    # -- recording ------------------------------------------------------------------------------

    def resume(self, recorded: Failed) -> None:
        """Take up what the start has found, and has made durable."""
        self.recorded = recorded
        for index, log in recorded.untrusted.items():
            self._latched(self._group.units[index], WRITELOG, log.reason)
            self._since[WRITELOG, index] = log.since
            self.restarted = True
        for index, device in recorded.dead.items():
            self._latched(self._group.units[index], DATA_DEVICE, device.reason)
            self._since[DATA_DEVICE, index] = device.since

    def _wanted(self) -> Failed:
        """Give what should be durable by now."""
        upto = self._break()
        group = self._group
        untrusted: dict[int, Untrusted] = {}
        dead: dict[int, Dead] = {}
        for unit in group.units:
            if unit.log_failed:
                reason, since = _shorten(unit.log_failed), self._since[WRITELOG, unit.index]
                untrusted[unit.index] = Untrusted(reason, since, upto, unit.unlogged, unit.size)
            if unit.dead:
                reason, since = _shorten(unit.dead), self._since[DATA_DEVICE, unit.index]
                dead[unit.index] = Dead(reason, since, unit.size)
        return Failed(untrusted, dead, group.generation.hex())

    def _break(self) -> int:
        """Give the last GSN that may be sent: below the failed logs' first non-durable frame."""
        group = self._group
        before = [log.upto for log in self.recorded.untrusted.values()]
        return min([group.last_sendable(), *before])

    @inlineCallbacks
    def _work(self) -> Any:
        self._working = True
        group = self._group
        try:
            while self._wanted() != self.recorded or not self._is_drained_durably():
                if self._wanted() == self._refused:
                    break
                yield self._go_on()
        except QdsError as error:
            self._give_up(error.message)
        except Exception:  # noqa: BLE001 - whatever it is, nothing may go on as if it were well
            self.log.failure("{group}: a failed device cannot be dealt with", group=group.name)
            self._give_up("internal error")
        finally:
            self._working = False
        group.bypass.poke()
        group.note_idle()

    def _is_drained_durably(self) -> bool:
        return all(log.drained for log in self.recorded.untrusted.values())

    @inlineCallbacks
    def _go_on(self) -> Any:
        """Do the next step; whatever fails meanwhile is seen after it."""
        group = self._group
        yield group.bypass.until(lambda: not any(u.log_failed and u.is_on_log for u in group.units))
        wanted = self._wanted()
        if wanted != self.recorded:
            before = self.recorded.dead
            yield self._record(wanted)
            for unit in group.units:
                if unit.exempt and unit.index not in before:
                    unit.applying.be_exempt()
                    unit.syncing.go_on()
                    group.checkpoints.take()
            return
        yield self._drain()

    @inlineCallbacks
    def _record(self, wanted: Failed, **more: Any) -> Any:
        """Make it durable in the state file and in the superblocks; tell whether it is.

        :raises QdsError: the state file cannot be written.
        """
        yield self._in_file(self._latch.record_group, wanted)
        try:
            yield self._group.checkpoints.record_everywhere(failures=wanted.to_json(), **more)
        except QdsError:
            # Another writelog has failed, and is to be recorded first.
            return False
        self.recorded = wanted
        return True

    def _give_up(self, why: str) -> None:
        group = self._group
        self._refused = self._wanted()
        group.note_error(f"a failed device cannot be recorded: {why}")
        if self.stops_framing:
            for unit in group.units:
                failed = next((one.log_failed for one in group.units if one.log_failed), "")
                unit.refuse(f"{failed}; that cannot be recorded: {why}")

    # -- a writelog ------------------------------------------------------------------------------

    @inlineCallbacks
    def _drain(self) -> Any:
        """Put on the data devices what the writelogs hold, and go on past them."""
        group = self._group
        bypass = group.bypass
        yield bypass.until(lambda: bypass.phase in (OFF, ON))
        if bypass.phase == OFF:
            bypass.phase = ENTERING
            group.coherence.end_for_bypass()
        for unit in group.units:
            unit.syncing.hasten()
            if unit.log_failed and unit.index in self.recorded.untrusted:
                unit.write_past_log()
        yield bypass.until(self._is_drained)
        if self._wanted() != self.recorded:
            return
        lost = self.recorded.untrusted
        reason = "; ".join(log.reason for log in lost.values())
        state = bypass.state or {"id": os.urandom(16).hex(), "since": group.runtime.wall()}
        state = {**state, "reason": f"{reason}: new writelogs and a full refresh are needed"}
        drained = {index: replace(log, drained=True) for index, log in lost.items()}
        done = yield self._record(
            replace(self.recorded, untrusted=drained),
            bypass=state,
            refresh=None,
            coherent=group.coherent,
            reason=group.coherence.reason,
            **group.checkpoints.each_cursor(),
        )
        if done:
            self._go_past(state)

    def _is_drained(self) -> bool:
        """Whether all that was framed is on the data devices, synced, or something failed anew."""
        group = self._group
        if self._wanted() != self.recorded:
            return True
        if group.checkpoints.running or any(unit.has_frames for unit in group.units):
            return False
        if all(unit.applying.is_synced for unit in group.units):
            return True
        group.checkpoints.take()
        return False

    def _go_past(self, state: dict[str, Any]) -> None:
        group = self._group
        for unit in group.units:
            if unit.unlogged:
                unit.syncing.answer_late()
        group.bypass.begin(state)
        group.modes.happen(Event.WRITELOG_FAILED, group.runtime.wall(), state["reason"])
        group.pmd.tell_refresh(None)
        for unit in group.units:
            unit.full_since = None
            unit.direct.begin()


def _shorten(reason: str) -> str:
    return reason[:FAILURE_REASON_CHARS_MAX]
