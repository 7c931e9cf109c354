"""Frames by their place in their LDSU's history, and what a client may find in each sector."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import ClassVar

from qdsmirror.core.frames import (
    BREAK,
    ENTRIES,
    GENESIS,
    REFRESH,
    REFRESH_ZEROES,
    SWITCH,
    VERIFY,
    VOID,
    Entry,
)
from qdsmirror.core.records import Point
from tests.fakes import Unsynced

SECTOR = 512
TAG = 16
_OF_REFRESH = frozenset((REFRESH, REFRESH_ZEROES))
#: Frames that leave a mirror as it is: of a switch, until the refresh begins that it leads to.
_CHANGING_NOTHING = frozenset((BREAK, SWITCH, VERIFY, VOID))


class Violation(Exception):
    """An invariant does not hold; the name comes first.

    Product code that it passes through may take it for an error of its own and go on: ``seen``
    keeps what was raised since it was last cleared.
    """

    seen: ClassVar[list[Violation]] = []

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.seen.append(self)


def payload(number: int, length: int) -> bytes:
    """Give what a write holds: no two sectors that were ever written are alike."""
    first = number << 20
    return b"".join([b"%015x|" % (first + n) * (SECTOR // TAG) for n in range(length // SECTOR)])


def payload_number(tag: bytes) -> int:
    """Give the number of the write that a sector is of; later ones have larger numbers."""
    return int(tag[:-1], 16) >> 20


def tag_of(sector: bytes | bytearray | memoryview) -> bytes:
    return bytes(sector[:TAG])


ZERO_TAG = bytes(TAG)


#: What is to be on the platters: path, byte offset, data.
Written = tuple[str, int, bytes]


class Made:
    """A frame that the driver has made.

    :ivar parent: the frame before it in its LDSU's history; ``None`` for the root.
    :ivar begins_with: of a generation's first frame, what the LDSU held before it, where writes
        had gone past the writelog.
    :ivar control: a control frame's payload: the id of a refresh or bypass.
    :ivar durable: seen on the writelog's platters.
    :ivar skipped: the secondary's history has begun behind it.
    :ivar refreshed: what the mirror that stands here holds since the end of a refresh of another
        generation, which has brought no frame of this LDSU: it was equal.
    :ivar is_loss: it is no frame, but stands for those that were lost with a writelog's memory.
    :ivar journaled: seen on the journal's platters; ``copies``: what was written there.
    """

    __slots__ = (
        "_content", "begins_with", "chain", "control", "copies", "durable", "end", "entries",
        "generation", "gsn_first", "gsn_last", "is_loss", "journaled", "kind", "ldsu", "parent",
        "refreshed", "sequence", "skipped", "writes",
    )  # fmt: skip

    def __init__(
        self,
        ldsu: int,
        parent: Made | None,
        generation: bytes,
        sequence: int,
        chain: bytes,
        kind: int,
        gsns: tuple[int, int],
        entries: Sequence[Entry],
        end: int,
        writes: Sequence[Written],
    ) -> None:
        self.ldsu = ldsu
        self.parent = parent
        self.generation = generation
        self.sequence = sequence
        self.chain = chain
        self.kind = kind
        self.gsn_first, self.gsn_last = gsns
        self.entries = entries
        self.end = end
        self.writes = writes
        self.control = b""
        self.begins_with: bytes | None = None
        self.durable = self.journaled = self.skipped = self.is_loss = False
        self.copies: list[tuple[int, bytes]] = []
        self._content: bytes | None = None
        self.refreshed: bytes | None = None

    @classmethod
    def root(cls, ldsu: int, generation: bytes, content: bytes) -> Made:
        made = cls(ldsu, None, generation, 0, GENESIS, 0, (0, 0), (), 0, ())
        made.durable = made.journaled = True
        made._content = content
        return made

    @classmethod
    def rolled_back(
        cls, ldsu: int, generation: bytes, point: Point, gsn_last: int, content: bytes
    ) -> Made:
        """Give the place where a mirror stands that was rolled back: its history begins there."""
        made = cls(
            ldsu, None, generation, point.sequence - 1, point.chain, 0, (gsn_last, gsn_last),
            (), 0, (),
        )  # fmt: skip
        made.durable = made.journaled = True
        made._content = content
        return made

    @classmethod
    def lost(
        cls, tip: Made, generation: bytes, point: Point, gsn_last: int, content: bytes
    ) -> Made:
        """Give the place behind frames that were lost with a writelog's memory."""
        gsns = (tip.gsn_last + 1, gsn_last)
        sequence, chain = point.sequence - 1, point.chain
        made = cls(tip.ldsu, tip, generation, sequence, chain, VOID, gsns, (), 0, ())
        made.durable = made.journaled = made.is_loss = True
        made._content = content
        return made

    def went_past(self, content: bytes) -> None:
        """Learn what the LDSU holds once writes have gone past the writelog behind a loss."""
        self._content = content

    def content(self) -> bytes:
        """Give the LDSU as it is behind this frame."""
        steps: list[Made] = []
        at = self
        while at._content is None:
            steps.append(at)
            if at.begins_with is not None:
                break
            assert at.parent is not None
            at = at.parent
        if steps:
            content = bytearray(steps[-1].begins_with or at._content or b"")
            for step in reversed(steps):
                if step.kind == ENTRIES:
                    for offset, length, _, data in step.entries:
                        content[offset : offset + length] = bytes(length) if data is None else data
            self._content = bytes(content)
        return self._content  # type: ignore[return-value]

    def mirrored(self) -> bytes:
        """Give what a coherent mirror holds that stands behind this frame.

        Behind a switch it is what it was before the bypass, until the refresh has ended.
        """
        at = self
        while at.refreshed is None and at.kind in _CHANGING_NOTHING and not at.is_loss:
            assert at.parent is not None
            at = at.parent
        return at.content() if at.refreshed is None else at.refreshed

    def line(self) -> str:
        entries = [(e.offset, e.length, e.kind) for e in self.entries]
        return f"LDSU {self.ldsu} frame {self.sequence} GSN {self.gsn_first}-{self.gsn_last} " \
            f"kind {self.kind} {entries}"  # fmt: skip


