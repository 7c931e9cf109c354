"""The reader of a log: where it stops, and what it looks at behind that."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.frames import HEADER_BYTES, VOID
from qdsmirror.core.records import (
    FRAME,
    PAD,
    RECORD_HEADER_BYTES,
    Cursor,
    Record,
    pack_record,
)
from qdsmirror.core.ring import Ring
from qdsmirror.errors import CorruptError
from qdsmirror.limits import FRAME_BYTES_MAX, SCAN_AHEAD_BYTES
from qdsmirror.storage import logreader
from qdsmirror.storage.logreader import Ahead, LogReader
from qdsmirror.storage.writelog import Writelog
from tests.fakes import MemoryDevice
from tests.storage.logworld import (
    GENERATION,
    KIB,
    LOG,
    OTHER_GENERATION,
    FrameMaker,
    append,
    initialise,
    write,
)

SIZE = 150 * KIB
BLOCK = 4096


class ReaderTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.device = MemoryDevice(SIZE)
        self.log = initialise(self.device)
        self.maker = FrameMaker()

    def fill(self, sizes: Sequence[int], durable: Sequence[int] = ()) -> list[bytes]:
        frames = []
        for number, size in enumerate(sizes):
            frames.append(
                self.maker.make(
                    0,
                    [write(0, bytes([number + 1]) * size)],
                    durable=durable[number] if durable else 0,
                )
            )
            append(self.log, frames[-1])
        return frames

    def read(self, cursor: Cursor | None = None) -> tuple[list[bytes], LogReader]:
        reader = self.log.reader(cursor or Cursor())
        return [bytes(found.frame) for found in reader], reader

    def test_reads_what_was_appended(self) -> None:
        frames = self.fill([10, 9000, 4000, 1])
        found, reader = self.read()
        self.assertEqual(found, frames)
        self.assertEqual(reader.position, self.log.head)
        self.assertEqual(reader.cursor, Cursor(self.log.head, 5, dict(self.maker.points)))
        self.assertEqual(reader.stopped, "no record here")

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(st.integers(1, 20_000), min_size=1, max_size=40),
        st.sampled_from([BLOCK, 2 * BLOCK, 7 * BLOCK, 1 << 20]),
    )
    def test_goes_round_in_reads_of_any_size(self, sizes: list[int], limit: int) -> None:
        device = MemoryDevice(SIZE)
        log = initialise(device)
        maker = FrameMaker()
        reader = log.reader(Cursor())
        for size in sizes:
            frame = maker.make(0, [write(0, b"x" * size)])
            append(log, frame)
            (found,) = reader.read(limit, log.head)
            self.assertEqual(bytes(found.frame), frame)
            self.assertEqual(found.end, log.head)
            self.assertEqual(reader.read(limit, log.head), [])
            self.assertEqual(reader.stopped, "end")
            # As the driver does once it is committed and applied.
            log.update(tail=reader.cursor, applied=reader.cursor, head=reader.cursor)

    def test_many_frames_in_one_read(self) -> None:
        frames = self.fill([100] * 10)
        reader = self.log.reader(Cursor())
        self.assertEqual([bytes(f.frame) for f in reader.read(1 << 20)], frames)
        self.assertEqual(reader.read(1 << 20), [])

    def test_stops_at_the_end_it_was_told(self) -> None:
        frames = self.fill([100] * 3)
        reader = self.log.reader(Cursor())
        self.assertEqual([bytes(f.frame) for f in reader.read(1 << 20, 2 * BLOCK)], frames[:2])
        for end in (2 * BLOCK, 2 * BLOCK + 20, 0):
            self.assertEqual(reader.read(1 << 20, end), [])
            self.assertEqual(reader.stopped, "end")

    # -- what must not be accepted --------------------------------------------------------------

    def test_stale_frame_of_an_older_turn(self) -> None:
        blocks = self.log.ring.size // BLOCK
        for _ in range(blocks):
            frame = self.maker.make(0, [write(0, b"a" * 100)])
            placement = self.log.ring.place(
                self.log.head, self.log.head, RECORD_HEADER_BYTES + len(frame)
            )
            assert placement is not None
            self.log.head = placement.end
            self.log.write(self.log.record(placement, len(frame), [frame], 0))
        cursor = Cursor(self.log.head, self.maker.gsn, dict(self.maker.points))
        found, reader = self.read(cursor)
        self.assertEqual(found, [])
        self.assertIn("belongs to position 0", reader.stopped)
        self.assertEqual(reader.look_ahead(), Ahead(), "older turns tell nothing")

    def test_of_another_log(self) -> None:
        self.fill([100, 100])
        old = self.device.content()
        again = MemoryDevice(SIZE, content=old)
        self.log = initialise(again, log=bytes(16))
        found, reader = self.read()
        self.assertEqual(found, [])
        self.assertIn("another log", reader.stopped)
        self.assertEqual(reader.look_ahead(), Ahead())

    def test_of_another_generation(self) -> None:
        frame = self.maker.make(0, [write(0, b"x")], generation=OTHER_GENERATION, durable=9)
        append(self.log, frame)
        found, reader = self.read()
        self.assertEqual(found, [])
        self.assertIn("another generation", reader.stopped)
        self.assertEqual(reader.look_ahead(), Ahead())

    def test_misdirected(self) -> None:
        self.fill([100, 100])
        start = self.log.ring.start
        record = self.device.content()[start : start + BLOCK]
        self.device.corrupt(start + 2 * BLOCK, record)
        found, reader = self.read()
        self.assertEqual(len(found), 2)
        self.assertIn("belongs to position 0", reader.stopped)
        # And over a record that is needed: stops before it.
        self.device.corrupt(start + BLOCK, record)
        found, reader = self.read()
        self.assertEqual(len(found), 1)

    def test_two_records_swapped(self) -> None:
        self.fill([100, 100])
        start = self.log.ring.start
        raw = self.device.content()
        self.device.corrupt(
            start, raw[start + BLOCK : start + 2 * BLOCK] + raw[start : start + BLOCK]
        )
        self.assertEqual(self.read()[0], [])

    def test_the_chain_refuses_a_stale_follower(self) -> None:
        # rules.md 2: n and n+1 unsynced, only n+1 survives, recovery writes n' of n's length.
        self.fill([100])
        self.device.fdatasync()
        points, gsn, head = dict(self.maker.points), self.maker.gsn, self.log.head
        self.fill([200, 300])
        lost = self.log.ring.physical(head).offset
        device = self.device.crash(lambda w: [] if w.offset == lost else [(0, len(w.data))])
        self.log = Writelog(device, self.log.superblock)
        found, reader = self.read()
        self.assertEqual((len(found), reader.position), (1, head))
        self.assertEqual(reader.look_ahead().durable_gsn, 0, "the survivor was not durable")
        self.log.head, self.maker.points, self.maker.gsn = head, points, gsn
        append(self.log, self.maker.make(0, [write(0, b"n" * 200)]))
        found, reader = self.read()
        self.assertEqual(len(found), 2)
        self.assertIn("chain broken", reader.stopped)

    def test_numbers_that_go_back_or_leave_a_hole(self) -> None:
        self.fill([100])
        append(self.log, self.maker.make(0, [write(0, b"x")], gsn_first=9))
        found, reader = self.read()
        self.assertEqual(len(found), 2, "other logs hold what is between")
        contiguous = self.log.reader(Cursor(), contiguous=True)
        self.assertEqual(len(list(contiguous)), 1)
        self.assertIn("GSN 9 where 2 was expected", contiguous.stopped)
        append(self.log, self.maker.make(0, [write(0, b"x")], gsn_first=5))
        found, reader = self.read()
        self.assertEqual(len(found), 2)
        self.assertIn("GSN 5 where 10 was expected", reader.stopped)

    def test_a_sequence_that_is_skipped(self) -> None:
        append(self.log, self.maker.make(0, [write(0, b"x")], sequence=2))
        self.assertIn("chain broken", self.read()[1].stopped)

    # -- lengths ---------------------------------------------------------------------------------

    def place(self, kind: int, record: int, frame: int, position: int = 0) -> None:
        raw = pack_record(Record(kind, record, frame, position, 0), LOG)
        self.device.corrupt(self.log.ring.physical(position).offset, raw)

    def test_lengths_that_cannot_be(self) -> None:
        size = self.log.ring.size
        for kind, record, frame, text in (
            (FRAME, 2 * BLOCK, 200, "wrong length"),
            (FRAME, BLOCK + 1, 200, "wrong length"),
            (FRAME, size + BLOCK, size, "would wrap"),
            (FRAME, (1 << 32) - 1, FRAME_BYTES_MAX, "would wrap"),
            (PAD, BLOCK + 1, 0, "the pad does not fit"),
            (PAD, size + BLOCK, 0, "the pad does not fit"),
        ):
            self.place(kind, record, frame)
            found, reader = self.read()
            self.assertEqual(found, [])
            self.assertIn(text, reader.stopped)

    def test_lengths_that_contradict_each_other(self) -> None:
        frame = self.maker.make(0, [write(0, b"abc")])
        self.device.corrupt(self.log.ring.start + RECORD_HEADER_BYTES, frame)
        self.place(FRAME, BLOCK, len(frame) + 1)
        self.assertIn("differ in length", self.read()[1].stopped)

    def test_pads_alone_end(self) -> None:
        self.place(PAD, self.log.ring.size, 0)
        found, reader = self.read()
        self.assertEqual((found, reader.position), ([], self.log.ring.size))

    def test_a_pad_that_filled_an_extent_which_was_joined_since(self) -> None:
        self.place(PAD, 2 * BLOCK, 0)
        self.log.head = 2 * BLOCK
        frames = self.fill([100])
        found, reader = self.read()
        self.assertEqual((found, reader.position), (frames, 3 * BLOCK))

    @settings(max_examples=100, deadline=None)
    @given(st.integers(0, 33 * BLOCK - 300), st.binary(min_size=1, max_size=300))
    def test_arbitrary_bytes_in_the_ring(self, at: int, junk: bytes) -> None:
        device = MemoryDevice(SIZE)
        log = initialise(device)
        maker = FrameMaker()
        frames = [maker.make(0, [write(0, b"x" * 5000)]) for _ in range(6)]
        for frame in frames:
            append(log, frame)
        device.corrupt(log.ring.start + at, junk)
        sizes: list[int] = []

        def pread(length: int, number: int, offset: int) -> bytes:
            sizes.append(length)
            return device.pread(length, offset)

        reader = LogReader(pread, log.ring, LOG, Cursor(), [GENERATION])
        found = [bytes(f.frame) for f in reader]
        self.assertEqual(found, frames[: len(found)])
        self.assertLessEqual(max(sizes), max(logreader.READ_BYTES, FRAME_BYTES_MAX + BLOCK))
        reader.look_ahead()

    # -- behind the end ---------------------------------------------------------------------------

    def test_looks_behind_a_damaged_frame(self) -> None:
        self.fill([100] * 5, durable=[0, 0, 1, 1, 3])
        for block, expected in ((0, 3), (1, 3), (3, 3), (4, 0)):
            whole = self.device.content()
            at = self.log.ring.start + block * BLOCK + 100
            self.device.corrupt(at, bytes([whole[at] ^ 1]))
            found, reader = self.read()
            self.assertEqual(len(found), block)
            self.assertEqual(reader.look_ahead(), Ahead(expected))
            self.device.corrupt(0, whole)

    def test_looks_behind_a_damaged_placement_header_and_across_the_end(self) -> None:
        blocks = self.log.ring.size // BLOCK
        start = (blocks - 2) * BLOCK
        self.log.head = self.log.durable_tail = start
        self.fill([100] * 4, durable=[0, 0, 0, 2])
        self.log.device.pwritev([bytes(8)], self.log.ring.physical(start).offset)
        reader = self.log.reader(Cursor(start, 1))
        self.assertEqual(list(reader), [])
        self.assertEqual(reader.look_ahead(), Ahead(2))

    def test_a_damaged_frame_behind_tells_nothing(self) -> None:
        self.fill([100] * 2, durable=[0, 1])
        ring = self.log.ring.start
        self.device.corrupt(ring, bytes(8))
        self.device.corrupt(ring + BLOCK + RECORD_HEADER_BYTES + HEADER_BYTES - 1, b"\xff")
        reader = self.log.reader(Cursor())
        list(reader)
        self.assertEqual(reader.look_ahead(), Ahead())

    def test_a_durable_position_is_told_by_records_and_pads(self) -> None:
        # A frame, then what was written when it was durable: its placement header is enough.
        append(self.log, self.maker.make(0, [write(0, b"x")]))
        ring = self.log.ring
        for kind in (FRAME, PAD):
            raw = pack_record(Record(kind, BLOCK, 0, BLOCK, BLOCK), LOG)
            self.device.corrupt(ring.start + BLOCK, raw)
            whole = self.device.content()
            reader = self.log.reader(Cursor())
            self.device.corrupt(ring.start + 100, b"\xff")
            self.assertEqual(list(reader), [])
            self.assertEqual(reader.look_ahead(), Ahead(0, BLOCK))
            self.device.corrupt(0, whole)

    def test_a_later_turn_tells_that_the_superblock_is_old(self) -> None:
        size = self.log.ring.size
        self.log.head, self.log.durable_tail = size, size
        self.fill([100])
        reader = self.log.reader(Cursor())
        self.assertEqual(list(reader), [])
        with self.assertRaisesRegex(CorruptError, f"written up to position {size} at least"):
            reader.look_ahead()

    def test_the_look_ahead_is_bounded(self) -> None:
        ring = Ring(0, 1 << 40)
        read: list[tuple[int, int]] = []

        def pread(length: int, number: int, offset: int) -> bytes:
            read.append((length, offset))
            return bytes(length)

        LogReader(pread, ring, LOG, Cursor(), [GENERATION]).look_ahead()
        self.assertEqual(sum(length for length, _ in read), SCAN_AHEAD_BYTES)
        self.assertLessEqual(max(length for length, _ in read), logreader.READ_BYTES)

    def test_the_look_ahead_comes_all_the_way_round(self) -> None:
        ring = self.log.ring
        for blocks in (1, ring.size // BLOCK // 2, ring.size // BLOCK - 1):
            device = MemoryDevice(SIZE)
            self.log = initialise(device)
            at = 3 * BLOCK + blocks * BLOCK
            raw = pack_record(Record(FRAME, BLOCK, 0, at, 4 * BLOCK), LOG)
            device.corrupt(ring.physical(at).offset, raw)
            reader = self.log.reader(Cursor(3 * BLOCK, 1))
            self.assertEqual(list(reader), [])
            self.assertEqual(reader.look_ahead(), Ahead(0, 4 * BLOCK), blocks)

    def test_void_frames_are_read(self) -> None:
        append(self.log, self.maker.make(0, kind=VOID, gsns=5), control=True)
        _, reader = self.read()
        self.assertEqual(reader.cursor.gsn, 6)
