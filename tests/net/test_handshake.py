from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from OpenSSL import SSL
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import ClientFactory, Factory, Protocol
from twisted.internet.task import Clock, deferLater
from twisted.logger import globalLogPublisher
from twisted.protocols import amp
from twisted.python.failure import Failure
from twisted.test import iosim
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface import implementer

from qdsmirror.core.authentication import Role, Transcript
from qdsmirror.errors import (
    DeviceError,
    DivergedError,
    IdentityError,
    LimitError,
    MismatchError,
    ProtocolError,
    QdsError,
)
from qdsmirror.limits import (
    HANDSHAKE_BOX_BYTES_MAX,
    HANDSHAKE_BOX_KEYS_MAX,
    HANDSHAKE_SECONDS,
)
from qdsmirror.net import handshake_commands as commands
from qdsmirror.net import handshake_remote
from qdsmirror.net.handshake import (
    IRemoteAuthority,
    PrimaryHandshake,
    PrimaryOffer,
    RebasePosition,
    RemoteHandshake,
    UnitOffer,
    UnitPosition,
)
from qdsmirror.net.sending import TlsEndpoint, UnbufferedTlsFactory
from qdsmirror.net.tls import client_options, exporter, server_context_factory
from tests.net.tlsworld import PRIMARY, SECONDARY, connect, host, issue, settle
from tests.net.tlsworld import tls as wrap

reactor: Any = _reactor
SECRET = bytes(range(32))
DIGEST = b"D" * 32
SESSION = b"S" * 16
GENERATION = b"G" * 16
CHAIN = b"C" * 16
REFRESH = b"R" * 16


class Stream(Protocol):
    """The protocol after the switch; may speak first."""

    def __init__(self, greeting: bytes = b"") -> None:
        self.greeting = greeting
        self.received = b""
        self.lost: Failure | None = None

    def connectionMade(self) -> None:
        if self.greeting:
            assert self.transport is not None
            self.transport.write(self.greeting)

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure | None = None) -> None:  # type: ignore[override]
        self.lost = reason


class PrimaryStreams(ClientFactory):
    noisy = False

    def buildProtocol(self, addr: object) -> Stream:
        return Stream(b"frames of the primary")


class RemoteStreams(Factory):
    noisy = False

    def __init__(self) -> None:
        self.built: list[Stream] = []

    def buildProtocol(self, addr: object) -> Stream:
        self.built.append(Stream(b"acks of the secondary"))
        return self.built[-1]


@implementer(IRemoteAuthority)
class Authority:
    """A secondary's group, in memory."""

    def __init__(self, **changes: Any) -> None:
        self.group = 0
        self.digest = DIGEST
        self.secret = SECRET
        self.ldsus = 2
        self.generation = GENERATION
        self.map_error: QdsError | None = None
        self.rebase_result: Callable[[], Deferred[None]] = lambda: succeed(None)
        self.mapped: list[tuple[int, str, int]] = []
        self.rebased: list[RebasePosition] = []
        self.sessions: list[bytes] = []
        self.agreed: list[tuple[int, str]] = []
        self.joined: list[bytes] = []
        self.errors: list[QdsError] = []
        self.streams = RemoteStreams()
        self.facts: dict[str, Any] = {"ldsus": 2, "version": "1"}
        self.visits = 0
        vars(self).update(changes)

    def map_ldsu(self, index: int, name: str, size: int) -> UnitPosition:
        if self.map_error is not None:
            raise self.map_error
        self.mapped.append((index, name, size))
        return UnitPosition(index, self.generation, 10 + index, CHAIN, 99)

    def rebase(self, positions: list[RebasePosition]) -> Deferred[None]:
        self.rebased = positions
        return self.rebase_result()

    def start(self, session: bytes, paths: int, compression: str) -> Factory:
        self.sessions.append(session)
        self.agreed.append((paths, compression))
        return self.streams

    def join(self, session: bytes) -> Factory:
        if session not in self.sessions:
            raise ProtocolError("the session that the path is for is over")
        self.joined.append(session)
        return self.streams

    def refused(self, error: QdsError) -> None:
        self.errors.append(error)

    def describe(self) -> dict[str, Any]:
        return self.facts

    def describe_ldsu(self, index: int) -> tuple[str, str, int]:
        return f"qds{index}", f"/dev/mirror{index}", 4096 + index

    def left(self) -> None:
        self.visits += 1


def resume(positions: list[UnitPosition]) -> Deferred[Sequence[RebasePosition]]:
    return succeed([])


def offer(**changes: Any) -> PrimaryOffer:
    values: dict[str, Any] = {
        "group": 0,
        "digest": DIGEST,
        "secret": SECRET,
        "units": [UnitOffer(0, "qds0", 1 << 40), UnitOffer(1, "qds1", 4096)],
        "decide": resume,
        "session": SESSION,
        "stream_factory": PrimaryStreams(),
        **changes,
    }
    return PrimaryOffer(**values)


def rebases(predecessor: bytes = GENERATION, units: int = 2) -> Sequence[RebasePosition]:
    return [
        RebasePosition(index, b"N" * 16, predecessor, 1, bytes(16), 200, REFRESH)
        for index in range(units)
    ]


class HandshakeTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.directory = Path(self.mktemp())
        self.one = host(self.directory / "one", PRIMARY)
        self.two = host(self.directory / "two", SECONDARY)
        self.authority = Authority()
        self.pumps: list[iosim.IOPump] = []
        self.log: list[str] = []
        globalLogPublisher.addObserver(self.observe)
        self.addCleanup(globalLogPublisher.removeObserver, self.observe)
        self.addCleanup(self.hang_up)

    def observe(self, event: Any) -> None:
        if "reason" in event and "side" in event:
            self.log.append(f"{event['side']}: {event['reason']}")

    def hang_up(self) -> None:
        for pump in self.pumps:
            for end in (pump.client, pump.server):
                if end.connected:
                    end.abortConnection()
            pump.flush()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def client(self, protocol: Any, identity: Any = None, peer: str = SECONDARY) -> Any:
        creator = client_options(identity or self.one, peer, "dsgrp000.qdsmirror")
        return wrap(creator, protocol, self.clock, client=True)

    def server(self, protocol: Any, identity: Any = None, peer: str = PRIMARY) -> Any:
        creator = server_context_factory(identity or self.two, peer)
        return wrap(creator, protocol, self.clock, client=False)

    def join(self, client: Any, server: Any, *, greet: bool = True) -> iosim.IOPump:
        pump = connect(client, server, self.clock, greet=greet)
        self.pumps.append(pump)
        return pump

    def shake(self, *, greet: bool = True, **changes: Any) -> tuple[PrimaryHandshake, Any]:
        """Let both of our own sides meet."""
        primary = PrimaryHandshake(offer(**changes), self.clock)
        self.remote = RemoteHandshake(self.authority, self.clock)
        self.pump = self.join(self.client(primary), self.server(self.remote), greet=greet)
        return primary, self.authority

    def assert_refused(
        self, primary: PrimaryHandshake, kind: type[QdsError], *words: str
    ) -> QdsError:
        """Both sides end with this kind of error, and logged it."""
        error = self.failureResultOf(primary.done, kind).value
        self.assertEqual([type(one) for one in self.authority.errors], [kind])
        self.assertEqual(self.authority.sessions, [])
        for one in (error, self.authority.errors[0]):
            for word in words:
                self.assertIn(word, one.message)
        for side in ("primary", "secondary"):
            logged = [line for line in self.log if side in line.partition(":")[0]]
            self.assertEqual(len(logged), 1, self.log)
        for pump in self.pumps:
            self.assertFalse(pump.client.connected or pump.server.connected)
        return error


class AcceptTests(HandshakeTestCase):
    def test_resume(self) -> None:
        seen: list[UnitPosition] = []

        async def decide(positions: list[UnitPosition]) -> Sequence[RebasePosition]:
            seen.extend(positions)
            return []

        primary, authority = self.shake(decide=decide)
        stream = self.successResultOf(primary.done)
        self.assertEqual(authority.mapped, [(0, "qds0", 1 << 40), (1, "qds1", 4096)])
        self.assertEqual(
            seen, [UnitPosition(index, GENERATION, 10 + index, CHAIN, 99) for index in (0, 1)]
        )
        self.assertEqual((authority.sessions, authority.rebased), ([SESSION], []))
        self.assertEqual(authority.errors, [])
        # Both ends spoke at once: nothing of it was taken for boxes.
        self.assertEqual(stream.received, b"acks of the secondary")
        self.assertEqual(authority.streams.built[0].received, b"frames of the primary")
        self.assertEqual(self.log, [])
        self.assertTrue(primary.authenticated and self.remote.authenticated)

    def test_stream_outlives_the_deadline(self) -> None:
        primary, authority = self.shake()
        stream = self.successResultOf(primary.done)
        self.clock.advance(HANDSHAKE_SECONDS * 3)
        stream.transport.write(b"!" * 100_000)
        self.pump.flush()
        self.assertEqual(len(authority.streams.built[0].received), 100_000 + 21)
        stream.transport.loseConnection()
        self.pump.flush()
        self.assertIsNotNone(stream.lost)
        self.assertIsNotNone(authority.streams.built[0].lost)
        self.assertEqual(authority.errors, [])

    def test_byte_by_byte(self) -> None:
        primary, authority = self.shake(greet=False)
        for _ in range(60):
            self.clock.advance(0)
            for one, other in (
                (self.pump.clientIO, self.pump.serverIO),
                (self.pump.serverIO, self.pump.clientIO),
            ):
                for byte in one.getOutBuffer() or b"":
                    other.bufferReceived(bytes([byte]))
        self.assertEqual(self.successResultOf(primary.done).received, b"acks of the secondary")
        self.assertEqual(authority.streams.built[0].received, b"frames of the primary")

    def test_blank_secondary(self) -> None:
        self.authority.generation = b""
        primary, authority = self.shake(decide=lambda _: succeed(rebases(b"")))
        self.successResultOf(primary.done)
        self.assertEqual(authority.rebased, rebases(b""))

    def test_rebase_then_start(self) -> None:
        waiting: Deferred[None] = Deferred()
        self.authority.rebase_result = lambda: waiting
        primary, authority = self.shake(decide=lambda _: succeed(rebases()))
        self.assertEqual(authority.rebased, rebases())
        self.assertEqual(authority.sessions, [])
        self.assertNoResult(primary.done)
        # Nothing starts before every superblock has the new history.
        self.assertEqual(set(self.remote.responders()), {b"Refuse"})
        waiting.callback(None)
        self.pump.flush()
        self.successResultOf(primary.done)
        self.assertEqual(authority.sessions, [SESSION])

    def test_compression_is_agreed_on_before_the_stream(self) -> None:
        for wanted, agreed in (("zstd", "zstd"), ("lz4", "lz4"), ("none", "none"), ("new", "none")):
            told: list[str] = []
            self.authority = Authority()
            primary, authority = self.shake(compression=wanted, agreed=told.append, paths=3)
            self.successResultOf(primary.done)
            self.assertEqual((told, authority.agreed), ([agreed], [(3, agreed)]))

    def test_an_older_primary_says_nothing_of_compression_and_paths(self) -> None:
        original = PrimaryHandshake.ask

        def older(channel: Any, command: Any, *args: Any, **values: Any) -> Any:
            for name in ("compression", "paths"):
                values.pop(name, None)
            return original(channel, command, *args, **values)

        self.patch(PrimaryHandshake, "ask", older)
        primary, authority = self.shake()
        self.successResultOf(primary.done)
        self.assertEqual(authority.agreed, [(1, "none")])

    def test_join(self) -> None:
        self.authority.sessions.append(SESSION)
        primary, authority = self.shake(joins=True)
        stream = self.successResultOf(primary.done)
        self.assertEqual((authority.joined, authority.sessions), ([SESSION], [SESSION]))
        self.assertEqual((authority.mapped, authority.errors), ([], []))
        self.assertEqual(stream.received, b"acks of the secondary")
        self.assertEqual(authority.streams.built[0].received, b"frames of the primary")

    def test_many_ldsus(self) -> None:
        self.authority.ldsus = 300
        units = [UnitOffer(index, f"qds{index}", 4096) for index in range(300)]
        primary, authority = self.shake(units=units)
        self.successResultOf(primary.done)
        self.assertEqual(len(authority.mapped), 300)