class Lineage:
    """The generations of one history; each but the first began when a bypass was left.

    :ivar newest: of which frames are made now.
    :param rolled: those that rollbacks have begun: a backfresh may go back to one.
    """

    def __init__(self, first: bytes, rolled: Collection[bytes] = ()) -> None:
        self.newest = first
        self._rolled = rolled
        self._before: dict[bytes, bytes] = {}
        self._contents: dict[bytes, list[bytes]] = {}

    def announce(self, generation: bytes, contents: Sequence[bytes], before: bytes = b"") -> None:
        """Learn of a generation that may begin: the newest one's bypass is being left.

        :param contents: what the LDSUs hold by then, by index.
        :param before: the one that it goes on from; by default the newest.
        """
        self._before[generation] = before or self.newest
        self._contents[generation] = list(contents)

    def knows(self, generation: bytes) -> bool:
        """Tell whether it is one of this history, or may become so."""
        return generation == self.newest or generation in self._before or (
            generation in self.before(self.newest)
        )  # fmt: skip

    def begin(self, generation: bytes) -> bool:
        """Take it for the newest; tell whether it can be."""
        before = self._before.get(generation)
        if before is not None and (before == self.newest or before in self._rolled):
            self.newest = generation
        return generation == self.newest

    def go_back(self, generation: bytes) -> None:
        """Take one before the newest for it: what came after is given up."""
        if generation in self.before(self.newest) or generation in self._rolled:
            self.newest = generation

    def before(self, generation: bytes) -> list[bytes]:
        """Give those before one, newest first."""
        found = []
        while (at := self._before.get(generation)) is not None:
            found.append(at)
            generation = at
        return found

    def began_with(self, generation: bytes, ldsu: int) -> bytes:
        return self._contents[generation][ldsu]


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
        values = self._values.get(at, [])
        allowed = {tag for _, tag in values[bisect_left(values, (since,)) :]}
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
