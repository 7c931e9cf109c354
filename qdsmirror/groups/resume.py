"""Where the primary goes on sending: where the two histories meet, or at a refresh's cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qdsmirror.core.records import Cursor, Point
from qdsmirror.errors import DivergedError, ProtocolError
from qdsmirror.groups.outbound import OutUnit
from qdsmirror.net.handshake import RebasePosition, UnitPosition


class RefreshLostError(ProtocolError):
    """The secondary lost what a refresh has already brought it: the refresh begins anew.

    :ivar refresh: the refresh's id.
    """

    def __init__(self, error: DivergedError, refresh: str) -> None:
        super().__init__(
            f"the secondary lost part of the refresh ({error.message}); it begins anew"
        )
        self.refresh = refresh


class AwaitsRefreshError(DivergedError):
    """The primary lost what was to be sent; dirty bits stand for it, and a refresh brings it."""

    def __init__(self, group: int) -> None:
        super().__init__(
            "what was to be sent was lost with the writelogs in memory: the mirror waits for a "
            "refresh",
            hint=f"qdsrefresh -g {group}",
        )


def is_covered(
    acks: Sequence[UnitPosition],
    units: Sequence[OutUnit],
    generations: Sequence[bytes],
    covered_gsn: int | None,
) -> bool:
    """Tell whether dirty bits stand for all that a secondary may lack that the writelogs do not.

    So it is where writelogs in memory were lost, of a secondary that stands in what was lost, in a
    history known here, and has not lost what it had committed: bits of that may be cleared
    (rules.md 8, 23).

    :param covered_gsn: the first number behind what was lost.
    """
    if covered_gsn is None:
        return False
    committed = max(unit.committed.gsn for unit in units)
    return all(
        ack.generation in generations and committed <= ack.next_gsn <= covered_gsn for ack in acks
    )


class Resumption(NamedTuple):
    """Where to go on.

    :ivar cursors: by LDSU, the places in the writelogs.
    :ivar rebases: what the secondary's history is replaced by; none where it goes on.
    """

    cursors: dict[int, Cursor]
    next_gsn: int
    rebases: Sequence[RebasePosition] = ()


def agreed_gsn(acks: Sequence[UnitPosition], generations: Sequence[bytes]) -> int:
    """Give the secondary's next GSN.

    :param acks: where the secondary stands, by LDSU.
    :param generations: the histories that are valid, newest last.
    :raises ProtocolError: its LDSUs do not stand at the same one.
    :raises DivergedError: it holds another history.
    """
    gsns = {ack.next_gsn for ack in acks}
    if len(gsns) != 1:
        raise ProtocolError("the secondary names different next GSNs for LDSUs of one group")
    blank = all(not ack.generation and ack.next_sequence == 1 for ack in acks)
    if not blank and any(ack.generation not in generations for ack in acks):
        raise DivergedError(
            f"the secondary holds another generation ({acks[0].generation.hex() or 'none'}) "
            f"than the primary ({generations[-1].hex()})",
            hint="make a new mirror with qdsrefresh --full",
        )
    return gsns.pop()


def meeting_places(units: Sequence[OutUnit], acks: Sequence[UnitPosition]) -> dict[int, Cursor]:
    """Find, in each writelog, the place where the secondary stands (rules.md 8); blocking.

    :raises DivergedError: see :meth:`OutUnit.find`.
    :raises CorruptError: likewise.
    """
    return {ack.index: units[ack.index].find(Point(ack.next_sequence, ack.chain)) for ack in acks}


def at_cut(
    refresh: Mapping[str, Any],
    acks: Sequence[UnitPosition],
    units: Sequence[OutUnit],
    generation: bytes,
    diverged: DivergedError,
) -> Resumption:
    """Begin anew where a refresh began, whatever the secondary's history is.

    :param refresh: as the driver told it.
    :param generation: the newest.
    :param diverged: why the histories do not meet.
    :raises RefreshLostError: the refresh's first part was committed by a secondary that is no more.
    """
    gsn: int = refresh["cut"]["gsn"]
    points = refresh["cut"]["points"]
    if any(unit.committed.position > points[str(unit.index)][0] for unit in units):
        raise RefreshLostError(diverged, refresh["id"]) from diverged
    cursors: dict[int, Cursor] = {}
    rebases: list[RebasePosition] = []
    for ack in acks:
        position, sequence, chain = points[str(ack.index)]
        point = Point(sequence, bytes.fromhex(chain))
        cursors[ack.index] = Cursor(position, gsn, {ack.index: point})
        rebases.append(
            RebasePosition(
                index=ack.index,
                generation=generation,
                predecessor=ack.generation,
                next_sequence=sequence,
                chain=point.chain,
                next_gsn=gsn,
                refresh_id=bytes.fromhex(refresh["id"]),
            )
        )
    return Resumption(cursors, gsn, rebases)
