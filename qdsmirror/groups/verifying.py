"""The verifies of a group: begun by an operator or by the schedule, and what they have found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.logger import Logger
from twisted.python.failure import Failure

from qdsmirror.core.verify import VERIFY, Range, Verdict
from qdsmirror.errors import DegradedError, ProtocolError, QdsError, UsageError
from qdsmirror.groups.coverage import DIRTY
from qdsmirror.groups.verify import ENDED, Verify
from qdsmirror.groups.verify_turns import obstacle
from qdsmirror.limits import VERIFY_RETRY_SECONDS_MAX
from qdsmirror.storage.bitmap import write_blocks
from qdsmirror.storage.fingerprint import ranges_text

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit


class Verifying:
    """What verifies a group.

    :ivar run: the newest verify, running or ended; ``None`` where there was none yet.
    """

    log = Logger()

    def __init__(self, group: DriverGroup) -> None:
        self._group = group
        self.run: Verify | None = None
        #: What waits for what was found to be durable.
        self._durable: list[Callable[[], None]] = []
        self._unrecorded = self._recording = self._stopped = False
        #: When the next one is due by ``verify_every`` (the reactor's seconds).
        self._due = 0.0
        group.pmd.listeners[VERIFY] = self._reported

    def resume(self, states: Sequence[Mapping[str, Any] | None]) -> None:
        """Take up what the superblocks, by LDSU, say."""
        if any(state is not None for state in states):
            self.run = Verify.resumed(self._group, states)
            self.set_due()

    def stop(self) -> None:
        """Do nothing more, and begin none by itself: the driver stops."""
        self._stopped = True
        if self.run is not None:
            self.run.stop()

    # -- begin and end --------------------------------------------------------------------------

    def order(self, how: str) -> Deferred[dict[str, Any]]:
        """Do what ``qdsverify`` asks for: ``compare``, ``repair`` or ``stop``.

        One that runs already is joined, and repairs if that is asked for now.

        :returns: fires with the verify's status when it has durably begun.
        :raises DegradedError: the group cannot be verified now, or there is nothing to stop.
        :raises UsageError: it asks for something else.
        """
        if how not in ("compare", "repair", "stop"):
            raise UsageError(f"a verify cannot {how}", hint="see qdsverify(1)")
        run = self.run
        if run is not None:
            # It may be at its end, and not know.
            run.end_if_hindered()
        if how == "stop":
            return self._stop_run()
        if run is None or run.over:
            return self._begin_asked(repair=how == "repair")
        if how == "repair":
            run.repair = True
        return self._recorded()

    def _stop_run(self) -> Deferred[dict[str, Any]]:
        if self.run is None or self.run.over:
            raise DegradedError(f"{self._group.name}: no verify is running")
        self.run.end("asked for by the operator")
        return self._recorded()

    def _begin_asked(self, repair: bool) -> Deferred[dict[str, Any]]:
        group = self._group
        why = obstacle(group)
        if why:
            raise DegradedError(
                f"{group.name} cannot be verified: {why}",
                hint=f"see qdsinfo -g {group.number}, and make the mirror coherent with qdsrefresh",
            )
        if not group.pmd.is_connected:
            raise DegradedError(
                f"{group.name} cannot be verified: there is no link to the secondary",
                hint=f"watch it with qdsinfo -g {group.number}",
            )
        return self._begin(repair)

    @inlineCallbacks
    def _begin(self, repair: bool) -> Any:
        group, before = self._group, self.run
        run = self.run = Verify(group, repair)
        if before is not None:
            run.last = before.summary()
        if group.coherent and not group.memory.used:
            # They tell of an earlier bypass.  From now on they are what differs.
            stale = [unit for unit in group.units if unit.dirty.dirty_bytes()]
            yield gatherResults([unit.direct.clear_dirty() for unit in stale])
        try:
            status: dict[str, Any] = yield self._recorded()
        except QdsError as error:
            run.end(error.message)
            raise
        self.log.info("{group}: verify has begun", group=group.name)
        run.begin()
        return status

    @inlineCallbacks
    def _recorded(self) -> Any:
        """Make durable how the newest verify stands; fires with its status."""
        run = self.run
        assert run is not None
        yield self._group.checkpoints.record_everywhere(verify=run.state)
        return run.status()

    def record(self, then: Callable[[], None] = lambda: None) -> None:
        """Make durable how the newest verify stands, then call ``then``."""
        self._recorded().addCallbacks(lambda _status: then(), self._note)

    def _note(self, failure: Failure) -> None:
        failure.trap(QdsError)  # type: ignore[no-untyped-call]
        self._group.note_error(failure.getErrorMessage())

    def ended(self) -> None:
        """Learn that the newest verify is over."""
        run = self.run
        assert run is not None
        self.set_due()
        self.log.info(
            "{group}: verify has ended: {result} {reason}",
            group=self._group.name, result=run.result, reason=run.reason,
        )  # fmt: skip
        self.record()

    # -- the schedule -----------------------------------------------------------------------------

    def set_due(self) -> None:
        """Count from the last end; where the clock was set back meanwhile, from now (rules.md 26).

        One that was ended early is tried again before long.
        """
        run = self.run
        if run is None or run.finished is None:
            return
        runtime = self._group.runtime
        every = self._group.config.tunables.verify_every
        if run.result == ENDED:
            every = min(every, VERIFY_RETRY_SECONDS_MAX)
        age = min(max(0.0, runtime.wall() - run.finished), every)
        self._due = runtime.reactor.seconds() + every - age

    def tick(self) -> None:
        """Go on, or begin by the schedule; called now and then."""
        group = self._group
        if self.run is not None and not self.run.over:
            self.run.poke()
            return
        if (
            not self._stopped
            and group.config.tunables.verify_every
            and group.runtime.reactor.seconds() >= self._due
            and group.coherent
            and group.pmd.is_connected
            and not obstacle(group)
        ):
            self._begin(repair=False).addErrback(self._note)

    # -- what the secondary says ------------------------------------------------------------------

    def _reported(self, report: dict[str, Any]) -> None:
        """Take what the secondary has found, also at frames that nobody here knows any more.

        :raises ProtocolError: it is about what does not exist.
        """
        verdict = Verdict.from_json(report)
        group = self._group
        if verdict.ldsu >= len(group.units):
            raise ProtocolError(f"a report on a verify of LDSU {verdict.ldsu}, which is not there")
        unit = group.units[verdict.ldsu]
        if any(not size or at + size > unit.size for at, size in verdict.differs):
            raise ProtocolError(f"a report on a verify is about what {unit.name} does not have")
        if self.run is not None and self.run.reported(verdict):
            return
        if verdict.differs:
            self.differs(unit, verdict.differs, lambda: None)
        elif verdict.more and group.coherent:
            group.coherence.lose("a verify has found that the mirror differs in many places")

    def differs(self, unit: DriverUnit, ranges: Sequence[Range], then: Callable[[], None]) -> None:
        """Record that a mirror differs; ``then`` is called when that is durable (COHERENT, LOUD).

        The bits first: a mirror that is tracked is mended by what is marked.
        """
        group = self._group
        if group.coherent:
            where = ranges_text([(offset, offset + length) for offset, length in ranges])
            reason = f"a verify has found that the mirror of {unit.name} differs ({where})"
            group.coherence.differs(reason)
            group.note_error(reason)
            self._unrecorded = True
        changed = unit.dirty.mark(ranges)
        job = group.refresh_job
        if changed and job is not None and job.kind == DIRTY:
            # It may be past that already; the next one is not.
            group.coherence.kill_refresh().addErrback(self._note)

        def marked(_result: None, error: BaseException | None) -> None:
            if error is not None:
                unit.fail_log(error)
                return
            self._durable.append(then)
            self._record_divergence()

        unit.run_on_bitmap(
            partial(
                write_blocks, unit.writelog.device, unit.dirty.area, unit.dirty.blocks(changed)
            ),
            marked,
        )

    def _record_divergence(self) -> None:
        """Record that the mirror is not coherent, once; go on with what has waited for it."""
        if self._recording:
            return
        if self._unrecorded:
            self._recording = True
            coherence = self._group.coherence
            recorded = self._group.checkpoints.record_everywhere(
                coherent=lambda _unit: coherence.coherent,
                tracked=lambda _unit: coherence.tracked,
                reason=lambda _unit: coherence.reason,
            )
            recorded.addCallbacks(self._divergence_recorded, self._not_recorded)
            return
        waiting, self._durable = self._durable, []
        for then in waiting:
            then()

    def _divergence_recorded(self, _result: None) -> None:
        self._recording = self._unrecorded = False
        self._record_divergence()

    def _not_recorded(self, failure: Failure) -> None:
        # The writelog has failed: what waits was never verified.
        self._recording = False
        self._note(failure)

    # -- status -----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any] | None:
        """Give the ``verify`` object of ``qdsinfo --json``."""
        if self.run is None:
            return None
        group = self._group
        planned: float | None = None
        if group.config.tunables.verify_every and self.run.over:
            left = max(0.0, self._due - group.runtime.reactor.seconds())
            planned = group.runtime.wall() + left
        return {**self.run.status(), "next": planned}
