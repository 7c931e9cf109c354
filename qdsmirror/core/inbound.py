"""What the secondary checks of every frame before it takes it (rules.md 2, 7, 8; security.md 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qdsmirror.core.frames import (
    ENTRIES,
    MARK,
    SWITCH,
    VERIFY,
    Buffer,
    Entry,
    FrameHeader,
    chain_follows,
    check_body,
    control_payload,
    entries,
    parse_header,
)
from qdsmirror.core.generations import covering
from qdsmirror.core.held import mark_name
from qdsmirror.core.records import Cursor, Generation, Point
from qdsmirror.core.verify import Row, parse_rows
from qdsmirror.errors import CorruptError, DivergedError, ProtocolError


class Intake:
    """Follows a group's history frame by frame.

    :param cursor: where it stands.
    :param sizes: bytes of each LDSU's mirror device, by index.
    :param generations: the histories that are valid; none while the secondary is blank, and then
        the first frame's becomes the one.
    :ivar generations: likewise, with those that frames have brought since.
    """

    def __init__(
        self, cursor: Cursor, sizes: Sequence[int], generations: Sequence[Generation]
    ) -> None:
        self._sizes = sizes
        self.generations = tuple(generations)
        self.gsn = cursor.gsn
        self._points: dict[int, Point] = dict(cursor.points)
        self._start = cursor

    def point(self, ldsu: int) -> Point:
        """Give where an LDSU's history stands behind the frames taken."""
        return self._points.get(ldsu) or self._start.point(ldsu)

    @property
    def points(self) -> Mapping[int, Point]:
        """A copy of all LDSUs' points."""
        return dict(self._points)

    def check(self, frame: Buffer) -> tuple[FrameHeader, Sequence[Entry]]:
        """Check that a frame is intact, comes next, and stays on its device; take it.

        :raises ProtocolError: it is damaged, out of order, or reaches beyond its device.
        :raises DivergedError: it belongs to another history.
        """
        try:
            header = parse_header(frame)
            check_body(header, frame)
            found = entries(header, frame) if header.kind == ENTRIES else ()
            rows = parse_rows(control_payload(header, frame)) if header.kind == VERIFY else ()
            if header.kind == MARK:
                mark_name(control_payload(header, frame))
        except CorruptError as error:
            raise ProtocolError(f"damaged frame: {error.message}") from error
        if header.ldsu >= len(self._sizes):
            raise ProtocolError(f"frame for LDSU {header.ldsu}, which is not mapped")
        brings = self._check_generation(header, frame)
        if header.gsn_first != self.gsn:
            raise ProtocolError(f"frame with GSN {header.gsn_first} where {self.gsn} comes next")
        sequence, chain = self.point(header.ldsu)
        if header.sequence != sequence or not chain_follows(header, frame, chain):
            raise DivergedError(
                f"frame {header.sequence} of LDSU {header.ldsu} does not continue its history"
            )
        self._check_ranges(header.ldsu, found, rows)
        if brings:
            added = Generation(header.generation, header.gsn_first)
            self.generations = (*self.generations, added)
        self.gsn = header.gsn_first + header.gsn_count
        self._points[header.ldsu] = Point(header.sequence + 1, header.chain)
        return header, found

    def _check_ranges(self, ldsu: int, found: Sequence[Entry], rows: Sequence[Row]) -> None:
        """Check that what a frame writes or compares is on its device.

        :raises ProtocolError: it is not.
        """
        size = self._sizes[ldsu]
        ranges = [(entry[0], entry[1]) for entry in found]
        for offset, length in ranges + [(row.offset, row.length) for row in rows]:
            if offset + length > size:
                raise ProtocolError(f"entry of {length} bytes at {offset} is beyond LDSU {ldsu}")

    def _check_generation(self, header: FrameHeader, frame: Buffer) -> bool:
        """Check a frame's generation; tell whether it is one that the list lacks (rules.md 7).

        Only a switch that names the newest one brings another.  A crash may have come between its
        taking and its frame's: then the list has it already.

        :raises DivergedError: the frame is not of the generation that its number belongs to, or
            another than a switch is a generation's first.
        """
        known = self.generations
        if not known:
            return True
        at = covering(known, header.gsn_first)
        names = control_payload(header, frame) if header.kind == SWITCH else b""
        if at is not None and header.generation == known[at].id:
            if header.gsn_first != known[at].first_gsn:
                fits = not names
            else:
                # Where the list begins with it, nothing tells what came before.
                fits = not at or names == known[at - 1].id
            if fits:
                return False
        elif (
            at == len(known) - 1
            and names == known[-1].id
            and all(header.generation != one.id for one in known)
        ):
            return True
        raise DivergedError(f"frame of another generation: {header.generation.hex()}")
