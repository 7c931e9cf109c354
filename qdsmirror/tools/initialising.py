"""What ``qdswlinit`` does: initialise writelogs, secondary journals and extension pools.

The storage room comes in with this module, so the command imports it when its arguments are good.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from qdsmirror.config import GroupConfig, LdsuConfig
from qdsmirror.core.failures import Dead
from qdsmirror.core.records import BoundUnit, Generation
from qdsmirror.errors import BrokenError, CorruptError, DeviceError
from qdsmirror.limits import FRAME_BYTES_MAX, WRITELOG_BYTES_MIN, WRITELOG_BYTES_WARN
from qdsmirror.paths import Paths
from qdsmirror.pidfile import running_pid
from qdsmirror.storage.device import open_device
from qdsmirror.storage.extension import PoolDevice, check_extension, read_extension
from qdsmirror.storage.filedevice import FileDevice
from qdsmirror.storage.identity import Identity, identify
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.loglayout import before_bytes_for, layout_of, ring_bytes_for
from qdsmirror.storage.memory import absent_memory
from qdsmirror.storage.memorylog import MemoryLogDevice
from qdsmirror.storage.partition import Partition, divide
from qdsmirror.storage.probe import OWN_NAME, probe_signature
from qdsmirror.storage.writelog import Writelog
from qdsmirror.tools import cli
from qdsmirror.tools.client import ControlClient
from qdsmirror.tools.wlinit_replaced import still_lacking


@dataclass
class _Log:
    """A log to be made: on which device, for which LDSUs.

    :ivar whole: what ``device`` is, or a part of.
    :ivar before_bytes: of a journal: what the before-images get of it.
    :ivar backfresh: what its LDSU's data device lacks, as before.
    """

    group: GroupConfig
    role: str
    whole: FileDevice
    device: FileDevice | Partition | MemoryLogDevice
    units: list[BoundUnit] = field(default_factory=list)
    before_bytes: int = 0
    backfresh: dict[str, Any] | None = None

    @property
    def memory_bytes(self) -> int:
        """What of it is in memory; 0 where all is on its device."""
        device = self.device
        return device.memory.size if isinstance(device, MemoryLogDevice) else 0

    def describe(self) -> dict[str, Any]:
        """Give what is told of it."""
        memory, before = self.memory_bytes, self.before_bytes
        return {
            "group": self.group.name,
            "role": self.role,
            "device": self.device.path,
            "size": self.device.size,
            **({"memory_bytes": memory} if memory else {}),
            **({"before_image_bytes": before} if self.role == "journal" else {}),
        }

    def check_size(self) -> None:
        """Refuse a device that is too small for its superblocks and the least ring.

        Of a journal's, find what the before-images can have.

        A journal's ring must take any frame that a primary may send.

        :raises DeviceError: it is.
        """
        device = self.device
        try:
            _, ring, _ = layout_of(device, self.role, self.units)
            if self.role == "journal":
                wanted = self.group.tunables.before_image_bytes
                self.before_bytes = before_bytes_for(device, self.units, wanted)
        except DeviceError as error:
            raise DeviceError(
                f"{device.role} {device.path}: {error.message}", hint=error.hint
            ) from error
        if device.size < WRITELOG_BYTES_MIN and not isinstance(device, MemoryLogDevice):
            raise DeviceError(
                f"{device.role} has {device.size} bytes of {device.path}; a log needs "
                f"{WRITELOG_BYTES_MIN} at least",
                hint="give a larger device",
            )
        needed = ring.start + ring_bytes_for(FRAME_BYTES_MAX, ring.align)
        if self.role == "journal" and device.size < needed:
            raise DeviceError(
                f"{device.role} {device.path} has {device.size} bytes; the primary's frames "
                f"(of up to {FRAME_BYTES_MAX} bytes) need {needed}",
                hint="give a larger device",
            )


@dataclass
class _Spare:
    """A device that is to be in a group's extension pool."""

    group: GroupConfig
    device: FileDevice

    def describe(self) -> dict[str, Any]:
        """Give what is told of it."""
        name, device = self.group.name, self.device
        return {"group": name, "role": "extension", "device": device.path, "size": device.size}


