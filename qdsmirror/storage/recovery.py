"""Opens a group's devices and brings them to one state after any end (patent: "qdswlscan").

Blocking; the driver runs it in a thread, and qdswlscan(1) runs it with ``check`` only.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from qdsmirror.config import GroupConfig, LdsuConfig
from qdsmirror.core.backfresh import completed, has_ended
from qdsmirror.core.failures import Dead, Failed, Untrusted, worst
from qdsmirror.core.frames import (
    ENTRIES,
    ENTRY_BYTES,
    REFRESH,
    REFRESH_ZEROES,
    VOID,
    Entry,
    entries,
)
from qdsmirror.core.generations import settle
from qdsmirror.core.newest import newest
from qdsmirror.core.records import BoundUnit, Cursor
from qdsmirror.core.recovery import Finding, GsnRange, Recovery, abandon, decide
from qdsmirror.core.superblock import Superblock, after_loss
from qdsmirror.errors import (
    BrokenError,
    CorruptError,
    DeviceFailedError,
    MismatchError,
    QdsError,
)
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.storage.absent import AbsentDevice, absent_log
from qdsmirror.storage.apply import apply_entries
from qdsmirror.storage.binding import look_ahead
from qdsmirror.storage.extension import PoolDevice
from qdsmirror.storage.memory import OpenMemory, open_memory_log
from qdsmirror.storage.memorylog import Loss, MemoryLogDevice, loss_of, next_gsn_after
from qdsmirror.storage.partition import LogDevices
from qdsmirror.storage.writelog import Writelog

_ON_PRIMARY_ALREADY = frozenset((REFRESH, REFRESH_ZEROES))


class DataDeviceError(OSError):
    """A data device has failed while a writelog was replayed onto it.

    :ivar cause: how.
    """

    def __init__(self, cause: OSError | DeviceFailedError) -> None:
        super().__init__(getattr(cause, "errno", None) or errno.EIO, str(cause))
        self.cause = cause


@dataclass
class OpenUnit:
    """An LDSU's devices, scanned.

    :ivar reached: behind the last intact frame of the writelog.
    :ivar untrusted: the writelog has failed; it is here only if something of it is still needed.
    :ivar dead: the data device has failed, and is not here.
    :ivar loss: what has become of the memory that the writelog stood in.
    :ivar ends_backfresh: on its device stands that a backfresh has ended, which others' may not
        say: written last, it says so until all have followed (:func:`completed`).
    """

    config: LdsuConfig
    device: IBlockDevice
    writelog: Writelog
    finding: Finding
    durable_gsn: int
    untrusted: Untrusted | None = None
    dead: Dead | None = None
    loss: Loss = Loss(True, False)
    ends_backfresh: bool = False

    @property
    def reached(self) -> Cursor:
        """Where the writelog's history ends."""
        return self.finding.reached

    @property
    def is_unread(self) -> bool:
        """Whether the writelog has failed and is not needed: all that it held is applied."""
        return self.untrusted is not None and self.untrusted.drained


@contextmanager
def closing_on_error() -> Iterator[ExitStack]:
    """Give an ExitStack that unwinds only when the block fails."""
    with ExitStack() as stack:
        yield stack
        stack.pop_all()


def check_binding(superblock: Superblock, config: GroupConfig, role: str, path: str) -> None:
    """Check that a log belongs to this group and this use.

    :raises MismatchError: it is another group's, or the other kind.
    """
    if superblock.role != role or superblock.group != config.number:
        raise MismatchError(
            f"{path} is the {superblock.role} of dsgrp{superblock.group:03d}, not the {role} of "
            f"{config.name}",
            hint=f"name the right device in {config.path}, or run qdswlinit(1)",
        )


def open_units(
    config: GroupConfig,
    open_device: Callable[..., IBlockDevice],
    known: Failed | None = None,
    pool: Sequence[PoolDevice] = (),
    open_memory: OpenMemory | None = None,
) -> list[OpenUnit]:
    """Open, lock, check and scan all devices of a group at the primary.

    A device that has failed for good is not opened; what stands in for it refuses all I/O.
    A writelog device that several LDSUs name is opened once, and divided among them.

    :param known: what is known of failed devices beside what the superblocks say.
    :param pool: the extension devices of the group that could be opened; the caller closes those
        that no writelog has, on an error all.
    :param open_memory: where writelogs stand in memory; without it, what was there counts as lost.
    :raises DeviceError: a device is missing or in use.
    :raises MismatchError: a log is another's, or a data device of another size than before.
    :raises CorruptError: a log is not usable.
    :raises BrokenError: the logs have not come from one history.
    """
    units: list[OpenUnit] = []
    with closing_on_error() as opened:
        logs, failed = _open_logs(config, open_device, known or Failed(), pool, opened, open_memory)
        losses = _stand_behind_losses(logs)
        ends: set[int] = set()
        if not failed.untrusted:
            ends = {index for index, log in logs.items() if has_ended(log.superblock)}
            each = list(logs.values())
            believable = completed([log.superblock for log in each])
            for log, superblock in zip(each, believable, strict=True):
                log.stand_at(superblock)
        for ldsu in config.ldsus:
            writelog, dead = logs[ldsu.index], failed.dead.get(ldsu.index)
            if dead is None:
                role = f"data device of {ldsu.name}"
                device = open_device(ldsu.data_device, writable=True, role=role)
                opened.callback(device.close)
            else:
                # Its size is not known where a crash came before the failure was recorded.
                device = _absent_device(ldsu, dead.size or writelog.superblock.units[0].size)
            _check_unit(writelog.superblock, config, ldsu, device)
            lost = failed.untrusted.get(ldsu.index)
            scan = _unscanned if lost is not None and lost.drained else _scan
            unit = scan(ldsu, device, writelog)
            unit.untrusted, unit.dead = lost, dead
            unit.loss = losses[ldsu.index]
            unit.ends_backfresh = ldsu.index in ends
            units.append(unit)
        superblocks = believed(units)
        try:
            if superblocks:
                settle(superblocks)
        except BrokenError as error:
            raise BrokenError(
                f"{config.name}: {error.message}",
                hint=f"initialise all of them together: qdswlinit -g {config.number} --yes",
            ) from error
    return units


