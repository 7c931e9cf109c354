"""What ``qdsdoctor`` recommends of the recorded rates: writelog, journal and link size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qdsmirror.config import GroupConfig
from qdsmirror.core.findings import Finding, advice, warning
from qdsmirror.core.samples import GroupSample, parse
from qdsmirror.core.sizing import Recommendation, recommend
from qdsmirror.limits import GIB, KIB, MIB
from qdsmirror.paths import Paths

_BITS = 8


def record_files(paths: Paths, name: str) -> list[Path]:
    """Give where a group's performance tracking files are, the older generation first."""
    return [paths.var / f"{name}.prf.1", paths.var / f"{name}.prf"]


def read_record(paths: Paths, group: GroupConfig) -> list[GroupSample]:
    """Read what is recorded of a group; damaged and missing parts are left out."""
    samples: list[GroupSample] = []
    for path in record_files(paths, group.name):
        try:
            samples += parse(path.read_text(errors="replace").splitlines()).samples
        except OSError:
            continue
    return sorted(samples, key=lambda one: one.epoch)


def recommended(paths: Paths, group: GroupConfig, outage_seconds: float) -> Recommendation | None:
    """Give what a group's record asks for; ``None``: it says too little."""
    record = read_record(paths, group)
    return recommend(record, outage_seconds, group.tunables.send_window)


def examine_writelogs(
    group: GroupConfig,
    asked: Recommendation,
    outage_seconds: float,
    writelogs: Mapping[str, int],
    root: str,
) -> Iterator[Finding]:
    """Compare what the record asks for with the writelogs that there are.

    :param writelogs: bytes of each LDSU's writelog, by name, where they are known.
    :param root: what commands have to be told besides, with a space before it.
    """
    number = group.number
    for name, wanted in asked.writelogs.items():
        has, rate = writelogs.get(name), asked.rates[name]
        if has is None or has >= wanted or not rate:
            continue
        told = (
            f"{name}: {_seen(asked)}, its writelog of {size(has)} is full {duration(has / rate)} "
            f"after the link fails; {size(wanted)} last for {duration(outage_seconds)}"
        )
        step = (
            f"add a device to [pool] of {group.path}, then: qdswlinit{root} --pool -g {number}; "
            f"qdsextend{root} {name}"
        )
        yield warning("sizes", told, step, number)


def examine_journal(
    group: GroupConfig, asked: Recommendation, outage_seconds: float, journal: int
) -> Iterator[Finding]:
    """Compare what the record asks for with the journal that there is.

    :param journal: its bytes; 0: they are not known.
    """
    if not 0 < journal < asked.journal:
        return
    told = (
        f"{group.name}: {_seen(asked)}, a journal of {size(asked.journal)} lets a checkpoint hold "
        f"for {duration(outage_seconds)}; it has {size(journal)}"
    )
    step = f"give journal_device a larger device in {group.path} on both hosts; see qdswlinit(1)"
    yield advice("sizes", told, step, group.number)


def _seen(asked: Recommendation) -> str:
    return f"by {duration(asked.recorded_seconds)} of recorded rates"


def describe(
    asked: Recommendation, outage_seconds: float, role: str | None
) -> list[tuple[str, str]]:
    """Give what is recommended as rows: what, how much.

    :param role: of this host: writelogs are the primary's.
    """
    outage = duration(outage_seconds)
    rows = [
        (f"writelog of {name}", f"{size(wanted)} for {outage} without the secondary")
        for name, wanted in asked.writelogs.items()
        if role == "primary"
    ]
    rows.append(("journal", f"{size(asked.journal)} for a checkpoint held {outage}"))
    rows.append(
        (
            "link",
            f"{bits(asked.link)} for the busiest hour, {bits(asked.peak)} to keep up with the "
            "busiest minute",
        )
    )
    return rows


def to_json(asked: Recommendation) -> dict[str, Any]:
    """Give what is recommended as ``--json`` shows it: bytes, bytes a second, seconds."""
    return {
        "recorded_seconds": asked.recorded_seconds,
        "writelog_bytes": asked.writelogs,
        "journal_bytes": asked.journal,
        "link_bytes_per_second": round(asked.link, 1),
        "peak_bytes_per_second": round(asked.peak, 1),
    }


def size(number: float) -> str:
    """Give bytes as a person reads them."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if number >= unit:
            return f"{number / unit:.4g} {name}"
    return f"{number:.0f} bytes"


def bits(rate: float) -> str:
    """Give bytes a second as a link's bits."""
    value = rate * _BITS
    for unit, name in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} bit/s"


def duration(seconds: float) -> str:
    """Give a time as a person reads it."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"
