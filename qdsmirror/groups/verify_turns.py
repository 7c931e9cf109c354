"""Whether a group can be verified at all, and whether its applications are at work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qdsmirror.groups.bypass import OFF
from qdsmirror.limits import VERIFY_BUSY_REQUESTS

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit


def obstacle(group: DriverGroup, mending: bool = False) -> str:
    """Tell why a group cannot be verified now, however long one waits; "" if it can.

    :param mending: a refresh that mends what a verify has found is none.
    """
    failed = next((reason for unit in group.units for reason in unit.errors), "")
    if failed or group.failures.stops_framing:
        return failed or "a writelog has failed"
    if group.bypass.phase != OFF:
        return "the group is in bypass"
    if group.backfresh.coming or group.backfresh.reason:
        return group.backfresh.reason or "a backfresh is running"
    if group.backfresh.stops_framing:
        return "a backfresh is in progress"
    if group.refresh_job is not None and not mending:
        return "a refresh is in progress"
    if not group.coherence.tracked:
        # (One that differs is tracked, and may be looked at again.)
        return f"the mirror is not coherent: {group.coherence.reason}"
    return ""


class Load:
    """How many requests applications make.

    :param now: the reactor's seconds.
    """

    def __init__(self, units: Sequence[DriverUnit], now: float) -> None:
        self._units = units
        self._since = now
        self._before = self._count()

    def is_busy(self, now: float) -> bool:
        """Whether many requests have come since it was last asked; reads count as well."""
        since, before = self._since, self._before
        self._since, self._before = now, self._count()
        return self._before - before > VERIFY_BUSY_REQUESTS * (now - since)

    def _count(self) -> int:
        return sum(unit.requests for unit in self._units)
