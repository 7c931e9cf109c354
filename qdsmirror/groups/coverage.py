"""What a refresh sends: everything, what the dirty bitmaps have, or what a comparison found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from qdsmirror.groups.compare import Comparison

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit

FULL, DIRTY, SMART = "full", "dirty", "smart"
KINDS = (FULL, DIRTY, SMART)


class Coverage(Protocol):
    """The ranges of a group's LDSUs that a refresh sends, in order.

    :ivar proven_gsn: once this is durable nothing that it leaves out is needed any more (rules.md
        14).
    """

    proven_gsn: int

    def next(self, unit: DriverUnit, offset: int) -> tuple[int, int] | None:
        """Give the first and the end byte of what is sent next, from a byte on, if that is known.

        Asked in the order of LDSUs and offsets, and never for what lies before again.
        """

    def known(self, unit: DriverUnit) -> int:
        """Give the offset up to which :meth:`next` knows all."""

    def bytes_from(self, unit: DriverUnit, offset: int) -> int:
        """Give how many bytes of an LDSU count as work, from a byte on."""

    def begin(self, done: Sequence[int]) -> None:
        """Find out; ``done`` has, by LDSU, how far the refresh has come before."""

    def go_on(self) -> None:
        """Go on where something may have changed: the link is back, or ranges were sent."""

    def stop(self) -> None:
        """Find out no more."""


class _Known:
    """What needs no finding out."""

    proven_gsn = 0

    def known(self, unit: DriverUnit) -> int:
        return unit.size

    def begin(self, done: Sequence[int]) -> None:
        """Nothing is to be found out."""

    def go_on(self) -> None:
        """Likewise."""

    def stop(self) -> None:
        """Likewise."""


class _Everything(_Known):
    def next(self, unit: DriverUnit, offset: int) -> tuple[int, int] | None:
        return (offset, unit.size) if offset < unit.size else None

    def bytes_from(self, unit: DriverUnit, offset: int) -> int:
        return unit.size - offset


class _Dirty(_Known):
    def next(self, unit: DriverUnit, offset: int) -> tuple[int, int] | None:
        return unit.dirty.next_dirty(offset)

    def bytes_from(self, unit: DriverUnit, offset: int) -> int:
        return unit.dirty.dirty_bytes(offset)


def coverage_of(kind: str, group: DriverGroup, found: Callable[[], None]) -> Coverage:
    """Give what a refresh of a kind sends.

    :param found: called when more of it is known.
    """
    if kind == FULL:
        return _Everything()
    return _Dirty() if kind == DIRTY else Comparison(group, found)