class _Devices:
    """Opens the devices of this run, each for one use alone.

    :param opened: closes them.
    :param consent: whether what they hold may be lost.
    :ivar lost: what that is: role, path, and what it holds.
    """

    def __init__(self, opened: ExitStack, consent: bool) -> None:
        self.lost: list[tuple[str, str, str]] = []
        self._opened = opened
        self._consent = consent
        self._uses: dict[Identity, str] = {}

    def open(self, path: str, role: str, minimum_bytes: int = 1) -> FileDevice:
        """Open and lock a device.

        :raises DeviceError: it is missing, in use, too small, or here for something else already.
        """
        try:
            use = self._uses.get(identify(path))
        except OSError:
            use = None  # open_device says what is wrong
        if use is not None:
            raise DeviceError(
                f"{role} {path} is the same device as the {use}",
                hint="name different devices in the group files",
            )
        device = open_device(path, writable=True, role=role, minimum_bytes=minimum_bytes)
        self._opened.callback(device.close)
        self._uses[device.identity] = f"{role} {path}"
        return device

    def check_unused(self, device: FileDevice, role: str) -> None:
        """Look whether a device holds something.

        :raises DeviceError: it does, and that may not be lost.
        """
        found = probe_signature(device)
        if found is None:
            return
        what = (
            "a writelog or journal of qdsmirror, or an extension"
            if found == OWN_NAME
            else f"something: {found}"
        )
        if not self._consent:
            raise DeviceError(
                f"{role} {device.path} already holds {what}",
                hint="if it may be overwritten, say so with --yes; --dry-run tells all",
            )
        self.lost.append((role, device.path, what.removeprefix("something: ")))


@dataclass
class Prepared:
    """What is to be initialised: all is open, and checked; nothing is written yet.

    :ivar lost: what the devices hold: role, path, what it is.
    """

    logs: list[_Log]
    pool: list[_Spare]
    lost: list[tuple[str, str, str]]

    @property
    def described(self) -> list[dict[str, Any]]:
        """What ``qdswlinit --json`` tells of each."""
        logs = [one.describe() for one in self.logs]
        return logs + [one.describe() for one in self.pool]

    def carry_out(self, paths: Paths) -> list[dict[str, Any]]:
        """Initialise, and forget what is known of failed devices.

        :returns: as :attr:`described`.
        """
        _initialise(self.logs)
        _initialise_pool(self.pool)
        for number, role in {(log.group.number, log.role) for log in self.logs}:
            _forget_failures(paths, number, "qdsdriver" if role == "writelog" else "qdsrmd")
        return self.described


def prepare(
    paths: Paths,
    host: str,
    groups: Sequence[GroupConfig],
    opened: ExitStack,
    consent: bool,
    *,
    only_pool: bool = False,
) -> Prepared:
    """Open and check what makes the writelogs, journals and extension pools of groups.

    :param host: this host's name.
    :param opened: closes the devices.
    :param consent: whether what they hold may be lost.
    :param only_pool: what is new in the pools, alone.
    :raises DeviceError: of any of them; nothing was written.
    :raises QdsError: a group's daemon runs.
    """
    devices = _Devices(opened, consent)
    logs: list[_Log] = []
    pool: list[_Spare] = []
    for group in groups:
        if only_pool:
            pool += _pool(group, devices, only_new=True)
            continue
        if host == group.primary_host:
            cli.refuse_beside_daemon(paths, group, "driver")
            pool += _pool(group, devices)
            logs += _writelogs(group, devices, _dead(paths, group))
        if host == group.secondary_host:
            cli.refuse_beside_daemon(paths, group, "rmd")
            logs.append(_journal(group, devices))
    for log in logs:
        log.check_size()
    return Prepared(logs, pool, devices.lost)


def _forget_failures(paths: Paths, number: int, daemon: str) -> None:
    """Clear what a group's master, if it runs, and its state file say of failed devices.

    :raises QdsError: one of them cannot be cleared.
    """
    if running_pid(paths.pid_file(daemon)) is not None:
        ControlClient(paths.control_socket(daemon)).call("ForgetFailures", group=str(number))
    FailureLatch(paths.state_file(number)).clear()


def _initialise(logs: Sequence[_Log]) -> None:
    for whole in {log.whole.path: log.whole for log in logs}.values():
        # A log that runs out of space under load would fail its LDSU.
        with cli.naming(f"{whole.role} {whole.path}: cannot allocate its {whole.size} bytes"):
            whole.preallocate()
    generations: dict[tuple[int, str], bytes] = {}
    for log in logs:
        generation = generations.setdefault((log.group.number, log.role), os.urandom(16))
        with cli.naming(f"{log.device.role} {log.device.path}"):
            Writelog.initialise(
                log.device,
                role=log.role,
                group=log.group.number,
                units=log.units,
                # A journal is blank until a primary begins its history.
                generations=[Generation(generation, 1)] if log.role == "writelog" else [],
                before_bytes=log.before_bytes,
                backfresh=log.backfresh,
            )


