"""Programs that throttles run: real ones, what they inherit, and how they end."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.errors import QdsError
from qdsmirror.groups.programs import run_program


class ProgramTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.base = Path(tempfile.mkdtemp(dir="/tmp", prefix="qdsp"))
        self.addCleanup(shutil.rmtree, self.base)

    def shell(self, script: str, seconds: float = 120.0) -> str:
        return run_program(["/bin/sh", "-c", script], {"QDS_GROUP": "dsgrp000"}, seconds)

    def fails(self, script: str, seconds: float = 120.0) -> str:
        return self.assertRaises(QdsError, self.shell, script, seconds).message

    def test_arguments_are_no_shells(self) -> None:
        self.assertEqual(run_program(["/bin/echo", "a b", "$HOME;", "`id`"], {}, 120.0),
                         "a b $HOME; `id`")  # fmt: skip

    def test_its_environment_is_clean(self) -> None:
        os.environ["SECRET_OF_OURS"] = "x"
        self.addCleanup(os.environ.pop, "SECRET_OF_OURS")
        said = run_program(["/usr/bin/env"], {"QDS_GROUP": "dsgrp000"}, 120.0).split()
        self.assertEqual(
            sorted(said),
            ["LANG=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "QDS_GROUP=dsgrp000"],
        )

    def test_it_inherits_no_descriptor(self) -> None:
        kept = os.open("/dev/null", os.O_RDONLY)
        self.addCleanup(os.close, kept)
        os.set_inheritable(kept, True)
        self.assertEqual(self.shell("ls /proc/self/fd").split()[:3], ["0", "1", "2"])
        self.assertNotIn(str(kept), self.shell("ls /proc/$$/fd").split())
        self.assertEqual(self.shell("pwd; cat"), "/")

    def test_what_it_says_is_cut(self) -> None:
        self.assertEqual(self.shell("echo one; echo two >&2"), "one two")
        self.assertEqual(len(self.shell("yes | head -c 1000000 | tr -d '\\n'")), 1024)

    def test_its_end(self) -> None:
        self.assertEqual(self.fails("echo no; exit 3"), "/bin/sh ended with exit code 3: no")
        self.assertEqual(self.fails("kill -9 $$"), "/bin/sh was ended by signal 9")
        error = self.assertRaises(QdsError, run_program, ["/nonexistent/x"], {}, 1.0)
        self.assertEqual(error.message, "/nonexistent/x: No such file or directory")

    def test_it_is_killed_with_what_it_has_started(self) -> None:
        file = self.base / "pid"
        # A busy machine may need longer until it has started anything.
        for seconds in (0.5, 5, 50):
            begun = time.monotonic()
            text = self.fails(f"sleep 300 & echo $! > {file}; wait", seconds)
            self.assertIn(f"took longer than {seconds} s; killed", text)
            self.assertLess(time.monotonic() - begun, 200)
            if file.exists() and file.read_text():
                break
        pid = int(file.read_text())
        while Path(f"/proc/{pid}/stat").exists():
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.01)

    def test_one_that_closes_its_output_early(self) -> None:
        self.assertIn("took longer", self.fails("exec >&- 2>&-; sleep 300", 0.3))
        self.assertEqual(self.shell("exec >&- 2>&-; sleep 0.1"), "")

    def test_nobody_wants_it_any_more(self) -> None:
        begun = time.monotonic()
        error = self.assertRaises(
            QdsError, run_program, ["/bin/sleep", "300"], {}, 600.0,
            lambda: time.monotonic() > begun + 0.2,
        )  # fmt: skip
        self.assertIn("is killed at our end", error.message)
        self.assertLess(time.monotonic() - begun, 200)

    def test_what_it_leaves_behind_is_not_waited_for(self) -> None:
        file = self.base / "pid"
        begun = time.monotonic()
        self.assertEqual(self.shell(f"sleep 300 & echo $! > {file}; echo done"), "done")
        self.assertLess(time.monotonic() - begun, 200)
        os.kill(int(file.read_text()), signal.SIGKILL)
