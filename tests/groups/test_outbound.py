"""What a pmd sends, in which order, how far, and what an ACK may do; where a resume may start."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from qdsmirror.core import stream
from qdsmirror.core.frames import VOID, parse_header
from qdsmirror.core.records import BEGINNING, PAD, Cursor, Point, Record, pack_record
from qdsmirror.core.stream import Ack
from qdsmirror.core.watermark import Committed
from qdsmirror.errors import CorruptError, DivergedError, ProtocolError, QdsError
from qdsmirror.groups import outbound as outbound_module
from qdsmirror.groups.band import Band
from qdsmirror.groups.holdback import HoldBack
from qdsmirror.groups.outbound import Outbound, OutUnit
from qdsmirror.groups.traffic import Traffic
from qdsmirror.groups.wire import Wire
from qdsmirror.limits import MIB, SEND_BUFFER_BYTES
from qdsmirror.net.link import ILinkOwner, Link
from tests.fakes import ImmediateWorker, MemoryDevice, StepWorker
from tests.storage.logworld import GENERATION, KIB, FrameMaker, append, initialise, write

OTHER_CHAIN = b"x" * 16


class FakeLink:
    """Takes frames; keeps them by the buffer in which they left."""

    def __init__(self) -> None:
        self.can_send = True
        self.buffers: list[list[bytes]] = []

    def send_frames(self, frames: Sequence[memoryview]) -> None:
        self.buffers.append([bytes(frame) for frame in frames])

    @property
    def sent(self) -> list[int]:
        """First GSNs of the frames that left, in their order."""
        return [parse_header(f).gsn_first for buffer in self.buffers for f in buffer]


@implementer(ILinkOwner)
class Opener:
    """Does something as soon as there is a stream."""

    def __init__(self, made: Callable[[], None]) -> None:
        self.link_made = lambda _link: made()
        self.link_message = self.link_lost = self.link_writable = lambda *_: None


class PmdWorld:
    """A driver's writelogs, and a pmd's sending side over descriptors of them.

    :ivar frames: what was appended, by GSN, with the LDSU and the record's end.
    """

    def __init__(
        self,
        test: SynchronousTestCase,
        *,
        ldsus: int = 1,
        log: int = MIB,
        window: int = 16 * MIB,
        stepped: bool = False,
    ) -> None:
        self.maker = FrameMaker()
        self.devices = [MemoryDevice(log) for _ in range(ldsus)]
        self.logs = [
            initialise(device, first=index, log=bytes([index + 1] * 16))
            for index, device in enumerate(self.devices)
        ]
        self.frames: dict[int, tuple[int, bytes, int]] = {}
        self.durable_gsn = 0
        self.steps = StepWorker()
        self.units: list[OutUnit] = []
        for index, (device, writelog) in enumerate(zip(self.devices, self.logs, strict=True)):
            info = {
                "index": index,
                "name": f"qds{index}",
                "size": 64 * KIB,
                "log": writelog.log.hex(),
                "ring": writelog.ring.to_json(),
                "devices": [[0, 0]],
                "tail": Cursor().to_json(),
                "durable": 0,
            }
            self.units.append(OutUnit.from_info(info, GENERATION, iter([device.open_shared()])))
            test.addCleanup(device.close)
            test.addCleanup(os.close, self.units[-1].devices[0][0])
        self.told: list[tuple[int, int, int]] = []
        self.ends: list[list[Committed]] = []
        self.failures: list[CorruptError] = []
        self.link = FakeLink()
        self.traffic = Traffic([unit.name for unit in self.units])
        self.clock = Clock()
        self.hold_back = HoldBack(self.clock, lambda: self.out.pump())
        self.out = Outbound(
            self.units,
            self.steps if stepped else ImmediateWorker(),
            window,
            self._committed,
            self.failures.append,
            traffic=self.traffic,
            hold_back=self.hold_back,
        )

    def _committed(
        self, sent: int, committed: int, mirrored: int, ends: Iterable[Committed]
    ) -> None:
        self.told.append((sent, committed, mirrored))
        self.ends.append(list(ends))

    def frame(self, index: int, payload: int = 512, **more: Any) -> int:
        """Append a frame to an LDSU's writelog; give its GSN."""
        gsn = self.maker.gsn
        entries = () if "kind" in more else [write(0, gsn.to_bytes(8, "big") * (payload // 8))]
        raw = self.maker.make(index, entries, **more)
        append(self.logs[index], raw)
        self.frames[gsn] = (index, raw, self.logs[index].head)
        return gsn

    def begin(self) -> None:
        """Connect, and send from the beginning."""
        cursors = {unit.index: unit.committed for unit in self.units}
        self.out.begin(cast(Band, self.link), cursors, 1, self.durable_gsn)

    def durable(self, gsn: int | None = None) -> None:
        """Say, as the driver, that all that was appended is durable, the group's GSN up to this."""
        self.durable_gsn = self.maker.gsn - 1 if gsn is None else gsn
        self.told_durable(self.durable_gsn, *range(len(self.units)))

    def told_durable(self, gsn: int, *indices: int) -> None:
        """Say it of some LDSUs' writelogs only."""
        for index in indices:
            self.units[index].durable = self.logs[index].head
        self.out.durable(gsn)

    def cursor(self, gsn: int) -> Cursor:
        """Give the place behind a frame of its LDSU's writelog."""
        index, raw, end = self.frames[gsn]
        return Cursor().after(parse_header(raw), end)


class TrafficTests(SynchronousTestCase):
    def test_what_was_sent_is_counted_by_ldsu(self) -> None:
        world = PmdWorld(self, ldsus=2)
        for index in (0, 1, 0):
            world.frame(index, payload=1024)
        world.frame(1, kind=VOID, gsns=5)
        world.durable(2)
        world.begin()
        sizes = {0: 0, 1: 0}
        for index, raw, _ in list(world.frames.values())[:2]:
            sizes[index] += len(raw)
        self.assertEqual(self.counts(world), [(sizes[0], 1024, 1), (sizes[1], 1024, 1)])
        world.durable()
        for index, raw, _ in list(world.frames.values())[2:]:
            sizes[index] += len(raw)
        self.assertEqual(self.counts(world), [(sizes[0], 2048, 2), (sizes[1], 1024, 1)])

    def counts(self, world: PmdWorld) -> list[tuple[int, int, int]]:
        status = world.traffic.status()
        self.assertGreater(status["cpu_seconds"], 0)
        self.assertEqual([one["name"] for one in status["ldsus"]], ["qds0", "qds1"])
        return [(u["frame_bytes"], u["data_bytes"], u["entries"]) for u in status["ldsus"]]


class OrderTests(SynchronousTestCase):
    """Frames leave in GSN order, as they are in the log, and none that could be lost."""

    def test_writelogs_are_merged_by_gsn(self) -> None:
        world = PmdWorld(self, ldsus=3)
        for index in (2, 0, 1, 1, 0, 2, 2, 0, 1, 0):
            world.frame(index)
        world.durable()
        world.begin()
        self.assertEqual(world.link.sent, list(range(1, 11)))
        sent = b"".join(f for buffer in world.link.buffers for f in buffer)
        self.assertEqual(sent, b"".join(raw for _, raw, _ in world.frames.values()))
        self.assertEqual(world.failures, [])

    def test_void_ranges_and_frames_of_several_entries_keep_the_numbers_contiguous(self) -> None:
        world = PmdWorld(self, ldsus=2)
        world.frame(0)
        world.frame(1, kind=VOID, gsns=5)
        world.frame(0)
        world.durable()
        world.begin()
        self.assertEqual(world.link.sent, [1, 2, 7])

    def test_nothing_beyond_the_groups_durable_gsn(self) -> None:
        world = PmdWorld(self, ldsus=2)
        world.frame(0)
        missing = world.frame(1)
        world.frame(0)
        # qds0 is durable beyond a frame of qds1 that is not: a power cut may still take that one.
        world.begin()
        world.told_durable(1, 0)
        self.assertEqual(world.link.sent, [1], "NO-AHEAD")
        world.told_durable(1, 1)
        self.assertEqual(world.link.sent, [1], "NO-AHEAD")
        world.told_durable(missing)
        self.assertEqual(world.link.sent, [1, 2])
        world.told_durable(3)
        self.assertEqual(world.link.sent, [1, 2, 3])

    def test_frame_that_is_only_partly_durable_waits(self) -> None:
        world = PmdWorld(self)
        world.frame(0, kind=VOID, gsns=4)
        world.begin()
        for gsn in range(4):
            world.durable(gsn)
            self.assertEqual(world.link.sent, [], f"durable up to {gsn}")
        world.durable(4)
        self.assertEqual(world.link.sent, [1])

    def test_durable_gsn_never_goes_back(self) -> None:
        world = PmdWorld(self)
        world.begin()
        world.frame(0)
        world.link.can_send = False
        world.durable()
        world.told_durable(0)
        world.link.can_send = True
        world.out.pump()
        self.assertEqual(world.link.sent, [1])

    def test_what_is_not_durable_is_not_even_read(self) -> None:
        world = PmdWorld(self)
        world.frame(0)
        world.units[0].durable = world.logs[0].head
        world.frame(0)
        world.begin()
        world.told_durable(2)
        self.assertEqual(world.link.sent, [1])
        self.assertEqual(world.failures, [])

    def test_around_the_rings_end(self) -> None:
        world = PmdWorld(self, log=256 * KIB)
        world.begin()
        log = world.logs[0]
        for _ in range(60):
            gsn = world.frame(0, 12 * KIB)
            world.durable()
            world.out.acknowledged(Ack(gsn, gsn))
            log.durable_tail = log.head
        self.assertGreater(log.head, 2 * log.ring.size)
        self.assertEqual(world.link.sent, list(range(1, 61)))
        self.assertEqual(world.failures, [])

    def test_a_pad_whose_record_a_crash_took(self) -> None:
        """It ends what is durable; what is appended there later goes on behind it."""
        world = PmdWorld(self, log=256 * KIB)
        world.begin()
        log = world.logs[0]
        while log.ring.contiguous(log.head) > 16 * KIB:
            gsn = world.frame(0, 8 * KIB)
            world.durable()
            world.out.acknowledged(Ack(gsn, gsn))
            log.durable_tail = log.head
        rest = log.ring.contiguous(log.head)
        pad = pack_record(Record(PAD, rest, 0, log.head, log.head), log.log)
        log.write([(log.ring.physical(log.head), [pad])])
        log.head += rest
        world.durable()
        self.assertEqual(world.failures, [])
        world.frame(0)
        world.durable()
        self.assertEqual((world.link.sent, world.failures), (list(world.frames), []))


class PressureTests(SynchronousTestCase):
    """The window, the transport's buffer, one read at a time."""

    def test_window_bounds_what_is_not_acknowledged(self) -> None:
        world = PmdWorld(self, window=64 * KIB)
        self.patch(outbound_module, "SEND_BUFFER_BYTES", 8 * KIB)
        for _ in range(40):
            world.frame(0, 4 * KIB)
        world.durable()
        world.begin()
        for _ in range(40):
            sent = len(world.link.sent)
            flying = sum(len(raw) for gsn, (_, raw, _) in world.frames.items() if gsn <= sent)
            flying -= sum(len(world.frames[gsn][1]) for gsn in range(1, world.told[-1][1] + 1))
            self.assertLess(flying, 64 * KIB + 16 * KIB)
            if sent == 40:
                break
            self.assertGreaterEqual(flying, 64 * KIB)
            world.out.acknowledged(Ack(world.told[-1][1] + 3, 0))
        self.assertEqual(world.link.sent, list(range(1, 41)))

    def test_full_transport_holds_everything_back(self) -> None:
        world = PmdWorld(self)
        world.begin()
        world.link.can_send = False
        world.frame(0)
        world.durable()
        self.assertEqual(world.link.sent, [])
        world.link.can_send = True
        world.out.pump()
        self.assertEqual(world.link.sent, [1])

    def test_buffers_are_bounded(self) -> None:
        world = PmdWorld(self, log=8 * MIB)
        for _ in range(50):
            world.frame(0, 100 * KIB)
        world.durable()
        world.begin()
        self.assertEqual(len(world.link.sent), 50)
        for buffer in world.link.buffers:
            self.assertLess(sum(map(len, buffer)), SEND_BUFFER_BYTES + 101 * KIB)

    def test_one_read_at_a_time(self) -> None:
        world = PmdWorld(self, ldsus=2, stepped=True)
        world.frame(0)
        world.frame(1)
        world.begin()
        world.durable()
        world.durable()
        self.assertEqual(len(world.steps.waiting), 1)
        world.steps.step_all()
        self.assertEqual(world.link.sent, [1, 2])

    def test_nothing_leaves_after_the_end(self) -> None:
        world = PmdWorld(self, stepped=True)
        world.frame(0)
        world.durable()
        world.begin()
        world.out.end()
        world.steps.step_all()
        world.durable()
        world.out.pump()
        self.assertEqual(world.link.sent, [])
        self.assertEqual(len(world.steps.waiting), 0)
        self.assertEqual(world.failures, [])

    def test_last_frame_of_every_buffer_asks_for_an_ack(self) -> None:
        world = PmdWorld(self)
        self.patch(outbound_module, "SEND_BUFFER_BYTES", 10 * KIB)
        for _ in range(7):
            world.frame(0, 4 * KIB)
        world.durable()
        link = Link(cast(Any, None), Clock())
        link.transport = StringTransport()
        band = Band(Opener(lambda: world.out.begin(band, {0: Cursor()}, 1, 7)), Clock(), Wire())
        band.link_made(link)
        said = list(stream.MessageParser().feed(link.transport.value()))
        self.assertEqual([m.type for m in said], [stream.FRAME] * 7)
        self.assertEqual([m.flags for m in said], [0, 0, 1, 0, 0, 1, 1])


class AckTests(SynchronousTestCase):
    """An ACK moves the committed ends, once, and only over what was sent."""

    def setUp(self) -> None:
        self.world = world = PmdWorld(self, ldsus=2)
        for index in (0, 1, 0, 1):
            world.frame(index)
        world.durable()
        world.begin()

    def end(self, gsn: int) -> Committed:
        index, raw, end = self.world.frames[gsn]
        return Committed(index, end, *self.world.cursor(gsn).point(index))

    def test_each_ldsus_end_is_reported_once(self) -> None:
        world = self.world
        world.out.acknowledged(Ack(3, 1))
        self.assertEqual(world.told[-1], (4, 3, 1))
        self.assertEqual(sorted(world.ends[-1]), [self.end(3), self.end(2)])
        self.assertEqual(world.units[0].committed, world.cursor(3))
        world.out.acknowledged(Ack(4, 4))
        self.assertEqual(world.told[-1], (4, 4, 4))
        self.assertEqual(world.ends[-1], [self.end(4)])

    def test_ack_within_a_frame_does_not_commit_it(self) -> None:
        world = self.world
        world.frame(0, kind=VOID, gsns=3)
        world.durable()
        world.out.acknowledged(Ack(6, 0))
        self.assertEqual(world.units[0].committed, world.cursor(3))
        world.out.acknowledged(Ack(7, 0))
        self.assertEqual(world.units[0].committed, world.cursor(5))

    def test_ack_of_what_was_never_sent_is_refused(self) -> None:
        world = self.world
        world.link.can_send = False
        world.frame(0)
        world.durable()
        before = list(world.told)
        error = self.assertRaises(ProtocolError, world.out.acknowledged, Ack(5, 0))
        self.assertIn("only 4 was sent", error.message)
        self.assertEqual(world.told, before)
        self.assertEqual(world.units[0].committed, Cursor())

    def test_older_ack_moves_nothing_back(self) -> None:
        world = self.world
        world.out.acknowledged(Ack(4, 2))
        committed = [unit.committed for unit in world.units]
        world.out.acknowledged(Ack(1, 2))
        self.assertEqual([unit.committed for unit in world.units], committed)
        self.assertEqual(world.ends[-1], [])

    def test_beginning_reports_where_the_histories_meet(self) -> None:
        world = PmdWorld(self, ldsus=2)
        for index in (0, 1, 0, 1):
            world.frame(index)
        world.durable()
        cursors = {0: world.cursor(1), 1: world.cursor(2)}
        world.out.begin(cast(Link, world.link), cursors, 3, 4)
        self.assertEqual(world.told[0][:2], (2, 2))
        self.assertEqual(
            [e.position for e in world.ends[0]], [c.position for c in cursors.values()]
        )
        self.assertEqual(world.link.sent, [3, 4])
        world.out.acknowledged(Ack(4, 4))
        self.assertEqual(world.units[1].committed, world.cursor(4))


class DamageTests(SynchronousTestCase):
    """A writelog that does not read as it was written is told, and nothing of it leaves."""

    def damaged(self, ldsus: int = 1) -> PmdWorld:
        world = PmdWorld(self, ldsus=ldsus)
        for _ in range(4):
            for index in range(ldsus):
                world.frame(index)
        return world

    def failed(self, world: PmdWorld, name: str) -> str:
        (error,) = world.failures
        self.assertIn(f"writelog of {name}", error.message)
        self.assertIn("qdswlscan", error.hint)
        return error.message

    def test_frame_is_checked_before_it_is_sent(self) -> None:
        world = self.damaged()
        place = world.logs[0].ring.physical(world.frames[3][2]).offset - 4096
        world.devices[0].corrupt(place + 300, b"\xee")
        world.begin()
        world.durable()
        self.assertEqual(world.link.sent, [1, 2], "rules.md 6")
        self.assertIn("checksum", self.failed(world, "qds0"))

    def test_only_the_damaged_writelog_is_named(self) -> None:
        world = self.damaged(2)
        world.devices[1].corrupt(world.logs[1].ring.start + 300, b"\xee")
        world.begin()
        world.durable()
        self.assertEqual(world.link.sent, [])
        self.failed(world, "qds1")

    def test_writelog_that_has_vanished(self) -> None:
        world = self.damaged(2)
        file = world.devices[1]._memory
        assert file is not None
        os.truncate(file, 0)
        world.begin()
        world.durable()
        self.assertEqual(world.link.sent, [])
        self.assertIn("short read", self.failed(world, "qds1"))
        os.truncate(file, world.devices[1].size)

    def test_writelog_that_cannot_be_read(self) -> None:
        world = self.damaged(2)
        world.units[1].devices = {0: (os.open("/", os.O_RDONLY), 0)}
        self.addCleanup(os.close, world.units[1].devices[0][0])
        world.begin()
        world.durable()
        self.assertEqual(world.link.sent, [])
        self.assertIn("directory", self.failed(world, "qds1"))


class FindTests(SynchronousTestCase):
    """A resume goes on only where the histories are proven to be one (rules.md 8)."""

    def setUp(self) -> None:
        self.world = PmdWorld(self, ldsus=2)
        for index in (0, 1, 1, 0, 1, 1):
            self.world.frame(index)
        self.world.durable()
        self.unit = self.world.units[1]
        self.mine = [2, 3, 5, 6]

    def refused(self, point: Point, *words: str) -> None:
        error = self.assertRaises(DivergedError, self.unit.find, point)
        for word in ("qds1", *words):
            self.assertIn(word, error.message)
        self.assertIn("qdsrefresh --full", error.hint)

    def test_every_place_in_the_log(self) -> None:
        self.assertEqual(self.unit.find(BEGINNING), Cursor())
        for gsn in self.mine:
            place = self.world.cursor(gsn)
            self.assertEqual(self.unit.find(place.point(1)), place)

    def test_going_on_in_the_middle_skips_and_doubles_nothing(self) -> None:
        world = self.world
        for reached in range(7):
            link = FakeLink()
            cursors = {}
            for unit in world.units:
                own = [g for g in range(1, reached + 1) if world.frames[g][0] == unit.index]
                at = world.cursor(own[-1]) if own else Cursor()
                unit.committed = Cursor()
                cursors[unit.index] = unit.find(at.point(unit.index))
            out = Outbound(
                world.units, ImmediateWorker(), MIB, world._committed, world.failures.append
            )
            out.begin(cast(Link, link), cursors, reached + 1, 6)
            self.assertEqual(link.sent, list(range(reached + 1, 7)))
        self.assertEqual(world.failures, [])

    def test_another_history_of_the_same_length(self) -> None:
        for gsn in self.mine:
            point = self.world.cursor(gsn).point(1)
            self.refused(Point(point.sequence, OTHER_CHAIN), "history differs")
        self.refused(Point(1, OTHER_CHAIN), "history differs")

    def test_a_secondary_that_lost_committed_frames(self) -> None:
        self.unit.committed = self.world.cursor(3)
        self.refused(self.world.cursor(2).point(1), "lost committed frames")
        self.refused(BEGINNING, "lost committed frames")
        self.assertEqual(self.unit.find(self.unit.committed.point(1)), self.unit.committed)
        self.unit.committed = Cursor(self.unit.committed.position, 4, {1: Point(3, OTHER_CHAIN)})
        self.refused(self.world.cursor(3).point(1), "history differs")

    def test_a_secondary_that_is_ahead(self) -> None:
        last = self.world.cursor(6).point(1)
        self.refused(Point(last.sequence + 1, OTHER_CHAIN), "is ahead")
        # What is appended and not durable does not count: a power cut may take it.
        self.world.frame(1)
        self.refused(self.world.cursor(7).point(1), "is ahead")

    def test_more_becomes_durable_meanwhile(self) -> None:
        """It is no damage that a read did not go so far."""
        middle, end = self.world.frames[3][2], self.unit.durable
        known = iter([middle, middle, middle, end])

        class Growing(OutUnit):
            durable = property(lambda _self: next(known, end), lambda *_: None)

        self.unit.__class__ = Growing
        self.refused(Point(4, OTHER_CHAIN), "ahead")

    def test_damage_on_the_way_is_no_divergence(self) -> None:
        """A refresh must not be told to begin anew because a device has lost something."""
        point = self.world.cursor(6).point(1)
        place = self.world.logs[1].ring.physical(self.world.frames[3][2]).offset - 4096
        self.world.devices[1].corrupt(place + 300, b"\xee")
        error = self.assertRaises(QdsError, self.unit.find, point)
        self.assertIsInstance(error, CorruptError)
        self.assertIn("writelog of qds1", error.message)
        self.assertIn("checksum", error.message)

    def test_device_that_cannot_be_read_is_no_internal_error(self) -> None:
        self.unit.devices = {0: (os.open("/", os.O_RDONLY), 0)}
        self.addCleanup(os.close, self.unit.devices[0][0])
        error = self.assertRaises(CorruptError, self.unit.find, self.world.cursor(6).point(1))
        self.assertIn("directory", error.message)
