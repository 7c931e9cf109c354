"""Reads a log's frames in order from a cursor, and stops where its history does.

The same reader serves recovery (scan), the pmd (sending) and the replay of a journal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from qdsmirror.core.frames import (
    HEADER_BYTES,
    FrameHeader,
    chain_follows,
    check_body,
    parse_header,
)
from qdsmirror.core.records import (
    FRAME,
    PAD,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    Cursor,
    Point,
    Record,
    parse_placement,
    parse_record,
)
from qdsmirror.core.ring import Ring, align_up
from qdsmirror.errors import CorruptError, LimitError
from qdsmirror.limits import SCAN_AHEAD_BYTES

READ_BYTES = 1 << 20


class LogFrame(NamedTuple):
    """A frame found in a log.

    :ivar end: the position behind its record.
    :ivar frame: its bytes, a view into what was read.
    """

    header: FrameHeader
    end: int
    frame: memoryview


class Ahead(NamedTuple):
    """What stands behind the place where a log's history stops.

    :ivar durable_gsn: the largest durable GSN of the group that an intact frame there names.
    :ivar durable_end: the largest position up to which the log was durable, as an intact
        placement header there says; the history must reach it.
    """

    durable_gsn: int = 0
    durable_end: int = 0


class LogReader:
    """Walks a log from a cursor.

    :param pread: ``pread(length, device, offset)`` gives exactly these bytes of one of the log's
        devices, by number.
    :param log: the log's UUID.
    :param generations: ids of the histories that are valid here (rules.md 7).
    :param contiguous: whether each frame must take up the GSN where the one before it ended, as in
        a journal, which holds every LDSU of the group.
    :ivar stopped: why the last :meth:`read` found nothing more ("" while it did).
    """

    def __init__(
        self,
        pread: Callable[[int, int, int], bytes],
        ring: Ring,
        log: bytes,
        cursor: Cursor,
        generations: Collection[bytes],
        *,
        contiguous: bool = False,
    ) -> None:
        self._pread = pread
        self._ring = ring
        self._log = log
        self._generations = generations
        self._contiguous = contiguous
        self.position = cursor.position
        self._gsn = cursor.gsn
        self._points = dict(cursor.points)
        self._start = cursor
        self.stopped = ""

    @property
    def cursor(self) -> Cursor:
        """The place behind the last frame given."""
        return Cursor(self.position, self._gsn, dict(self._points))

    def point(self, ldsu: int) -> Point:
        """Give where an LDSU's history stands behind the last frame given."""
        return self._points.get(ldsu) or self._start.point(ldsu)

    def read(self, limit: int, end: int | None = None) -> list[LogFrame]:
        """Give the next frames, as many as one read of ``limit`` bytes holds, at least one.

        :param end: a position known to be the end of what may be read.
        :returns: an empty list at the end; ``stopped`` then says why.
        """
        frames: list[LogFrame] = []
        self.stopped = ""
        while not frames and not self.stopped:
            want = min(limit, self._ring.contiguous(self.position))
            if end is not None:
                want = min(want, end - self.position)
                if want < RECORD_HEADER_BYTES:
                    self.stopped = "end"
                    break
            try:
                self._take(self._pread(want, *self._ring.physical(self.position)), frames)
            except CorruptError as error:
                self.stopped = error.message
            except LimitError as error:
                self.stopped = error.message
        return frames

    def _take(self, data: bytes, frames: list[LogFrame]) -> None:
        """Take the records of one read; what it cuts off is read again."""
        view = memoryview(data)
        offset = 0
        while len(view) - offset >= RECORD_HEADER_BYTES:
            try:
                record = parse_record(view[offset:], self._log, self.position)
                self._check_length(record)
                if record.kind == PAD:
                    offset += record.record_bytes
                    self.position += record.record_bytes
                    continue
                if len(view) - offset < record.record_bytes:
                    if offset:
                        return
                    view = memoryview(
                        self._pread(record.record_bytes, *self._ring.physical(self.position))
                    )
                frames.append(self._frame(record, view[offset : offset + record.record_bytes]))
                offset += record.record_bytes
            except (CorruptError, LimitError):
                # What came before is good; the next read, from here, will say what is not.
                if frames:
                    return
                raise

    def _check_length(self, record: Record) -> None:
        rest = self._ring.contiguous(self.position)
        if record.kind == PAD:
            # It filled an extent that may have been joined with another one since.
            if record.record_bytes > rest or record.record_bytes % self._ring.align:
                raise CorruptError("placement header: the pad does not fit its extent")
        elif record.record_bytes > rest:
            raise CorruptError("placement header: the record would wrap")
        elif record.record_bytes != align_up(
            RECORD_HEADER_BYTES + record.frame_bytes, self._ring.align
        ):
            raise CorruptError("placement header: the record has a wrong length")

    def _frame(self, record: Record, raw: memoryview) -> LogFrame:
        frame = raw[RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + record.frame_bytes]
        header = parse_header(frame)
        if header.frame_bytes != record.frame_bytes:
            raise CorruptError("frame and placement header differ in length")
        check_body(header, frame)
        sequence, chain = self.point(header.ldsu)
        if header.generation not in self._generations:
            raise CorruptError(f"frame of another generation ({header.generation.hex()})")
        if header.sequence != sequence or not chain_follows(header, frame[:HEADER_BYTES], chain):
            raise CorruptError(f"chain broken: frame {header.sequence} does not follow here")
        if header.gsn_first < self._gsn or (self._contiguous and header.gsn_first != self._gsn):
            raise CorruptError(f"GSN {header.gsn_first} where {self._gsn} was expected")
        self.position += record.record_bytes
        self._gsn = header.gsn_first + header.gsn_count
        self._points[header.ldsu] = Point(header.sequence + 1, header.chain)
        return LogFrame(header, self.position, frame)

    def look_ahead(self) -> Ahead:
        """Look behind the place where the history stops for what was written after it.

        A tear leaves nothing there that counts the torn record as durable; a record that does tells
        that durable data was damaged (rules.md 6).  Bounded by ``SCAN_AHEAD_BYTES``: more is never
        written while a frame is not yet durable.

        :raises CorruptError: this place was written over in a later turn of the ring, so that the
            cursor comes from a superblock that was replaced since.
        """
        ring = self._ring
        gsn = reach = 0
        position = self.position
        end = position + min(ring.size, SCAN_AHEAD_BYTES)
        while position < end:
            want = min(READ_BYTES, ring.contiguous(position), end - position)
            view = memoryview(self._pread(want, *ring.physical(position)))
            for offset in range(0, len(view), ring.align):
                if view[offset : offset + len(RECORD_MAGIC)] == RECORD_MAGIC:
                    found = self._ahead_in(view[offset:], position + offset)
                    gsn, reach = max(gsn, found.durable_gsn), max(reach, found.durable_end)
            position += len(view)
        return Ahead(gsn, reach)

    def _ahead_in(self, raw: memoryview, position: int) -> Ahead:
        """Give what a record found behind the end says; nothing where it says nothing."""
        try:
            record = parse_placement(raw, self._log)
        except CorruptError:
            return Ahead()
        turns, misplaced = divmod(record.position - position, self._ring.size)
        if misplaced or turns < 0:
            return Ahead()
        if turns > 0:
            raise CorruptError(
                f"the log was written up to position {record.position} at least, but its "
                f"superblock is of a time before position {self.position} was reused"
            )
        try:
            header = parse_header(raw[RECORD_HEADER_BYTES:]) if record.kind == FRAME else None
        except (CorruptError, LimitError):
            header = None
        known = header is not None and header.generation in self._generations
        return Ahead(header.durable_gsn if header is not None and known else 0, record.durable)

    def __iter__(self) -> Iterator[LogFrame]:
        """Give every frame up to where the history stops."""
        while found := self.read(READ_BYTES):
            yield from found
