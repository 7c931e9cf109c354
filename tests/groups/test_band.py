"""Several paths as one stream: striping, loss, slowness, order, and what no path may do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from qdsmirror.core import stream
from qdsmirror.core.compression import Method
from qdsmirror.core.frames import parse_header
from qdsmirror.core.stream import ACK, ANSWER, ASK, COMPRESSED, REPORT, Message
from qdsmirror.errors import ProtocolError
from qdsmirror.groups import session as session_module
from qdsmirror.groups.band import Band
from qdsmirror.groups.holdback import HoldBack
from qdsmirror.groups.session import Session
from qdsmirror.groups.wire import Wire
from qdsmirror.limits import (
    COMPRESSION_BUFFERS_MAX,
    LETTER_EVERYWHERE_BYTES_MAX,
    PATH_FORGET_SECONDS,
    PATH_LOOK_SECONDS,
    PATH_PATIENCE_SECONDS_MIN,
)
from qdsmirror.net.link import ILinkOwner, Link
from tests.fakes import StepWorker
from tests.storage.logworld import FrameMaker, write

IDENT = b"I" * 16


class Transport(StringTransport):
    """One end of a path; what was written waits until the test has it arrive."""

    def abortConnection(self) -> None:  # noqa: N802
        self.disconnecting = True


@implementer(ILinkOwner)
class Owner:
    """A group, of either side."""

    def __init__(self) -> None:
        self.made = 0
        self.writable = 0
        self.messages: list[Message] = []
        self.lost: list[str] = []
        self.error: ProtocolError | None = None

    def link_made(self, link: Any) -> None:
        self.made += 1

    def link_message(self, link: Any, message: Message) -> None:
        if self.error is not None:
            raise self.error
        self.messages.append(message)

    def link_writable(self, link: Any) -> None:
        self.writable += 1

    def link_lost(self, link: Any, reason: str) -> None:
        self.lost.append(reason)

    @property
    def gsns(self) -> list[int]:
        return [parse_header(m.payload).gsn_first for m in self.messages if m.type == stream.FRAME]


class Path:
    """A connection between the two ends; bytes arrive when they are told to."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.near = Link(world.band, world.clock)
        self.far = Link(world.session, world.clock)
        self.up = True
        for link in (self.far, self.near):
            link.makeConnection(Transport())

    def forth(self) -> None:
        self._move(self.near, self.far)

    def back(self) -> None:
        self._move(self.far, self.near)

    def _move(self, one: Link, other: Link) -> None:
        data = one.transport.value()
        one.transport.clear()
        if data and self.up:
            other.dataReceived(data)

    @property
    def carries(self) -> list[int]:
        """First GSNs of the plain frames that are on their way."""
        found = stream.MessageParser().feed(self.near.transport.value())
        return [parse_header(m.payload).gsn_first for m in found if m.type == stream.FRAME]

    def fill(self) -> None:
        self.near.pauseProducing()

    def drain(self) -> None:
        self.near.resumeProducing()

    def lose(self) -> None:
        """Lose it at both ends, with what is on its way."""
        self.up = False
        for link in (self.near, self.far):
            link.transport.clear()
            link.connectionLost(Failure(ConnectionDone()))


