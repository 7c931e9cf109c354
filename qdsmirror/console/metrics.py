"""The metrics of this host's groups, in the text format that Prometheus reads.

qdsmirror-metrics(7) describes each; the names are promised.  What is not known is left out: a gauge
whose daemon does not answer is absent, not 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from qdsmirror import __version__
from qdsmirror.console.looking import DAEMONS, Look
from qdsmirror.core.states import Mode
from qdsmirror.tools.status import Group

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_GROUP = ("group", "role")
_LDSU = ("group", "ldsu", "role")
#: Name, description, labels.
_GAUGES: tuple[tuple[str, str, Sequence[str]], ...] = (
    ("qds_build_info", "1, with the version that runs.", ("version",)),
    ("qds_configuration_errors", "What is wrong in files of groups, which are left out.", ()),
    ("qds_daemon_up", "1 if a group's daemon answers, else 0.", (*_GROUP, "daemon")),
    ("qds_group_state", "1 for the state that is shown, 0 for the others.", (*_GROUP, "state")),
    ("qds_coherent", "1 if the mirror is usable as of one instant, else 0.", _GROUP),
    ("qds_bypass_active", "1 while writes go past the writelogs, else 0.", _GROUP),
    ("qds_writelog_used_ratio", "Share of the writelog in use, 0 to 1.", _LDSU),
    ("qds_writelog_entries", "Entries that the secondary has yet to commit.", _LDSU),
    (
        "qds_writelog_oldest_entry_age_seconds",
        "Age of the oldest entry that the secondary has yet to commit; 0 without one.",
        _LDSU,
    ),
    (
        "qds_writelog_seconds_to_full",
        "Until the writelog is full at its present rate; +Inf while it is not filling.",
        _LDSU,
    ),
    ("qds_journal_used_ratio", "Share of the secondary journal in use, 0 to 1.", _GROUP),
    (
        "qds_journal_seconds_to_full",
        "Until the journal is full at its present rate; +Inf while it is not filling.",
        _GROUP,
    ),
    (
        "qds_last_commit_timestamp_seconds",
        "When something new was last committed at the secondary, since 1970.",
        _GROUP,
    ),
    ("qds_refresh_remaining_bytes", "What a refresh has yet to look at; 0 without one.", _GROUP),
    (
        "qds_verify_mismatch_bytes",
        "What the last verify found to differ, until a refresh or repair has mended it.",
        _GROUP,
    ),
    (
        "qds_cert_expiry_timestamp_seconds",
        "When this host's certificate, or the authority's, expires, since 1970.",
        ("certificate",),
    ),
    ("qds_collect_seconds", "How long it took to ask this host's daemons.", ()),
)
_COUNTERS: tuple[tuple[str, str, Sequence[str]], ...] = (
    (
        "qds_sent_bytes_total",
        "Bytes of frames sent to the secondary, before compression, by what they hold.",
        (*_LDSU, "kind"),
    ),
    ("qds_sent_entries_total", "Entries sent to the secondary.", _LDSU),
    (
        "qds_throttle_fired_total",
        "How often a throttle was found true.",
        ("group", "role", "throttle"),
    ),
    ("qds_wire_bytes_total", "Bytes of the messages with frames, after compression.", _GROUP),
)
_LATENCY = (
    "qds_write_latency_seconds",
    "From the arrival of a write, trim or zeroing to its answer.",
    _LDSU,
)


class Metrics:
    """The metric families of one look."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._gauges = {name: GaugeMetricFamily(name, text, labels=labels)
                        for name, text, labels in _GAUGES}  # fmt: skip
        self._counters = {name: CounterMetricFamily(name, text, labels=labels)
                          for name, text, labels in _COUNTERS}  # fmt: skip
        name, text, labels = _LATENCY
        self._latency = HistogramMetricFamily(name, text, labels=labels)

    def families(self) -> list[Metric]:
        """Give all of them, filled."""
        look = self._look
        self._set("qds_build_info", 1, __version__)
        self._set("qds_configuration_errors", look.configuration.problems)
        self._set("qds_collect_seconds", look.seconds)
        for certificate, expiry in look.expiries.items():
            self._set("qds_cert_expiry_timestamp_seconds", expiry, certificate)
        for group in look.groups:
            self._group(group)
        return [*self._gauges.values(), *self._counters.values(), self._latency]

    def _set(self, name: str, value: float | None, *labels: str) -> None:
        if value is not None:
            self._gauges[name].add_metric(labels, value)

    def _count(self, name: str, value: float, *labels: str) -> None:
        self._counters[name].add_metric(labels, value)

    def _answer(self, group: Group, role: str) -> dict[str, Any] | None:
        return self._look.answers.get(f"{group['name']}.{role}")

    def _group(self, group: Group) -> None:
        own = group["name"], group["role"]
        for daemon in DAEMONS[group["role"]]:
            up = self._answer(group, daemon) is not None
            self._set("qds_daemon_up", up, *own, daemon)
        for mode in Mode:
            self._set("qds_group_state", group["state"] == mode, *own, mode)
        host = self._answer(group, DAEMONS[group["role"]][0])
        if host is None:
            return
        self._set("qds_coherent", group["coherent"], *own)
        self._set("qds_bypass_active", "bypass" in group["modes"], *own)
        self._set("qds_last_commit_timestamp_seconds", group["last_commit"], *own)
        if group["role"] == "primary":
            self._primary(group, own, host)
        else:
            self._journal(group["journal"], own)

    def _primary(self, group: Group, own: Sequence[str], driver: dict[str, Any]) -> None:
        name, role = own
        refresh = group["refresh"]
        self._set("qds_refresh_remaining_bytes", refresh["remaining_bytes"] if refresh else 0, *own)
        self._set("qds_verify_mismatch_bytes", _mismatch(group), *own)
        for ldsu in group["ldsus"]:
            self._writelog(ldsu["writelog"], (name, ldsu["name"], role))
        for ldsu, told in (driver.get("latency") or {}).items():
            self._latency.add_metric((name, ldsu, role), _buckets(told), told["seconds"])
        pmd, statistics = self._answer(group, "pmd"), self._answer(group, "stats")
        for one in (statistics or {}).get("throttles") or ():
            self._count("qds_throttle_fired_total", one["fired"], *own, one["name"])
        if pmd is not None:
            self._sent(pmd, own)

    def _writelog(self, writelog: dict[str, Any], labels: Sequence[str]) -> None:
        self._set("qds_writelog_used_ratio", writelog["used_ratio"], *labels)
        self._set("qds_writelog_entries", writelog["entries"], *labels)
        age = writelog["oldest_age_seconds"]
        self._set("qds_writelog_oldest_entry_age_seconds", age, *labels)
        self._set("qds_writelog_seconds_to_full", _or_never(writelog["seconds_to_full"]), *labels)

    def _journal(self, journal: dict[str, Any], own: Sequence[str]) -> None:
        if journal["size"] is None:
            return
        self._set("qds_journal_used_ratio", journal["used_ratio"], *own)
        self._set("qds_journal_seconds_to_full", _or_never(journal["seconds_to_full"]), *own)

    def _sent(self, pmd: dict[str, Any], own: Sequence[str]) -> None:
        name, role = own
        self._count("qds_wire_bytes_total", pmd["wire"]["wire_bytes"], *own)
        for ldsu in pmd["traffic"]["ldsus"]:
            labels = name, ldsu["name"], role
            self._count("qds_sent_entries_total", ldsu["entries"], *labels)
            for kind, count in _by_kind(ldsu).items():
                self._count("qds_sent_bytes_total", count, *labels, kind)


