"""Samples of a group, and the rows of a performance tracking file.

The file is the patent's ("a performance tracking file ... ASCII and has a row/column layout"); page
qdsprf(5) describes it.  A line that begins with ``#`` names the columns of the rows below it, so
that a reader goes by names: later versions may add columns, and LDSUs may come and go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

#: 1 KB of a rate, in bytes.
KB = 1024
SECTOR_BYTES = 512

#: What stands in a row for a value that was not known.
UNKNOWN = "-"


@dataclass(frozen=True)
class LdsuSample:
    """One LDSU over one interval; ``None``: not known.

    :ivar total_kbps: KB a second sent, headers and data, after compression.
    :ivar data_kbps: KB a second of the applications' data sent, before compression.
    :ivar entries_ps: entries sent a second.
    :ivar waiting: entries in the writelog that wait for transfer, at the end of the interval.
    :ivar sectors: of 512 bytes, in use in the writelog then.
    :ivar pctwl: percent of the writelog in use then.
    :ivar age_seconds: age of the oldest entry that waits.
    """

    name: str
    total_kbps: float | None = None
    data_kbps: float | None = None
    entries_ps: float | None = None
    waiting: int | None = None
    sectors: int | None = None
    pctwl: float | None = None
    age_seconds: float | None = None


@dataclass(frozen=True)
class GroupSample:
    """A group over one interval, which ends at ``epoch``; ``None``: not known.

    :ivar epoch: seconds since 1970.
    :ivar pctcpu: percent of one core that the mirror daemon's process used.
    :ivar sleep_us: microseconds before each entry is sent.
    :ivar state: the mode that is shown, e.g. ``connected``; ``setup`` while nobody answers.
    :ivar ldsus: in the configuration's order.
    :ivar netkbps: KB a second on the wire, after compression, for the group.
    :ivar lag_seconds: age of the oldest answered entry that the secondary has not committed.
    :ivar writesleep_us: microseconds before a write is answered.
    :ivar limit_kbps: KB a second that the group may send; 0: no limit.
    """

    epoch: float
    pctcpu: float | None = None
    sleep_us: int | None = None
    state: str = "setup"
    ldsus: tuple[LdsuSample, ...] = ()
    netkbps: float | None = None
    lag_seconds: float | None = None
    writesleep_us: int | None = None
    limit_kbps: int | None = None

    @property
    def pctwl(self) -> float | None:
        """Percent in use of the fullest writelog; ``None`` where none is known."""
        return max((one.pctwl for one in self.ldsus if one.pctwl is not None), default=None)


@dataclass(frozen=True)
class Column:
    """One column: its name, the attribute behind it, and how its values are written and read."""

    name: str
    attribute: str
    places: int | None = 0

    def write(self, of: Any) -> str:
        """Give the text of a sample's value."""
        value = getattr(of, self.attribute)
        if value is None:
            return UNKNOWN
        return str(value) if self.places is None else f"{value:.{self.places}f}"

    def read(self, text: str) -> Any:
        """Give the value of a text.

        :raises ValueError: it has none.
        """
        if self.places is None:
            return text
        if text == UNKNOWN:
            return None
        value = float(text) if self.places else int(text)
        if not 0 <= value < float("inf"):
            raise ValueError(text)
        return value


#: Before the LDSUs' columns, and behind them: so that scripts which count from the left stay right.
GROUP_COLUMNS = (
    Column("epoch", "epoch", 3),
    Column("pctcpu", "pctcpu", 1),
    Column("sleep_us", "sleep_us"),
    Column("state", "state", None),
)
GROUP_COLUMNS_BEHIND = (
    Column("netkbps", "netkbps", 2),
    Column("lag_s", "lag_seconds", 3),
    Column("writesleep_us", "writesleep_us"),
    Column("limit_kbps", "limit_kbps"),
)
#: Of each LDSU, its name and a dot before them.
LDSU_COLUMNS = (
    Column("total_kbps", "total_kbps", 2),
    Column("data_kbps", "data_kbps", 2),
    Column("entries_ps", "entries_ps", 2),
    Column("waiting", "waiting"),
    Column("sectors", "sectors"),
    Column("pctwl", "pctwl", 2),
    Column("age_s", "age_seconds", 3),
)
_GROUP = {one.name: one for one in (*GROUP_COLUMNS, *GROUP_COLUMNS_BEHIND)}
_LDSU = {one.name: one for one in LDSU_COLUMNS}


def header(names: Sequence[str]) -> str:
    """Give the line that names the columns, without its end.

    :param names: the LDSUs'.
    """
    columns = [one.name for one in GROUP_COLUMNS]
    columns += [f"{name}.{one.name}" for name in names for one in LDSU_COLUMNS]
    columns += [one.name for one in GROUP_COLUMNS_BEHIND]
    return " ".join(["#", *columns])


def row(sample: GroupSample) -> str:
    """Give a sample as a line, without its end; its values are rounded."""
    values = [one.write(sample) for one in GROUP_COLUMNS]
    values += [one.write(ldsu) for ldsu in sample.ldsus for one in LDSU_COLUMNS]
    values += [one.write(sample) for one in GROUP_COLUMNS_BEHIND]
    return " ".join(values)


@dataclass
class Table:
    """What was read of a performance tracking file.

    :ivar samples: in the file's order.
    :ivar damaged: numbers, from 1, of lines that are no rows; a crash leaves one at most.
    """

    samples: list[GroupSample] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)


def parse(lines: Iterable[str]) -> Table:
    """Read the lines of a performance tracking file; never raises for what they hold."""
    table = Table()
    read: Callable[[str], GroupSample] | None = None
    for number, raw in enumerate(lines, 1):
        line = raw.rstrip("\r\n")
        if line.startswith("#"):
            read = _Layout(line[1:].split())
            continue
        try:
            if read is None:
                raise ValueError(line)
            table.samples.append(read(line))
        except ValueError:
            table.damaged.append(number)
    return table


class _Layout:
    """Reads rows by the line that named their columns."""

    def __init__(self, names: Sequence[str]) -> None:
        self._columns: list[tuple[str, Column] | None] = [_column(name) for name in names]
        places = (one[0] for one in self._columns if one is not None)
        self._ldsus = list(dict.fromkeys(place for place in places if place))

    def __call__(self, line: str) -> GroupSample:
        """Read one row.

        :raises ValueError: it is none of this layout.
        """
        texts = line.split(" ")
        if len(texts) != len(self._columns):
            raise ValueError(line)
        group: dict[str, Any] = {}
        ldsus: dict[str, dict[str, Any]] = {name: {} for name in self._ldsus}
        for place, text in zip(self._columns, texts, strict=True):
            if place is not None:
                name, column = place
                (ldsus[name] if name else group)[column.attribute] = column.read(text)
        if group.get("epoch") is None:
            raise ValueError(line)
        return GroupSample(
            ldsus=tuple(LdsuSample(name, **values) for name, values in ldsus.items()), **group
        )


def _column(name: str) -> tuple[str, Column] | None:
    """Find a column by its name: the LDSU's name, if it is one's; ``None`` for an unknown one."""
    if name in _GROUP:
        return "", _GROUP[name]
    # An LDSU's name may have dots in it; a column's has none.
    ldsu, _, column = name.rpartition(".")
    return (ldsu, _LDSU[column]) if ldsu and column in _LDSU else None
