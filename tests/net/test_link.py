"""The stream's shell: pings, silence, pressure, the end, and messages in pieces."""

from __future__ import annotations

from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IWriteDescriptor
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from qdsmirror.core import stream
from qdsmirror.core.stream import Message
from qdsmirror.errors import ProtocolError
from qdsmirror.limits import PING_SECONDS, SILENT_PEER_SECONDS
from qdsmirror.net.link import ILinkOwner, Link, LinkFactory


class Transport(StringTransport):
    """Tells an abort from a gentle end."""

    aborted = False

    def abortConnection(self) -> None:  # noqa: N802
        self.aborted = True
        super().abortConnection()


@implementer(ILinkOwner)
class Owner:
    def __init__(self) -> None:
        self.told: list[Any] = []
        self.error: ProtocolError | None = None

    def link_made(self, link: Link) -> None:
        self.told.append("made")

    def link_message(self, link: Link, message: Message) -> None:
        if self.error is not None:
            raise self.error
        self.told.append((message.type, message.flags, bytes(message.payload)))

    def link_writable(self, link: Link) -> None:
        self.told.append("writable")

    def link_lost(self, link: Link, reason: str) -> None:
        self.told.append(("lost", reason))


@implementer(IWriteDescriptor)
class Plain:
    """The socket's transport below TLS; counts what has been sent at once."""

    connected, disconnecting = True, False

    def __init__(self) -> None:
        self.flushed = 0

    def doWrite(self) -> None:  # noqa: N802
        self.flushed += 1


class LinkTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.owner = Owner()
        self.link = LinkFactory(self.owner, self.clock).buildProtocol(None)
        self.transport = Transport()
        self.link.makeConnection(self.transport)
        self.assertEqual(self.owner.told.pop(), "made")

    def lose(self) -> None:
        self.link.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def messages(self) -> list[Message]:
        return list(stream.MessageParser().feed(self.transport.value()))

    def test_what_is_sent_leaves_at_once(self) -> None:
        plain = Plain()
        self.transport.transport = plain  # type: ignore[attr-defined]
        self.link.send(b"x")
        self.assertEqual(plain.flushed, 1)
        # From within, a producer would go on that is paused.
        self.link.pauseProducing()
        self.link.send(b"y")
        self.assertEqual(plain.flushed, 1)

    def test_pings_keep_it_alive(self) -> None:
        for _ in range(20):
            self.clock.advance(PING_SECONDS)
            self.link.dataReceived(stream.pack_ping())
        self.assertEqual([m.type for m in self.messages()], [stream.PING] * 20)
        self.assertFalse(self.transport.aborted)
        self.assertEqual(self.owner.told, [])
        self.lose()

    def test_silent_peer_is_aborted(self) -> None:
        self.clock.advance(SILENT_PEER_SECONDS)
        self.assertFalse(self.transport.aborted)
        self.clock.advance(2 * PING_SECONDS)
        self.assertTrue(self.transport.aborted)
        self.lose()
        self.assertIn("silent", self.owner.told[-1][1])

    def test_our_own_pause_is_not_the_peers_silence(self) -> None:
        self.link.pause_reading()
        self.assertEqual(self.transport.producerState, "paused")
        self.clock.pump([PING_SECONDS] * 20)
        self.assertFalse(self.transport.aborted)
        self.link.resume_reading()
        self.assertEqual(self.transport.producerState, "producing")
        self.clock.pump([PING_SECONDS] * 4)
        self.assertFalse(self.transport.aborted)
        self.clock.pump([PING_SECONDS] * 2)
        self.assertTrue(self.transport.aborted)

    def test_what_was_sent_and_received_is_counted(self) -> None:
        self.link.send(stream.pack_ack(7, 6))
        self.link.dataReceived(stream.pack_ping())
        self.assertEqual((self.link.sent_bytes, self.link.received_bytes), (24, 8))

    def test_frames_of_a_buffer_leave_together_and_the_last_asks_for_an_ack(self) -> None:
        self.link.send(stream.pack_frames([b"one", b"two", b"three"], ack=True))
        self.assertEqual(
            [(m.type, m.flags, bytes(m.payload)) for m in self.messages()],
            [
                (stream.FRAME, 0, b"one"),
                (stream.FRAME, 0, b"two"),
                (stream.FRAME, stream.ACK_REQUESTED, b"three"),
            ],
        )

    def test_messages_arrive_whole_however_they_are_cut(self) -> None:
        said = stream.frame_header(5, True) + b"hello" + stream.pack_ping() + stream.pack_ack(7, 6)
        for step in range(1, len(said) + 1):
            self.owner.told.clear()
            for at in range(0, len(said), step):
                self.link.dataReceived(said[at : at + step])
            self.assertEqual(
                self.owner.told,
                [
                    (stream.FRAME, stream.ACK_REQUESTED, b"hello"),
                    (stream.ACK, 0, stream.pack_ack(7, 6)[stream.HEADER_BYTES :]),
                ],
            )

    def test_pressure_is_passed_on(self) -> None:
        self.assertTrue(self.link.can_send)
        self.link.pauseProducing()
        self.assertFalse(self.link.can_send)
        self.link.resumeProducing()
        self.assertTrue(self.link.can_send)
        self.assertEqual(self.owner.told, ["writable"])
        self.link.stopProducing()
        self.assertFalse(self.link.can_send)

    def test_close_says_why_and_leaves_nothing_behind(self) -> None:
        self.link.close("enough")
        self.assertTrue(self.transport.disconnecting)
        self.assertIsNone(self.transport.producer)
        (bye,) = self.messages()
        self.assertEqual((bye.type, bytes(bye.payload)), (stream.BYE, b"enough"))
        self.link.close("again")
        self.assertEqual(len(self.messages()), 1)
        self.lose()
        self.assertEqual(self.owner.told, [("lost", "enough")])
        self.link.send(stream.pack_ping())
        self.assertEqual(len(self.messages()), 1)

    def test_close_does_not_wait_for_a_peer_that_does_not_read(self) -> None:
        self.link.close("enough")
        self.clock.advance(PING_SECONDS)
        self.assertTrue(self.transport.aborted)

    def test_bye_ends_it_at_once_with_the_peers_reason(self) -> None:
        self.link.pauseProducing()
        self.link.dataReceived(stream.pack_bye("going home") + stream.pack_ack(1, 1))
        self.assertTrue(self.transport.aborted)
        self.assertEqual(self.owner.told, [])
        self.lose()
        self.assertEqual(self.owner.told, [("lost", "the peer said: going home")])

    def test_refusal_of_a_message_is_told_to_the_peer(self) -> None:
        self.owner.error = ProtocolError("not like this")
        self.link.dataReceived(stream.frame_header(2, False) + b"xx")
        self.assertTrue(self.transport.disconnecting)
        self.assertEqual(bytes(self.messages()[-1].payload), b"not like this")
        self.lose()
        self.assertEqual(self.owner.told, [("lost", "not like this")])

    def test_babble_ends_it(self) -> None:
        self.link.dataReceived(b"\xff" * 16)
        self.assertTrue(self.transport.disconnecting)
        self.lose()
        self.assertIn("unknown type 255", self.owner.told[-1][1])
