"""What two hosts find to differ."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.findings import Finding, Severity
from qdsmirror.core.peering import (
    compare_clocks,
    compare_keys,
    compare_ldsus,
    compare_versions,
)

OURS = {"primary.host": "db1", "secondary.journal_device": "/dev/j", "operation": "async",
        "secondary.port": 575}  # fmt: skip
PATH = "/etc/opt/QLIXds/dsgrp000.cfg"


def keys(theirs: Any) -> list[Finding]:
    return compare_keys("dsgrp000", 0, "dr1", OURS, theirs, PATH)


def ldsus(theirs: list[dict[str, Any]], size: int | None = 4096) -> list[Finding]:
    ours = [("qds0", "/dev/m0", size), ("qds1", "/dev/m1", size)]
    return compare_ldsus("dsgrp000", 0, "dr1", ours, theirs, PATH)


def theirs(name: str = "qds0", mirror: str = "/dev/m0", size: int = 4096) -> list[dict[str, Any]]:
    second = {"name": "qds1", "mirror_device": "/dev/m1", "size": 0}
    return [{"name": name, "mirror_device": mirror, "size": size}, second]


class KeyTests(SynchronousTestCase):
    def test_equal(self) -> None:
        self.assertEqual(keys(dict(OURS)), [])
        self.assertEqual(keys({**OURS, "secondary.port": 9, "new": 1}), [])

    def test_identity(self) -> None:
        (one,) = keys({**OURS, "secondary.journal_device": "/dev/x"})
        self.assertIs(one.severity, Severity.ERROR)
        self.assertIn('secondary.journal_device is "/dev/j" here and "/dev/x" on dr1', one.message)
        self.assertIn(PATH, one.next_step)
        self.assertEqual((one.group, one.code), (0, 10))

    def test_what_may_differ(self) -> None:
        (one,) = keys({**OURS, "operation": "sync"})
        self.assertIs(one.severity, Severity.ADVICE)
        self.assertIn("the primary's counts", one.message)

    def test_what_the_peer_says_is_tamed(self) -> None:
        (one,) = keys({**OURS, "operation": "\x1b[2J" + "x" * 1000})
        self.assertNotIn("\x1b", one.message)
        self.assertLess(len(one.message), 300)
        for odd in (None, [], "async", 3):
            self.assertEqual(keys(odd), [])


class LdsuTests(SynchronousTestCase):
    def test_equal(self) -> None:
        self.assertEqual(ldsus(theirs()), [])
        self.assertEqual(ldsus(theirs(size=8192)), [])

    def test_differences(self) -> None:
        for other, words in (
            (theirs(name="qds9"), 'LDSU 0 is qds0 here and "qds9" on dr1'),
            (theirs(mirror="/dev/x"), 'ldsus.qds0.mirror_device is "/dev/m0" here and "/dev/x"'),
            (theirs(size=4095), "has 4095 bytes, the data device here 4096"),
            (theirs()[:1], "2 LDSUs here and 1 on dr1"),
        ):
            (one,) = ldsus(other)
            self.assertIn(words, one.message)
            self.assertIs(one.severity, Severity.ERROR)

    def test_sizes_that_are_not_known(self) -> None:
        self.assertEqual(ldsus(theirs(size=0)), [])
        self.assertEqual(ldsus(theirs(size=1), size=None), [])


class ClockTests(SynchronousTestCase):
    @given(st.floats(-1e6, 1e6), st.floats(0, 30), st.floats(0, 1))
    def test_what_the_way_may_explain_is_no_skew(
        self, skew: float, trip: float, share: float
    ) -> None:
        """Never more is told than there is; one of more than the trip and the bound always is."""
        asked = 1e9
        looked = asked + trip * share + skew
        found = compare_clocks("dr1", asked, asked + trip, looked)
        if abs(skew) <= 1.99:
            self.assertEqual(found, [])
        if abs(skew) > 2.01 + trip:
            self.assertEqual(len(found), 1)
            self.assertIn("ahead of" if skew > 0 else "behind", found[0].message)

    def test_how_bad(self) -> None:
        (one,) = compare_clocks("dr1", 100.0, 100.0, 110.0)
        self.assertIs(one.severity, Severity.WARNING)
        (one,) = compare_clocks("dr1", 1000.0, 1000.0, 100.0)
        self.assertIs(one.severity, Severity.ERROR)
        self.assertIn("timedatectl", one.next_step)

    def test_nothing_said(self) -> None:
        for odd in (None, "12", True, [1]):
            self.assertEqual(compare_clocks("dr1", 1.0, 1.0, odd), [])


class VersionTests(SynchronousTestCase):
    def test_versions(self) -> None:
        self.assertEqual(compare_versions("dr1", "1", "1"), [])
        (one,) = compare_versions("dr1", "1", None)
        self.assertIn("install the same version", one.next_step)
