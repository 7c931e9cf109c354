"""Daemons' timers and lag go by a clock that nobody sets (rules.md 26)."""

from __future__ import annotations

import subprocess
import sys
import time

from twisted.trial.unittest import TestCase

MASTER = """
from qdsmirror.daemons.service import make_service
from qdsmirror.paths import Paths

class Nothing:
    def __init__(self, reactor, paths):
        self.reactor = reactor
    def prepare(self):
        pass

reactor = make_service(Nothing, {"root": None}).reactor
"""
CHILD = """
from qdsmirror.daemons.child import _Child
from qdsmirror.paths import Paths

reactor = _Child("stats", Paths.of(None), {}, lambda parts: None, None, None, {})._reactor
"""
#: Sets a timer, and tells by which clock it is due.
TELL = """
import time
print(reactor.callLater(100, print).getTime() - 100 - time.monotonic())
"""


class ClockTests(TestCase):
    def check(self, script: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", script + TELL], capture_output=True, text=True, timeout=240
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertLess(abs(float(done.stdout)), 5.0)
        # The two clocks can be told apart here.
        self.assertGreater(abs(time.time() - time.monotonic()), 1000.0)

    def test_a_masters(self) -> None:
        self.check(MASTER)

    def test_a_childs(self) -> None:
        self.check(CHILD)
