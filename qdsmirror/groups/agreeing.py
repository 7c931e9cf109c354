"""Agreeing with the secondary where a backfresh begins: at a place of a history that it holds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, inlineCallbacks

from qdsmirror.core.backfresh import RUNNING, BackfreshState
from qdsmirror.core.questions import STANDING, Standing, parse_standing
from qdsmirror.errors import BrokenError, DegradedError
from qdsmirror.groups.bypass import ON
from qdsmirror.limits import BACKFRESH_DRAIN_SECONDS, BACKFRESH_RETRY_SECONDS_MIN

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup


def ask_standings(group: DriverGroup) -> Deferred[list[Standing]]:
    """Ask the secondary where the mirror of each LDSU stands.

    :raises QdsError: it cannot be asked, or does not say.
    """
    # One after the other: there may be more LDSUs than questions may wait.
    found: list[Standing] = []

    def take(body: bytes) -> Any:
        found.append(parse_standing(body))
        if len(found) == len(group.units):
            return found
        return group.pmd.questions.ask(STANDING, len(found), 0, 0).addCallback(take)

    asked: Deferred[Any] = group.pmd.questions.ask(STANDING, 0, 0, 0)
    return asked.addCallback(take)


def has_all(group: DriverGroup, standings: Sequence[Standing]) -> bool:
    """Tell whether the mirror stands where the group's own history ends.

    A secondary to which nothing has come yet has no history, and stands at the beginning of any.
    """
    return all(
        standing.generation in (group.generation, b"")
        and (standing.gsn, standing.point) == (group.next_gsn, unit.framed_point)
        for unit, standing in zip(group.units, standings, strict=True)
    )


def check_clients(group: DriverGroup, force: bool) -> None:
    """Check that no clients are connected, or may be cut off.

    :raises DegradedError: some are, and may not.
    """
    busy = [unit.name for unit in group.units if unit.connections]
    if busy and not force:
        raise DegradedError(
            f"{group.name}: clients are connected to {', '.join(busy)}",
            hint=f"end them (qdsdetach -g {group.number}), or cut them off with --force",
        )


def new_states(
    group: DriverGroup,
    standings: Sequence[Standing],
    before: Mapping[int, BackfreshState],
    discard: bool,
    keep: str = "",
) -> list[BackfreshState]:
    """Give the records of a backfresh that is to begin, by LDSU.

    :param standings: where the mirror stands; what came after is given up if ``discard`` says so.
    :param before: what data devices lack already.
    :param keep: the file for what is overwritten; "": nothing is kept.
    """
    given_up = discard and not has_all(group, standings)
    generation = os.urandom(16) if given_up else b""
    number, now = os.urandom(16), group.runtime.wall()
    states = []
    for unit, standing in zip(group.units, standings, strict=True):
        lacked = before.get(unit.index)
        states.append(
            BackfreshState(
                number,
                RUNNING,
                now,
                lacked.reason if lacked is not None else "",
                keep,
                *standing.place,
                discard=generation,
                lacked=lacked is not None,
            )
        )
    return states


def about(group: DriverGroup, states: Sequence[BackfreshState]) -> dict[str, Any]:
    """Give what the file of a backfresh says of itself."""
    units = [[unit.index, unit.name, unit.size] for unit in group.units]
    return {"group": group.number, "id": states[0].id.hex(), "ldsus": units}


class Agreement:
    """Asks until the mirror stands where a backfresh can begin.

    :ivar ended: nobody waits for it any more: the driver stops.
    """

    def __init__(self, group: DriverGroup) -> None:
        self._group = group
        self.ended = False

    @inlineCallbacks
    def reach(self, *, drained: bool, quiet: bool = True) -> Any:
        """Fire with the standings, by LDSU; what is not so yet is waited for, for a while.

        :param drained: nothing may be lacking there.
        :param quiet: nothing may be on its way to the mirror devices.
        :raises DegradedError: it is not so in the end.
        :raises BrokenError: the mirror is no state to go back to.
        """
        reactor = self._group.runtime.reactor
        deadline = reactor.seconds() + BACKFRESH_DRAIN_SECONDS
        while True:
            try:
                standings = yield self._look()
                if quiet:
                    self._check_quiet(standings)
                if drained:
                    self._check_drained(standings)
                return standings
            except DegradedError:
                if self.ended or reactor.seconds() >= deadline:
                    raise
            yield self._pause()

    def _pause(self) -> Deferred[None]:
        paused: Deferred[None] = Deferred()
        seconds = BACKFRESH_RETRY_SECONDS_MIN
        self._group.runtime.reactor.callLater(seconds, paused.callback, None)
        return paused

    @inlineCallbacks
    def _look(self) -> Any:
        group = self._group
        if not group.pmd.is_connected:
            raise self._unconnected()
        standings = yield ask_standings(group)
        if not all(standing.coherent for standing in standings):
            raise BrokenError(
                f"{group.name}: its mirror is not coherent: it is no state to go back to",
                hint="see qdsinfo on the secondary; a refresh that was interrupted may go on: "
                f"launchrefresh -g {group.number}",
            )
        return standings

    def _unconnected(self) -> DegradedError:
        group = self._group
        link = group.pmd.link
        why = f": {link['reason']}" if link["reason"] else ""
        hint = f"launchpmds here, launchrmds there; qdsinfo -g {group.number} --wait connected"
        if link["state"] == "refused":
            hint = "give up what the secondary lacks, with --discard"
        return DegradedError(f"{group.name}: there is no link to the secondary{why}", hint=hint)

    def _check_quiet(self, standings: Sequence[Standing]) -> None:
        one_place = len({(standing.generation, standing.gsn) for standing in standings}) == 1
        if not one_place or not all(standing.quiet for standing in standings):
            raise DegradedError(
                f"{self._group.name}: the mirror devices lack what the secondary's journal holds",
                hint="where a checkpoint holds them, end it; else try again: see qdsinfo on the "
                "secondary",
            )

    def _check_drained(self, standings: Sequence[Standing]) -> None:
        group = self._group
        name, number = group.name, group.number
        if not has_all(group, standings):
            raise DegradedError(
                f"{name}: not drained: the secondary lacks what was written here",
                hint=f"qdsinfo -g {number} --wait drained; or give it up with --discard",
            )
        dirty = sum(unit.dirty_bytes for unit in group.units)
        if group.bypass.phase == ON and dirty:
            raise DegradedError(
                f"{name}: not drained: in bypass {dirty} bytes may differ from the mirror",
                hint=f"qdsbypass off -g {number}; or give up what was written, with --discard",
            )
