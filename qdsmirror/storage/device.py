"""Open a file or block device, alone or shared, or say why not (security.md 7)."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from qdsmirror.errors import DeviceError
from qdsmirror.storage.filedevice import FileDevice
from qdsmirror.storage.identity import users_of

__all__ = ["FileDevice", "open_device", "open_shared"]


def open_device(
    path: str | os.PathLike[str],
    *,
    writable: bool,
    exclusive: bool = True,
    role: str = "data device",
    minimum_bytes: int = 1,
) -> FileDevice:
    """Open a file or block device; symbolic links (``/dev/disk/by-id``) are followed.

    :param exclusive: take it for this descriptor alone: O_EXCL for a block device (which also
        refuses mounted and stacked ones), flock for a file; never waits.  A read-only open may be
        exclusive too.
    :param role: what it is for, for messages: ``data device``, ``writelog`` ...
    :param minimum_bytes: a smaller one is refused.
    :raises DeviceError: missing, no permission, not a file or block device, in use, too small,
        or not a multiple of its own sectors.
    """
    name = os.fspath(path)
    fd = _open(name, role, writable, exclusive)
    try:
        if exclusive and not stat.S_ISBLK(os.fstat(fd).st_mode):
            _lock(fd, name, role)
        device = FileDevice(fd, name, role)
        _check_size(device, minimum_bytes)
    except OSError as error:
        os.close(fd)
        raise _explain(error, name, role) from error
    except DeviceError:
        os.close(fd)
        raise
    return device


def open_shared(path: str | os.PathLike[str], role: str = "data device") -> int:
    """Open read-only with neither lock nor claim, to pass on or to look at (rules.md 10).

    :return: a descriptor that the caller owns; :class:`FileDevice` takes it.
    :raises DeviceError: missing, no permission, or not a file or block device.
    """
    return _open(os.fspath(path), role, writable=False, exclusive=False)


def _open(path: str, role: str, writable: bool, exclusive: bool) -> int:
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise DeviceError(
                f"{role} {path} is {_kind(mode)}, not a file or block device",
                hint=f"see what it is: ls -ld {path}",
            )
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        if exclusive and stat.S_ISBLK(mode):
            flags |= os.O_EXCL
        fd = os.open(path, flags)
    except OSError as error:
        raise _explain(error, path, role) from error
    if stat.S_IFMT(os.fstat(fd).st_mode) != stat.S_IFMT(mode):
        os.close(fd)
        raise DeviceError(f"{role} {path} was replaced while it was opened", hint="try again")
    return fd


def _lock(fd: int, path: str, role: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _in_use(path, role, users_of(fd)) from error


def _check_size(device: FileDevice, minimum_bytes: int) -> None:
    if device.size < minimum_bytes:
        raise DeviceError(
            f"{device.role} {device.path} is too small: {device.size} bytes, "
            f"at least {minimum_bytes} are needed",
            hint=f"see its size: qdsdevinfo {device.path}",
        )
    if device.size % device.logical_block:
        raise DeviceError(
            f"{device.role} {device.path} has {device.size} bytes, "
            f"which is no multiple of its sectors of {device.logical_block} bytes",
            hint=f"make it longer: truncate -s %{device.logical_block} {device.path}",
        )


def _explain(error: OSError, path: str, role: str) -> DeviceError:
    if error.errno == errno.EBUSY:
        return _in_use(path, role, _users_by_path(path))
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return DeviceError(
            f"{role} {path} does not exist", hint=f"correct the path, or create it: ls -l {path}"
        )
    if error.errno in (errno.EPERM, errno.EROFS) and "INVOCATION_ID" in os.environ:
        # What a unit's DevicePolicy and ProtectSystem say (systemd.exec(5)).
        return DeviceError(
            f"{role} {path}: {error.strerror}: the systemd unit does not let it be used",
            hint="qdsconfigtool units --out /etc/systemd/system && systemctl daemon-reload, "
            "then restart the daemon",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return DeviceError(
            f"{role} {path}: no permission for user id {os.geteuid()}",
            hint=f"see its owner and mode: ls -lL {path}",
        )
    if error.errno in (errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM):
        return DeviceError(f"{role} {path}: no device is behind this node", hint="see: lsblk")
    return DeviceError(f"{role} {path}: {error.strerror or error}", hint=f"see: qdsdevinfo {path}")


def _in_use(path: str, role: str, users: list[str]) -> DeviceError:
    who = "; ".join(users)
    return DeviceError(
        f"{role} {path} is in use" + (f": {who}" if who else ""),
        hint=f"see who has it open: fuser -v {path}",
    )


def _users_by_path(path: str) -> list[str]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return users_of(fd)
    finally:
        os.close(fd)


def _kind(mode: int) -> str:
    names = {
        stat.S_IFDIR: "a directory",
        stat.S_IFCHR: "a character device",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    return names.get(stat.S_IFMT(mode), "something else")
