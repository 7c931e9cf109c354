"""SYNC: what a synchronous or near-synchronous group has answered, and what of it is committed.

Committed is what the secondary's platters hold: what a power cut in that moment would leave there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from qdsmirror.core import frames, nbd
from qdsmirror.core.superblock import Superblock
from qdsmirror.storage.superblock import read_superblock
from tests.fakes import MemoryDevice
from tests.sim.history import SECTOR, TAG, Made, Violation

if TYPE_CHECKING:
    from tests.sim.clients import Asked, Clients

ASYNC, SYNC = "async", "sync"
_OF_REFRESH = frozenset((frames.REFRESH, frames.REFRESH_ZEROES))


class _Owed(NamedTuple):
    """A change that was answered while the group was durably degraded.

    :ivar gsn: the last one by then.
    :ivar framed: whether it did not go past the writelogs.
    """

    asked: Asked
    gsn: int
    framed: bool


class Synchrony:
    """Looks at every answer of a change in the moment in which it is given.

    :ivar near: answered by near-synchronous operation and, when last looked at, not committed.
    :ivar answered_gsn: the last GSN of what was answered, and committed by then.
    :ivar owed: answered while the group was durably degraded.
    """

    def __init__(self, world: Clients) -> None:
        self._world = world
        self.answered_gsn = 0
        self.near: list[Asked] = []
        self.owed: list[_Owed] = []
        self._is_degraded = False

    def forget(self) -> None:
        """Begin anew: another history, or another operation."""
        self.near, self.owed = [], []
        self._is_degraded = False

    # -- what happens -------------------------------------------------------------------------

    def answered(self, asked: Asked) -> None:
        """Look at an answered write, trim or write of zeroes."""
        world = self._world
        assert world.driver is not None
        config = world.driver.group.config
        if config.operation == ASYNC:
            return
        if self._is_committed(asked, 0):
            world.count("synchronous answers")
            frames = [made.gsn_last for made in self._frames(asked)]
            self.answered_gsn = max([self.answered_gsn, *frames])
            return
        if self._degraded_durably():
            world.count("degraded answers")
            self.owed.append(_Owed(asked, self._last_gsn(), any(self._frames(asked))))
            return
        if config.operation == SYNC:
            raise Violation(f"SYNC: LDSU {asked.ldsu}: answered and not committed: {asked}")
        world.count("near-synchronous answers")
        self._note_near(asked, config.near_sync_entries)

    def _note_near(self, asked: Asked, limit: int) -> None:
        self.near = [one for one in self.near if not self._is_committed(one, 0)]
        self.near.append(asked)
        entries = sum(self._uncommitted_frames(one) for one in self.near)
        if entries > limit:
            raise Violation(
                f"SYNC: {entries} answered entries are not committed, not {limit}: "
                f"{[str(one) for one in self.near]}"
            )

    def superblock(self, before: Superblock, now: Superblock) -> None:
        """Look at a writelog's superblock: degraded ends when all of that time is committed."""
        self._is_degraded = False
        driver = self._world.driver
        if before.degraded is None or now.degraded is not None or driver is None:
            return
        self._pay()

    def changes(self) -> None:
        """Learn that another operation is asked for: what was answered is no promise of that one.

        Of an end of being degraded that is on its way to be durable, the one before decides.
        """
        world = self._world
        assert world.driver is not None
        # (Of writelogs that have all failed, that is on record instead.)
        is_known = len(world.model.unlogged) < len(world.config.ldsus)
        if is_known and world.driver.group.answering.degraded is None:
            self._pay()
        self.near = []

    def _pay(self) -> None:
        """SYNC: what is answered and not committed is within the operation's promise."""
        owed, self.owed = self.owed, []
        assert self._world.driver is not None
        config = self._world.driver.group.config
        if config.operation == ASYNC or not owed:
            return
        self._world.count("degraded ended")
        limit = 0 if config.operation == SYNC else config.near_sync_entries
        late = [one.asked for one in owed if not self._is_committed(one.asked, one.gsn)]
        if sum(self._uncommitted_frames(one) for one in late) > limit:
            raise Violation(f"SYNC: no longer degraded, and not committed: {late[-1]}")
        self.near += late

    def recovered(self) -> None:
        """Learn that the driver has begun anew: what a power cut has taken was no promise."""
        there: set[int] = set()
        for tip in self._world.model.tips:
            at: Made | None = tip
            while at is not None:
                there.add(id(at))
                at = at.parent

        def kept(asked: Asked) -> bool:
            # (Zeroes of which nothing is left would later be taken for others that are like them.)
            made = list(self._frames(asked))
            return bool(made) and all(id(one) in there for one in made)

        self.near = [one for one in self.near if kept(one)]
        self.owed = [one for one in self.owed if not one.framed or kept(one.asked)]

    # -- what is so ---------------------------------------------------------------------------

    def _last_gsn(self) -> int:
        return max(tip.gsn_last for tip in self._world.model.tips)

    def _frames(self, asked: Asked) -> Iterator[Made]:
        """Give the frames that hold a request, each once or more."""
        request = asked.request
        if request.command == nbd.CMD_WRITE and not asked.zeroes:
            first = asked.number << 20
            for n in range(request.length // SECTOR):
                yield from self._wrote(asked.ldsu, first + n)
            return
        # Zeroes do not tell whose they are: the first that are like these.
        yield from self._zeroes_like(asked)[-1:]

    def _zeroes_like(self, asked: Asked) -> list[Made]:
        """Give the frames with the zeroes that were asked for, or some like them, newest first."""
        request = asked.request
        found: list[Made] = []
        at: Made | None = self._world.model.tips[asked.ldsu]
        while at is not None and at.gsn_last > asked.since:
            if any(
                e.payload is None and (e.offset, e.length) == (request.offset, request.length)
                for e in at.entries
            ):
                found.append(at)
            at = at.parent
        return found

    def _wrote(self, ldsu: int, number: int) -> list[Made]:
        """Give the application's frames that wrote a sector so (not a refresh's)."""
        made = self._world.model.tags.get((ldsu, b"%015x|" % number), ())
        return [one for one in made if one.entries[0].kind not in _OF_REFRESH]

    def _is_committed(self, asked: Asked, gsn: int) -> bool:
        """Tell whether the secondary has a request durably.

        :param gsn: of one that has gone past the writelogs, the last one before it.
        """
        request = asked.request
        if request.command == nbd.CMD_WRITE and not asked.zeroes:
            first = asked.number << 20
            made = [self._wrote(asked.ldsu, first + n) for n in range(request.length // SECTOR)]
        else:
            # Of the first that are like these a history may have begun anew: not of the own ones.
            made = [self._zeroes_like(asked)]
        if all(any(self._is_there(one) for one in some) for some in made):
            return True
        # Past the writelog, as a whole or its end: a refresh has brought it.
        return bool(gsn) and self._refreshed_behind(gsn)

    def _is_there(self, made: Made) -> bool:
        return self._world.model.is_journaled(made) and (
            not made.skipped or self._refreshed_behind(made.gsn_last)
        )

    def _refreshed_behind(self, gsn: int) -> bool:
        model = self._world.model
        return any(
            end.gsn_first > gsn and model.is_journaled(end)
            for ends in model._ends.values()
            for end in ends
        )

    def _uncommitted_frames(self, asked: Asked) -> int:
        """Give how many frames hold entries of a request and are not committed: at most as many."""
        frames = {id(one): one for one in self._frames(asked)}
        return sum(not self._is_there(one) for one in frames.values())

    def _degraded_durably(self) -> bool:
        """Tell whether a power cut in this moment would leave a group that says it is degraded."""
        if self._is_degraded:
            return True
        world = self._world
        model = world.model
        ldsus = range(len(world.config.ldsus))
        intact = [self._says_degraded(index) for index in ldsus if index not in model.unlogged]
        if intact:
            self._is_degraded = all(intact)
        else:
            # The failure is on record instead, or has not happened yet.
            self._is_degraded = model.goes_direct() or all(map(self._says_degraded, ldsus))
        return self._is_degraded

    def _says_degraded(self, index: int) -> bool:
        world = self._world
        content = bytes(world.disks[world.config.ldsus[index].log_device].durable)
        device = MemoryDevice(len(content), content=content)
        return read_superblock(device).degraded is not None


assert TAG == 16
