"""Writelogs in memory: what is durable beside them, and when (rules.md 23).

The ring is in memory, which a power cut takes; so a frame's durable place is the dirty bitmap and
the data device.  The way of a write:

1. the bits of what it covers are durable; its frame is in the memory; it is answered;
2. it is applied, and the data device synced: now it is *durable*, answers FUA and FLUSH;
3. only then it may be sent (NO-AHEAD);
4. the secondary has committed it, the durable tail has passed it; its bits are cleared, lazily,
   where nothing newer stands in their chunks.

So whatever the secondary may lack has a durable bit, at any time.  What a crash leaves:

=========================  ======================================================================
crash                      found at the start
=========================  ======================================================================
before the bits            nothing; it was not answered
after the bits             a bit too many, or a write that was answered and not synced: the data
                           device holds it or not, as a disk's cache would; the bit says so either
                           way (NO-HIDDEN)
after the sync, sent       the secondary may have it or not: the bit stands (PREFIX)
committed, not cleared     a bit too many
cleared                    the durable tail is behind it: a secondary that lacks it was set back,
                           and is refused (rules.md 8)
=========================  ======================================================================

A child's death leaves the memory with its master: the log is scanned as one on a device.  With the
memory its generation ends: see :mod:`qdsmirror.groups.memory_loss`.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred

from qdsmirror.core.bitmap import DirtyBitmap
from qdsmirror.groups import bypass
from qdsmirror.groups.syncing import Syncing
from qdsmirror.limits import MEMORY_DRAIN_SECONDS, MEMORY_SETTLE_SECONDS
from qdsmirror.storage.apply import apply_entries
from qdsmirror.storage.bitmap import write_blocks
from qdsmirror.storage.memory import OpenMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from qdsmirror.core.frames import Entry
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.framing import UnitFrame
    from qdsmirror.groups.unit import DriverUnit


class Cover:
    """Keeps an LDSU's dirty bitmap over what its writelog in memory holds.

    Bits are cleared by epochs: once the durable tail has passed the first number of an epoch, a
    bit that no frame has touched since it began stands for nothing that the secondary lacks.
    """

    def __init__(self, unit: DriverUnit) -> None:
        self._unit = unit
        dirty = unit.dirty
        #: What frames have touched since the epoch began.
        self._young = DirtyBitmap(dirty.area, unit.size, unit.writelog.log)
        self._epoch_gsn = unit.group.next_gsn
        self._epoch_began = unit.group.runtime.reactor.seconds()
        self._any = bool(dirty.dirty_bytes())

    def around(self, entries: Sequence[Entry], append: Callable[[], None]) -> Callable[[], None]:
        """Give the job that appends a frame once the bits of what it writes are durable.

        To be called when the frame is made, in the order of frames.
        """
        ranges = [(entry.offset, entry.length) for entry in entries]
        if not ranges:
            return append
        self._young.mark(ranges)
        dirty = self._unit.dirty
        changed = dirty.mark(ranges)
        if not changed:
            return append
        self._any = True
        blocks = dirty.blocks(changed)
        device = self._unit.writelog.device

        def job() -> None:
            write_blocks(device, dirty.area, blocks)
            append()

        return job

    def touch(self, offset: int, length: int) -> None:
        """Learn of a refresh's chunk on its way: its bits, where it has any, stay for now."""
        self._young.mark([(offset, length)])

    def settle(self) -> None:
        """Clear what the secondary has, if it is time to; the superblock is durable by now.

        Only while the mirror is coherent: from a break, or a refresh's begin, to the committed end
        mark, bits are only set (rules.md 12).
        """
        unit, group = self._unit, self._unit.group
        now = group.runtime.reactor.seconds()
        tail_gsn = unit.writelog.superblock.tail.gsn
        if tail_gsn < self._epoch_gsn or now < self._epoch_began + MEMORY_SETTLE_SECONDS:
            return
        if group.memory.may_settle and self._any and not unit.errors:
            self._clear()
        self._epoch_gsn = group.next_gsn
        self._epoch_began = now
        self._young.clear()

    def _clear(self) -> None:
        unit, dirty = self._unit, self._unit.dirty
        changed = dirty.keep(self._young)
        self._any = bool(dirty.dirty_bytes())
        if changed:
            job = partial(write_blocks, unit.writelog.device, dirty.area, dirty.blocks(changed))
            unit.run_on_bitmap(job, self._cleared)

    def _cleared(self, _result: None, error: BaseException | None) -> None:
        if error is not None:
            self._unit.fail_log(error)


