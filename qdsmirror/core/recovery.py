"""What a group does with what the scans of its writelogs found (patent: "three conditions").

A scan goes forward from a log's ``applied`` cursor and stops where the chain ends.  Whether that
end is a torn write or a loss of durable data, and which sequence numbers a crash has left without
a frame, can only be said when every log of the group was scanned (rules.md 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qdsmirror.core.records import Cursor
from qdsmirror.errors import CorruptError


class GsnRange(NamedTuple):
    """A range of global sequence numbers."""

    first: int
    length: int

    @property
    def end(self) -> int:
        """The number after the last one."""
        return self.first + self.length


@dataclass(frozen=True)
class Finding:
    """The scan of one log.

    :ivar applied: where the scan began, from the superblock.
    :ivar expected: the largest position up to which its superblock, or a record of it, says that
        it was durable.
    :ivar reached: behind the last intact frame.
    :ivar durable_gsn: the largest durable GSN named by a superblock or frame of this log.
    :ivar ranges: of the frames found, in log order.
    :ivar room: void frames that the log has space for behind its last frame.
    :ivar stopped: why the scan stopped.
    """

    ldsu: int
    name: str
    applied: Cursor
    expected: int
    reached: Cursor
    durable_gsn: int
    ranges: Sequence[GsnRange]
    room: int
    stopped: str = ""


class Void(NamedTuple):
    """A range to be recorded as lost, in the log of this LDSU."""

    ldsu: int
    range: GsnRange


@dataclass(frozen=True)
class Recovery:
    """What to do: replay everything found, record the voids, go on at ``next_gsn``."""

    next_gsn: int
    voids: tuple[Void, ...]


def decide(findings: Sequence[Finding]) -> Recovery:
    """Decide the recovery of a group.

    The rows, in order:

    - a log ends before a position that its superblock or a record behind its end names as durable:
      corruption;
    - a number known to be durable has no frame: corruption;
    - a number that has two frames: corruption;
    - a number above that has no frame, but a later one has: a void range, recorded in a log that
      ends below it (the log that lost its suffix is one);
    - otherwise the numbers go on after the last frame found.

    :raises CorruptError: durable data is missing; names the log and the number.
    """
    _check_reached(findings)
    durable = max(log.durable_gsn for log in findings)
    # Below the largest of these floors some log may have been scanned from a later place.
    floor = max(log.applied.gsn for log in findings)
    gaps: list[GsnRange] = []
    expected = floor
    for span in sorted(r for log in findings for r in log.ranges):
        if span.end <= floor:
            continue
        if span.first < expected:
            raise CorruptError(
                f"GSN {span.first} is in a writelog of the group twice, or in two of them",
                hint="a log's device lost or changed data; see qdswlscan(1)",
            )
        if span.first > expected:
            gaps.append(GsnRange(expected, span.first - expected))
        expected = span.end
    missing = gaps[0].first if gaps else expected
    if missing <= durable:
        raise CorruptError(
            f"GSN {missing} was durable (up to {durable}), but no writelog of the group holds it",
            hint="a log's device lost or changed data; see qdswlscan(1)",
        )
    return Recovery(expected, _place_voids(findings, gaps))


def abandon(findings: Sequence[Finding], upto: int) -> Recovery:
    """Decide the recovery of a group of which a writelog is untrusted (rules.md 13).

    Nothing will be framed or sent after the break, so numbers without a frame do not matter.

    :param findings: of the logs that are still needed.
    :param upto: the break.
    :raises CorruptError: durable data is missing.
    """
    _check_reached(findings)
    ends = [span.end for log in findings for span in log.ranges]
    return Recovery(max([upto + 1, *ends, *(log.applied.gsn for log in findings)]), ())


def _check_reached(findings: Sequence[Finding]) -> None:
    for log in findings:
        if log.reached.position < log.expected:
            raise CorruptError(
                f"writelog of {log.name}: durable up to position {log.expected}, but intact only "
                f"up to {log.reached.position} ({log.stopped})",
                hint="the log's device lost or changed data; see qdswlscan(1)",
            )


def _place_voids(findings: Sequence[Finding], gaps: Sequence[GsnRange]) -> tuple[Void, ...]:
    """Choose a log for each void range: frames of a log are in GSN order.

    Whoever lost a gap's frame ends at or below it, and has that frame's space; so, taking the gaps
    in order, there always is a log with room.
    """
    logs = sorted(findings, key=lambda log: log.reached.gsn)
    room = {log.ldsu: log.room for log in logs}
    voids: list[Void] = []
    for gap in gaps:
        for log in logs:
            if log.reached.gsn <= gap.first and room[log.ldsu]:
                break
        else:
            raise CorruptError(
                f"GSN {gap.first} is in no writelog, yet every writelog goes on after it"
            )
        room[log.ldsu] -= 1
        voids.append(Void(log.ldsu, gap))
    return tuple(voids)
