"""Applying: an LDSU's durable frames on their way to the data device (NO-HIDDEN)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from qdsmirror.storage.apply import apply_entries

if TYPE_CHECKING:
    from qdsmirror.groups.framing import UnitFrame
    from qdsmirror.groups.unit import DriverUnit
    from qdsmirror.interfaces import IWorker


class Applying:
    """The frames of one LDSU that are durable and not yet on the data device.

    :param worker: writes and syncs the data device.
    :ivar applied_sequence: the last frame on the data device; ``synced_sequence``: durably.
    """

    def __init__(self, unit: DriverUnit, worker: IWorker, sequence: int) -> None:
        self._unit = unit
        self._worker = worker
        self._durable: deque[UnitFrame] = deque()
        self._running = False
        self.applied_sequence = self.synced_sequence = sequence

    @property
    def busy(self) -> bool:
        """Whether something durable is not yet applied."""
        return self._running or bool(self._durable)

    @property
    def is_synced(self) -> bool:
        """Whether all that is applied is durable on the data device."""
        return self.applied_sequence == self.synced_sequence

    def take(self, frames: Sequence[UnitFrame]) -> None:
        """Take frames that are durable, or may do without; :meth:`go_on` applies them."""
        self._durable.extend(frames)

    def go_on(self) -> None:
        """Apply what there is, a batch at a time; nothing to a device that failed a moment ago."""
        unit = self._unit
        if self._running or not self._durable or (unit.dead and not unit.exempt):
            return
        self._running = True
        batch = list(self._durable)
        self._durable.clear()
        if unit.dead:
            self._applied(batch, None, None)
            return
        self._worker.run(
            partial(apply_entries, unit.device, [e for f in batch for e in f.entries]),
            partial(self._applied, batch),
        )

    def _applied(self, batch: list[UnitFrame], _result: None, error: BaseException | None) -> None:
        unit = self._unit
        self._running = False
        if error is not None:
            self._durable.extendleft(reversed(batch))
            unit.fail_data(error)
            self.go_on()
            return
        for frame in batch:
            unit.pending.remove(frame.entries)
            frame.entries = ()
            frame.applied = True
        self.applied_sequence = batch[-1].sequence
        if unit.dead and unit.exempt:
            self.synced_sequence = self.applied_sequence
        unit.group.was_applied(sum(frame.weight for frame in batch))
        self.go_on()

    def sync(self, done: Callable[[int, BaseException | None], None]) -> None:
        """Make what is applied durable on the data device.

        :param done: called with the last local sequence that this covers.
        """
        upto = self.applied_sequence
        device = self._unit.device
        self._worker.run(device.fdatasync, lambda _result, error: done(upto, error))

    def be_exempt(self) -> None:
        """Count everything as applied: it is durable that the data device is dead (rules.md 16)."""
        self.synced_sequence = self.applied_sequence
        self.go_on()
