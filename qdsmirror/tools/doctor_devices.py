"""What ``qdsdoctor`` finds of the devices of this host's groups: it reads, and changes nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from qdsmirror.config import POOL_KEY, GroupConfig
from qdsmirror.core.findings import Finding, advice, error, warning
from qdsmirror.errors import EXIT_BROKEN, DeviceError, QdsError
from qdsmirror.limits import WRITELOG_BYTES_MIN, WRITELOG_BYTES_WARN
from qdsmirror.paths import Paths
from qdsmirror.storage.device import FileDevice, open_shared
from qdsmirror.storage.identity import Identity
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.probe import OWN_NAME, probe_signature
from qdsmirror.tools.doctor_disks import FOREIGN_FILE_SYSTEMS, MEMORY_FILE_SYSTEMS, Disks, Mount

#: Keys whose devices hold what qdswlinit has made.
_LOGS = ("writelog_device", "bitmap_device", "journal_device", POOL_KEY[-1])
_TITLES = {
    "data_device": "data device",
    "writelog_device": "writelog",
    "bitmap_device": "bitmap",
    "mirror_device": "mirror device",
    "journal_device": "journal",
    POOL_KEY[-1]: "extension pool",
}


@dataclass(frozen=True)
class Device:
    """One device of a group on this host.

    :ivar title: what it is for; ``ldsu``: whose, or "".
    :ivar size: in bytes; ``allocated``: what a file's blocks take on its disk.
    """

    group: GroupConfig
    key: tuple[str, ...]
    path: str
    size: int = 0
    allocated: int = 0
    is_block: bool = False
    identity: Identity | None = None
    signature: str | None = None
    trouble: DeviceError | None = None

    @property
    def title(self) -> str:
        """What it is, for people."""
        title = _TITLES[self.key[-1]]
        return f"{title} of {self.ldsu}" if self.ldsu else f"{title} of {self.group.name}"

    @property
    def ldsu(self) -> str:
        """Whose it is; "" for the group's."""
        return self.key[1] if self.key[0] == "ldsus" else ""

    @property
    def is_log(self) -> bool:
        """Whether qdswlinit makes what it holds."""
        return self.key[-1] in _LOGS


def look(groups: list[GroupConfig], host: str) -> list[Device]:
    """Look at every device that groups have on a host.

    :param host: its name.
    """
    return [
        _look(group, key, path)
        for group in groups
        for key, owner, path in group.devices()
        if owner == host
    ]


def _look(group: GroupConfig, key: tuple[str, ...], path: str) -> Device:
    try:
        fd = open_shared(path, _TITLES[key[-1]])
    except DeviceError as trouble:
        return Device(group, key, path, trouble=trouble)
    try:
        status = os.fstat(fd)
        device = FileDevice(fd, path)
        return Device(
            group,
            key,
            path,
            size=device.size,
            allocated=status.st_blocks * 512,
            is_block=stat.S_ISBLK(status.st_mode),
            identity=device.identity,
            signature=probe_signature(device),
        )
    except OSError as problem:
        reason = f"{_TITLES[key[-1]]} {path} cannot be read: {problem.strerror or problem}"
        return Device(group, key, path, trouble=DeviceError(reason, "see the kernel's log: dmesg"))
    finally:
        os.close(fd)


def examine(paths: Paths, devices: list[Device], disks: Disks) -> Iterator[Finding]:
    """Find what is wrong with devices.

    :param devices: of :func:`look`.
    """
    root = " ".join(["", *paths.arguments()])
    for device in devices:
        if device.trouble is not None:
            told = f"{device.group.name}: {device.trouble.message}"
            if device.ldsu:
                told += f" ({device.ldsu})"
            yield error("devices", told, device.trouble.hint, device.group.number)
            continue
        if device.is_log:
            yield from _log(device, root)
        yield from _sparse(device)
    good = [one for one in devices if one.trouble is None]
    yield from _durability(good, disks)
    yield from _unflushed(good, disks)
    yield from _same(devices)
    yield from _shared_disks(devices, disks)
    for group in dict.fromkeys(device.group for device in devices):
        yield from _latched(paths, group, root)


