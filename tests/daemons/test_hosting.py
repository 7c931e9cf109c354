"""What a child does of what its master says."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import TestCase

from qdsmirror.config import HostConfig
from qdsmirror.daemons.hosting import Hosting
from qdsmirror.errors import ConfigError
from tests.tools.sites import host_root


class ReloadTests(TestCase):
    def setUp(self) -> None:
        self.wrong = False
        self.reloads: list[str] = []

        def ignore(*_: Any) -> Any:
            return None

        self.hosting = Hosting(
            "pmd", host_root(self), Clock(), ignore, ignore, ignore, ignore, ignore, ignore,
            self.reload,
        )  # fmt: skip
        self.hosting._groups[0] = self  # type: ignore[assignment]

    def reload(self, host: HostConfig) -> None:
        self.reloads.append(host.name)
        if self.wrong:
            raise ConfigError("host.key: cannot be read", hint="chmod")

    def hint(self) -> None:
        self.reloads.append("hint")

    def order(self, order: str) -> list[str]:
        """Give an order; tell what was done."""
        self.reloads.clear()
        self.hosting.ordered({"order": order, "group": 0}, [])
        return list(self.reloads)

    def test_what_failed_is_tried_again_at_the_next_apply(self) -> None:
        self.assertEqual(self.order("reload"), ["alpha"])
        self.assertEqual(self.order("hint"), ["hint"])
        self.wrong = True
        self.order("reload")
        self.assertEqual(self.order("hint"), ["alpha", "hint"])
        self.wrong = False
        self.assertEqual(self.order("hint"), ["alpha", "hint"])
        self.assertEqual(self.order("hint"), ["hint"])
