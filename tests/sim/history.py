"""Frames by their place in their LDSU's history, and what a client may find in each sector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from qdsmirror.core.frames import (
    ENTRIES,
    GENESIS,
    REFRESH,
    REFRESH_ZEROES,
    Entry,
)
from tests.fakes import Unsynced

SECTOR = 512
TAG = 16
_OF_REFRESH = frozenset((REFRESH, REFRESH_ZEROES))


class Violation(Exception):
    """An invariant does not hold; the name comes first.

    Product code that it passes through may take it for an error of its own and go on: ``seen``
    keeps what was raised since it was last cleared.
    """

    seen: ClassVar[list[Violation]] = []

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.seen.append(self)

    @property
    def invariant(self) -> str:
        return str(self).split(":")[0]


def payload(number: int, length: int) -> bytes:
    """Give what a write holds: no two sectors that were ever written are alike."""
    first = number << 20
    return b"".join([b"%015x|" % (first + n) * (SECTOR // TAG) for n in range(length // SECTOR)])


def tag_of(sector: bytes | bytearray | memoryview) -> bytes:
    return bytes(sector[:TAG])


ZERO_TAG = bytes(TAG)


class Made:
    """A frame that the driver has made.

    :ivar parent: the frame before it in its LDSU's history; ``None`` for the root.
    :ivar control: a control frame's payload: the id of a refresh or bypass.
    :ivar durable: seen on the writelog's platters.
    :ivar journaled: seen on the journal's platters; ``copies``: what was written there.
    """

    __slots__ = (
        "_content", "chain", "control", "copies", "durable", "end", "entries", "gsn_first",
        "gsn_last", "journaled", "kind", "ldsu", "parent", "sequence", "writes",
    )  # fmt: skip

    def __init__(
        self,
        ldsu: int,
        parent: Made | None,
        sequence: int,
        chain: bytes,
        kind: int,
        gsns: tuple[int, int],
        entries: Sequence[Entry],
        end: int,
        writes: Sequence[tuple[int, bytes]],
    ) -> None:
        self.ldsu = ldsu
        self.parent = parent
        self.sequence = sequence
        self.chain = chain
        self.kind = kind
        self.gsn_first, self.gsn_last = gsns
        self.entries = entries
        self.end = end
        self.writes = writes
        self.control = b""
        self.durable = self.journaled = False
        self.copies: list[tuple[int, bytes]] = []
        self._content: bytes | None = None

    @classmethod
    def root(cls, ldsu: int, content: bytes) -> Made:
        made = cls(ldsu, None, 0, GENESIS, 0, (0, 0), (), 0, ())
        made.durable = made.journaled = True
        made._content = content
        return made

    def content(self) -> bytes:
        """Give the LDSU as it is behind this frame."""
        steps: list[Made] = []
        at = self
        while at._content is None:
            steps.append(at)
            assert at.parent is not None
            at = at.parent
        if steps:
            content = bytearray(at._content)
            for step in reversed(steps):
                if step.kind == ENTRIES:
                    for offset, length, _, data in step.entries:
                        content[offset : offset + length] = bytes(length) if data is None else data
            self._content = bytes(content)
        return self._content  # type: ignore[return-value]

    def line(self) -> str:
        entries = [(e.offset, e.length, e.kind) for e in self.entries]
        return f"LDSU {self.ldsu} frame {self.sequence} GSN {self.gsn_first}-{self.gsn_last} " \
            f"kind {self.kind} {entries}"  # fmt: skip


class Sectors:
    """What a client may find in each sector of an LDSU.

    Values are kept in the order in which they were written, from the one that must survive a
    power cut on; each write is known by its number.
    """

    def __init__(self, content: bytes) -> None:
        self._base = content
        self._values: dict[int, list[tuple[int, bytes]]] = {}
        self._safe: dict[int, int] = {}
        self._answered: dict[int, int] = {}

    def copy(self) -> Sectors:
        """Give the promises as they stand."""
        other = Sectors(self._base)
        other._values = {at: list(values) for at, values in self._values.items()}
        other._safe = dict(self._safe)
        return other

    def fingerprint(self) -> bytes:
        """Give bytes that tell other promises from these."""
        return repr(sorted(self._safe.items())).encode()

    def write(self, number: int, offset: int, length: int, data: bytes | None) -> None:
        for at in range(offset, offset + length, SECTOR):
            tag = ZERO_TAG if data is None else data[at - offset : at - offset + TAG]
            self._values.setdefault(at, []).append((number, tag))

    def answered(self, number: int, offset: int, length: int) -> None:
        for at in range(offset, offset + length, SECTOR):
            self._answered[at] = max(number, self._answered.get(at, 0))

    def made_safe(self, number: int, offset: int, length: int) -> None:
        for at in range(offset, offset + length, SECTOR):
            self._safe[at] = max(number, self._safe.get(at, 0))

    def allowed(self, at: int, since: int) -> set[bytes]:
        values = self._values.get(at, ())
        allowed = {tag for number, tag in values if number >= since}
        if not since:
            allowed.add(self._base[at : at + TAG])
        return allowed

    def check_survived(self, content: bytes, what: str) -> None:
        """DURABLE: nothing that was promised is gone."""
        for at in self._values:
            if tag_of(content[at : at + TAG]) not in self.allowed(at, self._safe.get(at, 0)):
                raise Violation(
                    f"DURABLE: {what} at {at}: {tag_of(content[at:at + TAG])!r}, not one of "
                    f"{sorted(self.allowed(at, self._safe.get(at, 0)))}"
                )  # fmt: skip
        self._check_rest(content, what)

    def _check_rest(self, content: bytes, what: str) -> None:
        masked = bytearray(content)
        for at in self._values:
            masked[at : at + SECTOR] = self._base[at : at + SECTOR]
        if masked != self._base:
            raise Violation(f"DURABLE: {what} differs where nothing was written")

    def expect(self, offset: int, length: int) -> dict[int, int]:
        """Give the newest answered write of each sector, for a read that begins now."""
        return {at: self._answered.get(at, 0) for at in range(offset, offset + length, SECTOR)}

    def check_read(self, expected: dict[int, int], offset: int, data: bytes, what: str) -> None:
        for at, since in expected.items():
            tag = tag_of(data[at - offset : at - offset + TAG])
            if tag not in self.allowed(at, since):
                raise Violation(
                    f"READ: {what} at {at} gives {tag!r}, not one of "
                    f"{sorted(self.allowed(at, since))}"
                )

    def recovered(self, content: bytes, unsynced: Sequence[Unsynced]) -> None:
        """Begin anew: what recovery found on the platters may not be lost any more.

        :param unsynced: what may yet come there, where writes went past the writelog.
        """
        self._base = content
        self._values.clear()
        self._safe.clear()
        self._answered.clear()
        for offset, data in unsynced:
            self.write(0, offset, len(data), data)


def first_difference(one: bytes | bytearray, other: bytes | bytearray) -> str:
    for at in range(0, len(one), SECTOR):
        if one[at : at + SECTOR] != other[at : at + SECTOR]:
            return f"{at}: {tag_of(one[at : at + TAG])!r}, not {tag_of(other[at : at + TAG])!r}"
    return "nothing"
