"""What a group makes of it that the memory of its writelogs is gone (rules.md 23, GENERATION).

The driver's master has ended, or the host: what was not yet sent cannot be sent any more, and how
far the secondary came is not known here.  But whatever it may lack has a durable bit.  So the group
is in bypass, and says why: the mirror stays as it is, coherent and older, until a dirty refresh
leads out, by itself where ``auto_refresh`` says so.  That begins a new generation; its numbers lie
above all that the lost log can have given.  A secondary cannot be met in a log that is gone, so it
goes on at the refresh's cut, if it is of a generation that is known here and lacks nothing that
came before the durable tail (:func:`qdsmirror.groups.resume.is_covered`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qdsmirror.core.superblock import RingMemory
from qdsmirror.errors import DeviceError
from qdsmirror.storage.memorylog import MemoryLogDevice
from qdsmirror.storage.recovery import OpenUnit

if TYPE_CHECKING:
    from qdsmirror.core.generations import Settled
    from qdsmirror.groups.driver import DriverGroup


def take_memory(opened: Sequence[OpenUnit]) -> dict[int, dict[str, Any]]:
    """Take the memory, where a log's own is gone (blocking).

    What it gives, by LDSU, is to be recorded before anything is placed in the logs.

    :raises DeviceError: the memory cannot be written.
    """
    taken: dict[int, dict[str, Any]] = {}
    for one in opened:
        device = one.writelog.device
        if one.loss.taken or not isinstance(device, MemoryLogDevice):
            continue
        try:
            memory = RingMemory(device.take(), one.reached.gsn)
        except OSError as error:
            raise DeviceError(
                f"{one.config.writelog_device} of {one.config.name}: {error.strerror}",
                hint="free memory, or give less to the writelogs",
            ) from error
        taken[one.config.index] = {"memory": memory}
    return taken


def lost_names(opened: Sequence[OpenUnit]) -> list[str]:
    """Name the LDSUs whose writelog was lost with its memory."""
    return [one.config.name for one in opened if one.loss.lost]


def bypass_after(group: DriverGroup, names: Sequence[str], settled: Settled) -> Mapping[str, Any]:
    """Give the bypass in which a group is after such a loss.

    One that it was in already goes on, without what was still to be sent from before it.
    """
    what = (
        f"writelogs in memory were lost ({', '.join(names)}): the driver's master or the host has "
        "ended"
    )
    if settled.bypass is not None:
        reason = str(settled.bypass["reason"])
        return {
            **settled.bypass,
            "reason": reason if settled.bypass.get("lost") else f"{reason}; {what}",
            "lost": True,
        }
    return {
        "id": os.urandom(16).hex(),
        "since": group.runtime.wall(),
        "reason": f"{what}; a refresh brings what the dirty bitmaps have",
        "lost": True,
    }
