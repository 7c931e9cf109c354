"""A full refresh: every block of every LDSU through the writelog, between the writes that go on.

It keeps COHERENT (the mirror is durably marked incoherent before its first chunk is framed, and
coherent only once the end mark is committed) and rules.md 14 (space first, then the range's lock,
read, append, unlock).  A crash leaves the mark and the progress in the superblocks; the next start
goes on from there with the same id.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred

from qdsmirror.core import frames
from qdsmirror.core.records import Point
from qdsmirror.limits import (
    RECORD_ALIGN_BYTES,
    REFRESH_READ_BYTES,
    REFRESH_RING_SHARE,
    ZERO_ENTRY_BYTES_MAX,
)

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit, UnitFrame

_RETRY_SECONDS = 0.01
_NOTHING = bytes(REFRESH_READ_BYTES)

BEGIN, CHUNKS, END, COMMIT, DONE = "begin", "chunks", "end", "commit", "done"


class Refresh:
    """A refresh in progress.

    :ivar id: 16 random bytes: the same after a restart.
    :ivar cut: where a secondary may start that has no part of the history (see `state`).
    :ivar begun: fires when the begin mark is durable.
    """

    def __init__(self, group: DriverGroup, state: Mapping[str, Any] | None = None) -> None:
        self.group = group
        self.begun: Deferred[None] = Deferred()
        if state is None:
            self.id = os.urandom(16)
            self.started = group.runtime.wall()
            self.cut: dict[str, Any] | None = None
        else:
            self.id = bytes.fromhex(state["id"])
            self.started = state["started"]
            self.cut = state["cut"]
        # Known to be durable: only then may a secondary be told to begin there.
        self._cut_durable = self.cut is not None
        self._done = [0] * len(group.units)
        self.kind = "full"
        self._phase = BEGIN
        self._mark: UnitFrame | None = None
        self._unit = 0
        self._offset = 0
        self._reading = False
        self._poking = False
        self._retry: Any = None
        self._in_flight: deque[tuple[int, int, int]] = deque()
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
        refresh = cls(group, max(known, key=lambda s: float(s["started"])))
        for index, state in enumerate(states):
            if state is not None and state["id"] == refresh.id.hex():
                refresh._done[index] = min(state["done"], group.units[index].size)
        refresh._began_bytes = sum(refresh._done)
        refresh._skip_done()
        return refresh

    def state(self, unit: DriverUnit) -> dict[str, Any]:
        """Give what an LDSU's superblock keeps: id, cut and how much of the LDSU is committed."""
        return {
            "id": self.id.hex(),
            "kind": self.kind,
            "started": self.started,
            "cut": self.cut if self._cut_durable else None,
            "done": self._done[unit.index],
        }

    def announcement(self) -> dict[str, Any] | None:
        """Give what the pmd must know: the id, and the cut at which a history may begin anew.

        ``None`` while a crash could still take away what lies before the cut.
        """
        return {"id": self.id.hex(), "cut": self.cut} if self._cut_durable else None

    # -- the work -----------------------------------------------------------------------------

    def poke(self) -> None:
        """Go on where something may have changed: room, a finished append, a commit."""
        # What is done here may end at once and poke again from within.
        if self._poking or self._reading:
            return
        self._cancel_retry()
        self._poking = True
        if self._phase == BEGIN:
            self._control(frames.REFRESH_BEGIN, CHUNKS)
        if self._phase == CHUNKS:
            self._next_chunk()
        if self._phase == END:
            self._control(frames.REFRESH_END, COMMIT)
        self._poking = False

    def _control(self, kind: int, then: str) -> None:
        cut = self.group.cut()
        frame = self.group.units[0].append_control(kind, self.id)
        if frame is None:
            self._later()
            return
        if kind == frames.REFRESH_BEGIN and self.cut is None:
            self.cut = cut
        self._mark = frame
        self._phase = then
        # It may have become durable before we knew it.
        self.became_durable(self.group.durable_gsn)

    def _later(self, seconds: float = _RETRY_SECONDS) -> None:
        """Try again soon; whoever makes room or ends an append pokes earlier."""
        if self._retry is None and self._phase != DONE:
            self._retry = self.group.runtime.reactor.callLater(seconds, self._again)

    def _again(self) -> None:
        self._retry = None
        self.poke()

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _skip_done(self) -> None:
        units = self.group.units
        while self._unit < len(units):
            self._offset = max(self._offset, self._done[self._unit])
            if self._offset < units[self._unit].size:
                return
            self._unit += 1
            self._offset = 0

    def _next_chunk(self) -> None:
        if self._unit >= len(self.group.units):
            self._phase = END
            return
        unit = self.group.units[self._unit]
        cap = _chunk_cap(unit)
        ring = unit.writelog.ring.size
        if unit.errors or unit.is_locked:
            self._later()
            return
        if unit.writelog.used_bytes + 2 * cap > ring * REFRESH_RING_SHARE:
            self.group.checkpoints.want_space()
            self._later()
            return
        if not self.group.may_frame:
            self._later()
            return
        span = min(ZERO_ENTRY_BYTES_MAX, unit.size - self._offset)
        unit.lock(self._offset, span)
        self._reading = True
        unit.reading.find_hole(self._offset, span, lambda hole: self._found(unit, span, hole))

    def _found(self, unit: DriverUnit, span: int, hole: int) -> None:
        """Send a long hole as one entry; read anything else."""
        chunk = min(_chunk_cap(unit), span)
        if hole >= chunk:
            self._append(unit, None, hole, None)
            return
        unit.reading.read_chunk(
            self._offset, chunk, lambda data, error: self._append(unit, data, chunk, error)
        )

    def _append(
        self, unit: DriverUnit, data: bytes | None, length: int, error: BaseException | None
    ) -> None:
        if error is not None or self._phase != CHUNKS:
            unit.unlock()
            self._reading = False
            if error is not None:
                self.group.note_error(f"{unit.name}: refresh read at {self._offset}: {error}")
                self._later()
            return
        if data is not None and data == _NOTHING[:length]:
            data = None
        frame = unit.append_chunk(self._offset, data, length)
        unit.unlock()
        # Only now: appending and unlocking let others poke.
        self._reading = False
        if frame is None:
            self._later()
            return
        self._offset += length
        self._in_flight.append((frame.gsn_last, unit.index, self._offset))
        self._skip_done()
        # Through the reactor: the application's requests come between two chunks.
        self._later(0)

    # -- what the group tells -------------------------------------------------------------------

    def became_durable(self, gsn: int) -> None:
        """Learn the group's durable GSN."""
        if not self.begun.called and self._mark is not None and self._mark.gsn_last <= gsn:
            self._cut_durable = True
            self.begun.callback(None)

    def was_committed(self, gsn: int) -> bool:
        """Learn the committed GSN; tell whether the refresh has come to its end."""
        while self._in_flight and self._in_flight[0][0] <= gsn:
            _, unit, offset = self._in_flight.popleft()
            self._done[unit] = offset
        if self._phase == COMMIT and self._mark is not None and self._mark.gsn_last <= gsn:
            self._phase = DONE
            return True
        return False

    def stop(self) -> None:
        """Give up (killed, or the driver stops)."""
        self._phase = DONE
        self._cancel_retry()

    def status(self) -> dict[str, Any]:
        """Give the ``refresh`` object of ``qdsinfo --json``."""
        total = sum(unit.size for unit in self.group.units)
        done = sum(self._done)
        elapsed = self.group.runtime.reactor.seconds() - self._began_at
        rate = (done - self._began_bytes) / elapsed if elapsed > 0 else 0.0
        return {
            "kind": self.kind,
            "id": self.id.hex(),
            "done_bytes": done,
            "remaining_bytes": total - done,
            "rate": round(rate),
            "eta_seconds": round((total - done) / rate, 1) if rate else None,
            "started": self.started,
        }


def _chunk_cap(unit: DriverUnit) -> int:
    """Give the bytes of a chunk: small beside the ring, else live writes leave no room for one."""
    part = unit.writelog.ring.size // 16 // RECORD_ALIGN_BYTES * RECORD_ALIGN_BYTES
    return min(REFRESH_READ_BYTES, unit.payload_cap, max(RECORD_ALIGN_BYTES, part))


def cut_points(cut: Mapping[str, Any]) -> dict[int, tuple[int, Point]]:
    """Read a cut: by LDSU index the log's position and the history's point there."""
    return {
        int(index): (position, Point(sequence, bytes.fromhex(chain)))
        for index, (position, sequence, chain) in cut["points"].items()
    }
