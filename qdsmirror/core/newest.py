"""What of many entries is still to be seen once all are written: the newest of every byte."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from qdsmirror.core.frames import Entry


def newest(entries: Sequence[Entry]) -> list[Entry]:
    """Give the parts of entries that no later one covers, none touching another, by offset.

    Whoever writes them writes the last value of each byte and no other: however that is cut short,
    nothing older takes the place of something newer.

    :param entries: oldest first.
    """
    found: list[Entry] = []
    # What later entries cover: the starts and ends of ranges that neither overlap nor touch.
    edges: list[int] = []
    for entry in reversed(entries):
        found += [_part(entry, first, end) for first, end in _cover(edges, *entry[:2])]
    found.sort(key=lambda one: one.offset)
    return found


def _part(entry: Entry, first: int, end: int) -> Entry:
    offset, _, kind, payload = entry
    if payload is not None:
        payload = memoryview(payload)[first - offset : end - offset]
    return Entry(first, end - first, kind, payload)


def _cover(edges: list[int], offset: int, length: int) -> list[tuple[int, int]]:
    """Cover a range; give what of it was not covered before."""
    end = offset + length
    low, high = bisect_left(edges, offset), bisect_left(edges, end + 1)
    # Between an even number of edges and the next nothing is covered.
    inside = [offset, *edges[low:high], end] if low % 2 == 0 else edges[low:high] + [end]
    if high % 2:
        inside = inside[:-1]
    gaps = [(a, b) for a, b in zip(inside[::2], inside[1::2], strict=True) if a < b]
    edges[low:high] = [offset] * (low % 2 == 0) + [end] * (high % 2 == 0)
    return gaps