class RefuseTests(HandshakeTestCase):
    def test_secret_is_in_no_text(self) -> None:
        self.assertNotIn(repr(SECRET), repr(offer()))

    def test_wrong_secret(self) -> None:
        primary, _ = self.shake(secret=bytes(32))
        error = self.assert_refused(primary, IdentityError, "did not prove the secret of dsgrp000")
        self.assertIn("dsgrp000.secret", error.hint)

    def test_wrong_digest(self) -> None:
        primary, _ = self.shake(digest=b"E" * 32)
        error = self.assert_refused(primary, MismatchError, "dsgrp000.cfg differs")
        self.assertIn("qdsdoctor --peer -g 0", error.hint)

    def test_wrong_group(self) -> None:
        primary, _ = self.shake(group=1)
        self.assert_refused(primary, MismatchError, "group 0 here, 1 on the other side")

    def test_wrong_version(self) -> None:
        original = PrimaryHandshake.ask

        def newer(channel: Any, command: Any, *args: Any, **values: Any) -> Any:
            if command is commands.Hello:
                values["version"] = 2
            return original(channel, command, *args, **values)

        self.patch(PrimaryHandshake, "ask", newer)
        primary, _ = self.shake()
        self.assert_refused(primary, MismatchError, "protocol version 1 here, 2")

    def test_wrong_size(self) -> None:
        self.authority.map_error = MismatchError("qds0: 1 TiB there, 1 GiB here", hint="grow it")
        primary, _ = self.shake()
        error = self.assert_refused(primary, MismatchError, "1 TiB there, 1 GiB here")
        self.assertEqual(error.hint, "grow it")

    def test_missing_device(self) -> None:
        self.authority.map_error = DeviceError("/dev/vg0/m0: no such device")
        primary, _ = self.shake()
        self.assert_refused(primary, DeviceError, "/dev/vg0/m0")

    def test_too_few_ldsus_here(self) -> None:
        self.authority.ldsus = 1
        primary, _ = self.shake(units=[UnitOffer(1, "qds1", 4096)])
        self.assert_refused(primary, MismatchError, "LDSU 1 (qds1)")

    def test_mapped_twice(self) -> None:
        primary, _ = self.shake(units=[UnitOffer(0, "qds0", 1), UnitOffer(0, "qds0", 1)])
        self.assert_refused(primary, ProtocolError, "mapped twice")

    def test_start_before_every_ldsu_is_mapped(self) -> None:
        primary, _ = self.shake(units=[UnitOffer(0, "qds0", 1)])
        self.assert_refused(primary, ProtocolError, "Start", "not allowed")

    def test_join_of_a_session_that_is_over(self) -> None:
        primary, _ = self.shake(joins=True)
        self.assert_refused(primary, ProtocolError, "is over")

    def test_join_without_the_secret(self) -> None:
        self.authority.sessions.append(SESSION)
        primary, authority = self.shake(joins=True, secret=bytes(32))
        self.failureResultOf(primary.done, IdentityError)
        self.assertEqual(authority.joined, [])

    def test_diverged(self) -> None:
        def decide(positions: list[UnitPosition]) -> Any:
            raise DivergedError("the secondary is ahead", hint="qdsrefresh --full")

        primary, _ = self.shake(decide=decide)
        error = self.assert_refused(primary, DivergedError, "the secondary is ahead")
        self.assertEqual(error.hint, "qdsrefresh --full")
        self.assertEqual(self.authority.errors[0].hint, "qdsrefresh --full")

    def test_rebase_of_another_history(self) -> None:
        primary, authority = self.shake(decide=lambda _: succeed(rebases(b"X" * 16)))
        self.assert_refused(primary, DivergedError, "would replace generation")
        self.assertEqual(authority.rebased, [])

    def test_rebase_of_some_ldsus(self) -> None:
        primary, authority = self.shake(decide=lambda _: succeed(rebases(units=1)))
        self.assert_refused(primary, ProtocolError, "Start", "not allowed")
        self.assertEqual(authority.rebased, [])

    def test_rebase_that_fails(self) -> None:
        self.authority.rebase_result = lambda: fail(DeviceError("journal: no space"))
        primary, _ = self.shake(decide=lambda _: succeed(rebases()))
        self.assert_refused(primary, DeviceError, "journal: no space")

    def test_fault_of_the_secondary(self) -> None:
        self.authority.rebase_result = lambda: fail(ZeroDivisionError())
        primary, _ = self.shake(decide=lambda _: succeed(rebases()))
        self.assert_refused(primary, ProtocolError, "secondary failed internally")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_fault_of_the_primary(self) -> None:
        primary, _ = self.shake(decide=lambda _: fail(ZeroDivisionError()))
        self.assert_refused(primary, ProtocolError, "primary failed internally")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_fault_of_the_primarys_stream(self) -> None:
        class Faulty(ClientFactory):
            def buildProtocol(self, addr: object) -> Any:
                raise ZeroDivisionError

        primary, authority = self.shake(stream_factory=Faulty())
        self.failureResultOf(primary.done, ProtocolError)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertIsNotNone(authority.streams.built[0].lost)

    def test_fault_in_the_middle_of_the_switch(self) -> None:
        class Faulty(Protocol):
            def connectionMade(self) -> None:
                raise ValueError("our own fault")

        primary, authority = self.shake(stream_factory=ClientFactory.forProtocol(Faulty))
        self.failureResultOf(primary.done, ProtocolError)
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)
        self.assertIsNotNone(authority.streams.built[0].lost)

    def test_fault_of_the_secondarys_stream(self) -> None:
        class Faulty(Protocol):
            def connectionMade(self) -> None:
                raise ZeroDivisionError

        self.authority.streams = Factory.forProtocol(Faulty)  # type: ignore[assignment]
        primary, _ = self.shake()
        # The consent had left by then; the link that it gave is gone.
        stream: Any = self.successResultOf(primary.done)
        self.assertIsNotNone(stream.lost)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertFalse(self.pump.server.connected)

    def test_nothing_is_mapped_after_an_error(self) -> None:
        """The primary sends every MapLDSU at once; the first ERR is the last word."""
        asked: list[int] = []

        def map_ldsu(index: int, name: str, size: int) -> UnitPosition:
            asked.append(index)
            raise MismatchError("no such device")

        self.authority.map_ldsu = map_ldsu  # type: ignore[method-assign]
        primary, _ = self.shake()
        self.assert_refused(primary, MismatchError)
        self.assertEqual(asked, [0])

    def test_connection_lost_is_retryable(self) -> None:
        primary, authority = self.shake(decide=lambda _: Deferred())
        self.assertNoResult(primary.done)
        self.pump.server.abortConnection()
        self.pump.flush()
        self.failureResultOf(primary.done, ProtocolError)
        self.assertEqual([type(error) for error in authority.errors], [ProtocolError])

    def test_lost_while_deciding_cancels_the_decision(self) -> None:
        cancelled: list[object] = []
        primary, _ = self.shake(decide=lambda _: Deferred(cancelled.append))
        self.pump.server.abortConnection()
        self.pump.flush()
        self.failureResultOf(primary.done, ProtocolError)
        self.assertEqual(len(cancelled), 1)

    def test_cancel(self) -> None:
        primary, authority = self.shake(decide=lambda _: Deferred())
        primary.done.cancel()
        self.pump.flush()
        self.failureResultOf(primary.done)
        self.assertEqual(len(authority.errors), 1)

    def test_text_of_a_peer_is_tamed(self) -> None:
        self.authority.map_error = MismatchError("a\r\nFAKE LOG LINE\x1b[2J" + "x" * 5000)
        primary, _ = self.shake()
        error = self.failureResultOf(primary.done, MismatchError).value
        self.assertNotIn("\n", error.message)
        self.assertNotIn("\x1b", error.message)
        self.assertLessEqual(len(error.message), 1024)


