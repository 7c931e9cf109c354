"""Asking the daemons: all at once, once for all who want to know, whatever hangs."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror import pki
from qdsmirror.console import looking as looking_module
from qdsmirror.errors import ConfigError
from tests.console.world import SILENT, Host, driver, pmd
from tests.tools.sites import GROUP, host_root


class LookingTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.paths = host_root(self)  # type: ignore[arg-type]
        self.host = Host(self, self.paths)

    def test_what_is_seen(self) -> None:
        look = self.host.look()
        self.assertEqual([group["name"] for group in look.groups], ["dsgrp000"])
        self.assertEqual(look.groups[0]["state"], "connected")
        self.assertEqual(look.answers["dsgrp000.pmd"], pmd())
        self.assertEqual(look.expiries, {})
        self.assertEqual(
            set(self.host.asked),
            {"qdsdriver", "qdspmd", "qdsrmd"}
            | {f"dsgrp000.{one}" for one in ("driver", "pmd", "stats")},
        )

    def test_many_who_look_ask_once(self) -> None:
        self.host.answers["qdsrmd"] = SILENT
        waiting = [self.host.looking.look() for _ in range(5)]
        self.assertNoResult(waiting[0])
        self.host.reactor.advance(2.0)
        looks = [self.successResultOf(one) for one in waiting]
        self.assertTrue(all(look is looks[0] for look in looks))
        self.assertEqual(self.host.asked.count("dsgrp000.driver"), 1)
        self.assertIs(self.host.look(), looks[0], "a moment ago")
        self.host.reactor.advance(1.0)
        del self.host.answers["qdsrmd"]
        self.assertIsNot(self.host.look(), looks[0])

    def test_one_who_does_not_answer_costs_its_time_out_only(self) -> None:
        self.host.answers["dsgrp000.driver"] = self.host.answers["qdsdriver"] = SILENT
        waiting = self.host.looking.look()
        self.host.reactor.advance(1.9)
        self.assertNoResult(waiting)
        self.host.reactor.advance(0.1)
        look = self.successResultOf(waiting)
        self.assertEqual(look.groups[0]["state"], "setup")
        self.assertIn("dsgrp000.pmd", look.answers)
        self.assertAlmostEqual(look.seconds, 2.0)

    def test_many_who_do_not_answer(self) -> None:
        """However many hang, it is said soon enough for whoever scrapes."""
        self.patch(looking_module, "CONSOLE_ASKS_MAX", 2)
        for number in range(1, 30):
            self.paths.group_config(number).write_text(GROUP.format(number=number))
            self.host.answers[f"dsgrp{number:03d}.driver"] = SILENT
        waiting = self.host.looking.look()
        for _ in range(4):
            self.assertNoResult(waiting)
            self.host.reactor.advance(1.0)
        look = self.successResultOf(waiting)
        self.assertEqual(len(look.groups), 30)

    def test_new_and_changed_files_are_seen(self) -> None:
        self.host.look()
        self.paths.group_config(1).write_text(GROUP.format(number=1))
        self.host.answers["dsgrp001.driver"] = driver(1)
        self.host.reactor.advance(1.0)
        self.assertEqual(len(self.host.look().groups), 2)
        self.paths.group_config(0).write_text("junk")
        self.host.reactor.advance(1.0)
        look = self.host.look()
        self.assertEqual([group["name"] for group in look.groups], ["dsgrp001"])
        self.assertEqual(look.configuration.problems, 1)

    def test_files_are_read_only_when_they_have_changed(self) -> None:
        read: list[Any] = []
        load = looking_module.load_host

        def note(paths: Any) -> Any:
            read.append(paths)
            return load(paths)

        self.patch(looking_module, "load_host", note)
        for _ in range(3):
            self.host.look()
            self.host.reactor.advance(1.0)
        self.assertEqual(len(read), 1)

    def test_a_broken_host_file_is_told_and_mended(self) -> None:
        good = self.paths.host_config.read_text()
        self.paths.host_config.write_text("nmae = alpha\n")
        waiting: list[Deferred[Any]] = [self.host.looking.look() for _ in range(2)]
        for one in waiting:
            self.failureResultOf(one, ConfigError)
        self.paths.host_config.write_text(good)
        self.assertEqual(len(self.host.look().groups), 1)

    def test_certificates(self) -> None:
        pki.make_hosts(self.paths.etc / "made", ["alpha", "beta"], [])
        for name in ("host.pem", "ca.pem"):
            (self.paths.etc / "made" / "alpha" / name).rename(self.paths.etc / name)
        look = self.host.look()
        host, authority = (
            pki.read_certificate(self.paths.etc / name).not_valid_after_utc.timestamp()
            for name in ("host.pem", "ca.pem")
        )
        self.assertEqual(look.expiries, {"host": host, "ca": authority})
        self.assertLess(host, authority)
