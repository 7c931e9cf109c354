"""A log on a device: superblocks, places, crashes, and every flipped bit."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.records import RECORD_HEADER_BYTES, Cursor, Generation
from qdsmirror.core.superblock import SLOT_BYTES, pack_slot, parse_slot
from qdsmirror.errors import CorruptError, DeviceError, DeviceFailedError
from qdsmirror.limits import (
    CONTROL_RECORDS_MIN,
    CONTROL_RESERVE_BYTES,
    MIB,
    WRITELOG_BYTES_MIN,
)
from qdsmirror.storage.recovery import judge, open_units, replay
from qdsmirror.storage.superblock import read_superblock
from qdsmirror.storage.writelog import Writelog
from tests.fakes import MemoryDevice, at_random, nothing
from tests.storage.logworld import (
    GENERATION,
    KIB,
    LOG,
    FrameMaker,
    append,
    config,
    initialise,
    opener,
    write,
)

SIZE = WRITELOG_BYTES_MIN
S = SLOT_BYTES[0]
BLOCK = 4096


class SuperblockTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.device = MemoryDevice(SIZE)
        self.log = initialise(self.device)

    def counters(self, device: MemoryDevice | None = None) -> list[int | None]:
        raw = (device or self.device).durable()
        found: list[int | None] = []
        for slot in (0, 1):
            try:
                found.append(parse_slot(raw[slot * S : (slot + 1) * S], slot, S).counter)
            except CorruptError:
                found.append(None)
        return found

    def test_initialised(self) -> None:
        self.assertEqual(self.counters(), [1, 1])
        self.assertEqual(self.device.unsynced, [])
        log = Writelog.open(self.device.crash())
        self.assertEqual(log.superblock, self.log.superblock)
        self.assertEqual((log.log, log.head, log.durable_tail), (LOG, 0, 0))
        self.assertEqual(log.superblock.generations, (Generation(GENERATION, 1),))
        self.assertFalse(log.superblock.coherent)

    def test_slots_alternate(self) -> None:
        for n, counters in enumerate(([2, 1], [2, 3], [4, 3], [4, 5])):
            self.log.update(reason=str(n))
            self.assertEqual(self.counters(), counters)
            self.assertEqual(read_superblock(self.device).reason, str(n))

    def test_both(self) -> None:
        self.log.update(reason="one")
        self.log.update(both=True, reason="both")
        self.assertEqual(self.counters(), [3, 3])
        self.log.update(reason="next")
        self.assertEqual(self.counters(), [4, 3])
        # Either slot alone knows what was written to both.
        for slot in (0, 1):
            device = MemoryDevice(SIZE, content=self.device.durable())
            device.corrupt(slot * S, bytes(S))
            self.assertIn(read_superblock(device).reason, ("both", "next"))

    def test_both_makes_the_first_durable_before_the_second(self) -> None:
        syncs: list[int] = []
        sync = self.device.fdatasync

        def counted() -> None:
            syncs.append(len(self.device.unsynced))
            sync()

        self.device.fdatasync = counted  # type: ignore[method-assign]
        self.log.update(both=True, reason="both")
        self.assertEqual(syncs, [1, 1])

    def test_torn_at_every_write(self) -> None:
        random = Random(1)
        for turn in range(60):
            device = MemoryDevice(SIZE)
            log = initialise(device)
            log.update(reason="old " * 500)
            sync = device.fdatasync
            device.fdatasync = lambda: None  # type: ignore[method-assign]
            log.update(both=bool(turn % 2), reason="new " * 500)
            device.fdatasync = sync  # type: ignore[method-assign]
            # With both, the second write is issued only after the first was synced.
            del device.unsynced[1:]
            found = Writelog.open(device.crash(at_random(random))).superblock
            self.assertIn(found.reason[:3], ("old", "new"))

    def test_a_tail_counts_only_once_it_is_durable(self) -> None:
        self.device.fail("fdatasync")
        cursor = Cursor(BLOCK, 2)
        with self.assertRaises(DeviceFailedError):
            self.log.update(tail=cursor, applied=cursor, head=cursor)
        self.assertEqual(self.log.durable_tail, 0)
        self.assertEqual(self.log.superblock.tail, Cursor())

    def test_bodies_of_more_than_a_block(self) -> None:
        for reason in ("one " * 1500, "two " * 1500, "three"):
            self.log.update(reason=reason)
            self.assertEqual(Writelog.open(self.device.crash()).superblock, self.log.superblock)
            self.device = MemoryDevice(SIZE, content=self.device.durable())
            self.log = Writelog.open(self.device)

    def test_slots_swapped(self) -> None:
        raw = self.device.durable()
        self.device.corrupt(0, raw[S : 2 * S] + raw[:S])
        with self.assertRaisesRegex(CorruptError, "holds no intact log.*holds slot 1"):
            read_superblock(self.device)

    def test_one_slot_lost(self) -> None:
        self.log.update(reason="newest")
        for slot, reason in ((0, "never mirrored"), (1, "newest")):
            device = MemoryDevice(SIZE, content=self.device.durable())
            device.corrupt(slot * S, b"\xff" * S)
            self.assertEqual(read_superblock(device).reason, reason)

    def test_both_slots_lost(self) -> None:
        self.device.corrupt(0, bytes(2 * S))
        with self.assertRaises(CorruptError) as caught:
            Writelog.open(self.device)
        self.assertIn("qdswlinit(1)", caught.exception.hint)

    def test_a_blank_or_tiny_device(self) -> None:
        for size in (512, 4096, S, 3 * S, SIZE):
            with self.assertRaises(CorruptError):
                read_superblock(MemoryDevice(size))

    def test_what_an_application_wrote_into_the_ring_is_no_superblock(self) -> None:
        # A guest forges a second slot where larger slots would have it.
        forged = replace(self.log.superblock, counter=999, reason="forged", slot_bytes=64 * KIB)
        body = replace(forged, device_bytes=1 << 40)
        body = replace(body, ring=replace(body.ring, start=128 * KIB))
        self.device.corrupt(64 * KIB, pack_slot(body, 1))
        self.assertEqual(read_superblock(self.device).counter, 1)
        self.device.corrupt(0, bytes(S))
        self.assertEqual(read_superblock(self.device).counter, 1)

    def test_a_forgotten_slot_of_another_size_is_wiped(self) -> None:
        old = initialise(MemoryDevice(5 * MIB))
        self.assertEqual(old.superblock.slot_bytes, 64 * KIB)
        old.update(reason="old")
        device = MemoryDevice(SIZE, content=old.device.pread(SIZE, 0))
        initialise(device)
        device.corrupt(0, bytes(2 * S))
        with self.assertRaises(CorruptError):
            read_superblock(device)

    def test_initialising_again_forgets_everything(self) -> None:
        maker = FrameMaker()
        append(self.log, maker.make(0, [write(0, b"x")]))
        for _ in range(5):
            self.log.update(reason="old")
        again = initialise(self.device, log=bytes(16))
        self.assertEqual(read_superblock(self.device), again.superblock)
        self.assertEqual(list(again.reader(Cursor())), [])

    def test_too_small_or_shrunk(self) -> None:
        with self.assertRaises(DeviceError):
            initialise(MemoryDevice(SIZE - 512))
        raw = self.device.durable()
        with self.assertRaisesRegex(DeviceError, "was made for"):
            Writelog.open(MemoryDevice(SIZE - 512, content=raw[:-512]))
        Writelog.open(MemoryDevice(SIZE + 4096, content=raw))

    def test_open_syncs_and_drops_the_cache_before_it_reads(self) -> None:
        calls: list[str] = []

        class Told(MemoryDevice):
            def pread(self, length: int, offset: int) -> bytes:
                calls.append("pread")
                return super().pread(length, offset)

            def fdatasync(self) -> None:
                calls.append("fdatasync")
                super().fdatasync()

            def drop_cache(self, offset: int = 0, length: int = 0) -> None:
                calls.append("drop_cache")
                super().drop_cache(offset, length)

        Writelog.open(Told(SIZE, content=self.device.durable()))
        self.assertEqual(calls[:3], ["fdatasync", "drop_cache", "pread"])
        calls.clear()


class PlaceTests(SynchronousTestCase):
    def test_on_blocks_of_any_size(self) -> None:
        for physical in (512, 4096, 16 * KIB, 64 * KIB):
            device = MemoryDevice(4 * MIB, physical_block=physical)
            log = initialise(device)
            maker = FrameMaker()
            frames = []
            for size in (1, 5000, 70_000, 3):
                frames.append(maker.make(0, [write(0, b"x" * size)]))
                at = append(log, frames[-1])
                self.assertEqual(log.ring.physical(at).offset % max(4096, physical), 0)
            device.fdatasync()
            self.assertGreaterEqual(log.superblock.slot_bytes, physical)
            log = Writelog.open(device.crash())
            self.assertEqual([bytes(f.frame) for f in log.reader(Cursor())], frames)

    def test_a_full_log_still_takes_control_frames(self) -> None:
        for physical in (4096, 64 * KIB):
            log = initialise(MemoryDevice(2 * MIB, physical_block=physical))
            align = log.ring.align
            while log.place(200) is not None:
                pass
            reserve = log.ring.size - log.used_bytes
            self.assertEqual(reserve, max(CONTROL_RESERVE_BYTES, CONTROL_RECORDS_MIN * align))
            taken = 0
            while log.place(200, control=True) is not None:
                taken += 1
            self.assertEqual(taken, reserve // align)
            self.assertGreaterEqual(taken, CONTROL_RECORDS_MIN)
            self.assertEqual(log.used_bytes, log.ring.size)

    def test_a_refused_place_takes_nothing(self) -> None:
        log = initialise(MemoryDevice(SIZE))
        head = log.head
        self.assertIsNone(log.place(SIZE))
        self.assertEqual(log.head, head)

    def test_space_is_reused_only_behind_the_durable_tail(self) -> None:
        log = initialise(MemoryDevice(SIZE))
        while log.place(3000) is not None:
            pass
        head = log.head
        cursor = Cursor(8 * BLOCK, 2)
        log.update(tail=cursor, applied=cursor, head=Cursor(head, 2))
        taken = 0
        while log.place(3000) is not None:
            taken += 1
        self.assertEqual(taken, 8)

    def test_torn_appends(self) -> None:
        # Whatever a power cut leaves of unsynced appends, the scan finds a prefix of them.
        random = Random(2)
        for turn in range(150):
            device = MemoryDevice(SIZE)
            log = initialise(device)
            maker = FrameMaker()
            frames = []
            synced = 0
            for _ in range(random.randrange(1, 8)):
                frames.append(maker.make(0, [write(0, random.randbytes(random.choice((9, 9000))))]))
                append(log, frames[-1])
                if random.random() < 0.3:
                    device.fdatasync()
                    synced = len(frames)
            log = Writelog.open(device.crash(at_random(random)))
            found = [bytes(f.frame) for f in log.reader(Cursor())]
            self.assertEqual(found, frames[: len(found)], turn)
            self.assertGreaterEqual(len(found), synced, turn)

    def test_a_kill_loses_nothing_that_was_written(self) -> None:
        device = MemoryDevice(SIZE)
        log = initialise(device)
        maker = FrameMaker()
        frames = [maker.make(0, [write(0, b"x" * 9000)]) for _ in range(3)]
        for frame in frames:
            append(log, frame)
        log = Writelog.open(device.reopen())
        self.assertEqual([bytes(f.frame) for f in log.reader(Cursor())], frames)
        # And what it found, a power cut cannot take away any more.
        assert isinstance(log.device, MemoryDevice)
        log = Writelog.open(log.device.crash(nothing))
        self.assertEqual([bytes(f.frame) for f in log.reader(Cursor())], frames)


class FlippedBitTests(SynchronousTestCase):
    """Every single flipped bit of a small image: recovered to a prefix that holds all that was
    durable, or refused; never applied."""

    def setUp(self) -> None:
        device = MemoryDevice(SIZE)
        log = initialise(device, sizes=(BLOCK,))
        maker = FrameMaker()
        self.contents = [bytearray(BLOCK)]
        self.ends = [0]
        # Two frames are behind the superblock's head; the last two are not known to be durable.
        for number, durable in enumerate((0, 0, 1, 2, 4, 4)):
            payload = bytes([number + 1]) * 32
            append(log, maker.make(0, [write(16 * number, payload)], durable=durable))
            content = bytearray(self.contents[-1])
            content[16 * number : 16 * number + 32] = payload
            self.contents.append(content)
            self.ends.append(log.head)
            if number == 1:
                at = log.reader(Cursor())
                list(at)
                log.update(head=at.cursor, durable_gsn=2)
        self.durable = 4
        self.image = device.content()
        self.ring = log.ring

    def recover(self, image: bytes) -> bytes | None:
        device = MemoryDevice(SIZE, content=image, path="/log0")
        data = MemoryDevice(BLOCK)
        devices = {"/log0": device, "/data0": data}
        try:
            units = open_units(config(1), opener(devices))
            judge(units)
        except CorruptError:
            self.assertEqual(data.unsynced, [])
            return None
        replay(units[0])
        return data.durable()

    def check(self, bit: int) -> bool:
        image = bytearray(self.image)
        image[bit // 8] ^= 1 << bit % 8
        found = self.recover(bytes(image))
        if found is None:
            return False
        self.assertIn(found, self.contents[self.durable :], f"bit {bit}")
        return True

    def bits(self) -> list[int]:
        """Every bit of the records, some of the superblocks' (core.test_records has them all) and
        of the fill."""
        chosen = []
        for block in range(0, self.ring.start + 8 * BLOCK, 512):
            used = len(self.image[block : block + 512].rstrip(b"\0"))
            chosen += range(8 * block, 8 * (block + used), 1 if block >= self.ring.start else 7)
            chosen += range(8 * (block + used), 8 * (block + 512), 509)
        return chosen

    def test_every_bit(self) -> None:
        self.assertEqual(self.recover(self.image), self.contents[-1])
        refused = sum(not self.check(bit) for bit in self.bits())
        # The records of GSN 1 to 4: placement header, frame header, table, payload.
        self.assertEqual(refused, 4 * 8 * (RECORD_HEADER_BYTES + 104 + 16 + 32))

    def test_a_lost_superblock_whose_space_was_reused(self) -> None:
        # The older slot is of a time before a whole turn of the ring; it must not be believed.
        device = MemoryDevice(SIZE, path="/log0")
        log = initialise(device, sizes=(BLOCK,))
        maker = FrameMaker()
        for _ in range(35):
            append(log, maker.make(0, [write(0, b"x" * 32)], durable=maker.gsn - 1))
            if log.used_bytes > 10 * BLOCK and log.superblock.counter == 1:
                at = Cursor(log.head, maker.gsn, dict(maker.points))
                log.update(tail=at, applied=at, head=at, durable_gsn=at.gsn - 1)
        image = bytearray(device.content())
        newest = log.superblock.counter % 2
        image[newest * S + 100] ^= 1
        self.assertEqual(Writelog.open(MemoryDevice(SIZE, content=bytes(image))).durable_tail, 0)
        self.assertIsNone(self.recover(bytes(image)))