def _log(device: Device, root: str) -> Iterator[Finding]:
    """Tell of a log that is too small, or that nobody has initialised."""
    number, init = device.group.number, f"qdswlinit{root} -g {device.group.number}"
    where = f"{device.title} {device.path}"
    if device.key == POOL_KEY:
        init += " --pool"
    if device.signature is None:
        told = f"{where} is not initialised"
        yield error("devices", told, init, number)
    elif device.signature != OWN_NAME:
        told = f"{where} holds {device.signature}, nothing of qdsmirror's"
        yield error(
            "devices", told,
            f"is the path in {device.group.path} right? See qdsdevinfo {device.path}; if what it "
            f"holds may be lost: {init} --yes",
            number, EXIT_BROKEN,
        )  # fmt: skip
    if device.key[-1] != "writelog_device":
        return
    if device.size < WRITELOG_BYTES_MIN:
        told = f"{where} has {device.size} bytes, {WRITELOG_BYTES_MIN} are needed"
        yield error("sizes", told, f"give it a larger device, then: {init} --yes", number)
    elif device.size < WRITELOG_BYTES_WARN:
        told = f"{where} has only {device.size} bytes; a short burst of writes fills it"
        step = f"give it {WRITELOG_BYTES_WARN} bytes or many more, then: {init} --yes"
        yield warning("sizes", told, step, number)


def _durability(devices: list[Device], disks: Disks) -> Iterator[Finding]:
    """Tell of file systems that keep an fdatasync from making anything durable; each once."""
    by_mount: dict[Mount, list[Device]] = {}
    for device in devices:
        try:
            mount = disks.mount_of(device.path)
        except OSError:
            continue
        if mount is not None:
            by_mount.setdefault(mount, []).append(device)
    for mount, here in by_mount.items():
        first, number = here[0], here[0].group.number
        where = f"{first.title} {first.path}"
        if len(here) > 1:
            where += f", and {len(here) - 1} more"
        if mount.kind in MEMORY_FILE_SYSTEMS:
            told = (
                f"{where}: on {mount.place} files are in memory ({mount.kind}): lost with the power"
            )
            yield warning("devices", told, f"use a disk, in {first.group.path}", number)
        elif not mount.flushes:
            told = f"{where}: the file system on {mount.place} is mounted so that no flush is done"
            step = f"mount -o remount,barrier {mount.place}; correct it in /etc/fstab"
            yield error("devices", told, step, number)
        elif mount.kind in FOREIGN_FILE_SYSTEMS:
            told = f"{where}: on {mount.place} is {mount.kind}: its server decides what a flush is"
            yield warning("devices", told, f"use a local disk, in {first.group.path}", number)


def _unflushed(devices: list[Device], disks: Disks) -> Iterator[Finding]:
    """Tell of block devices that keep flushes from a disk's cache; each once."""
    by_way: dict[tuple[str, str], list[Device]] = {}
    for device in devices:
        try:
            way = disks.unflushed(device.path)
        except OSError:
            continue
        if way is not None:
            by_way.setdefault(way, []).append(device)
    for (upper, disk), here in by_way.items():
        where = f"{here[0].title} {here[0].path}"
        if len(here) > 1:
            where += f", and {len(here) - 1} more"
        told = (
            f"{where}: {upper} is set to get no flushes, but {disk} has a volatile write cache: "
            "unless a battery keeps it, what was synced is lost with the power"
        )
        step = (
            f'echo "write back" > /sys/block/{upper}/queue/write_cache; see udev(7) for each boot'
        )
        yield warning("devices", told, step, here[0].group.number)