class CertificateTests(HandshakeTestCase):
    """What TLS refuses arrives as the handshake's end, on both sides (security.md 1, 2)."""

    def shake_as(self, one: Any = None, two: Any = None) -> PrimaryHandshake:
        primary = PrimaryHandshake(offer(), self.clock)
        remote = RemoteHandshake(self.authority, self.clock)
        self.join(self.client(primary, one), self.server(remote, two))
        return primary

    def bad(self, name: str, **how: Any) -> Any:
        return host(self.directory / "bad", name, issue(name, **how))

    def test_wrong_ca(self) -> None:
        primary = self.shake_as(one=self.bad(PRIMARY, ca="theirs"))
        self.assert_refused(primary, IdentityError)

    def test_wrong_ca_of_the_secondary(self) -> None:
        primary = self.shake_as(two=self.bad(SECONDARY, ca="theirs"))
        self.assert_refused(primary, IdentityError)

    def test_expired(self) -> None:
        primary = self.shake_as(one=self.bad(PRIMARY, expired=True))
        self.assert_refused(primary, IdentityError, "expired")

    def test_expired_secondary(self) -> None:
        primary = self.shake_as(two=self.bad(SECONDARY, expired=True))
        self.assert_refused(primary, IdentityError, "expired")

    def test_not_yet_valid(self) -> None:
        primary = self.shake_as(one=self.bad(PRIMARY, early=True))
        self.assert_refused(primary, IdentityError, "certificate")
        self.assertIn("is not valid before", self.authority.errors[0].message)

    def test_not_yet_valid_secondary(self) -> None:
        primary = self.shake_as(two=self.bad(SECONDARY, early=True))
        error = self.assert_refused(primary, IdentityError, "certificate")
        self.assertIn("is not valid before", error.message)

    def test_wrong_name(self) -> None:
        primary = self.shake_as(one=self.bad("other.example"))
        self.assert_refused(primary, IdentityError, "other.example")

    def test_wrong_name_of_the_secondary(self) -> None:
        primary = self.shake_as(two=self.bad("other.example"))
        self.assert_refused(primary, IdentityError, "other.example")

    def test_no_certificate(self) -> None:
        class Anonymous:
            def getContext(self) -> SSL.Context:
                return SSL.Context(SSL.TLS_METHOD)

        client = wrap(Anonymous(), Protocol(), self.clock, client=True)
        self.join(client, self.server(RemoteHandshake(self.authority, self.clock)))
        self.assertIsInstance(self.authority.errors[0], IdentityError)
        self.assertIn("no certificate", self.authority.errors[0].message)

    def test_tls_without_a_judge(self) -> None:
        """Our own side does not run over TLS that nobody judges."""

        class Careless:
            def getContext(self) -> SSL.Context:
                context = SSL.Context(SSL.TLS_METHOD)
                issue(SECONDARY).configure_cert(context)
                return context

        primary = PrimaryHandshake(offer(), self.clock)
        remote = RemoteHandshake(self.authority, self.clock)
        self.join(
            wrap(Careless(), primary, self.clock, client=True),
            wrap(Careless(), remote, self.clock, client=False),
        )
        error = self.failureResultOf(primary.done, ProtocolError).value
        self.assertIn("judged by nobody", error.message)
        self.assertEqual(len(self.authority.errors), 1)

    def test_without_tls(self) -> None:
        remote = RemoteHandshake(self.authority, self.clock)
        talker = Protocol()
        pump = connect(talker, remote, self.clock)
        talker.transport.write(b"\x00\x04_ask\x00\x011\x00\x08_command\x00\x05Hello\x00\x00")  # type: ignore[union-attr]
        pump.flush()
        self.assertIn("outside of TLS", self.authority.errors[0].message)

    def test_plaintext_to_the_port(self) -> None:
        remote = RemoteHandshake(self.authority, self.clock)
        talker = Protocol()
        pump = connect(talker, self.server(remote), self.clock)
        talker.transport.write(b"\x00\x04_ask\x00\x011\x00\x08_command\x00\x05Hello\x00\x00")  # type: ignore[union-attr]
        pump.flush()
        self.assertIsInstance(self.authority.errors[0], IdentityError)
        self.assertIn("plaintext", self.authority.errors[0].message)


