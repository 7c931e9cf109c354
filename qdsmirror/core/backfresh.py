"""What superblocks say of a backfresh, and what its end makes of them (rules.md 7, 11).

A record stands in each LDSU's superblock from before the first block of its data device is
overwritten: as long as it does, that device is no copy of anything (COHERENT).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qdsmirror.core.records import BEGINNING, Cursor, Generation, Point
from qdsmirror.core.superblock import Superblock
from qdsmirror.limits import GENERATIONS_MAX

#: Blocks are being fetched; all of them are, durably; blocks are lacking and nobody fetches them.
RUNNING, ENDED, NEEDED = "running", "ended", "needed"
_PHASES = (RUNNING, ENDED, NEEDED)

#: Why a data device lacks blocks whose backfresh was killed.
INTERRUPTED = "the last backfresh was ended before its end"


@dataclass(frozen=True)
class BackfreshState:
    """A backfresh as one LDSU's superblock has it.

    :ivar id: 16 random bytes: the same after a restart, and in all LDSUs.
    :ivar started: seconds since 1970.
    :ivar reason: of NEEDED, why.
    :ivar keep: the file that has what was overwritten; "" where nothing is kept.
    :ivar generation: the mirror's history, ``gsn``: its next number, ``point``: where the LDSU
        stands in it.
    :ivar discard: id of the generation that begins at that place, where the writelogs' own history
        is given up; else empty.
    :ivar done: bytes of the LDSU that are compared, and fetched where they differed, durably.
    :ivar changed: bytes of them that differed.
    :ivar lacked: whether blocks were lacking before it began, too.
    """

    id: bytes
    phase: str
    started: float
    reason: str = ""
    keep: str = ""
    generation: bytes = b""
    gsn: int = 1
    point: Point = BEGINNING
    discard: bytes = b""
    done: int = 0
    changed: int = 0
    lacked: bool = False

    def to_json(self) -> dict[str, Any]:
        """Give the form that stands in a superblock."""
        return {
            "id": self.id.hex(),
            "phase": self.phase,
            "started": self.started,
            "reason": self.reason,
            "keep": self.keep,
            "mirror": [
                self.generation.hex(),
                self.gsn,
                self.point.sequence,
                self.point.chain.hex(),
            ],
            "discard": self.discard.hex(),
            "done": self.done,
            "changed": self.changed,
            "lacked": self.lacked,
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> BackfreshState:
        """Read :meth:`to_json`'s form.

        :raises ValueError: it is of another form.
        """
        try:
            generation, gsn, sequence, chain = body["mirror"]
            state = cls(
                bytes.fromhex(body["id"]),
                body["phase"],
                body["started"],
                body["reason"],
                body["keep"],
                bytes.fromhex(generation),
                gsn,
                Point(sequence, bytes.fromhex(chain)),
                bytes.fromhex(body["discard"]),
                body["done"],
                body["changed"],
                body["lacked"],
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the record of a backfresh cannot be read: {error}") from error
        numbers = (gsn, sequence, state.done, state.changed)
        if (
            state.phase not in _PHASES
            or not all(type(n) is int and n >= 0 for n in numbers)
            or not isinstance(state.started, int | float)
            or not isinstance(state.reason, str)
            or not isinstance(state.keep, str)
        ):
            raise ValueError("the record of a backfresh cannot be read")
        return state

    @classmethod
    def of(cls, superblock: Superblock) -> BackfreshState | None:
        """Give what a superblock says; ``None`` where its LDSU has nothing to do with one."""
        return None if superblock.backfresh is None else cls.from_json(superblock.backfresh)

    @property
    def place(self) -> tuple[bytes, int, Point]:
        """The mirror's history and its place in it, as long as blocks are fetched."""
        return self.generation, self.gsn, self.point


def needed(backfresh_id: bytes, now: float, reason: str) -> BackfreshState:
    """Give the record of a data device that holds no copy of anything.

    :param now: seconds since 1970.
    """
    return BackfreshState(backfresh_id, NEEDED, now, reason)


def has_ended(superblock: Superblock) -> bool:
    """Tell whether a superblock says that a backfresh has ended, and what follows is to be done."""
    state = BackfreshState.of(superblock)
    return state is not None and state.phase == ENDED


def begun_anew(superblock: Superblock) -> dict[str, Any] | None:
    """Give an LDSU's record with nothing done: somebody else has written to its data device."""
    state = BackfreshState.of(superblock)
    return replace(state, done=0, changed=0).to_json() if state is not None else None


def after(superblock: Superblock, state: BackfreshState) -> dict[str, Any]:
    """Give what changes in an LDSU's superblock when its backfresh has ended.

    The data device equals the mirror then.  Where the writelogs' own history was given up, the
    mirror's takes its place: the log begins anew, behind all that it ever held, where the mirror
    stands; outside bypass with a generation of its own, whose first frame is a switch.
    """
    changes: dict[str, Any] = {
        "backfresh": None,
        "refresh": None,
        "coherent": True,
        "tracked": False,
        "reason": "",
    }
    if state.discard:
        index = superblock.units[0].index
        place = Cursor(superblock.head.position, state.gsn, {index: state.point})
        changes |= {
            "generations": _continued(superblock, state),
            "tail": place,
            "applied": place,
            "head": place,
            "durable_gsn": state.gsn - 1,
        }
        if superblock.memory is not None:
            # What it holds begins there.
            changes["memory"] = superblock.memory._replace(first_gsn=state.gsn)
    return changes


def _continued(superblock: Superblock, state: BackfreshState) -> tuple[Generation, ...]:
    known = superblock.generations
    new = (Generation(state.discard, state.gsn),)
    if not state.generation:
        # The mirror's history is yet to begin.
        return new
    kept = next(
        (known[: i + 1] for i, one in enumerate(known) if one.id == state.generation),
        (Generation(state.generation, state.gsn),),
    )
    if superblock.bypass is not None:
        # Nothing is framed: leaving it begins a generation.
        return kept
    # What leaves a full list is only of use to a secondary that stands further back.
    return (*kept, *new)[-GENERATIONS_MAX:]


def completed(superblocks: Sequence[Superblock]) -> list[Superblock]:
    """Give what the superblocks of a group say where a crash came between two of them.

    - One says that the backfresh has ended: it has, in all.  (So where this is recorded, that one
      comes last: without it, a log of the new history beside one of the old would be left.)
    - All say that it is running: it is.
    - Only some do, and others that it was killed: it was.
    - Else it had not begun, and nothing was overwritten: each says what it said before.
    """
    states = [BackfreshState.of(superblock) for superblock in superblocks]
    if any(state is not None and state.phase == ENDED for state in states):
        return [
            superblock if state is None else replace(superblock, **after(superblock, state))
            for superblock, state in zip(superblocks, states, strict=True)
        ]
    known = {(state.id, state.phase) if state is not None else None for state in states}
    if len(known) == 1:
        return list(superblocks)
    return [
        _interrupted(superblock, state, known)
        for superblock, state in zip(superblocks, states, strict=True)
    ]


def _interrupted(
    superblock: Superblock,
    state: BackfreshState | None,
    known: Collection[tuple[bytes, str] | None],
) -> Superblock:
    if state is None or state.phase != RUNNING:
        return superblock
    if state.lacked or (state.id, NEEDED) in known:
        left = replace(state, phase=NEEDED, reason=state.reason or INTERRUPTED)
        return replace(superblock, backfresh=left.to_json())
    return replace(superblock, backfresh=None)
