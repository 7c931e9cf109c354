"""Commands that are forked from a server with their modules loaded: processes like any other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from twisted.trial.unittest import TestCase

from tests.integration.commands import COMMANDS, Commands
from tests.integration.lab import console_script


class CommandsTests(TestCase):
    def setUp(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="qds", dir="/tmp"))
        self.addCleanup(shutil.rmtree, self.place)
        self.environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}

    def forked(self, *arguments: str, seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
        command = [console_script(arguments[0]), *arguments[1:]]
        return COMMANDS.run(command, self.place, self.environment, seconds)

    def test_as_if_started(self) -> None:
        for arguments in (
            ("qdsinfo", "--version"),
            ("qdsinfo", "--root", str(self.place)),
            ("qdsinfo", "--no-such-option", "--json"),
            ("qdslab", "create"),
        ):
            command = [console_script(arguments[0]), *arguments[1:]]
            real = subprocess.run(
                command, cwd=self.place, env=self.environment, capture_output=True, text=True
            )
            made = self.forked(*arguments)
            for what in ("returncode", "stdout", "stderr"):
                self.assertEqual(getattr(made, what), getattr(real, what), arguments)

    def test_directory_and_environment(self) -> None:
        self.assertEqual(self.forked("qdslab", "create", "here", "--size", "4M").returncode, 0)
        self.assertTrue((self.place / "here" / "primary" / "etc").is_dir())
        self.environment["QDS_ROOT"] = str(self.place / "here" / "primary")
        self.assertIn("qds0", self.forked("qdsinfo").stdout)
        del self.environment["QDS_ROOT"]
        self.assertNotIn("qds0", self.forked("qdsinfo").stdout)

    def test_one_that_takes_too_long(self) -> None:
        self.assertEqual(self.forked("qdslab", "create", "here", "--size", "4M").returncode, 0)
        wait = ["--root", str(self.place / "here" / "primary"), "--wait", "connected"]
        # Time may be up while it runs, or before the server has forked for it.
        for seconds in (0.2, 0.0):
            self.assertRaises(
                subprocess.TimeoutExpired, self.forked, "qdsinfo", *wait, seconds=seconds
            )
        self.assertEqual(self.forked("qdsinfo", "--version").returncode, 0)

    def test_the_first_is_started_in_earnest(self) -> None:
        commands = Commands()
        self.assertFalse(commands.knows(console_script("qdsinfo")))
        self.assertTrue(commands.knows(console_script("qdsinfo")))
        for other in (sys.executable, "/usr/bin/qdsinfo", "qdsinfo", console_script("trial")):
            self.assertFalse(commands.knows(other))
            self.assertFalse(commands.knows(other))
