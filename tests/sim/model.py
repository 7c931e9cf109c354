"""What must be true: every frame ever made, by its place in its LDSU's history, and every write
that a client was told of.

The histories form a tree by chain: a power cut may take frames away, and others follow in their
place.  What the product says of itself is only used to find a place in that tree; then contents
are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from qdsmirror.core import frames
from qdsmirror.core.bitmap import DirtyBitmap
from qdsmirror.core.frames import (
    GENESIS,
    REFRESH,
    REFRESH_END,
    REFRESH_ZEROES,
    Entry,
    parse_header,
)
from qdsmirror.core.records import RECORD_HEADER_BYTES, RECORD_MAGIC, Cursor, Point
from qdsmirror.core.superblock import Superblock
from qdsmirror.core.verify import Row, Verdict
from tests.sim.backfreshes import Backfreshes
from tests.sim.disk import Disk
from tests.sim.history import (
    SECTOR,
    TAG,
    ZERO_TAG,
    Lineage,
    Made,
    Sectors,
    Violation,
    Written,
    first_difference,
    payload_number,
)

_OF_REFRESH = frozenset((REFRESH, REFRESH_ZEROES))


class Model:
    """All frames of one group, and what is known of each.

    :param disks: all of the group, by path.
    :ivar tips: by LDSU, the last frame of the present history; ``held``: the last that the
        secondary has durably.
    :ivar acked: the last GSN that the secondary has acknowledged.
    """

    def __init__(
        self,
        generation: bytes,
        contents: Sequence[bytes],
        disks: Mapping[str, Disk],
        data: Sequence[Disk],
        mirrors: Sequence[Disk],
        journal: Disk,
    ) -> None:
        self.disks, self.data, self.mirrors, self.journal = disks, data, mirrors, journal
        self.made: dict[tuple[int, bytes, bytes], Made] = {}
        #: The generations that rollbacks have begun.
        self.rolled: set[bytes] = set()
        self.tags: dict[tuple[int, bytes], list[Made]] = {}
        self.tips: list[Made] = []
        self.sectors = [Sectors(content) for content in contents]
        self.begin_generation(generation, contents)
        self._pending: list[Made] = []
        self._journal_gsn = 1
        self._ends: dict[bytes, list[Made]] = {}
        #: Tells whether writes go past the writelogs for good: one has failed, durably recorded.
        self.goes_direct: Callable[[], bool] = lambda: False
        #: Tells whether it is on record that an LDSU's data device has failed.
        self.is_exempt: Callable[[int], bool] = lambda _ldsu: False
        #: Tells whether the secondary's journal calls its mirror coherent.
        self.is_coherent: Callable[[], bool] = lambda: False
        #: Gives the generation that the secondary's journal has durably.
        self.journal_generation: Callable[[], bytes] = lambda: b""
        self.backfreshes: Backfreshes
        #: Gives an LDSU's dirty bitmap as it is on the platters.
        self.dirty: Callable[[int], DirtyBitmap]
        #: Whether the writelogs are in memory; whether that was lost since the driver's last start.
        self.in_memory = self.memory_lost = False
        #: LDSUs whose data device has failed: nothing waits for it any more (rules.md 16).
        self.dead: set[int] = set()
        #: LDSUs whose writelog has failed: writes go past it, its end may be lost (rules.md 13).
        self.unlogged: set[int] = set()
        #: What the mirrors held when they were last usable; ``None`` while they are.
        self.usable: list[bytes] | None = None
        self.usable_damaged = False
        #: Whether a rollback is under way.
        self.rolling = False
        #: Whether a checkpoint holds: nothing may be written to a mirror (rules.md 22).
        self.is_held = False
        #: By LDSU, the sectors of its mirror that somebody else has changed, and at which step.
        self.damaged: list[dict[int, int]] = [{} for _ in mirrors]
        #: By LDSU and content, at which step somebody else has written it.
        self._junk: dict[tuple[int, bytes], int] = {}
        self._watch_disks()
        self.counts: dict[str, int] = {}

    def begin_generation(self, generation: bytes, contents: Sequence[bytes]) -> None:
        self.lineage = Lineage(generation, self.rolled)
        self.acked = 0
        self.tips = [
            Made.root(index, generation, content) for index, content in enumerate(contents)
        ]
        for tip in self.tips:
            self.made[tip.ldsu, generation, GENESIS] = tip
        self._applied_checked = list(self.tips)
        self._tail_checked = list(self.tips)
        #: By LDSU, up to where a recovery has found all of it on the data device.
        self._recovered = list(self.tips)
        #: The last frame of each history that the journal's platters held.
        self.held = list(self.tips)

    def _watch_disks(self) -> None:
        self.journal.wrote = self._journal_write
        self.journal.synced = self._journal_synced
        for index, disk in enumerate(self.data):
            disk.wrote = lambda offset, data, index=index: self._data_write(index, offset, data)
        for index, disk in enumerate(self.mirrors):
            disk.wrote = lambda offset, data, index=index: self._mirror_write(index, offset, data)

    def _count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    # -- the driver's frames ------------------------------------------------------------------

    def framed(
        self,
        ldsu: int,
        generation: bytes,
        before: bytes,
        sequence: int,
        chain: bytes,
        kind: int,
        gsns: tuple[int, int],
        entries: Sequence[Entry],
        end: int,
        writes: Sequence[Written],
        control: bytes = b"",
    ) -> None:
        parent = self.find(ldsu, generation, before)
        if parent is None or not self.lineage.begin(generation):
            raise Violation(f"GENERATION: LDSU {ldsu} goes on behind a frame that was never made")
        if sequence != parent.sequence + 1 or gsns[0] <= parent.gsn_last:
            raise Violation(f"PREFIX: LDSU {ldsu}: numbers do not follow {parent.line()}")
        known = self.made.get((ldsu, generation, chain))
        if known is not None:
            # Made once more, after a crash: the same frame in every bit.
            known.writes, known.durable = writes, False
            self.tips[ldsu] = known
            return
        made = Made(ldsu, parent, generation, sequence, chain, kind, gsns, entries, end, writes)
        made.control = control
        if parent.generation != generation:
            made.begins_with = self.lineage.began_with(generation, ldsu)
        self.made[ldsu, generation, chain] = made
        self.tips[ldsu] = made
        if kind == REFRESH_END:
            self._ends.setdefault(control, []).append(made)
        for entry in entries:
            self._tag(made, entry)
            if entry.kind in _OF_REFRESH:
                self._check_chunk(parent, entry)

    def _tag(self, made: Made, entry: Entry) -> None:
        if entry.payload is None:
            return
        data = entry.payload
        for at in range(0, entry.length, SECTOR):
            self.tags.setdefault((made.ldsu, bytes(data[at : at + TAG])), []).append(made)

    def _check_chunk(self, parent: Made, entry: Entry) -> None:
        """COHERENT: a chunk holds what the history before it says (rules.md 14)."""
        offset, length, _, data = entry
        held = self.content_in(parent, self.lineage.newest)[offset : offset + length]
        if held != (bytes(length) if data is None else data):
            raise Violation(f"COHERENT: the chunk at {offset} of LDSU {parent.ldsu} is out of date")

    def content_in(self, tip: Made, generation: bytes) -> bytes:
        """Give what an LDSU holds whose last frame this is, in a generation."""
        if tip.generation != generation:
            return self.lineage.began_with(generation, tip.ldsu)
        return tip.content()

    def is_durable(self, made: Made) -> bool:
        """Tell whether the writelog's platters hold a frame.

        Of one in memory: whether the data device's do, what it wrote or what came later.
        """
        if not made.durable and self.in_memory:
            made.durable = made.ldsu in self.dead or self._undurable_at(made) is None
        elif not made.durable:
            made.durable = all(
                self.disks[path].durable[at : at + len(w)] == w for path, at, w in made.writes
            )
            if made.durable:
                made.writes = ()
        return made.durable

    def _undurable_at(self, made: Made) -> int | None:
        """Give a sector that a frame wrote, and that the data device's platters do not hold."""
        platters = self.data[made.ldsu].durable
        for offset, length, _, data in made.entries:
            if data is None:
                # Zeroes do not tell whose they are, here as below.
                continue
            for at in range(offset, offset + length, SECTOR):
                tag = bytes(platters[at : at + TAG])
                want = bytes(data[at - offset : at - offset + TAG])
                if ZERO_TAG not in (tag, want) and payload_number(tag) < payload_number(want):
                    return at
        return None

    def check_marked(self, ldsu: int, offset: int, length: int) -> None:
        """NO-HIDDEN: of writelogs in memory, what is written is durably known by its bits."""
        dirty = self.dirty(ldsu)
        for at in range(offset, offset + length, SECTOR):
            if not dirty.is_marked(at):
                raise Violation(f"NO-HIDDEN: LDSU {ldsu} is written, and has no bit for {at}")

    def check_answered(self, ldsu: int, offset: int, data: bytes) -> None:
        """NO-HIDDEN: of writelogs in memory, so is an answered write, unless it is committed."""
        if not self.in_memory or self.unlogged:
            return
        dirty = self.dirty(ldsu)
        for at in range(offset, offset + len(data), SECTOR):
            made = self.tags.get((ldsu, data[at - offset : at - offset + TAG]), ())
            if not dirty.is_marked(at) and not any(map(self.is_journaled, made)):
                raise Violation(f"NO-HIDDEN: answered, and LDSU {ldsu} has no bit for {at}")

    def is_safe(self, ldsu: int, number: int, offset: int, length: int) -> bool:
        """Tell whether the platters of writelog or data device hold a write, or a later one."""
        platters = self.data[ldsu].durable
        for at in range(offset, offset + length, SECTOR):
            allowed = self.sectors[ldsu].allowed(at, number)
            if bytes(platters[at : at + TAG]) in allowed or ZERO_TAG in allowed:
                # (Zeroes do not tell whose they are: a power cut will show whether they are safe.)
                continue
            if not any(
                self.is_durable(made) for tag in allowed for made in self.tags.get((ldsu, tag), ())
            ):
                return False
        return True

    def _data_write(self, ldsu: int, offset: int, data: bytes) -> None:
        """NO-HIDDEN: what is written to a data device is durable in its writelog, or its bitmap."""
        self._count("data writes")
        if self.backfreshes.fetching:
            self.backfreshes.check_overwriting(ldsu)
            return
        if self.goes_direct():
            return
        if self.in_memory:
            self._count("direct writes")
            self.check_marked(ldsu, offset, len(data))
            return
        unlogged = [at for at in range(0, len(data), SECTOR) if not self._logged(ldsu, data, at)]
        if not any(data):
            # One write may be of several entries that follow each other.
            sectors = range(0, len(data), SECTOR)
            unlogged = [at for at in sectors if not self._zeroed(ldsu, offset + at, SECTOR)]
        if not unlogged:
            return
        self._count("direct writes")
        dirty = self.dirty(ldsu)
        for at in unlogged:
            if not dirty.is_marked(offset + at):
                raise Violation(
                    f"NO-HIDDEN: LDSU {ldsu} at {offset + at}: {data[at : at + TAG]!r} is written "
                    "to the data device and not durable in the writelog or the dirty bitmap"
                )

    def _logged(self, ldsu: int, data: bytes, at: int) -> bool:
        """Tell whether a frame is durable that wrote this sector (or whether it is zeroes)."""
        tag = data[at : at + TAG]
        return tag == ZERO_TAG or any(
            self.is_durable(made) for made in self.tags.get((ldsu, tag), ())
        )

    def _zeroed(self, ldsu: int, offset: int, length: int) -> bool:
        made: Made | None = self.tips[ldsu]
        while made is not None:
            for entry in made.entries:
                if (
                    entry.payload is None
                    and entry.offset <= offset
                    and offset + length <= entry.offset + entry.length
                    and self.is_durable(made)
                ):
                    return True
            made = made.parent
        return False

    # -- sending ------------------------------------------------------------------------------

    def find(self, ldsu: int, generation: bytes, chain: bytes) -> Made | None:
        """Find a place in a generation's history, which goes on from those before."""
        for one in (generation, *self.lineage.before(generation)):
            made = self.made.get((ldsu, one, chain))
            if made is not None:
                return made
        return None

    def sent(self, frame: memoryview) -> None:
        """NO-AHEAD: only what is durable in the writelog leaves."""
        self._count("frames sent")
        header = parse_header(frame)
        made = self.made.get((header.ldsu, header.generation, header.chain))
        if made is None:
            raise Violation(f"NO-AHEAD: frame {header.sequence} was sent and never made")
        if not self.is_durable(made):
            raise Violation(f"NO-AHEAD: not durable and sent: {made.line()}")

    def told(self, committed: int, generation: bytes) -> None:
        """DURABLE (secondary): only what is durable in the journal is acknowledged."""
        if not self.lineage.knows(generation):
            return
        self._count("ACKs")
        self.acked = max(self.acked, committed)
        for tip in self.tips:
            made = self.upto(tip, committed)
            if not self.is_journaled(made):
                raise Violation(f"TAIL: acknowledged and not in the journal: {made.line()}")

    def rebased(self, ldsu: int, generation: bytes, chain: bytes, next_gsn: int) -> None:
        """Take a new beginning of the secondary's history: a refresh brings what came before."""
        made = self.find(ldsu, generation, chain)
        if made is None:
            raise Violation("GENERATION: the secondary is to begin at a place that never was")
        self.held[ldsu] = made
        self._journal_gsn = next_gsn
        # It may crash before that is durable.
        self.acked = min(self.acked, next_gsn - 1)
        self._skip(made)

    @staticmethod
    def _skip(made: Made) -> None:
        """Count as there what the secondary lacks up to a frame: it is never sent any more.

        A power cut may have left later frames in its journal, behind some that it took.
        """
        while made.parent is not None:
            if made.is_loss or not made.journaled:
                made.journaled = made.skipped = True
            made = made.parent

    @staticmethod
    def upto(made: Made, gsn: int) -> Made:
        """Give the last frame of a history whose numbers are not above ``gsn``."""
        while made.gsn_last > gsn:
            assert made.parent is not None
            made = made.parent
        return made

    # -- the secondary ------------------------------------------------------------------------

    def _journal_write(self, offset: int, data: bytes) -> None:
        if data[:8] != RECORD_MAGIC:
            return
        at = data.find(frames.MAGIC, RECORD_HEADER_BYTES)
        if at != RECORD_HEADER_BYTES:
            return
        header = parse_header(data, at)
        made = self.made.get((header.ldsu, header.generation, header.chain))
        if made is None:
            raise Violation(f"PREFIX: frame {header.sequence} in the journal was never made")
        if header.gsn_first != self._journal_gsn:
            raise Violation(
                f"PREFIX: the journal goes on with GSN {header.gsn_first}, not {self._journal_gsn}"
            )
        self._journal_gsn = header.gsn_last + 1
        if not made.journaled:
            self._pending.append(made)
            made.copies.append((offset, data[: at + header.frame_bytes]))

    def _journal_synced(self) -> None:
        # At once: its place may be used again before anybody asks.
        self._pending = [made for made in self._pending if not self.is_journaled(made)]

    def is_journaled(self, made: Made) -> bool:
        """Tell whether the journal's platters hold a frame."""
        if not made.journaled:
            durable = self.journal.durable
            made.journaled = any(durable[at : at + len(w)] == w for at, w in made.copies)
            if made.journaled:
                made.copies.clear()
                if made.sequence > self.held[made.ldsu].sequence:
                    self.held[made.ldsu] = made
        return made.journaled

    def _mirror_write(self, ldsu: int, offset: int, data: bytes) -> None:
        """PREFIX: what is written to a mirror is durable in the journal."""
        self._count("mirror writes")
        if self.rolling:
            self._restored(ldsu, offset, data)
            return
        if self.is_held:
            raise Violation(f"PREFIX: mirror {ldsu} is written while a checkpoint holds")
        for at in range(0, len(data), SECTOR):
            self.damaged[ldsu].pop(offset + at, None)
            tag = data[at : at + TAG]
            if tag != ZERO_TAG and not any(
                self.is_journaled(made) for made in self.tags.get((ldsu, tag), ())
            ):
                raise Violation(
                    f"PREFIX: LDSU {ldsu} at {offset + at}: {tag!r} is written to the mirror and "
                    "not durable in the journal"
                )

    def _restored(self, ldsu: int, offset: int, data: bytes) -> None:
        """Learn that a rollback brings back what somebody else had changed, or undoes it."""
        for at in range(0, len(data), SECTOR):
            step = self._junk.get((ldsu, data[at : at + SECTOR]))
            if step is None:
                self.damaged[ldsu].pop(offset + at, None)
            else:
                self.damaged[ldsu][offset + at] = step

    def check_mirror(
        self,
        cursor: Cursor,
        superblock: Superblock,
        contents: Sequence[bytes | bytearray],
        reached: Cursor,
    ) -> None:
        """PREFIX, COHERENT, TAIL: what the secondary holds after a replay.

        :param reached: where its journal ends.
        """
        self._journal_gsn = reached.gsn
        self.backfreshes.awaits_replay = False
        self._count("mirrors checked")
        if self.lineage.knows(superblock.generation or b"") and reached.gsn <= self.acked:
            raise Violation(
                f"DURABLE: the secondary acknowledged GSN {self.acked} and holds {reached.gsn - 1}"
            )
        if superblock.generation in self.rolled:
            if superblock.coherent:
                self.check_rolled_back(contents)
            return
        for made in self.check_places(cursor, superblock, contents, self.tips):
            if not self.is_journaled(made):
                raise Violation(f"TAIL: counted and not in the journal: {made.line()}")

    def rolls_back(self, superblock: Superblock) -> None:
        """Learn of a generation that a rollback begins, and where its mirrors will stand."""
        generation, place = superblock.generation, superblock.applied
        self.rolled.add(generation)
        assert self.usable is not None
        for index, content in enumerate(self.usable):
            point = place.point(index)
            made = Made.rolled_back(index, generation, point, place.gsn - 1, content)
            self.made[index, generation, point.chain] = made

    def refresh_begins(self, superblock: Superblock) -> None:
        """Learn that a mirror is about to become unusable."""
        if superblock.coherent:
            self.usable = [bytes(mirror.seen) for mirror in self.mirrors]
            self.usable_damaged = False

    def check_rolled_back(self, contents: Sequence[bytes | bytearray]) -> None:
        """COHERENT: a mirror that was rolled back is what it was when it was last usable."""
        self._count("rolled back mirrors")
        assert self.usable is not None
        if self.usable_damaged:
            # Somebody else has changed it since.
            return
        for index, (content, usable) in enumerate(zip(contents, self.usable, strict=True)):
            if bytes(content) != usable:
                raise Violation(
                    f"COHERENT: mirror {index} was rolled back and differs from what it was at "
                    f"{first_difference(content, usable)}"
                )

    def holds(self, place: Cursor, superblock: Superblock) -> None:
        """PREFIX, DURABLE: a checkpoint holds: its mirrors stand there, and all of it is synced."""
        self._count("checkpoints")
        self.is_held = True
        for index, mirror in enumerate(self.mirrors):
            if mirror.unsynced:
                raise Violation(f"DURABLE: a checkpoint holds, and mirror {index} is not synced")
        contents = [mirror.seen for mirror in self.mirrors]
        if superblock.generation in self.rolled:
            self.check_rolled_back([bytes(content) for content in contents])
        else:
            self.check_places(place, superblock, contents, self.tips)

    def check_places(
        self,
        cursor: Cursor,
        superblock: Superblock,
        contents: Sequence[bytes | bytearray],
        tips: Sequence[Made],
    ) -> list[Made]:
        """Check that the mirrors stand at one place of the order that ends with ``tips``."""
        generation = superblock.generation or self.lineage.newest
        places = []
        for index, content in enumerate(contents):
            made = self._mirrored(index, generation, cursor.point(index))
            if superblock.coherent and self.mended(index, content, made) != made.mirrored():
                raise Violation(
                    f"PREFIX: mirror {index} says it is coherent and differs from the history's "
                    f"prefix up to {made.line()} at {first_difference(content, made.mirrored())}"
                )
            if (
                self.lineage.knows(generation)
                and not self.unlogged
                and self.upto(tips[index], cursor.gsn - 1) is not made
            ):
                raise Violation(
                    f"PREFIX: the secondary stands at GSN {cursor.gsn - 1}, but {made.line()}"
                )
            places.append(made)
        return places

    def _mirrored(self, ldsu: int, generation: bytes, point: Point) -> Made:
        made = self.find(ldsu, generation, point.chain)
        if made is None or made.sequence + 1 != point.sequence:
            raise Violation(f"PREFIX: the mirror of LDSU {ldsu} stands at a place that never was")
        return made

    def mended(self, ldsu: int, content: bytes | bytearray, made: Made) -> bytes:
        """Give a mirror's content without what somebody else has changed in it."""
        found = bytearray(content)
        if self.damaged[ldsu]:
            right = made.mirrored()
            for at in self.damaged[ldsu]:
                found[at : at + SECTOR] = right[at : at + SECTOR]
        return bytes(found)

    def damage(self, ldsu: int, at: int, junk: bytes, step: int) -> bool:
        """Change a sector of a mirror behind everybody's back, if nothing is on its way there."""
        mirror = self.mirrors[ldsu]
        if any(w.offset <= at < w.offset + len(w.data) for w in mirror.unsynced):
            return False
        mirror.seen[at : at + SECTOR] = mirror.durable[at : at + SECTOR] = junk
        self.damaged[ldsu][at] = step
        self._junk[ldsu, junk] = step
        self.usable_damaged = True
        return True

    def compared(
        self, header: frames.FrameHeader, rows: Sequence[Row], found: Verdict, coherent: bool
    ) -> None:
        """LOUD, COHERENT: what differs is told, and nothing else.

        :param coherent: what the mirror said of itself.
        """
        made = self.find(header.ldsu, header.generation, header.chain)
        if made is None:
            raise Violation("LOUD: hashes that were never made are compared")
        self._count("hashes compared")
        right, seen = made.content(), self.mirrors[header.ldsu].seen
        told = {at for offset, size in found.differs for at in range(offset, offset + size, SECTOR)}
        for offset, length, _ in rows:
            sectors = range(offset, offset + length, SECTOR)
            wrong = {at for at in sectors if seen[at : at + SECTOR] != right[at : at + SECTOR]}
            if wrong - told:
                raise Violation(f"LOUD: {made.line()}: not told of: {sorted(wrong)}")
            if told & set(sectors) and not wrong:
                raise Violation(f"COHERENT: a false alarm at {offset}: {made.line()}")
            if coherent and wrong - self.damaged[header.ldsu].keys():
                raise Violation(f"COHERENT: compared too early or too late: {made.line()}")
            self._counted("differences", len(wrong))

    def verified(self, began: int, equal: bool, dirty: Callable[[int], DirtyBitmap]) -> None:
        """LOUD: a complete verify has found everything that differed when it began."""
        self._count("verifies ended")
        for ldsu, sectors in enumerate(self.damaged):
            for at, step in sectors.items():
                if step < began and (equal or not dirty(ldsu).is_marked(at)):
                    raise Violation(f"LOUD: a verify has not found LDSU {ldsu} at {at}")

    def _counted(self, name: str, number: int) -> None:
        if number:
            self.counts[name] = self.counts.get(name, 0) + number

    def journal_recorded(self, before: Superblock, superblock: Superblock) -> None:
        """COHERENT: the mirror is called coherent only behind a refresh's end, all of it synced."""
        if self.rolling:
            return
        if before.coherent or not superblock.coherent:
            return
        self._count("refreshes ended")
        refresh = before.refresh
        ends = self._ends.get(bytes.fromhex(refresh["id"]), []) if refresh is not None else []
        if not ends:
            raise Violation("COHERENT: the mirror is called coherent without a refresh's end")
        if self.unlogged:
            # Where the failed writelog was given up, its history is not known up to the end mark.
            return
        # A driver that was interrupted may have made the end of the same refresh twice.
        wrong = [self._differing(end) for end in ends]
        if all(wrong):
            raise Violation(f"COHERENT: called coherent, and on its platters {wrong[-1]}")
        for tip in self.tips:
            made = self.upto(tip, ends[-1].gsn_last)
            if made.generation != ends[-1].generation:
                made.refreshed = self.content_in(made, ends[-1].generation)

    def _differing(self, end: Made) -> str:
        """Tell where the mirrors' platters hold what was before a frame, or never was."""
        for tip, mirror in zip(self.tips, self.mirrors, strict=True):
            made = self.upto(tip, end.gsn_last)
            content = self.content_in(made, end.generation)
            if mirror.durable == content:
                continue
            for at in range(0, len(content), SECTOR):
                tag = bytes(mirror.durable[at : at + TAG])
                if at in self.damaged[tip.ldsu]:
                    continue
                # In a replay the mirror may hold what comes later in the journal.
                if tag != content[at : at + TAG] and not self._later(made, at, tag):
                    return f"mirror {tip.ldsu} holds {tag!r} at {at}"
        return ""

    # -- superblocks --------------------------------------------------------------------------

    def writelog_recorded(self, superblock: Superblock) -> None:
        """TAIL: what a writelog's superblock calls applied or free is."""
        index = superblock.units[0].index
        if self.memory_lost:
            # Where it goes on is judged once it does.
            return
        if not self.lineage.knows(superblock.generation) or self.backfreshes.ending:
            return
        self._count("superblocks")
        tip = self.tips[index]
        done = self._applied_checked[index]
        self._applied_checked[index] = self._passed(
            tip, done, superblock.applied.position, self._check_applied
        )
        done = self._tail_checked[index]
        self._tail_checked[index] = self._passed(
            tip, done, superblock.tail.position, self._check_committed
        )

    def gives_up_unsendable(self, places: Sequence[Cursor]) -> None:
        """TAIL: what the secondary lacks is given up only where it has another history.

        All of it is on the data devices, and nothing calls the mirror a copy of them.
        """
        self._count("unsendable given up")
        if self.lineage.knows(self.journal_generation()):
            raise Violation("TAIL: given up, and the secondary could have taken it")
        for index, place in enumerate(places):
            tip = self.tips[index]
            if place.point(index).chain != tip.chain:
                raise Violation(f"GENERATION: LDSU {index} goes on elsewhere than {tip.line()}")
            self._applied_checked[index] = self._passed(
                tip, self._applied_checked[index], place.position, self._check_applied
            )
            self._tail_checked[index] = tip
            self._skip(tip)

    def leaves_bypass(self, generation: bytes, before: bytes = b"") -> None:
        """Learn that a writelog's superblock is to name a new generation (rules.md 11).

        :param before: of a mirror that was rolled back, if it goes on from there.
        """
        if self.lineage.knows(generation):
            return
        self._count("generations begun")
        for index, disk in enumerate(self.data):
            if disk.unsynced:
                raise Violation(f"NO-HIDDEN: bypass is left, and of LDSU {index} not all is synced")
        contents = [bytes(disk.durable) for disk in self.data]
        self.lineage.announce(generation, contents, before)
        for tip, content in zip(self.tips, contents, strict=True):
            if tip.is_loss:
                # A refresh that finds its mirror equal to this brings no frame of it.
                tip.went_past(content)

    def controls_behind(self, position: int) -> int:
        """Give how many frames without entries the first writelog holds behind a position."""
        made: Made | None = self.tips[0]
        count = 0
        while made is not None and made.end > position:
            count += not made.entries
            made = made.parent
        return count

    @staticmethod
    def _passed(tip: Made, done: Made, position: int, check: Any) -> Made:
        made = tip
        while made.end > position:
            assert made.parent is not None
            made = made.parent
        last = made
        while made is not done and made.parent is not None and not made.is_loss:
            check(made)
            made = made.parent
        return last if last.end >= done.end else done

    def _check_applied(self, made: Made) -> None:
        """Check that the data device's platters hold a frame, or what came after it."""
        if made.ldsu in self.dead and self.is_exempt(made.ldsu):
            return
        if made.sequence <= self._recovered[made.ldsu].sequence:
            # Found there with all the rest; since then bypass may have changed it.
            return
        durable = self.data[made.ldsu].durable
        for offset, length, kind, data in made.entries:
            if kind in _OF_REFRESH:
                continue
            for at in range(offset, offset + length, SECTOR):
                tag = bytes(durable[at : at + TAG])
                want = ZERO_TAG if data is None else bytes(data[at - offset : at - offset + TAG])
                if (
                    tag != want
                    and not self._later(made, at, tag)
                    and not self.dirty(made.ldsu).is_marked(at)
                ):
                    raise Violation(
                        f"TAIL: the writelog gives up {made.line()}, and the data device does not "
                        f"hold it at {at}: {tag!r}"
                    )

    def _later(self, made: Made, at: int, tag: bytes) -> bool:
        """Tell whether a frame of the present history from ``made`` on wrote this sector so."""
        later = self.tips[made.ldsu]
        while True:
            for offset, length, _, data in later.entries:
                if offset <= at < offset + length and tag == (
                    ZERO_TAG if data is None else bytes(data[at - offset : at - offset + TAG])
                ):
                    return True
            if later is made or later.parent is None:
                return False
            later = later.parent

    def _check_committed(self, made: Made) -> None:
        if not self.is_journaled(made):
            raise Violation(f"TAIL: the tail passes what the secondary lacks: {made.line()}")

    # -- recovery of the primary ----------------------------------------------------------------

    def recovered(
        self,
        generation: bytes,
        points: Sequence[Point],
        next_gsn: int,
        direct: bool,
        lacking: Collection[int] = (),
    ) -> None:
        """DURABLE, NO-AHEAD, NO-HIDDEN, RECOVER: what the driver found.

        :param direct: writes may have gone past the writelogs.
        :param lacking: LDSUs that are closed: a backfresh is to make their data devices whole.
        """
        self._count("recoveries")
        ended = self.backfreshes.ending and not lacking
        self.backfreshes.ending = False
        if ended:
            self._count("backfreshes ended by a restart")
            self.backfreshes.given_up()
            self.lineage.go_back(generation)
        if not self.lineage.begin(generation):
            raise Violation("GENERATION: the driver found another generation")
        lost = self._stand_behind_loss(generation, points, next_gsn, direct, lacking)
        self.memory_lost = False
        for index, point in enumerate(points):
            found = bytes(self.data[index].durable)
            if lost and index in lacking:
                continue
            if lost:
                self.sectors[index].check_survived(found, f"LDSU {index}")
                self.sectors[index].recovered(found, self.data[index].unsynced)
                continue
            tip = self._stand_at(index, point)
            if index in lacking:
                continue
            if ended:
                self.sectors[index].recovered(found, ())
            if index not in self.dead and not self.unlogged:
                self.check_content(tip, found, generation, self.dirty(index) if direct else None)
                self._recovered[index] = tip
            if index not in self.dead:
                self.sectors[index].check_survived(found, f"LDSU {index}")
            self.sectors[index].recovered(found, self.data[index].unsynced)
        if not self.unlogged and next_gsn != 1 + max(tip.gsn_last for tip in self.tips):
            raise Violation(f"RECOVER: GSNs go on at {next_gsn}")

    def _stand_behind_loss(
        self,
        generation: bytes,
        points: Sequence[Point],
        next_gsn: int,
        direct: bool,
        lacking: Collection[int],
    ) -> bool:
        """Go on where writelogs in memory were lost; tell whether it is so.

        GENERATION: where a frame was made that the secondary may not have, nothing may go on as if
        it were not so.
        """
        known = [self.find(i, generation, point.chain) for i, point in enumerate(points)]
        if not self.memory_lost:
            return False
        if self.unlogged:
            # With a failed one among them nothing is sent any more: only the numbers go on.
            for index, made in enumerate(known):
                if made is None:
                    found = bytes(self.data[index].durable)
                    self._stand_behind(index, generation, points[index], next_gsn, found)
            return False
        if None not in known:
            gone = [i for i, made in enumerate(known) if made is not self.tips[i]]
            if gone:
                raise Violation(f"GENERATION: of LDSU {gone[0]} frames are lost without a word")
            return False
        self._count("memories lost")
        if not direct:
            raise Violation("GENERATION: writelogs in memory are lost, and framing goes on")
        for index, (made, point) in enumerate(zip(known, points, strict=True)):
            found = bytes(self.data[index].durable)
            if index not in lacking:
                self._check_covered(index, found)
            if made is None:
                self._stand_behind(index, generation, point, next_gsn, found)
            else:
                # An orderly stop had left this one empty.
                self._stand_at(index, point)
        return True

    def _stand_behind(
        self, index: int, generation: bytes, point: Point, next_gsn: int, found: bytes
    ) -> None:
        made = Made.lost(self.tips[index], generation, point, next_gsn - 1, found)
        self.made[index, generation, point.chain] = self.tips[index] = made
        self._applied_checked[index] = self._tail_checked[index] = made

    def _check_covered(self, ldsu: int, found: bytes) -> None:
        """NO-HIDDEN: where a device differs from a coherent mirror, a bit says so."""
        if not self.is_coherent() or ldsu in self.dead:
            return
        self.check_difference(self.held[ldsu], found, self.dirty(ldsu))

    @staticmethod
    def check_difference(last: Made, found: bytes, dirty: DirtyBitmap) -> None:
        """Check that dirty bits stand for what a secondary lacks.

        :param last: the last frame that it has.
        """
        held = last.mirrored()
        for at in range(0, len(found), SECTOR):
            if found[at : at + SECTOR] != held[at : at + SECTOR] and not dirty.is_marked(at):
                raise Violation(
                    f"NO-HIDDEN: data device {last.ldsu} differs from what the secondary holds at "
                    f"{at}, and no dirty bit says so"
                )

    def _stand_at(self, index: int, point: Point) -> Made:
        """Take the place in a history that a recovered driver goes on from."""
        tip = self.find(index, self.lineage.newest, point.chain)
        if tip is None or tip.sequence + 1 != point.sequence:
            raise Violation(f"RECOVER: LDSU {index} goes on at a place that never was")
        if index not in self.unlogged:
            self.check_kept(self.held[index], tip)
        self.tips[index] = tip
        self._mark_durable(tip)
        self._applied_checked[index] = self._tail_checked[index] = tip
        return tip

    def check_content(
        self, tip: Made, found: bytes, generation: bytes, dirty: DirtyBitmap | None
    ) -> None:
        """Check that a data device holds its history, all of it and nothing else.

        :param dirty: in bypass: it may differ where this says so.
        """
        content = self.content_in(tip, generation)
        if found == content:
            return
        if dirty is None:
            raise Violation(
                f"RECOVER: data device {tip.ldsu} differs from the history up to {tip.line()} at "
                f"{first_difference(found, content)}"
            )
        for at in range(0, len(found), SECTOR):
            if found[at : at + SECTOR] != content[at : at + SECTOR] and not dirty.is_marked(at):
                raise Violation(
                    f"NO-HIDDEN: data device {tip.ldsu} differs at {at}, and no dirty bit says so"
                )

    @staticmethod
    def check_kept(held: Made, tip: Made) -> None:
        """Check that what the secondary holds is still part of the history."""
        at: Made | None = tip
        while at is not None:
            if at is held:
                return
            at = at.parent
        raise Violation(f"NO-AHEAD: the primary lost what the secondary holds: {held.line()}")

    @staticmethod
    def _mark_durable(tip: Made) -> None:
        at: Made | None = tip
        while at is not None and not at.durable:
            at.durable = True
            at.writes = ()
            at = at.parent
