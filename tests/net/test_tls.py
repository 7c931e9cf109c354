from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from OpenSSL import SSL
from twisted.internet.interfaces import IHandshakeListener
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from qdsmirror.errors import ConfigError, IdentityError, ProtocolError, QdsError
from qdsmirror.limits import CERTIFICATE_FILE_BYTES_MAX
from qdsmirror.net import tls
from qdsmirror.net.tls import client_options, exporter, server_context_factory, why_lost
from tests.net.tlsworld import PRIMARY, SECONDARY, connect, host, issue
from tests.net.tlsworld import tls as wrap


@implementer(IHandshakeListener)
class End(Protocol):
    """Remembers what came, and why it ended."""

    def __init__(self) -> None:
        self.received = b""
        self.completed = False
        self.why: QdsError | None = None

    def handshakeCompleted(self) -> None:
        self.completed = True

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure | None = None) -> None:  # type: ignore[override]
        assert reason is not None
        self.why = why_lost(self.transport, reason)


class Plain:
    """A creator of connections that this project would never make."""

    def __init__(self, configure: Any) -> None:
        self._configure = configure

    def getContext(self) -> SSL.Context:
        context = SSL.Context(SSL.TLS_METHOD)
        self._configure(context)
        return context


class TlsTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.directory = Path(self.mktemp())
        self.one = host(self.directory / "one", PRIMARY)
        self.two = host(self.directory / "two", SECONDARY)

    def meet(
        self, one: Any = None, two: Any = None, peer: str = SECONDARY, caller: str = PRIMARY
    ) -> tuple[End, End]:
        """Connect ``one`` (client) with ``two`` (server): hosts or ready creators."""
        one = one or self.one
        two = two or self.two
        if not isinstance(one, Plain):
            one = client_options(one, peer, "dsgrp000.qdsmirror")
        if not isinstance(two, Plain):
            two = server_context_factory(two, caller)
        return self.join(one, two)

    def join(self, client_creator: Any, server_creator: Any) -> tuple[End, End]:
        client, server = End(), End()
        self.pump = connect(
            wrap(client_creator, client, self.clock, client=True),
            wrap(server_creator, server, self.clock, client=False),
            self.clock,
        )
        self.addCleanup(self.hang_up)
        return client, server

    def hang_up(self) -> None:
        for end in (self.pump.client, self.pump.server):
            if end.connected:
                end.abortConnection()
        self.pump.flush()

    def assert_refused(self, end: End, *words: str) -> None:
        self.assertIsInstance(end.why, IdentityError, end.why)
        assert end.why is not None
        for word in words:
            self.assertIn(word, end.why.message)
        self.assertTrue(end.why.hint)


class AcceptTests(TlsTestCase):
    def test_good(self) -> None:
        client, server = self.meet()
        assert client.transport is not None and server.transport is not None
        client.transport.write(b"question")
        server.transport.write(b"answer")
        self.pump.flush()
        self.assertEqual((client.received, server.received), (b"answer", b"question"))
        handle: Any = client.transport.getHandle()  # type: ignore[attr-defined]
        self.assertEqual(handle.get_protocol_version_name(), "TLSv1.3")

    def test_server_name_is_sent(self) -> None:
        _, server = self.meet()
        handle: Any = server.transport.getHandle()  # type: ignore[union-attr]
        self.assertEqual(handle.get_servername(), b"dsgrp000.qdsmirror")

    def test_exporter_is_of_the_connection(self) -> None:
        client, server = self.meet()
        value = exporter(client.transport)
        self.assertEqual(len(value), 32)
        self.assertEqual(value, exporter(server.transport))
        other, _ = self.meet()
        self.assertNotEqual(value, exporter(other.transport))

    def test_plain_loss_is_retryable(self) -> None:
        client, server = self.meet()
        server.transport.loseConnection()  # type: ignore[union-attr]
        self.pump.flush()
        for end in (client, server):
            self.assertIsInstance(end.why, ProtocolError)

    def test_no_resumption(self) -> None:
        """Every connection shows its certificates to both ends again."""
        judged: list[str] = []
        judge = tls._Judge._name_refusal

        def counting(self: Any, certificate: Any) -> Any:
            judged.append(self.expected_peer)
            return judge(self, certificate)

        self.patch(tls._Judge, "_name_refusal", counting)
        client_creator = client_options(self.one, SECONDARY, "dsgrp000.qdsmirror")
        server_creator = server_context_factory(self.two, PRIMARY)
        client, server = self.join(client_creator, server_creator)
        server.transport.write(b"x")  # type: ignore[union-attr]
        self.pump.flush()
        session = client.transport.getHandle().get_session()  # type: ignore[union-attr]
        make = type(client_creator)._connection

        def resuming(self: Any) -> Any:
            connection = make(self)
            if self is client_creator and session is not None:
                connection.set_session(session)
            return connection

        self.patch(type(client_creator), "_connection", resuming)
        again, _ = self.join(client_creator, server_creator)
        self.assertTrue(again.completed)
        self.assertEqual(judged, [SECONDARY, PRIMARY] * 2)


