"""From what a group's daemons say, twice, to a sample: differences, rates, percentages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qdsmirror.core.samples import KB, SECTOR_BYTES, GroupSample, LdsuSample

Status = Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """What the daemons of a group said at one time.

    :ivar epoch: seconds since 1970; ``at``: monotonic seconds.
    :ivar driver: the driver's status, at the primary; ``None``: it did not answer.
    :ivar mirror: likewise of the pmd, at the secondary of the rmd.
    :ivar gone: whether nobody is there who could be the mirror daemon: it moves nothing.
    :ivar driver_gone: likewise the driver.
    """

    epoch: float
    at: float
    driver: Status | None = None
    mirror: Status | None = None
    gone: bool = False
    driver_gone: bool = False


class Rates:
    """Makes samples of readings, each over the time since the one before.

    :param names: of the group's LDSUs, in order.
    :param role: ``primary`` or ``secondary``.
    """

    def __init__(self, names: Sequence[str], role: str) -> None:
        self._names = tuple(names)
        self._role = role
        #: The last reading, and the last one in which the mirror daemon answered.
        self._last: Reading | None = None
        self._known: Reading | None = None

    @property
    def begun(self) -> bool:
        """Whether there is a reading that the next one can be compared with."""
        return self._last is not None

    def sample(self, reading: Reading) -> GroupSample:
        """Give the sample that ends with a reading; at the first one no rate is known."""
        moved = _Moved(self._known, self._last, reading, self._role)
        self._last = reading
        if reading.mirror is not None:
            self._known = reading
        own = reading.driver if self._role == "primary" else reading.mirror
        mirror, driver = reading.mirror or {}, reading.driver or {}
        return GroupSample(
            epoch=reading.epoch,
            pctcpu=moved.pctcpu,
            sleep_us=_knob(mirror, "sleep_us"),
            state=str(own["state"]) if own is not None else "setup",
            ldsus=tuple(self._ldsu(name, own, moved) for name in self._names),
            netkbps=moved.netkbps,
            lag_seconds=_at(own, "lag", "seconds"),
            writesleep_us=_knob(driver, "writesleep_us"),
            limit_kbps=_knob(mirror, "limit_kbps"),
        )

    def _ldsu(self, name: str, own: Status | None, moved: _Moved) -> LdsuSample:
        """Give an LDSU's; at the secondary all of them have the group's journal."""
        log: Any = None
        if self._role == "primary":
            log = _at(_named(own, "ldsus", name), "writelog")
        elif own is not None:
            log = own.get("journal")
        used, size = _at(log, "used_bytes"), _at(log, "size")
        total, data, entries = moved.ldsu(name)
        return LdsuSample(
            name,
            total_kbps=total,
            data_kbps=data,
            entries_ps=entries,
            waiting=_at(log, "entries"),
            sectors=-(-used // SECTOR_BYTES) if used is not None else None,
            pctwl=100.0 * used / size if used is not None and size else None,
            age_seconds=_at(log, "oldest_age_seconds"),
        )


class _Moved:
    """What the mirror daemon has moved in an interval."""

    def __init__(
        self, known: Reading | None, last: Reading | None, now: Reading, role: str
    ) -> None:
        self._now = now.mirror
        self._nothing = now.mirror is None and now.gone and last is not None
        process = "pmd" if role == "primary" else "rmd"
        same = known is not None and _at(known.mirror, process, "pid") == _at(
            now.mirror, process, "pid"
        )
        # Another process has counted from nothing, since some time after the last reading.
        self._before = known.mirror if known is not None and same else None
        since = known if same else last
        self._seconds = now.at - since.at if since is not None else 0.0

    def _rate(self, now: float | None, before: float | None) -> float | None:
        if self._nothing:
            return 0.0
        if now is None or self._seconds <= 0:
            return None
        return max(0.0, now - (before or 0)) / self._seconds

    @property
    def pctcpu(self) -> float | None:
        """Percent of one core."""
        path = ("traffic", "cpu_seconds")
        rate = self._rate(_at(self._now, *path), _at(self._before, *path))
        return None if rate is None else 100.0 * rate

    @property
    def netkbps(self) -> float | None:
        """KB a second on the wire."""
        path = ("wire", "wire_bytes")
        return _kb(self._rate(_at(self._now, *path), _at(self._before, *path)))

    def ldsu(self, name: str) -> tuple[float | None, float | None, float | None]:
        """Give an LDSU's total and data KB a second, and its entries a second."""
        now = _named(_at(self._now, "traffic"), "ldsus", name)
        before = _named(_at(self._before, "traffic"), "ldsus", name)
        frames, data, entries = (
            self._rate(_at(now, key), _at(before, key))
            for key in ("frame_bytes", "data_bytes", "entries")
        )
        total = None if frames is None else frames * self._shrunk
        return _kb(total), _kb(data), entries

    @property
    def _shrunk(self) -> float:
        """What compression has left of the frames: which LDSU's they were is not known on wire."""
        wire, frame = (
            self._rate(_at(self._now, "wire", key), _at(self._before, "wire", key))
            for key in ("wire_bytes", "frame_bytes")
        )
        return wire / frame if wire and frame else 1.0


def _kb(rate: float | None) -> float | None:
    return None if rate is None else rate / KB


def _knob(status: Status, name: str) -> int | None:
    found = _at(status, "knobs", name)
    return int(found) if found is not None else None


def _at(status: Any, *path: str) -> Any:
    """Follow keys into a status; ``None`` where one is missing."""
    for key in path:
        if not isinstance(status, Mapping):
            return None
        status = status.get(key)
    return status


def _named(status: Any, key: str, name: str) -> Any:
    """Find what a list of a status has for a name."""
    return next((one for one in _at(status, key) or () if _at(one, "name") == name), None)
