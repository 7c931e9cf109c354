"""COHERENT at the primary: data devices that a backfresh makes what the mirror is.

What somebody else has written to a data device is put there when the backfresh has durably begun:
from then on, until its durable end, nobody relies on what a data device holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from qdsmirror.core.backfresh import ENDED, RUNNING, BackfreshState
from qdsmirror.core.records import Cursor
from qdsmirror.core.superblock import Superblock
from qdsmirror.groups.backfresh import OFF
from qdsmirror.storage.superblock import read_superblock
from tests.fakes import MemoryDevice
from tests.sim.history import SECTOR, Violation, first_difference, payload

if TYPE_CHECKING:
    from tests.sim.model import Model


class Backfreshes:
    """Watches the backfreshes of a group.

    :param logs: paths of the writelogs, by LDSU.
    :ivar fetching: whether blocks are being overwritten in this moment.
    :ivar ending: whether a superblock may say that one has ended, and the group has not gone on.
    :ivar gives_up: whether the last one to end gives up what the secondary lacks.
    :ivar awaits_replay: whether a power cut at the secondary may have taken from the mirror devices
        what its journal still holds.
    """

    def __init__(self, model: Model, logs: Sequence[str], random: Random) -> None:
        self._model = model
        self._logs = logs
        self._random = random
        self.fetching = False
        self.ending = False
        self.gives_up = False
        self.awaits_replay = False
        #: The generation that the one that ends goes back to, if a rollback has begun that.
        self._mirror = b""
        #: Told when a history is given up.
        self.given_up: Callable[[], None] = lambda: None

    def begun(self, number: int) -> bool:
        """Let somebody else have written to the data devices; tell whether it was so."""
        some = False
        for disk in self._model.data:
            for n in range(self._random.choice((0, 0, 1, 3))):
                at = self._random.randrange(disk.size // SECTOR) * SECTOR
                data = payload(number, SECTOR * (n + 1))[-SECTOR:]
                disk.durable[at : at + SECTOR] = data
                disk.seen[at : at + SECTOR] = data
                some = True
        return some

    def check_overwriting(self, ldsu: int) -> None:
        """Check that a power cut in this moment leaves a group that knows of its backfresh."""
        self._model._count("blocks fetched")
        for index in range(len(self._logs)):
            if index not in self._model.unlogged and self._says(index) != RUNNING:
                raise Violation(
                    f"COHERENT: blocks of LDSU {ldsu} are overwritten, and the writelog of LDSU "
                    f"{index} does not say that a backfresh runs"
                )

    def _says(self, index: int) -> str:
        content = bytes(self._model.disks[self._logs[index]].durable)
        state = BackfreshState.of(read_superblock(MemoryDevice(len(content), content=content)))
        return state.phase if state is not None else ""

    def superblock(self, superblock: Superblock) -> None:
        """Look at a writelog's superblock before it is written."""
        state = BackfreshState.of(superblock)
        if state is None:
            return
        index = superblock.units[0].index
        if state.phase == ENDED:
            self.ending, self.gives_up = True, bool(state.discard)
            self._mirror = state.generation if state.generation in self._model.rolled else b""
            if state.discard:
                self._model.leaves_bypass(state.discard, self._mirror)
        if state.phase == ENDED or state.done:
            self._check_fetched(index, state)

    def _check_fetched(self, index: int, state: BackfreshState) -> None:
        """COHERENT: what counts as done is on the platters, as the history has it."""
        generation = state.generation or self._model.lineage.newest
        made = self._model.find(index, generation, state.point.chain)
        if made is None:
            raise Violation(f"COHERENT: LDSU {index} is fetched from a mirror that never was")
        upto = self._model.data[index].size if state.phase == ENDED else state.done
        content = made.mirrored()[:upto]
        found = bytes(self._model.data[index].durable[:upto])
        if index not in self._model.dead and found != content:
            raise Violation(
                f"COHERENT: LDSU {index} counts as fetched up to {upto}, and differs from the "
                f"mirror at {first_difference(found, content)}"
            )

    def stands_at(self, places: Sequence[Cursor]) -> None:
        """Learn that the driver goes on where the mirror stands, and gives up what came after."""
        self._model._count("histories given up")
        for index, place in enumerate(places):
            self.go_back(index, place.point(index).chain)

    def go_back(self, index: int, chain: bytes) -> None:
        """Take an earlier place of an LDSU's history for its last."""
        model = self._model
        made = model.find(index, self._mirror or model.lineage.newest, chain)
        if made is None:
            raise Violation(f"GENERATION: LDSU {index} goes back to a place that never was")
        model.tips[index] = model._applied_checked[index] = model._tail_checked[index] = made
        # A power cut there may have left later frames, behind one that it took: it stands here.
        model.held[index] = made
        model.acked = min(model.acked, made.gsn_last)

    def ended(self) -> None:
        """COHERENT: data devices, mirrors and history are the same, all on the platters."""
        model = self._model
        model._count("backfreshes ended")
        self.ending = False
        for index, tip in enumerate(model.tips):
            content = tip.mirrored()
            places = [("data device", model.data[index].durable)]
            if not self.awaits_replay:
                places.append(("mirror", model.mirrors[index].seen))
            for what, found in places:
                if bytes(found) != content:
                    raise Violation(
                        f"COHERENT: a backfresh has ended, and {what} {index} differs from the "
                        f"history at {first_difference(bytes(found), content)}"
                    )
            model.sectors[index].recovered(content, ())


def watched_overwrite(world: Any, original: Any) -> Any:
    def overwrite(device: Any, ldsu: int, *args: Any) -> Any:
        watching = world.model.backfreshes
        watching.fetching = True
        try:
            return original(device, ldsu, *args)
        finally:
            watching.fetching = False

    return overwrite


def watched_fetch(world: Any, original: Any) -> Any:
    def fetch(backfresh: Any, *args: Any, touched: bool = False, **kw: Any) -> None:
        spoilt = False
        if not touched:
            spoilt = world.model.backfreshes.begun(world._number())
            for client in world.clients:
                for asked in client.open.values():
                    # Reads under way give what they find; in earnest their clients are cut off.
                    asked.expected = {}
        original(backfresh, *args, touched=touched or spoilt, **kw)

    return fetch


def watched_stand_at(world: Any, original: Any) -> Any:
    def stand_at(group: Any, places: Sequence[Cursor]) -> None:
        if group.backfresh.phase == OFF:
            world.model.gives_up_unsendable(places)
        else:
            world.model.backfreshes.stands_at(places)
            world.model.backfreshes.given_up()
        original(group, places)

    return stand_at


def watched_became_equal(world: Any, original: Any) -> Any:
    def became_equal(coherence: Any) -> None:
        world.model.lineage.go_back(coherence._group.generation)
        world.model.backfreshes.ended()
        world.answered_writes = [[] for _ in world.config.ldsus]
        original(coherence)

    return became_equal
