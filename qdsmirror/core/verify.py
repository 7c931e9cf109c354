"""What a VERIFY frame holds: hashes of parts of an LDSU at its place of the order.

The driver takes them under the range's lock, so that every write before the frame is in them and
none behind it; the secondary compares when it has come to the frame.  So a difference is one, and
never a write on its way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from qdsmirror.core.frames import NUMBERS_END, VERIFY_ROW, Buffer
from qdsmirror.errors import CorruptError, ProtocolError
from qdsmirror.limits import (
    VERIFY_CHUNK_BYTES,
    VERIFY_KEPT_MAX,
    VERIFY_RANGES_MAX,
    VERIFY_ZERO_BYTES_MAX,
)

#: In place of a hash: nothing but zeroes.  (No content has this hash that anybody could find.)
ZEROES = bytes(32)

#: What the secondary's reports on a verify are about.
VERIFY = "verify"

#: (offset, length) in bytes.
Range = tuple[int, int]


class Row(NamedTuple):
    """A part of an LDSU: its offset and length in bytes, and its blake3 hash or ``ZEROES``."""

    offset: int
    length: int
    digest: bytes


class Verdict(NamedTuple):
    """What a secondary found when it came to a VERIFY frame.

    :ivar gsn: the frame's; where it is told again, the last one applied.
    :ivar ldsu: index of the LDSU.
    :ivar differs: what differs, or cannot be read.
    :ivar skipped: why nothing was compared; empty where it was.
    :ivar more: more was found before than can be told again.
    :ivar again: it was found before, at whatever frame, and says nothing of this one.
    """

    gsn: int
    ldsu: int
    differs: Sequence[Range] = ()
    skipped: str = ""
    more: bool = False
    again: bool = False

    def to_json(self) -> dict[str, Any]:
        """Give the form in which it travels back."""
        told: dict[str, Any] = {"gsn": self.gsn, "ldsu": self.ldsu}
        told["differs"] = [list(one) for one in self.differs]
        if self.skipped:
            told["skipped"] = self.skipped
        if self.more:
            told["more"] = True
        if self.again:
            told["again"] = True
        return told

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Verdict:
        """Read :meth:`to_json`'s form.

        :raises ProtocolError: it is of another form.
        """
        try:
            gsn, ldsu, skipped = body["gsn"], body["ldsu"], body.get("skipped", "")
            differs = [(offset, length) for offset, length in body["differs"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"a report on a verify is of another form: {error!r}") from error
        numbers = [gsn, ldsu, *(number for one in differs for number in one)]
        if type(skipped) is not str or any(type(n) is not int or n < 0 for n in numbers):
            raise ProtocolError("a report on a verify is of another form")
        marks = (body.get(name) is True for name in ("more", "again"))
        return cls(gsn, ldsu, differs, skipped, *marks)


def rows_of(offset: int, length: int, digests: bytes) -> list[Row]:
    """Give the rows of a range whose chunks have these digests, one after the other."""
    end = offset + length
    return [
        Row(at, min(VERIFY_CHUNK_BYTES, end - at), digests[32 * number : 32 * number + 32])
        for number, at in enumerate(range(offset, end, VERIFY_CHUNK_BYTES))
    ]


def pack_rows(rows: Iterable[Row]) -> bytes:
    """Make the payload of a VERIFY frame."""
    return b"".join(VERIFY_ROW.pack(*row) for row in rows)


def parse_rows(payload: Buffer) -> list[Row]:
    """Read the payload of a VERIFY frame; its length was checked with the frame's header.

    :raises CorruptError: a part is of no range that a device can have, or longer than one may be.
    """
    rows = [Row(*row) for row in VERIFY_ROW.iter_unpack(payload)]
    for offset, length, digest in rows:
        cap = VERIFY_ZERO_BYTES_MAX if digest == ZEROES else VERIFY_CHUNK_BYTES
        if not 0 < length <= cap or offset + length >= NUMBERS_END:
            raise CorruptError(f"verify: a part of {length} bytes at {offset}")
    return rows


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Join ranges, in order, that touch or overlap."""
    found: list[Range] = []
    for offset, length in sorted(ranges):
        if found and offset <= found[-1][0] + found[-1][1]:
            first, before = found[-1]
            found[-1] = (first, max(before, offset + length - first))
        else:
            found.append((offset, length))
    return found


class Kept:
    """What a secondary keeps of the differences that it found, until a refresh has ended.

    The primary may not have learned of them: they are told again on each new link.

    :param state: as :meth:`to_json` gave it.
    :ivar ranges: by LDSU index; the first of them.
    :ivar more: whether there are others.
    """

    def __init__(self, state: Mapping[str, Any] | None) -> None:
        self.ranges: dict[int, list[Range]] = {}
        self.more = bool(state and state["more"])
        for ldsu, offset, length in state["ranges"] if state else ():
            self.ranges.setdefault(ldsu, []).append((offset, length))

    def add(self, ldsu: int, found: Sequence[Range]) -> None:
        """Take what was found of an LDSU."""
        before = self.ranges.get(ldsu, [])
        ranges = joined([*before, *found])
        count = sum(map(len, self.ranges.values())) - len(before) + len(ranges)
        if count > VERIFY_KEPT_MAX:
            self.more = True
        else:
            self.ranges[ldsu] = ranges

    def to_json(self) -> dict[str, Any]:
        """Give the form that stands in a journal's superblock."""
        rows = [[ldsu, *one] for ldsu, ranges in self.ranges.items() for one in ranges]
        return {"ranges": rows, "more": self.more}

    def verdicts(self, gsn: int) -> list[Verdict]:
        """Give what is told again, by one who has applied everything up to ``gsn``."""
        told = [Verdict(gsn, ldsu, ranges, again=True) for ldsu, ranges in self.ranges.items()]
        return [*told, Verdict(gsn, 0, more=True, again=True)] if self.more else told


class Found:
    """What differs of one LDSU: all of it counted, the first ranges of it kept.

    What was found behind a place that is not yet verified is counted apart: after a crash it is
    found again.

    :param known: bytes counted before; ``ranges``: kept before.
    :ivar bytes: counted; ``ranges``: kept.
    """

    def __init__(self, known: int = 0, ranges: Iterable[Iterable[int]] = ()) -> None:
        self.bytes = known
        self.ranges: list[Range] = [(offset, length) for offset, length in ranges]
        self._fresh: list[Range] = []

    @property
    def total(self) -> int:
        """All bytes that differ."""
        return self.bytes + sum(length for _, length in self._fresh)

    @property
    def shown(self) -> list[Range]:
        """The first of the ranges, in order."""
        return joined([*self.ranges, *self._fresh])[:VERIFY_RANGES_MAX]

    def add(self, ranges: Iterable[Range]) -> None:
        """Take ranges that differ and were not known to."""
        self._fresh = joined([*self._fresh, *ranges])

    def settle(self, upto: int = NUMBERS_END) -> None:
        """Learn that everything before a byte is verified."""
        done = [one for one in self._fresh if one[0] + one[1] <= upto]
        self._fresh = [one for one in self._fresh if one not in done]
        self.bytes += sum(length for _, length in done)
        self.ranges = joined([*self.ranges, *done])[:VERIFY_RANGES_MAX]


class Part(NamedTuple):
    """A part of an LDSU: the LDSU's index, first byte, bytes."""

    unit: int
    offset: int
    length: int


class Flight:
    """A part whose frame the secondary has not reported on.

    :ivar passed: since when the secondary is known to be behind it (the reactor's seconds).
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self.passed: float | None = None