def believed(units: Sequence[OpenUnit]) -> list[Superblock]:
    """Give the superblocks of the logs that are trusted."""
    return [unit.writelog.superblock for unit in units if unit.untrusted is None]


def failures_of(units: Sequence[OpenUnit]) -> Failed:
    """Give the failed devices among these LDSUs', by what state file and superblocks say."""
    return Failed(
        {one.config.index: one.untrusted for one in units if one.untrusted is not None},
        {one.config.index: one.dead for one in units if one.dead is not None},
    )


def _open_logs(
    config: GroupConfig,
    open_device: Callable[..., IBlockDevice],
    known: Failed,
    pool: Sequence[PoolDevice],
    opened: ExitStack,
    open_memory: OpenMemory | None,
) -> tuple[Mapping[int, Writelog], Failed]:
    """Open the writelogs that are needed, and put together what is known of failed devices."""
    devices = LogDevices(config.ldsus, open_device)
    logs: dict[int, Writelog] = {}
    errors: dict[int, Exception] = {}
    for ldsu in config.ldsus:
        log = known.untrusted.get(ldsu.index)
        if log is not None and log.drained:
            continue
        role = f"writelog of {ldsu.name}"
        try:
            device = devices.open(ldsu, role)
            opened.callback(device.close)
            if ldsu.memory_bytes:
                device = open_memory_log(device, ldsu, open_memory)
                opened.callback(device.memory.close)
            logs[ldsu.index] = Writelog.open(device, pool, failed=log is not None)
        except (OSError, QdsError) as error:
            errors[ldsu.index] = error
    failed = worst([known, *(Failed.from_json(one.superblock.failures) for one in logs.values())])
    for ldsu in config.ldsus:
        log = failed.untrusted.get(ldsu.index)
        if log is not None and log.drained:
            unit = BoundUnit(ldsu.index, ldsu.name, log.size, ldsu.data_device)
            role = f"writelog of {ldsu.name}"
            logs[ldsu.index] = absent_log(
                ldsu.log_device, role, config.number, unit, bytes.fromhex(failed.generation)
            )
        elif ldsu.index in errors:
            raise errors[ldsu.index]
    return logs, failed


def _stand_behind_losses(logs: Mapping[int, Writelog]) -> dict[int, Loss]:
    """Find which logs have lost their memory; these go on empty (GENERATION)."""
    losses = {index: loss_of(log.device, log.superblock) for index, log in logs.items()}
    gsn = next_gsn_after([log.superblock for log in logs.values()], ENTRY_BYTES)
    for index, log in logs.items():
        if losses[index].lost:
            log.stand_at(after_loss(log.superblock, gsn))
    return losses


def _absent_device(ldsu: LdsuConfig, size: int) -> AbsentDevice:
    return AbsentDevice(ldsu.data_device, f"data device of {ldsu.name}", size)


def close_units(units: Sequence[OpenUnit]) -> None:
    """Close what :func:`open_units` opened."""
    for unit in units:
        unit.device.close()
        unit.writelog.close()


def _check_unit(
    superblock: Superblock, config: GroupConfig, ldsu: LdsuConfig, device: IBlockDevice
) -> None:
    check_binding(superblock, config, "writelog", ldsu.log_device)
    bound = superblock.units[0]
    if (bound.index, bound.name) != (ldsu.index, ldsu.name):
        raise MismatchError(
            f"{ldsu.log_device} is the writelog of {bound.name} (LDSU {bound.index} of its "
            f"group), not of {ldsu.name}",
            hint=f"restore the LDSUs' names and order in {config.path}; or, if that is meant, run "
            f"qdswlinit -g {config.number} --yes, then qdsrefresh --full",
        )
    if device.size != bound.size:
        raise MismatchError(
            f"data device {ldsu.data_device} has {device.size} bytes; {ldsu.name} was initialised "
            f"with {bound.size}",
            hint=f"restore the device, or run qdswlinit -g {config.number} --yes and refresh",
        )


