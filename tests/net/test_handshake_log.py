"""What the log says of handshakes: refused, or only come to nothing, and by whom."""

from __future__ import annotations

from typing import Any

from twisted.internet import address
from twisted.logger import LogLevel, formatEvent

from qdsmirror.errors import MismatchError
from qdsmirror.limits import HANDSHAKE_SECONDS
from qdsmirror.net.handshake import RemoteHandshake
from tests.net.test_handshake import HandshakeTestCase


class LogTests(HandshakeTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.said: list[tuple[LogLevel, str]] = []

    def observe(self, event: Any) -> None:
        super().observe(event)
        if "handshake with" in formatEvent(event):
            self.said.append((event["log_level"], formatEvent(event)))

    def lines(self, level: LogLevel) -> list[str]:
        return [text for found, text in self.said if found == level]

    def test_a_refusal_is_named_once_where_the_group_does_not_say_it(self) -> None:
        self.authority.map_error = MismatchError("too small", hint="give a larger one")
        primary, _ = self.shake()
        self.failureResultOf(primary.done, MismatchError)
        (line,) = self.lines(LogLevel.warn)
        self.assertTrue(line.startswith("dsgrp000 secondary: handshake with "), line)
        self.assertTrue(line.endswith(" refused: too small (mismatch); give a larger one"), line)
        (line,) = self.lines(LogLevel.debug)
        self.assertIn("dsgrp000 primary: ", line)
        self.assertIn(" refused by the peer: too small", line)

    def remote(self, host: str) -> RemoteHandshake:
        remote = RemoteHandshake(self.authority, self.clock)
        server = self.server(remote)
        client = self.client(self.silent())
        self.pump = self.join(client, server)
        remote.transport.getPeer = lambda: address.IPv4Address("TCP", host, 1)
        return remote

    def silent(self) -> Any:
        from twisted.internet.protocol import Protocol

        return Protocol()

    def test_one_that_the_network_lost_was_not_refused(self) -> None:
        remote = self.remote("::ffff:192.0.2.7")
        remote.transport.transport.abortConnection()
        self.pump.flush()
        (line,) = self.lines(LogLevel.warn)
        self.assertIn("handshake with 192.0.2.7 did not end: ", line)
        self.assertNotIn("refused", line)
        self.assertNotIn("(protocol)", line)

    def test_one_that_took_too_long_was_not_refused(self) -> None:
        self.remote("2001:db8::7")
        self.clock.advance(HANDSHAKE_SECONDS)
        (line,) = self.lines(LogLevel.warn)
        self.assertIn("with 2001:db8::7 did not end: no authentication within 10 s", line)