class Rogue(amp.AMP):
    """A peer with a good certificate that does what it likes over stock AMP."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Any] = []

    def ask(self, command: Any, **values: Any) -> Deferred[Any]:
        asked: Deferred[Any] = self.callRemote(command, **values)
        return asked.addErrback(lambda failure: self.errors.append(failure.value))

    def locateResponder(self, name: bytes) -> Any:
        return None

    def unhandledError(self, failure: Failure) -> None:
        pass


class Relay(Protocol):
    """One half of a man in the middle: what comes here goes out over there."""

    other: Relay

    def __init__(self) -> None:
        self.early: list[bytes] = []

    def connectionMade(self) -> None:
        for data in self.early:
            self.transport.write(data)  # type: ignore[union-attr]

    def dataReceived(self, data: bytes) -> None:
        if self.other.connected:
            self.other.transport.write(data)  # type: ignore[union-attr]
        else:
            self.other.early.append(data)


class AttackTests(HandshakeTestCase):
    def man_in_the_middle(self, one: Any, two: Any) -> PrimaryHandshake:
        """The primary talks to ``two``, which is really ``one`` talking to the secondary."""
        primary = PrimaryHandshake(offer(), self.clock)
        near, far = Relay(), Relay()
        near.other, far.other = far, near
        remote = RemoteHandshake(self.authority, self.clock)
        pumps = [
            self.join(self.client(primary), self.server(near, two), greet=False),
            self.join(self.client(far, one), self.server(remote), greet=False),
        ]
        settle(*pumps)
        self.middle = pumps
        return primary

    def test_relay_by_another_host_of_the_ca(self) -> None:
        """TLS refuses it on both legs: its name is not the group's."""
        mallory = host(self.directory / "mallory", "mallory.example")
        primary = self.man_in_the_middle(mallory, mallory)
        self.failureResultOf(primary.done, IdentityError)
        self.assertIsInstance(self.authority.errors[0], IdentityError)

    def test_relay_with_forged_names(self) -> None:
        """Even a CA that certifies Mallory as both hosts is not enough: the exporters differ."""
        primary = self.man_in_the_middle(
            host(self.directory / "m1", PRIMARY), host(self.directory / "m2", SECONDARY)
        )
        error = self.failureResultOf(primary.done, IdentityError).value
        self.assertIn("did not prove the secret", error.message)
        self.assertIsInstance(self.authority.errors[0], IdentityError)
        self.assertEqual((self.authority.mapped, self.authority.sessions), ([], []))

    def test_replay(self) -> None:
        """What a good primary sent on one connection is worth nothing on the next."""
        recorded: list[tuple[Any, dict[str, Any]]] = []
        original = PrimaryHandshake.ask

        def recording(channel: Any, command: Any, *args: Any, **values: Any) -> Any:
            recorded.append((command, values))
            return original(channel, command, *args, **values)

        self.patch(PrimaryHandshake, "ask", recording)
        primary, _ = self.shake()
        self.successResultOf(primary.done)
        self.authority = Authority()
        rogue = self.rogue_primary()
        for command, values in recorded[:2]:
            rogue.ask(command, **values)
            self.pump.flush()
        self.assertEqual(recorded[1][0], commands.Authenticate)
        self.assertIsInstance(rogue.errors[0], IdentityError)
        self.assertIsInstance(self.authority.errors[0], IdentityError)

    def rogue_primary(self) -> Rogue:
        rogue = Rogue()
        self.remote = RemoteHandshake(self.authority, self.clock)
        self.pump = self.join(self.client(rogue), self.server(self.remote))
        return rogue

    def rogue_secondary(self, **answers: Any) -> PrimaryHandshake:
        """A secondary that answers Hello and Authenticate as it is told."""

        class Answering(Rogue):
            def locateResponder(self, name: bytes) -> Any:
                return answers.get(name.decode("ascii"))

        primary = PrimaryHandshake(offer(), self.clock)
        self.pump = self.join(self.client(primary), self.server(Answering()))
        return primary

    def test_reflection(self) -> None:
        """A secondary without the secret returns the primary's own proof."""
        hello = lambda box: amp.Box(version=b"1", digest=DIGEST, nonce=b"n" * 32)  # noqa: E731
        echo = lambda box: amp.Box(mac=box[b"mac"])  # noqa: E731
        primary = self.rogue_secondary(Hello=hello, Authenticate=echo)
        error = self.failureResultOf(primary.done, IdentityError).value
        self.assertIn("the secondary did not prove", error.message)

    def test_reflected_nonce(self) -> None:
        hello = lambda box: amp.Box(version=b"1", digest=DIGEST, nonce=box[b"nonce"])  # noqa: E731
        primary = self.rogue_secondary(Hello=hello)
        error = self.failureResultOf(primary.done, ProtocolError).value
        self.assertIn("nonces are equal", error.message)

    def test_role_swap(self) -> None:
        """A proof as secondary does not pass for one as primary, all else being right."""
        for role, accepted in ((Role.SECONDARY, False), (Role.PRIMARY, True)):
            self.authority = Authority()
            rogue = self.rogue_primary()
            hello: list[Any] = []
            rogue.ask(
                commands.Hello, version=1, group=0, digest=DIGEST, nonce=b"n" * 32
            ).addCallback(hello.append)
            self.pump.flush()
            channel = exporter(rogue.transport)
            transcript = Transcript(0, 1, DIGEST, b"n" * 32, hello[0]["nonce"], channel)
            rogue.ask(commands.Authenticate, mac=transcript.proof(SECRET, role))
            self.pump.flush()
            self.assertEqual(self.remote.authenticated, accepted)
            self.assertEqual(bool(self.authority.errors), not accepted)

    def test_secondary_of_other_configuration_or_version(self) -> None:
        for answer in ({"digest": b"E" * 32}, {"version": b"2"}):
            values = {"version": b"1", "digest": DIGEST, "nonce": b"n" * 32, **answer}
            primary = self.rogue_secondary(Hello=lambda box, values=values: amp.Box(**values))
            self.failureResultOf(primary.done, MismatchError)

    def test_primary_of_other_configuration(self) -> None:
        """The secondary compares by itself; it does not leave that to the primary."""
        rogue = self.rogue_primary()
        rogue.ask(commands.Hello, version=1, group=0, digest=b"E" * 32, nonce=b"n" * 32)
        self.pump.flush()
        self.assertIsInstance(rogue.errors[0], MismatchError)
        self.assertIsInstance(self.authority.errors[0], MismatchError)

    def test_malformed_answers(self) -> None:
        for answer in (
            amp.Box(),
            amp.Box(version=b"1", digest=DIGEST, nonce=b"short"),
            amp.Box(version=b"-1", digest=DIGEST, nonce=b"n" * 32),
            amp.Box(version=b"9" * 5000, digest=DIGEST, nonce=b"n" * 32),
        ):
            primary = self.rogue_secondary(Hello=lambda box, answer=answer: answer)
            error = self.failureResultOf(primary.done, ProtocolError).value
            self.assertIn("malformed answer", error.message)

    def test_compression_that_was_not_offered(self) -> None:
        primary = PrimaryHandshake(offer(compression="lz4"), self.clock)
        self.patch(handshake_remote, "known", lambda _name: "zstd")
        self.remote = RemoteHandshake(self.authority, self.clock)
        self.pump = self.join(self.client(primary), self.server(self.remote))
        error = self.failureResultOf(primary.done, ProtocolError).value
        self.assertIn("not offered", error.message)

    def test_secondary_that_knows_no_command(self) -> None:
        primary = self.rogue_secondary()
        self.failureResultOf(primary.done, ProtocolError)


