"""The list of a group's generations, and what its superblocks say together (rules.md 7).

What goes into every superblock of a group takes effect when all hold it.  A crash in between leaves
it in some: recovery then completes it in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qdsmirror.core.records import Generation
from qdsmirror.core.superblock import Superblock
from qdsmirror.errors import BrokenError
from qdsmirror.limits import GENERATIONS_MAX


def grown(
    generations: Sequence[Generation], new: Generation, upto_gsn: int, lost_gsn: int = 0
) -> tuple[Generation, ...] | None:
    """Give the list with another generation, bounded.

    :param upto_gsn: frames up to this number are needed no more, nor their generations.
    :param lost_gsn: frames up to this number were lost with writelogs in memory: of their
        generations a full list keeps the first, where a secondary stands that never got on.  One
        that stands in another is refused, as one of another history is.
    :returns: ``None`` when all of a full list are still needed.
    """
    kept = (*generations, new)
    while len(kept) > GENERATIONS_MAX and kept[1].first_gsn <= upto_gsn:
        kept = kept[1:]
    while len(kept) > GENERATIONS_MAX and kept[2].first_gsn <= lost_gsn + 1:
        kept = (kept[0], *kept[2:])
    return kept if len(kept) <= GENERATIONS_MAX else None


def begun(generations: Sequence[Generation], next_gsn: int) -> tuple[Generation, ...]:
    """Give the list without what a crash took together with the switch that brought it.

    The primary may go back to before it, too, and begin another there.

    :param next_gsn: the number behind the last frame that is there.
    """
    there = tuple(one for one in generations if one.first_gsn < next_gsn)
    return there or tuple(generations[:1])


def covering(generations: Sequence[Generation], gsn: int) -> int | None:
    """Give the index of the generation that a number belongs to; ``None`` before the first."""
    found = [i for i, generation in enumerate(generations) if generation.first_gsn <= gsn]
    return found[-1] if found else None


class Settled(NamedTuple):
    """What a group's superblocks say together.

    :ivar bypass: the bypass that the group is in.
    :ivar tracked: whether frames and dirty bitmaps have all that the mirror lacks.
    :ivar refreshes: each superblock's refresh, where it still counts.
    :ivar uneven: whether they do not all say so yet.
    """

    generations: tuple[Generation, ...]
    bypass: Mapping[str, Any] | None
    coherent: bool
    tracked: bool
    reason: str
    refreshes: list[Mapping[str, Any] | None]
    uneven: bool


def settle(superblocks: Sequence[Superblock]) -> Settled:
    """Decide what holds for a group, by the superblocks of its LDSUs.

    - One knows a newer generation: the group was leaving bypass, and has left it.
    - One is in bypass, and none knows a newer generation: the group was entering, and is in it.
    - A mirror is coherent when all say so; tracked, when each says one or the other.

    :raises BrokenError: they are of different histories.
    """
    newest = max(superblocks, key=lambda s: s.generations[-1].first_gsn if s.generations else 0)
    recent = [generation.id for generation in newest.generations[-2:]]
    if any(s.generation not in recent for s in superblocks):
        raise BrokenError("its writelogs are of different generations")
    left = any(s.generation != newest.generation for s in superblocks)
    bypass = None if left else next((s.bypass for s in superblocks if s.bypass is not None), None)
    refreshes = [
        None if bypass is not None or s.generation != newest.generation else s.refresh
        for s in superblocks
    ]
    coherent = all(s.coherent and s.refresh is None for s in superblocks)
    return Settled(
        newest.generations,
        bypass,
        coherent,
        all(s.coherent or s.tracked for s in superblocks),
        newest.reason or next((s.reason for s in superblocks if s.reason), ""),
        refreshes,
        left or any((s.bypass is None) != (bypass is None) for s in superblocks),
    )


def awaits_switch(generations: Sequence[Generation], next_gsn: int) -> bool:
    """Tell whether the newest generation lacks its first frame, which must be its switch."""
    return len(generations) > 1 and generations[-1].first_gsn == next_gsn
