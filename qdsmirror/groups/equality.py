"""Going on with data devices that are what the mirror is: the end of a backfresh is durable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import inlineCallbacks

from qdsmirror.core.backfresh import BackfreshState, after
from qdsmirror.groups.bypass import ON

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit


@inlineCallbacks
def record_equal(group: DriverGroup, states: Mapping[int, BackfreshState]) -> Any:
    """Record what follows from the end (:func:`qdsmirror.core.backfresh.after`), and go by it.

    :param states: by LDSU, as its superblock has it.
    :returns: fires with the generations, where the newest of them is to begin; else with none.
    :raises QdsError: it cannot be recorded.
    """
    in_bypass = group.bypass.phase == ON
    if in_bypass:
        for unit in group.units:
            yield unit.direct.clear_dirty()
    yield group.bypass.until(lambda: not group.checkpoints.running)
    made = {unit.index: after(unit.writelog.superblock, states[unit.index]) for unit in group.units}
    given_up = bool(states[0].discard)
    if given_up:
        # Before it is recorded: a checkpoint in between must not bring back what was.
        group.stand_at([made[unit.index]["tail"] for unit in group.units])
        group.generation = made[0]["generations"][-1].id

    def change(key: str) -> Callable[[DriverUnit], Any]:
        return lambda unit: made[unit.index][key]

    yield group.checkpoints.record_everywhere(**{key: change(key) for key in made[0]})
    group.coherence.became_equal()
    if not given_up:
        return ()
    # Numbers are given anew.
    group.answering.begin()
    generations = made[0]["generations"]
    return generations if not in_bypass and len(generations) > 1 else ()
