"""Extension devices: their headers, chaining and freeing under load, and every crash of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.extension import EXTENSION_SLOT_BYTES
from qdsmirror.core.records import Cursor
from qdsmirror.core.superblock import Superblock
from qdsmirror.errors import (
    BrokenError,
    CorruptError,
    DegradedError,
    DeviceError,
    DeviceFailedError,
    LimitError,
    UsageError,
)
from qdsmirror.limits import EXTENSIONS_PER_LOG_MAX, WRITELOG_BYTES_MIN
from qdsmirror.storage.extension import PoolDevice, open_pool, read_extension
from qdsmirror.storage.superblock import read_superblock
from qdsmirror.storage.writelog import Writelog
from tests.fakes import Choice, MemoryDevice, at_random, everything, nothing
from tests.storage.logworld import KIB, LOG, FrameMaker, initialise, write

BLOCK = 4096
SIZE = 128 * KIB
GROUP = 0


def blank(size: int = SIZE, physical_block: int = 4096) -> MemoryDevice:
    return MemoryDevice(size, physical_block=physical_block, path="/extension")


class HeaderTests(SynchronousTestCase):
    def test_initialised(self) -> None:
        for physical in (512, 4096, 16 * KIB, 64 * KIB, 1024 * KIB):
            device = blank(40 * max(4096, physical), physical)
            made = PoolDevice.initialise(device, 7)
            self.assertEqual(device.unsynced, [])
            self.assertGreaterEqual(made.header.slot_bytes, physical)
            found = PoolDevice.open(device.crash(), 7)
            self.assertEqual(found.header, made.header)
            self.assertEqual((found.header.log, found.header.size), (b"", device.size))

    def test_owned(self) -> None:
        device = blank()
        made = PoolDevice.initialise(device, GROUP)
        for log in (LOG, b"", bytes(16)):
            made.own(log)
            # Either slot alone knows it.
            for slot in (None, 0, 1):
                copy = MemoryDevice(SIZE, content=device.durable())
                if slot is not None:
                    copy.corrupt(slot * BLOCK, bytes(100))
                self.assertEqual(read_extension(copy).log, log)

    def test_torn_at_every_write(self) -> None:
        random = Random(1)
        for turn in range(60):
            device = blank()
            made = PoolDevice.initialise(device, GROUP)
            old = made.header
            cut(device, turn % 4)
            try:
                made.own(LOG)
            except Cut:
                pass
            found = read_extension(device.crash(at_random(random)))
            self.assertIn((found.id, found.log), ((old.id, b""), (old.id, LOG)))

    def test_every_flipped_bit(self) -> None:
        device = blank()
        made = PoolDevice.initialise(device, GROUP)
        image = device.durable()
        for slot in (0, 1):
            for bit in range(8 * len(image[slot * BLOCK : (slot + 1) * BLOCK].rstrip(b"\0"))):
                raw = bytearray(image)
                raw[slot * BLOCK + bit // 8] ^= 1 << bit % 8
                found = read_extension(MemoryDevice(SIZE, content=bytes(raw)))
                self.assertEqual((found.id, found.log), (made.id, b""))

    def test_refused(self) -> None:
        device = blank()
        with self.assertRaisesRegex(CorruptError, "no intact extension header"):
            PoolDevice.open(device, GROUP)
        for tiny in (512, 4096, 5000 // 512 * 512):
            with self.assertRaises(CorruptError):
                read_extension(MemoryDevice(tiny))
        PoolDevice.initialise(device, 3)
        with self.assertRaisesRegex(BrokenError, "of dsgrp003's pool, not of dsgrp000's"):
            PoolDevice.open(device, 0)
        with self.assertRaisesRegex(DeviceError, "was made an extension with"):
            PoolDevice.open(MemoryDevice(SIZE - 512, content=device.durable()[:-512]), 3)
        with self.assertRaisesRegex(DeviceError, "needs .* bytes at least"):
            PoolDevice.initialise(MemoryDevice(64 * KIB), 0)
        with self.assertRaisesRegex(DeviceError, "on blocks of"):
            PoolDevice.initialise(MemoryDevice(SIZE, physical_block=2048 * KIB), 0)
        device = blank(2 * SIZE)
        PoolDevice.initialise(device, 3)
        initialise(device)
        with self.assertRaises(CorruptError):
            PoolDevice.open(device, 3)

    def test_a_forgotten_slot_is_wiped(self) -> None:
        device = blank(40 * 64 * KIB, 64 * KIB)
        old = PoolDevice.initialise(device, GROUP)
        self.assertEqual(old.header.slot_bytes, EXTENSION_SLOT_BYTES[1])
        again = MemoryDevice(device.size, content=device.durable())
        PoolDevice.initialise(again, GROUP)
        again.corrupt(0, bytes(2 * BLOCK))
        with self.assertRaises(CorruptError):
            read_extension(again)

    def test_what_a_log_wrote_is_no_header(self) -> None:
        # A guest forges a second slot where larger slots would have it.
        device = blank(512 * KIB)
        made = PoolDevice.initialise(device, GROUP)
        big = blank(40 * 64 * KIB, 64 * KIB)
        PoolDevice.initialise(big, GROUP).own(LOG)
        device.corrupt(64 * KIB, big.durable()[64 * KIB : 68 * KIB])
        self.assertEqual(read_extension(device).id, made.id)
        device.corrupt(0, bytes(BLOCK))
        self.assertEqual(read_extension(device).id, made.id)

    def test_open_pool(self) -> None:
        devices = {"/a": blank(), "/b": blank(), "/c": blank()}
        for path in ("/a", "/c"):
            PoolDevice.initialise(devices[path], 2)

        def open_device(path: str, *, writable: bool, role: str) -> MemoryDevice:
            if path not in devices:
                raise DeviceError(f"{role} {path} does not exist")
            return devices[path]

        found, problems = open_pool(["/a", "/b", "/none", "/c"], 2, open_device)
        self.assertEqual([e.device for e in found], [devices["/a"], devices["/c"]])
        self.assertEqual(len(problems), 2)
        self.assertTrue(devices["/b"].closed)

    def test_beside_a_failed_log(self) -> None:
        """It is read as it is, but a log that is well trusts only what is durable (rules.md 3)."""
        world = Log(1)
        world.log.extend(world.pool[0])
        device = world.devices[1]
        device.pwritev([b"unsynced"], SIZE - BLOCK)
        spare = PoolDevice.open(device, GROUP, failed=True)
        self.assertEqual(len(device.unsynced), 1)
        Writelog.open(world.base, [spare], failed=True)
        self.assertEqual(len(device.unsynced), 1)
        Writelog.open(world.base, [spare])
        self.assertEqual(device.unsynced, [])


class Cut(Exception):
    """The power is cut."""


def cut(device: MemoryDevice, left: int, counter: list[int] | None = None) -> None:
    """Let the power fail after so many writes and syncs (of all devices with this counter)."""
    counter = counter if counter is not None else [left]
    for name in ("pwritev", "fdatasync"):
        method = getattr(device, name)

        def counted(*args: Any, method: Callable[..., Any] = method) -> Any:
            if not counter[0]:
                raise Cut
            counter[0] -= 1
            return method(*args)

        setattr(device, name, counted)


class Log:
    """A writelog and the pool of its group; what was appended and what must be found."""

    def __init__(
        self, extensions: int = 2, sizes: int = SIZE, base: int = WRITELOG_BYTES_MIN
    ) -> None:
        self.base = MemoryDevice(base, path="/log0")
        self.log = initialise(self.base)
        self.pool = [
            PoolDevice.initialise(MemoryDevice(sizes, path=f"/extension{n}"), GROUP)
            for n in range(extensions)
        ]
        self.maker = FrameMaker()
        self.frames: list[tuple[int, bytes]] = []
        self.durable = 0
        self.number = 0

    @property
    def devices(self) -> list[MemoryDevice]:
        return [
            d for d in (self.base, *(e.device for e in self.pool)) if isinstance(d, MemoryDevice)
        ]

    def fill(self, size: int, limit: int = 10_000) -> int:
        """Append frames until the log is full, or so many; give how many."""
        for count in range(limit):
            points, gsn = dict(self.maker.points), self.maker.gsn
            self.number += 1
            payload = self.number.to_bytes(4, "big") * (size // 4)
            frame = self.maker.make(0, [write(0, payload)])
            placement = self.log.place(len(frame))
            if placement is None:
                self.maker.points, self.maker.gsn = points, gsn
                return count
            self.log.write(
                self.log.record(placement, len(frame), [frame], self.at(self.durable).position)
            )
            self.frames.append((placement.end, frame))
        return limit

    def at(self, count: int) -> Cursor:
        """The place behind the first so many frames that are still kept."""
        reader = self.log.reader(self.log.superblock.tail)
        if not count:
            return self.log.superblock.tail
        while reader.position < self.frames[count - 1][0]:
            if not reader.read(1 << 20, self.frames[count - 1][0]):
                raise AssertionError(reader.stopped)
        return reader.cursor

    def sync(self) -> None:
        self.log.sync()
        self.durable = len(self.frames)

    def move_tail(self, count: int) -> None:
        """Free the first so many frames, which are durable."""
        cursor, head = self.at(count), self.at(self.durable)
        self.log.update(both=True, tail=cursor, applied=cursor, head=head)
        del self.frames[:count]
        self.durable -= count

    def reopen(self, choose: Choice) -> Superblock:
        """Cut the power and open what it leaves."""
        crashed = [device.crash(choose) for device in self.devices]
        self.base = crashed[0]
        self.pool = [PoolDevice.open(device, GROUP) for device in crashed[1:]]
        self.log = Writelog.open(self.base, self.pool)
        return self.log.superblock

    def check(self, test: SynchronousTestCase) -> None:
        """Take up what is found: all that was durable, and of the rest a prefix."""
        reader = self.log.reader(self.log.superblock.tail)
        found = [bytes(one.frame) for one in reader]
        kept = [frame for end, frame in self.frames if end > self.log.superblock.tail.position]
        lost = len(self.frames) - len(kept)
        test.assertEqual(found, kept[: len(found)])
        test.assertGreaterEqual(len(found), self.durable - lost)
        test.assertLessEqual(reader.look_ahead().durable_end, reader.position)
        self.frames = self.frames[lost : lost + len(found)]
        self.log.head = reader.position
        self.maker.points, self.maker.gsn = dict(reader.cursor.points), reader.cursor.gsn
        self.durable = len(found)


class ChainTests(SynchronousTestCase):
    def test_grows_and_shrinks(self) -> None:
        world = Log()
        log = world.log
        before = world.fill(3000)
        log.extend(world.pool[0])
        more = world.fill(3000)
        self.assertGreater(more, before // 2)
        world.sync()
        superblock = world.reopen(nothing)
        self.assertEqual([e.number for e in superblock.extensions], [1])
        world.check(self)
        self.assertEqual(len(world.frames), before + more)
        world.move_tail(12)
        world.log.free(1)
        self.assertTrue(world.log.superblock.extensions[0].leaving)
        world.move_tail(before - 12)
        self.assertEqual(list(world.log.extensions), [1])
        world.fill(3000)
        world.sync()
        world.move_tail(len(world.frames))
        self.assertEqual(world.log.extensions, {})
        self.assertEqual(world.log.superblock.extensions, ())
        self.assertEqual(world.log.released, [world.pool[0]])
        self.assertEqual(world.pool[0].header.log, b"")
        self.assertEqual(len(world.log.ring.extents), 1)
        self.assertGreater(world.fill(3000), before - 2)
        world.sync()
        world.reopen(nothing)
        world.check(self)

    def test_free_space_goes_at_once(self) -> None:
        world = Log()
        size = world.log.ring.size
        world.fill(3000, 4)
        for extension in world.pool:
            world.log.extend(extension)
        self.assertGreater(world.log.ring.size, size)
        self.assertEqual(world.pool[1].header.log, LOG)
        for number in (1, 2):
            world.log.free(number)
        self.assertEqual(world.log.ring.size, size)
        self.assertEqual(world.log.released, world.pool)
        self.assertEqual([e.header.log for e in world.pool], [b"", b""])

    def test_the_header_names_the_log_before_the_superblock_names_the_device(self) -> None:
        world = Log(1)
        seen: list[tuple[bytes, int]] = []
        pwritev = world.base.pwritev

        def told(buffers: Any, offset: int) -> None:
            header = read_extension(MemoryDevice(SIZE, content=world.devices[1].durable()))
            durable = MemoryDevice(WRITELOG_BYTES_MIN, content=world.base.durable())
            seen.append((header.log, len(read_superblock(durable).extensions)))
            pwritev(buffers, offset)

        world.base.pwritev = told  # type: ignore[method-assign]
        world.log.extend(world.pool[0])
        world.log.free(1)
        # Two slots each time; the header is freed after both.
        self.assertEqual(seen, [(LOG, 0), (LOG, 1), (LOG, 1), (LOG, 0)])
        self.assertEqual(world.pool[0].header.log, b"")

    def test_nothing_is_placed_meanwhile(self) -> None:
        world = Log(1)
        placed: list[object] = []
        own = world.pool[0].own

        def told(log: bytes) -> None:
            placed.append(world.log.place(100, control=True))
            own(log)

        world.pool[0].own = told  # type: ignore[method-assign]
        world.log.extend(world.pool[0])
        self.assertEqual(placed, [None])
        self.assertIsNotNone(world.log.place(100))

    def test_syncs_what_was_written(self) -> None:
        world = Log(1)
        world.fill(3000)
        world.log.extend(world.pool[0])
        world.fill(3000)
        device = world.devices[1]
        self.assertTrue(device.unsynced)
        world.sync()
        self.assertEqual(device.unsynced, [])
        syncs = device.syncs
        world.sync()
        self.assertEqual(device.syncs, syncs, "nothing was written to it")

    def test_a_device_that_fails_fails_the_sync(self) -> None:
        world = Log(1)
        world.fill(3000)
        world.log.extend(world.pool[0])
        world.fill(3000)
        world.devices[1].fail("fdatasync")
        for _ in range(2):
            with self.assertRaises(DeviceFailedError):
                world.sync()

    def test_a_write_beside_a_sync_is_not_taken_for_synced(self) -> None:
        world = Log(1)
        world.fill(3000)
        world.log.extend(world.pool[0])
        device = world.devices[1]
        write = device.pwritev

        def after_a_sync(buffers: Sequence[Any], offset: int) -> None:
            world.log.sync()
            write(buffers, offset)

        device.pwritev = after_a_sync  # type: ignore[method-assign]
        world.fill(3000)
        self.assertTrue(device.unsynced)
        world.sync()
        self.assertFalse(device.unsynced)

    def test_refused(self) -> None:
        world = Log(EXTENSIONS_PER_LOG_MAX + 1)
        with self.assertRaisesRegex(UsageError, "no extension 1"):
            world.log.free(1)
        for extension in world.pool[:-1]:
            world.log.extend(extension)
        before = world.log.superblock
        with self.assertRaisesRegex(LimitError, "15 extensions already"):
            world.log.extend(world.pool[-1])
        large = PoolDevice.initialise(blank(1024 * KIB, 16 * KIB), GROUP)
        other = Log(0)
        with self.assertRaisesRegex(DeviceError, "blocks of 16384 bytes"):
            other.log.extend(large)
        self.assertEqual(large.header.log, b"")
        self.assertEqual(world.log.superblock, before)
        self.assertIsNotNone(world.log.place(100), "a refusal leaves the log at work")

    def test_not_freed_while_the_rest_is_full(self) -> None:
        world = Log()
        world.fill(3000)
        world.log.extend(world.pool[0])
        world.fill(3000)
        world.sync()
        before = world.log.superblock
        with self.assertRaisesRegex(DegradedError, "cannot do without extension 1 now .*/"):
            world.log.free(1)
        self.assertEqual(world.log.superblock, before)
        world.move_tail(12)
        world.log.free(1)
        world.log.free(1)
        self.assertTrue(world.log.superblock.extensions[0].leaving)

    def test_a_part_that_is_too_small_for_a_frame_is_not_made(self) -> None:
        # Extensions smaller than the largest frame, at a full log, each at another place.
        world = Log(EXTENSIONS_PER_LOG_MAX, 2 * BLOCK + 16 * BLOCK, 1024 * KIB)
        frame = world.log.ring.payload_cap + 200
        refused = 0
        random = Random(3)
        for extension in world.pool:
            world.fill(3000)
            world.sync()
            try:
                world.log.extend(extension)
            except DegradedError:
                refused += 1
            self.assertTrue(world.log.takes(frame))
            world.move_tail(random.randrange(20, 60))
        self.assertGreater(len(world.log.extensions), 3)
        self.assertGreater(refused, 0)
        world.move_tail(len(world.frames))
        self.assertIsNotNone(world.log.place(frame))

    def test_an_undecided_layout_places_nothing_more(self) -> None:
        world = Log(1)
        world.base.fail("fdatasync")
        with self.assertRaises(DeviceFailedError):
            world.log.extend(world.pool[0])
        self.assertIsNone(world.log.place(100))
        # Where the pool device fails, the log is as it was.
        world = Log(1)
        world.devices[1].fail("fdatasync")
        with self.assertRaises(DeviceFailedError):
            world.log.extend(world.pool[0])
        self.assertIsNotNone(world.log.place(100))
        self.assertEqual(world.log.extensions, {})

    def test_a_device_that_cannot_be_told_that_it_is_free(self) -> None:
        world = Log(1)
        world.log.extend(world.pool[0])
        world.devices[1].fail("pwritev")
        world.log.free(1)
        (gone,) = world.log.released
        self.assertIn("Input/output error", str(gone.failure))
        # Nobody names it: it can be chained again.
        world.reopen(nothing)
        self.assertEqual(world.pool[0].header.log, LOG)
        world.log.extend(world.pool[0])
        world.fill(3000)
        world.sync()
        world.reopen(nothing)
        world.check(self)


class OpenTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.world = Log()
        self.world.fill(3000)
        self.old = self.world.devices[1].durable()
        self.world.log.extend(self.world.pool[0])
        self.world.fill(3000)
        self.world.sync()
        self.base = self.world.base.crash()

    def test_missing(self) -> None:
        for pool in ([], [self.world.pool[1]]):
            with self.assertRaisesRegex(DeviceError, "extension 1 .* of the log /log0 is missing"):
                Writelog.open(self.base, pool)

    def test_an_older_copy_of_the_device(self) -> None:
        stale = PoolDevice.open(MemoryDevice(SIZE, content=self.old), GROUP)
        with self.assertRaisesRegex(CorruptError, "its header is of another time"):
            Writelog.open(self.base, [stale])

    def test_another_log_has_it(self) -> None:
        self.world.pool[0].own(bytes(16))
        with self.assertRaisesRegex(CorruptError, "its header is of another time"):
            Writelog.open(self.base, self.world.pool)

    def test_unsynced_records_on_an_extension_are_a_tear(self) -> None:
        world = Log(1)
        world.fill(3000)
        world.sync()
        world.log.extend(world.pool[0])
        durable = len(world.frames)
        world.fill(3000)
        world.reopen(nothing)
        world.check(self)
        self.assertEqual(len(world.frames), durable)


class CrashTests(SynchronousTestCase):
    """The power cut at every write and sync, with every kind of survival."""

    def crashes(self, prepare: Callable[[], Log], act: Callable[[Log], None]) -> set[str]:
        """Cut ``act`` everywhere; give the layouts that were found after it."""
        random = Random(7)
        layouts = set()
        for choose in (nothing, everything, *(at_random(random) for _ in range(3))):
            for stop in range(1000):
                world = prepare()
                old = world.log.superblock
                counter = [stop]
                for device in world.devices:
                    cut(device, stop, counter)
                ended = True
                try:
                    act(world)
                except Cut:
                    ended = False
                new = world.log.superblock
                found = world.reopen(choose)
                # Whichever layout it is, it holds everything.
                layouts.add("old" if found.extensions == old.extensions else "new")
                world.check(self)
                # And it goes on from there.
                world.fill(2000, 5)
                world.sync()
                world.reopen(nothing)
                world.check(self)
                if ended:
                    self.assertEqual(found.extensions, new.extensions)
                    break
        return layouts

    def check(self, prepare: Callable[[], Log], act: Callable[[Log], None]) -> None:
        self.assertEqual(self.crashes(prepare, act), {"old", "new"})

    def full(self) -> Log:
        world = Log()
        world.fill(3000)
        world.sync()
        world.move_tail(7)
        world.fill(3000)
        return world

    def test_extend(self) -> None:
        def act(world: Log) -> None:
            world.log.extend(world.pool[0])
            world.fill(3000, 3)
            world.log.sync()

        self.check(self.full, act)

    def chained(self) -> Log:
        world = self.full()
        world.sync()
        world.log.extend(world.pool[0])
        world.log.extend(world.pool[1])
        world.fill(3000, 3)
        world.sync()
        world.move_tail(15)
        return world

    def test_free(self) -> None:
        def act(world: Log) -> None:
            world.log.free(2)
            world.log.free(1)

        self.check(self.chained, act)

    def leaving(self) -> Log:
        world = self.chained()
        world.fill(3000, 25)
        world.sync()
        world.log.free(2)
        return world

    def test_the_tail_passes_what_leaves(self) -> None:
        def act(world: Log) -> None:
            while world.frames:
                world.move_tail(min(5, len(world.frames)))

        self.check(self.leaving, act)


class LifeTests(SynchronousTestCase):
    def test_at_random(self) -> None:
        """Long lives of a log: everything in any order, and the power cut now and then."""
        for seed in range(40):
            random = Random(seed)
            world = Log(4, 18 * BLOCK + random.randrange(20) * BLOCK)
            for _ in range(60):
                log = world.log
                chained = list(log.extensions)
                match random.randrange(7):
                    case 0 | 1:
                        world.fill(random.choice((100, 3000, 9000)), random.randrange(12))
                    case 2:
                        world.sync()
                    case 3:
                        if world.durable:
                            world.move_tail(random.randrange(world.durable + 1))
                    case 4:
                        held = {e.id for e in log.extensions.values()}
                        free = [e for e in world.pool if e.id not in held]
                        if free:
                            self.attempt(lambda: log.extend(random.choice(free)))  # noqa: B023
                    case 5:
                        if chained:
                            self.attempt(lambda: log.free(random.choice(chained)))  # noqa: B023
                    case 6:
                        world.reopen(random.choice((nothing, everything, at_random(random))))
                        world.check(self)
                self.assertTrue(log.takes(log.ring.payload_cap + 200))
            world.sync()
            world.reopen(nothing)
            world.check(self)
            world.move_tail(len(world.frames))
            for number in list(world.log.extensions):
                self.attempt(lambda: world.log.free(number))  # noqa: B023
            self.assertGreater(world.fill(100, 30), 10, seed)

    def attempt(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (DegradedError, LimitError, UsageError):
            pass