class TcpTests(TestCase):
    """The same over real sockets, wired as the daemons do."""

    async def attempt(self, leaf: Any) -> tuple[PrimaryHandshake, Authority]:
        directory = Path(self.mktemp())
        one = host(directory / "one", PRIMARY, leaf)
        two = host(directory / "two", SECONDARY)
        authority = Authority()
        remotes = Factory.forProtocol(lambda: RemoteHandshake(authority, reactor))
        remotes.noisy = False
        server = UnbufferedTlsFactory(server_context_factory(two, PRIMARY), False, remotes)
        port: Any = reactor.listenTCP(0, server, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        primaries = Factory.forProtocol(lambda: PrimaryHandshake(offer(), reactor))
        primaries.noisy = False
        endpoint = TlsEndpoint(
            client_options(one, SECONDARY, "dsgrp000.qdsmirror"),
            TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port),
        )
        primary: Any = await endpoint.connect(primaries)
        return primary, authority

    async def test_good(self) -> None:
        primary, authority = await self.attempt(issue(PRIMARY))
        stream: Any = await primary.done
        while not (stream.received and authority.streams.built[0].received):
            await deferLater(reactor, 0)
        stream.transport.abortConnection()
        while authority.streams.built[0].lost is None or stream.lost is None:
            await deferLater(reactor, 0)

    async def test_refused_certificate(self) -> None:
        """The alert arrives although the client's Hello was already under way."""
        primary, authority = await self.attempt(issue("other.example"))
        error = await self.assertFailure(primary.done, IdentityError)
        self.assertIn("other.example", error.message)
        while not authority.errors or primary.transport is not None:
            await deferLater(reactor, 0)
        self.assertIn("other.example", authority.errors[0].message)


