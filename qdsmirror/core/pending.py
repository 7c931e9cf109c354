"""Entries that are framed and not yet on the data device, found by range: read-your-writes.

Entries leave in the order in which they came, so each granule of the LDSU keeps a queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from qdsmirror.core.frames import Entry

#: Entries are found by granules of this size.
GRANULE_SHIFT = 16
#: Entries over more granules than this (zeroes, trims) are kept aside and looked at by every read.
_WIDE_GRANULES = 64

_Aged = tuple[int, Entry]


class PendingIndex:
    """The unapplied entries of one LDSU."""

    def __init__(self) -> None:
        self._granules: dict[int, deque[_Aged]] = {}
        self._wide: deque[_Aged] = deque()
        self._age = 0

    def __bool__(self) -> bool:
        return bool(self._granules) or bool(self._wide)

    def add(self, entries: Sequence[Entry]) -> None:
        """Take entries in their order."""
        granules = self._granules
        age = self._age
        for entry in entries:
            age += 1
            first = entry[0] >> GRANULE_SHIFT
            last = (entry[0] + entry[1] - 1) >> GRANULE_SHIFT
            if last - first >= _WIDE_GRANULES:
                self._wide.append((age, entry))
                continue
            for granule in range(first, last + 1):
                queue = granules.get(granule)
                if queue is None:
                    granules[granule] = deque(((age, entry),))
                else:
                    queue.append((age, entry))
        self._age = age

    def remove(self, entries: Sequence[Entry]) -> None:
        """Forget the oldest entries, in the order in which they were added."""
        granules = self._granules
        for entry in entries:
            first = entry[0] >> GRANULE_SHIFT
            last = (entry[0] + entry[1] - 1) >> GRANULE_SHIFT
            if last - first >= _WIDE_GRANULES:
                self._wide.popleft()
                continue
            for granule in range(first, last + 1):
                queue = granules[granule]
                if len(queue) == 1:
                    del granules[granule]
                else:
                    queue.popleft()

    def overlapping(self, offset: int, length: int) -> list[Entry]:
        """Give the entries that touch a range (bytes), oldest first."""
        end = offset + length
        found: dict[int, Entry] = {}
        granules = self._granules
        if granules:
            for granule in range(offset >> GRANULE_SHIFT, ((end - 1) >> GRANULE_SHIFT) + 1):
                for age, entry in granules.get(granule, ()):
                    if entry[0] < end and offset < entry[0] + entry[1]:
                        found[age] = entry
        for age, entry in self._wide:
            if entry[0] < end and offset < entry[0] + entry[1]:
                found[age] = entry
        return [found[age] for age in sorted(found)]


def overlay(base: bytearray, offset: int, entries: Sequence[Entry]) -> None:
    """Lay entries, oldest first, over the content of a range that begins at ``offset``."""
    view = memoryview(base)
    end = offset + len(base)
    for where, length, _kind, payload in entries:
        first = max(where, offset)
        last = min(where + length, end)
        if payload is None:
            view[first - offset : last - offset] = bytes(last - first)
        else:
            view[first - offset : last - offset] = payload[first - where : last - where]
