"""Committing: frames that the secondary received, on their way to the mirror devices.

Invariants kept here: a frame is acknowledged (TAIL) and applied (PREFIX) only after it is durable
in the journal; the journal is freed only of what is on the mirror devices, synced (TAIL); what is
under way is bounded (BOUND); after an error nothing is acknowledged or freed any more (LOUD).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks

from qdsmirror.core.filling import FillRate
from qdsmirror.core.frames import Buffer, control_payload
from qdsmirror.core.generations import grown
from qdsmirror.core.inbound import Intake
from qdsmirror.core.lag import LagClock
from qdsmirror.core.questions import Standing
from qdsmirror.core.records import Cursor, Generation, Point
from qdsmirror.core.verify import Verdict
from qdsmirror.errors import BrokenError, DeviceFailedError, ProtocolError
from qdsmirror.groups.mirroring import Batch, Mirroring
from qdsmirror.groups.runtime import Runtime
from qdsmirror.groups.traffic import Traffic
from qdsmirror.limits import MIRRORED_TOLD_SECONDS, RECEIVED_BYTES_MAX, UNMIRRORED_BYTES_MAX
from qdsmirror.storage.journal import CUTS, Change, Mirror
from qdsmirror.storage.writelog import Writes

if TYPE_CHECKING:
    from qdsmirror.groups.holding import Holding


class _Received(NamedTuple):
    """A checked frame that waits for the journal.

    :ivar brings: the generation that begins with it.
    """

    change: Change
    frame: Buffer
    brings: Generation | None


class Committing:
    """Takes a group's frames, in order, into the journal and from there to the mirror devices.

    :param mirror: open and replayed; whoever opened it closes it.
    :param acknowledge: told the committed and the mirrored GSN when the primary is to know them.
    :param press: told, as it grows and shrinks, whether more is under way than there may be.
    :param report: told, before the mirrored GSN is, what was found at a VERIFY frame.
    :param fail: told, with the error, why nothing is committed any more.
    :param holding: keeps the group's checkpoint.
    :ivar config: the group's; its tunables may change.
    :ivar failed: that reason; empty while all is well.
    :ivar received_bytes: taken, and not yet durable in the journal.
    :ivar mirroring: brings what is durable to the mirror devices.
    :ivar traffic: counts what was taken.
    :ivar last_commit: when frames last became durable in the journal, seconds since 1970; ``None``:
        not since the start.
    """

    def __init__(
        self,
        mirror: Mirror,
        runtime: Runtime,
        acknowledge: Callable[[int, int], None],
        press: Callable[[bool], None],
        report: Callable[[Verdict], None],
        fail: Callable[[str, BaseException], None],
        holding: Holding,
    ) -> None:
        self.mirror = mirror
        self.failed = ""
        self.holding = holding
        self.received_bytes = 0
        self.config = mirror.config
        self.traffic = Traffic([ldsu.name for ldsu in self.config.ldsus])
        self._tell_acknowledge = acknowledge
        self._tell_press = press
        self.report = report
        self._tell_failed = fail
        self._reactor = runtime.reactor
        self._wall = runtime.wall
        self.last_commit: float | None = None
        self._lag = LagClock()
        self._journal_worker = runtime.quick_worker(f"{self.config.name} journal")
        self._mirror_worker = runtime.quick_worker(f"{self.config.name} mirror")
        self.mirroring = Mirroring(self, self._mirror_worker)
        self._intake = self._intake_from_durable()
        self._received: deque[_Received] = deque()
        self._ack_wanted = False
        self._journaling = False
        self._journal_full = False
        self._idle: list[Deferred[None]] = []
        self._timer: Any = None
        #: The primary is to be told what is mirrored, with what is committed if that comes first.
        self._telling: Any = None
        self._fill_rate = FillRate()
        # When what the journal holds came, nobody remembers.
        self._lag.framed(self.mirrored_gsn + 1, self._reactor.seconds())
        self._tick()

    @property
    def durable(self) -> Cursor:
        """The place behind the last frame that is durable in the journal."""
        return self.mirroring.durable

    @property
    def unmirrored_bytes(self) -> int:
        """Bytes durable in the journal, and kept for the mirror devices."""
        return self.mirroring.unmirrored_bytes

    @property
    def committed_gsn(self) -> int:
        """Durable in the journal up to this number."""
        return self.durable.gsn - 1

    @property
    def next_gsn(self) -> int:
        """The number of the frame that comes next, behind all that were taken."""
        return self._intake.gsn

    @property
    def mirrored_gsn(self) -> int:
        """On the mirror devices up to this number."""
        return self.mirror.applied.gsn - 1

    @property
    def age_seconds(self) -> float:
        """How long ago the oldest entry was committed that is not on the mirror devices yet."""
        return self._lag.age(self.mirrored_gsn, self.committed_gsn, self._reactor.seconds())

    def standing(self, ldsu: int) -> Standing:
        """Tell where the mirror of an LDSU stands."""
        superblock = self.mirror.journal.superblock
        return Standing(
            superblock.coherent,
            self.mirror.applied == self.durable,
            superblock.generation,
            self.durable.gsn,
            *self.durable.point(ldsu),
        )

    # -- life ---------------------------------------------------------------------------------

    @inlineCallbacks
    def stop(self) -> Any:
        """Commit and apply what has arrived, and take nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.mirroring.stop()
        self.commit()
        yield self.quiet()
        if not self.failed:
            self.mirroring.checkpoint()
            yield self.quiet()
        if self._telling is not None:
            self.acknowledge()
        yield gatherResults([self._journal_worker.stop(), self._mirror_worker.stop()])

    def forget(self) -> None:
        """Let what was taken and is not durable count as never received.

        :raises ProtocolError: it is just becoming durable; the peer tries again.
        :raises DeviceFailedError: nothing is committed any more.
        """
        if self._journaling:
            raise ProtocolError("the last session's frames are being committed; try again")
        self.check_failed()
        self._received.clear()
        self.received_bytes = 0
        self._intake = self._intake_from_durable()

    def begin_anew(
        self, refresh_id: bytes, generation: Generation, cursor: Cursor
    ) -> Deferred[None]:
        """Replace the history, durably; only when quiet.

        :raises ProtocolError: see :meth:`Mirroring.begin_anew`.
        """

        def stand(_: None) -> None:
            self._intake = self._intake_from_durable()

        return self.mirroring.begin_anew(refresh_id, generation, cursor).addCallback(stand)

    def check_failed(self) -> None:
        """Check that things are committed.

        :raises DeviceFailedError: nothing is any more.
        """
        if self.failed:
            raise DeviceFailedError(self.failed, hint="see qdsinfo on the secondary")

    def _intake_from_durable(self) -> Intake:
        superblock = self.mirror.journal.superblock
        sizes = [unit.size for unit in superblock.units]
        return Intake(self.durable, sizes, superblock.generations)

    def quiet(self) -> Deferred[None]:
        """Fire when nothing that was taken is under way."""
        quiet: Deferred[None] = Deferred()
        self._idle.append(quiet)
        self._note_idle()
        return quiet

    def _note_idle(self) -> None:
        # Whom the first one tells may begin something that the next one is to wait for.
        while self._idle and not self._busy:
            self._idle.pop(0).callback(None)

    @property
    def _busy(self) -> bool:
        return (
            self._journaling
            or self.mirroring.busy
            or bool(not self.failed and self._received and not self._stuck)
        )

    @property
    def _stuck(self) -> bool:
        """Whether what was taken finds no room for as long as nothing is applied."""
        return self._journal_full and self.mirroring.is_paused

    def _tick(self) -> None:
        self._timer = self._reactor.callLater(self.config.tunables.metadata_seconds, self._tick)
        self.mirroring.checkpoint()
        self._fill_rate.note(self._reactor.seconds(), self.mirror.journal.used_bytes)

    @property
    def seconds_to_full(self) -> float | None:
        """When the journal will be full at its present rate; ``None`` while it is not filling."""
        return self._fill_rate.seconds_to_full(self.mirror.journal.free_bytes)

    # -- frames in, positions out -------------------------------------------------------------

    def take(self, frame: Buffer, ack_wanted: bool) -> None:
        """Take the group's next frame.

        :param ack_wanted: the primary asks for an acknowledgement of it.
        :raises ProtocolError: see :meth:`Intake.check`.
        :raises DivergedError: likewise.
        :raises BrokenError: the journal is too small for it.
        """
        self._check_fits(len(frame))
        known = self._intake.generations
        header, entries = self._intake.check(frame)
        control = b"" if entries else control_payload(header, frame)
        brings = self._intake.generations[-1] if self._intake.generations != known else None
        self._received.append(_Received(Change(header, entries, control), frame, brings))
        self.received_bytes += len(frame)
        self.traffic.count(header, frame)
        if ack_wanted:
            self._ack_wanted = True
        self._press()
        # The whole of what a buffer brought is journaled at once: one sync for all of it.
        if self._ack_wanted or self.received_bytes > RECEIVED_BYTES_MAX // 4:
            self.commit()

    def _check_fits(self, frame_bytes: int) -> None:
        """Check that the empty journal takes a frame, wherever its head stands.

        :raises BrokenError: it does not, so it would be waited for without end.
        """
        journal = self.mirror.journal
        if not journal.takes(frame_bytes):
            raise BrokenError(
                f"journal {self.config.journal_device} of {journal.ring.size} bytes is too small "
                f"for the primary's frames of {frame_bytes} bytes",
                hint="give a larger journal, initialise it with qdswlinit, and refresh",
            )

    def acknowledge(self) -> None:
        """Have the primary told how far its frames have come."""
        self._forget_telling()
        self._tell_acknowledge(self.committed_gsn, self.mirrored_gsn)

    def _forget_telling(self) -> None:
        telling, self._telling = self._telling, None
        if telling is not None and telling.active():
            telling.cancel()

    def _press(self) -> None:
        self._tell_press(
            self.received_bytes > RECEIVED_BYTES_MAX or self.unmirrored_bytes > UNMIRRORED_BYTES_MAX
        )

    # -- journal ------------------------------------------------------------------------------

    def commit(self) -> None:
        """Append what has arrived to the journal, and make it durable."""
        if self._journaling or not self._received or self.failed:
            return
        journal = self.mirror.journal
        known = journal.superblock.generations
        batch, writes, generations = self._place(known)
        if not batch.changes:
            self.mirroring.checkpoint()
            return
        self._journaling = True

        def job() -> None:
            if generations != known:
                # A scan must know a generation by the time it meets its first frame.
                journal.update(both=True, generations=generations)
            journal.write(writes)
            journal.sync()

        self._journal_worker.run(job, partial(self._committed, batch))

    def _place(
        self, generations: tuple[Generation, ...]
    ) -> tuple[Batch, Writes, tuple[Generation, ...]]:
        """Give what arrived its places in the journal, as far as there is room.

        :returns: with the generations that the journal must know then.
        """
        journal = self.mirror.journal
        position, gsn, points = self.durable.position, self.durable.gsn, dict(self.durable.points)
        writes: Writes = []
        changes: list[Change] = []
        size = 0
        while self._received:
            change, frame, brings = self._received[0]
            more: tuple[Generation, ...] | None = generations
            if brings is not None:
                more = grown(generations, brings, journal.superblock.applied.gsn - 1)
            placement = journal.place(len(frame)) if more is not None else None
            if more is None or placement is None:
                self._journal_full = True
                self.holding.look(full=True)
                break
            generations = more
            self._received.popleft()
            writes += journal.record(placement, len(frame), [frame], self.durable.position)
            changes.append(change)
            size += len(frame)
            header = change.header
            position, gsn = placement.end, header.gsn_last + 1
            points[header.ldsu] = Point(header.sequence + 1, header.chain)
            if header.kind in CUTS:
                # What comes behind it is not applied with it.
                break
        return Batch(changes, size, Cursor(position, gsn, points)), writes, generations

    def _committed(self, batch: Batch, _result: None, error: BaseException | None) -> None:
        self._journaling = False
        if error is not None:
            self.fail(f"journal {self.config.journal_device} failed: {error}", error)
            return
        self.received_bytes -= batch.size
        self._lag.framed(self.durable.gsn, self._reactor.seconds())
        self.mirroring.take(batch)
        self.last_commit = self._wall()
        if self._ack_wanted:
            # What came meanwhile and asked for one is in the next batch.
            self._ack_wanted = bool(self._received)
            self.acknowledge()
        self._press()
        self.holding.look()
        self.commit()
        self.mirroring.go_on()
        self._note_idle()

    # -- mirror devices -----------------------------------------------------------------------

    def mirrored(self, more: bool) -> None:
        """Learn that frames are on the mirror devices.

        :param more: others are being applied that were kept for it: the primary is told then.
        """
        self._press()
        if not more and self._telling is None:
            self._telling = self._reactor.callLater(MIRRORED_TOLD_SECONDS, self.acknowledge)
        journal = self.mirror.journal
        entries = self.mirror.applied.gsn - journal.superblock.applied.gsn
        if (
            self._journal_full
            or entries > self.config.tunables.metadata_entries
            or journal.used_bytes > journal.ring.size // 2
        ):
            self.mirroring.checkpoint()
        if self._journal_full and not entries:
            # What was recorded behind a frame has freed it.
            self.freed()
        self._note_idle()

    def freed(self) -> None:
        """Learn that the journal has room again."""
        self._journal_full = False
        self.commit()
        self._note_idle()

    def fail(self, reason: str, error: BaseException) -> None:
        """Commit nothing any more (LOUD)."""
        self.failed = self.failed or reason
        self._forget_telling()
        self._tell_failed(reason, error)
        self._note_idle()
