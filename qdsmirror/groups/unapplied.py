"""What a child has framed and not yet applied, of all its groups together (rules.md 20)."""

from __future__ import annotations

from typing import Protocol

from qdsmirror.limits import UNAPPLIED_BYTES_MAX, UNAPPLIED_SHARE_BYTES


class Framer(Protocol):
    """A group that frames."""

    def frame_again(self) -> None:
        """Look again whether there is room."""


class Unapplied:
    """The bytes of payload that the groups of a child hold in memory until they are applied.

    Each group has a small share for itself, so that one whose data device stands still does not
    stop the others.

    :ivar held_bytes: of all groups.
    """

    def __init__(
        self, limit_bytes: int = UNAPPLIED_BYTES_MAX, share_bytes: int = UNAPPLIED_SHARE_BYTES
    ) -> None:
        self.held_bytes = 0
        self._limit = limit_bytes
        self._share = share_bytes
        self._held: dict[Framer, int] = {}

    def has_room(self, group: Framer) -> bool:
        """Tell whether a group may frame more; if not, it is told when there is room again."""
        held = self._held.setdefault(group, 0)
        return self.held_bytes < self._limit or held < self._share

    def held_by(self, group: Framer) -> int:
        """Give the bytes that a group holds."""
        return self._held.get(group, 0)

    def is_much(self, group: Framer) -> bool:
        """Tell whether a group holds so much that it should not dawdle."""
        return self._held.get(group, 0) > self._limit // 4

    def take(self, group: Framer, amount_bytes: int) -> None:
        """Count what a group has framed."""
        self._held[group] = self._held.get(group, 0) + amount_bytes
        self.held_bytes += amount_bytes

    def give(self, group: Framer, amount_bytes: int) -> None:
        """Count off what a group has applied; the others learn when there is room again."""
        self._held[group] -= amount_bytes
        self._free(group, amount_bytes)

    def leave(self, group: Framer) -> None:
        """Count off all that a group still holds: it ends."""
        self._free(group, self._held.pop(group, 0))

    def _free(self, group: Framer, amount_bytes: int) -> None:
        was_full = self.held_bytes >= self._limit
        self.held_bytes -= amount_bytes
        if was_full and self.held_bytes < self._limit:
            for other in [one for one in self._held if one is not group]:
                other.frame_again()
