"""What the secondary's master tells a primary whose group cannot be served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from qdsmirror import errors
from qdsmirror.daemons.refusal import RefusingAuthority, refusal_of
from qdsmirror.errors import BrokenError, ConfigError, IdentityError, QdsError
from qdsmirror.net.handshake import PrimaryHandshake, RemoteHandshake
from tests.net.test_handshake import DIGEST, SECRET, HandshakeTestCase, offer

REASON = "mirror device of qds0 /dev/m: No such file or directory"


class RefusalTests(HandshakeTestCase):
    """The whole handshake, in memory."""

    def refuse(self, code: int, **changes: Any) -> QdsError:
        config: Any = SimpleNamespace(
            number=0, identity_digest=lambda: DIGEST, ldsus=[object(), object()]
        )
        self.over = 0

        def ended() -> None:
            self.over += 1

        error = refusal_of("beta", "dsgrp000", REASON, code)
        refusing = RefusingAuthority(config, SECRET, error, ended)
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

    def test_not_to_one_without_the_secret(self) -> None:
        told = self.refuse(errors.EXIT_CONFIG, secret=bytes(32))
        self.assertIs(type(told), IdentityError)
        self.assertNotIn("/dev/m", told.message + told.hint)