class RefuseTests(TlsTestCase):
    """Each refusal is known, with its reason, on both sides."""

    def test_client_of_another_ca(self) -> None:
        bad = host(self.directory / "bad", PRIMARY, issue(PRIMARY, "theirs"))
        client, server = self.meet(one=bad)
        self.assert_refused(server, PRIMARY, "was not issued by the CA", str(self.two.ca))
        self.assert_refused(client, SECONDARY, "refuses our certificate", "not issued by its CA")
        # The trap of TLS 1.3: the client's handshake was complete all the same.
        self.assertTrue(client.completed)
        self.assertFalse(server.completed)

    def test_server_of_another_ca(self) -> None:
        bad = host(self.directory / "bad", SECONDARY, issue(SECONDARY, "theirs"))
        client, server = self.meet(two=bad)
        self.assert_refused(client, SECONDARY, "was not issued by the CA")
        self.assert_refused(server, PRIMARY, "not issued by its CA")
        self.assertFalse(client.completed)

    def test_expired_client(self) -> None:
        bad = host(self.directory / "bad", PRIMARY, issue(PRIMARY, expired=True))
        client, server = self.meet(one=bad)
        self.assert_refused(server, PRIMARY, "expired on 20")
        self.assert_refused(client, "expired")

    def test_expired_server(self) -> None:
        bad = host(self.directory / "bad", SECONDARY, issue(SECONDARY, expired=True))
        client, server = self.meet(two=bad)
        self.assert_refused(client, SECONDARY, "expired on 20")
        self.assert_refused(server, "expired")

    def test_wrong_client_name(self) -> None:
        bad = host(self.directory / "bad", PRIMARY, issue("other.example"))
        client, server = self.meet(one=bad)
        self.assert_refused(server, "for other.example", f"not for the group's host {PRIMARY}")
        self.assert_refused(client, "our certificate (for other.example)", "not for the host")
        self.assertEqual(server.received, b"")

    def test_wrong_server_name(self) -> None:
        bad = host(self.directory / "bad", SECONDARY, issue("other.example"))
        client, server = self.meet(two=bad)
        self.assert_refused(client, "for other.example", f"not for the group's host {SECONDARY}")
        self.assert_refused(server, "our certificate (for other.example)", "not for the host")

    def test_roles_are_not_interchangeable(self) -> None:
        """The secondary's certificate does not make a primary, although it is of the group."""
        client, server = self.meet(one=self.two)
        self.assert_refused(server, SECONDARY, PRIMARY)
        self.assert_refused(client, "refuses")

    def test_no_certificate(self) -> None:
        client, server = self.meet(one=Plain(lambda context: None))
        self.assert_refused(server, PRIMARY, "showed no certificate")
        # This client is not ours: it only sees its connection lost.
        self.assertIsInstance(client.why, ProtocolError)

    def test_tls_1_2_client(self) -> None:
        def old(context: SSL.Context) -> None:
            context.set_max_proto_version(SSL.TLS1_2_VERSION)

        _, server = self.meet(one=Plain(old))
        self.assert_refused(server, "does not speak TLS 1.3")

    def test_tls_1_2_server(self) -> None:
        leaf = issue(SECONDARY)

        def old(context: SSL.Context) -> None:
            context.set_max_proto_version(SSL.TLS1_2_VERSION)
            leaf.configure_cert(context)

        client, _ = self.meet(two=Plain(old))
        self.assert_refused(client, "does not speak TLS 1.3")

    def test_plaintext_client(self) -> None:
        for line in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x00\x04_ask\x00\x011\x00\x08_command\x00\x05Hello",
        ):
            server, talker = End(), End()
            creator = server_context_factory(self.two, PRIMARY)
            self.pump = connect(talker, wrap(creator, server, self.clock, client=False), self.clock)
            talker.transport.write(line)  # type: ignore[union-attr]
            self.pump.flush()
            self.assert_refused(server, "plaintext")
            self.assertEqual(server.received, b"")

    def test_plaintext_server(self) -> None:
        client, talker = End(), End()
        creator = client_options(self.one, SECONDARY, "dsgrp000.qdsmirror")
        pump = connect(wrap(creator, client, self.clock, client=True), talker, self.clock)
        talker.transport.write(b"220 mail.example ESMTP\r\n")  # type: ignore[union-attr]
        pump.flush()
        self.assert_refused(client, "plaintext")

    def test_the_judge_refuses_what_it_cannot_judge(self) -> None:
        def broken(self: Any, certificate: Any) -> None:
            raise RuntimeError("odd certificate")

        self.patch(tls._Judge, "_name_refusal", broken)
        client, _ = self.meet()
        self.assert_refused(client, "odd certificate")

    def test_connection_without_a_judge(self) -> None:
        class Transport:
            pass

        why = why_lost(Transport(), Failure(ConnectionError("gone")))
        self.assertIsInstance(why, ProtocolError)
        self.assertIn("gone", why.message)


