"""How far a child stands back for others."""

from __future__ import annotations

import signal

from twisted.trial.unittest import SynchronousTestCase, TestCase

from qdsmirror.daemons import child
from tests.tools.sites import host_root


class NicenessTests(TestCase):
    def test_not_where_an_application_waits_for_it(self) -> None:
        paths = host_root(self, "alpha", groups=3)
        self.assertEqual(
            [child._niceness(role, range(3), paths) for role in ("driver", "pmd", "rmd")],
            [0, 5, 5],
        )
        file = paths.group_config(1)
        text = file.read_text()
        for operation in ("sync", "near-sync"):
            file.write_text(text.replace("operation = async", f"operation = {operation}"))
            self.assertEqual(child._niceness("pmd", range(3), paths), 0)
            self.assertEqual(child._niceness("pmd", (0, 2), paths), 5)
        file.write_text("nonsense")
        self.assertEqual(child._niceness("pmd", range(3), paths), 5)


class ProtectionTests(SynchronousTestCase):
    def begun(self, role: str) -> list[str]:
        """Give what a child does first."""
        done = []

        def begin(*_: object) -> None:
            done.append("begin")
            raise InterruptedError

        self.patch(child, "unprotect", lambda: done.append("unprotect"))
        self.patch(signal, "signal", begin)
        with self.assertRaises(InterruptedError):
            child.main([role, "--groups", "0", "--fds", "channel=0"])
        return done

    def test_who_runs_programs_gives_up_first_what_they_would_inherit(self) -> None:
        self.assertEqual(self.begun("stats"), ["unprotect", "begin"])

    def test_who_moves_data_keeps_it(self) -> None:
        for role in ("driver", "pmd", "rmd"):
            self.assertEqual(self.begun(role), ["begin"])
