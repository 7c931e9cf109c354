"""What a log event is about: group, LDSU, and where in the group's order this happened.

The events say it by their keys: ``group`` (or ``name``, ``names``, ``side``), ``ldsu`` (or
``unit``), and ``gsn`` where they speak of a certain one; otherwise the group's own place is asked
for: what is written (driver), sent (pmd), or committed (rmd).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from twisted.logger import LogEvent

_GROUP = re.compile(r"dsgrp[0-9]{3}(?![0-9])")

#: By group's name, what gives the global sequence number that it has come to.
_sequences: dict[str, Callable[[], int | None]] = {}


class Fields(NamedTuple):
    """What an event is about; ``None`` where that is not known, or it is about several.

    :ivar group: its name, ``dsgrp000``.
    :ivar sequence: a global sequence number.
    """

    group: str | None
    ldsu: str | None
    sequence: int | None


def follow(group: str, sequence: Callable[[], int | None]) -> None:
    """Have a group's events bear where it is.

    :param sequence: gives the global sequence number; called from any thread.
    """
    _sequences[group] = sequence


def forget(group: str) -> None:
    """Undo :func:`follow`."""
    _sequences.pop(group, None)


def fields_of(event: LogEvent) -> Fields:
    """Tell what an event is about."""
    group = _group_of(event)
    ldsu = event.get("ldsu", event.get("unit"))
    sequence = event.get("gsn")
    if sequence is None and group in _sequences:
        sequence = _sequences[group]()
    return Fields(
        group,
        ldsu if isinstance(ldsu, str) else None,
        sequence if isinstance(sequence, int) else None,
    )


def group_in(text: str) -> str | None:
    """Find the one group that a text names; ``None``: none, or several."""
    found = set(_GROUP.findall(text))
    return found.pop() if len(found) == 1 else None


def _group_of(event: LogEvent) -> str | None:
    for key in ("group", "name", "names", "side"):
        value = event.get(key)
        if isinstance(value, str):
            return group_in(value)
        if isinstance(value, int) and key == "group":
            return f"dsgrp{value:03d}"
    return None
