"""Starts a primary's group over its devices, also over those that have failed (rules.md 13, 16).

Everything is replayed first.  Where all writelogs are well, the group goes on with their histories;
where one has failed before, it goes on in bypass past them.

Everything here blocks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qdsmirror.core.backfresh import INTERRUPTED
from qdsmirror.core.failures import Dead, Failed
from qdsmirror.core.frames import HEADER_BYTES, SWITCH, VOID
from qdsmirror.core.generations import awaits_switch, settle
from qdsmirror.core.recovery import Recovery
from qdsmirror.errors import BrokenError, QdsError
from qdsmirror.groups.devices import take_over_devices
from qdsmirror.groups.memory_loss import bypass_after, lost_names, take_memory
from qdsmirror.groups.unit import DriverUnit
from qdsmirror.limits import FAILURE_REASON_CHARS_MAX
from qdsmirror.storage.bitmap import empty_bitmap, load_bitmap
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.recovery import (
    DataDeviceError,
    OpenUnit,
    believed,
    judge,
    open_units,
    replay,
)

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup


def open_devices(group: DriverGroup, latch: FailureLatch) -> list[OpenUnit]:
    """Open all devices of a group, its extension pool among them, and scan the writelogs.

    :raises BrokenError: the state file cannot be read: then nobody knows what failed.
    :raises QdsError: see :func:`qdsmirror.storage.recovery.open_units`; nothing is open then.
    """
    known = latch.known(group.config.ldsus, group.runtime.wall())
    latch.try_to_keep()
    try:
        needed = any(not log.drained for log in known.untrusted.values())
        pool = group.extensions.open(failed=needed)
        return open_units(
            group.config, group.runtime.open_device, known, pool, group.memory.open_memory
        )
    except BaseException:
        group.extensions.close()
        raise


def recover(group: DriverGroup, opened: Sequence[OpenUnit], latch: FailureLatch) -> None:
    """Replay the writelogs, and make the group of what they say.

    :raises QdsError: they do not fit each other, or a device has failed and cannot be gone past.
    """
    plan = judge(opened)
    _give_up_incoherent(group, opened)
    take_over_devices(group, opened)
    _replay_all(group, opened, latch)
    if any(one.untrusted for one in opened):
        _go_on_past(group, opened, plan, latch)
    else:
        _go_on(group, opened, plan, latch)
    group.verifying.resume([one.writelog.superblock.verify for one in opened])


def _append(unit: DriverUnit, kind: int, payload: bytes, gsns: tuple[int, int]) -> None:
    """Append a control frame durably; ``gsns``: its first and how many."""
    placement = unit.writelog.place(HEADER_BYTES + len(payload), control=True)
    assert placement is not None, "the reserve holds room for what recovery records"
    frame, writes = unit.framing.make(kind, placement, (), [payload], gsns)
    unit.writelog.write(writes)
    unit.writelog.sync()
    unit.stand_behind(frame)


def _replay_all(group: DriverGroup, opened: Sequence[OpenUnit], latch: FailureLatch) -> None:
    """Replay every writelog; a data device that fails in it is dead from now on."""
    for found in opened:
        try:
            replayed = replay(found)
        except DataDeviceError as error:
            path = found.config.data_device
            reason = _shorten(f"data device {path} failed: {error.cause}")
            group.log.error("{group}: {reason}", group=group.name, reason=reason)
            found.dead = Dead(reason, group.runtime.wall(), found.device.size)
            try:
                latch.record(path, error.cause)
                latch.record_group(_failures_found(opened))
            except QdsError as unrecorded:
                raise error.cause from unrecorded
            continue
        if replayed:
            group.log.info(
                "{group} {unit}: replayed {count} frames",
                group=group.name, unit=found.config.name, count=replayed,
            )  # fmt: skip


def _give_up_incoherent(group: DriverGroup, opened: Sequence[OpenUnit]) -> None:
    """Count data devices as dead that a backfresh has left incoherent, where a writelog failed.

    What says so stands in superblocks alone, which are gone with their writelogs.
    """
    if not any(one.untrusted for one in opened):
        return
    for found in opened:
        if found.writelog.superblock.backfresh is not None and found.dead is None:
            path = found.config.data_device
            reason = _shorten(f"data device {path} is incoherent: {INTERRUPTED}")
            found.dead = Dead(reason, group.runtime.wall(), found.device.size)


def _failures_found(opened: Sequence[OpenUnit]) -> Failed:
    """Give what is known of a group's failed devices once everything was replayed."""
    upto = max(one.durable_gsn for one in opened)
    readable = believed(opened) or [one.writelog.superblock for one in opened]
    return Failed(
        {
            one.config.index: replace(
                one.untrusted,
                upto=min(upto, one.untrusted.upto),
                drained=True,
                size=one.device.size,
            )
            for one in opened
            if one.untrusted is not None
        },
        {
            one.config.index: replace(one.dead, size=one.device.size)
            for one in opened
            if one.dead is not None
        },
        settle(readable).generations[-1].id.hex(),
    )


def _record_failures(group: DriverGroup, failed: Failed, latch: FailureLatch) -> None:
    """Write what was found into the state file, before anything is made of it.

    :raises BrokenError: that cannot be done: then the device is only refused.
    """
    try:
        latch.record_group(failed)
    except QdsError as error:
        for ldsu in group.config.ldsus:
            log, data = failed.untrusted.get(ldsu.index), failed.dead.get(ldsu.index)
            path = ldsu.log_device if log is not None else ldsu.data_device
            one = log or data
            if one is not None:
                raise BrokenError(
                    f"{path} has failed: {one.reason}; that cannot be recorded: {error.message}",
                    hint="make the state file writable, or replace the device and run "
                    f"qdswlinit -g {group.number} --yes",
                ) from error
        raise


