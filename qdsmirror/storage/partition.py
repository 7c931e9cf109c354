"""One device that several writelogs of a group share by partition.

The patent allows it and discourages it: every commit of one LDSU waits for what the others write.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

from zope.interface import implementer

from qdsmirror.config import LdsuConfig
from qdsmirror.core.recent import Recent
from qdsmirror.errors import DeviceError
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.limits import RECORD_ALIGN_BYTES


@implementer(IBlockDevice)
class Partition:
    """A part of a device, as a device of its own; the last one that is closed closes it.

    :ivar offset: byte offset of the part on the device.
    """

    def __init__(self, whole: _Whole, offset: int, size: int, role: str) -> None:
        self._whole: _Whole | None = whole
        device = whole.device
        self._device = device
        self.offset = offset
        self.size = size
        self.path = device.path
        self.role = role
        self.stable = f"{device.stable} from {offset}" if device.stable else ""
        self.recent = Recent()
        self.logical_block = device.logical_block
        self.physical_block = device.physical_block

    @property
    def failed(self) -> str | None:
        """See :class:`IBlockDevice`."""
        return self._device.failed

    def __repr__(self) -> str:
        return f"<Partition {self.offset}+{self.size} of {self._device!r}>"

    def _at(self, offset: int, length: int, code: int = errno.ENOSPC) -> int:
        if offset < 0 or offset + length > self.size:
            raise OSError(code, f"range {offset}+{length} exceeds the partition", self.path)
        return self.offset + offset

    def pread(self, length: int, offset: int) -> bytes:
        """See :class:`IBlockDevice`."""
        return self._device.pread(length, self._at(offset, length, errno.EIO))

    def pread_nowait(self, length: int, offset: int) -> bytes | None:
        """See :class:`IBlockDevice`."""
        return self._device.pread_nowait(length, self._at(offset, length, errno.EIO))

    def pwritev(self, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        """See :class:`IBlockDevice`."""
        length = sum(map(len, buffers))
        self._device.pwritev(buffers, self._at(offset, length))
        self.recent.note((offset, length))

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        """See :class:`IBlockDevice`."""
        self._device.zero(self._at(offset, length), length, unmap)
        self.recent.note((offset, length))

    def fdatasync(self) -> None:
        """See :class:`IBlockDevice`; it syncs the whole device."""
        self._device.fdatasync()

    def drop_cache(self, offset: int = 0, length: int = 0) -> None:
        """See :class:`IBlockDevice`."""
        self._device.drop_cache(self._at(offset, length) if length else 0, length)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """See :class:`IBlockDevice`."""
        return self._device.extents(self._at(offset, length), length)

    def hole(self, offset: int, length: int) -> int:
        """See :class:`IBlockDevice`."""
        return self._device.hole(self._at(offset, length), length)

    def open_shared(self) -> int:
        """See :class:`IBlockDevice`; of the whole device: byte 0 is at ``offset`` there."""
        return self._device.open_shared()

    def close(self) -> None:
        """See :class:`IBlockDevice`."""
        whole, self._whole = self._whole, None
        if whole is not None:
            whole.leave()


class _Whole:
    """A device, open while one of its partitions is."""

    def __init__(self, device: IBlockDevice) -> None:
        self.device = device
        self._open = 0

    def part(self, number: int, parts: int, role: str) -> Partition:
        """Give one of so many equal parts.

        :raises DeviceError: the device is too small for so many.
        """
        device = self.device
        unit = max(RECORD_ALIGN_BYTES, device.physical_block)
        size = device.size // parts // unit * unit
        if not size:
            raise DeviceError(
                f"{device.path} of {device.size} bytes is too small for {parts} writelogs",
                hint="give a larger device",
            )
        return self.at(number * size, size, role)

    def at(self, offset: int, size: int, role: str) -> Partition:
        """Give a part by its place."""
        self._open += 1
        return Partition(self, offset, size, role)

    def leave(self) -> None:
        """Learn that a partition was closed."""
        self._open -= 1
        if not self._open:
            self.device.close()


def part_of(device: IBlockDevice, offset: int, size: int, role: str) -> Partition:
    """Give a part of an open device, which is closed with it.

    :param offset: in bytes, and ``size`` in bytes.
    :raises DeviceError: it reaches beyond the device.
    """
    if offset + size > device.size:
        raise DeviceError(f"{role}: {device.path} has {device.size} bytes, not {offset + size}")
    return _Whole(device).at(offset, size, role)


def divide(device: IBlockDevice, roles: Sequence[str]) -> list[Partition]:
    """Divide an open device equally, for these uses; it is closed with the last of its partitions.

    :raises DeviceError: it is too small for so many.
    """
    whole = _Whole(device)
    return [whole.part(number, len(roles), role) for number, role in enumerate(roles)]


class LogDevices:
    """Opens a group's writelog devices, each once; LDSUs that name the same one share it equally.

    :param ldsus: all of the group, in the order of its file.
    """

    def __init__(
        self, ldsus: Sequence[LdsuConfig], open_device: Callable[..., IBlockDevice]
    ) -> None:
        self._open_device = open_device
        self._users: dict[str, list[int]] = {}
        for ldsu in ldsus:
            self._users.setdefault(ldsu.log_device, []).append(ldsu.index)
        self._wholes: dict[str, _Whole] = {}

    def open(self, ldsu: LdsuConfig, role: str) -> IBlockDevice:
        """Open and lock an LDSU's writelog device, or give its part of one.

        :raises DeviceError: the device is missing, in use, or too small for so many.
        """
        path = ldsu.log_device
        users = self._users[path]
        whole = self._wholes.get(path)
        if whole is None:
            device = self._open_device(path, writable=True, role=role)
            if len(users) == 1:
                return device
            whole = self._wholes[path] = _Whole(device)
        return whole.part(users.index(ldsu.index), len(users), role)
