"""Backfresh of a group: its data devices become what the mirror devices are.

Entering (rules.md 11): the LDSUs are closed to applications; everything framed is made durable,
applied and synced; the secondary has all of it, or the operator gives up what it lacks; then the
record of the backfresh is made durable everywhere, and only then the first block is overwritten
(COHERENT).  From then on the data devices are no copy of anything, until the end is durable: the
LDSUs stay closed, whatever is restarted.

The end: every block is synced, and the mirror stands where it stood.  Where the secondary had all,
the history goes on.  Where something was given up, the writelogs' history ends (GENERATION): they
begin anew where the mirror stands, with a switch that names the mirror's history, so that the
secondary follows (rules.md 7).  What a crash interrupts is completed at the next start
(:func:`qdsmirror.core.backfresh.completed`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.logger import Logger
from twisted.python.failure import Failure

from qdsmirror.core.backfresh import ENDED, INTERRUPTED, NEEDED, RUNNING, BackfreshState
from qdsmirror.core.states import Event, Mode
from qdsmirror.errors import BrokenError, DegradedError, QdsError, UsageError
from qdsmirror.groups import bypass
from qdsmirror.groups.agreeing import Agreement, about, check_clients, new_states
from qdsmirror.groups.closing import close_units
from qdsmirror.groups.equality import record_equal
from qdsmirror.groups.fetching import Fetching
from qdsmirror.limits import BACKFRESH_RECORD_SECONDS, KEEP_PATH_BYTES_MAX
from qdsmirror.storage.keep import KeepWriter

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit

OFF, BEGINNING, ON, ENDING = "off", "beginning", "on", "ending"


class Backfresh:
    """A group's backfresh.

    :ivar phase: OFF, BEGINNING, ON (blocks are fetched) or ENDING.
    :ivar job: what fetches.
    :ivar trial: a dry run, under way or the last one.
    """

    log = Logger()

    def __init__(self, group: DriverGroup) -> None:
        self._group = group
        self.phase = OFF
        self.job: Fetching | None = None
        self.trial: Fetching | None = None
        self._last: dict[str, Any] | None = None
        #: By LDSU what its superblock says; those that are not here hold what they should.
        self._states: dict[int, BackfreshState] = {}
        self._agreement = Agreement(group)
        self._changing = False
        self._recording = False
        self._timer: Any = None

    # -- what is so -----------------------------------------------------------------------------

    @property
    def stops_framing(self) -> bool:
        """Whether nothing may be framed."""
        return self.phase != OFF

    @property
    def coming(self) -> tuple[Mode, ...]:
        """Backfresh, also while it is only on its way to be durable."""
        return (Mode.BACKFRESH,) if self.phase != OFF else ()

    @property
    def gives_up(self) -> bool:
        """Whether what the secondary lacks is given up, and so must not be sent."""
        return any(state.discard for state in self._states.values())

    @property
    def reason(self) -> str:
        """What an operator must know first; "" while there is nothing."""
        if self.job is not None:
            return f"backfresh waits: {self.job.waits}" if self.job.waits else ""
        lacking = [unit.name for unit in self._group.units if unit.index in self._states]
        if not lacking or self.phase != OFF:
            return ""
        first = next(iter(self._states.values()))
        return f"{', '.join(lacking)} closed, backfresh needed: {first.reason}"

    def status(self) -> dict[str, Any] | None:
        """Give the ``backfresh`` object of ``qdsinfo --json``; the last one's once it has ended."""
        lacking = next(iter(self._states.values()), None)
        if self.job is not None or lacking is None:
            if self.phase == BEGINNING:
                return {"state": BEGINNING}
            job = self.job or self.trial
            return job.status() if job is not None else self._last
        return {
            "state": NEEDED if self.phase == OFF else self.phase,
            "id": lacking.id.hex(),
            "started": lacking.started,
            "reason": lacking.reason,
        }

    def check_whole(self, doing: str) -> None:
        """Check that every data device holds what it should.

        :param doing: what is not possible otherwise.
        :raises DegradedError: one is being fetched, or lacks blocks.
        """
        group = self._group
        if self.phase != OFF:
            group.modes.refuse(Event.REFRESH_BEGUN, *self.coming)
        if self._states:
            raise DegradedError(
                f"{group.name}: no {doing} while {self.reason}",
                hint=f"qdsbackfresh -g {group.number} --yes",
            )

    # -- life -----------------------------------------------------------------------------------

    def resume(self, *, lost: bool) -> None:
        """Take up what the superblocks say, before the LDSUs are served.

        :param lost: a writelog was lost with its memory, and so the history that it was to go on
            with: the mirror's takes its place.
        """
        group = self._group
        for unit in group.units:
            state = BackfreshState.of(unit.writelog.superblock)
            if state is not None:
                self._states[unit.index] = state
        if any(state.phase == RUNNING for state in self._states.values()):
            self.phase = ON
            if lost and not self.gives_up:
                generation = os.urandom(16)
                self._states = {
                    index: replace(state, discard=generation)
                    for index, state in self._states.items()
                }
        if self.gives_up:
            group.pmd.hold(True)
        close_units(self._group.units, self._states, fetching=self.phase != OFF)

    def begin_again(self) -> None:
        """Go on with what was resumed: the LDSUs are served by now."""
        if self.phase == ON:
            first = self._states[0]
            now = "resumed when the driver started"
            self._group.modes.happen(Event.BACKFRESH_BEGUN, first.started, now)
            self._fetch(touched=True)

    @inlineCallbacks
    def stop(self) -> Any:
        """Fire when nothing is half-way: the driver stops."""
        self._agreement.ended = True
        yield self._until(lambda: not self._changing)
        self._cancel_timer()
        jobs = [job for job in (self.job, self.trial) if job is not None]
        for job in jobs:
            yield job.stop()
        yield self._until(lambda: not self._recording and not self._changing)
        for job in jobs:
            yield job.close()

    def link_up(self) -> None:
        """Learn that the secondary is connected."""
        for job in (self.job, self.trial):
            if job is not None:
                job.link_up()

    def log_failed(self) -> None:
        """Learn that a writelog has failed: data devices that lack blocks count as dead.

        Perhaps the only superblock that says so was in it; dead devices stand in the state file.
        """
        if self.job is not None:
            self.job.halt("a writelog has failed")
        for unit in self._group.units:
            if unit.index in self._states and not unit.dead:
                unit.fail_data(BrokenError(f"incoherent: {INTERRUPTED}"))

    def _until(self, happened: Callable[[], bool]) -> Deferred[None]:
        return self._group.bypass.until(happened)

    # -- beginning ------------------------------------------------------------------------------

    @inlineCallbacks
    def begin(self, *, dry_run: bool, discard: bool, force: bool, keep: str) -> Any:
        """Begin; fires with the status once that is durable, or a dry run under way.

        :param dry_run: only count what differs.
        :param discard: give up what the secondary lacks.
        :param force: end the connections of clients.
        :param keep: absolute path of a new file for what is overwritten; "": nothing is kept.
        :raises DegradedError: not now: the hint says what is in the way.
        :raises BrokenError: the mirror is no state to go back to.
        :raises DeviceFailedError: a device has failed.
        :raises UsageError: nothing can be kept under such a path.
        """
        group = self._group
        group.modes.refuse(Event.BACKFRESH_BEGUN, *self.coming, *group.coherence.coming)
        self._check_idle()
        group.failures.check_logs("backfresh")
        group.failures.check_alive("backfresh")
        if keep and (not os.path.isabs(keep) or len(os.fsencode(keep)) > KEEP_PATH_BYTES_MAX):
            raise UsageError(f"{keep} is no absolute path of {KEEP_PATH_BYTES_MAX} bytes at most")
        self._changing = True
        try:
            if dry_run:
                return (yield self._begin_trial(discard))
            return (yield self._begin(discard, force, keep))
        finally:
            self._changing = False
            group.bypass.poke()

    def _check_idle(self) -> None:
        if self._changing or self._group.bypass.phase not in (bypass.OFF, bypass.ON):
            name, number = self._group.name, self._group.number
            raise DegradedError(
                f"{name}: it is changing its mode", hint=f"watch it with qdsinfo -g {number}"
            )

    @inlineCallbacks
    def _begin_trial(self, discard: bool) -> Any:
        group = self._group
        yield self._drop_trial()
        if discard and not group.pmd.is_connected:
            group.pmd.hold(True)
        standings = yield self._agreement.reach(drained=False, quiet=False)
        states = new_states(group, standings, self._states, discard)
        self.trial = Fetching(group, states, self._trial_ended, writes=False)
        self.trial.poke()
        return self.trial.status()

    def _trial_ended(self) -> None:
        self._group.pmd.hold(self.gives_up)

    @inlineCallbacks
    def _drop_trial(self) -> Any:
        trial, self.trial = self.trial, None
        if trial is not None:
            yield trial.stop()
            yield trial.close()
            self._group.pmd.hold(self.gives_up)

    @inlineCallbacks
    def _begin(self, discard: bool, force: bool, keep: str) -> Any:
        group = self._group
        check_clients(group, force)
        yield self._drop_trial()
        self.phase = BEGINNING
        self.log.warn("{group}: a backfresh begins: its LDSUs are closed", group=group.name)
        try:
            close_units(self._group.units, self._states, fetching=self.phase != OFF)
            if discard:
                group.pmd.hold(True)
            yield self._until(self._is_quiet)
            standings = yield self._agreement.reach(drained=not discard)
            states = new_states(group, standings, self._states, discard, keep)
            writer = KeepWriter(keep, about(self._group, states)) if keep else None
            if writer is not None:
                yield group.runtime.blocking(writer.create)
            yield self._record_beginning(states, writer)
        except Exception:
            self.phase = OFF
            self._open_units()
            raise
        self._states = dict(enumerate(states))
        self.phase = ON
        group.pmd.hold(self.gives_up)
        why = "asked for by the operator"
        group.modes.happen(Event.BACKFRESH_BEGUN, group.runtime.wall(), why)
        self._fetch(keep=writer)
        return self.status()

    def _is_quiet(self) -> bool:
        """Whether all that was accepted is on the data devices, synced."""
        if any(unit.direct.busy or unit.syncing.has_late for unit in self._group.units):
            return False
        return self._group.bypass.is_all_applied() and not self._group.checkpoints.recording

    @inlineCallbacks
    def _record_beginning(self, states: Sequence[BackfreshState], writer: KeepWriter | None) -> Any:
        group = self._group
        group.failures.check_logs("backfresh")
        group.failures.check_alive("backfresh")
        try:
            yield group.checkpoints.record_everywhere(
                backfresh=lambda unit: states[unit.index].to_json(),
                refresh=None,
                **group.checkpoints.each_cursor(),
            )
        except QdsError:
            # Nothing was overwritten: what could be recorded is taken back.
            taken_back = group.checkpoints.record_everywhere(backfresh=self.recorded)
            yield taken_back.addErrback(_was_told)
            if writer is not None:
                yield group.runtime.blocking(writer.discard)
            raise

    def recorded(self, unit: DriverUnit) -> dict[str, Any] | None:
        """Give what an LDSU's superblock is to say."""
        state = self._states.get(unit.index)
        return state.to_json() if state is not None else None

    # -- LDSUs ----------------------------------------------------------------------------------

    def _open_units(self) -> None:
        """Open the LDSUs that hold what they should, and send what may be sent."""
        group = self._group
        group.pmd.hold(self.gives_up)
        for unit in group.units:
            if unit.index not in self._states:
                unit.open_export()
        close_units(self._group.units, self._states, fetching=self.phase != OFF)
        group.bypass.poke()
        group.frame_again()

    # -- under way ------------------------------------------------------------------------------

    def _fetch(self, keep: KeepWriter | None = None, *, touched: bool = False) -> None:
        states = [self._states[unit.index] for unit in self._group.units]
        if keep is None and states[0].keep:
            keep = KeepWriter(states[0].keep, about(self._group, states))
        job = Fetching(self._group, states, self._end, writes=True, keep=keep)
        job.touched = touched
        self.job = job
        self._look()
        job.poke()

    def _look(self) -> None:
        """Record now and then what is done."""
        self._record_progress()
        reactor = self._group.runtime.reactor
        self._timer = reactor.callLater(BACKFRESH_RECORD_SECONDS, self._look)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @inlineCallbacks
    def _record_progress(self) -> Any:
        """Record what is done, once it is synced: a restart goes on behind it."""
        job = self.job
        if job is None or self._recording or self._changing or self.phase != ON:
            return
        states = self._progressed(job)
        if states == self._states:
            return
        self._recording = True
        try:
            yield self._sync()
            yield self._record(states)
        except QdsError as error:
            self._group.note_error(f"the backfresh's progress: {error.message}")
        finally:
            self._recording = False
            self._group.bypass.poke()

    def _progressed(self, job: Fetching, **changes: Any) -> dict[int, BackfreshState]:
        return {
            index: replace(state, done=job.done[index], changed=job.changed[index], **changes)
            for index, state in self._states.items()
        }

    @inlineCallbacks
    def _sync(self) -> Any:
        yield self._group.bypass.sync()
        self._group.failures.check_alive("backfresh")

    @inlineCallbacks
    def _record(self, states: dict[int, BackfreshState], **more: Any) -> Any:
        """Make what is so durable everywhere."""
        self._group.failures.check_logs("backfresh")
        self._states = states
        yield self._group.checkpoints.record_everywhere(backfresh=self.recorded, **more)

    # -- the end --------------------------------------------------------------------------------

    @inlineCallbacks
    def _end(self) -> Any:
        group = self._group
        job = self.job
        assert job is not None
        self.phase = ENDING
        self._changing = True
        self._cancel_timer()
        try:
            yield job.stop()
            yield self._until(lambda: not self._recording)
            yield self._sync()
            states = self._progressed(job, phase=ENDED)
            yield self._record(states, **group.checkpoints.each_cursor())
            yield self._leave(states)
        except QdsError as error:
            job.halt(f"it has all blocks, but cannot end: {error.message}")
            group.note_error(f"backfresh: {job.waits}")
            return
        finally:
            self._changing = False
            group.bypass.poke()
        yield job.close()

    @inlineCallbacks
    def _leave(self, states: Mapping[int, BackfreshState]) -> Any:
        """Go on with equal devices: the end is durable."""
        group = self._group
        generations = yield record_equal(group, states)
        self._states = {}
        if generations:
            try:
                yield group.way_out.begin_generation(generations)
            except QdsError as error:
                # A writelog has failed, and is gone past: the data devices are whole.
                group.note_error(f"backfresh: its new generation: {error.message}")
        assert self.job is not None
        self._last = {**self.job.status(), "state": ENDED, "waits": ""}
        self.job = None
        self.phase = OFF
        group.modes.happen(Event.BACKFRESH_ENDED, group.runtime.wall())
        self.log.info("{group}: backfresh complete, its LDSUs are open", group=group.name)
        self._open_units()

    # -- killing --------------------------------------------------------------------------------

    @inlineCallbacks
    def kill(self, *, online: bool) -> Any:
        """End it early; the data devices stay incoherent, and the LDSUs closed.

        Unless nothing was overwritten yet: then all is as it was.

        :param online: open the LDSUs none the less, by consent: the mirror is not coherent then.
        :raises DegradedError: there is none, or it is just ending.
        """
        group = self._group
        if self.trial is not None and self.job is None and self.phase == OFF:
            yield self._drop_trial()
            return {}
        if not (online and self._states and self.phase == OFF):
            group.modes.refuse(Event.BACKFRESH_KILLED, *self.coming)
            self._check_idle()
        self._changing = True
        try:
            if self.job is not None:
                yield self._kill(self.job)
            if online and self._states:
                yield self._accept()
        finally:
            self._changing = False
            group.bypass.poke()
        return self.status() or {}

    @inlineCallbacks
    def _kill(self, job: Fetching) -> Any:
        group = self._group
        self._cancel_timer()
        yield job.stop()
        yield self._until(lambda: not self._recording)
        states = {
            index: replace(state, phase=NEEDED, reason=state.reason or INTERRUPTED)
            for index, state in self._states.items()
            if job.touched or state.lacked
        }
        yield self._record(states)
        yield job.close()
        self.job = None
        self.phase = OFF
        reason = INTERRUPTED if states else "killed before anything was overwritten"
        group.modes.happen(Event.BACKFRESH_KILLED, group.runtime.wall(), reason)
        self.log.warn("{group}: {reason}", group=group.name, reason=reason)
        self._open_units()

    @inlineCallbacks
    def _accept(self) -> Any:
        """Go on with the data devices as they are: they are no copy of the mirror."""
        group = self._group
        names = ", ".join(unit.name for unit in group.units if unit.index in self._states)
        reason = f"{names} opened by the operator without the backfresh needed"
        group.failures.check_logs("way back")
        yield group.coherence.give_up(reason, backfresh=None)
        self._states = {}
        self.log.warn("{group}: {reason}", group=group.name, reason=reason)
        self._open_units()


def _was_told(failure: Failure) -> None:
    failure.trap(QdsError)  # type: ignore[no-untyped-call]
