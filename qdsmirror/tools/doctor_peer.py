"""What ``qdsdoctor --peer`` finds: the secondaries are asked over the way that the pmd goes.

A process of its own asks (``qdsmirror.daemons.visit``); a secondary cannot ask its primary, which
listens nowhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from qdsmirror import __version__
from qdsmirror.config import GroupConfig
from qdsmirror.core.findings import Finding, advice, error, warning
from qdsmirror.core.peering import (
    compare_clocks,
    compare_keys,
    compare_ldsus,
    compare_versions,
)
from qdsmirror.errors import EXIT_FAILED, EXIT_UNREACHABLE, QdsError
from qdsmirror.limits import (
    CERTIFICATE_WARN_DAYS,
    HANDSHAKE_SECONDS,
    PATHS_MAX,
    PEER_NOTES_MAX,
    PEER_TEXT_CHARACTERS_MAX,
)
from qdsmirror.paths import Paths

_DAY_SECONDS = 86400.0
#: Of one group: each path may take a connection's time and twice a handshake's.
_VISIT_SECONDS = 3 * HANDSHAKE_SECONDS * PATHS_MAX

Visits = dict[int, list[dict[str, Any]]]


def visit(paths: Paths, groups: Sequence[GroupConfig]) -> Visits:
    """Ask the secondaries of groups, on every network path.

    :returns: by the group's number, what each path gave: ``error``, or ``facts`` and ``ldsus``.
    :raises QdsError: the asking process has failed.
    """
    if not groups:
        return {}
    # -P: nothing is imported from the directory that the caller happens to stand in.
    command = [sys.executable, "-P", "-m", "qdsmirror.daemons.visit", *paths.arguments()]
    try:
        done = subprocess.run(
            [*command, *(str(group.number) for group in groups)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_VISIT_SECONDS * len(groups),
            check=False,
        )
        told = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise QdsError("the secondaries could not be asked in time", "try with -g N") from None
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise QdsError(
            f"the secondaries could not be asked: {last}", "qdsconfigtool check"
        ) from None
    if told.get("error"):
        failed = QdsError(told["error"]["message"], told["error"]["hint"])
        failed.exit_code = told["error"]["exit_code"]
        raise failed
    return {one["group"]: one["ways"] for one in told["groups"]}


def examine(
    group: GroupConfig, ways: Sequence[dict[str, Any]], sizes: dict[str, int]
) -> Iterator[Finding]:
    """Find what the visits to a group's secondary tell.

    :param ways: of :func:`visit`.
    :param sizes: bytes of the data devices here, by LDSU, where they are known.
    """
    for way in ways:
        if way["error"] is not None:
            yield _unasked(group, way)
    good = _answered(ways)
    if good is None:
        return
    facts, number = good["facts"], group.number
    peer = group.secondary_host
    yield from compare_versions(peer, __version__, facts.get("version"))
    yield from compare_clocks(peer, good["asked"], good["answered"], facts.get("time"))
    yield from _certificate(peer, good["certificate_ends"])
    yield from _differences(group, good, sizes)
    for note in _notes(facts):
        step = f"on {peer}: qdsdoctor -g {number}; qdsinfo -g {number}"
        if facts.get("state") == "failed":
            yield error("peer", f"on {peer}: {_one_line(note)}", step, number)
        else:
            yield advice(
                "peer", f"{group.name} on {peer}: earlier: {_one_line(note)}", step, number
            )


def compare(group: GroupConfig, ways: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Find how a group's configuration differs from its secondary's, or why that is not known.

    :param ways: of :func:`visit`.
    """
    good = _answered(ways)
    if good is not None:
        yield from _differences(group, good, {})
    else:
        yield from (_unasked(group, way) for way in ways)


def _answered(ways: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return next((way for way in ways if way["error"] is None), None)


def _differences(
    group: GroupConfig, good: dict[str, Any], sizes: dict[str, int]
) -> Iterator[Finding]:
    """Compare a group's file with what its secondary has told."""
    number, peer, path = group.number, group.secondary_host, str(group.path)
    ours, theirs = group.comparable(), good["facts"].get("configuration")
    yield from compare_keys(group.name, number, peer, ours, theirs, path)
    ldsus = [(one.name, one.mirror_device, sizes.get(one.name)) for one in group.ldsus]
    yield from compare_ldsus(group.name, number, peer, ldsus, good["ldsus"], path)


def journal_bytes(ways: Sequence[dict[str, Any]]) -> int:
    """Give how large the secondary says that its journal is; 0: not known."""
    for way in ways:
        told = way["facts"].get("journal_bytes") if way["error"] is None else None
        if isinstance(told, int) and not isinstance(told, bool) and told > 0:
            return told
    return 0


def _unasked(group: GroupConfig, way: dict[str, Any]) -> Finding:
    told = way["error"]
    local = f" (from {way['local']})" if way["local"] else ""
    step = told["hint"] or f"on {group.secondary_host}: qdsdoctor; qdsinfo"
    code = EXIT_UNREACHABLE if told["passing"] else told["exit_code"] or EXIT_FAILED
    check = "identity" if told["code"] == "identity" else "link"
    return error(check, f"{group.name}: {told['message']}{local}", step, group.number, code)


def _certificate(peer: str, ends: float) -> Iterator[Finding]:
    days = (ends - time.time()) / _DAY_SECONDS
    if days < CERTIFICATE_WARN_DAYS:
        told = f"the certificate of {peer} expires in {days:.0f} days"
        step = (
            "renew it beside the authority: qdsconfigtool pki --overwrite --out DIR PRIMARY "
            f"SECONDARY; copy it to {peer}"
        )
        yield warning("identity", told, step)


def one_sided(groups: Sequence[GroupConfig]) -> Iterator[Finding]:
    """Tell a secondary whom to ask: its primaries listen nowhere.

    :param groups: those whose secondary this host is.
    """
    for primary in dict.fromkeys(group.primary_host for group in groups):
        told = f"{primary} cannot be asked from here: it connects, and listens nowhere"
        yield advice("peer", told, f"on {primary}: qdsdoctor --peer")


def _notes(facts: dict[str, Any]) -> list[str]:
    """Give what the secondary says went wrong; nothing where that has no known form."""
    told = facts.get("notes")
    notes = [one for one in told if isinstance(one, str)] if isinstance(told, list) else []
    return [one[:PEER_TEXT_CHARACTERS_MAX] for one in notes[-PEER_NOTES_MAX:]]


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
