"""A verify: hashes of every LDSU through the writelog, compared by the secondary in their place.

A part of an LDSU is locked, read with everything on its way laid over it, hashed, and the frame
with the hashes appended before the lock is let go: every write before that frame is in them, and
none behind it.  The secondary compares when it has come to the frame, so that a difference is one.

A part counts as verified only when the secondary has said so; what a lost link or a crash leaves
without a word is sent again.  What differs is marked in the dirty bitmap, and the mirror as
incoherent, durably; to mend it is a dirty refresh, in the order of the writes, and then the marked
chunks are verified again.

It takes its turns when the application is not at work, and one each VERIFY_TURN_SECONDS else.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from qdsmirror.core.verify import (
    ZEROES,
    Flight,
    Found,
    Part,
    Range,
    Row,
    Verdict,
    pack_rows,
    rows_of,
)
from qdsmirror.errors import ProtocolError, QdsError
from qdsmirror.groups.verify_turns import Load, obstacle
from qdsmirror.limits import (
    FAILURE_REASON_CHARS_MAX,
    REFRESH_RING_SHARE,
    VERIFY_CHUNK_BYTES,
    VERIFY_FRAMES_MAX,
    VERIFY_READ_BYTES,
    VERIFY_REPORT_SECONDS,
    VERIFY_TURN_SECONDS,
    VERIFY_ZERO_BYTES_MAX,
)

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit

#: Compares everything; mends what differs; compares what was mended; has ended.
COMPARE, MEND, AGAIN, OVER = "compare", "mend", "again", "over"
EQUAL, DIFFERS, ENDED = "equal", "differs", "ended"

#: While the application is at work it is looked so often whether it still is.
_LOOK_SECONDS = VERIFY_TURN_SECONDS / 10


class Verify:
    """A verify, running or ended.

    :ivar id: 16 random bytes: the same after a restart.
    :ivar repair: whether what differs is mended.
    :ivar phase: COMPARE, MEND, AGAIN or OVER.
    :ivar result: EQUAL, DIFFERS or ENDED once it is over; else empty.
    :ivar reason: why it was ended.
    :ivar finished: when it was over, seconds since 1970; ``None`` before.
    :ivar found: by LDSU what differs.
    :ivar mended: bytes that a repair has sent.
    :ivar last: of the last one that came to its end before: finished, result, differing_bytes.
    """

    def __init__(self, group: DriverGroup, repair: bool) -> None:
        self.group = group
        self.repair = repair
        self.id = os.urandom(16)
        self.started = group.runtime.wall()
        self.phase = COMPARE
        self.result = self.reason = ""
        self.finished: float | None = None
        self.mended = 0
        self.last: Mapping[str, Any] | None = None
        self.found = [Found() for _ in group.units]
        self._done = [0] * len(group.units)
        self._unit = self._offset = 0
        self._flying: dict[int, Flight] = {}
        self._again: deque[Part] = deque()
        self._begun = self._working = self._mending = self._stopped = False
        self._timer: Any = None
        self._due = self._began_at = group.runtime.reactor.seconds()
        self._began_bytes = 0
        #: When it was looked how many requests had come, and how many.
        self._load = Load(group.units, self._began_at)

    @classmethod
    def resumed(cls, group: DriverGroup, states: Sequence[Mapping[str, Any] | None]) -> Verify:
        """Take up what the superblocks, by LDSU, know of the newest one; at least one does.

        Where only some know it, the crash came while it was being recorded: the others' LDSUs are
        verified from their beginning, or were when it ended.
        """
        newest = max((s for s in states if s is not None), key=lambda s: float(s["started"]))
        verify = cls(group, newest["repair"])
        verify.id = bytes.fromhex(newest["id"])
        for name in ("started", "phase", "result", "reason", "finished", "mended", "last"):
            setattr(verify, name, newest[name])
        for index, state in enumerate(states):
            if state is None or state["id"] != newest["id"]:
                continue
            verify.found[index] = Found(state["differing_bytes"], state["ranges"])
            if state["phase"] == verify.phase:
                verify._done[index] = min(state["done"], group.units[index].size)
        verify._begun = True
        verify._began_bytes = verify._bytes() - verify._bytes(verify._done)
        return verify

    def state(self, unit: DriverUnit) -> dict[str, Any]:
        """Give what an LDSU's superblock keeps."""
        found = self.found[unit.index]
        return {
            "id": self.id.hex(),
            "repair": self.repair,
            "started": self.started,
            "phase": self.phase,
            "result": self.result,
            "reason": self.reason,
            "finished": self.finished,
            "mended": self.mended,
            "last": self.last,
            "done": self._done[unit.index],
            "differing_bytes": found.bytes,
            "ranges": [list(one) for one in found.ranges],
        }

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.phase == OVER

    @property
    def differing_bytes(self) -> int:
        """What is known to differ."""
        return sum(found.total for found in self.found)

    def summary(self) -> Mapping[str, Any] | None:
        """Give what is kept of it behind the next; of one ended early, what was before it."""
        if self.result == ENDED or self.finished is None:
            return self.last
        names = ("finished", "result", "differing_bytes")
        return {name: getattr(self, name) for name in names}

    # -- its turns ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Go to work: it is durable that it has begun."""
        self._begun = True
        self.poke()

    def poke(self) -> None:
        """Look again what is to be done: something has changed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._look()

    def stop(self) -> None:
        """Do nothing more: the driver stops; the next start goes on."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def end(self, reason: str) -> None:
        """End early."""
        self.reason = reason[:FAILURE_REASON_CHARS_MAX]
        self._finish(ENDED)

    def _look_in(self, seconds: float) -> None:
        if self._timer is None and self._goes_on:
            self._timer = self.group.runtime.reactor.callLater(seconds, self._look_late)

    def _look_late(self) -> None:
        self._timer = None
        self._look()

    @property
    def _goes_on(self) -> bool:
        return self._begun and not self.over and not self._stopped

    def _look(self) -> None:
        if self._working or not self._goes_on:
            return
        self.end_if_hindered()
        if self.over:
            return
        if self.phase == MEND:
            self._look_after_refresh()
        else:
            self._take_turn()

    def end_if_hindered(self) -> None:
        """End early where it cannot go on, however long one waits."""
        why = "" if self.over else obstacle(self.group, mending=self.phase == MEND)
        if why:
            self.end(why)

    def _take_turn(self) -> None:
        self._send_lost_again()
        part = self._next_part()
        if part is None and not self._flying:
            self._ended_phase()
            return
        group = self.group
        if not group.pmd.is_connected:
            # The group's next tick looks again.
            return
        if part is None:
            self._look_in(VERIFY_TURN_SECONDS)
            return
        now = group.runtime.reactor.seconds()
        if now < self._due:
            self._look_in(self._due - now)
        elif not self._may_read(group.units[part.unit], now):
            self._look_in(_LOOK_SECONDS)
        else:
            self._read(part)

    def _may_read(self, unit: DriverUnit, now: float) -> bool:
        """Whether it is our turn: nobody else is at work, or we have waited long enough."""
        if (
            len(self._flying) >= VERIFY_FRAMES_MAX
            or unit.waiting.is_locked
            or not self.group.may_frame
        ):
            return False
        log = unit.writelog
        if log.free_bytes < 2 * log.ring.align:
            # Space first, then the lock (rules.md 14).
            self.group.checkpoints.want_space()
            return False
        busy = (
            self._load.is_busy(now)
            or unit.waiting.any
            or unit.appending
            or log.used_bytes > log.ring.size * REFRESH_RING_SHARE
        )
        return not busy or now >= self._due + VERIFY_TURN_SECONDS

    def _send_lost_again(self) -> None:
        """Take what the secondary has passed without a word, by a crash or a lost link."""
        mirrored = self.group.pmd.mirrored_gsn
        now = self.group.runtime.reactor.seconds()
        for gsn, flight in list(self._flying.items()):
            if mirrored is None or gsn > mirrored:
                continue
            if flight.passed is None:
                flight.passed = now
            elif now - flight.passed >= VERIFY_REPORT_SECONDS:
                self._again.append(self._flying.pop(gsn).part)

    def _next_part(self) -> Part | None:
        if self._again:
            return self._again[0]
        units = self.group.units
        while self._unit < len(units):
            unit = units[self._unit]
            found = self._next(unit, max(self._offset, self._done[self._unit]))
            if found is not None:
                self._offset, end = found
                return Part(self._unit, self._offset, end - self._offset)
            self._unit += 1
            self._offset = 0
        return None

    @property
    def _goes_by_marks(self) -> bool:
        """Whether only what the bitmaps mark is compared; in memory, logs use them otherwise."""
        return self.phase == AGAIN and not self.group.memory.used

    def _next(self, unit: DriverUnit, offset: int) -> Range | None:
        """Give the first and the end byte of what is to be compared next, from a byte on."""
        if self._goes_by_marks:
            return unit.dirty.next_dirty(offset)
        return (offset, unit.size) if offset < unit.size else None

    # -- one part -------------------------------------------------------------------------------

    def _read(self, part: Part) -> None:
        unit = self.group.units[part.unit]
        span = min(VERIFY_ZERO_BYTES_MAX, part.length)
        self._working = True
        unit.lock(part.offset, span)
        unit.reading.find_hole(part.offset, span, partial(self._found_hole, unit, part, span))

    def _found_hole(self, unit: DriverUnit, part: Part, span: int, hole: int) -> None:
        """Send a long hole as one row; hash anything else."""
        if not self._goes_on:
            self._release(unit)
            return
        offset = part.offset
        size = min(VERIFY_READ_BYTES, span)
        if hole < span:
            # What follows begins at a chunk again.
            hole -= (offset + hole) % VERIFY_CHUNK_BYTES
        if hole >= size:
            self._wait_for_turn(unit, part, [Row(offset, hole, ZEROES)])
            return
        # Hashing takes longer than looking for a hole: hold back no more than is hashed.
        unit.unlock()
        unit.lock(offset, size)
        unit.reading.digests(
            offset, size, VERIFY_CHUNK_BYTES, partial(self._hashed, unit, part, size)
        )

    def _hashed(
        self,
        unit: DriverUnit,
        part: Part,
        size: int,
        digests: bytes | None,
        error: BaseException | None,
    ) -> None:
        if error is not None and self._goes_on:
            self.end(f"{unit.name} cannot be read at {part.offset}: {error}")
        if digests is None or not self._goes_on:
            self._release(unit)
            return
        self._wait_for_turn(unit, part, rows_of(part.offset, size, digests))

    def _wait_for_turn(self, unit: DriverUnit, part: Part, rows: Sequence[Row]) -> None:
        unit.own_frames.when_free(partial(self._append, unit, part, rows))

    def _append(self, unit: DriverUnit, part: Part, rows: Sequence[Row]) -> None:
        frame = None
        if self._goes_on and self.group.may_frame:
            frame = unit.own_frames.hashes(pack_rows(rows))
        now = self.group.runtime.reactor.seconds()
        if frame is None:
            # It is hashed again, and not at once.
            self._due = now + _LOOK_SECONDS
        else:
            length = sum(row.length for row in rows)
            self._advance(part, length)
            self._flying[frame.gsn_last] = Flight(part._replace(length=length))
            hashed = VERIFY_CHUNK_BYTES if rows[0].digest == ZEROES else length
            rate = self.group.config.tunables.verify_rate
            self._due = max(self._due, now) + hashed / rate
        self._release(unit)

    def _advance(self, part: Part, length: int) -> None:
        """Go behind what was framed of a part."""
        if self._again and self._again[0] == part:
            self._again.popleft()
            if length < part.length:
                rest = Part(part.unit, part.offset + length, part.length - length)
                self._again.appendleft(rest)
        else:
            self._offset = part.offset + length

    def _release(self, unit: DriverUnit) -> None:
        unit.unlock()
        self._working = False
        if self.group.refresh_job is not None:
            # It may have waited for our lock.
            self.group.refresh_job.poke()
        # Through the reactor: the application's requests come between two parts.
        self._look_in(0)

    # -- what the secondary says ----------------------------------------------------------------

    def reported(self, verdict: Verdict) -> bool:
        """Learn what the secondary has found at a frame.

        :returns: whether that is what this verify waits for.
        :raises ProtocolError: it was not asked about that.
        """
        # What is told again may bear the number of a frame whose hashes only a replay has passed.
        flight = None if verdict.again else self._flying.get(verdict.gsn)
        if flight is None or flight.part.unit != verdict.ldsu or not self._goes_on:
            return False
        part = flight.part
        end = part.offset + part.length
        if any(at < part.offset or not size or at + size > end for at, size in verdict.differs):
            raise ProtocolError(f"a report on GSN {verdict.gsn} is about another range")
        if verdict.skipped:
            self.end(verdict.skipped)
        elif verdict.differs:
            self.found[part.unit].add(verdict.differs)
            unit = self.group.units[part.unit]
            self.group.verifying.differs(unit, verdict.differs, partial(self._settle, verdict.gsn))
        else:
            self._settle(verdict.gsn)
        return True

    def _settle(self, gsn: int) -> None:
        """Count a part as verified: what was found in it is durable."""
        flight = self._flying.pop(gsn, None)
        if flight is None or not self._goes_on:
            return
        index = flight.part.unit
        waiting = [one.part for one in self._flying.values()] + list(self._again)
        reached = self._offset if index == self._unit else self.group.units[index].size
        self._done[index] = min([p.offset for p in waiting if p.unit == index] + [reached])
        self.found[index].settle(self._done[index])
        if not self._flying:
            self.poke()

    # -- the end --------------------------------------------------------------------------------

    def _ended_phase(self) -> None:
        # It may be known to have differed where it does not any more, and is marked so.
        differs = bool(self.differing_bytes) or not self.group.coherent
        if self.phase == COMPARE and differs and self.repair:
            self._begin_phase(MEND)
            self.group.verifying.record(self.poke)
        else:
            self._finish(DIFFERS if differs else EQUAL)

    def _begin_phase(self, phase: str) -> None:
        self.phase = phase
        self._done = [0 if phase == AGAIN else unit.size for unit in self.group.units]
        self._unit = self._offset = self._began_bytes = 0
        self._began_at = self.group.runtime.reactor.seconds()

    def _look_after_refresh(self) -> None:
        """Begin the dirty refresh that mends what differs, or go on behind its end."""
        coherence = self.group.coherence
        if coherence.job is not None or self._mending:
            return
        if coherence.coherent:
            self._begin_phase(AGAIN)
            self.mended = self.differing_bytes
            self.found = [Found() for _ in self.found]
            self.group.verifying.record(self.poke)
            return
        self._mending = True
        self.group.refresh("dirty").addCallbacks(self._mend_begun, self._mend_failed)

    def _mend_begun(self, _status: object) -> None:
        self._mending = False

    def _mend_failed(self, failure: Any) -> None:
        self._mending = False
        failure.trap(QdsError)
        if self._goes_on:
            self.end(f"what differs could not be mended: {failure.value.message}")

    def _finish(self, result: str) -> None:
        self.phase = OVER
        self.result = result
        self.finished = self.group.runtime.wall()
        for found in self.found:
            found.settle()
        if result != ENDED:
            self._done = [unit.size for unit in self.group.units]
        self._flying.clear()
        self._again.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.group.verifying.ended()

    # -- status ---------------------------------------------------------------------------------

    def _bytes(self, offsets: Sequence[int] | None = None) -> int:
        """Give how many bytes are to be compared, of each LDSU from an offset on."""
        units = self.group.units
        first = offsets or [0] * len(units)
        if self._goes_by_marks:
            return sum(unit.dirty.dirty_bytes(at) for unit, at in zip(units, first, strict=True))
        return sum(unit.size - at for unit, at in zip(units, first, strict=True))

    def status(self) -> dict[str, Any]:
        """Give the ``verify`` object of ``qdsinfo --json``, but for what is scheduled."""
        remaining = self._bytes(self._done)
        done = self._bytes() - remaining
        elapsed = self.group.runtime.reactor.seconds() - self._began_at
        rate = 0.0 if self.over or elapsed <= 0 else (done - self._began_bytes) / elapsed
        return {
            "id": self.id.hex(),
            "phase": self.phase,
            "repair": self.repair,
            "started": self.started,
            "finished": self.finished,
            "result": self.result or None,
            "reason": self.reason,
            "done_bytes": done,
            "remaining_bytes": remaining,
            "rate": round(rate),
            "eta_seconds": round(remaining / rate, 1) if rate > 0 else None,
            "differing_bytes": self.differing_bytes,
            "differing": [
                {"ldsu": unit.name, "offset": offset, "length": length}
                for unit, found in zip(self.group.units, self.found, strict=True)
                for offset, length in found.shown
            ],
            "repaired_bytes": self.mended,
            "last": self.last,
        }
