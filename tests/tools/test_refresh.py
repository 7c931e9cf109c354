"""qdsrefresh, launchrefresh, killrefresh beside fake daemons."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.errors import (
    EXIT_BROKEN,
    BrokenError,
    DegradedError,
    IdentityError,
    UnreachableError,
)
from qdsmirror.tools import following, refresh
from qdsmirror.tools import progress as progress_room
from tests.tools.sites import FakeDaemon, captured, driver_status, host_root, pmd_status


def progress(done: int, remaining: int) -> dict[str, Any]:
    return {
        "kind": "full",
        "id": "ab",
        "done_bytes": done,
        "remaining_bytes": remaining,
        "rate": None,
        "eta_seconds": None,
        "started": 1790000000.0,
    }


class CommandTests(TestCase):
    """The three commands."""

    def driver(self, answers: dict[str, Any], name: str = "alpha") -> FakeDaemon:
        paths = host_root(self, name)
        self.root = str(paths.root)
        FakeDaemon(self, paths.control_socket("dsgrp000.pmd"), {"Status": pmd_status()})
        return FakeDaemon(self, paths.control_socket("dsgrp000.driver"), answers)

    def test_foreground(self) -> None:
        self.patch(following, "POLL_SECONDS", 0.001)
        steps = [None, progress(0, 100), progress(60, 40), None]

        def status(words: dict[str, str]) -> dict[str, Any]:
            step = steps.pop(0) if len(steps) > 1 else steps[0]
            return driver_status(refresh=step, coherent=step is None)

        driver = self.driver({"Refresh": progress(0, 100), "Status": status})
        code, output, errors = captured(self, refresh.main, "--root", self.root, "--full")
        self.assertEqual((code, errors), (0, ""))
        self.assertEqual(driver.calls[1], ("Refresh", {"kind": "full"}))
        lines = output.splitlines()
        self.assertEqual(lines[0], "dsgrp000: full refresh 0 %, 100 B remain")
        self.assertEqual(lines[-1], "dsgrp000: refreshed")

    def test_foreground_killed(self) -> None:
        told = driver_status(coherent=False, reason="the last refresh was ended")
        self.driver({"Refresh": progress(0, 100), "Status": told})
        code, _, errors = captured(self, refresh.main, "--root", self.root)
        self.assertEqual(code, EXIT_BROKEN)
        self.assertIn("the last refresh was ended", errors)

    def test_launch(self) -> None:
        driver = self.driver({"Refresh": progress(0, 100)})
        code, output, _ = captured(self, refresh.launch_main, "--json", "--root", self.root)
        self.assertEqual(code, 0)
        self.assertEqual(json.loads(output)["groups"][0]["remaining_bytes"], 100)
        self.assertEqual(driver.calls[-1], ("Refresh", {"kind": "auto"}))

    def test_dirty(self) -> None:
        driver = self.driver({"Refresh": progress(0, 100)})
        code, _, _ = captured(self, refresh.launch_main, "--dirty", "--root", self.root)
        self.assertEqual(code, 0)
        self.assertEqual(driver.calls[-1], ("Refresh", {"kind": "dirty"}))
        code, _, errors = captured(
            self, refresh.launch_main, "--dirty", "--full", "--root", self.root
        )
        self.assertEqual(code, 2)
        self.assertIn("not allowed with", errors)

    def test_one_is_running(self) -> None:
        self.driver({"Refresh": DegradedError("dsgrp000: a refresh is running already", "wait")})
        code, _, errors = captured(self, refresh.launch_main, "--root", self.root)
        self.assertEqual((code, errors), (3, "dsgrp000: a refresh is running already; wait\n"))

    def test_one_that_is_refused_stops_no_other(self) -> None:
        self.patch(following, "POLL_SECONDS", 0.001)
        for main, command, done in (
            (refresh.main, "Refresh", "dsgrp001: refreshed"),
            (refresh.launch_main, "Refresh", "dsgrp001: refresh has begun"),
            (refresh.kill_main, "KillRefresh", "dsgrp001: refresh has ended"),
        ):
            paths = host_root(self, groups=2)
            refusal = DegradedError("dsgrp000: not now", "wait")
            for number, answer in enumerate((refusal, progress(0, 100))):
                name = f"dsgrp{number:03d}"
                answers = {command: answer, "Status": driver_status(number)}
                FakeDaemon(self, paths.control_socket(f"{name}.driver"), answers)
                FakeDaemon(self, paths.control_socket(f"{name}.pmd"), {"Status": pmd_status()})
            code, output, errors = captured(self, main, "--root", str(paths.root))
            self.assertEqual((code, errors), (3, "dsgrp000: not now; wait\n"))
            self.assertTrue(output.startswith(done), output)
            code, output, errors = captured(self, main, "--json", "--root", str(paths.root))
            self.assertEqual((code, errors), (3, ""))
            found = json.loads(output)
            self.assertEqual([one["name"] for one in found["groups"]], ["dsgrp001"])
            self.assertEqual(found["errors"][0]["message"], "dsgrp000: not now")

    def test_kill(self) -> None:
        driver = self.driver({"KillRefresh": {}})
        self.assertEqual(captured(self, refresh.kill_main, "--root", self.root)[0], 0)
        self.assertEqual(driver.calls, [("KillRefresh", {})])

    def test_no_driver(self) -> None:
        root = str(host_root(self).root)
        code, _, errors = captured(self, refresh.launch_main, "--root", root)
        self.assertEqual(code, 11)
        self.assertIn("launchdriver", errors)

    def test_at_the_secondary(self) -> None:
        self.driver({}, "beta")
        code, _, errors = captured(self, refresh.launch_main, "--root", self.root)
        self.assertEqual(code, 10)
        self.assertIn("run this on alpha", errors)


class FollowTests(TestCase):
    """Waiting for the end."""

    def follow(self, looks: list[Any]) -> list[Any]:
        shown: list[Any] = []

        def look(config: Any) -> Any:
            one = looks.pop(0)
            if isinstance(one, Exception):
                raise one
            return one

        config: Any = SimpleNamespace(number=0)
        ended = refresh.follow([config], look, shown.append, lambda seconds: None)
        self.assertEqual(looks, [])
        for error in ended.values():
            raise error
        return shown

    def test_daemons_come_and_go(self) -> None:
        running = driver_status(refresh=progress(1, 1), coherent=False)
        gone = driver_status(driver={"pid": None}, coherent=None)
        shown = self.follow([running, UnreachableError("x"), gone, running, driver_status()])
        self.assertEqual(len(shown), 4)

    def test_killed(self) -> None:
        self.assertRaises(BrokenError, self.follow, [driver_status(coherent=False)])
        # Why there is no link says nothing of that.
        link = {"pid": 1, "state": "connecting", "reason": "nobody answers", "code": 0}
        group = driver_status(coherent=False, reason="nobody answers", pmd=link)
        error = self.assertRaises(BrokenError, self.follow, [group])
        self.assertNotIn("nobody", str(error))

    def test_one_that_is_killed_stops_no_other(self) -> None:
        killed = driver_status(coherent=False, reason="killed")
        running = driver_status(1, refresh=progress(1, 1), coherent=False)
        looks = {0: [killed], 1: [running, running, driver_status(1)]}
        configs: Any = [SimpleNamespace(number=0), SimpleNamespace(number=1)]
        ended = refresh.follow(
            configs,
            lambda config: looks[config.number].pop(0),
            lambda group: None,
            lambda seconds: None,
        )
        self.assertEqual(looks, {0: [], 1: []})
        self.assertEqual([*ended], [0])
        self.assertIsInstance(ended[0], BrokenError)

    def test_refused_link(self) -> None:
        link = {"pid": 1, "state": "refused", "reason": "wrong name", "code": 12}
        group = driver_status(refresh=progress(1, 1), coherent=False, pmd=link)
        looks = [group] * following.REFUSED_LOOKS
        error = self.assertRaises(IdentityError, self.follow, looks)
        self.assertIn("wrong name", str(error))

    def test_refused_until_the_refresh_is_known(self) -> None:
        """The pmd may still say what it was refused for before it knew of the refresh."""
        link = {"pid": 1, "state": "refused", "reason": "another generation", "code": 4}
        refused = driver_status(refresh=progress(0, 2), coherent=False, pmd=link)
        running = driver_status(refresh=progress(1, 1), coherent=False)
        self.follow([refused, refused, running, refused, running, driver_status()])


class LinesTests(TestCase):
    """Progress where there is no terminal."""

    def test_a_line_each_ten_seconds(self) -> None:
        now = [0.0]
        written: list[str] = []
        show = progress_room.group_lines(lambda: now[0], written.append)
        for second in range(21):
            now[0] = float(second)
            show(driver_status(refresh=progress(second, 20 - second)))
        self.assertEqual(len(written), 3)
        self.assertEqual(written[1], "dsgrp000: full refresh 50 %, 10 B remain")
