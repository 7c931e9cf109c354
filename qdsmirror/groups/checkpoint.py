"""Checkpoints of a group at the primary: what superblocks say, and which space may be reused.

Invariants kept here: TAIL (the tail is the lesser of what is committed at the secondary and what is
applied and synced), and rules.md 5 (space is used again only when both slots say that it is free).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred

from qdsmirror.core.records import Cursor
from qdsmirror.errors import QdsError

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.framing import UnitFrame
    from qdsmirror.groups.unit import DriverUnit


class Checkpoints:
    """Syncs data devices and writes superblocks, one checkpoint at a time.

    :ivar applied_gsn: every GSN up to this one is on the data devices, synced.
    :ivar running: whether a checkpoint is under way.
    :ivar wanted: whether somebody waits for space in a writelog.
    :ivar recording: how many :meth:`record_everywhere` are under way.
    """

    def __init__(self, group: DriverGroup) -> None:
        self._group = group
        self._unapplied: deque[UnitFrame] = deque()
        self._again = False
        self._changes = False
        self._entries_before = 0
        self.applied_gsn = 0
        self.running = False
        self.wanted = False
        self.recording = 0

    def stand_at(self, gsn: int) -> None:
        """Go on behind another number: nothing is under way, and all before it is applied."""
        self.applied_gsn = gsn
        self._entries_before = gsn + 1

    def framed(self, frame: UnitFrame) -> None:
        """Take a new frame into the group's order."""
        self._unapplied.append(frame)

    @property
    def due(self) -> bool:
        """Whether another checkpoint is due, by what was framed since or by who waits for space."""
        group = self._group
        return (
            self.wanted or group.next_gsn - self._entries_before
            > group.config.tunables.metadata_entries
        )  # fmt: skip

    def want_space(self) -> None:
        """Learn that a writelog is full: free what can be freed, now or when an ACK allows it."""
        self.wanted = True
        if any(
            _tail_end(unit) > unit.writelog.durable_tail or not unit.applying.is_synced
            for unit in self._group.units
            # A checkpoint leaves a failed one as it is: asking again would not end.
            if not unit.log_failed and (unit.exempt or not unit.dead)
        ):
            self.take()

    def take(self) -> None:
        """Sync the data devices, then record head, applied and tail in the superblocks."""
        if self.running:
            self._again = True
            return
        self.running = True
        self._again = False
        self._entries_before = self._group.next_gsn
        unsynced = [
            unit for unit in self._group.units if not unit.applying.is_synced and not unit.dead
        ]
        self._changes = bool(unsynced)
        _each(unsynced, self._sync_unit, self._synced)

    def _sync_unit(self, unit: DriverUnit, done: Callable[[], None]) -> None:
        def synced(upto: int, error: BaseException | None) -> None:
            if error is not None:
                unit.fail_data(error)
            else:
                unit.applying.synced_sequence = upto
            done()

        unit.applying.sync(synced)

    def _synced(self) -> None:
        unapplied = self._unapplied
        while unapplied:
            frame = unapplied[0]
            unit = frame.unit
            if not frame.applied or frame.sequence > unit.applying.synced_sequence:
                break
            unapplied.popleft()
            self._changes = True
            self.applied_gsn = frame.gsn_last
            unit.applied_end = frame.end
            unit.applied_point = frame.next_point
        changed = [
            unit
            for unit in self._group.units
            if not unit.log_failed
            and (
                unit.writelog.superblock.tail.position != _tail_end(unit)
                or unit.writelog.superblock.applied.position != unit.applied_end
                or unit.writelog.superblock.head.position != unit.durable_end
                or self._has_progress(unit)
            )
        ]
        self._changes = self._changes or bool(changed)
        _each(changed, self._write_unit, self._taken)

    def _has_progress(self, unit: DriverUnit) -> bool:
        """Whether a refresh has come further: one that finds all equal frames nothing."""
        job, known = self._group.refresh_job, unit.writelog.superblock.refresh
        return (
            job is not None
            and known is not None
            and known["id"] == job.id.hex()
            and bool(known["done"] != job.state(unit)["done"])
        )

    def cursors(self, unit: DriverUnit) -> dict[str, Any]:
        """Give what a superblock says of an LDSU's log and of its part of a refresh."""
        group = self._group
        index = unit.index
        tail_gsn = min(self.applied_gsn, unit.committed_gsn) + 1
        if unit.committed_end <= unit.applied_end:
            tail = Cursor(unit.committed_end, tail_gsn, {index: unit.committed_point})
        else:
            tail = Cursor(unit.applied_end, tail_gsn, {index: unit.applied_point})
        changes: dict[str, Any] = {
            "tail": tail,
            "applied": Cursor(unit.applied_end, self.applied_gsn + 1, {index: unit.applied_point}),
            "head": Cursor(unit.durable_end, group.durable_gsn + 1, {index: unit.durable_point}),
            "durable_gsn": group.durable_gsn,
        }
        if group.refresh_job is not None:
            changes["refresh"] = group.refresh_job.state(unit)
        if group.verifying.run is not None:
            changes["verify"] = group.verifying.run.state(unit)
        return changes

    def each_cursor(self) -> dict[str, Callable[[DriverUnit], Any]]:
        """Give :meth:`cursors` as changes for :meth:`record_everywhere`."""
        names = ("tail", "applied", "head", "durable_gsn")
        return {name: partial(self._cursor, name) for name in names}

    def _cursor(self, name: str, unit: DriverUnit) -> Any:
        return self.cursors(unit)[name]

    def _write_unit(self, unit: DriverUnit, done: Callable[[], None]) -> None:
        def written(error: BaseException | None) -> None:
            if error is not None:
                unit.fail_log(error)
            done()

        # Both slots before the space is used again (rules.md 5): losing either loses nothing.
        unit.update_superblock(self.cursors(unit), written)

    def _taken(self) -> None:
        self.running = False
        if self.wanted:
            self.wanted = False
            for unit in self._group.units:
                unit.pump()
            if self._group.refresh_job is not None:
                self._group.refresh_job.poke()
        self._group.memory.settle()
        changed = self._changes
        if self._again:
            self.take()
        if changed:
            # Whoever waits for something takes another: that would not end where nothing changes.
            self._group.bypass.poke()
        self._group.note_idle()

    def record_everywhere(self, **changes: Any) -> Deferred[None]:
        """Write changes to both slots of every superblock; fires when all are durable.

        But for those of writelogs that have failed.

        :param changes: fields of :class:`Superblock`; a callable is asked for each LDSU's value.
        """
        finished: Deferred[None] = Deferred()
        failed: list[BaseException] = []

        def write(unit: DriverUnit, done: Callable[[], None]) -> None:
            own = {key: value(unit) if callable(value) else value for key, value in changes.items()}

            def written(error: BaseException | None) -> None:
                if error is not None:
                    failed.append(error)
                    unit.fail_log(error)
                done()

            unit.update_superblock(own, written)

        def finish() -> None:
            if failed:
                name = self._group.name
                finished.errback(QdsError(f"{name}: cannot be recorded: {failed[0]}"))
            else:
                finished.callback(None)
            self.recording -= 1
            self._group.bypass.poke()

        self.recording += 1
        _each([unit for unit in self._group.units if not unit.log_failed], write, finish)
        return finished


def _tail_end(unit: DriverUnit) -> int:
    return min(unit.committed_end, unit.applied_end)


def _each(
    units: Sequence[DriverUnit],
    action: Callable[[DriverUnit, Callable[[], None]], None],
    done: Callable[[], None],
) -> None:
    """Run an action for every unit at once; call ``done`` when all have ended."""
    left = len(units)
    if not left:
        done()
        return

    def one() -> None:
        nonlocal left
        left -= 1
        if not left:
            done()

    for unit in list(units):
        action(unit, one)
