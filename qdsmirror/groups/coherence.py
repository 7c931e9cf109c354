"""Whether a group's mirror is usable, and the refresh that makes it so (invariant COHERENT)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.logger import Logger

from qdsmirror.core.generations import Settled
from qdsmirror.core.states import Event, Mode
from qdsmirror.errors import DegradedError, QdsError, UsageError
from qdsmirror.groups.bypass import OFF
from qdsmirror.groups.coverage import DIRTY, KINDS, SMART
from qdsmirror.groups.refresh import Refresh

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup


class Coherence:
    """What the primary durably knows of its mirror.

    :ivar coherent: whether the mirror is the group's state as of one instant.
    :ivar tracked: whether the writelogs' frames and the dirty bitmaps have all that the mirror
        lacks, so that a dirty refresh makes it equal.  A coherent mirror is tracked; a full refresh
        gives it up, since its secondary may begin anew at the cut.
    :ivar reason: why it is not; "" while it is.
    :ivar job: the refresh in progress.
    """

    log = Logger()

    def __init__(self, group: DriverGroup) -> None:
        self._group = group
        self.coherent = self.tracked = False
        self.reason = ""
        self.job: Refresh | None = None

    def resume(self, settled: Settled) -> None:
        """Take up what the superblocks say."""
        self.coherent = settled.coherent
        self.tracked = settled.tracked
        self.reason = settled.reason
        self.job = Refresh.resumed(self._group, settled.refreshes)
        if self.job is not None:
            # A pmd may attach before the begin mark is durable, and so before it has a cut.
            self._begun(self.job)

    @inlineCallbacks
    def refresh(self, kind: str) -> Any:
        """Begin a refresh; fires with its status once it has durably begun.

        In bypass, this leaves it.

        :param kind: one of KINDS, or ``auto`` for the one that sends least.
        :raises DegradedError: one is running already, or a dirty one would not do.
        """
        group = self._group
        if group.bypass.phase != OFF:
            left: dict[str, Any] = yield self.leave_bypass(kind)
            return left
        chosen = self._choose(kind)
        group.failures.check_logs("refresh")
        group.failures.check_data("refresh")
        group.modes.refuse(Event.REFRESH_BEGUN, *self.coming)
        status: dict[str, Any] = yield self._begin(chosen, "asked for by the operator")
        return status

    @property
    def coming(self) -> tuple[Mode, ...]:
        """Refresh, also while it is only on its way to be durable."""
        return (Mode.REFRESH,) if self.job is not None else ()

    def _choose(self, kind: str) -> str:
        """Give the kind of refresh that will do."""
        name = self._group.name
        lacks_nothing = self.coherent and self._group.bypass.phase == OFF
        if kind == "auto":
            return DIRTY if self.tracked and not lacks_nothing else SMART
        if kind not in KINDS:
            raise UsageError(f"there is no {kind} refresh", hint="use --full, --smart or --dirty")
        if kind == DIRTY and (lacks_nothing or not self.tracked):
            why = "lacks nothing" if lacks_nothing else "lacks more than the dirty bitmaps have"
            raise DegradedError(f"{name}: its mirror {why}", hint="use qdsrefresh --smart")
        return kind

    def _check_room(self) -> None:
        """Check that a refresh can begin, ever: what fills a writelog may be for nobody.

        :raises DegradedError: it is full of what the secondary, of another history, never takes.
        """
        group = self._group
        if group.pmd.link.get("diverged") and not group.units[0].own_frames.control_room:
            raise DegradedError(
                f"{group.name}: no room for a refresh: its writelogs are full of what the "
                "secondary, of another history, can never take",
                hint=f"give it up: qdsbypass on -g {group.number}, then off",
            )

    def _marks(self, job: Refresh) -> dict[str, Any]:
        """Begin to be incoherent; give what must be durable before the refresh begins."""
        self.coherent = False
        self.tracked = job.kind == DIRTY
        self.reason = "a refresh is in progress"
        return {
            "coherent": False,
            # Asked for when it is written: the secondary may have lost the mirror by then.
            "tracked": lambda _unit: self.tracked,
            "reason": self.reason,
            "refresh": job.state,
        }

    @inlineCallbacks
    def _begin(self, kind: str, reason: str, event: Event = Event.REFRESH_BEGUN) -> Any:
        """Mark the mirror incoherent durably, then begin (invariant COHERENT)."""
        group = self._group
        job = self.job = Refresh(group, kind)
        try:
            self._check_room()
            yield group.checkpoints.record_everywhere(**self._marks(job))
        except QdsError as error:
            job.forgo()
            if self.job is job:
                self._give_up_job(f"the refresh could not begin: {error.message}")
            raise
        if self.job is job:
            group.modes.happen(event, group.runtime.wall(), reason)
            job.begin()
        return (yield self._begun(job))

    @inlineCallbacks
    def _begun(self, job: Refresh) -> Any:
        yield job.begun
        if self.job is job:
            self._group.pmd.tell_refresh(job.announcement())
        return job.status()

    @inlineCallbacks
    def leave_bypass(self, kind: str = "auto") -> Any:
        """Leave bypass by a refresh; fires with its status once it has durably begun.

        :param kind: see :meth:`refresh`.
        :raises DegradedError: the group is not in bypass, or cannot leave it yet.
        :raises DeviceFailedError: a device has failed.
        """
        group = self._group
        if group.way_out.holds_unsendable:
            self._choose(kind)
            yield group.way_out.give_up_unsendable()
        generations = group.way_out.next_generation()
        job = Refresh(group, self._choose(kind))
        yield group.way_out.leave(generations, **self._marks(job))
        self.job = job
        group.modes.happen(Event.BYPASS_ENDED, group.runtime.wall(), "bypass was left")
        job.begin()
        group.bypass.left()
        if job.kind == DIRTY and not self.tracked:
            # Lost on the way: what the mirror lacks now the bitmaps do not have.
            self._end_early(job, self.reason)
            yield group.checkpoints.record_everywhere(refresh=None)
        return (yield self._begun(job))

    def end_for_bypass(self) -> None:
        """End a refresh, which cannot go on in bypass; the mirror stays incoherent."""
        if self.job is not None:
            self.reason = "the last refresh was ended by a bypass"
            self._end_early(self.job, self.reason)

    def _end_early(self, job: Refresh, reason: str) -> None:
        group = self._group
        job.stop()
        self.job = None
        group.modes.happen(Event.REFRESH_KILLED, group.runtime.wall(), reason)
        if not job.begun.called:
            job.begun.errback(DegradedError(f"{group.name}: {reason}"))

    def _give_up_job(self, reason: str) -> None:
        """Have no refresh any more, for want of a place to record what becomes of it (LOUD)."""
        group, job = self._group, self.job
        self.reason = reason
        self.job = None
        if job is not None:
            job.stop()
        if Mode.REFRESH in group.modes.modes:
            group.modes.happen(Event.REFRESH_KILLED, group.runtime.wall(), reason)

    @inlineCallbacks
    def restart(self, lost: str) -> Any:
        """Begin anew: the secondary has lost part of what the refresh with this id had sent it."""
        job = self.job
        if job is None or job.id.hex() != lost:
            return
        group = self._group
        self.log.warn(
            "{group}: the secondary has lost part of the refresh; it begins anew", group=group.name
        )
        job.stop()
        try:
            why = "the secondary lost part of the one before"
            yield self._begin(job.kind, why, Event.REFRESH_RESTARTED)
        except QdsError as error:
            group.note_error(f"the refresh could not begin anew: {error.message}")

    @inlineCallbacks
    def kill_refresh(self) -> Any:
        """End a refresh; the mirror stays incoherent.

        :raises DegradedError: none is running.
        """
        job = self.job
        group = self._group
        group.modes.refuse(Event.REFRESH_KILLED, *self.coming)
        assert job is not None
        self.reason = "the last refresh was ended before it was complete"
        self._end_early(job, self.reason)
        yield group.checkpoints.record_everywhere(refresh=None, reason=self.reason)
        group.pmd.tell_refresh(None)
        return {}

    def committed(self, gsn: int) -> None:
        """Learn what the secondary has committed: perhaps the end mark."""
        if self.job is not None and self.job.was_committed(gsn):
            self._end()

    @inlineCallbacks
    def _end(self) -> Any:
        group = self._group
        self.job = None
        try:
            yield group.checkpoints.record_everywhere(
                refresh=None, coherent=True, tracked=False, reason=""
            )
        except QdsError as error:
            self._give_up_job(f"the refresh is complete, but that {error.message}")
            group.note_error(self.reason)
            return
        self.coherent = self.tracked = True
        self.reason = ""
        group.modes.happen(Event.REFRESH_ENDED, group.runtime.wall())
        self.log.info("{group}: refresh complete, the mirror is coherent", group=group.name)
        group.answering.mirror_is_whole()
        group.pmd.tell_refresh(None)

    def link_up(self) -> None:
        """Learn that the secondary is connected."""
        if self.job is not None:
            self.job.link_up()

    def diverged(self, reason: str) -> Deferred[None]:
        """Learn that the secondary holds another history.

        A refresh that counts what the one before it held begins anew.
        """
        if self.job is not None and self.job.compared:
            restarted: Deferred[None] = self.restart(self.job.id.hex())
            return restarted
        lost: Deferred[None] = self.lose(reason)
        return lost

    def differs(self, reason: str) -> None:
        """Learn that a verify has found a difference; whoever says so makes it durable.

        What differs is in the dirty bitmaps by then: a dirty refresh mends it.
        """
        if self.coherent:
            self.coherent = False
            self.reason = reason

    @inlineCallbacks
    def lose(self, reason: str) -> Any:
        """Record that the secondary does not hold this group's mirror (any more).

        A dirty refresh, which builds on it, ends.
        """
        group, job = self._group, self.job
        if not self.tracked and (job is None or job.kind != DIRTY):
            return
        self.coherent = self.tracked = False
        self.reason = reason
        changes: dict[str, Any] = {}
        if job is not None:
            self._end_early(job, reason)
            changes["refresh"] = None
        try:
            yield group.checkpoints.record_everywhere(
                coherent=False, tracked=False, reason=reason, **changes
            )
        except QdsError as error:
            group.note_error(error.message)

    def became_equal(self) -> None:
        """Learn that the data devices are what the mirror is, durably: a backfresh has ended."""
        self.coherent = self.tracked = True
        self.reason = ""
        self._group.answering.mirror_is_whole()

    def give_up(self, reason: str, **changes: Any) -> Deferred[None]:
        """Record that the mirror is no copy of the data devices, which are gone on with.

        :param changes: fields of the superblocks that change with it.
        """
        self.coherent = self.tracked = False
        self.reason = reason
        return self._group.checkpoints.record_everywhere(
            coherent=False, tracked=False, reason=reason, refresh=None, **changes
        )
