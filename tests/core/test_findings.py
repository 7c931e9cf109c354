"""Findings: their order, and the exit code that goes with them."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.findings import CHECKS, Finding, advice, error, exit_code, ordered, warning
from qdsmirror.errors import EXIT_CONFIG, EXIT_DEGRADED, EXIT_IDENTITY, EXIT_OK, EXIT_UNREACHABLE


class FindingTests(SynchronousTestCase):
    def test_order(self) -> None:
        """The worst first, causes before effects, as found otherwise, each once."""
        link = error("link", "no link", "x", 0, EXIT_UNREACHABLE)
        key = error("identity", "no key", "x", code=EXIT_IDENTITY)
        other = error("identity", "another", "x", code=EXIT_IDENTITY)
        clock, better = warning("clock", "slow", "x"), advice("configuration", "old", "x")
        given = [better, clock, link, key, other, link]
        self.assertEqual(ordered(given), [key, other, link, clock, better])

    def test_exit_code(self) -> None:
        link = error("link", "no link", "x", 0, EXIT_UNREACHABLE)
        typo = error("configuration", "typo", "x", code=EXIT_CONFIG)
        self.assertEqual(exit_code([]), EXIT_OK)
        self.assertEqual(exit_code([advice("sizes", "m", "x")]), EXIT_OK)
        self.assertEqual(exit_code([advice("sizes", "m", "x"), warning("clock", "m", "x")]),
                         EXIT_DEGRADED)  # fmt: skip
        self.assertEqual(exit_code([warning("clock", "m", "x"), link, typo]), EXIT_CONFIG)

    def test_each_has_a_next_step(self) -> None:
        for message, step in (("", "x"), ("m", "")):
            self.assertRaises(AssertionError, warning, "clock", message, step)
        self.assertRaises(AssertionError, warning, "weather", "m", "x")

    def test_json(self) -> None:
        self.assertEqual(
            warning("clock", "slow", "wind it", 3).to_json(),
            {"severity": "warning", "check": "clock", "group": 3, "message": "slow",
             "next": "wind it"},
        )  # fmt: skip
        self.assertIsInstance(warning("clock", "m", "x"), Finding)
        self.assertEqual(len(CHECKS), len(set(CHECKS)))