def _sparse(device: Device) -> Iterator[Finding]:
    """Tell of files that want more space than their file system has left."""
    lacking = device.size - device.allocated
    if device.is_block or lacking <= 0:
        return
    try:
        file_system = os.statvfs(device.path)
    except OSError:
        return
    free = file_system.f_bavail * file_system.f_frsize
    if lacking > free:
        told = (
            f"{device.title} {device.path} is a sparse file: {lacking} bytes of it are not "
            f"allocated, and its file system has {free} left"
        )
        step = f"make room: df -h {device.path}; then: fallocate -l {device.size} {device.path}"
        yield warning("space", told, step, device.group.number)


def _same(devices: list[Device]) -> Iterator[Finding]:
    """Tell of two paths that lead to one device."""
    seen: dict[Identity, Device] = {}
    for device in devices:
        if device.identity is None:
            continue
        other = seen.setdefault(device.identity, device)
        shares = {other.key[-1], device.key[-1]} <= {"writelog_device", "bitmap_device"}
        if other is device or shares and other.path == device.path:
            continue
        told = f"{device.title} {device.path} is {other.title} {other.path}, by another path"
        step = f"correct one of the two in {device.group.path}; see ls -lL {device.path}"
        yield error("devices", told, step, device.group.number, EXIT_BROKEN)


def _shared_disks(devices: list[Device], disks: Disks) -> Iterator[Finding]:
    """Warn of logs on the disk of what they log: one head for both, and one failure."""
    logs = {
        (device.group.number, device.ldsu): device
        for device in devices
        if device.key[-1] in ("writelog_device", "journal_device")
    }
    pairs = {"data_device": "writelog", "mirror_device": "journal"}
    found: dict[tuple[str, frozenset[str]], list[tuple[Device, Device]]] = {}
    for device in devices:
        kind = pairs.get(device.key[-1], "")
        log = logs.get((device.group.number, device.ldsu if kind == "writelog" else ""))
        if not kind or log is None:
            continue
        try:
            common = disks.below(device.path) & disks.below(log.path)
        except OSError:
            continue
        if common:
            found.setdefault((kind, common), []).append((device, log))
    for (kind, common), here in found.items():
        device, log = here[0]
        more = f", as do {len(here) - 1} more such pairs" if len(here) > 1 else ""
        told = (
            f"{device.title} {device.path} and the {kind} {log.path} share the disk "
            f"{', '.join(sorted(common))}{more}: every write goes there twice, and both are lost "
            "together"
        )
        number = device.group.number
        yield warning("devices", told, f"move the {kind} to another disk; see lsblk", number)


def _latched(paths: Paths, group: GroupConfig, root: str) -> Iterator[Finding]:
    """Tell of devices whose sync has failed: they are refused until an operator acts."""
    try:
        failed = FailureLatch(paths.state_file(group.number)).failures()
    except QdsError as problem:
        yield error("devices", problem.message, problem.hint, group.number, EXIT_BROKEN)
        return
    for path, reason in failed.items():
        told = f"{group.name}: {path} has failed and is not used any more: {reason}"
        step = (
            f"smartctl -a {path}; replace it, then: qdswlinit{root} -g {group.number} --yes, and "
            f"qdsrefresh{root} -g {group.number}"
        )
        yield error("devices", told, step, group.number, EXIT_BROKEN)


def names_by_kernel(devices: list[Device]) -> Iterator[Finding]:
    """Advise against names that the kernel gives anew at each boot."""
    for device in devices:
        name = os.path.basename(device.path)
        if (
            device.path == f"/dev/{name}"
            and name[:2] in ("sd", "vd", "hd")
            or "/dev/nvme" in (device.path[:9])
        ):
            told = f"{device.title} {device.path}: another disk may have this name after a boot"
            step = f"use its name in /dev/disk/by-id, in {device.group.path}; see qdsdevinfo"
            yield advice("devices", told, step, device.group.number)
