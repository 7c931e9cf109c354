"""What a block status says: the data device's allocation, with unapplied entries laid over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qdsmirror.core.frames import Entry

#: Flags of the metadata context ``base:allocation`` (NBD specification).
HOLE = 1
ZERO = 2


def allocation(
    offset: int,
    length: int,
    found: Iterable[tuple[int, bool]],
    pending: Sequence[Entry],
) -> list[tuple[int, int]]:
    """Merge what the device says is allocated with what is about to be written there.

    :param found: (length, allocated) pairs that cover the range.
    :param pending: unapplied entries that touch it; their blocks count as allocated data.
    :returns: (length, flags) pairs that cover the range, neighbours with equal flags joined.
    """
    end = offset + length
    busy = sorted((max(e.offset, offset), min(e.offset + e.length, end)) for e in pending)
    result: list[tuple[int, int]] = []

    def add(size: int, flags: int) -> None:
        if size <= 0:
            return
        if result and result[-1][1] == flags:
            result[-1] = (result[-1][0] + size, flags)
        else:
            result.append((size, flags))

    position = offset
    for size, allocated in found:
        stop = min(position + size, end)
        if not allocated:
            for first, last in busy:
                if last <= position or first >= stop:
                    continue
                add(first - position, HOLE | ZERO)
                position = max(position, first)
                add(min(last, stop) - position, 0)
                position = min(last, stop)
            add(stop - position, HOLE | ZERO)
        else:
            add(stop - position, 0)
        position = stop
    add(end - position, 0)
    return result
