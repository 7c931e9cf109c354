"""What a block status says: the data device's allocation, with unapplied entries laid over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qdsmirror.core.frames import Entry
from qdsmirror.core.nbd import STATE_HOLE, STATE_ZERO


def allocation(
    offset: int,
    length: int,
    found: Iterable[tuple[int, bool]],
    pending: Sequence[Entry],
) -> list[tuple[int, int]]:
    """Merge what the device says is allocated with what is about to be written there.

    :param found: (length, allocated) pairs that cover the range.
    :param pending: unapplied entries that touch it; their blocks count as allocated data.
    :returns: (length, flags of ``base:allocation``) pairs that cover the range, neighbours with
        equal flags joined.
    """
    end = offset + length
    busy = _joined(sorted((max(e.offset, offset), min(e.offset + e.length, end)) for e in pending))
    busy.append((end, end))
    result: list[tuple[int, int]] = []
    position = found_end = offset

    def add(stop: int, flags: int) -> None:
        nonlocal position
        if stop <= position:
            return
        if result and result[-1][1] == flags:
            result[-1] = (result[-1][0] + stop - position, flags)
        else:
            result.append((stop - position, flags))
        position = stop

    turn = 0
    for size, allocated in found:
        found_end = min(found_end + size, end)
        if allocated:
            add(found_end, 0)
        while position < found_end:
            first, last = busy[turn]
            add(min(first, found_end), STATE_HOLE | STATE_ZERO)
            add(min(last, found_end), 0)
            if last <= position:
                turn += 1
    add(end, 0)
    return result


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join sorted ranges that overlap or touch."""
    joined: list[tuple[int, int]] = []
    for first, last in ranges:
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined
