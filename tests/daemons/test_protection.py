"""What a child asks of the kernel against a shortage of memory, granted and refused."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from qdsmirror.daemons import protection
from qdsmirror.limits import MIB

_PROGRAM = """
import ctypes, json, sys, threading
from qdsmirror.daemons.protection import protect
import qdsmirror.groups.driver
found = protect()
flushers, done = [], threading.Event()
def ask():
    flushers.append(ctypes.CDLL(None).prctl(58, 0, 0, 0, 0))
for _ in range(8):
    threading.Thread(target=done.wait, daemon=True).start()
thread = threading.Thread(target=ask); thread.start(); thread.join()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    **found.to_json(), "flusher_in_thread": flushers[0],
    "locked_kib": int(status["VmLck"].split()[0]), "resident_kib": int(status["VmRSS"].split()[0]),
}))
"""

# First gets something to give up: its lowest capability as an ambient one (structs: capget(2)).
_INHERITANCE_PROGRAM = """
import ctypes, json, subprocess, sys
from pathlib import Path
from qdsmirror.daemons.protection import unprotect
library = ctypes.CDLL(None)
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
data = (ctypes.c_uint32 * 6)()
library.capget(header, data)
if data[1]:
    data[2] |= data[1] & -data[1]
    library.capset(header, data)
    library.prctl(47, 2, (data[1] & -data[1]).bit_length() - 1, 0, 0)
score = Path("/proc/self/oom_score_adj")
try:
    score.write_text("-7")
except OSError:
    pass
def told():
    found = subprocess.run(
        ["cat", "/proc/self/status", score], capture_output=True, text=True
    ).stdout.splitlines()
    ambient = next(line.split()[1] for line in found if line.startswith("CapAmb:"))
    return [int(ambient, 16), int(found[-1])]
before = told()
unprotect()
print(json.dumps([before, told()]))
"""


class GrantedTests(SynchronousTestCase):
    """In a process of its own: locking trial's memory would be no kindness."""

    def run_one(self) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True, timeout=60
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def test_what_is_said_is_so(self) -> None:
        found = self.run_one()
        self.assertEqual(bool(found["locked_kib"]), found["locked"], found)
        self.assertEqual(found["flusher_in_thread"] == 1, found["io_flusher"], found)
        asked = (found["io_flusher"], found["locked"], found["oom_score_adj"] == -1000)
        self.assertEqual(len(found["refused"]), asked.count(False), found)

    def test_locking_costs_no_memory_that_is_not_used(self) -> None:
        found = self.run_one()
        if not found["locked"]:
            raise SkipTest("the right to lock memory (CAP_IPC_LOCK or no limit) is missing")
        self.assertLess(found["resident_kib"] * 1024, 80 * MIB)

    def test_programs_inherit_nothing(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", _INHERITANCE_PROGRAM],
            capture_output=True, text=True, check=True, timeout=240,
        )  # fmt: skip
        (ambient, score), found = json.loads(done.stdout)
        self.assertEqual(found, [0, max(0, score)])
        if not ambient:
            raise SkipTest("there is no capability to give up")


class RefusedTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.asked: list[tuple[str, tuple[int, ...]]] = []
        self.answers = {"prctl": -1, "mlockall": 0}

        def answering(name: str) -> Any:
            def call(*arguments: int) -> int:
                self.asked.append((name, arguments))
                return self.answers[name]

            return call

        library = SimpleNamespace(**{name: answering(name) for name in self.answers})
        self.patch(protection.ctypes, "CDLL", lambda *_, **__: library)
        self.patch(protection.ctypes, "get_errno", lambda: 1)
        place = Path(self.mktemp())
        place.mkdir()
        self.score = place / "oom_score_adj"
        self.score.write_text("7\n")
        self.status = place / "status"
        self.status.write_text("Name:\tx\nCapEff:\t0000000000000000\n")
        self.patch(protection, "_OOM_SCORE_ADJ", self.score)
        self.patch(protection, "_STATUS", self.status)
        self.limit = resource.RLIM_INFINITY
        self.patch(protection.resource, "getrlimit", lambda _: (self.limit, self.limit))

    def test_each_is_asked_for_whatever_the_others_said(self) -> None:
        found = protection.protect()
        self.assertEqual(self.asked, [("prctl", (57, 1, 0, 0, 0)), ("mlockall", (7,))])
        self.assertEqual(self.score.read_text(), "-1000")
        self.assertEqual(found[:3], (False, True, -1000))
        self.assertEqual(found.refused, ("PR_SET_IO_FLUSHER: Operation not permitted",))

    def test_nothing_is_locked_under_a_limit(self) -> None:
        self.limit = 8 * MIB
        found = protection.protect()
        self.assertFalse(found.locked)
        self.assertNotIn("mlockall", [name for name, _ in self.asked])
        self.assertIn(f"RLIMIT_MEMLOCK is {8 * MIB} bytes", found.refused[-1])

    def test_a_limit_does_not_bind_who_has_the_capability(self) -> None:
        self.limit = 8 * MIB
        self.status.write_text(f"CapEff:\t{1 << 14:016x}\n")
        self.assertTrue(protection.protect().locked)

    def test_the_score_that_holds_is_told(self) -> None:
        if os.geteuid() == 0:
            # Root writes to any file, so a directory stands for one that cannot be written.
            self.patch(protection, "_OOM_SCORE_ADJ", Path(tempfile.gettempdir()))
            found = protection.protect()
            self.assertIsNone(found.oom_score_adj)
        else:
            self.score.chmod(0o444)
            found = protection.protect()
            self.assertEqual(found.oom_score_adj, 7)
        self.assertTrue(any("oom_score_adj -1000" in line for line in found.refused))

    def test_a_score_that_holds_already_is_left(self) -> None:
        self.score.write_text("-1000\n")
        self.score.chmod(0o444)
        self.assertEqual(protection.protect().oom_score_adj, -1000)

    def test_what_programs_would_inherit_is_given_up(self) -> None:
        for held, left in (("-1000\n", "0"), ("0\n", "0\n"), ("500\n", "500\n")):
            self.score.write_text(held)
            protection.unprotect()
            self.assertEqual(self.score.read_text(), left)
            self.assertEqual(self.asked.pop(), ("prctl", (47, 4, 0, 0, 0)))

    def test_it_is_given_up_where_there_is_no_score(self) -> None:
        self.score.unlink()
        protection.unprotect()
        self.assertEqual(self.asked, [("prctl", (47, 4, 0, 0, 0))])
