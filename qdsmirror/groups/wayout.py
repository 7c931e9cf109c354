"""The way out of a group's bypass, by a refresh: room for it, a new generation, its switch.

The direct writes are synced; a new generation and a refresh are made durable everywhere; its first
frame is a switch that names the generation before (rules.md 7).  What a crash interrupts is
completed at the next start (:func:`qdsmirror.core.generations.settle`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import inlineCallbacks
from twisted.logger import Logger

from qdsmirror.core.frames import SWITCH
from qdsmirror.core.generations import grown
from qdsmirror.core.records import Cursor, Generation
from qdsmirror.core.states import Event
from qdsmirror.errors import DegradedError, QdsError
from qdsmirror.groups.bypass import LEAVING, OFF, ON

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.framing import UnitFrame

#: Before leaving: the switch and the refresh's begin.
_ROOM_TO_LEAVE = 2


class WayOut:
    """How a group's bypass is left."""

    log = Logger()

    def __init__(self, group: DriverGroup) -> None:
        self._group = group
        self._bypass = group.bypass

    def next_generation(self) -> tuple[Generation, ...]:
        """Give the list with the generation that leaving bypass begins.

        :raises DegradedError: bypass cannot be left (yet), or is not on.
        :raises DeviceFailedError: a device has failed.
        """
        group = self._group
        self._check_may_leave()
        generations = self._grown(os.urandom(16))
        if generations is None:
            raise DegradedError(
                f"{group.name}: the secondary must first commit what was written before the "
                "bypass: its writelogs have no room for another refresh",
                hint=self._way_to_room(),
            )
        return generations

    def _check_may_leave(self) -> None:
        group = self._group
        self._bypass.refuse_half_way()
        group.modes.refuse(Event.BYPASS_ENDED)
        self._bypass.check_logs()
        group.failures.check_data("way out of bypass")

    def _grown(self, ident: bytes) -> tuple[Generation, ...] | None:
        """Give the list with another generation, unless there is no room for its beginning."""
        group = self._group
        log = group.units[0].writelog
        if group.units[0].own_frames.control_room < _ROOM_TO_LEAVE:
            return None
        upto = min(unit.writelog.superblock.tail.gsn for unit in group.units) - 1
        new = Generation(ident, group.next_gsn)
        return grown(log.superblock.generations, new, upto, group.memory.lost_gsn)

    def _way_to_room(self) -> str:
        group = self._group
        back = "bring the secondary back; if it lost the history, "
        if group.memory.used:
            return f"{back}begin the writelogs in memory anew (killdriver, launchdriver)"
        return f"{back}ask again once qdsinfo -g {group.number} says so"

    @property
    def holds_unsendable(self) -> bool:
        """Whether full writelogs hold what the secondary, of another history, can never take."""
        group = self._group
        return (
            self._bypass.phase == ON
            and bool(group.pmd.link.get("diverged"))
            and not group.coherence.tracked
            and self._grown(b"") is None
        )

    @inlineCallbacks
    def give_up_unsendable(self) -> Any:
        """Let the writelogs be empty, durably: what fills them can never be sent.

        All of it is on the data devices, synced, and the refresh that leads out looks at every
        block.  A secondary that could have taken it is told to begin anew too, should it come back.

        :raises QdsError: as for :meth:`next_generation`; or it cannot be recorded.
        """
        group = self._group
        self._check_may_leave()
        self._bypass.phase = LEAVING
        try:
            # What was worked out before must not be recorded behind it.
            checkpoints = group.checkpoints
            yield self._bypass.until(lambda: not (checkpoints.running or checkpoints.recording))
            self._bypass.check_logs()
            self.log.warn(
                "{group}: what was to be sent before the bypass is given up: the secondary's "
                "history is another one", group=group.name,
            )  # fmt: skip
            group.stand_at(
                [
                    Cursor(unit.applied_end, group.next_gsn, {unit.index: unit.applied_point})
                    for unit in group.units
                ]
            )
            group.pmd.renew()
            yield checkpoints.record_everywhere(
                coherent=False,
                tracked=False,
                reason=group.coherence.reason,
                **checkpoints.each_cursor(),
            )
        finally:
            self._bypass.become(ON)
            for unit in group.units:
                unit.direct.begin()

    @inlineCallbacks
    def leave(self, generations: tuple[Generation, ...], **changes: Any) -> Any:
        """Leave bypass: fires when the new generation has begun, durably.

        :param generations: see :meth:`next_generation`; no other call comes between.
        :param changes: fields of the superblocks that change with it: those of the refresh.
        """
        group = self._group
        self._bypass.phase = LEAVING
        try:
            yield self._bypass.until(self._is_all_written)
            yield self._bypass.sync()
            self._bypass.check_logs()
            group.failures.check_data("way out of bypass")
            yield group.checkpoints.record_everywhere(
                bypass=None, generations=generations, **changes
            )
        except Exception:
            self._bypass.become(ON)
            for unit in group.units:
                unit.direct.begin()
            raise
        yield self.begin_generation(generations)

    def _is_all_written(self) -> bool:
        """Whether every direct write is answered; one whose bits cannot be durable never is."""
        self._bypass.check_logs()
        return not any(unit.direct.busy for unit in self._group.units)

    @inlineCallbacks
    def begin_generation(self, generations: tuple[Generation, ...]) -> Any:
        """Begin the newest of these with its switch; fires when that is durable.

        :param generations: what the superblocks have by now.
        """
        group = self._group
        self._bypass.state = None
        group.generation = generations[-1].id
        group.pmd.tell_generations([generation.id for generation in generations])
        first = group.units[0]
        mark: list[UnitFrame | None] = []
        first.own_frames.when_free(
            lambda: mark.append(first.own_frames.control(SWITCH, generations[-2].id))
        )
        # Until it is durable nothing else may be: a void range cannot begin a generation.
        try:
            yield self._bypass.until(lambda: self._is_durable(mark))
        except QdsError:
            # A writelog has failed, and so bypass is entered again.
            self._bypass.become(OFF)
            raise
        self._bypass.ended()

    def _is_durable(self, mark: list[UnitFrame | None]) -> bool:
        self._bypass.check_logs()
        frame = mark[0] if mark else None
        return frame is not None and frame.gsn_last <= self._group.durable_gsn
