"""Takes a mirror back to the last state in which it was usable (patent: "integrity mechanism during
incoherent data transfer periods").  Everything here blocks.

It may be interrupted anywhere, and run again.  First it is durable that the history ends here,
under a generation that no primary knows: whoever goes on sending is refused, and named, until a
refresh makes the mirror anew (rules.md 7, 8, 12).  Then the before-images are written back; then it
is durable that the mirror is usable.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from qdsmirror.core.beforeimage import Period
from qdsmirror.core.records import Cursor, Generation
from qdsmirror.errors import BrokenError, CorruptError, DegradedError
from qdsmirror.storage.binding import look_ahead
from qdsmirror.storage.journal import Mirror


class RolledBack(NamedTuple):
    """What was done.

    :ivar gsn: the last one on the mirror.
    :ivar restored_bytes: written back.
    """

    gsn: int
    restored_bytes: int


def check_rollback(mirror: Mirror) -> Period:
    """Check that a mirror can be rolled back; nothing is written to its devices.

    :param mirror: open, and not replayed.
    :returns: the refresh that began to change it.
    :raises DegradedError: it is usable as it is.
    :raises BrokenError: what it was is not known, or not all of it any more.
    :raises OSError: a device refused.
    """
    config, journal, images = mirror.config, mirror.journal, mirror.images
    if journal.superblock.coherent:
        raise DegradedError(
            f"{config.name}: its mirror is usable as of one instant: there is nothing to roll back",
            hint=f"qdsrmdreco -g {config.number} applies what the journal holds",
        )
    mirror.check_foreign()
    period = images.period
    if period is not None and not period.lost:
        images.check()
        period = images.period
    if period is None or period.lost:
        why = f"no before-images ({journal.superblock.reason})" if period is None else period.lost
        raise BrokenError(
            f"{config.name}: the mirror cannot be rolled back: {why}",
            hint=f"make it anew from the primary: qdsrefresh -g {config.number}",
        )
    return period


def roll_back(mirror: Mirror) -> RolledBack:
    """Roll a mirror back.

    :param mirror: open, and not replayed.
    :raises QdsError: as :func:`check_rollback`; nothing was written.
    :raises OSError: a device refused.
    """
    period = check_rollback(mirror)
    journal, images = mirror.journal, mirror.images
    end = Cursor(_end(mirror), period.gsn + 1)
    journal.update(
        both=True,
        coherent=False,
        reason="it is being rolled back: finish with qdsrmdreco --rollback",
        refresh=None,
        bypass=None,
        fingerprints=None,
        generations=(Generation(os.urandom(16), end.gsn),),
        tail=end,
        applied=end,
        head=end,
        durable_gsn=period.gsn,
    )
    journal.head = end.position
    mirror.applied = mirror.reached = end
    restored = images.restore()
    journal.update(
        both=True,
        coherent=True,
        reason=f"rolled back to GSN {period.gsn}, from before a refresh: the primary must refresh",
        bypass=period.bypass,
        verify=None,
        before=None,
    )
    return RolledBack(period.gsn, restored)


def _end(mirror: Mirror) -> int:
    """Give a position behind everything that was ever durable in the journal."""
    scan = mirror.scan()
    journal = mirror.journal
    reader = journal.reader(scan.reached, contiguous=True)
    try:
        ahead = look_ahead(journal, reader).durable_end
    except CorruptError as error:
        raise BrokenError(
            f"{mirror.config.name}: the mirror cannot be rolled back: {error.message}",
            hint=f"make it anew from the primary: qdsrefresh -g {mirror.config.number}",
        ) from error
    return max(scan.reached.position, journal.superblock.head.position, ahead)
