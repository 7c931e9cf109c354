"""The NBD server on a real Unix socket, and its timers on a fake clock."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Generator, Sequence
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.endpoints import UNIXClientEndpoint, connectProtocol
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock, deferLater
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface.verify import verifyObject

from qdsmirror import limits
from qdsmirror.core import nbd
from qdsmirror.core.nbd_requests import Budget
from qdsmirror.interfaces import INbdConnection
from qdsmirror.net.nbd import NbdConnection, NbdServer, listen_nbd
from tests.nbd_memory import Client, ListeningSocket, MemoryExport, connect, handshake

reactor: Any = _reactor
Steps = Generator[Deferred[Any], Any, None]


def request(command: int, offset: int = 0, length: int = 0, payload: bytes = b"") -> bytes:
    cookie = struct.pack(">Q", offset)
    return struct.pack(">IHH8sQI", nbd.REQUEST_MAGIC, 0, command, cookie, offset, length) + payload


def ok(offset: int = 0) -> bytes:
    return struct.pack(">IIQ", nbd.SIMPLE_REPLY_MAGIC, 0, offset)


class FakeTransport:
    """Takes everything at once, unless `stuck`."""

    def __init__(self) -> None:
        self.sent = b""
        self.stuck = False
        self.outgoing_bytes = 0
        self.reading = True
        self.closing = False
        self.aborted = False

    def send(self, pieces: Sequence[bytes]) -> None:
        data = b"".join(pieces)
        if self.stuck:
            self.outgoing_bytes += len(data)
        else:
            self.sent += data

    def stopReading(self) -> None:
        self.reading = False

    def startReading(self) -> None:
        self.reading = True

    def loseConnection(self) -> None:
        self.closing = True

    def abortConnection(self) -> None:
        self.aborted = True

    def hung_up(self) -> bool:
        return False


class ClockTests(SynchronousTestCase):
    """What depends on time or on a socket that takes nothing."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.budget = Budget(1 << 20)
        self.export = MemoryExport(size=8 << 20)
        self.server = NbdServer(self.clock, {"qds0": self.export}, self.budget)

    def connected(self, through: bool = True) -> tuple[NbdConnection, FakeTransport]:
        connection = self.server.build()
        assert connection is not None
        transport: Any = FakeTransport()
        connection.makeConnection(transport)
        if through:
            self.receive(connection, handshake()[0])
            transport.sent = b""
        return connection, transport

    def receive(self, connection: NbdConnection, data: bytes) -> None:
        """What the transport does with received bytes."""
        while data and connection.rest is not None:
            count = min(len(data), len(connection.rest))
            connection.rest[:count] = data[:count]
            connection.filled(count)
            data = data[count:]
        if data:
            connection.dataReceived(data)
        connection.process()

    def lose(self, connection: NbdConnection) -> None:
        connection.connectionLost(Failure(ConnectionDone()))

    def test_interface(self) -> None:
        connection, _ = self.connected()
        self.assertTrue(verifyObject(INbdConnection, connection))

    def test_handshake_timeout(self) -> None:
        connection, transport = self.connected(through=False)
        self.receive(connection, b"\0\0\0\3IHAVE")
        self.clock.advance(limits.NBD_HANDSHAKE_SECONDS - 0.1)
        self.assertFalse(transport.aborted)
        self.clock.advance(0.2)
        self.assertTrue(transport.aborted)
        self.assertEqual(self.export.attached, [])
        self.lose(connection)
        self.assertEqual(self.export.detached, [])
        self.assertEqual(self.server.connections, set())

    def test_no_timeout_after_the_handshake(self) -> None:
        connection, transport = self.connected()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.export.attached, [connection])
        self.lose(connection)
        self.assertEqual(self.export.detached, [connection])
        self.assertFalse(transport.aborted)

    def test_export_that_has_gone(self) -> None:
        exports = {"qds0": self.export}
        self.server = NbdServer(self.clock, lambda: exports, self.budget)
        connection, transport = self.connected(through=False)
        exports.clear()
        self.receive(connection, handshake()[0])
        self.assertTrue(transport.aborted)

    def test_too_many_connections(self) -> None:
        made = [self.connected() for _ in range(limits.NBD_CONNECTIONS_MAX)]
        self.assertIsNone(self.server.build())
        self.lose(made[0][0])
        self.assertIsNotNone(self.server.build())

    def test_one_submit_and_one_send_for_what_arrives_together(self) -> None:
        connection, transport = self.connected()
        sends = []
        transport.send = sends.append  # type: ignore[method-assign,assignment]
        self.receive(connection, request(1, 0, 4, b"abcd") + request(0, 0, 4) + request(3))
        self.assertEqual(self.export.batches, [3])
        self.assertEqual(len(sends), 1)

    def test_requests_unanswered(self) -> None:
        self.export.held = []
        connection, transport = self.connected()
        self.receive(connection, request(3) * (limits.NBD_REQUESTS_MAX + 10))
        self.assertEqual(len(self.export.held), limits.NBD_REQUESTS_MAX)
        self.assertFalse(transport.reading)
        self.export.release()
        self.clock.advance(0)
        self.assertEqual(transport.sent, ok() * (limits.NBD_REQUESTS_MAX + 10))
        self.assertTrue(transport.reading)

    def test_requests_answered_at_once_do_not_pause(self) -> None:
        connection, transport = self.connected()
        self.receive(connection, request(3) * 1000)
        self.assertEqual(transport.sent, ok() * 1000)
        self.assertTrue(transport.reading)

    def test_budget_is_shared_and_returned(self) -> None:
        self.export.held = []
        first, first_transport = self.connected()
        second, second_transport = self.connected()
        self.receive(first, request(0, 0, 1 << 20))
        self.receive(second, request(1, 4, 4, b"abcd"))
        self.assertEqual(self.budget.free_bytes, 0)
        self.assertFalse(second_transport.reading)
        self.assertEqual(len(self.export.held), 1)
        self.export.release()
        self.clock.advance(0)
        self.assertEqual(second_transport.sent, ok(4))
        self.assertTrue(second_transport.reading)
        self.assertEqual(self.budget.free_bytes, 1 << 20)
        self.assertEqual(len(first_transport.sent), 16 + (1 << 20))

    def test_lost_connection_returns_budget_when_answered(self) -> None:
        self.export.held = []
        connection, transport = self.connected()
        self.receive(
            connection,
            request(0, 0, 512) + request(1, 0, 4, b"abcd") + request(1, 0, 1000, b"begun"),
        )
        self.assertEqual(self.budget.free_bytes, (1 << 20) - 512 - 4 - 1000)
        self.lose(connection)
        self.assertTrue(connection.hung_up())
        self.assertEqual(self.budget.free_bytes, (1 << 20) - 512 - 4)
        read, write = self.export.held
        connection.answer_read(read, [bytes(512)])
        connection.answer_error(write, errno.EIO, "late")
        self.assertEqual(self.budget.free_bytes, 1 << 20)
        self.assertEqual(transport.sent, b"")

    def test_a_released_payload_makes_room(self) -> None:
        """Its answer waits for the secondary: others go on, and nothing is given back twice."""
        self.export.held = []
        connection, transport = self.connected()
        self.receive(connection, b"".join([request(1, at, 4, b"abcd") for at in (0, 4, 8)]))
        for one in self.export.held:
            connection.release(one)
            connection.release(one)
        self.assertEqual(self.budget.free_bytes, 1 << 20)
        first, second, third = self.export.held
        connection.answer([first])
        connection.answer_error(second, errno.EIO, "no")
        self.assertEqual(transport.sent[:16], ok())
        connection.abandon([third])
        self.assertEqual(self.budget.free_bytes, 1 << 20)

    def test_slow_reader_is_not_read(self) -> None:
        self.budget = Budget()
        self.server = NbdServer(self.clock, {"qds0": self.export}, self.budget)
        connection, transport = self.connected()
        transport.stuck = True
        self.receive(connection, request(0, 0, 5 << 20) + request(0, 5 << 20, 1 << 20))
        self.assertFalse(transport.reading)
        held = self.budget.limit_bytes - self.budget.free_bytes
        self.assertEqual(held, 6 << 20)
        transport.outgoing_bytes = 1 << 20
        connection.drained()
        self.clock.advance(0)
        self.assertTrue(transport.reading)
        self.assertEqual(self.budget.limit_bytes - self.budget.free_bytes, 1 << 20)

    def test_slow_reader_gives_up_its_turn(self) -> None:
        for late in (False, True):
            self.budget = Budget(8 << 20)
            self.server = NbdServer(self.clock, {"qds0": self.export}, self.budget)
            self.export.held = [] if late else None
            slow, slow_transport = self.connected()
            other, other_transport = self.connected()
            slow_transport.stuck = True
            self.receive(slow, request(0, 0, 5 << 20) + request(0, 0, 4 << 20))
            self.receive(other, request(0, 0, 1 << 20))
            if late:
                self.assertEqual(len(self.export.held or []), 1)
                self.export.release()
            self.clock.advance(0)
            self.assertEqual(len(other_transport.sent), 16 + (1 << 20))

    def test_stalled_client_does_not_hold_up_others(self) -> None:
        stalled, stalled_transport = self.connected()
        waiting, waiting_transport = self.connected()
        self.receive(stalled, request(1, 0, 1 << 20, b"begun"))
        self.receive(waiting, request(1, 0, 4, b"abcd"))
        self.assertFalse(waiting_transport.reading)
        self.clock.advance(limits.NBD_STALL_SECONDS)
        self.receive(stalled, b"more")
        self.clock.advance(limits.NBD_STALL_SECONDS)
        self.assertFalse(stalled_transport.aborted)
        self.clock.advance(limits.NBD_STALL_SECONDS)
        self.assertTrue(stalled_transport.aborted)
        self.lose(stalled)
        self.clock.advance(0)
        self.assertEqual(waiting_transport.sent, ok())
        self.assertFalse(waiting_transport.aborted)

    def test_stalled_client_that_nobody_waits_for_is_left_alone(self) -> None:
        stalled, transport = self.connected()
        self.receive(stalled, request(1, 0, 1 << 20, b"begun"))
        self.clock.pump([limits.NBD_STALL_SECONDS] * 5)
        self.assertFalse(transport.aborted)

    def test_wrong_magic_closes(self) -> None:
        connection, transport = self.connected()
        self.receive(connection, request(3) + bytes(28))
        self.assertTrue(transport.aborted)
        self.assertTrue(connection.hung_up())

    def test_bad_option_closes(self) -> None:
        connection, transport = self.connected(through=False)
        self.receive(connection, b"\0\0\0\3GET / HTTP/1.1\r\n\r\n")
        self.assertTrue(transport.aborted)

    def test_disconnect_waits_for_answers(self) -> None:
        self.export.held = []
        connection, transport = self.connected()
        self.receive(connection, request(1, 0, 4, b"abcd") + request(2) + request(3))
        self.assertFalse(transport.closing)
        self.assertEqual(len(self.export.held), 1)
        self.export.release()
        self.assertEqual(transport.sent, ok())
        self.assertTrue(transport.closing)

    def test_disconnect_all(self) -> None:
        self.export.held = []
        busy, busy_transport = self.connected()
        _, early_transport = early = self.connected(through=False)
        self.receive(busy, request(1, 0, 4, b"abcd") + request(1, 0, 400, b"begun"))
        gone = self.server.disconnect_all()
        also_gone = self.server.disconnect_all()
        self.assertTrue(early_transport.closing)
        self.assertFalse(busy_transport.closing or busy_transport.reading)
        self.assertIsNone(self.server.build())
        self.assertEqual(self.budget.free_bytes, (1 << 20) - 4)
        self.export.release()
        self.assertTrue(busy_transport.closing)
        self.lose(early[0])
        self.assertNoResult(gone)
        self.lose(busy)
        self.successResultOf(gone)
        self.successResultOf(also_gone)
        self.successResultOf(self.server.disconnect_all())

    def test_disconnect_all_does_not_wait_for_a_client_that_does_not_read(self) -> None:
        _, transport = self.connected()
        self.server.disconnect_all()
        self.clock.advance(limits.NBD_STALL_SECONDS)
        self.assertTrue(transport.aborted)

    def test_export_that_breaks_closes(self) -> None:
        self.export.held = []
        connection, transport = self.connected()
        self.receive(connection, request(3) * (limits.NBD_REQUESTS_MAX + 1))

        def broken(requests: object) -> None:
            raise RuntimeError("broken")

        held, self.export.held = self.export.held, None
        self.export.submit = broken  # type: ignore[method-assign,assignment]
        connection.answer(held)
        self.assertRaises(RuntimeError, self.clock.advance, 0)
        self.assertTrue(transport.aborted)

    def test_read_of_wrong_length_is_never_sent(self) -> None:
        self.export.held = []
        connection, transport = self.connected()
        self.receive(connection, request(0, 0, 512))
        self.assertRaises(AssertionError, connection.answer_read, self.export.held[0], [bytes(511)])
        self.assertEqual(transport.sent, b"")


