"""Takes over a group's data devices at the start, and leaves them at an orderly stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred

from qdsmirror.core.backfresh import begun_anew
from qdsmirror.errors import QdsError
from qdsmirror.storage.binding import Bound, seal, take_over
from qdsmirror.storage.recovery import OpenUnit

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup


def take_over_devices(group: DriverGroup, opened: Sequence[OpenUnit]) -> None:
    """Check that the data devices are the right ones, as they were left (blocking).

    What somebody else has written is not in the mirror, so the mirror is durably marked as
    incoherent (NO-HIDDEN is broken, and told); a refresh that had begun may have read it before,
    and so does not count, nor does what a backfresh has done.

    :raises MismatchError: another device stands under a path.
    """
    used = [unit for unit in opened if unit.untrusted is None and unit.dead is None]
    used.sort(key=lambda unit: unit.ends_backfresh)

    def incoherent(reason: str) -> None:
        for unit in used:
            unit.writelog.update(
                both=True,
                coherent=False,
                tracked=False,
                reason=reason,
                refresh=None,
                backfresh=begun_anew(unit.writelog.superblock),
            )

    bound = [Bound(unit.writelog, unit.config.index, unit.device) for unit in used]
    for text in take_over(bound, group.config, incoherent):
        group.log.error("{group}: {text}", group=group.name, text=text)
    for unit in opened:
        # Fingerprints say, too, that nothing was written to the log since (binding.look_ahead).
        if unit.dead is not None and unit.untrusted is None:
            unit.writelog.update(both=True, fingerprints=None)


def leave_devices(group: DriverGroup) -> Deferred[None]:
    """Record what the data devices hold, where all went well; never fails."""
    bound = [Bound(u.writelog, u.index, u.device) for u in group.units if not u.errors]

    def record() -> None:
        for one in bound:
            try:
                seal([one])
            except (OSError, QdsError) as error:
                group.log.warn(
                    "{group}: changes of {path} while it is stopped will not be noticed: {why}",
                    group=group.name, path=one.device.path, why=error,
                )  # fmt: skip

    return group.runtime.blocking(record)