class BoxTests(HandshakeTestCase):
    """AMP before authentication (security.md 4)."""

    def rogue(self) -> Rogue:
        rogue = Rogue()
        self.remote = RemoteHandshake(self.authority, self.clock)
        self.pump = self.join(self.client(rogue), self.server(self.remote))
        return rogue

    def talker(self) -> Any:
        """A peer that sends bytes and reads nothing."""
        talker = Protocol()
        self.remote = RemoteHandshake(self.authority, self.clock)
        self.pump = self.join(self.client(talker), self.server(self.remote))
        return talker

    def assert_box_refused(self, data: bytes, kind: type[QdsError], *words: str) -> None:
        self.authority = Authority()
        talker = self.talker()
        talker.transport.write(data)
        self.pump.flush()
        self.assertEqual([type(error) for error in self.authority.errors], [kind])
        for word in words:
            self.assertIn(word, self.authority.errors[0].message)
        self.assertFalse(self.pump.server.connected)
        self.assertEqual(self.authority.sessions, [])

    def command(self, name: bytes, **values: bytes) -> bytes:
        return bytes(amp.Box(_command=name, _ask=b"1", **values).serialize())

    def test_too_many_keys(self) -> None:
        keys = {f"k{number}": b"" for number in range(HANDSHAKE_BOX_KEYS_MAX - 1)}
        self.assert_box_refused(self.command(b"Hello", **keys), LimitError, "keys")
        same = amp.Box(k=b"").serialize()[:-2] * (HANDSHAKE_BOX_KEYS_MAX + 1)
        self.assert_box_refused(same, LimitError, "keys")

    def test_as_many_keys_as_allowed(self) -> None:
        keys = {f"k{number}": b"" for number in range(HANDSHAKE_BOX_KEYS_MAX - 2)}
        self.assert_box_refused(self.command(b"Hello", **keys), ProtocolError, "malformed")

    def test_oversize_box(self) -> None:
        value = bytes(HANDSHAKE_BOX_BYTES_MAX // 2)
        # Refused by the announced length: the second value itself need not arrive.
        data = amp.Box(a=value, b=value).serialize()[: -len(value)]
        self.assert_box_refused(data, LimitError, "box")

    def test_oversize_by_keys(self) -> None:
        value = bytes(HANDSHAKE_BOX_BYTES_MAX - 300)
        data = amp.Box({b"a": value, b"b" * 250: b"", b"c" * 250: b""}).serialize()
        self.assert_box_refused(data, LimitError, "box")

    def test_oversize_key(self) -> None:
        self.assert_box_refused(b"\x01\x00" + bytes(256), LimitError, "key of 256")

    def test_nothing_is_buffered_beyond_the_box(self) -> None:
        talker = self.talker()
        value = bytes(HANDSHAKE_BOX_BYTES_MAX - 20)
        for piece in range(8):
            talker.transport.write(amp.Box({b"k%d" % piece: value}).serialize()[:-2])
            self.pump.flush()
        self.assertLessEqual(len(self.remote._unprocessed), 2 * HANDSHAKE_BOX_BYTES_MAX)
        self.assertFalse(self.pump.server.connected)

    def test_start_tls(self) -> None:
        self.assert_box_refused(self.command(b"StartTLS"), ProtocolError, "StartTLS", "not allowed")

    def test_unknown_command(self) -> None:
        self.assert_box_refused(self.command(b"Shutdown"), ProtocolError, "not allowed")

    def test_commands_out_of_order(self) -> None:
        for command, values in (
            (commands.Authenticate, {"mac": bytes(32)}),
            (commands.MapLDSU, {"index": 0, "name": "qds0", "size": 1}),
            (
                commands.Rebase,
                {
                    "index": 0,
                    "generation": GENERATION,
                    "predecessor": b"",
                    "next_sequence": 1,
                    "chain": CHAIN,
                    "next_gsn": 1,
                    "refresh_id": REFRESH,
                },
            ),
        ):
            self.authority = Authority()
            rogue = self.rogue()
            rogue.ask(command, **values)
            self.pump.flush()
            self.assertIsInstance(rogue.errors[0], ProtocolError)
            self.assertIsInstance(self.authority.errors[0], ProtocolError)
            self.assertEqual((self.authority.mapped, self.authority.rebased), ([], []))
        self.assert_box_refused(
            self.command(b"Join", session=SESSION), ProtocolError, "not allowed"
        )
        self.assert_box_refused(
            self.command(b"Start", session=SESSION), ProtocolError, "not allowed"
        )

    def test_hello_twice(self) -> None:
        rogue = self.rogue()
        for _ in range(2):
            rogue.ask(commands.Hello, version=1, group=0, digest=DIGEST, nonce=b"n" * 32)
        self.pump.flush()
        self.assertIsInstance(rogue.errors[0], ProtocolError)
        self.assertIn("not allowed", self.authority.errors[0].message)

    def test_nothing_is_answered_after_a_refusal(self) -> None:
        rogue = self.rogue()
        rogue.ask(commands.Hello, version=9, group=0, digest=DIGEST, nonce=b"n" * 32)
        rogue.ask(commands.Hello, version=1, group=0, digest=DIGEST, nonce=b"n" * 32)
        self.pump.flush()
        self.assertEqual(len(self.authority.errors), 1)
        self.assertIsInstance(rogue.errors[0], MismatchError)
        self.assertNotIsInstance(rogue.errors[1], QdsError)

    def test_command_without_ask(self) -> None:
        data = amp.Box(_command=b"Hello").serialize()
        self.assert_box_refused(data, ProtocolError, "asks for no answer")

    def test_answers_to_nothing(self) -> None:
        for box in (
            amp.Box(_answer=b"1"),
            amp.Box(_error=b"1", _error_code=b"x", _error_description=b"y"),
            amp.Box(_error=b"1"),
            amp.Box(neither=b"nor"),
        ):
            self.assert_box_refused(box.serialize(), ProtocolError, "AMP")

    def test_empty_box(self) -> None:
        self.assert_box_refused(b"\0\0", ProtocolError)

    def test_malformed_values(self) -> None:
        good = {"version": b"1", "group": b"0", "digest": DIGEST, "nonce": b"n" * 32}
        for bad in (
            {"version": b"x"},
            {"version": b"-1"},
            {"version": b"1" * 21},
            {"version": b"4294967296"},
            {"version": "²".encode()},
            {"digest": b"short"},
            {"nonce": b"n" * 33},
            {"nonce": b""},
        ):
            self.assert_box_refused(
                self.command(b"Hello", **{**good, **bad}), ProtocolError, "malformed"
            )

    def test_commands_to_the_primary(self) -> None:
        for name in (b"StartTLS", b"Hello", b"Refuse"):
            talker: Any = Protocol()
            primary = PrimaryHandshake(offer(), self.clock)
            pump = self.join(self.client(primary), self.server(talker))
            talker.transport.write(self.command(name))
            pump.flush()
            self.failureResultOf(primary.done, ProtocolError)
            self.assertFalse(pump.client.connected)

    def test_refuse_by_the_primary_is_believed_for_itself_only(self) -> None:
        rogue = self.rogue()
        rogue.callRemote(commands.Refuse, code="diverged", text="a\x1b[0m\nhint")
        self.pump.flush()
        error = self.authority.errors[0]
        self.assertIsInstance(error, DivergedError)
        self.assertEqual((error.message, error.hint), ("a [0m", "hint"))

    def test_refuse_is_bounded(self) -> None:
        self.rogue().callRemote(commands.Refuse, code="no-such-code", text="x" * 4000)
        self.pump.flush()
        error = self.authority.errors[0]
        self.assertIs(type(error), QdsError)
        self.assertEqual(len(error.message), 1024)


class DeadlineTests(HandshakeTestCase):
    def test_silent_client(self) -> None:
        """Not even TLS begins: the deadline counts from adoption."""
        remote = RemoteHandshake(self.authority, self.clock)
        pump = connect(Protocol(), self.server(remote), self.clock)
        self.clock.advance(HANDSHAKE_SECONDS - 0.1)
        self.assertEqual(self.authority.errors, [])
        self.clock.advance(0.2)
        pump.flush()
        self.assertIn("no authentication within 10 s", self.authority.errors[0].message)
        self.assertFalse(pump.server.connected)

    def test_silent_after_tls(self) -> None:
        pump = self.join(
            self.client(Rogue()), self.server(RemoteHandshake(self.authority, self.clock))
        )
        self.clock.advance(HANDSHAKE_SECONDS)
        pump.flush()
        self.assertIsInstance(self.authority.errors[0], ProtocolError)
        self.assertFalse(pump.server.connected)

    def test_trickle_does_not_prolong(self) -> None:
        talker: Any = Protocol()
        remote = RemoteHandshake(self.authority, self.clock)
        pump = self.join(self.client(talker), self.server(remote))
        for byte in b"\x00\x04_ask\x00\x011\x00\x08_co":
            talker.transport.write(bytes([byte]))
            pump.flush()
            self.clock.advance(1)
        self.assertIn("within", self.authority.errors[0].message)

    def test_silent_secondary(self) -> None:
        primary = PrimaryHandshake(offer(), self.clock)
        silent = Protocol()
        self.join(self.client(primary), self.server(silent))
        self.assertNoResult(primary.done)
        self.clock.advance(HANDSHAKE_SECONDS)
        self.failureResultOf(primary.done, ProtocolError)

    def test_decision_that_takes_too_long(self) -> None:
        primary, authority = self.shake(decide=lambda _: Deferred())
        self.clock.advance(HANDSHAKE_SECONDS - 0.1)
        self.assertNoResult(primary.done)
        self.clock.advance(0.1)
        error = self.failureResultOf(primary.done, ProtocolError).value
        self.assertIn("no start within", error.message)
        self.pump.flush()
        self.assertEqual(len(authority.errors), 1)

    def test_the_start_has_a_deadline_of_its_own(self) -> None:
        waiting: Deferred[Sequence[RebasePosition]] = Deferred()
        primary = PrimaryHandshake(offer(decide=lambda _: waiting), self.clock)
        remote = RemoteHandshake(self.authority, self.clock)
        pump = self.join(self.client(primary), self.server(remote), greet=False)
        self.clock.advance(HANDSHAKE_SECONDS - 1)
        pump.flush()
        self.clock.advance(HANDSHAKE_SECONDS - 1)
        waiting.callback([])
        pump.flush()
        self.successResultOf(primary.done)

    def test_peer_that_does_not_hang_up(self) -> None:
        """A refused peer that keeps its end open is cut at the deadline."""
        primary, _ = self.shake(greet=False, secret=bytes(32))
        server = self.pump.serverIO
        for _ in range(12):
            self.clock.advance(0)
            to_server, to_client = self.pump.clientIO.getOutBuffer(), server.getOutBuffer()
            if self.authority.errors:
                break
            for io, data in ((server, to_server), (self.pump.clientIO, to_client)):
                if data:
                    io.bufferReceived(data)
        self.assertEqual(len(self.authority.errors), 1)
        self.assertFalse(server.disconnecting)
        self.clock.advance(HANDSHAKE_SECONDS)
        self.assertTrue(server.disconnecting)
        self.failureResultOf(primary.done)
