"""Mirroring: from the journal to the mirror devices, and the pause that a checkpoint makes.

Frames that became durable in the journal go to the mirror devices from memory.  While a checkpoint
holds they are not kept: when it is released, they are read from the journal again, piece by piece,
while others go on arriving (BOUND); and so are those that arrive until the end is reached.
Invariants kept here: PREFIX (in order, and only what is durable), TAIL, rules.md 22 (a checkpoint
is durable before it is told, and nothing passes it).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from twisted.internet.defer import Deferred

from qdsmirror.core.held import Held
from qdsmirror.core.records import Cursor, Generation
from qdsmirror.errors import (
    BrokenError,
    DegradedError,
    DeviceFailedError,
    ProtocolError,
    QdsError,
)
from qdsmirror.interfaces import IWorker
from qdsmirror.storage.journal import CUTS, Applied, Change

if TYPE_CHECKING:
    from qdsmirror.groups.committing import Committing


class Batch(NamedTuple):
    """Frames that became durable in the journal together; one of CUTS is the last of its batch.

    :ivar size: their bytes; ``end``: the place behind the last of them.
    """

    changes: list[Change]
    size: int
    end: Cursor

    @property
    def cuts(self) -> bool:
        """Whether something is to be recorded behind it."""
        return self.changes[-1].header.kind in CUTS


class Mirroring:
    """Applies a group's frames to its mirror devices.

    :param committing: gives the frames, and is told how far they have come.
    :param worker: writes the mirror devices.
    :ivar durable: behind the last frame that is durable in the journal.
    :ivar unmirrored_bytes: of frames kept in memory for the mirror devices.
    :ivar running: whether frames are being applied.
    """

    def __init__(self, committing: Committing, worker: IWorker) -> None:
        self.mirror = committing.mirror
        self.durable = self.mirror.reached
        self.unmirrored_bytes = 0
        self.running = False
        self._committing = committing
        self._worker = worker
        self._ready: list[Batch] = []
        #: Not all that is durable and not applied is in ``_ready``.
        self._behind = False
        self._stopping = False
        self._pausing: tuple[str, str, float, Deferred[Held]] | None = None
        self._changing = self._syncing = self._renewing = False

    @property
    def held(self) -> Held | None:
        """The checkpoint that holds."""
        return self.mirror.held

    @property
    def is_paused(self) -> bool:
        """Whether frames stay in the journal, and its space with them."""
        return self.held is not None or (self._behind and self._stopping)

    @property
    def busy(self) -> bool:
        """Whether something is under way, or about to be."""
        return (
            self.running
            or self._changing
            or self._syncing
            or self._renewing
            or (not self._committing.failed and self._has_work)
        )

    @property
    def _has_work(self) -> bool:
        if self._pausing is not None:
            return True
        return not self.is_paused and (bool(self._ready) or self._behind)

    def stop(self) -> None:
        """Begin no longer work: what is in the journal, the next start applies."""
        self._stopping = True

    def begin_anew(
        self, refresh_id: bytes, generation: Generation, cursor: Cursor
    ) -> Deferred[None]:
        """Go on from another place, once that is durable; only when nothing is under way.

        The one worker that else records places does it: what it has to record of the old one comes
        before, or sees that it is past.  A checkpoint that is asked for meanwhile waits.

        :raises ProtocolError: it stops.
        """
        if self._stopping:
            raise ProtocolError("the remote mirror daemon is stopping")
        begun: Deferred[None] = Deferred()

        def done(_result: None, error: BaseException | None) -> None:
            self._renewing = False
            if error is None:
                self.mirror.applied = self.durable = cursor
                self._behind = False
                begun.callback(None)
            else:
                begun.errback(error)
            self.go_on()
            self._committing.freed()

        def job() -> None:
            self.mirror.begin_anew(
                refresh_id,
                generations=(generation,),
                tail=cursor,
                applied=cursor,
                head=cursor,
                durable_gsn=cursor.gsn - 1,
            )

        self._renewing = True
        self._worker.run(job, done)
        return begun

    # -- frames -------------------------------------------------------------------------------

    def take(self, batch: Batch) -> None:
        """Take frames that have become durable."""
        self.durable = batch.end
        if not self._behind and self.held is None:
            self._ready.append(batch)
            self.unmirrored_bytes += batch.size

    def go_on(self) -> None:
        """Apply what there is to apply, unless something is under way."""
        if self.running or self._changing or self._renewing:
            return
        if self._pausing is not None:
            self._hold()
        elif self._committing.failed or self.held is not None:
            return
        elif self._behind and not self._stopping:
            self.running = True
            self._worker.run(partial(self.mirror.apply_journal, self.durable), self._stand)
        elif self._ready:
            self.running = True
            batches = self._next()
            self._worker.run(
                partial(self._apply, batches, self.durable), partial(self._was_applied, batches)
            )

    def _next(self) -> list[Batch]:
        """Take the batches up to the first that cuts."""
        count = next((n for n, b in enumerate(self._ready, 1) if b.cuts), len(self._ready))
        batches, self._ready = self._ready[:count], self._ready[count:]
        return batches

    def _apply(self, batches: Sequence[Batch], durable: Cursor) -> Applied:
        changes = [change for batch in batches for change in batch.changes]
        verdicts = self.mirror.apply(changes)
        place = batches[-1].end
        self.mirror.reach(changes[-1], place, durable)
        return Applied(place, len(changes), verdicts)

    def _was_applied(
        self, batches: Sequence[Batch], done: Applied | None, error: BaseException | None
    ) -> None:
        self.unmirrored_bytes -= sum(batch.size for batch in batches)
        self._stand(done, error)

    def _stand(self, done: Applied | None, error: BaseException | None) -> None:
        self.running = False
        committing = self._committing
        if done is None:
            assert error is not None
            name = self.mirror.config.name
            told = (
                error.message
                if isinstance(error, BrokenError)
                else (f"a mirror device of {name} failed: {error}")
            )
            committing.fail(told, error)
            self.go_on()
            return
        place = self.mirror.applied = done.place
        for verdict in done.verdicts:
            committing.report(verdict)
        for text in self.mirror.take_told():
            committing.holding.note(text)
        if self.held is not None:
            self._let_go()
            committing.holding.taken()
        elif self._behind:
            self._behind = place.position != self.durable.position
        self.go_on()
        committing.mirrored(self.running and not self._behind)

    def _let_go(self) -> None:
        """Keep nothing in memory for as long as a checkpoint holds."""
        self._ready.clear()
        self.unmirrored_bytes = 0

    # -- a checkpoint -------------------------------------------------------------------------

    def hold(self, name: str, hold: str, since: float) -> Deferred[Held]:
        """Pause behind the last frame applied; fires when that is durable.

        :param hold: RELEASE or STRICT.
        :param since: seconds since 1970.
        :raises DegradedError: a checkpoint holds already, or the mirror is not usable.
        """
        held: Deferred[Held] = Deferred()
        self._check_may_hold()
        self._pausing = (name, hold, since, held)
        self.go_on()
        return held

    def _check_may_hold(self) -> None:
        config = self.mirror.config
        self._check_failed()
        if self.held is not None or self._pausing is not None or self._changing:
            name = self.held.name if self.held is not None else "another one"
            raise DegradedError(
                f"{config.name}: checkpoint {name} holds already",
                hint=f"release it first: qdscheckpoint off -g {config.number}",
            )
        superblock = self.mirror.journal.superblock
        if not superblock.coherent:
            raise DegradedError(
                f"{config.name}: its mirror is not usable as of one instant: {superblock.reason}",
                hint=f"wait for the end of a refresh: qdsinfo --wait coherent -g {config.number}",
            )

    def _check_failed(self) -> None:
        if self._committing.failed:
            raise DeviceFailedError(self._committing.failed, hint="see qdsinfo")

    def _hold(self) -> None:
        assert self._pausing is not None
        (name, hold, since, told), self._pausing = self._pausing, None
        try:
            # What was under way when it was asked for may have begun a refresh, or met a mark.
            self._check_may_hold()
        except QdsError as error:
            told.errback(error)
            self.go_on()
            return
        place = self.mirror.applied
        held = Held(name, place.gsn - 1, since, hold)

        def done(_result: None, error: BaseException | None) -> None:
            self._changing = False
            if error is not None:
                told.errback(error)
                self._committing.fail(f"the checkpoint cannot be recorded: {error}", error)
                return
            self._let_go()
            told.callback(held)
            self._committing.mirrored(False)

        self._changing = True
        self._worker.run(partial(self.mirror.hold, held, place, self.durable), done)

    def release(self) -> Deferred[None]:
        """Let applying go on; fires when that is durable.

        :raises DegradedError: no checkpoint holds, or it is being released.
        :raises DeviceFailedError: nothing is applied any more.
        """
        released: Deferred[None] = Deferred()
        self._check_failed()
        if self.held is None or self._changing:
            raise DegradedError(f"{self.mirror.config.name}: no checkpoint holds")

        def done(_result: None, error: BaseException | None) -> None:
            self._changing = False
            if error is not None:
                released.errback(error)
                self._committing.fail(f"the checkpoint's end cannot be recorded: {error}", error)
                return
            self._behind = self.mirror.applied.position != self.durable.position
            released.callback(None)
            self.go_on()
            self._committing.mirrored(self.running)

        self._changing = True
        self._worker.run(self.mirror.release, done)
        return released

    # -- superblocks ----------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Sync the mirror devices and free what the journal held for them."""
        mirror = self.mirror
        upto, durable = mirror.applied, self.durable
        if (
            self._syncing
            or self._committing.failed
            or upto.position == mirror.journal.superblock.applied.position
        ):
            return

        def job() -> None:
            # What came before it here may have taken a checkpoint further on.
            if upto.position > mirror.journal.superblock.applied.position:
                mirror.checkpoint(upto, durable)

        self._syncing = True
        self._worker.run(job, self._was_synced)

    def _was_synced(self, _result: None, error: BaseException | None) -> None:
        self._syncing = False
        if error is not None:
            name = self.mirror.config.name
            self._committing.fail(
                f"a mirror device or the journal of {name} failed: {error}", error
            )
            return
        self._committing.freed()
