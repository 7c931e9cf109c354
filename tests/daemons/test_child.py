"""How far a child stands back for others."""

from __future__ import annotations

from twisted.trial.unittest import TestCase

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
