"""Mail to a real relay of the test's own, encrypted and not; the system's log."""

from __future__ import annotations

import shutil
import socket
import tempfile
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any

import trustme
from twisted.internet import reactor, ssl
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.protocol import Factory, Protocol
from twisted.mail import smtp
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface import implementer

from qdsmirror.configvalues import Relay
from qdsmirror.errors import QdsError
from qdsmirror.net.mailing import compose, send_mail
from qdsmirror.net.syslog import send_syslog
from tests.daemons.world import pause, until


@implementer(smtp.IMessage)
class Letter:
    """A message that the relay takes."""

    def __init__(self, relay: MailRelay, to: str) -> None:
        self.relay, self.to = relay, to
        self.lines: list[bytes] = []

    def lineReceived(self, line: bytes) -> None:
        self.lines.append(line)

    def eomReceived(self) -> Deferred[None]:
        self.relay.letters.append((self.to, self.relay.encrypted, b"\n".join(self.lines)))
        return succeed(None)

    def connectionLost(self) -> None:
        self.lines = []


class _Served(smtp.ESMTP):
    """A connection to the relay, which counts those that are open."""

    relay: MailRelay

    def connectionLost(self, reason: Any) -> None:
        super().connectionLost(reason)
        self.relay.served -= 1


@implementer(smtp.IMessageDelivery)
class MailRelay:
    """A relay on a port of its own.

    :ivar letters: (recipient, whether it came encrypted, message).
    """

    def __init__(self, encrypts: bool = False, refuses: bool = False) -> None:
        self.letters: list[tuple[str, bool, bytes]] = []
        self.encrypted = False
        self.served = 0
        self.refuses = refuses
        context = None
        if encrypts:
            found = trustme.CA().issue_cert("somebody.else.example")
            pem = found.private_key_pem.bytes() + found.cert_chain_pems[0].bytes()
            context = ssl.PrivateCertificate.loadPEM(pem).options()
        factory: Any = Factory()
        factory.noisy = False
        factory.buildProtocol = lambda _: self._protocol(context)
        self.port: Any = reactor.listenTCP(0, factory, interface="127.0.0.1")  # type: ignore
        self.relay = Relay("127.0.0.1", self.port.getHost().port)

    def _protocol(self, context: Any) -> Any:
        protocol = _Served()
        protocol.relay = self
        self.served += 1
        protocol.ctx = context
        protocol.noisy = False
        protocol.delivery = self
        self.protocol = protocol
        return protocol

    def receivedHeader(self, _helo: Any, _origin: Any, _recipients: Any) -> bytes:
        return b"Received: by the test"

    def validateFrom(self, _helo: Any, origin: Any) -> Any:
        self.encrypted = self.protocol.startedTLS
        return origin

    def validateTo(self, user: Any) -> Any:
        if self.refuses:
            raise smtp.SMTPBadRcpt(user)
        return lambda: Letter(self, str(user.dest))


class Silent(Protocol):
    """A relay that says nothing."""

    lost = False

    def connectionLost(self, reason: Any = None) -> None:  # noqa: N802
        self.lost = True


class MailCase(TestCase):
    timeout = 300

    def relay(self, **how: bool) -> MailRelay:
        made = MailRelay(**how)
        self.addCleanup(self.close, made)
        return made

    async def close(self, relay: MailRelay) -> None:
        await until(lambda: not relay.served)
        # The client's end is told in a turn of its own.
        await pause(0)
        await pause(0)
        await relay.port.stopListening()

    def send(self, relay: Relay, seconds: float = 30.0, to: str = "a@b.example") -> Deferred[Any]:
        message = compose("qdsmirror@alpha", to, "dsgrp000: link lost", "link lost\n")
        sent: Deferred[Any] = send_mail(reactor, relay, "qdsmirror@alpha", to, message, seconds)
        return sent


