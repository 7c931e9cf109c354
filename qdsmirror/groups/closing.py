"""Closing LDSUs to applications while their data devices hold no copy of anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qdsmirror.core.backfresh import BackfreshState

if TYPE_CHECKING:
    from qdsmirror.groups.unit import DriverUnit

_FETCHING = "the LDSU is closed: its data device is being fetched from the mirror (backfresh)"
_LACKING = "the LDSU is closed: its data device needs a backfresh"


def close_units(
    units: Sequence[DriverUnit], states: Mapping[int, BackfreshState], *, fetching: bool
) -> None:
    """Close the LDSUs that hold no copy of anything, or are about to.

    :param states: by LDSU index, what is recorded of those that lack blocks.
    :param fetching: a backfresh is under way, or about to be: then it is all of them.
    """
    for unit in units:
        if fetching:
            unit.close_export(_FETCHING)
        elif unit.index in states:
            unit.close_export(f"{_LACKING} ({states[unit.index].reason})")