class MemorySyncing(Syncing):
    """Syncing where the log is in memory: frames are durable once the data device is synced."""

    def _begin(self) -> None:
        unit = self._unit
        if unit.dead and not unit.exempt:
            # Nobody knows yet, durably, that the device is dead: it is asked again then.
            return
        self.running = True
        self.urgent = False
        frames = list(self._appended)
        # On a device that is durably known as dead nothing is missing any more (rules.md 16).
        entries = [] if unit.dead else [e for frame in frames for e in frame.entries]
        device = unit.device

        def job() -> None:
            apply_entries(device, entries)
            device.fdatasync()

        if unit.dead:
            self._refuse(unit.dead)
            self._applied(frames, None, None)
        else:
            unit.run_on_data(job, partial(self._applied, frames))

    def _refuse(self, reason: str) -> None:
        """Answer who waits for what will be durable nowhere here with an error (DURABLE)."""
        for request in self.drop():
            request.connection.answer_error(request, errno.EIO, reason)

    def _applied(
        self, frames: Sequence[UnitFrame], _result: None, error: BaseException | None
    ) -> None:
        unit = self._unit
        if error is not None:
            self.running = False
            unit.fail_data(error)
            unit.group.bypass.poke()
            return
        for frame in frames:
            unit.pending.remove(frame.entries)
            frame.entries = ()
        self._committed(len(frames), None, None)


class MemoryLogs:
    """The writelogs in memory of a group, if that is where they are.

    :ivar used: whether they are.
    :ivar open_memory: gives each its part of the memory that the master holds.
    """

    def __init__(self, group: DriverGroup, open_memory: OpenMemory | None) -> None:
        self._group = group
        self.open_memory = open_memory
        self.used = group.config.in_memory
        self._drained: Deferred[None] | None = None
        self._timer: Any = None

    @property
    def covered_gsn(self) -> int | None:
        """Up to which number the bits stand for what was lost; ``None``: there is no such thing."""
        names = [unit.writelog.superblock.memory for unit in self._group.units]
        return max((memory.first_gsn for memory in names if memory is not None), default=None)

    @property
    def lost_gsn(self) -> int:
        """The last number of what the writelogs do not hold any more."""
        return (self.covered_gsn or 1) - 1

    @property
    def may_settle(self) -> bool:
        """Whether bits may be cleared: the mirror lacks nothing but what the writelogs hold."""
        group = self._group
        return (
            group.coherent
            and group.refresh_job is None
            and group.bypass.phase == bypass.OFF
            and not group.checkpoints.recording
            and not group.failures.stops_framing
        )

    def settle(self) -> None:
        """Learn that superblocks are durable."""
        for unit in self._group.units:
            if unit.cover is not None:
                unit.cover.settle()

    def drain(self) -> Deferred[None]:
        """Wait, at a stop, until the secondary has what would be lost; fires soon at any rate."""
        drained: Deferred[None] = Deferred()
        if self._keeps_nothing():
            drained.callback(None)
            return drained
        self._drained = drained
        self._timer = self._group.runtime.reactor.callLater(MEMORY_DRAIN_SECONDS, self._give_up)
        return drained

    def _keeps_nothing(self) -> bool:
        group = self._group
        return (
            not self.used
            or group.pmd.link["state"] != "connected"
            or group.bypass.phase != bypass.OFF
            or group.committed_gsn >= group.durable_gsn
        )

    def look(self) -> None:
        """Look again whether there is anything to wait for: something has changed."""
        if self._drained is not None and self._keeps_nothing():
            self._end_drain()

    def _give_up(self) -> None:
        self._timer = None
        self._group.log.warn(
            "{group}: stops before the secondary has all that its writelogs in memory hold; should "
            "the driver's master end too, a dirty refresh is needed", group=self._group.name,
        )  # fmt: skip
        self._end_drain()

    def _end_drain(self) -> None:
        drained, self._drained = self._drained, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if drained is not None:
            drained.callback(None)
