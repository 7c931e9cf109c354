"""Frames in the making: an LDSU's history, one frame after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qdsmirror.core import frames
from qdsmirror.core.frames import HEADER_BYTES, Buffer, Entry
from qdsmirror.core.records import Point
from qdsmirror.core.ring import Placement
from qdsmirror.storage.writelog import Writes

if TYPE_CHECKING:
    from qdsmirror.core.nbd import Request
    from qdsmirror.groups.unit import DriverUnit


class UnitFrame:
    """A frame on its way.

    :ivar end: position behind its record.
    :ivar sequence: its local sequence number; ``chain``: its chain.
    :ivar waiting: requests to be answered when it is durable.
    """

    __slots__ = (
        "applied",
        "chain",
        "durable",
        "end",
        "entries",
        "gsn_last",
        "sequence",
        "unit",
        "waiting",
        "weight",
    )

    def __init__(self, unit: DriverUnit, end: int, sequence: int, chain: bytes, gsn_last: int):
        self.unit = unit
        self.end = end
        self.sequence = sequence
        self.chain = chain
        self.gsn_last = gsn_last
        self.entries: Sequence[Entry] = ()
        self.waiting: list[Request] = []
        self.weight = 0
        self.durable = False
        self.applied = False

    @property
    def next_point(self) -> Point:
        """Where the LDSU's history stands behind this frame."""
        return Point(self.sequence + 1, self.chain)


class Framing:
    """Makes the frames of one LDSU.

    :ivar sequence: the next frame's number; ``chain``: the chain before it (rules.md 2).
    """

    def __init__(self, unit: DriverUnit, point: Point) -> None:
        self._unit = unit
        self.sequence, self.chain = point

    @property
    def point(self) -> Point:
        """Where the history stands behind the last frame made."""
        return Point(self.sequence, self.chain)

    def make(
        self,
        kind: int,
        placement: Placement,
        entries: Sequence[Entry] = (),
        control: Sequence[Buffer] = (),
        gsns: tuple[int, int] | None = None,
    ) -> tuple[UnitFrame, Writes]:
        """Make the next frame of this LDSU's history, and the writes that append it.

        :param gsns: first number and count, where they are not the next ones (void ranges).
        """
        unit = self._unit
        group = unit.group
        first, count = gsns or group.take_gsns(len(entries) or 1)
        body: list[Buffer] = [
            frames.entry_table(entries),
            *[e[3] for e in entries if e[3] is not None],
            *control,
        ]
        header, chain = frames.build_header(
            kind=kind,
            ldsu=unit.index,
            generation=group.generation,
            sequence=self.sequence,
            gsn_first=first,
            gsn_count=count,
            durable_gsn=group.durable_gsn,
            time_ns=group.runtime.wall_ns(),
            previous_chain=self.chain,
            entry_count=len(entries),
            body=body,
        )
        frame = UnitFrame(unit, placement.end, self.sequence, chain, first + count - 1)
        frame.entries = entries
        # What is applied counts, though it takes no room in the log.
        zeroes = sum([e[1] for e in entries if e[2] == frames.ZERO_WRITE])
        frame.weight = placement.record_bytes + zeroes
        self.sequence += 1
        self.chain = chain
        size = HEADER_BYTES + sum(map(len, body))
        return frame, unit.writelog.record(placement, size, [header, *body], unit.durable_end)
