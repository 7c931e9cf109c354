"""An LDSU's frames that the group itself makes: controls, a refresh's chunks, a verify's hashes.

They go into the writelog between the application's frames, and no request waits for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qdsmirror.core import frames
from qdsmirror.core.frames import ENTRY_BYTES, HEADER_BYTES, Buffer, Entry
from qdsmirror.core.ring import Placement
from qdsmirror.groups.framing import UnitFrame

if TYPE_CHECKING:
    from qdsmirror.groups.unit import DriverUnit

_ID_BYTES = 16


class OwnFrames:
    """Appends the group's own frames of one LDSU, each in its turn (:meth:`when_free`)."""

    def __init__(self, unit: DriverUnit) -> None:
        self._unit = unit
        self._turns: deque[Callable[[], None]] = deque()

    def when_free(self, turn: Callable[[], None]) -> None:
        """Call ``turn`` when no append is under way, before the application's next frame."""
        self._turns.append(turn)
        self.give_turns()

    def give_turns(self) -> None:
        """Let those go on that wait for their turn, as far as no append is under way."""
        while self._turns and not self._unit.appending:
            self._turns.popleft()()

    @property
    def control_room(self) -> int:
        """How many control frames there is room for that name a refresh, bypass or generation."""
        return self._unit.writelog.control_room(HEADER_BYTES + _ID_BYTES)

    def control(self, kind: int, payload: bytes = b"", *, reserve: bool = True) -> UnitFrame | None:
        """Append a control frame, from the reserve if need be (rules.md 9), durably soon.

        To be called in a turn, like all that follow.

        :param reserve: whether it may take from the reserve.
        :returns: ``None`` while there is no room, or when a writelog has failed.
        """
        unit = self._unit
        if unit.group.failures.stops_framing:
            return None
        placement = unit.writelog.place(HEADER_BYTES + len(payload), control=reserve)
        if placement is None:
            unit.group.checkpoints.want_space()
            return None
        unit.syncing.urgent = True
        return self._append(placement, kind, control=[payload])

    def chunk(self, offset: int, data: bytes | None, length: int) -> UnitFrame | None:
        """Append one refresh entry: ``data``, or zeroes where it is ``None``.

        :param offset: bytes, of the LDSU; ``length``: bytes.
        :returns: ``None`` while there is no room, or when the LDSU has failed.
        """
        unit = self._unit
        if unit.dead or unit.group.failures.stops_framing:
            return None
        size = HEADER_BYTES + ENTRY_BYTES + (len(data) if data is not None else 0)
        placement = unit.writelog.place(size)
        if placement is None:
            unit.group.checkpoints.want_space()
            return None
        kind = frames.REFRESH_ZEROES if data is None else frames.REFRESH
        payload = None if data is None else memoryview(data)
        if unit.cover is not None:
            unit.cover.touch(offset, length)
        return self._append(placement, frames.ENTRIES, [Entry(offset, length, kind, payload)])

    def hashes(self, payload: bytes) -> UnitFrame | None:
        """Append the hashes of a locked range; nobody waits for them to be durable.

        :returns: ``None`` while there is no room, or when a device has failed.
        """
        unit = self._unit
        if unit.dead or unit.group.failures.stops_framing:
            return None
        placement = unit.writelog.place(HEADER_BYTES + len(payload))
        if placement is None:
            return None
        return self._append(placement, frames.VERIFY, control=[payload])

    def _append(
        self,
        placement: Placement,
        kind: int,
        entries: Sequence[Entry] = (),
        control: Sequence[Buffer] = (),
    ) -> UnitFrame:
        unit = self._unit
        frame, writes = unit.framing.make(kind, placement, entries, control)
        # Nothing of it is applied here: a refresh sends what the data device has.
        frame.entries = ()
        unit.group.framed(frame)
        unit.append(frame, writes)
        return frame