def _go_on(
    group: DriverGroup, opened: Sequence[OpenUnit], plan: Recovery, latch: FailureLatch
) -> None:
    """Go on with the histories: record void ranges, and write every superblock."""
    taken = take_memory(opened)
    for one in opened:
        one.writelog.clear_end(one.reached.position)
    superblocks = [one.writelog.superblock for one in opened]
    settled = settle(superblocks)
    group.generation = settled.generations[-1].id
    group.durable_gsn = group.checkpoints.applied_gsn = plan.next_gsn - 1
    group.committed_gsn = max(s.tail.gsn for s in superblocks) - 1
    group.next_gsn = plan.next_gsn
    group.units = [_make_unit(group, one) for one in opened]
    for void in plan.voids:
        group.log.warn(
            "{group}: GSN {first} to {last} were lost before they were durable; recorded as "
            "void", group=group.name, first=void.range.first, last=void.range.end - 1,
        )  # fmt: skip
        gsns = (void.range.first, void.range.length)
        _append(group.units[void.ldsu], VOID, b"", gsns)
    lost = lost_names(opened)
    if lost:
        state = bypass_after(group, lost, settled)
        settled = settled._replace(bypass=state, refreshes=[], uneven=True)
        group.log.error("{group}: {why}", group=group.name, why=state["reason"])
    group.bypass.resume(settled)
    group.coherence.resume(settled)
    group.backfresh.resume(lost=bool(lost))
    group.answering.resume(superblocks)
    common: dict[str, Any] = {"degraded": group.answering.degraded}
    if settled.uneven:
        # A crash came while bypass was being entered or left: complete it in all.
        common |= {
            "generations": settled.generations,
            "bypass": settled.bypass,
            "coherent": settled.coherent,
            "tracked": settled.tracked and not settled.coherent,
            "reason": settled.reason,
            "refresh": None,
        }
    failed = _failures_found(opened)
    if failed:
        _record_failures(group, failed, latch)
        common["failures"] = failed.to_json()
    ends = {one.config.index for one in opened if one.ends_backfresh}
    for unit in sorted(group.units, key=lambda unit: unit.index in ends):
        changes = common | taken.get(unit.index, {}) | group.checkpoints.cursors(unit)
        changes["backfresh"] = group.backfresh.recorded(unit)
        unit.writelog.update(both=True, **changes)
    if not lost and awaits_switch(settled.generations, group.next_gsn):
        _switch(group, settled.generations[-2].id)
    group.failures.resume(failed)
    group.lag.framed(group.committed_gsn + 1, group.runtime.reactor.seconds())


def _make_unit(group: DriverGroup, opened: OpenUnit) -> DriverUnit:
    """Make an LDSU of its devices."""
    superblock = opened.writelog.superblock
    if opened.untrusted is None:
        dirty, damage = load_bitmap(opened.writelog.device, superblock)
        if damage:
            group.note_error(damage)
    else:
        # All is dirty where the bitmap has failed with its writelog.
        dirty = empty_bitmap(superblock)
    return DriverUnit(group, opened.config, opened.device, opened.writelog, opened.reached, dirty)


def _switch(group: DriverGroup, predecessor: bytes) -> None:
    """Begin the newest generation with its switch, durably, before anything else (rules.md 7)."""
    _append(group.units[0], SWITCH, predecessor, group.take_gsns(1))
    group.durable_gsn = group.checkpoints.applied_gsn = group.next_gsn - 1


def _go_on_past(
    group: DriverGroup, opened: Sequence[OpenUnit], plan: Recovery, latch: FailureLatch
) -> None:
    """Begin in bypass, without the writelogs that have failed; everything was replayed by now.

    :raises BrokenError: that cannot be recorded.
    """
    superblocks = believed(opened)
    failed = _failures_found(opened)
    upto = min(log.upto for log in failed.untrusted.values())
    group.durable_gsn = upto
    group.checkpoints.applied_gsn = plan.next_gsn - 1
    group.next_gsn = plan.next_gsn
    group.units = [_make_unit(group, one) for one in opened]
    readable = superblocks or [one.writelog.superblock for one in opened]
    group.committed_gsn = min(upto, max(s.tail.gsn for s in readable) - 1)
    bypass = next((s.bypass for s in readable if s.bypass is not None), None)
    settled = settle(readable)
    group.generation = settled.generations[-1].id
    group.coherence.resume(settled._replace(refreshes=[]))
    group.answering.resume(readable)
    first = min(failed.untrusted.values(), key=lambda log: log.since)
    state = bypass or {"id": os.urandom(16).hex(), "since": first.since}
    reasons = "; ".join(log.reason for log in failed.untrusted.values())
    state = {**state, "reason": f"{reasons}: new writelogs and a full refresh are needed"}
    _record_failures(group, failed, latch)
    group.failures.resume(failed)
    taken = take_memory([one for one in opened if one.untrusted is None])
    for unit in group.units:
        if not unit.log_failed:
            unit.writelog.update(
                both=True,
                failures=failed.to_json(),
                bypass=state,
                refresh=None,
                coherent=group.coherence.coherent,
                reason=group.coherence.reason,
                degraded=group.answering.degraded,
                **taken.get(unit.index, {}),
                **group.checkpoints.cursors(unit),
            )
    group.bypass.begin(state)


def _shorten(reason: str) -> str:
    return reason[:FAILURE_REASON_CHARS_MAX]
