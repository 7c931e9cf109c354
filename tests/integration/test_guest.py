"""The kernel's NBD driver: qdsattach in an emulated machine, and the driver killed under ext4."""

from __future__ import annotations

import compileall
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from twisted.trial.unittest import TestCase

from tests.integration.guest import machine
from tests.integration.lab import QUIET, REPOSITORY, console_script, in_thread
from tests.integration.world import need

#: Two idle processors take 2 minutes; busy ones may take much longer.
MACHINE_SECONDS = 1100.0
FILES = [str(number) for number in range(10, 28)]
KILL_AT = ("f13", "f20")
OPTIONS = ("--size", "16M", "--writelog", "8M", "--journal", "12M")


class GuestTests(TestCase):
    timeout = 1200

    def setUp(self) -> None:
        need("mkfs.ext4", "e2fsck")
        self.kernel, self.version = machine.find_kernel()
        # Not in /dev/shm, over which the guest has its own devices.
        self.base = Path(tempfile.mkdtemp(prefix="qds-", dir="/tmp"))
        self.addCleanup(shutil.rmtree, self.base, ignore_errors=True)

    def boot(self) -> str:
        """Run the script in the guest; give what it wrote."""
        lab = self.base / "lab"
        command = [console_script("qdslab"), "create", str(lab), *OPTIONS]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        # The guest cannot write what it compiles, and would do it anew for every process.
        for name in ("qdsmirror", "twisted"):
            compileall.compile_dir(REPOSITORY / name, quiet=2)
        settings = {
            "LAB": str(lab),
            "BIN": str(Path(sys.executable).parent),
            "REPOSITORY": str(REPOSITORY),
            "QUIET": str(QUIET),
            "FILES": " ".join(FILES),
            "KILL_AT": " ".join(KILL_AT),
        }
        files = self.base / "files"
        files.write_bytes(machine.initial_files(self.version, settings))
        console = self.base / "console"
        ended = machine.run(self.kernel, files, console, MACHINE_SECONDS)
        text = console.read_text(errors="replace")
        self.assertTrue(ended, f"the guest did not end in time\n{text}")
        return text

    @in_thread
    def test_driver_is_killed_under_a_file_system(self) -> None:
        text = self.boot()
        told = re.findall(r"^guest: (.*?)\r?$", text, re.MULTILINE)
        self.assertIn("end", told, text)
        self.assertEqual([line for line in told if line.startswith("failed")], [], text)
        for step in ("mounted", "written", "unmounted", "detached", "drained", "equal", "clean"):
            self.assertIn(step, told, text)
        self.assertIn("device /dev/nbd0", told, text)
        self.assertIn("contract OK", told, text)
        self.assertIn("errors 0", told, text)
        self.assert_protected(told)
        killed = {line for line in told if line.startswith("killed ")}
        self.assertEqual(len(killed), len(KILL_AT), text)
        self.assertIn(f"reconnected {len(KILL_AT)}", told, text)
        for number in FILES:
            lines = "".join(
                f"{one}\n" for one in range(int(f"{number}00000"), int(f"{number}05000"))
            )
            digest = hashlib.sha256(lines.encode()).hexdigest()
            self.assertIn(f"sum f{number} {digest}", told, text)

    def assert_protected(self, told: list[str]) -> None:
        """Root has every capability there, so all of rules.md 20 is granted, and to no other."""
        held = "\n".join(line for line in told if "threads flush" in line)
        for role in ("driver", "pmd"):
            wanted = rf"(?m)^{role}: (\d+) of \1 threads flush, [1-9]\d* kB locked, score -1000$"
            self.assertRegex(held, wanted)
        self.assertRegex(held, r"(?m)^rmd: 0 of \d+ threads flush, 0 kB locked, score 0$")
        # The children's own word: each says what was refused.
        self.assertIn("refused 0", told)
