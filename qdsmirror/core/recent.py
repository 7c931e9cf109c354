"""Where a device was written last, to be looked at again at its next start (rules.md 24)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from qdsmirror.limits import (
    FINGERPRINT_CHUNK_BYTES,
    FINGERPRINT_CHUNKS_MAX,
    FINGERPRINT_WRITES_MAX,
)


class Recent:
    """The last writes to a device, kept at the cost of one append each.

    :ivar note: takes the (offset, length) of a write, from any thread.
    """

    __slots__ = ("_writes", "note")

    def __init__(self) -> None:
        self._writes: deque[tuple[int, int]] = deque(maxlen=FINGERPRINT_WRITES_MAX)
        self.note: Callable[[tuple[int, int]], None] = self._writes.append

    def chunks(self) -> list[int]:
        """Give the numbers of the chunks written last, the latest first, each once."""
        found: dict[int, None] = {}
        for offset, length in reversed(self._writes):
            if not length:
                continue
            first = offset // FINGERPRINT_CHUNK_BYTES
            for chunk in range((offset + length - 1) // FINGERPRINT_CHUNK_BYTES, first - 1, -1):
                found[chunk] = None
                if len(found) == FINGERPRINT_CHUNKS_MAX:
                    return list(found)
        return list(found)