def _role(ldsu: LdsuConfig) -> str:
    return f"{'bitmap device' if ldsu.memory_bytes else 'writelog'} of {ldsu.name}"


def _dead(paths: Paths, group: GroupConfig) -> Mapping[int, Dead]:
    """Give the data devices of a group that have failed, as far as that can be known."""
    try:
        return FailureLatch(paths.state_file(group.number)).group().dead
    except BrokenError:
        return {}


def _writelogs(group: GroupConfig, devices: _Devices, dead: Mapping[int, Dead]) -> list[_Log]:
    """Open and check what makes a group's writelogs.

    :param dead: its data devices that have failed.
    """
    logs = []
    users: dict[str, list[str]] = {}
    for ldsu in group.ldsus:
        users.setdefault(ldsu.log_device, []).append(_role(ldsu))
    parts: dict[str, Iterator[FileDevice | Partition]] = {}
    wholes: dict[str, FileDevice] = {}
    for ldsu in group.ldsus:
        data = devices.open(ldsu.data_device, f"data device of {ldsu.name}")
        if probe_signature(data) == OWN_NAME:
            raise DeviceError(
                f"data device {data.path} of {ldsu.name} holds a writelog or journal",
                hint=f"name the right device in {group.path}",
            )
        path = ldsu.log_device
        if path not in parts:
            least = 1 if ldsu.memory_bytes else WRITELOG_BYTES_MIN
            whole = devices.open(path, _role(ldsu), least)
            devices.check_unused(whole, _role(ldsu))
            wholes[path] = whole
            parts[path] = iter(divide(whole, users[path]) if len(users[path]) > 1 else [whole])
        log: FileDevice | Partition | MemoryLogDevice = next(parts[path])
        if ldsu.memory_bytes:
            log = MemoryLogDevice(log, absent_memory(ldsu))
        size, name = log.size, log.path
        if isinstance(log, MemoryLogDevice):
            size, name = log.memory.size, f"{ldsu.writelog_device} of {ldsu.name}"
        if size < WRITELOG_BYTES_WARN:
            print(
                f"warning: writelog {name} has only {size} bytes; {WRITELOG_BYTES_WARN} "
                "or more are advised",
                file=sys.stderr,
            )
        unit = BoundUnit(ldsu.index, ldsu.name, data.size, ldsu.data_device, data.stable)
        lacking = still_lacking(log, dead.get(ldsu.index))
        logs.append(_Log(group, "writelog", wholes[path], log, [unit], backfresh=lacking))
    return logs


def _pool(group: GroupConfig, devices: _Devices, *, only_new: bool = False) -> list[_Spare]:
    """Open and check the devices of a group's extension pool.

    :param only_new: leave alone those that are in it already: a writelog may have them.
    """
    found = []
    for path in group.pool:
        if only_new and _is_in_pool(path, group.number):
            continue
        role = f"extension of {group.name}"
        device = devices.open(path, role)
        devices.check_unused(device, role)
        try:
            check_extension(device)
        except DeviceError as error:
            raise DeviceError(f"{role} {path}: {error.message}", hint=error.hint) from error
        found.append(_Spare(group, device))
    return found


def _is_in_pool(path: str, number: int) -> bool:
    """Look whether a device, which a driver may hold, is in a group's pool."""
    try:
        device = FileDevice(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), path)
    except OSError:
        return False  # open_device says what is wrong
    try:
        return read_extension(device).group == number
    except (OSError, CorruptError):
        return False
    finally:
        device.close()


def _initialise_pool(pool: Sequence[_Spare]) -> None:
    for group, device in ((one.group, one.device) for one in pool):
        with cli.naming(f"{device.role} {device.path}: cannot allocate its {device.size} bytes"):
            device.preallocate()
        with cli.naming(f"{device.role} {device.path}"):
            PoolDevice.initialise(device, group.number)


def _journal(group: GroupConfig, devices: _Devices) -> _Log:
    units = []
    for ldsu in group.ldsus:
        mirror = devices.open(ldsu.mirror_device, f"mirror device of {ldsu.name}")
        devices.check_unused(mirror, f"mirror device of {ldsu.name}")
        units.append(
            BoundUnit(ldsu.index, ldsu.name, mirror.size, ldsu.mirror_device, mirror.stable)
        )
    journal = devices.open(group.journal_device, f"journal of {group.name}", WRITELOG_BYTES_MIN)
    devices.check_unused(journal, f"journal of {group.name}")
    return _Log(group, "journal", journal, journal, units)
