"""An application's own marker: a place in the group's order, set at the primary.

Everything answered before lies below it, so that the secondary, which takes a checkpoint exactly
there, has it; nothing that is written later is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, inlineCallbacks

from qdsmirror.core.frames import MARK
from qdsmirror.core.held import Held, pack_mark
from qdsmirror.errors import DegradedError
from qdsmirror.groups.bypass import OFF

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.framing import UnitFrame


class Marks:
    """A group's marks, and the checkpoint that holds at its secondary."""

    def __init__(self, group: DriverGroup) -> None:
        self._group = group
        self._held: Held | None = None
        group.pmd.listeners["checkpoint"] = self._said

    def _said(self, report: dict[str, Any]) -> None:
        """Learn which checkpoint holds at the secondary."""
        try:
            self._held = Held.from_json(report.get("checkpoint"))
        except (TypeError, ValueError):
            self._held = None

    def status(self) -> dict[str, Any] | None:
        """Give the ``checkpoint`` object of ``qdsinfo --json``; ``None`` where nothing is known."""
        if self._held is None or not self._group.pmd.is_connected:
            return None
        return self._held.to_json()

    @inlineCallbacks
    def set(self, name: str) -> Any:
        """Put a mark behind everything answered; fires with its GSN when it is durable.

        :raises UsageError: the name is none.
        :raises DegradedError: the mirror is not usable at that place, or there is no room for it.
        :raises DeviceFailedError: a writelog has failed.
        """
        group = self._group
        payload = pack_mark(name)
        self._check()
        made: Deferred[UnitFrame | None] = Deferred()
        unit = group.units[0]

        def turn() -> None:
            ours = (
                group.is_serving and group.bypass.phase == OFF and not group.backfresh.stops_framing
            )
            made.callback(unit.own_frames.control(MARK, payload, reserve=False) if ours else None)

        unit.own_frames.when_free(turn)
        frame: UnitFrame | None = yield made
        if frame is None:
            self._check()
            raise DegradedError(
                f"{group.name}: there is no room for a mark in the writelog of {unit.name}",
                hint="try again when the secondary has committed more of it; see qdsinfo",
            )
        gsn = frame.gsn_last
        yield group.bypass.until(lambda: self._is_durable(gsn))
        return {"mark": name, "gsn": gsn}

    def _is_durable(self, gsn: int) -> bool:
        self._group.failures.check_logs("mark")
        return gsn <= self._group.durable_gsn

    def _check(self) -> None:
        group = self._group
        group.failures.check_logs("mark")
        if group.backfresh.stops_framing:
            raise DegradedError(
                f"{group.name}: a backfresh is running, and nothing is written",
                hint=f"wait until it has ended: qdsinfo -g {group.number}",
            )
        if group.bypass.phase != OFF:
            raise DegradedError(
                f"{group.name} is in bypass: nothing is in order behind what is written",
                hint=f"leave it first: qdsbypass off -g {group.number}",
            )
        if not group.coherent:
            raise DegradedError(
                f"{group.name}: its mirror is not usable there: {group.coherence.reason}",
                hint=f"wait for it: qdsinfo --wait coherent -g {group.number}",
            )
