"""Sending at once: what is written has left before the reactor's turn is over."""

from __future__ import annotations

import select
import socket
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import TestCase

from qdsmirror.net.sending import TlsEndpoint, UnbufferedTlsFactory, send_now
from qdsmirror.net.tls import client_options, server_context_factory
from tests.net.tlsworld import PRIMARY, SECONDARY, host


class End(Protocol):
    """Fires at each step of its life."""

    transport: Any

    def __init__(self) -> None:
        self.made: Deferred[None] = Deferred()
        self.heard: Deferred[bytes] = Deferred()
        self.lost: Deferred[None] = Deferred()

    def connectionMade(self) -> None:  # noqa: N802
        self.made.callback(None)

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        self.heard.callback(data)

    def connectionLost(self, reason: Any = None) -> None:  # noqa: N802
        self.lost.callback(None)


def factory(end: End) -> Factory:
    made = Factory.forProtocol(lambda: end)
    made.noisy = False
    return made


class PlainTests(TestCase):
    def setUp(self) -> None:
        self.near, far = socket.socketpair()
        self.addCleanup(self.near.close)
        self.near.setblocking(False)
        self.end = End()
        adopting: Any = reactor
        adopting.adoptStreamConnection(far.fileno(), socket.AF_UNIX, factory(self.end))
        far.close()

    async def end_it(self) -> None:
        self.end.transport.abortConnection()
        await self.end.lost

    async def test_what_is_written_has_left(self) -> None:
        self.end.transport.write(b"one")
        self.assertRaises(BlockingIOError, self.near.recv, 10)
        send_now(self.end.transport)
        self.assertEqual(self.near.recv(10), b"one")
        await self.end_it()

    async def test_what_the_socket_does_not_take_comes_later(self) -> None:
        data = bytes(range(256)) * (1 << 14)
        self.end.transport.write(data)
        send_now(self.end.transport)
        got = bytearray(self.near.recv(1 << 23))
        self.assertTrue(0 < len(got) < len(data))
        while len(got) < len(data):
            later: Deferred[None] = Deferred()
            clock: Any = reactor
            clock.callLater(0, later.callback, None)
            await later
            while select.select([self.near], [], [], 0)[0]:
                got += self.near.recv(1 << 23)
        self.assertEqual(bytes(got), data)
        await self.end_it()

    async def test_a_lost_connection_is_told_by_the_reactor(self) -> None:
        self.near.close()
        self.end.transport.write(b"one")
        send_now(self.end.transport)
        self.assertFalse(self.end.lost.called)
        await self.end.lost
        self.assertIs(send_now(self.end.transport), None)

    async def test_one_that_ends_is_left_to_the_reactor(self) -> None:
        self.end.transport.write(b"one")
        self.end.transport.loseConnection()
        send_now(self.end.transport)
        self.assertRaises(BlockingIOError, self.near.recv, 10)
        await self.end.lost
        self.assertEqual(self.near.recv(10), b"one")

    async def test_a_transport_without_a_socket(self) -> None:
        transport = StringTransport()
        send_now(transport)
        send_now(None)
        await self.end_it()


class TlsTests(TestCase):
    async def test_what_is_written_has_left_encrypted(self) -> None:
        directory = Path(self.mktemp())
        server_host = host(directory / "two", SECONDARY)
        server, client = End(), End()
        accepting = UnbufferedTlsFactory(
            server_context_factory(server_host, PRIMARY), False, factory(server)
        )
        tcp: Any = reactor
        port = tcp.listenTCP(0, accepting, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        endpoint = TlsEndpoint(
            client_options(host(directory / "one", PRIMARY), SECONDARY, "dsgrp000.qdsmirror"),
            TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port),
        )
        self.assertIs(await endpoint.connect(factory(client)), client)
        client.transport.write(b"hello")
        self.assertEqual(await server.heard, b"hello")
        server.transport.write(b"one")
        send_now(server.transport.transport)
        # The client's reactor has no turn meanwhile: this is the kernel's word.
        readable, _, _ = select.select([client.transport.transport.socket], [], [], 5)
        self.assertTrue(readable)
        self.assertFalse(client.heard.called)
        self.assertEqual(await client.heard, b"one")
        client.transport.abortConnection()
        await client.lost
        await server.lost
