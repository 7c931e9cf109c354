"""How far a command is: lines where there is no terminal, bars where there is one."""

from __future__ import annotations

import contextlib
import io
import threading
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.tools import progress
from tests.tools.sites import driver_status
from tests.tools.terminal import on_terminal, screen

MIB = 1 << 20


def refresh(done: int, remaining: int, **more: Any) -> dict[str, Any]:
    told = {"kind": "full", "id": "ab", "done_bytes": done, "remaining_bytes": remaining}
    return {**told, "rate": None, "eta_seconds": None, "started": 0.0, **more}


class LinesTests(TestCase):
    def setUp(self) -> None:
        self.now = 100.0
        self.written: list[str] = []

    def lines(self, at_once: bool = False) -> progress.Tell:
        return progress.lines(lambda: self.now, self.written.append, at_once=at_once)

    def test_one_each_ten_seconds(self) -> None:
        """What is soon over needs none."""
        tell = self.lines()
        for second in range(31):
            self.now = 100.0 + second
            tell("dsgrp000", f"{second}", None, None)
        self.assertEqual(self.written, [f"dsgrp000: {second}" for second in (10, 20, 30)])

    def test_at_once(self) -> None:
        tell = self.lines(at_once=True)
        for second in range(20):
            self.now = 100.0 + second
            tell("dsgrp000", f"{second}", None, None)
        self.assertEqual(self.written, ["dsgrp000: 0", "dsgrp000: 10"])

    def test_each_name_for_itself(self) -> None:
        tell = self.lines(at_once=True)
        for name in ("a", "b", "a", "b"):
            tell(name, "x", None, None)
        self.assertEqual(self.written, ["a: x", "b: x"])

    def test_on_standard_error_and_not_with_json(self) -> None:
        self.patch(progress, "LINE_SECONDS", 0.0)
        for quiet, expected in ((False, "a: x\n"), (True, "")):
            output, errors = io.StringIO(), io.StringIO()
            with (
                contextlib.redirect_stdout(output),
                contextlib.redirect_stderr(errors),
                progress.telling(quiet) as tell,
            ):
                tell("a", "x", None, None)
            self.assertEqual((output.getvalue(), errors.getvalue()), ("", expected))


class WorkTests(TestCase):
    """Work that blocks, seen from a thread of its own."""

    def setUp(self) -> None:
        self.patch(progress, "LOOK_SECONDS", 0.001)
        self.told: list[tuple[str, str, int | None, int | None]] = []
        self.some = threading.Event()

    def tell(self, name: str, text: str, done: int | None = None, total: int | None = None) -> None:
        self.told.append((name, text, done, total))
        if len(self.told) > 2:
            self.some.set()

    def test_looks_while_it_goes_on(self) -> None:
        with progress.working(self.tell, "dsgrp000", "scanning"):
            self.assertTrue(self.some.wait(60))
        count = len(self.told)
        name, text, done, total = self.told[-1]
        self.assertEqual((name, done, total), ("dsgrp000", None, None))
        self.assertRegex(text, r"^scanning, [0-9.]+ \w+ read, [0-9.]+ \w+ written, [0-9.]+ s$")
        self.assertEqual(len(self.told), count, "it goes on after the end")

    def test_what_is_read_and_written_counts(self) -> None:
        path = self.mktemp()
        with progress.working(self.tell, "x", "writing") as work:
            with open(path, "wb", buffering=0) as file:
                file.write(bytes(3 * MIB))
            work.look()
            self.assertIn("3 MiB written", self.told[-1][1])
            work.expect("writing back", 4 * MIB)
            with open(path, "wb", buffering=0) as file:
                file.write(bytes(MIB))
            work.look()
        told = [one for one in self.told if one[2] is not None]
        self.assertEqual(told[-1][3], 4 * MIB)
        self.assertTrue(MIB <= (told[-1][2] or 0) < 2 * MIB)
        self.assertRegex(told[-1][1], r"^writing back, [0-9.]+ MiB of 4 MiB, ")

    def test_looking_does_not_count(self) -> None:
        work = progress.Work(self.tell, "x", "nothing", moves=True)
        for _ in range(5):
            work.look()
        self.assertTrue(self.told[-1][1].startswith("nothing, 0 B read, 0 B written, "), self.told)

    def test_ends_with_an_error_too(self) -> None:
        before = threading.active_count()
        with self.assertRaises(ValueError), progress.working(self.tell, "x", "y"):
            raise ValueError
        self.assertEqual(threading.active_count(), before)

    def test_waiting(self) -> None:
        self.patch(progress, "LINE_SECONDS", 0.0)
        errors = io.StringIO()
        with (
            contextlib.redirect_stderr(errors),
            progress.waiting(False, "qdsdriver", "waiting for its end"),
        ):
            while "\n" not in errors.getvalue():
                pass
        self.assertRegex(errors.getvalue(), r"^qdsdriver: waiting for its end, [0-9.]+ s\n")


class BarTests(TestCase):
    """On a terminal; what remains there is looked at."""

    def test_groups(self) -> None:
        def work() -> None:
            with progress.of_groups(False) as show:
                for done in (0, 25, 50):
                    told = refresh(done * MIB, (100 - done) * MIB, rate=5.0 * MIB, eta_seconds=10)
                    show(driver_status(refresh=told))
                show(driver_status(1, refresh=refresh(MIB, MIB)))
                show(driver_status(1, refresh=None))

        for columns in (80, 120):
            lines = [line for line in screen(on_terminal(work, columns)) if line]
            self.assertEqual(len(lines), 2, lines)
            self.assertTrue(lines[0].startswith("dsgrp000 "), lines)
            self.assertIn("\u2501", lines[0])
            self.assertIn("full refresh 50 %, 50 MiB remain, 5 MiB/s, 10 s to go", lines[0])
            self.assertTrue(lines[1].endswith(" done"), lines)
            self.assertLessEqual(max(map(len, lines)), columns)

    def test_gone_when_it_is_over(self) -> None:
        def work() -> None:
            with progress.telling(False) as tell:
                tell("dsgrp000", "scanning " + 200 * "x", None, None)
            print("result")

        output = on_terminal(work, 80)
        self.assertIn("scanning", output)
        self.assertEqual([line for line in screen(output) if line], ["result"])
