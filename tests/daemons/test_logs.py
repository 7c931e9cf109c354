"""Tests of qdsmirror.daemons.logs."""

from __future__ import annotations

import io
import os
import sys

from twisted.logger import Logger, LogPublisher
from twisted.python import log as legacy
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from qdsmirror.daemons import logfields, logs


class LogTests(TestCase):
    def setUp(self) -> None:
        self.output = io.StringIO()
        self.publisher = LogPublisher(logs.observer("rmd", self.output))

    def lines(self) -> list[str]:
        return self.output.getvalue().splitlines()

    def test_a_line_is_time_process_and_text(self) -> None:
        Logger("qdsmirror.groups", observer=self.publisher).info("{g}: connected", g="dsgrp000")
        (line,) = self.lines()
        time, rest = line.split(" ", 1)
        self.assertEqual(len(time), len("2026-11-23T00:46:29+0000"))
        self.assertEqual(rest, f"rmd[{os.getpid()}]: dsgrp000: connected")

    def test_what_is_wrong_says_so(self) -> None:
        Logger("qdsmirror.groups", observer=self.publisher).warn("dsgrp000: slow")
        self.assertIn("]: warn: dsgrp000: slow", self.output.getvalue())

    def test_reports_of_twisteds_own_are_left_out(self) -> None:
        Logger("twisted.internet.base", observer=self.publisher).info("Main loop terminated.")
        observer = logs.observer("rmd", self.output)
        legacy.addObserver(observer)
        self.addCleanup(legacy.removeObserver, observer)
        legacy.msg("_ControlFactory starting on '/run/qdsmirror/qdsrmd.ctl'")
        self.assertEqual(self.lines(), [])

    def test_twisteds_failures_are_shown_and_indented(self) -> None:
        try:
            raise ZeroDivisionError("oops")
        except ZeroDivisionError:
            Logger("twisted.internet.base", observer=self.publisher).failure("a bug", Failure())
        first, *others = self.lines()
        self.assertIn("critical: a bug", first)
        self.assertIn("ZeroDivisionError: oops", others[-1])
        self.assertTrue(all(one.startswith("\t") for one in others))

    def test_twistd_knows_what_it_runs(self) -> None:
        self.patch(sys, "argv", ["twistd", "-n", "qdsrmd", "--root", "/x"])
        self.patch(sys, "stderr", self.output)
        Logger("qdsmirror", observer=LogPublisher(logs.twistd())).info("hello")
        self.assertIn(" qdsrmd[", self.lines()[0])

    def test_where_the_group_is_stands_behind_the_text(self) -> None:
        logfields.follow("dsgrp004", lambda: 812)
        self.addCleanup(logfields.forget, "dsgrp004")
        log = Logger("qdsmirror.groups", observer=self.publisher)
        log.error("{group}: {text}", group="dsgrp004", text="one\ntwo")
        log.info("{group}: void from {gsn}", group="dsgrp004", gsn=5)
        log.info("{group}: connected", group="dsgrp005")
        first, second, third, fourth = self.lines()
        self.assertTrue(first.endswith("error: dsgrp004: one (GSN 812)"), first)
        self.assertEqual(second, "\ttwo")
        self.assertTrue(third.endswith("dsgrp004: void from 5"), third)
        self.assertTrue(fourth.endswith("dsgrp005: connected"), fourth)
