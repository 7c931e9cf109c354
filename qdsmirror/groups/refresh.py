"""A refresh: blocks of every LDSU through the writelog, between the writes that go on.

A full one sends every block; a smart one what differs from the mirror's by hash; a dirty one what
the dirty bitmaps have, which no bypass changes meanwhile (rules.md 12): bits are cleared only when
the next bypass is entered with a coherent mirror.

It keeps COHERENT (the mirror is durably marked incoherent before its first chunk is framed, and
coherent only once the end mark is committed) and rules.md 14 (space first, then the range's lock,
read, append, unlock).  Writelogs are made durable one by one, so that a power cut may take a frame
away and leave a later one in another log: no chunk is framed before the begin mark is durable, nor
the end mark before every chunk is.  A crash leaves the mark and the progress in the superblocks;
the next start goes on from there with the same id.

Beside an application that keeps the log full it has a share of its own: room for a chunk that the
application does not get, and its turn for each chunk after a multiple of its bytes was freed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.python.failure import Failure

from qdsmirror.core import frames
from qdsmirror.core.ring import align_up
from qdsmirror.errors import DegradedError, QdsError
from qdsmirror.groups.coverage import DIRTY, SMART, coverage_of
from qdsmirror.limits import (
    RECORD_ALIGN_BYTES,
    REFRESH_READ_BYTES,
    REFRESH_RETRY_SECONDS_MAX,
    REFRESH_RETRY_SECONDS_MIN,
    REFRESH_RING_SHARE,
    REFRESH_TURN,
    ZERO_ENTRY_BYTES_MAX,
)

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.framing import UnitFrame
    from qdsmirror.groups.unit import DriverUnit

_NOTHING = bytes(REFRESH_READ_BYTES)

MARK, BEGIN, CHUNKS, END, COMMIT, DONE = "mark", "begin", "chunks", "end", "commit", "done"


class Refresh:
    """A refresh in progress.

    :ivar id: 16 random bytes: the same after a restart.
    :ivar kind: one of :data:`~qdsmirror.groups.coverage.KINDS`.
    :ivar cut: where a secondary may start that has no part of the history (see `state`).
    :ivar compared: whether something may count that only one secondary holds (see `_settle`).
    :ivar begun: fires when the begin mark is durable.
    """

    def __init__(
        self, group: DriverGroup, kind: str, state: Mapping[str, Any] | None = None
    ) -> None:
        self.group = group
        self.kind = kind
        self.begun: Deferred[None] = Deferred()
        if state is None:
            self.id = os.urandom(16)
            self.started = group.runtime.wall()
            self.cut: dict[str, Any] | None = None
            self.compared = False
        else:
            self.id = bytes.fromhex(state["id"])
            self.started = state["started"]
            self.cut = state["cut"]
            self.compared = state.get("compared", False)
        # Known to be durable: only then may a secondary be told to begin there.
        self._cut_durable = self.cut is not None
        self._done = [0] * len(group.units)
        self._coverage = coverage_of(kind, group, self.poke)
        self._settled = kind != SMART
        self._phase = MARK
        self._mark: UnitFrame | None = None
        self._unit = 0
        # What is sent next of it, as far as it is known to be to be sent.
        self._offset = self._end = 0
        # Where room is kept for us, and its log's tail when we last used it.
        self._claimed: DriverUnit | None = None
        self._tail = 0
        self._working = False
        self._poking = False
        self._poke_again = False
        self._pause: Any = None
        self._failures = 0
        self._in_flight: deque[tuple[int, int, int]] = deque()
        self._last_gsn = 0
        self._began_at = group.runtime.reactor.seconds()
        self._began_bytes = 0

    @classmethod
    def resumed(cls, group: DriverGroup, states: list[Mapping[str, Any] | None]) -> Refresh | None:
        """Go on with the refresh that the superblocks (by LDSU) know, if there is one.

        Where only some know it, the crash came while it was being marked or ended: it goes on.
        """
        known = [state for state in states if state is not None]
        if not known:
            return None
        newest = max(known, key=lambda s: float(s["started"]))
        refresh = cls(group, newest["kind"], newest)
        refresh.forgo()
        for index, state in enumerate(states):
            if state is not None and state["id"] == refresh.id.hex():
                refresh._done[index] = min(state["done"], group.units[index].size)
        refresh._began_bytes = refresh._bytes() - refresh._bytes(refresh._done)
        refresh._phase = BEGIN
        refresh._skip_done()
        return refresh

    def state(self, unit: DriverUnit) -> dict[str, Any]:
        """Give what an LDSU's superblock keeps: id, cut and how much of the LDSU is committed."""
        return {
            "id": self.id.hex(),
            "kind": self.kind,
            "started": self.started,
            "cut": self.cut if self._cut_durable else None,
            "compared": self.compared,
            "done": self._done[unit.index],
        }

    def announcement(self) -> dict[str, Any] | None:
        """Give what the pmd must know: the id, and the cut at which a history may begin anew.

        ``None`` while a crash could still take away what lies before the cut; of a dirty refresh,
        which needs the history before it, unless dirty bits stand for all of that; and of a smart
        one that counts what a secondary holds.
        """
        dirty = self.kind == DIRTY
        needs_history = self.compared or (dirty and not self.group.memory.used)
        if needs_history or not self._cut_durable:
            return None
        return {"id": self.id.hex(), "cut": self.cut, "dirty": dirty}

    # -- the work -----------------------------------------------------------------------------

    def forgo(self) -> None:
        """Have it begin, or end, without a word: nobody waits to hear that it has begun."""
        self.begun.addErrback(_was_ended)

    def begin(self) -> None:
        """Go to work: the mirror is durably marked incoherent by now (COHERENT)."""
        if self._phase == MARK:
            self._phase = BEGIN
            self._skip_done()
            self.poke()

    def poke(self) -> None:
        """Go on where something may have changed: room, a finished append, frames applied."""
        # What is done here may end at once and poke again from within: no recursion, and no
        # change is missed.
        self._poke_again = True
        if self._poking:
            return
        self._poking = True
        try:
            while self._poke_again and not self._working and self._pause is None:
                self._poke_again = False
                self._go_on()
        finally:
            self._poking = False

    def _go_on(self) -> None:
        if self._phase == BEGIN:
            self._control(frames.REFRESH_BEGIN, CHUNKS)
        elif self._phase == CHUNKS and self.begun.called:
            if self._settled:
                self._next_chunk()
            elif self._may_compare():
                self._settle()
        elif self._phase == END and self._are_chunks_durable():
            self._control(frames.REFRESH_END, COMMIT)

    def _may_compare(self) -> bool:
        """Whether the secondary is there, and its devices have all from before the begin mark.

        A bypass or a backfresh may have changed bytes past the writelogs since: what comes to a
        mirror device from before would change it again, and not to what is here.
        """
        pmd, mark = self.group.pmd, self._mark
        return (
            pmd.is_connected
            and mark is not None
            and pmd.mirrored_gsn is not None
            and pmd.mirrored_gsn >= mark.gsn_last
        )

    @inlineCallbacks
    def _settle(self) -> Any:
        """Begin to compare, with the secondary that is connected and no other.

        Another one, whose history would begin anew at the cut, lacks what is found equal here:
        none may, durably, from before the first verdict on.  Where one comes all the same it is
        refused, and the refresh begins anew (:meth:`Coherence.diverged`).
        """
        self._working = self.compared = True
        try:
            yield self.group.checkpoints.record_everywhere(refresh=self.state)
        except QdsError as error:
            self.group.note_error(f"the refresh cannot begin to compare: {error.message}")
            self._pause_for(REFRESH_RETRY_SECONDS_MAX)
        else:
            if self._phase == CHUNKS:
                self.group.pmd.tell_refresh(None)
                self._settled = True
                self._coverage.begin(self._done)
                self._poke_again = True
        self._ended_work()

    def link_up(self) -> None:
        """Learn that the secondary can be asked."""
        self._coverage.go_on()
        self.poke()

    def _are_chunks_durable(self) -> bool:
        return self._last_gsn <= self.group.durable_gsn

    def _control(self, kind: int, then: str) -> None:
        self._working = True
        self.group.units[0].own_frames.when_free(
            partial(self._append_control, kind, then, self._phase)
        )

    def _append_control(self, kind: int, then: str, phase: str) -> None:
        if self._phase == phase:
            cut = self.group.cut()
            frame = self.group.units[0].own_frames.control(kind, self.id)
            if frame is not None:
                if kind == frames.REFRESH_BEGIN and self.cut is None:
                    self.cut = cut
                self._mark = frame
                self._phase = then
                # It may have become durable before we knew it.
                self.became_durable(self.group.durable_gsn)
                self._poke_again = True
        self._ended_work()

    def _ended_work(self) -> None:
        """Go on if there is reason to: whoever makes room pokes, and may have done so already."""
        self._working = False
        if self._poke_again:
            self.poke()

    def _pause_for(self, seconds: float) -> None:
        if self._phase != DONE:
            self._pause = self.group.runtime.reactor.callLater(seconds, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self.poke()

    def _claim(self, unit: DriverUnit | None) -> None:
        """Keep room for a chunk in this log, and in no other."""
        if unit is self._claimed:
            return
        before, self._claimed = self._claimed, unit
        if unit is not None:
            unit.kept_bytes = _kept(unit)
            self._tail = unit.writelog.durable_tail
        if before is not None:
            before.kept_bytes = 0
            before.pump()

    def _skip_done(self) -> None:
        units = self.group.units
        while self._unit < len(units):
            unit = units[self._unit]
            offset = max(self._offset, self._done[self._unit])
            found = self._coverage.next(unit, offset)
            first, end = found or (max(offset, self._coverage.known(unit)),) * 2
            if first > offset:
                self._leave_out(unit, first)
            if found is not None or end < unit.size:
                self._offset, self._end = first, end
                return
            self._unit += 1
            self._offset = 0

    def _leave_out(self, unit: DriverUnit, offset: int) -> None:
        """Count as done what need not be sent, once what is before it, and the verdict, counts."""
        self._last_gsn = max(self._last_gsn, self._coverage.proven_gsn)
        before = self._in_flight[-1][:2] if self._in_flight else None
        if before == (self._last_gsn, unit.index):
            self._in_flight.pop()
        self._in_flight.append((self._last_gsn, unit.index, offset))
        self._count(self.group.committed_gsn)

    def _bytes(self, offsets: Sequence[int] | None = None) -> int:
        """Give how many bytes are to be sent, of each LDSU from an offset on."""
        units = self.group.units
        first = offsets or [0] * len(units)
        each = self._coverage.bytes_from
        return sum(each(unit, at) for unit, at in zip(units, first, strict=True))

    def _next_chunk(self) -> None:
        if self._unit >= len(self.group.units):
            self._phase = END
            self._poke_again = True
            self._claim(None)
            return
        unit = self.group.units[self._unit]
        if self._offset >= self._end:
            self._skip_done()
            unknown = self._unit < len(self.group.units) and self._offset >= self._end
            self._poke_again = self._poke_again or not unknown
            return
        # A failed LDSU waits for the next start; an earlier refresh that still reads, for its end.
        if unit.errors or unit.waiting.is_locked:
            return
        self._claim(unit)
        if not self._has_room(unit):
            self.group.checkpoints.want_space()
            return
        if not self.group.may_frame:
            return
        span = min(ZERO_ENTRY_BYTES_MAX, self._end - self._offset)
        unit.lock(self._offset, span)
        self._working = True
        unit.reading.find_hole(self._offset, span, partial(self._found, unit, span))

    def _has_room(self, unit: DriverUnit) -> bool:
        """Whether a chunk may go into the log: it is half empty, or it is our turn."""
        log = unit.writelog
        if log.used_bytes + 2 * _chunk_cap(unit) <= log.ring.size * REFRESH_RING_SHARE:
            return True
        # Counted in what was freed: while nothing is, what is left is the application's.
        freed = log.durable_tail - self._tail
        return freed >= REFRESH_TURN * _chunk_cap(unit) and _kept(unit) <= log.free_bytes

    def _found(self, unit: DriverUnit, span: int, hole: int) -> None:
        """Send a long hole as one entry; read anything else."""
        if self._phase != CHUNKS:
            # Stopped meanwhile, and with the driver perhaps the workers.
            self._release(unit)
            return
        chunk = min(_chunk_cap(unit), span)
        if hole >= chunk:
            self._take_turn(unit, hole, None, None)
            return
        # Reading takes longer than looking for a hole: hold back no more than is read.
        unit.unlock()
        unit.lock(self._offset, chunk)
        unit.reading.read_chunk(self._offset, chunk, partial(self._take_turn, unit, chunk))

    def _take_turn(
        self, unit: DriverUnit, length: int, data: bytes | None, error: BaseException | None
    ) -> None:
        if error is not None and self._phase == CHUNKS:
            self.group.note_error(f"{unit.name}: refresh read at {self._offset}: {error}")
            self._pause_for(
                min(REFRESH_RETRY_SECONDS_MIN * 2**self._failures, REFRESH_RETRY_SECONDS_MAX)
            )
            self._failures += 1
        if error is not None or self._phase != CHUNKS:
            self._release(unit)
            return
        self._failures = 0
        if data is not None and data == _NOTHING[:length]:
            data = None
        unit.own_frames.when_free(partial(self._append, unit, data, length))

    def _append(self, unit: DriverUnit, data: bytes | None, length: int) -> None:
        if self._phase == CHUNKS:
            frame = unit.own_frames.chunk(self._offset, data, length)
            if frame is not None:
                self._offset += length
                self._last_gsn = frame.gsn_last
                self._in_flight.append((frame.gsn_last, unit.index, self._offset))
                self._tail = unit.writelog.durable_tail
                self._skip_done()
                self._coverage.go_on()
                # Through the reactor: the application's requests come between two chunks.
                self._pause_for(0)
        self._release(unit)

    def _release(self, unit: DriverUnit) -> None:
        unit.unlock()
        # Only now: appending and unlocking let others poke.
        self._ended_work()
        job = self.group.refresh_job
        if job is not None and job is not self:
            # It has waited for our lock.
            job.poke()

    # -- what the group tells -------------------------------------------------------------------

    def became_durable(self, gsn: int) -> None:
        """Learn the group's durable GSN."""
        if not self.begun.called and self._mark is not None and self._mark.gsn_last <= gsn:
            self._cut_durable = True
            self.begun.callback(None)
            self.poke()
        elif self._phase == END:
            self.poke()

    def was_committed(self, gsn: int) -> bool:
        """Learn the committed GSN; tell whether the refresh has come to its end."""
        self._count(gsn)
        if not self._settled:
            self.poke()
        if self._phase == COMMIT and self._mark is not None and self._mark.gsn_last <= gsn:
            self._phase = DONE
            return True
        return False

    def _count(self, committed: int) -> None:
        while self._in_flight and self._in_flight[0][0] <= committed:
            _, unit, offset = self._in_flight.popleft()
            self._done[unit] = offset

    def stop(self) -> None:
        """Give up (killed, or the driver stops)."""
        self._phase = DONE
        self._coverage.stop()
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self._claim(None)

    def status(self) -> dict[str, Any]:
        """Give the ``refresh`` object of ``qdsinfo --json``."""
        remaining = self._bytes(self._done)
        done = self._bytes() - remaining
        elapsed = self.group.runtime.reactor.seconds() - self._began_at
        rate = (done - self._began_bytes) / elapsed if elapsed > 0 else 0.0
        return {
            "kind": self.kind,
            "id": self.id.hex(),
            "done_bytes": done,
            "remaining_bytes": remaining,
            "rate": round(rate),
            "eta_seconds": round(remaining / rate, 1) if rate else None,
            "started": self.started,
        }


def _was_ended(failure: Failure) -> None:
    failure.trap(DegradedError)  # type: ignore[no-untyped-call]


def _chunk_cap(unit: DriverUnit) -> int:
    """Give the bytes of a chunk: small beside the ring, else live writes leave no room for one."""
    part = unit.writelog.ring.size // 16 // RECORD_ALIGN_BYTES * RECORD_ALIGN_BYTES
    return min(REFRESH_READ_BYTES, unit.payload_cap, max(RECORD_ALIGN_BYTES, part))


def _kept(unit: DriverUnit) -> int:
    """Give the bytes of a chunk's record, and of the pad that may go before it.

    Less where the log is so small that the application's largest frame would not fit beside it.
    """
    record = align_up(_chunk_cap(unit) + RECORD_ALIGN_BYTES, unit.writelog.ring.align)
    return min(2 * record, unit.spare_bytes)
