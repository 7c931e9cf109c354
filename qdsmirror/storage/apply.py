"""Puts entries on a device in their order, neighbours in one write."""

from __future__ import annotations

from collections.abc import Iterable

from qdsmirror.core.frames import TRIM, Buffer, Entry
from qdsmirror.interfaces import IBlockDevice


def apply_entries(device: IBlockDevice, entries: Iterable[Entry]) -> None:
    """Apply entries; runs of writes that follow each other on the device are written as one.

    :raises OSError: the device refused one; what came before it is written.
    """
    run: list[Buffer] = []
    start = end = 0
    for offset, length, kind, payload in entries:
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
