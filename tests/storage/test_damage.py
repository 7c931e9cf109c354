"""Every bit of small logs flipped: recovered to what was durable at least, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.records import RECORD_HEADER_BYTES, Cursor
from qdsmirror.core.superblock import SLOT_BYTES
from qdsmirror.errors import CorruptError
from qdsmirror.limits import WRITELOG_BYTES_MIN
from qdsmirror.storage.binding import Bound, seal
from qdsmirror.storage.bitmap import empty_bitmap, load_bitmap, write_blocks
from qdsmirror.storage.journal import Mirror
from qdsmirror.storage.recovery import judge, open_units, replay
from qdsmirror.storage.writelog import Writelog
from tests.fakes import MemoryDevice, Unsynced
from tests.storage.logworld import FrameMaker, append, config, initialise, opener, write

BLOCK = 4096
S = SLOT_BYTES[0]
FRAMES = 6
#: Placement header, frame header, entry table, payload.
RECORD = RECORD_HEADER_BYTES + 104 + 16 + 32


class State(NamedTuple):
    """A log's bytes at a moment.

    :ivar applied: frames on the device already.
    :ivar durable: frames that something in the log says are durable.
    """

    image: bytes
    ring: int
    applied: int
    durable: int


def payload(number: int) -> bytes:
    return bytes([number + 1]) * 32


def content(count: int) -> bytes:
    """What a device holds after so many frames: each overwrites half of the one before."""
    raw = bytearray(BLOCK)
    for number in range(count):
        raw[16 * number : 16 * number + 32] = payload(number)
    return bytes(raw)


class World:
    """A log that is filled frame by frame, as the driver and the rmd do it."""

    def __init__(self, role: str, *, numbered: bool = True) -> None:
        self.device = MemoryDevice(WRITELOG_BYTES_MIN)
        self.log = initialise(self.device, role=role, sizes=(BLOCK,))
        if role == "writelog":
            dirty = empty_bitmap(self.log.superblock)
            write_blocks(self.device, dirty.area, dirty.blocks(dirty.mark([(0, BLOCK)])))
        self.maker = FrameMaker()
        self.at = [Cursor()]
        self.durable = 0
        self.named = 0
        self.numbered = numbered and role == "writelog"
        #: In a journal the GSN in the frames is the primary's, and says nothing of it.
        self.foreign = 99 if role == "journal" else 0

    def append(self) -> None:
        """Append a frame that names what is durable before it."""
        number = len(self.at) - 1
        gsn = self.durable if self.numbered else self.foreign
        frame = self.maker.make(0, [write(16 * number, payload(number))], durable=gsn)
        append(self.log, frame, durable=self.at[self.durable].position)
        self.named = max(self.named, self.durable)
        self.at.append(Cursor(self.log.head, self.maker.gsn, dict(self.maker.points)))

    def sync(self) -> None:
        self.device.fdatasync()
        self.durable = len(self.at) - 1

    def checkpoint(self, applied: int) -> None:
        """Write both slots: so many frames are applied, what is durable is the head."""
        cursor, head = self.at[applied], self.at[self.durable]
        self.log.update(both=True, tail=cursor, applied=cursor, head=head, durable_gsn=head.gsn - 1)
        self.named = max(self.named, self.durable)

    def state(self, applied: int) -> State:
        return State(self.device.content(), self.log.ring.start, applied, self.named)


def under_load(role: str) -> State:
    """A checkpoint, then frames of which the last two are not known to be durable."""
    world = World(role)
    for number in range(FRAMES):
        world.append()
        if number in (0, 1, 3):
            world.sync()
        if number == 1:
            world.checkpoint(1)
    return world.state(1)


def idle(role: str) -> State:
    """All durable, and the superblock says so, though not all is applied yet."""
    world = World(role)
    for _ in range(FRAMES):
        world.append()
    world.sync()
    world.checkpoint(2)
    return world.state(2)


def between_slots(role: str) -> State:
    """The power cut between the two slots of a checkpoint that frees what the older one needs."""
    world = World(role)
    for number in range(FRAMES):
        world.append()
        if number in (0, 3):
            world.sync()
        if number == 0:
            world.checkpoint(1)
    world.sync()
    old = world.device.durable()
    world.checkpoint(4)
    # The later of the two writes did not happen.
    lost = (world.log.superblock.counter + 1) % 2
    world.device.corrupt(lost * S, old[lost * S : (lost + 1) * S])
    return world.state(4)


def is_bitmap(state: State, place: int) -> bool:
    return 2 * S <= place < state.ring


def bits_of(state: State, step: int) -> Iterator[int]:
    """Every bit (or every so many) of the superblocks and records, and some of what has no use:
    of the fill, and of the dirty bitmap, save where its one mark is."""
    for block in range(0, state.ring + (FRAMES + 1) * BLOCK, 512):
        used = len(state.image[block : block + 512].rstrip(b"\0"))
        if is_bitmap(state, block):
            used = 9
        yield from range(8 * block, 8 * (block + used), step)
        yield from range(8 * (block + used), 8 * (block + 512), 509)


class DamageTests(SynchronousTestCase):
    """Each state of either kind of log, damaged."""

    def recover_writelog(self, image: bytes, applied: int) -> bytes | None:
        devices = {
            "/log0": MemoryDevice(len(image), content=image, path="/log0"),
            "/data0": MemoryDevice(BLOCK, content=content(applied)),
        }
        try:
            (unit,) = open_units(config(1), opener(devices))
            judge([unit])
        except CorruptError as error:
            self.assertTrue("qds0" in error.message or "/log0" in error.message or "GSN" in
                            error.message, error.message)  # fmt: skip
            self.assertEqual(devices["/data0"].unsynced, [])
            return None
        replay(unit)
        dirty, self.told = load_bitmap(unit.writelog.device, unit.writelog.superblock)
        self.assertTrue(dirty.is_marked(0))
        return devices["/data0"].durable()

    def recover_journal(self, image: bytes, applied: int) -> bytes | None:
        devices = {
            "/journal": MemoryDevice(len(image), content=image, path="/journal"),
            "/mirror0": MemoryDevice(BLOCK, content=content(applied)),
        }
        try:
            Mirror.open(config(1), opener(devices)).replay()
        except CorruptError as error:
            self.assertIn("/journal", error.message)
            self.assertEqual(devices["/mirror0"].unsynced, [], "a refused journal was applied")
            self.assertEqual(devices["/mirror0"].durable(), content(applied))
            return None
        self.told = ""
        return devices["/mirror0"].durable()

    def outcomes(
        self, state: State, recover: Callable[[bytes, int], bytes | None], bits: Iterator[int]
    ) -> list[int]:
        """Flip each bit on its own; give those that are refused."""
        good = [content(count) for count in range(state.durable, FRAMES + 1)]
        image = bytearray(state.image)
        refused = []
        for bit in bits:
            image[bit // 8] ^= 1 << bit % 8
            found = recover(bytes(image), state.applied)
            if found is None:
                refused.append(bit)
            else:
                self.assertIn(found, good, f"bit {bit}")
                self.assertEqual(self.told != "", is_bitmap(state, bit // 8), f"bit {bit}")
            image[bit // 8] ^= 1 << bit % 8
        return refused

    def check(self, make: Callable[[str], State], step: int) -> None:
        """Only damage to what is durable and not applied is refused; of that, every bit is."""
        for role in ("writelog", "journal"):
            recover = self.recover_writelog if role == "writelog" else self.recover_journal
            state = make(role)
            self.assertEqual(recover(state.image, state.applied), content(FRAMES))
            refused = self.outcomes(state, recover, bits_of(state, step))
            places = [state.ring + BLOCK * n for n in range(state.applied, state.durable)]
            expected = [
                bit
                for bit in bits_of(state, step)
                if any(0 <= bit // 8 - place < RECORD for place in places)
            ]
            self.assertEqual(refused, expected, role)
            self.assertTrue(expected)

    def test_under_load(self) -> None:
        self.check(under_load, 1)

    def test_idle(self) -> None:
        self.check(idle, 7)

    def test_after_an_orderly_stop(self) -> None:
        # Nothing is looked for behind the end then, and nothing there is needed.
        for role in ("writelog", "journal"):
            recover = self.recover_writelog if role == "writelog" else self.recover_journal
            world = World(role)
            for _ in range(FRAMES):
                world.append()
            world.sync()
            world.checkpoint(FRAMES)
            seal([Bound(world.log, 0, MemoryDevice(BLOCK, content=content(FRAMES)))])
            state = world.state(FRAMES)
            self.assertEqual(self.outcomes(state, recover, bits_of(state, 7)), [], role)

    def test_between_the_slots_of_a_checkpoint(self) -> None:
        self.check(between_slots, 7)

    def test_the_newer_slot_lost_and_damage_below_what_it_calls_applied(self) -> None:
        for role in ("writelog", "journal"):
            recover = self.recover_writelog if role == "writelog" else self.recover_journal
            state = between_slots(role)
            newest = Writelog.open(MemoryDevice(len(state.image), content=state.image)).superblock
            image = bytearray(state.image)
            image[newest.counter % 2 * S + 100] ^= 1
            start = 8 * (state.ring + BLOCK)
            # Records 2 to 4: the last two say that these were durable.
            for record in range(3):
                at = start + 8 * BLOCK * record
                lost = State(bytes(image), state.ring, state.applied, 4)
                bits = list(range(at, at + 8 * RECORD, 5))
                self.assertEqual(self.outcomes(lost, recover, iter(bits)), bits, role)

    def test_durable_in_its_log_but_not_yet_in_the_group(self) -> None:
        # Another log of the group lags: no number tells that these frames were durable, and yet
        # they may have been answered as such.
        world = World("writelog", numbered=False)
        for number in range(FRAMES):
            world.append()
            if number == 3:
                world.sync()
        state = world.state(0)
        for record in range(4):
            at = 8 * (state.ring + BLOCK * record)
            bits = list(range(at, at + 8 * RECORD, 7))
            self.assertEqual(self.outcomes(state, self.recover_writelog, iter(bits)), bits)

    def test_torn_ends_are_no_damage(self) -> None:
        # The converse: whatever a power cut leaves of what was not durable is no corruption.
        for role in ("writelog", "journal"):
            recover = self.recover_writelog if role == "writelog" else self.recover_journal
            for kept in range(1 << 4):
                world = World(role)
                world.append()
                world.append()
                world.sync()
                for _ in range(4):
                    world.append()
                order = iter(range(4))

                def choose(one: Unsynced) -> list[tuple[int, int]]:
                    return [(0, len(one.data))] if kept >> next(order) & 1 else []  # noqa: B023

                image = world.device.crash(choose).durable()
                whole = next((n for n in range(4) if not kept >> n & 1), 4)
                self.assertEqual(recover(image, 0), content(2 + whole), (role, kept))
