"""What a pmd sends: the writelogs of a group, merged by GSN, within a window.

Only frames up to the group's durable GSN leave (NO-AHEAD), each checked on the way (rules.md 6).
A frame is remembered until the secondary has committed it; then the driver learns where the
committed part of its log ends.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qdsmirror.core.records import Cursor, Point
from qdsmirror.core.ring import Ring
from qdsmirror.core.stream import Ack
from qdsmirror.core.watermark import Committed
from qdsmirror.errors import CorruptError, DivergedError, ProtocolError
from qdsmirror.groups.band import Band
from qdsmirror.groups.holdback import HoldBack
from qdsmirror.groups.traffic import Traffic
from qdsmirror.interfaces import IWorker
from qdsmirror.limits import MIB, SEND_BUFFER_BYTES, SEND_WINDOW_BYTES_MAX
from qdsmirror.storage.logreader import LogFrame, LogReader

_READ_BYTES_MIN = 64 * 1024


@dataclass
class OutUnit:
    """One LDSU's writelog as the pmd reads it.

    :ivar generations: ids of those that frames may be of; may grow.
    :ivar devices: by their numbers in the ring, the descriptor of each and where the device's first
        byte stands behind it.
    :ivar durable: position up to which it may be read.
    :ivar committed: behind the last frame that the secondary committed.
    """

    index: int
    name: str
    size: int
    devices: Mapping[int, tuple[int, int]]
    log: bytes
    ring: Ring
    generations: set[bytes]
    committed: Cursor
    durable: int
    reader: LogReader | None = None
    buffer: deque[LogFrame] = field(default_factory=deque)

    @classmethod
    def from_info(
        cls, info: dict[str, Any], generations: set[bytes], descriptors: Iterator[int]
    ) -> OutUnit:
        """Make it of what the driver said at attach.

        :param descriptors: as the driver passed them; its own are taken from them.
        """
        return cls(
            index=info["index"],
            name=info["name"],
            size=info["size"],
            devices={number: (next(descriptors), shift) for number, shift in info["devices"]},
            log=bytes.fromhex(info["log"]),
            ring=Ring.from_json(info["ring"]),
            generations=generations,
            committed=Cursor.from_json(info["tail"]),
            durable=info["durable"],
        )

    def read_from(self, cursor: Cursor) -> LogReader:
        """Read the writelog from a cursor, through the descriptors that the driver passed."""
        return LogReader(self._pread, self.ring, self.log, cursor, self.generations)

    def _pread(self, length: int, device: int, offset: int) -> bytes:
        fd, shift = self.devices[device]
        try:
            data = os.pread(fd, length, shift + offset)
        except OSError as error:
            raise CorruptError(f"writelog of {self.name}: {error.strerror} at {offset}") from error
        if len(data) != length:
            raise CorruptError(f"writelog of {self.name}: short read at {offset}")
        return data

    def find(self, point: Point) -> Cursor:
        """Find the place where this LDSU's history stands at ``point`` (rules.md 8); blocking.

        :raises DivergedError: the history never stood there, or that part is gone.
        :raises CorruptError: the writelog cannot be read up to its durable end.
        """
        cursor = self.committed
        if point.sequence < cursor.point(self.index).sequence:
            raise DivergedError(
                f"{self.name}: the secondary lost committed frames (it expects {point.sequence}, "
                f"the writelog begins at {cursor.point(self.index).sequence})",
                hint="make a new mirror with qdsrefresh --full",
            )
        reader = self.read_from(cursor)
        while reader.point(self.index).sequence < point.sequence:
            upto = self.durable
            found = reader.read(MIB, upto)
            if reader.position < upto and not found:
                raise self.unreadable(reader.stopped)
            if not found:
                raise DivergedError(
                    f"{self.name}: the secondary is ahead of the primary (it expects frame "
                    f"{point.sequence}, the writelog ends before "
                    f"{reader.point(self.index).sequence})",
                    hint="make a new mirror with qdsrefresh --full",
                )
            for frame in found:
                if frame.header.sequence + 1 == point.sequence:
                    return self._proven(
                        Cursor(
                            frame.end,
                            frame.header.gsn_last + 1,
                            {self.index: Point(point.sequence, frame.header.chain)},
                        ),
                        point,
                    )
        return self._proven(cursor, point)

    def unreadable(self, why: object) -> CorruptError:
        """Give the error for a writelog that stops before its durable end."""
        return CorruptError(
            f"writelog of {self.name}: cannot be read up to its durable end: {why}",
            hint="its device lost or changed data; see qdswlscan(1)",
        )

    def _proven(self, cursor: Cursor, point: Point) -> Cursor:
        if cursor.point(self.index).chain != point.chain:
            raise DivergedError(
                f"{self.name}: the secondary's history differs from the primary's before frame "
                f"{point.sequence}",
                hint="make a new mirror with qdsrefresh --full",
            )
        return cursor


def _read_on(reader: LogReader, limit: int, durable: int) -> tuple[list[LogFrame], bool]:
    """Read a writelog's next frames; tell also whether it stops before its durable end; blocking.

    A crash may leave pads at the end of what is durable, without their record: then there are none.
    """
    found = reader.read(limit, durable)
    return found, not found and reader.position < durable


class Outbound:
    """The sending side of one session.

    :param worker: reads the writelogs.
    :ivar window: bytes that may be unacknowledged.
    :param committed: told of (sent, committed, mirrored GSN, changed log ends).
    :param failed: told when a writelog cannot be read.
    :param stripe: bytes that are sent as one, more or less, if less than a buffer.
    :param traffic: counts what is sent.
    :param hold_back: what throttles hold it back by.
    """

    def __init__(
        self,
        units: Sequence[OutUnit],
        worker: IWorker,
        window: int,
        committed: Callable[[int, int, int, Iterable[Committed]], None],
        failed: Callable[[CorruptError], None],
        stripe: int = SEND_WINDOW_BYTES_MAX,
        traffic: Traffic | None = None,
        hold_back: HoldBack | None = None,
    ) -> None:
        self._hold_back = hold_back
        self._traffic = traffic or Traffic([unit.name for unit in units])
        self._units = {unit.index: unit for unit in units}
        self._worker = worker
        self.window = window
        self._committed = committed
        self._failed = failed
        self._link: Band | None = None
        self._reading = False
        self._heads: dict[int, OutUnit] = {}
        self._in_flight: deque[tuple[int, int, OutUnit, Cursor]] = deque()
        self._in_flight_bytes = 0
        self._next_gsn = 1
        self._durable_gsn = 0
        self._stripe = stripe
        self._read_bytes = max(_READ_BYTES_MIN, SEND_BUFFER_BYTES // max(1, len(units)))
        self._mirrored = 0

    def begin(
        self, link: Band, cursors: dict[int, Cursor], next_gsn: int, durable_gsn: int
    ) -> None:
        """Send from these places on; what lies before them is committed."""
        self._link = link
        self._next_gsn = next_gsn
        self._durable_gsn = durable_gsn
        for index, cursor in cursors.items():
            unit = self._units[index]
            unit.committed = cursor
            unit.reader = unit.read_from(cursor)
            unit.buffer.clear()
        self._report(self._units.values(), next_gsn - 1)
        self.pump()

    def end(self) -> None:
        """Send nothing more."""
        self._link = None

    def durable(self, gsn: int) -> None:
        """Learn that more is durable, as the units know, and up to which GSN all is."""
        self._durable_gsn = max(gsn, self._durable_gsn)
        self.pump()

    def pump(self) -> None:
        """Send what may be sent; read what is missing for it."""
        while self._link is not None and not self._reading:
            if not self._link.can_send or self._in_flight_bytes >= self.window:
                return
            hungry = [u for u in self._units.values() if not u.buffer and self._unread(u)]
            if hungry:
                self._read(hungry)
                continue
            if not self._send():
                return

    @staticmethod
    def _unread(unit: OutUnit) -> bool:
        return unit.reader is not None and unit.reader.position < unit.durable

    def _send(self) -> bool:
        """Send one buffer of frames; tell whether there were any."""
        batch: list[memoryview] = []
        size = 0
        held = self._hold_back
        portion = min(self._stripe, SEND_BUFFER_BYTES, held.portion if held else SEND_BUFFER_BYTES)
        while size < portion:
            unit = self._heads.get(self._next_gsn)
            if unit is None or unit.buffer[0].header.gsn_last > self._durable_gsn:
                if held is not None:
                    held.idle()
                break
            if held is not None and not held.is_frame_due(unit.buffer[0].header):
                break
            del self._heads[self._next_gsn]
            header, end, frame = unit.buffer.popleft()
            self._next_gsn = header.gsn_last + 1
            batch.append(frame)
            size += len(frame)
            self._traffic.count(header, frame)
            cursor = Cursor(
                end, self._next_gsn, {unit.index: Point(header.sequence + 1, header.chain)}
            )
            self._in_flight.append((header.gsn_last, len(frame), unit, cursor))
            if unit.buffer:
                self._heads[unit.buffer[0].header.gsn_first] = unit
            elif self._unread(unit):
                break
        if not batch or self._link is None:
            return False
        self._in_flight_bytes += size
        self._link.send_frames(batch)
        return True

    def _read(self, hungry: list[OutUnit]) -> None:
        self._reading = True
        limit = self._read_bytes
        readers = [(u.reader, u) for u in hungry if u.reader is not None]

        def job() -> list[tuple[list[LogFrame], bool]]:
            return [_read_on(reader, limit, unit.durable) for reader, unit in readers]

        link = self._link

        def done(
            found: list[tuple[list[LogFrame], bool]] | None, error: BaseException | None
        ) -> None:
            self._reading = False
            if self._link is not link:
                return
            for (reader, unit), (got, torn) in zip(
                readers, found or [([], True)] * len(readers), strict=True
            ):
                if torn:
                    self.end()
                    self._failed(unit.unreadable(error or reader.stopped))
                    return
                if got:
                    unit.buffer.extend(got)
                    self._heads[unit.buffer[0].header.gsn_first] = unit
            self.pump()

        self._worker.run(job, done)

    def acknowledged(self, ack: Ack) -> None:
        """Take an ACK.

        :raises ProtocolError: it acknowledges what was never sent.
        """
        if ack.committed >= self._next_gsn:
            raise ProtocolError(
                f"ACK for GSN {ack.committed}, but only {self._next_gsn - 1} was sent"
            )
        changed: dict[int, OutUnit] = {}
        in_flight = self._in_flight
        while in_flight and in_flight[0][0] <= ack.committed:
            _, size, unit, cursor = in_flight.popleft()
            self._in_flight_bytes -= size
            unit.committed = cursor
            changed[unit.index] = unit
        self._mirrored = ack.mirrored
        self._report(changed.values(), ack.committed)
        self.pump()

    def _report(self, units: Iterable[OutUnit], committed: int) -> None:
        ends = [
            Committed(u.index, u.committed.position, *u.committed.point(u.index)) for u in units
        ]
        self._committed(self._next_gsn - 1, committed, self._mirrored, ends)