def render(look: Look) -> bytes:
    """Give the metrics of what was seen as a scrape's answer."""
    return generate_latest(_Families(Metrics(look).families()))


class _Families(Collector):
    """What the exposition format is made of."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Give them (prometheus_client)."""
        yield from self._families


def _or_never(seconds: float | None) -> float:
    return float("inf") if seconds is None else seconds


def _mismatch(group: Group) -> int:
    """Give what is known to differ from the mirror by a verify, and is not mended yet.

    A mirror that differs is not called coherent, and a refresh makes it so again.
    """
    verify = group["verify"]
    if verify is None or group["coherent"] or group["refresh"] is not None:
        return 0
    last = verify["last"] if verify["result"] is None or verify["result"] == "ended" else None
    found: list[int] = [one["differing_bytes"] for one in (verify, last) if one is not None]
    return max(found)


def _by_kind(counts: dict[str, int]) -> dict[str, int]:
    """Divide the bytes that were sent of an LDSU; all else is headers, tables, control frames."""
    refresh, verify = counts["refresh_bytes"], counts["verify_bytes"]
    data = counts["data_bytes"] - refresh
    header = counts["frame_bytes"] - counts["data_bytes"] - verify
    return {"data": data, "refresh": refresh, "verify": verify, "header": header}


def _buckets(told: dict[str, Any]) -> list[tuple[str, float]]:
    """Give the buckets of a histogram as Prometheus has them: each with all below it."""
    bounds = [*told["bounds_seconds"], float("inf")]
    below = accumulate(told["counts"])
    # prometheus_client has no annotations there.
    text: Callable[[float], str] = floatToGoString
    return [(text(bound), count) for bound, count in zip(bounds, below, strict=True)]