class FilesTests(TlsTestCase):
    def assert_config_error(self, path: Path, *words: str) -> ConfigError:
        error = self.assertRaises(ConfigError, server_context_factory, self.one, SECONDARY)
        for word in (str(path), *words):
            self.assertIn(word, error.message)
        return error

    def test_key_of_the_wrong_mode(self) -> None:
        for mode in (0o640, 0o604, 0o660):
            os.chmod(self.one.key, mode)
            error = self.assert_config_error(self.one.key, f"{mode:04o}")
            self.assertIn("chmod 0600", error.hint)

    def test_missing(self) -> None:
        for path in (self.one.key, self.one.certificate, self.one.ca):
            saved = path.read_bytes()
            path.unlink()
            self.assert_config_error(path, "No such file")
            path.write_bytes(saved)
            path.chmod(0o600)

    def test_not_files(self) -> None:
        for path in (self.one.key, self.one.certificate, self.one.ca):
            saved = path.read_bytes()
            path.unlink()
            os.mkfifo(path, 0o600)
            self.assert_config_error(path, "not a regular file")
            path.unlink()
            path.write_bytes(saved)
            path.chmod(0o600)

    def test_garbage(self) -> None:
        for path in (self.one.key, self.one.certificate, self.one.ca):
            saved = path.read_bytes()
            path.write_bytes(b"-----BEGIN GARBAGE-----\nhunter2\n-----END GARBAGE-----\n")
            error = self.assert_config_error(path, "PEM")
            self.assertNotIn("hunter2", error.message)
            path.write_bytes(saved)

    def test_too_long(self) -> None:
        self.one.ca.write_bytes(bytes(CERTIFICATE_FILE_BYTES_MAX + 1))
        self.assert_config_error(self.one.ca, "longer")

    def test_key_of_another_certificate(self) -> None:
        self.one.key.write_bytes(issue("other.example").private_key_pem.bytes())
        self.assert_config_error(self.one.key, "not the key of", str(self.one.certificate))

    def test_peer_that_is_no_dns_name(self) -> None:
        error = self.assertRaises(ConfigError, server_context_factory, self.one, "192.0.2.7")
        self.assertIn("192.0.2.7", error.message)

    def test_own_name_differs(self) -> None:
        """Only a warning: the peer's refusal is what both sides then report."""
        server_context_factory(dataclasses.replace(self.one, name="x.example"), SECONDARY)

    def test_single_label_names(self) -> None:
        one = host(self.directory / "short1", "primary", issue("primary"))
        two = host(self.directory / "short2", "secondary", issue("secondary"))
        client, _ = self.meet(one, two, "secondary", "primary")
        self.assertTrue(client.completed)
        self.assertIsNone(client.why)
