"""Order again for what came over several network paths (patent: "banding")."""

from __future__ import annotations

from typing import Generic, TypeVar

from qdsmirror.errors import ProtocolError

T = TypeVar("T")


class Reorder(Generic[T]):
    """Gives each frame once, in the order of their global sequence numbers.

    What comes twice, because its first path was slow or was lost, is dropped.  Whoever puts frames
    in bounds what waits here.

    :param next_gsn: the number that comes next.
    """

    def __init__(self, next_gsn: int) -> None:
        self._next = next_gsn
        self._waiting: dict[int, tuple[int, T]] = {}

    def __len__(self) -> int:
        """Count what waits."""
        return len(self._waiting)

    def put(self, first: int, count: int, item: T) -> bool:
        """Take a frame of ``count`` numbers from ``first`` on.

        :returns: whether it is kept; else it is here, or was given, already.
        :raises ProtocolError: it begins before what comes next and ends behind it.
        """
        if first < self._next:
            if first + count > self._next:
                raise ProtocolError(
                    f"frame with GSN {first} to {first + count - 1} where {self._next} comes next"
                )
            return False
        if first in self._waiting:
            return False
        self._waiting[first] = (count, item)
        return True

    def take(self) -> T | None:
        """Give what comes next, if it is here."""
        found = self._waiting.pop(self._next, None)
        if found is None:
            return None
        self._next += found[0]
        return found[1]
