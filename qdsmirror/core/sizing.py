"""How large writelogs, journal and link should be, by the rates that were recorded.

What an LDSU's application has written in an interval is what was sent of it, and what its
writelog has grown by meanwhile: while the link is too slow, or away, the second part grows.  So a
record of a bad day says more than the rate of the link on it.

A writelog has to hold what is written while the secondary is away; the journal what arrives while
a checkpoint holds the mirror; the link has to carry the busiest hour, or a writelog fills a little
more each day.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from qdsmirror.core.samples import KB, SECTOR_BYTES, GroupSample, LdsuSample
from qdsmirror.limits import MIB, WRITELOG_BYTES_WARN

#: What is recommended is so much more than what was seen.
HEADROOM = 1.25
#: The link has to carry the busiest stretch of this length ...
LINK_SECONDS = 3600.0
#: ... and one of this length without falling behind by more than it.
PEAK_SECONDS = 60.0
#: An interval without a sample that is so many times longer than the usual one was a pause: of the
#: recording, not of the application.
_PAUSE_RATIO = 3.0
#: A journal holds what is in flight so many times over, or the two sides wait for each other.
_JOURNAL_WINDOWS = 2
#: With fewer samples nothing is recommended.
SAMPLES_MIN = 6
#: Sizes are rounded up to the larger, where they are many times that.
_STEPS_BYTES = (16 * MIB, MIB)


@dataclass(frozen=True)
class Interval:
    """What happened between two samples.

    :ivar end: seconds since 1970; ``seconds`` its length.
    :ivar amount: bytes.
    """

    end: float
    seconds: float
    amount: float


@dataclass(frozen=True)
class Recommendation:
    """What the recorded rates ask for.

    :ivar recorded_seconds: how long the record is, pauses left out.
    :ivar writelogs: bytes for each LDSU's writelog, by name.
    :ivar journal: bytes for the journal.
    :ivar link: bytes a second, for the busiest hour; ``peak``: to keep up with the busiest minute.
    :ivar rates: bytes a second that each LDSU's application wrote in the busiest stretch.
    """

    recorded_seconds: float
    writelogs: dict[str, int]
    journal: int
    link: float
    peak: float
    rates: dict[str, float]


def recommend(
    samples: Sequence[GroupSample], outage_seconds: float, send_window: int
) -> Recommendation | None:
    """Give what a group needs, by its record; ``None``: the record says too little.

    :param samples: in the order of their times.
    :param outage_seconds: how long the secondary may be away before a writelog is full, and a
        checkpoint hold before the journal is.
    :param send_window: bytes that may be in flight to the journal.
    """
    if len(samples) < SAMPLES_MIN:
        return None
    names = list(dict.fromkeys(ldsu.name for sample in samples for ldsu in sample.ldsus))
    written = {name: _intervals(samples, _written(name)) for name in names}
    known = {name: intervals for name, intervals in written.items() if intervals}
    if not known:
        return None
    wire = _intervals(samples, _sent)
    rates = {name: busiest(intervals, outage_seconds) for name, intervals in known.items()}
    all_written = _summed(known.values())
    return Recommendation(
        recorded_seconds=sum(one.seconds for one in all_written),
        writelogs={
            name: max(_rounded(rate * outage_seconds * HEADROOM), WRITELOG_BYTES_WARN)
            for name, rate in rates.items()
        },
        journal=_rounded(
            max(
                busiest(all_written, outage_seconds) * outage_seconds * HEADROOM,
                _JOURNAL_WINDOWS * send_window,
            )
        ),
        link=HEADROOM * busiest(wire or all_written, LINK_SECONDS),
        peak=HEADROOM * busiest(wire or all_written, PEAK_SECONDS),
        rates=rates,
    )


def busiest(intervals: Sequence[Interval], seconds: float) -> float:
    """Give the highest mean rate, bytes a second, over any stretch of so many seconds.

    A stretch has whole intervals, and is no longer than it must be from where it begins, or to
    where it ends.  Of a shorter record: its mean.  Pauses between intervals count as nothing, and
    take no time.
    """
    return max(_busiest_to_an_end(one, seconds) for one in (intervals, intervals[::-1]))


def _busiest_to_an_end(intervals: Sequence[Interval], seconds: float) -> float:
    rates: list[float] = []
    total = length = 0.0
    first = 0
    for one in intervals:
        total += one.amount
        length += one.seconds
        while length - intervals[first].seconds >= seconds:
            total -= intervals[first].amount
            length -= intervals[first].seconds
            first += 1
        if length >= seconds:
            rates.append(total / length)
    if not rates and length:
        rates.append(total / length)
    return max(0.0, *rates) if rates else 0.0


Amount = Callable[[GroupSample, GroupSample, float], float | None]


def _intervals(samples: Sequence[GroupSample], amount: Amount) -> list[Interval]:
    """Measure each interval between two samples that a pause does not lie between."""
    steps = [
        after.epoch - before.epoch for before, after in zip(samples, samples[1:], strict=False)
    ]
    usual = median([step for step in steps if step > 0] or [0.0])
    found = []
    for before, after, step in zip(samples, samples[1:], steps, strict=False):
        if not 0 < step <= _PAUSE_RATIO * usual:
            continue
        moved = amount(before, after, step)
        if moved is not None:
            found.append(Interval(after.epoch, step, moved))
    return found


def _written(name: str) -> Amount:
    """Give what measures the bytes that were written to an LDSU."""

    def amount(before: GroupSample, after: GroupSample, seconds: float) -> float | None:
        one, two = _ldsu(before, name), _ldsu(after, name)
        if one is None or two is None or two.data_kbps is None:
            return None
        grown = 0
        if one.sectors is not None and two.sectors is not None:
            grown = (two.sectors - one.sectors) * SECTOR_BYTES
        # What drains was written before; what a bypass drops was not sent.
        return max(two.data_kbps * KB * seconds + grown, 0.0)

    return amount


def _sent(_before: GroupSample, after: GroupSample, seconds: float) -> float | None:
    """Measure what went over the wire."""
    rates = [one.total_kbps for one in after.ldsus if one.total_kbps is not None]
    if after.netkbps is None and not rates:
        return None
    return (after.netkbps if after.netkbps is not None else sum(rates)) * KB * seconds


def _ldsu(sample: GroupSample, name: str) -> LdsuSample | None:
    return next((one for one in sample.ldsus if one.name == name), None)


def _summed(all_intervals: Iterable[Sequence[Interval]]) -> list[Interval]:
    """Add up the LDSUs' intervals by their ends."""
    by_end: dict[float, Interval] = {}
    for intervals in all_intervals:
        for one in intervals:
            before = by_end.get(one.end)
            amount = one.amount + (before.amount if before is not None else 0.0)
            by_end[one.end] = Interval(one.end, one.seconds, amount)
    return [by_end[end] for end in sorted(by_end)]


def _rounded(size: float) -> int:
    step = next((one for one in _STEPS_BYTES if size >= 4 * one), _STEPS_BYTES[-1])
    return max(-(-int(size) // step), 1) * step
