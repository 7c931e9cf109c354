"""The rmd's master: connections accepted, peeked at and routed to children by real TLS hellos."""

from __future__ import annotations

import os
import signal
import socket
import ssl
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from qdsmirror import limits
from qdsmirror.daemons import routing
from qdsmirror.daemons.rmd import RmdMaster, inherited_sockets
from qdsmirror.daemons.routing import Router
from qdsmirror.errors import QdsError
from tests.daemons.test_master import MasterCase
from tests.daemons.world import CHILD, WorldCase, pause, until


def hello(name: str | None) -> bytes:
    """Make the first bytes that a TLS client with this server name sends."""
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


def exchange(port: int, data: bytes) -> bytes:
    """Connect, send, and read until the other end closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as client:
        client.sendall(data)
        return receive(client)


def receive(client: socket.socket) -> bytes:
    try:
        return b"".join(iter(lambda: client.recv(1000), b""))
    except ConnectionResetError:
        return b""


def free_port() -> int:
    with socket.create_server(("", 0)) as one:
        port: int = one.getsockname()[1]
        return port


class RmdTests(MasterCase):
    async def test_hellos_reach_their_groups(self) -> None:
        port = free_port()
        self.world.host()
        self.world.group(0, side="secondary", port=port)
        self.world.group(4, side="secondary", port=port)
        master = self.begin(RmdMaster)
        await self.running(master, 0, 4)
        for number in (0, 4):
            answer = await deferToThread(exchange, port, hello(f"dsgrp{number:03d}.qdsmirror"))
            # The child's first byte read is the record's type: nothing was consumed.
            self.assertEqual(answer, b"adopted %d 22" % number)
        # A group that is not here: the alert unrecognized_name; and no group at all.
        answer = await deferToThread(exchange, port, hello("dsgrp003.qdsmirror"))
        self.assertEqual(answer, b"\x15\x03\x03\x00\x02\x02\x70")
        self.assertEqual(await deferToThread(exchange, port, hello("example.com")), b"")

    async def test_closed_while_the_child_is_away(self) -> None:
        port = free_port()
        self.world.host()
        self.world.group(0, side="secondary", port=port)
        master = self.begin(RmdMaster)
        await self.running(master, 0)
        self.world.behave(0, "hang")
        os.kill(self.world.pid(0, "rmd"), signal.SIGKILL)
        await until(lambda: len(self.world.events(0)) == 2)
        self.patch(limits, "HANDSHAKE_SECONDS", 0.5)
        answer = await deferToThread(exchange, port, hello("dsgrp000.qdsmirror"))
        self.assertEqual(answer, b"")
        os.kill(master.status()["groups"][0]["pid"], signal.SIGKILL)

    async def test_handshakes_of_a_child_count_until_it_is_gone(self) -> None:
        self.patch(limits, "UNAUTHENTICATED_MAX", 1)
        port = free_port()
        self.world.host()
        self.world.group(0, side="secondary", port=port)
        self.world.group(1, side="secondary", port=port)
        master = self.begin(RmdMaster)
        await self.running(master, 0, 1)
        # One that has ended makes room.
        for _ in range(2):
            answer = await deferToThread(exchange, port, hello("dsgrp001.qdsmirror"))
            self.assertEqual(answer, b"adopted 1 22")
        self.world.behave(0, "dawdle")
        idle = socket.create_connection(("127.0.0.1", port))
        self.addCleanup(idle.close)
        idle.sendall(hello("dsgrp000.qdsmirror"))
        await until(lambda: master._router._adopted)
        waiting = deferToThread(exchange, port, hello("dsgrp001.qdsmirror"))
        await pause(0.2)
        self.assertFalse(waiting.called)
        os.kill(self.world.pid(0, "rmd"), signal.SIGKILL)
        self.assertEqual(await waiting, b"adopted 1 22")

    async def test_apply_opens_and_closes_ports(self) -> None:
        first, second = free_port(), free_port()
        self.world.host()
        self.world.group(0, side="secondary", port=first)
        master = self.begin(RmdMaster)
        await self.running(master, 0)
        self.world.group(0, side="secondary", port=second)
        self.assertEqual(master.apply()["restarted"], [0])
        self.assertRaises(ConnectionRefusedError, exchange, first, b"")
        await until(lambda: len(self.world.events(0)) == 3)
        await self.running(master, 0)
        answer = await deferToThread(exchange, second, hello("dsgrp000.qdsmirror"))
        self.assertEqual(answer, b"adopted 0 22")

    async def test_port_in_use(self) -> None:
        with socket.create_server(("", 0)) as other:
            port = other.getsockname()[1]
            self.world.host()
            self.world.group(0, side="secondary", port=port)
            master = RmdMaster(reactor, self.world.paths, CHILD)
            master.prepare()
            error = self.assertRaises(QdsError, master.open_privileged)
            self.assertIn(f"port {port}", str(error))

    async def test_socket_given_by_a_service_manager(self) -> None:
        given = socket.create_server(("127.0.0.1", 0))
        port = given.getsockname()[1]
        self.world.host()
        self.world.group(0, side="secondary", port=port)
        master = RmdMaster(reactor, self.world.paths, CHILD)
        master.inherited = [given]
        master.prepare()
        master.startService()
        self.addCleanup(master.stopService)
        await self.running(master, 0)
        answer = await deferToThread(exchange, port, hello("dsgrp000.qdsmirror"))
        self.assertEqual(answer, b"adopted 0 22")


class InheritedTests(WorldCase):
    def test_none_for_another_process(self) -> None:
        other = {"LISTEN_PID": "1", "LISTEN_FDS": "1"}
        self.assertEqual(inherited_sockets(False, other), [])

    def test_not_a_listening_socket(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            given = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
            self.patch(os, "dup", lambda _number: ours.detach())
            error = self.assertRaises(QdsError, inherited_sockets, False, given)
        self.assertIn("no listening socket", str(error))


class RouterTests(WorldCase):
    def setUp(self) -> None:
        super().setUp()
        self.routed: list[int] = []
        #: Whether connections are taken, for handshakes that end when ``ends`` are called.
        self.keeping = False
        self.ends: list[Callable[[], None]] = []
        self.kept: list[int] = []
        self.addCleanup(lambda: [os.close(one) for one in self.kept])
        self.router = Router(reactor, self.route)
        listening = socket.create_server(("127.0.0.1", 0))
        self.address = listening.getsockname()
        self.router.listen(listening)
        self.addCleanup(self.router.close)
        # However busy the machine is; where it is about a deadline the test sets its own.
        self.patch(limits, "HELLO_SECONDS", 100.0)
        self.patch(limits, "HANDSHAKE_SECONDS", 100.0)

    def route(self, number: int, descriptor: int, ended: Callable[[], None]) -> bool:
        self.routed.append(number)
        if self.keeping:
            self.ends.append(ended)
            self.kept.append(os.dup(descriptor))
        return self.keeping

    def connect(self, last: int = 1) -> socket.socket:
        """Connect from 127.0.0.``last``."""
        client = socket.create_connection(
            self.address, timeout=120, source_address=(f"127.0.0.{last}", 0)
        )
        self.addCleanup(client.close)
        return client

    async def test_hello_in_pieces(self) -> None:
        data = hello("dsgrp007.qdsmirror")
        with self.connect() as client:
            for start in range(0, len(data), 100):
                client.sendall(data[start : start + 100])
                await pause(0.01)
            await until(lambda: self.routed)
        self.assertEqual(self.routed, [7])

    async def test_partial_hello_does_not_spin(self) -> None:
        looked: list[int] = []
        with self.connect() as client:
            client.sendall(hello("dsgrp007.qdsmirror")[:50])
            peeked: Any = await until(lambda: next(iter(self.router._peeking), None))
            real = peeked.doRead
            peeked.doRead = lambda: (looked.append(1), real())[1]
            await pause(0.2)
            self.assertLess(len(looked), 3)
            client.shutdown(socket.SHUT_WR)
            self.assertEqual(await deferToThread(receive, client), b"")
        self.assertEqual(self.routed, [])

    async def test_waits_for_a_group_that_is_being_started(self) -> None:
        starting = {7}
        self.router.starting = starting.__contains__
        with self.connect() as client:
            client.sendall(hello("dsgrp007.qdsmirror"))
            await pause(0.2)
            self.assertEqual(self.routed, [])
            starting.clear()
            await until(lambda: self.routed)
        self.assertEqual(self.routed, [7])

    async def test_does_not_wait_for_ever(self) -> None:
        self.patch(limits, "HANDSHAKE_SECONDS", 0.2)
        self.router.starting = lambda _number: True
        with self.connect() as client:
            client.sendall(hello("dsgrp007.qdsmirror"))
            self.assertEqual(await deferToThread(receive, client), b"")
        self.assertEqual(self.routed, [])

    async def test_not_tls_is_closed_at_once(self) -> None:
        with self.connect() as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            self.assertEqual(await deferToThread(receive, client), b"")

    async def test_silent_client_is_closed_in_time(self) -> None:
        self.patch(limits, "HELLO_SECONDS", 0.05)
        with self.connect() as client:
            self.assertEqual(await deferToThread(receive, client), b"")

    async def test_more_of_one_address_wait_and_keep_nobody_else_waiting(self) -> None:
        self.patch(limits, "UNAUTHENTICATED_PER_ADDRESS_MAX", 1)
        first = self.connect()
        await until(lambda: self.router._peeking)
        second = self.connect()
        second.sendall(hello("dsgrp002.qdsmirror"))
        await until(lambda: self.router._parked)
        other = self.connect(last=2)
        other.sendall(hello("dsgrp003.qdsmirror"))
        await until(lambda: self.routed)
        first.sendall(hello("dsgrp001.qdsmirror"))
        await until(lambda: len(self.routed) == 3)
        self.assertEqual(self.routed, [3, 1, 2])
        self.assertEqual(len(self.router._parked), 0)

    async def test_those_set_aside_are_bounded_and_closed_in_time(self) -> None:
        self.patch(limits, "UNAUTHENTICATED_PER_ADDRESS_MAX", 1)
        self.patch(limits, "PARKED_CONNECTIONS_MAX", 1)
        self.connect()
        await until(lambda: self.router._peeking)
        second = self.connect()
        (parked,) = await until(lambda: self.router._parked)
        with self.connect() as third:
            self.assertEqual(await deferToThread(receive, third), b"")
        self.assertEqual(list(self.router._parked), [parked])
        # Its time is up.
        due = parked._timer.getTime() - reactor.seconds()  # type: ignore[attr-defined]
        self.assertLessEqual(due, limits.HANDSHAKE_SECONDS)
        parked._timer.reset(0.0)
        self.assertEqual(await deferToThread(receive, second), b"")
        self.assertEqual(len(self.router._parked), 0)

    async def test_handshakes_in_the_children_count_until_they_end(self) -> None:
        self.patch(limits, "UNAUTHENTICATED_MAX", 2)
        self.keeping = True
        for last, number in ((1, 1), (2, 2), (3, 3)):
            self.connect(last).sendall(hello(f"dsgrp{number:03d}.qdsmirror"))
            await until(lambda number=number: len(self.routed) >= min(number, 2))
        await pause(0.1)
        self.assertEqual(self.routed, [1, 2])
        self.ends[0]()
        self.ends[0]()  # whoever says it twice makes room once
        await until(lambda: len(self.routed) == 3)
        self.connect(4).sendall(hello("dsgrp004.qdsmirror"))
        await pause(0.1)
        self.assertEqual(self.routed, [1, 2, 3])

    async def test_a_child_that_hangs_does_not_keep_others_out_for_ever(self) -> None:
        self.patch(limits, "UNAUTHENTICATED_MAX", 1)
        self.patch(routing, "_ADOPTED_SECONDS", 0.2)
        self.keeping = True
        self.connect().sendall(hello("dsgrp001.qdsmirror"))
        await until(lambda: self.routed)
        self.connect().sendall(hello("dsgrp002.qdsmirror"))
        await until(lambda: len(self.routed) == 2)

    async def test_a_good_connection_gets_in_past_many_idle_ones(self) -> None:
        self.patch(limits, "HELLO_SECONDS", 1.0)
        for place in range(3 * limits.UNAUTHENTICATED_MAX):
            self.connect(last=2 + place)
        await until(lambda: len(self.router._peeking) == limits.UNAUTHENTICATED_MAX)
        self.connect().sendall(hello("dsgrp001.qdsmirror"))
        most = 0
        while not self.routed:
            most = max(most, len(self.router._peeking))
            await pause(0.01)
        self.assertEqual(most, limits.UNAUTHENTICATED_MAX)
        self.assertEqual(self.routed, [1])

    async def test_beyond_the_limit_they_wait_in_the_backlog(self) -> None:
        self.patch(limits, "UNAUTHENTICATED_MAX", 1)
        first = self.connect()
        await until(lambda: self.router._peeking)
        second = self.connect()
        second.sendall(hello("dsgrp002.qdsmirror"))
        await pause(0.05)
        self.assertEqual(self.routed, [])
        first.sendall(hello("dsgrp001.qdsmirror"))
        await until(lambda: len(self.routed) == 2)
        self.assertEqual(self.routed, [1, 2])
