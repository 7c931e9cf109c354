"""qdsextend and qdsfree beside fake daemons."""

from __future__ import annotations

import json
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.errors import DegradedError, LimitError
from qdsmirror.tools import extend, info_view
from tests.tools.sites import FakeDaemon, captured, driver_status, host_root

CHAINED = {
    "ldsu": "qds0",
    "device": "/dev/e0",
    "state": "chained",
    "drain_bytes": 0,
    "uncommitted_bytes": 0,
    "size": 1 << 27,
    "used_bytes": 1 << 26,
    "pool_free": 3,
}
DRAINED = {**CHAINED, "state": "leaving", "drain_bytes": 3 << 20}


LEAVING = {**DRAINED, "uncommitted_bytes": 1 << 20}


class CommandTests(TestCase):
    def driver(self, answers: dict[str, Any], host: str = "alpha") -> FakeDaemon:
        paths = host_root(self, host)
        self.root = str(paths.root)
        return FakeDaemon(self, paths.control_socket("dsgrp000.driver"), answers)

    def test_extend(self) -> None:
        driver = self.driver({"Extend": CHAINED})
        code, output, errors = captured(self, extend.main, "qds0", "--root", self.root)
        self.assertEqual((code, errors), (0, ""))
        self.assertEqual(
            output,
            "qds0: /dev/e0 extends the writelog, 64 MiB of 128 MiB used; free in the pool: 3\n",
        )
        captured(self, extend.main, "qds0", "/dev/../dev/e0", "--root", self.root)
        self.assertEqual(
            driver.calls,
            [
                ("Extend", {"ldsu": "qds0", "device": ""}),
                ("Extend", {"ldsu": "qds0", "device": "/dev/e0"}),
            ],
        )

    def test_free(self) -> None:
        driver = self.driver({"Free": LEAVING})
        code, output, _ = captured(self, extend.free_main, "qds0", "--root", self.root)
        self.assertEqual(code, 0)
        self.assertEqual(
            output,
            "qds0: /dev/e0 leaves the writelog: 1 MiB in it have yet to reach the secondary\n",
        )
        self.assertEqual(driver.calls, [("Free", {"ldsu": "qds0", "device": ""})])

    def test_free_what_is_drained(self) -> None:
        self.driver({"Free": DRAINED})
        code, output, _ = captured(self, extend.free_main, "qds0", "--root", self.root)
        self.assertEqual(code, 0)
        self.assertEqual(
            output, "qds0: /dev/e0 leaves the writelog: drained, and free at the next checkpoint\n"
        )

    def test_free_at_once(self) -> None:
        self.driver({"Free": {**CHAINED, "state": "free"}})
        _, output, _ = captured(self, extend.free_main, "qds0", "--root", self.root)
        self.assertEqual(output, "qds0: /dev/e0 is free\n")

    def test_json(self) -> None:
        self.driver({"Extend": CHAINED, "Free": LEAVING})
        for main, answer in ((extend.main, CHAINED), (extend.free_main, LEAVING)):
            code, output, errors = captured(self, main, "qds0", "--json", "--root", self.root)
            self.assertEqual((code, errors), (0, ""))
            self.assertEqual(
                json.loads(output), {"schema": 1, **answer, "group": 0, "name": "dsgrp000"}
            )

    def test_refused(self) -> None:
        self.driver({"Extend": DegradedError("none is free", "qdsfree"), "Free": LimitError("x")})
        code, _, errors = captured(self, extend.main, "qds0", "--root", self.root)
        self.assertEqual((code, errors), (3, "none is free; qdsfree\n"))
        code, _, errors = captured(self, extend.free_main, "qds0", "--root", self.root)
        self.assertEqual((code, errors), (1, "x\n"))

    def test_usage(self) -> None:
        self.driver({})
        for arguments in ([], ["qds7"], ["qds0", "/dev/e0", "/dev/e1"]):
            for main in (extend.main, extend.free_main):
                code, _, _ = captured(self, main, *arguments, "--root", self.root)
                self.assertEqual(code, 2, arguments)

    def test_at_the_secondary(self) -> None:
        self.driver({}, "beta")
        code, _, errors = captured(self, extend.main, "qds0", "--root", self.root)
        self.assertEqual(code, 10)
        self.assertIn("not the primary", errors)


class ViewTests(TestCase):
    def test_remarks(self) -> None:
        rows = [
            {"device": "/e0", "state": "chained", "ldsu": "qds0", "reason": ""},
            {"device": "/e1", "state": "free", "ldsu": None, "reason": ""},
            {"device": "/e2", "state": "unusable", "ldsu": None, "reason": "it is gone"},
        ]
        group = driver_status(pool={"devices": rows, "free": 1, "used": 1})
        chain = [
            {"device": "/e0", "size": 1 << 26, "used_bytes": 1 << 20, "leaving": False},
            {"device": "/e3", "size": 1 << 26, "used_bytes": 1 << 20, "leaving": True},
        ]
        group["ldsus"][0]["writelog"]["extensions"] = chain
        self.assertEqual(
            info_view.remarks(group),
            [
                "dsgrp000: qds0: /e0 extends the writelog, 1 MiB of 64 MiB used",
                "dsgrp000: qds0: /e3 leaves the writelog, 1 MiB of 64 MiB used",
                "dsgrp000: 1 of 3 extension devices are free",
                "dsgrp000: /e2 cannot be used: it is gone",
            ],
        )
