"""qdsbypass beside fake daemons, and what waits for room before bypass is left."""

from __future__ import annotations

import json
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.errors import EXIT_DEGRADED, DegradedError, UnreachableError
from qdsmirror.tools import bypass, info, refresh
from tests.tools.sites import FakeDaemon, captured, driver_status, host_root, pmd_status

STATE = {"id": "ab", "since": 1790000000.0, "reason": "full", "dirty_bytes": 65536}


class CommandTests(TestCase):
    def driver(self, answers: dict[str, Any]) -> FakeDaemon:
        paths = host_root(self, "alpha")
        self.root = str(paths.root)
        FakeDaemon(self, paths.control_socket("dsgrp000.pmd"), {"Status": pmd_status()})
        return FakeDaemon(self, paths.control_socket("dsgrp000.driver"), answers)

    def test_on(self) -> None:
        driver = self.driver({"Bypass": STATE})
        code, output, errors = captured(self, bypass.main, "on", "--json", "--root", self.root)
        self.assertEqual((code, errors), (0, ""))
        self.assertEqual(json.loads(output)["groups"][0], {**STATE, "group": 0, "name": "dsgrp000"})
        self.assertEqual(driver.calls, [("Bypass", {"to": "on"})])

    def test_on_while_it_is_on(self) -> None:
        self.driver({"Bypass": DegradedError("dsgrp000 is in bypass already", "qdsbypass off")})
        code, _, errors = captured(self, bypass.main, "on", "--root", self.root)
        self.assertEqual(code, EXIT_DEGRADED)
        self.assertEqual(errors, "dsgrp000 is in bypass already; qdsbypass off\n")

    def test_one_that_is_on_stops_no_other(self) -> None:
        paths = host_root(self, groups=2)
        refusal = DegradedError("dsgrp000 is in bypass already", "qdsbypass off")
        FakeDaemon(self, paths.control_socket("dsgrp000.driver"), {"Bypass": refusal})
        FakeDaemon(self, paths.control_socket("dsgrp001.driver"), {"Bypass": STATE})
        code, output, errors = captured(self, bypass.main, "on", "--root", str(paths.root))
        self.assertEqual((code, errors), (3, "dsgrp000 is in bypass already; qdsbypass off\n"))
        self.assertTrue(output.startswith("dsgrp001: in bypass"), output)

    def test_off(self) -> None:
        driver = self.driver({"Bypass": {"kind": "full"}, "Status": driver_status()})
        code, output, _ = captured(self, bypass.main, "off", "--root", self.root)
        self.assertEqual(code, 0)
        self.assertIn("bypass left, a refresh has begun", output)
        self.assertEqual(driver.calls[-1], ("Bypass", {"to": "off"}))

    def test_neither(self) -> None:
        self.driver({})
        code, _, _ = captured(self, bypass.main, "maybe", "--root", self.root)
        self.assertEqual(code, 2)


class RoomTests(TestCase):
    """Leaving bypass waits while the secondary fetches what lies before the break."""

    def waits(self, *looks: Any) -> tuple[int, list[str]]:
        queue, told, slept = list(looks), [], []

        def look(_config: Any) -> Any:
            one = queue.pop(0)
            if isinstance(one, Exception):
                raise one
            return one

        config: Any = object()
        refresh.wait_for_room(config, look, slept.append, told.append)
        self.assertEqual(queue, [])
        return len(slept), told

    def group(self, used: float, link: str = "connected", state: str = "bypass") -> dict[str, Any]:
        unit = {"writelog": {"used_ratio": used}}
        return driver_status(state=state, pmd={"state": link}, ldsus=[unit])

    def test_while_there_is_hope(self) -> None:
        slept, told = self.waits(self.group(0.9), self.group(0.6), self.group(0.5))
        self.assertEqual((slept, len(told)), (2, 1))
        self.assertIn("waiting until the secondary", told[0])

    def test_not_without_it(self) -> None:
        for one in (
            self.group(0.9, "connecting"),
            self.group(0.9, state="connected"),
            self.group(0.1),
            UnreachableError("gone"),
        ):
            self.assertEqual(self.waits(one), (0, []))


class PredicateTests(TestCase):
    def test_what_went_past_the_writelogs_is_not_drained(self) -> None:
        gsn = dict.fromkeys(("written", "durable", "applied", "sent", "committed", "mirrored"), 7)
        group = driver_status(state="bypass", modes=["bypass", "connected"], gsn=gsn, bypass=STATE)
        self.assertFalse(info.is_so(group, "drained"))
        self.assertIn("qdsbypass off -g 0", info.describe(group, "drained"))
        self.assertTrue(info.is_so(group, "bypass") and info.is_so(group, "connected"))
        self.assertTrue(info.is_so({**group, "bypass": {**STATE, "dirty_bytes": 0}}, "drained"))
