"""make demo: mirrors, verifies, prints a receipt, leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from twisted.trial.unittest import TestCase

from qdsmirror.limits import MIB
from qdsmirror.tools import demo
from qdsmirror.tools.lab_plan import Plan
from qdsmirror.tools.lab_sites import Lab

ROOT = Path(__file__).resolve().parent.parent.parent


class DemoTests(TestCase):
    """The demo as a newcomer runs it, off a terminal."""

    timeout = 1200

    def setUp(self) -> None:
        self.place = tempfile.mkdtemp(prefix="qd", dir="/tmp")
        self.addCleanup(shutil.rmtree, self.place, True)

    def demo(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "qdsmirror.tools.demo", *argv],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": self.place},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def running(self) -> list[str]:
        """Find processes that mention our directory."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
                if self.place in line:
                    found.append(line)
        return found

    def test_receipt(self) -> None:
        result = self.demo("--size", "4M")
        self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)
        self.assertIn("every mirror is byte-identical", result.stdout)
        self.assertIn("mirror          coherent", result.stdout)
        self.assertEqual(result.stdout.count(" equal\n"), demo.LDSUS)
        self.assertEqual(os.listdir(self.place), [])
        self.assertEqual(self.running(), [])

    def test_json(self) -> None:
        result = self.demo("--size", "4M", "--json")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertIs(json.loads(result.stdout)["equal"], True)

    def test_usage(self) -> None:
        result = self.demo("--size", "5000")
        self.assertEqual(result.returncode, 2)
        self.assertEqual(os.listdir(self.place), [])


class CompareTests(TestCase):
    """A receipt that could not say "different" would prove nothing."""

    def setUp(self) -> None:
        place = Path(tempfile.mkdtemp(prefix="qd", dir="/tmp"))
        self.addCleanup(shutil.rmtree, place)
        self.lab = Lab(place / "lab")
        self.lab.create(Plan(size=4 * MIB, writelog=2 * MIB, journal=3 * MIB))
        self.written = [demo.Written("qds0", bytearray(4 * MIB))]

    def poke(self, site: str, name: str, at: int) -> None:
        with open(self.lab.devices(site) / name, "r+b") as file:
            file.seek(at)
            file.write(b"x")

    def test_equal(self) -> None:
        self.assertTrue(demo.compare(self.lab, self.written).equal)

    def test_mirror_differs(self) -> None:
        self.poke("secondary", "qds0.mirror", 3 * MIB + 17)
        receipt = demo.compare(self.lab, self.written)
        self.assertFalse(receipt.equal)
        self.assertIn(f"first at byte {3 * MIB + 17}", receipt.lines[-1])

    def test_both_differ_from_what_was_written(self) -> None:
        self.poke("secondary", "qds0.mirror", 17)
        self.poke("primary", "qds0.data", 17)
        receipt = demo.compare(self.lab, self.written)
        self.assertFalse(receipt.equal)
        self.assertIn("DIFFERENT", receipt.lines[3])

    def test_lengths_differ(self) -> None:
        mirror = self.lab.devices("secondary") / "qds0.mirror"
        os.truncate(mirror, 2 * MIB)
        data = self.lab.devices("primary") / "qds0.data"
        self.assertEqual(demo.first_difference(data, mirror), 2 * MIB)
