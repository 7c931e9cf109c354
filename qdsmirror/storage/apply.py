"""Puts entries on a device in their order, neighbours in one write."""

from __future__ import annotations

from collections.abc import Iterable

from qdsmirror.core.frames import TRIM, ZERO_WRITE, Buffer, Entry
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.limits import FRAME_PAYLOAD_BYTES_MAX

_ZEROES = memoryview(bytes(FRAME_PAYLOAD_BYTES_MAX))


def apply_entries(device: IBlockDevice, entries: Iterable[Entry]) -> None:
    """Apply entries; runs of writes that follow each other on the device are written as one.

    :raises OSError: the device refused one; what came before it is written.
    """
    run: list[Buffer] = []
    start = end = 0
    for offset, length, kind, payload in entries:
        if kind == ZERO_WRITE and length <= len(_ZEROES):
            payload = _ZEROES[:length]
        if payload is not None:
            if run and offset == end:
                run.append(payload)
                end += length
                continue
            if run:
                device.pwritev(run, start)
            run = [payload]
            start, end = offset, offset + length
            continue
        if run:
            device.pwritev(run, start)
            run = []
        device.zero(offset, length, kind == TRIM)
    if run:
        device.pwritev(run, start)