class SocketTests(TestCase):
    """Over a real socket."""

    timeout = 300

    def setUp(self) -> None:
        self.export = MemoryExport(size=64 << 20)
        self.budget = Budget()
        self.listening = ListeningSocket(self)
        self.server = listen_nbd(
            reactor, self.listening.fileno(), {"qds0": self.export}, self.budget
        )
        self.addCleanup(self.end)

    @inlineCallbacks
    def end(self) -> Steps:
        yield self.server.stopListening()
        yield self.server.disconnect_all()

    @inlineCallbacks
    def client(self, structured: bool = False) -> Generator[Deferred[Any], Any, Client]:
        client = yield connect(reactor, self.listening.path)
        said, expected = handshake(structured=structured)
        client.send(said)
        yield client.read(expected)
        return client

    @inlineCallbacks
    def test_write_and_read(self) -> Steps:
        client = yield self.client()
        client.send(request(1, 8, 4, b"abcd") + request(0, 6, 8))
        self.assertEqual((yield client.read(40)), ok(8) + ok(6) + b"\0\0abcd\0\0")
        client.send(request(2))
        yield client.closed
        self.assertEqual(len(self.export.detached), 1)

    @inlineCallbacks
    def test_large_payloads_in_both_directions(self) -> Steps:
        client = yield self.client()
        data = os.urandom(1 << 20) * 9
        client.send(request(1, 512, len(data), data) + request(1, 0, 4, b"abcd"))
        self.assertEqual((yield client.read(32)), ok(512) + ok(0))
        client.send(request(0, 512, len(data)) + request(0, 0, 4))
        self.assertEqual((yield client.read(16 + len(data))), ok(512) + data)
        self.assertEqual((yield client.read(20)), ok(0) + b"abcd")
        self.assertEqual(self.budget.free_bytes, self.budget.limit_bytes)

    @inlineCallbacks
    def test_many_small_requests(self) -> Steps:
        client = yield self.client()
        count = 3000
        client.send(b"".join(request(1, n, 1, bytes([n % 256])) for n in range(count)))
        self.assertEqual((yield client.read(16 * count)), b"".join(map(ok, range(count))))
        self.assertEqual(bytes(self.export.data[:256]), bytes(range(256)))

    @inlineCallbacks
    def test_byte_by_byte(self) -> Steps:
        client = yield connect(reactor, self.listening.path)
        said, expected = handshake()
        for byte in said + request(1, 8, 4, b"abcd"):
            client.send(bytes([byte]))
            yield deferLater(reactor, 0)
        self.assertEqual((yield client.read(expected + 16))[-16:], ok(8))

    @inlineCallbacks
    def test_structured(self) -> Steps:
        client = yield self.client(structured=True)
        client.send(request(1, 4096, 4096, bytes(4096)) + request(7, 0, 12288))
        yield client.read(16)
        reply = yield client.read(20 + 4 + 24)
        self.assertEqual(struct.unpack(">6I", reply[24:]), (4096, 3, 4096, 0, 4096, 3))
        client.send(request(0, 0, 33 << 20))
        header = struct.unpack(">IHH8sIIH", (yield client.read(26)))
        self.assertEqual(header[2], nbd.REPLY_TYPE_ERROR)
        self.assertEqual(header[5], errno.EINVAL)

    @inlineCallbacks
    def test_close_in_the_middle_of_anything(self) -> Steps:
        said, _ = handshake(structured=True)
        data = said + request(1, 0, 600, bytes(600)) + request(0, 0, 1 << 20) + request(0, 0, 600)
        for end in [*range(0, len(said) + 40, 5), len(data) - 10, len(data)]:
            client = yield connect(reactor, self.listening.path)
            client.send(data[:end])
            yield client.transport.loseConnection()
            yield client.closed
        while self.server.connections:
            yield deferLater(reactor, 0.001)
        self.assertEqual(len(self.export.attached), len(self.export.detached))
        self.assertEqual(self.budget.free_bytes, self.budget.limit_bytes)

    @inlineCallbacks
    def test_hung_up(self) -> Steps:
        self.export.held = []
        client = yield self.client()
        client.send(request(3))
        while not self.export.held:
            yield deferLater(reactor, 0)
        connection = self.export.held[0].connection
        self.assertFalse(connection.hung_up())
        # What the reactor has not been told yet, the socket knows already.
        client.transport.socket.shutdown(2)
        self.assertTrue(connection.hung_up())
        while not self.export.detached:
            yield deferLater(reactor, 0)
        self.assertTrue(connection.hung_up())
        self.export.release()

    @inlineCallbacks
    def test_beyond_the_limit_of_connections(self) -> Steps:
        self.patch(limits, "NBD_CONNECTIONS_MAX", 2)
        first = yield self.client()
        yield self.client()
        third = Client()
        yield connectProtocol(UNIXClientEndpoint(reactor, self.listening.path), third)
        yield third.closed
        self.assertEqual(third.received, b"")
        first.send(request(3))
        self.assertEqual((yield first.read(16)), ok())

    @inlineCallbacks
    def test_the_socket_stays_the_masters(self) -> Steps:
        yield self.server.stopListening()
        mode = os.stat(self.listening.path).st_mode
        self.assertTrue(stat.S_ISSOCK(mode))
        self.assertEqual(stat.S_IMODE(mode), 0o660)
        # Whoever connects now waits for the next server on the same socket.
        pending = connect(reactor, self.listening.path)
        self.server = listen_nbd(
            reactor, self.listening.fileno(), {"qds0": self.export}, self.budget
        )
        yield pending
        self.assertEqual(self.server.getHost().name, self.listening.path.encode())

    @inlineCallbacks
    def test_a_client_that_does_not_read_is_bounded(self) -> Steps:
        client = yield self.client()
        client.transport.pauseProducing()
        client.send(b"".join(request(0, n << 20, 1 << 20) for n in range(60)))
        (connection,) = self.server.connections
        while connection.transport.outgoing_bytes <= limits.NBD_OUTGOING_BYTES_MAX:
            yield deferLater(reactor, 0.001)
        most = limits.REQUEST_BUDGET_BYTES + (1 << 20)
        for _ in range(20):
            yield deferLater(reactor, 0.001)
            self.assertLessEqual(connection.transport.outgoing_bytes, most)
        client.transport.resumeProducing()
        yield client.read(60 * (16 + (1 << 20)))
        self.assertEqual(self.budget.free_bytes, self.budget.limit_bytes)

    @inlineCallbacks
    def test_disconnect_all_answers_first(self) -> Steps:
        self.export.held = []
        client = yield self.client()
        client.send(request(1, 0, 4, b"abcd"))
        while not self.export.held:
            yield deferLater(reactor, 0)
        gone = self.server.disconnect_all()
        self.assertNoResult(gone)
        self.export.release()
        self.assertEqual((yield client.read(16)), ok())
        yield client.closed
        yield gone
