"""Binds a group's devices to its logs by identity and by what they held at the stop (rules.md 24).

Everything here blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from qdsmirror.config import GroupConfig
from qdsmirror.core.records import BoundUnit
from qdsmirror.errors import MismatchError
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.storage.fingerprint import changed_ranges, chunks_for, fingerprint, ranges_text
from qdsmirror.storage.identity import is_same
from qdsmirror.storage.logreader import Ahead, LogReader
from qdsmirror.storage.writelog import Writelog


class Bound(NamedTuple):
    """A data or mirror device, and the log that knows it.

    :ivar ldsu: its index.
    """

    log: Writelog
    ldsu: int
    device: IBlockDevice

    @property
    def unit(self) -> BoundUnit:
        """What the log knows of it."""
        return next(unit for unit in self.log.superblock.units if unit.index == self.ldsu)

    @property
    def fingerprint(self) -> Any:
        """What it held at the last orderly stop, ``None`` if that was not the last end."""
        return (self.log.superblock.fingerprints or {}).get(str(self.ldsu))


def take_over(
    bound: Sequence[Bound], config: GroupConfig, incoherent: Callable[[str], None]
) -> list[str]:
    """Check the devices of a group before anything is written to them, and begin to write.

    On return no fingerprints are left, durably: they hold for what an orderly stop left.

    :param incoherent: is to record durably, with this reason, that somebody else has written to
        them.  The fingerprints still stand, so that a crash in between loses nothing.
    :returns: what an operator should know.
    :raises MismatchError: another device stands under a path.
    """
    told = []
    found = []
    for one in bound:
        known = one.fingerprint
        ranges = changed_ranges(one.device, known) if known is not None else []
        if ranges:
            found.append(f"{_name(one)} ({ranges_text(ranges)})")
        unit, stable = one.unit, one.device.stable
        if unit.identity and stable and not is_same(unit.identity, stable):
            _check_replaced(one, bound, config, known is not None and not ranges)
            told.append(
                f"{_name(one)} is {stable}, it was {unit.identity}; it holds what that held, so "
                "it is taken for it"
            )
    if found:
        reason = f"changed while its daemon was stopped: {'; '.join(found)}"
        incoherent(reason)
        told.append(f"{reason}; make a new mirror: qdsrefresh -g {config.number} --full")
    for log, own in _by_log(bound):
        _begin(log, own)
    return told


def _by_log(bound: Sequence[Bound]) -> list[tuple[Writelog, list[Bound]]]:
    logs = {id(one.log): one.log for one in bound}.values()
    return [(log, [one for one in bound if one.log is log]) for log in logs]


def _check_replaced(
    one: Bound, bound: Sequence[Bound], config: GroupConfig, unchanged: bool
) -> None:
    """Refuse another device, unless it holds what the right one held and is not another LDSU's."""
    stable = one.device.stable
    others = [o.unit for o in bound if o is not one and is_same(o.unit.identity, stable)]
    if unchanged and not others:
        return
    whose = f", the one of {others[0].name}" if others else ""
    raise MismatchError(
        f"{_name(one)} is another device ({stable}{whose}) than {one.unit.name} was bound to "
        f"({one.unit.identity}, then {one.unit.device})",
        hint=f"name the right device in {config.path}; or, if this one is to take its place, run "
        f"qdswlinit -g {config.number} --yes, then qdsrefresh -g {config.number} --full",
    )


def _name(one: Bound) -> str:
    return f"{one.device.role} {one.device.path}"


def _begin(log: Writelog, bound: Sequence[Bound]) -> None:
    """Remove the fingerprints, and record the identities, where that changes anything."""
    stable = {one.ldsu: one.device.stable for one in bound}
    units = tuple(
        replace(unit, identity=stable.get(unit.index) or unit.identity)
        for unit in log.superblock.units
    )
    if log.superblock.fingerprints is not None or units != log.superblock.units:
        log.update(both=True, fingerprints=None, units=units)


def seal(bound: Sequence[Bound]) -> None:
    """Record what the devices hold: everything is applied, and nothing more is written.

    A log with records that are not applied is left without: its replay will write.

    :raises OSError: a device cannot be read or synced, or a log not written.
    """
    for log, own in _by_log(bound):
        superblock = log.superblock
        chunks = chunks_for(superblock)
        if chunks is None or superblock.applied.position != log.head:
            continue
        made = {}
        for one in own:
            one.device.fdatasync()
            made[str(one.ldsu)] = fingerprint(one.device, chunks)
        log.update(both=True, fingerprints=made)


def look_ahead(log: Writelog, reader: LogReader) -> Ahead:
    """Look behind the place where a log's history stops, unless an orderly stop left it there.

    The next start removes the fingerprints from both slots before anything is written to the log:
    where they still stand, nothing was, and so nothing of it can have been lost.

    :raises CorruptError: see :meth:`~qdsmirror.storage.logreader.LogReader.look_ahead`.
    """
    superblock = log.superblock
    if superblock.fingerprints is not None and reader.position == superblock.head.position:
        return Ahead()
    return reader.look_ahead()
