"""The system calls on devices that Python's ``os`` lacks; numbers as in linux/fs.h and loop.h."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from functools import cache
from typing import Any

BLKFLSBUF = 0x1261
BLKSSZGET = 0x1268
BLKPBSZGET = 0x127B
LOOP_GET_STATUS64 = 0x4C05

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

LOOP_MAJOR = 7
_INT = struct.Struct("i")
#: struct loop_info64: lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit, and the rest.
_LOOP_INFO64 = struct.Struct("=QQQQQ192x")


def logical_block(fd: int) -> int:
    """Give the bytes of a block device's logical sector (BLKSSZGET).

    :raises OSError: it is not a block device.
    """
    return _get_int(fd, BLKSSZGET)


def physical_block(fd: int) -> int:
    """Give the bytes that a block device's hardware writes as one (BLKPBSZGET).

    :raises OSError: it is not a block device.
    """
    return _get_int(fd, BLKPBSZGET)


def flush_buffers(fd: int) -> None:
    """Write and forget a block device's page cache (BLKFLSBUF; needs CAP_SYS_ADMIN).

    :raises OSError: not permitted, or not a block device.
    """
    fcntl.ioctl(fd, BLKFLSBUF, 0)


def loop_backing(fd: int) -> tuple[int, int] | None:
    """Give (st_dev, st_ino) of the file that is wholly behind a loop device, else ``None``.

    A loop device over a part of a file (an offset or a size limit) is not the file.
    """
    if os.major(os.fstat(fd).st_rdev) != LOOP_MAJOR:
        return None
    info = bytearray(_LOOP_INFO64.size)
    try:
        fcntl.ioctl(fd, LOOP_GET_STATUS64, info, True)
    except OSError:
        return None
    device, inode, _, offset, limit = _LOOP_INFO64.unpack(info)
    return None if offset or limit else (device, inode)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Change how a range is allocated, see :manpage:`fallocate(2)`.

    :param mode: ``FALLOC_FL_*`` or-ed together.
    :param offset: bytes.
    :param length: bytes.
    :raises OSError: EOPNOTSUPP where the file system or device cannot; else what went wrong.
    """
    call = _libc_fallocate()
    if call is None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    while call(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


@cache
def _libc_fallocate() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    # On 32-bit machines plain fallocate takes 32-bit offsets.
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        call.restype = ctypes.c_int
    return call


def _get_int(fd: int, request: int) -> int:
    (value,) = _INT.unpack(fcntl.ioctl(fd, request, bytes(_INT.size)))
    assert isinstance(value, int)
    return value
