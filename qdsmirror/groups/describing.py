"""What a secondary tells an authenticated visitor of a group (``qdsdoctor --peer``): no secrets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qdsmirror import __version__
from qdsmirror.config import GroupConfig, HostConfig
from qdsmirror.limits import PEER_NOTES_MAX, PEER_TEXT_CHARACTERS_MAX


def facts(
    config: GroupConfig,
    host: HostConfig,
    now: float,
    *,
    state: str,
    notes: Iterable[str] = (),
    journal_bytes: int = 0,
) -> dict[str, Any]:
    """Describe a group as this host has it configured, and how it is.

    :param now: seconds since 1970, to be compared with the visitor's clock.
    :param state: of the link, or ``failed``.
    :param notes: what went wrong, oldest first.
    :param journal_bytes: of the journal's ring; 0: not known.
    """
    return {
        "version": __version__,
        "time": now,
        "host": host.name,
        "state": state,
        "notes": [one[:PEER_TEXT_CHARACTERS_MAX] for one in list(notes)[-PEER_NOTES_MAX:]],
        "journal_bytes": journal_bytes,
        "ldsus": len(config.ldsus),
        "configuration": config.comparable(),
    }