def _scan(ldsu: LdsuConfig, device: IBlockDevice, writelog: Writelog) -> OpenUnit:
    superblock = writelog.superblock
    reader = writelog.reader(superblock.applied)
    ranges: list[GsnRange] = []
    durable = superblock.durable_gsn
    for found in reader:
        header = found.header
        ranges.append(GsnRange(header.gsn_first, header.gsn_count))
        if header.kind != VOID:
            # A crash may have come before the other ranges of its recovery were recorded.
            durable = max(durable, header.durable_gsn)
    try:
        ahead = look_ahead(writelog, reader)
    except CorruptError as error:
        raise CorruptError(
            f"writelog of {ldsu.name}: {error.message}",
            hint="the log's device lost or changed data; see qdswlscan(1)",
        ) from error
    durable = max(durable, ahead.durable_gsn)
    used = reader.position - superblock.tail.position
    finding = Finding(
        ldsu=ldsu.index,
        name=ldsu.name,
        applied=superblock.applied,
        expected=max(superblock.head.position, ahead.durable_end),
        reached=reader.cursor,
        durable_gsn=durable,
        ranges=ranges,
        room=(writelog.ring.size - used) // writelog.ring.align,
        stopped=reader.stopped,
    )
    return OpenUnit(ldsu, device, writelog, finding, durable)


def _unscanned(ldsu: LdsuConfig, device: IBlockDevice, writelog: Writelog) -> OpenUnit:
    """Give the LDSU of a writelog that is not there."""
    start = writelog.superblock.applied
    finding = Finding(ldsu.index, ldsu.name, start, start.position, start, 0, (), 0)
    return OpenUnit(ldsu, device, writelog, finding, 0)


def judge(units: Sequence[OpenUnit]) -> Recovery:
    """Decide what the scans mean for the group.

    Where a writelog is untrusted, nothing is framed any more: then no void ranges are recorded,
    and what that log has lost, others' frames may follow.

    :raises CorruptError: durable data is missing.
    """
    if not any(unit.is_unread for unit in units):
        plan = decide([unit.finding for unit in units])
        return plan if not any(unit.untrusted for unit in units) else Recovery(plan.next_gsn, ())
    needed = [unit.finding for unit in units if not unit.is_unread]
    return abandon(needed, min(unit.untrusted.upto for unit in units if unit.untrusted))


def replay(unit: OpenUnit) -> int:
    """Write to the data device what may not have reached it, and sync it.

    Everything found is durable in the writelog by now (rules.md 3), so NO-HIDDEN holds; writing it
    twice changes nothing, so a crash in here does no harm.

    Nothing is replayed onto a dead device (rules.md 16), nor from a log that is not needed.

    :returns: frames replayed.
    :raises CorruptError: the log reads differently than a moment ago.
    :raises DataDeviceError: the data device failed.
    """
    if unit.dead is not None:
        return 0
    if unit.is_unread:
        return 0
    if isinstance(unit.writelog.device, MemoryLogDevice):
        return _replay_newest(unit)
    count = 0
    reader = unit.writelog.reader(unit.writelog.superblock.applied)
    for found in reader:
        if found.header.kind == ENTRIES:
            with _naming_the_data_device():
                apply_entries(
                    unit.device,
                    (
                        e
                        for e in entries(found.header, found.frame)
                        if e.kind not in _ON_PRIMARY_ALREADY
                    ),
                )
        count += 1
    if reader.position != unit.reached.position:
        raise CorruptError(f"{unit.writelog.device.path}: reads differently than a moment ago")
    with _naming_the_data_device():
        unit.device.fdatasync()
    return count


def _replay_newest(unit: OpenUnit) -> int:
    """Replay a log that a power cut would take, so that the data device alone must hold it all.

    What may have been synced before is not overwritten by anything older, not even for a moment:
    nobody could put it right again.  So of every byte the newest value is written, and of what is
    known to be durable nothing.  The rest is no more than may be unapplied.
    """
    count = 0
    found: list[Entry] = []
    reader = unit.writelog.reader(unit.writelog.superblock.applied)
    for frame in reader:
        if frame.header.gsn_last <= unit.durable_gsn:
            continue
        count += 1
        if frame.header.kind == ENTRIES:
            each = entries(frame.header, frame.frame)
            found += [e for e in each if e.kind not in _ON_PRIMARY_ALREADY]
    if reader.position != unit.reached.position:
        raise CorruptError(f"{unit.writelog.device.path}: reads differently than a moment ago")
    with _naming_the_data_device():
        apply_entries(unit.device, newest(found))
        unit.device.fdatasync()
    return count


@contextmanager
def _naming_the_data_device() -> Iterator[None]:
    """Tell an error of the data device from one of the writelog."""
    try:
        yield
    except (OSError, DeviceFailedError) as error:
        raise DataDeviceError(error) from error
