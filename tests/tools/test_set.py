"""qdsset beside fake daemons, and the table of settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from twisted.trial.unittest import SynchronousTestCase, TestCase

from qdsmirror.config import GroupConfig, Tunables, load_group
from qdsmirror.configlive import SETTINGS, changed, differing, parse_settings, values
from qdsmirror.errors import DegradedError, UsageError
from qdsmirror.limits import MIB
from qdsmirror.tools import info_view
from qdsmirror.tools import set as command
from tests.core.test_evaluation import throttle
from tests.tools.sites import FakeDaemon, captured, driver_status, host_root


class TableTests(TestCase):
    def test_words(self) -> None:
        words = ["operation=near-sync", "near_sync_entries = 7", "send_window=2M"]
        settings = parse_settings(words)
        self.assertEqual(
            settings,
            {"operation": "near-sync", "near_sync_entries": "7", "send_window": "2M"},
        )
        config = load_group(host_root(self, "alpha"), 0)
        at_driver = changed(config, settings, "driver")
        self.assertEqual((at_driver.operation, at_driver.near_sync_entries), ("near-sync", 7))
        self.assertEqual(at_driver.tunables, config.tunables)
        at_pmd = changed(config, settings, "pmd")
        self.assertEqual(at_pmd.tunables.send_window, 2 * MIB)
        self.assertEqual(at_pmd.operation, config.operation)
        self.assertEqual(
            differing(at_driver, config, "driver"),
            {"operation": "near-sync", "near_sync_entries": 7},
        )
        self.assertEqual(differing(at_driver, config, "pmd"), {})

    def test_errors(self) -> None:
        for words, told in (
            (["operation"], "is not KEY=VALUE"),
            (["=sync"], "is not KEY=VALUE"),
            (["operaton=sync"], 'did you mean "operation"?'),
            (["operation=snyc"], 'did you mean "sync"?'),
            (["near_sync_entries=0"], "is not from 1 to 65536"),
            (["metadata_seconds=fast"], "is not a time"),
            (["a b.value=x"], '"x" is not a number'),
            (["a b.limit=0"], "a b.limit: expected a whole number of KB a second from 1 to"),
            (["a b.limit=none"], 'or off, found "none"'),
            (["a b.limit=1 2"], "expected the line's end"),
            (["port.number=575"], "there is no setting"),
            (["port=575"], "does not change while the daemons run"),
            (["host=beta"], "does not change while the daemons run"),
            (["tunables=x"], 'there is no setting "tunables"'),
            (["operation=sync", "operation=async"], "given twice"),
        ):
            error = self.assertRaises(UsageError, parse_settings, words)
            self.assertIn(told, error.message, words)
            self.assertTrue(error.hint)

    def test_every_tunable_can_be_set(self) -> None:
        """One that qdsset does not change is named here."""
        # Known when the journal is initialised.
        fixed = {"before_image_bytes"}
        tunables = {field.name for field in dataclasses.fields(Tunables)}
        self.assertEqual(tunables - set(SETTINGS), fixed)

    def throttled(self) -> GroupConfig:
        config = load_group(host_root(self, "alpha"), 0)
        return dataclasses.replace(
            config,
            throttles=(
                throttle("netkbps T> 200", "limit 50", 'syslog "x"', name="office hours"),
                throttle("lag > 0.5", "limit off", name="v1.2"),
                throttle("pctwl > 60", "extend", name="full"),
            ),
        )

    def test_numbers_of_throttles(self) -> None:
        before = self.throttled()
        words = [
            "office hours.value=300",
            "office hours.limit=off",
            "v1.2.limit=70",
            "v1.2.value=2.25",
        ]
        after = changed(before, parse_settings(words), "stats")
        self.assertEqual(
            [str(one.test) for one in after.throttles],
            ["netkbps T> 300", "lag > 2.25", "pctwl > 60"],
        )
        self.assertEqual(
            [[str(action) for action in one.actions] for one in after.throttles],
            [["limit off", 'syslog "x"'], ["limit 70"], ["extend"]],
        )
        wanted = {
            "office hours.value": 300,
            "office hours.limit": "off",
            "v1.2.value": 2.25,
            "v1.2.limit": 70,
        }
        self.assertEqual(differing(after, before, "stats", "primary"), wanted)
        self.assertEqual(differing(after, before, "stats", "secondary"), {})
        self.assertEqual(changed(before, parse_settings(words), "pmd"), before)
        told = values(before, "stats", "primary")
        self.assertEqual((told["full.value"], told["v1.2.limit"]), (60, "off"))
        self.assertNotIn("full.limit", told)
        self.assertNotIn("throttle_interval", values(before, "stats", "secondary"))
        self.assertIn("perf_interval", values(before, "stats", "secondary"))

    def test_numbers_that_a_throttle_does_not_have(self) -> None:
        for word, said in (
            ("ofice hours.value=1", 'no throttle "ofice hours"; did you mean "office hours"?'),
            ("full.limit=50", 'the throttle "full" has no action limit'),
            ("full.value=101", "full.value: expected a whole number from 0 to 100"),
            ("full.value=0.5", "full.value: expected a whole number from 0 to 100"),
        ):
            error = self.assertRaises(
                UsageError, changed, self.throttled(), parse_settings([word]), "stats"
            )
            self.assertIn(said, error.message, word)
            self.assertTrue(error.hint)

    def test_each_has_a_daemon_that_goes_by_it(self) -> None:
        config = load_group(host_root(self, "alpha"), 0)
        for daemon in ("driver", "pmd", "rmd", "stats"):
            self.assertEqual(
                set(values(config, daemon)),
                {key for key, one in SETTINGS.items() if daemon in one.daemons},
            )


class CommandTests(TestCase):
    def host(self, name: str = "alpha", groups: int = 1) -> None:
        self.paths = host_root(self, name, groups=groups)

    def daemon(self, name: str, answer: Any = None) -> FakeDaemon:
        return FakeDaemon(
            self, self.paths.control_socket(name), {"Set": answer or self.echo({"x": 1})}
        )

    def echo(self, known: dict[str, Any]) -> Callable[[dict[str, str]], dict[str, Any]]:
        return lambda words: {"settings": {**known, **json.loads(words["settings"])}}

    def run_it(self, *words: str) -> tuple[int, str, str]:
        return captured(self, command.main, *words, "--root", str(self.paths.root))

    def test_each_daemon_is_told_what_it_goes_by(self) -> None:
        self.host()
        driver, pmd = self.daemon("dsgrp000.driver"), self.daemon("dsgrp000.pmd")
        code, output, errors = self.run_it("operation=sync", "near_sync_entries=3")
        self.assertEqual((code, errors), (0, ""))
        self.assertEqual(output, "dsgrp000: operation = sync\ndsgrp000: near_sync_entries = 3\n")
        told = json.dumps({"operation": "sync", "near_sync_entries": "3"})
        self.assertEqual(driver.calls, [("Set", {"settings": told})])
        self.assertEqual(pmd.calls, [])
        self.run_it("send_window=1M", "qds0")
        self.assertEqual(pmd.calls, [("Set", {"settings": json.dumps({"send_window": "1M"})})])

    def test_shows_them(self) -> None:
        self.host()
        self.daemon("dsgrp000.driver", self.echo({"auto_refresh": True, "operation": "async"}))
        self.daemon("dsgrp000.pmd", self.echo({"send_window": 7}))
        stats = {"prf_limit": 65536, "perf_interval": 2.5, "verify_every": 0.0}
        self.daemon("dsgrp000.stats", self.echo(stats))
        code, output, _ = self.run_it()
        self.assertEqual(code, 0)
        self.assertEqual(
            output,
            "dsgrp000: auto_refresh = yes\n"
            "dsgrp000: operation = async\n"
            "dsgrp000: send_window = 7\n"
            "dsgrp000: prf_limit = 65536\n"
            "dsgrp000: perf_interval = 2.5\n"
            "dsgrp000: verify_every = never\n",
        )
        code, output, _ = self.run_it("--json")
        self.assertEqual(
            json.loads(output)["groups"],
            [{"group": 0, "name": "dsgrp000",
              "settings": {"auto_refresh": True, "operation": "async", "send_window": 7,
                           **stats}}],
        )  # fmt: skip

    def test_a_throttles_number_is_told_to_the_statistics(self) -> None:
        self.host(groups=2)
        with self.paths.group_config(0).open("a") as file:
            file.write("[throttles]\n[[office hours]]\ntest = netkbps > 0\nactions = limit 50\n")
        driver, stats = self.daemon("dsgrp000.driver"), self.daemon("dsgrp000.stats")
        code, output, errors = self.run_it("office hours.limit=100", "-g", "0")
        self.assertEqual((code, errors), (0, ""))
        self.assertEqual(output, "dsgrp000: office hours.limit = 100\n")
        told = json.dumps({"office hours.limit": "100"})
        self.assertEqual(stats.calls, [("Set", {"settings": told})])
        # Before anybody is told, all is checked: nothing changes, or everything does.
        code, _, errors = self.run_it("operation=sync", "office hour.limit=1", "-g", "0")
        self.assertEqual((code, driver.calls, len(stats.calls)), (2, [], 1))
        self.assertIn('dsgrp000: there is no throttle "office hour"; did you mean', errors)
        # The other group has none.
        code, _, errors = self.run_it("office hours.limit=100")
        self.assertEqual(code, 2)
        self.assertIn('dsgrp001: there is no throttle "office hours"', errors)

    def test_one_group_refuses(self) -> None:
        self.host(groups=2)
        self.daemon("dsgrp000.driver", DegradedError("not now"))
        other = self.daemon("dsgrp001.driver")
        code, output, errors = self.run_it("operation=async")
        self.assertEqual((code, errors), (3, "not now\n"))
        self.assertEqual(output, "dsgrp001: operation = async\n")
        self.assertEqual(len(other.calls), 1)

    def test_at_the_secondary(self) -> None:
        self.host("beta")
        rmd = self.daemon("dsgrp000.rmd")
        self.assertEqual(self.run_it("metadata_entries=5")[0], 0)
        self.assertEqual(len(rmd.calls), 1)
        for word in ("operation=sync", "throttle_interval=5", "x.value=5"):
            code, _, errors = self.run_it(word)
            self.assertEqual(code, 10)
            self.assertIn("is a setting of the primary; run this on alpha", errors)
        stats = self.daemon("dsgrp000.stats")
        self.assertEqual(self.run_it("perf_interval=5")[0], 0)
        self.assertEqual(stats.calls, [("Set", {"settings": json.dumps({"perf_interval": "5"})})])

    def test_usage(self) -> None:
        self.host()
        for words, told in (
            (("operaton=sync",), 'did you mean "operation"?'),
            (("operation",), "to what?; qdsset operation=VALUE"),
            (("office hours.limit",), "to what?; qdsset 'office hours.limit=VALUE'"),
        ):
            code, _, errors = self.run_it(*words)
            self.assertEqual(code, 2)
            self.assertIn(told, errors)

    def test_no_daemon(self) -> None:
        self.host()
        self.assertEqual(self.run_it("operation=sync")[0], 11)


class ShownTests(SynchronousTestCase):
    def remarks(self, **changes: Any) -> str:
        group = driver_status(pmd={"pid": 1, "state": "connected"}, **changes)
        return "\n".join(info_view.remarks(group))

    def told(self, kept: bool = True, waiting: int = 0) -> dict[str, Any]:
        return {"kept": kept, "since": None, "waiting": waiting,
                "on_disconnect": "block", "near_sync_entries": None}  # fmt: skip

    def test_how_synchronous_operation_is_doing(self) -> None:
        self.assertEqual(self.remarks(operation="sync", synchronous=self.told()), "")
        away = {"pid": None, "state": "connecting"}
        text = self.remarks(operation="sync", synchronous=self.told(waiting=3), rmd=away)
        self.assertIn("answers that wait for the secondary: 3", text)
        self.assertIn("not yet sync", self.remarks(operation="sync", synchronous=self.told(False)))
        degraded = {"since": 1790000000.0, "reason": "so"}
        text = self.remarks(operation="sync", synchronous=self.told(False), degraded=degraded)
        self.assertRegex(text, r"DEGRADED since 2026-.*: so")
        text = self.remarks(settings={"operation": "sync", "auto_refresh": True})
        self.assertIn("set until the next start: operation = sync, auto_refresh = yes", text)
