"""A visit to the secondary: it is told of the group, and disturbs nothing."""

from __future__ import annotations

from typing import Any

from qdsmirror.core.authentication import Role
from qdsmirror.errors import IdentityError, MismatchError, ProtocolError, QdsError
from qdsmirror.limits import HANDSHAKE_SECONDS
from qdsmirror.net import handshake_commands as commands
from qdsmirror.net.handshake import RemoteHandshake
from qdsmirror.net.handshake_checks import transcript_of
from qdsmirror.net.handshake_visit import VisitHandshake, VisitorsPass
from tests.net.test_handshake import DIGEST, SECRET, HandshakeTestCase, Rogue


class VisitTests(HandshakeTestCase):
    """Both ends in memory."""

    def visit(self, group: int = 0, secret: bytes = SECRET) -> VisitHandshake:
        self.now = iter((100.0, 100.5))
        visitor = VisitHandshake(VisitorsPass(group, secret, lambda: next(self.now)), self.clock)
        self.remote = RemoteHandshake(self.authority, self.clock)
        self.pump = self.join(self.client(visitor), self.server(self.remote))
        return visitor

    def test_facts(self) -> None:
        self.authority.facts = {"ldsus": 2, "version": "9", "configuration": {"port": 575}}
        found = self.successResultOf(self.visit().done)
        self.assertEqual(found.facts, self.authority.facts)
        self.assertEqual(
            found.ldsus,
            [
                {"name": "qds0", "mirror_device": "/dev/mirror0", "size": 4096},
                {"name": "qds1", "mirror_device": "/dev/mirror1", "size": 4097},
            ],
        )
        self.assertEqual((found.asked, found.answered), (100.0, 100.5))
        self.assertEqual(
            found.certificate_ends, self.two_certificate().not_valid_after_utc.timestamp()
        )

    def two_certificate(self) -> Any:
        from cryptography import x509

        return x509.load_pem_x509_certificate(open(self.two.certificate, "rb").read())

    def test_it_disturbs_nothing(self) -> None:
        self.successResultOf(self.visit().done)
        self.pump.flush()
        self.assertFalse(self.pump.client.connected or self.pump.server.connected)
        self.assertEqual(self.authority.visits, 1)
        self.assertEqual((self.authority.errors, self.authority.mapped), ([], []))

    def test_a_configuration_that_differs_keeps_nobody_out(self) -> None:
        self.authority.digest = b"other".ljust(32)
        self.successResultOf(self.visit().done)

    def test_a_wrong_secret_does(self) -> None:
        error = self.failureResultOf(self.visit(secret=bytes(32)).done, IdentityError).value
        self.assertIn("did not prove the secret of dsgrp000", error.message)
        self.assertIn("dsgrp000.secret", error.hint)
        self.assertEqual(self.authority.visits, 0)
        self.assertIsInstance(self.authority.errors[0], IdentityError)

    def test_another_group(self) -> None:
        self.failureResultOf(self.visit(group=1).done, MismatchError)

    def test_facts_of_another_form(self) -> None:
        for facts in ({}, {"ldsus": "2"}, {"ldsus": -1}, {"ldsus": 1 << 20}, {"ldsus": None}):
            self.authority.facts = facts
            self.failureResultOf(self.visit().done, ProtocolError)

    def test_what_it_says_is_fit_for_a_terminal(self) -> None:
        self.authority.describe_ldsu = lambda index: ("a\x1b[2Jb", "/dev/m\n", 1)  # type: ignore[method-assign]
        found = self.successResultOf(self.visit().done)
        self.assertEqual(found.ldsus[0]["name"], "a [2Jb")

    def test_one_that_stays_is_sent_away(self) -> None:
        visitor = self.visit_as_rogue()
        self.clock.advance(HANDSHAKE_SECONDS + 1)
        self.pump.flush()
        self.assertFalse(self.pump.server.connected)
        self.assertEqual((self.authority.visits, visitor.errors), (1, []))

    # -- a visitor is no primary ------------------------------------------------------------------

    def visit_as_rogue(self) -> Rogue:
        """Come in as a visitor, with the secret, and stay."""
        rogue = Rogue()
        self.remote = RemoteHandshake(self.authority, self.clock)
        self.pump = self.join(self.client(rogue), self.server(self.remote))
        answers: list[dict[str, Any]] = []
        asked: Any = rogue.callRemote(commands.Visit, version=1, group=0, nonce=b"n" * 32)
        asked.addCallback(answers.append)
        self.pump.flush()
        transcript = transcript_of(
            rogue,
            0,
            commands.VISIT_DIGEST,
            b"n" * 32,
            answers[0]["nonce"],  # type: ignore[arg-type]
        )
        self.transcript = transcript
        rogue.ask(commands.Authenticate, mac=transcript.proof(SECRET, Role.PRIMARY))
        self.pump.flush()
        self.assertTrue(self.remote.authenticated)
        return rogue

    def test_it_cannot_map_or_start(self) -> None:
        rogue = self.visit_as_rogue()
        allowed = {b"DescribeGroup", b"DescribeLDSU", b"Refuse"}
        self.assertEqual(set(self.remote.responders()), allowed)
        rogue.ask(commands.MapLDSU, index=0, name="qds0", size=1)
        self.pump.flush()
        self.assertIsInstance(rogue.errors[0], QdsError)
        self.assertFalse(self.pump.server.connected)
        self.assertEqual((self.authority.mapped, self.authority.sessions), ([], []))

    def test_a_primary_cannot_ask_what_visitors_do(self) -> None:
        rogue = Rogue()
        self.pump = self.join(
            self.client(rogue), self.server(RemoteHandshake(self.authority, self.clock))
        )
        rogue.ask(commands.DescribeGroup)
        self.pump.flush()
        self.assertIsInstance(rogue.errors[0], QdsError)

    def test_no_index_beyond_the_group(self) -> None:
        rogue = self.visit_as_rogue()
        rogue.ask(commands.DescribeLDSU, index=2)
        self.pump.flush()
        self.assertIn("the group has 2 here", str(rogue.errors[0]))

    def test_its_proof_is_worth_nothing_in_a_session(self) -> None:
        """The digest in the transcript is no configuration's."""
        self.visit_as_rogue()
        self.assertNotEqual(self.transcript.digest, DIGEST)
        rogue = Rogue()
        remote = RemoteHandshake(self.authority, self.clock)
        self.pump = self.join(self.client(rogue), self.server(remote))
        answers: list[dict[str, Any]] = []
        hello: Any = rogue.callRemote(
            commands.Hello, version=1, group=0, digest=DIGEST, nonce=b"n" * 32
        )
        hello.addCallback(answers.append)
        self.pump.flush()
        transcript = transcript_of(
            rogue,
            0,
            commands.VISIT_DIGEST,
            b"n" * 32,
            answers[0]["nonce"],  # type: ignore[arg-type]
        )
        rogue.ask(commands.Authenticate, mac=transcript.proof(SECRET, Role.PRIMARY))
        self.pump.flush()
        self.assertFalse(remote.authenticated)
        self.assertIsInstance(self.authority.errors[-1], IdentityError)