class MailTests(MailCase):
    async def test_taken(self) -> None:
        relay = self.relay()
        await self.send(relay.relay)
        await self.send(relay.relay, to="root")
        (to, encrypted, message), other = relay.letters
        self.assertEqual((to, encrypted), ("a@b.example", False))
        # This relay adds its own host to a name without one.
        self.assertEqual(other[0].partition("@")[0], "root")
        found = message_from_bytes(message, policy=policy.default)
        self.assertEqual(found["Subject"], "dsgrp000: link lost")
        self.assertEqual(found.get_content().strip(), "link lost")

    async def test_encrypted_where_it_is_offered(self) -> None:
        """Whatever name its certificate has, and whoever signed it."""
        relay = self.relay(encrypts=True)
        await self.send(relay.relay)
        self.assertEqual([one[:2] for one in relay.letters], [("a@b.example", True)])

    async def test_refused(self) -> None:
        relay = self.relay(refuses=True)
        error = await self.assertFailure(self.send(relay.relay), QdsError)
        self.assertIn(f"the mail relay 127.0.0.1 port {relay.relay.port}: 550", error.message)
        self.assertEqual(self.flushLoggedErrors(smtp.SMTPBadRcpt), [])

    async def test_nobody_there(self) -> None:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            port = bound.getsockname()[1]
            error = await self.assertFailure(self.send(Relay("127.0.0.1", port)), QdsError)
        self.assertIn("refused", error.message)

    async def test_who_says_nothing(self) -> None:
        factory = Factory.forProtocol(Protocol)
        port: Any = reactor.listenTCP(0, factory, interface="127.0.0.1")  # type: ignore
        self.addCleanup(port.stopListening)
        relay = Relay("127.0.0.1", port.getHost().port)
        await self.assertFailure(self.send(relay, 0.2), QdsError)

    async def test_cancelled(self) -> None:
        """Before its session and within it; that ends, and nothing else is told."""
        silent: list[Silent] = []

        class Remembering(Factory):
            def buildProtocol(self, addr: Any) -> Silent:  # noqa: N802
                silent.append(Silent())
                return silent[-1]

        port: Any = reactor.listenTCP(0, Remembering(), interface="127.0.0.1")  # type: ignore
        self.addCleanup(port.stopListening)
        relay = Relay("127.0.0.1", port.getHost().port)
        sent = self.send(relay)
        sent.cancel()
        await self.assertFailure(sent, CancelledError)
        self.assertEqual(silent, [])
        sent = self.send(relay)
        await until(lambda: any(one.connected for one in silent))
        sent.cancel()
        await self.assertFailure(sent, CancelledError)
        await until(lambda: silent[0].lost)


class ComposeTests(SynchronousTestCase):
    def test_no_text_adds_a_header(self) -> None:
        raw = compose("q@a", "b@c", "lost\r\nBcc: d@e", "x\r\n.\r\nRCPT TO:<d@e>\n")
        found = message_from_bytes(raw, policy=policy.default)
        self.assertEqual(found["Subject"], "lost Bcc: d@e")
        self.assertIsNone(found["Bcc"])
        self.assertEqual((found["From"], found["To"]), ("q@a", "b@c"))

    def test_what_is_not_ascii(self) -> None:
        raw = compose("q@a", "b@c", "Überlauf", "Überlauf\n")
        found = message_from_bytes(raw, policy=policy.default)
        self.assertEqual((found["Subject"], found.get_content()), ("Überlauf", "Überlauf\n"))
        raw.decode("ascii")


class SyslogTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.base = Path(tempfile.mkdtemp(dir="/tmp", prefix="qdsl"))
        self.addCleanup(shutil.rmtree, self.base)
        self.path = str(self.base / "log")

    def test_a_datagram(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
            log.bind(self.path)
            send_syslog("dsgrp000 over\n200 KB/s <0>", self.path)
            line = log.recv(1000).decode()
        self.assertRegex(
            line,
            r"^<29>[A-Z][a-z]{2} [ 1-3][0-9] \d\d:\d\d:\d\d qdsmirror\[\d+\]: "
            r"dsgrp000 over 200 KB/s <0>$",
        )

    def test_a_stream(self) -> None:
        with socket.socket(socket.AF_UNIX) as log:
            log.bind(self.path)
            log.listen()
            send_syslog("over", self.path)
            with log.accept()[0] as one:
                self.assertTrue(one.recv(1000).endswith(b"]: over\0"))

    def test_nobody_there_or_nobody_who_reads(self) -> None:
        self.assertRaises(OSError, send_syslog, "over", self.path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
            log.bind(self.path)
            with self.assertRaises(BlockingIOError):
                for _ in range(100_000):
                    send_syslog("over", self.path)