class World:
    """A band and a session."""

    def __init__(self, paths: int = 2, method: Method | None = None, agree: bool = True) -> None:
        self.clock = Clock()
        self.near, self.far = Owner(), Owner()
        self.near_wire, self.far_wire = Wire(), Wire()
        self.workers = [StepWorker(), StepWorker()]
        self.unpacker = StepWorker()
        method = method or Method()
        self.hold_back = HoldBack(self.clock, lambda: self.band.go_on())
        self.band = Band(
            self.near, self.clock, self.near_wire, several=paths > 1, method=method,
            compressors=lambda: self.workers, hold_back=self.hold_back,
        )  # fmt: skip
        if agree:
            self.band.agreed(method.name)
        self.session = Session(
            self.far, self.clock, IDENT, paths=paths, method=method.name, wire=self.far_wire,
            unpacker=lambda: self.unpacker, next_gsn=lambda: 1,
        )  # fmt: skip
        self.maker = FrameMaker()
        self.paths = [Path(self) for _ in range(paths)]

    def frame(self, length: int = 512) -> memoryview:
        number = self.maker.gsn
        return memoryview(self.maker.make(0, [write(0, number.to_bytes(8, "big") * (length // 8))]))

    def send(self, frames: int = 1, length: int = 512) -> None:
        self.band.send_frames([self.frame(length) for _ in range(frames)])

    def ack(self, committed: int) -> None:
        self.session.acknowledge(committed, committed)
        for path in self.paths:
            path.back()


class StripingTests(SynchronousTestCase):
    def test_over_what_takes_more(self) -> None:
        world = World()
        one, two = world.paths
        for _ in range(4):
            world.send()
        self.assertEqual((one.carries, two.carries), ([1, 3], [2, 4]))
        one.fill()
        for _ in range(3):
            self.assertTrue(world.band.can_send)
            world.send()
        self.assertEqual((one.carries, two.carries), ([1, 3], [2, 4, 5, 6, 7]))
        two.fill()
        self.assertFalse(world.band.can_send)
        told = world.near.writable
        one.drain()
        self.assertTrue(world.band.can_send)
        self.assertEqual(world.near.writable, told + 1)

    def test_in_order_again(self) -> None:
        world = World(3)
        one, two, three = world.paths
        for _ in range(6):
            world.send(2)
        three.forth()
        two.forth()
        self.assertEqual(world.far.gsns, [])
        one.forth()
        self.assertEqual(world.far.gsns, list(range(1, 13)))
        self.assertEqual(world.session._ahead_bytes, 0)
        flags = [m.flags for m in world.far.messages]
        self.assertEqual(flags, [0, 1] * 6)

    def test_acks_come_over_all_paths_and_count_once(self) -> None:
        world = World()
        world.send()
        world.session.acknowledge(1, 0)
        for path in world.paths:
            path.back()
        acks = [stream.parse_ack(m.payload) for m in world.near.messages]
        self.assertEqual(acks, [stream.Ack(1, 0)])
        self.assertEqual(len(world.band._unacknowledged), 0)
        self.assertEqual({pace.under_way for pace in world.band._paces.values()}, {0})


class LossTests(SynchronousTestCase):
    def test_what_a_lost_path_had_goes_over_another(self) -> None:
        world = World()
        one, two = world.paths
        for _ in range(4):
            world.send()
        two.forth()
        one.lose()
        self.assertEqual(two.carries, [1, 3])
        world.send()
        two.forth()
        self.assertEqual(world.far.gsns, [1, 2, 3, 4, 5])
        self.assertEqual((world.near.lost, world.far.lost), ([], []))

    def test_only_what_was_not_acknowledged(self) -> None:
        world = World()
        one, two = world.paths
        for _ in range(6):
            world.send()
        for path in world.paths:
            path.forth()
        world.ack(3)
        one.lose()
        self.assertEqual(two.carries, [5])
        two.forth()
        self.assertEqual(world.far.gsns, [1, 2, 3, 4, 5, 6], "5 came before it was lost, too")

    def test_what_was_lost_waits_for_a_path_that_takes_it(self) -> None:
        world = World()
        one, two = world.paths
        world.send()
        two.fill()
        one.lose()
        self.assertEqual(two.carries, [])
        self.assertFalse(world.band.can_send)
        two.drain()
        self.assertEqual(two.carries, [1])

    def test_a_path_returns(self) -> None:
        world = World()
        world.paths[0].lose()
        world.send()
        again = Path(world)
        world.paths.append(again)
        self.assertEqual(world.near.made, 1)
        world.paths[1].fill()
        world.send()
        self.assertEqual(again.carries, [2])
        again.forth()
        world.paths[1].forth()
        self.assertEqual(world.far.gsns, [1, 2])

    def test_an_ack_that_went_with_the_only_path_comes_over_the_next(self) -> None:
        """What is sent again is known there, and asks for nothing."""
        world = World()
        one, two = world.paths
        two.lose()
        world.send(2)
        one.forth()
        world.session.acknowledge(2, 1)
        again = Path(world)
        one.lose()
        self.assertEqual(again.carries, [1, 2])
        again.forth()
        again.back()
        self.assertEqual(world.far.gsns, [1, 2])
        acks = [stream.parse_ack(m.payload) for m in world.near.messages]
        self.assertEqual(acks, [stream.Ack(2, 1)])
        self.assertEqual(len(world.band._unacknowledged), 0)

    def test_the_last_one_ends_the_session(self) -> None:
        world = World()
        gone = world.band.lost(world.paths[0].near)
        for path in world.paths:
            path.lose()
        self.assertEqual((len(world.near.lost), len(world.far.lost)), (1, 1))
        self.assertIn("closed cleanly", self.successResultOf(gone))
        self.assertTrue(world.band.ended)
        self.assertEqual(world.clock.getDelayedCalls(), [])
        late = Path(world)
        self.assertTrue(late.near.transport.disconnecting and late.far.transport.disconnecting)
        self.assertEqual((world.near.made, world.far.made), (1, 1))

    def test_single_path_keeps_nothing(self) -> None:
        world = World(1)
        world.send(3)
        self.assertEqual(len(world.band._unacknowledged), 0)
        world.paths[0].forth()
        self.assertEqual(world.far.gsns, [1, 2, 3])


class SlowTests(SynchronousTestCase):
    def test_what_is_late_goes_over_an_idle_path_once(self) -> None:
        world = World()
        one, two = world.paths
        for _ in range(4):
            world.send()
        two.forth()
        world.clock.advance(PATH_PATIENCE_SECONDS_MIN / 2)
        self.assertEqual(two.carries, [])
        world.clock.pump([PATH_LOOK_SECONDS] * 6)
        self.assertEqual(two.carries, [1, 3])
        two.forth()
        self.assertEqual(world.far.gsns, [1, 2, 3, 4])
        one.forth()
        self.assertEqual(world.far.gsns, [1, 2, 3, 4], "the second time they are dropped")
        self.assertEqual(world.session._ahead_bytes, 0)
        world.clock.pump([PATH_LOOK_SECONDS] * 20)
        self.assertEqual((one.carries, two.carries), ([], []))

    def test_a_path_that_hangs_gets_nothing_more_until_it_is_heard(self) -> None:
        world = World()
        one, two = world.paths
        for _ in range(2):
            world.send()
        world.clock.pump([PATH_LOOK_SECONDS] * 8)
        for _ in range(3):
            world.send()
        self.assertEqual(one.carries, [1])
        self.assertEqual(two.carries, [2, 1, 3, 4, 5])
        world.session.acknowledge(0, 0)
        one.back()
        world.send()
        self.assertEqual(one.carries, [1, 6])

    def test_the_last_path_is_used_though_it_is_slow(self) -> None:
        world = World()
        one, two = world.paths
        for _ in range(2):
            world.send()
        world.clock.pump([PATH_LOOK_SECONDS] * 8)
        two.lose()
        self.assertEqual(one.carries, [1, 1, 2])
        world.send()
        one.forth()
        self.assertEqual(world.far.gsns, [1, 2, 3])

    def test_slow_for_all_is_not_late(self) -> None:
        """While a long link needs seconds for a stripe, nothing is sent twice."""
        world = World()
        for gsn in range(1, 40):
            world.send()
            for path in world.paths:
                path.forth()
            world.clock.advance(PATH_PATIENCE_SECONDS_MIN * 0.9)
            world.ack(gsn)
        sent = sum(map(len, (path.carries for path in world.paths)))
        world.send()
        world.send()
        world.clock.pump([PATH_LOOK_SECONDS] * 6)
        self.assertEqual(sum(map(len, (path.carries for path in world.paths))), sent + 2)

    def test_nothing_is_late_while_no_path_is_idle(self) -> None:
        world = World()
        one, two = world.paths
        world.send()
        two.fill()
        world.clock.pump([PATH_LOOK_SECONDS] * 40)
        self.assertEqual(len(world.band._waiting), 0)


class PaceTests(SynchronousTestCase):
    """A path is left out where all that comes behind would wait for it."""

    def measure(self, world: World, path: Path, seconds: float, length: int = 64 * 1024) -> None:
        """Have a path need so long for a frame."""
        others = [one for one in world.paths if one is not path]
        for other in others:
            other.near.can_send = False
        send, path.near.send = path.near.send, lambda data: (send(data), path.fill())  # type: ignore[method-assign,func-returns-value,assignment]
        world.send(1, length)
        path.near.send = send  # type: ignore[method-assign]
        world.clock.advance(seconds)
        path.drain()
        for other in others:
            other.near.can_send = True

    def test_too_slow_beside_another(self) -> None:
        world = World()
        one, two = world.paths
        self.measure(world, one, 0.05)
        self.measure(world, two, 10.0)
        world.ack(2)
        sent = len(two.carries)
        for _ in range(5):
            world.send(1, 64 * 1024)
        self.assertEqual(len(two.carries), sent)
        one.fill()
        self.assertFalse(world.band.can_send)
        world.send(1, 64 * 1024)
        self.assertEqual(len(two.carries), sent, "it waits for the quick one")
        one.lose()
        self.assertEqual(len(two.carries), sent + 6)

    def test_slower_but_worth_while(self) -> None:
        world = World()
        one, two = world.paths
        self.measure(world, one, 0.05)
        self.measure(world, two, 0.4)
        world.ack(2)
        sent = len(two.carries)
        for _ in range(4):
            world.send(1, 64 * 1024)
        self.assertEqual(len(two.carries), sent + 2)

    def test_both_slow(self) -> None:
        world = World()
        one, two = world.paths
        for path in world.paths:
            self.measure(world, path, 10.0)
        world.ack(2)
        sent = len(two.carries)
        for _ in range(4):
            world.send(1, 64 * 1024)
        self.assertEqual(len(two.carries), sent + 2)

    def test_gets_another_chance(self) -> None:
        world = World()
        one, two = world.paths
        self.measure(world, two, 10.0)
        self.measure(world, one, 0.05)
        world.ack(2)
        sent = len(two.carries)
        world.clock.advance(PATH_FORGET_SECONDS)
        world.send(1, 64 * 1024)
        world.send(1, 64 * 1024)
        self.assertEqual(len(two.carries), sent + 1)


class RefusalTests(SynchronousTestCase):
    """What may not be is the end of the whole session, whichever path it came by."""

    def ended(self, world: World) -> bool:
        return all(path.far.transport.disconnecting for path in world.paths)

    def test_an_error_of_the_group(self) -> None:
        world = World()
        world.far.error = ProtocolError("no")
        world.send()
        world.paths[0].forth()
        self.assertTrue(self.ended(world))
        world.send()
        world.paths[1].forth()
        self.assertEqual(world.far.messages, [])

    def test_an_error_over_an_ack(self) -> None:
        world = World()
        world.near.error = ProtocolError("no")
        world.ack(1)
        self.assertTrue(all(path.near.transport.disconnecting for path in world.paths))
        self.assertFalse(world.band._links and world.band._look)

    def test_more_than_any_window_lets_come(self) -> None:
        world = World()
        self.patch(session_module, "AHEAD_BYTES_MAX", 8000)
        for _ in range(40):
            world.send()
        world.paths[1].forth()
        self.assertTrue(self.ended(world))

    def test_a_frame_within_another(self) -> None:
        world = World()
        first = world.maker.make(0, [write(0, b"x" * 512), write(512, b"y" * 512)])
        other = FrameMaker()
        other.gsn = 2
        for raw in (first, other.make(0, [write(0, b"z" * 512), write(512, b"z" * 512)])):
            world.paths[0].far.dataReceived(stream.pack_frames([raw], True))
        self.assertTrue(self.ended(world))

    def test_join(self) -> None:
        world = World(2)
        world.session.check_join(IDENT)
        self.assertRaises(ProtocolError, world.session.check_join, b"J" * 16)
        for _ in range(2):
            Path(world)
        self.assertRaises(ProtocolError, world.session.check_join, IDENT)
        over = World(2)
        over.session.close("over")
        self.assertRaises(ProtocolError, over.session.check_join, IDENT)
        self.assertRaises(ProtocolError, World(1).session.check_join, IDENT)

    def test_letters_over_a_single_path(self) -> None:
        world = World(1)
        letter = stream.pack_letter(1, stream.pack_relayed(ASK, b"x"))
        world.paths[0].far.dataReceived(letter)
        self.assertTrue(self.ended(world))


class PressureTests(SynchronousTestCase):
    def test_paused_on_all_paths_and_nothing_is_given(self) -> None:
        world = World()
        one, two = world.paths
        world.session.pause_reading()
        for path in world.paths:
            self.assertEqual(path.far.transport.producerState, "paused")
        for _ in range(2):
            world.send()
        two.forth()
        one.forth()
        self.assertEqual(world.far.gsns, [])
        world.session.resume_reading()
        self.assertEqual(world.far.gsns, [1, 2])
        self.assertEqual(one.far.transport.producerState, "producing")

    def test_paused_again_in_the_middle(self) -> None:
        world = World()
        world.session.pause_reading()
        for _ in range(2):
            world.send()
        for path in world.paths:
            path.forth()
        self.patch(world.far, "link_message", self.pausing(world))
        world.session.resume_reading()
        self.assertEqual(world.far.gsns, [1])
        self.assertEqual(world.paths[0].far.transport.producerState, "paused")
        world.session.resume_reading()
        self.assertEqual(world.far.gsns, [1, 2])

    def pausing(self, world: World) -> Any:
        def link_message(link: Any, message: Message) -> None:
            world.far.messages.append(message)
            link.pause_reading()

        return link_message

    def test_a_path_that_joins_meanwhile_is_paused_too(self) -> None:
        world = World(3)
        world.paths[0].lose()
        world.session.pause_reading()
        late = Path(world)
        self.assertEqual(late.far.transport.producerState, "paused")


class LetterTests(SynchronousTestCase):
    def asked(self, owner: Owner) -> list[bytes]:
        return [bytes(m.payload) for m in owner.messages if m.type == ASK]

    def test_each_arrives_once_by_whichever_path(self) -> None:
        for lost in (0, 1):
            world = World()
            world.band.send(stream.pack_relayed(ASK, b"short"))
            world.band.send(stream.pack_relayed(ASK, b"l" * (LETTER_EVERYWHERE_BYTES_MAX - 10)))
            world.paths[lost].lose()
            other = world.paths[1 - lost]
            other.forth()
            self.assertEqual(
                list(map(len, self.asked(world.far))), [5, LETTER_EVERYWHERE_BYTES_MAX - 10]
            )
            other.back()
            self.assertEqual(world.band._mail._letters.unreceived, [])  # type: ignore[union-attr]

    def test_an_ack_waits_for_what_was_said_before_it(self) -> None:
        world = World()
        one, two = world.paths
        long = b"l" * (LETTER_EVERYWHERE_BYTES_MAX + 1)
        world.session.send(stream.pack_relayed(ANSWER, long))
        world.session.send(stream.pack_relayed(REPORT, b"{}"))
        world.session.acknowledge(3, 1)
        world.session.acknowledge(4, 1)
        two.back()
        self.assertEqual([m.type for m in world.near.messages], [])
        one.back()
        types = [m.type for m in world.near.messages]
        self.assertEqual(types, [ANSWER, REPORT, ACK])
        self.assertEqual(stream.parse_ack(world.near.messages[-1].payload), (4, 1, 2))

    def test_acks_that_were_overtaken_are_dropped(self) -> None:
        world = World()
        one, two = world.paths
        world.session.acknowledge(3, 1)
        two.back()
        two.far.send(stream.pack_ack(4, 4))
        two.back()
        one.back()
        acks = [stream.parse_ack(m.payload) for m in world.near.messages]
        self.assertEqual(acks, [(3, 1, 0), (4, 4, 0)])

    def test_both_ways(self) -> None:
        world = World()
        world.session.send(stream.pack_relayed(ASK, b"back"))
        for path in world.paths:
            path.back()
        self.assertEqual(self.asked(world.near), [b"back"])

    def test_over_one_path_they_are_as_they_are(self) -> None:
        world = World(1)
        world.band.send(stream.pack_relayed(ASK, b"x"))
        self.assertEqual(world.paths[0].near.transport.value(), stream.pack_relayed(ASK, b"x"))
        world.paths[0].forth()
        self.assertEqual(self.asked(world.far), [b"x"])


class CompressionTests(SynchronousTestCase):
    def messages(self, path: Path) -> Sequence[Message]:
        return list(stream.MessageParser().feed(path.near.transport.value()))

    def test_small_at_once_and_large_by_workers_in_order(self) -> None:
        world = World(1, Method("zstd", 3))
        path = world.paths[0]
        world.send(2, 4096)
        self.assertEqual([m.flags for m in self.messages(path)], [COMPRESSED | 1])
        world.send(1, 64 * 1024)
        world.send(1, 64 * 1024)
        world.send(1, 512)
        self.assertEqual(len(self.messages(path)), 1)
        first, second = world.workers
        second.step()
        self.assertEqual(len(self.messages(path)), 1)
        first.step()
        self.assertEqual(len(self.messages(path)), 3)
        first.step()
        path.forth()
        self.assertEqual(world.far.gsns, [1, 2])
        world.unpacker.step_all()
        self.assertEqual(world.far.gsns, [1, 2, 3, 4, 5])
        self.assertEqual([m.flags for m in world.far.messages], [0, 1, 1, 1, 1])
        for wire in (world.near_wire, world.far_wire):
            self.assertLess(wire.wire_bytes, 0.1 * wire.frame_bytes)
        self.assertEqual(vars(world.near_wire), vars(world.far_wire))

    def test_bounded(self) -> None:
        world = World(1, Method("zstd", 3))
        given = 0
        while world.band.can_send:
            world.send(1, 64 * 1024)
            given += 1
        self.assertEqual(given, COMPRESSION_BUFFERS_MAX)
        world.workers[0].step()
        self.assertTrue(world.band.can_send)
        self.assertEqual(world.near.writable, 1)

    def test_over_several_paths_and_lost(self) -> None:
        world = World(2, Method("lz4"))
        for _ in range(4):
            world.send(3, 4096)
        world.paths[1].forth()
        world.paths[0].lose()
        world.paths[1].forth()
        self.assertEqual(world.far.gsns, list(range(1, 13)))

    def test_not_agreed_on(self) -> None:
        world = World(1, Method("zstd", 3), agree=False)
        world.band.agreed("none")
        world.send(1, 4096)
        self.assertEqual([m.flags for m in self.messages(world.paths[0])], [1])

    def test_nothing_of_a_lost_session_is_taken(self) -> None:
        world = World(1, Method("zstd", 3))
        world.send(1, 64 * 1024)
        world.workers[0].step()
        world.paths[0].forth()
        world.paths[0].lose()
        world.unpacker.step_all()
        self.assertEqual(world.far.gsns, [])
        world.send(1, 64 * 1024)
        world.workers[1].step_all()

    def test_damaged(self) -> None:
        world = World(1, Method("zstd", 3))
        world.send(1, 64 * 1024)
        world.workers[0].step()
        data = bytearray(world.paths[0].near.transport.value())
        data[40] ^= 255
        world.paths[0].far.dataReceived(bytes(data))
        world.unpacker.step_all()
        self.assertTrue(world.paths[0].far.transport.disconnecting)
        self.assertEqual(world.far.gsns, [])

    def test_what_is_declared_counts_before_it_is_unpacked(self) -> None:
        world = World(1, Method("zstd", 3))
        self.patch(session_module, "AHEAD_BYTES_MAX", 200 * 1024)
        for _ in range(4):
            world.send(1, 64 * 1024)
        for worker in world.workers:
            worker.step_all()
        world.paths[0].forth()
        self.assertTrue(world.paths[0].far.transport.disconnecting)
