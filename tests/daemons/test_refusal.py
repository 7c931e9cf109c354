"""What the secondary's master tells a primary whose group cannot be served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from qdsmirror import errors
from qdsmirror.daemons.refusal import RefusingAuthority, refusal_of
from qdsmirror.errors import BrokenError, ConfigError, IdentityError, QdsError
from qdsmirror.net.handshake import PrimaryHandshake, RemoteHandshake
from qdsmirror.net.handshake_visit import VisitHandshake, VisitorsPass
from tests.net.test_handshake import DIGEST, SECRET, HandshakeTestCase, offer

REASON = "mirror device of qds0 /dev/m: No such file or directory"


class RefusalTests(HandshakeTestCase):
    """The whole handshake, in memory."""

    def refusing(self, code: int) -> RefusingAuthority:
        ldsu = SimpleNamespace(name="qds0", mirror_device="/dev/m")
        config: Any = SimpleNamespace(
            number=0,
            identity_digest=lambda: DIGEST,
            ldsus=[ldsu, ldsu],
            comparable=lambda: {"operation": "async"},
        )
        host: Any = SimpleNamespace(name="beta")
        self.over = 0

        def ended() -> None:
            self.over += 1

        error = refusal_of("beta", "dsgrp000", REASON, code)
        return RefusingAuthority(config, host, SECRET, error, ended)

    def refuse(self, code: int, **changes: Any) -> QdsError:
        refusing = self.refusing(code)
        primary = PrimaryHandshake(offer(**changes), self.clock)
        self.join(self.client(primary), self.server(RemoteHandshake(refusing, self.clock)))
        told = self.failureResultOf(primary.done, QdsError).value
        self.assertEqual(self.over, 1)
        assert isinstance(told, QdsError)
        return told

    def test_the_reason_travels(self) -> None:
        for code, kind in (
            (errors.EXIT_CONFIG, ConfigError),
            (errors.EXIT_IDENTITY, IdentityError),
            (errors.EXIT_BROKEN, BrokenError),
            (errors.EXIT_FAILED, QdsError),
        ):
            told = self.refuse(code)
            self.assertIs(type(told), kind)
            self.assertEqual(told.message, f"beta cannot serve dsgrp000: {REASON}")
            self.assertIn("qdsconfigtool apply", told.hint)
            # What is no matter of configuration may pass: the child was killed, say.
            self.assertEqual("by itself" in told.hint, kind is QdsError)

    def test_not_to_one_without_the_secret(self) -> None:
        told = self.refuse(errors.EXIT_CONFIG, secret=bytes(32))
        self.assertIs(type(told), IdentityError)
        self.assertNotIn("/dev/m", told.message + told.hint)

    def test_a_visitor_is_told_the_reason(self) -> None:
        visitor = VisitHandshake(VisitorsPass(0, SECRET, lambda: 5.0), self.clock)
        remote = RemoteHandshake(self.refusing(errors.EXIT_CONFIG), self.clock)
        self.join(self.client(visitor), self.server(remote))
        found = self.successResultOf(visitor.done)
        self.assertEqual(found.facts["state"], "failed")
        self.assertEqual(found.facts["notes"], [f"beta cannot serve dsgrp000: {REASON}"])
        self.assertEqual(found.facts["configuration"], {"operation": "async"})
        self.assertEqual(found.ldsus[1]["mirror_device"], "/dev/m")
        self.assertEqual(self.over, 1)
