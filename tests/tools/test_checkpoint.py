"""qdscheckpoint beside fake daemons: what it asks of whom, and what it says."""

from __future__ import annotations

import json
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.errors import EXIT_CONFIG, EXIT_DEGRADED, EXIT_USAGE, DegradedError
from qdsmirror.tools import checkpoint, info, info_view
from tests.tools.sites import FakeDaemon, captured, driver_status, host_root

URI = "nbd+unix:///qds0?socket=/run/x"
HELD = {"name": "nightly", "gsn": 812, "since": 1790000000.0, "hold": "strict", "mark": False,
        "clients": 0, "nbd_uris": {"qds0": URI}}  # fmt: skip


class CommandTests(TestCase):
    def daemon(self, host: str, name: str, answers: dict[str, Any]) -> FakeDaemon:
        paths = host_root(self, host)
        self.root = str(paths.root)
        return FakeDaemon(self, paths.control_socket(f"dsgrp000.{name}"), answers)

    def run_it(self, *words: str) -> tuple[int, str, str]:
        return captured(self, checkpoint.main, *words, "--root", self.root)

    def test_on(self) -> None:
        rmd = self.daemon("beta", "rmd", {"Checkpoint": {"checkpoint": HELD}})
        code, output, errors = self.run_it("on", "--name", "nightly", "--hold", "strict")
        self.assertEqual((code, errors), (0, ""))
        self.assertIn("checkpoint nightly holds at GSN 812 since", output)
        self.assertIn(f"dsgrp000: qds0: {URI}", output)
        words = {"to": "on", "name": "nightly", "hold": "strict"}
        self.assertEqual(rmd.calls, [("Checkpoint", words)])
        code, output, _ = self.run_it("list", "qds0", "--json")
        self.assertEqual(json.loads(output)["groups"][0]["checkpoint"], HELD)
        self.assertEqual(rmd.calls[1], ("Checkpoint", {"to": "list", "name": "", "hold": ""}))

    def test_off(self) -> None:
        rmd = self.daemon("beta", "rmd", {"Checkpoint": {"checkpoint": HELD}})
        code, output, _ = self.run_it("off", "--force")
        self.assertEqual(code, 0)
        self.assertIn("nightly (GSN 812) is released", output)
        self.assertEqual(rmd.calls[0][1]["hold"], "force")

    def test_none(self) -> None:
        self.daemon("beta", "rmd", {"Checkpoint": {"checkpoint": None}})
        self.assertEqual(self.run_it("list"), (0, "dsgrp000: no checkpoint\n", ""))

    def test_refused(self) -> None:
        refusal = DegradedError("a refresh is in progress", "qdsinfo --wait coherent")
        self.daemon("beta", "rmd", {"Checkpoint": refusal})
        code, _, errors = self.run_it("on")
        self.assertEqual(code, EXIT_DEGRADED)
        self.assertEqual(errors, "a refresh is in progress; qdsinfo --wait coherent\n")

    def test_mark(self) -> None:
        driver = self.daemon("alpha", "driver", {"Mark": {"mark": "nightly", "gsn": 813}})
        code, output, _ = self.run_it("--mark", "nightly", "qds0", "--json")
        self.assertEqual(code, 0)
        self.assertEqual(json.loads(output)["groups"][0]["gsn"], 813)
        self.assertEqual(driver.calls, [("Mark", {"name": "nightly"})])

    def test_on_the_wrong_side(self) -> None:
        self.daemon("alpha", "driver", {})
        self.assertEqual(self.run_it("on")[0], EXIT_CONFIG)
        self.daemon("beta", "rmd", {})
        code, _, errors = self.run_it("--mark", "x")
        self.assertEqual(code, EXIT_CONFIG)
        self.assertIn("run this on alpha", errors)

    def test_what_does_not_go_together(self) -> None:
        self.daemon("beta", "rmd", {"Checkpoint": {"checkpoint": None}})
        for words in (
            (), ("up",), ("qds0",), ("on", "--force"), ("off", "--name", "x"), ("list", "--hold",
            "strict"), ("on", "--name", "a b"), ("--mark", "x", "--force"), ("--mark", "-"),
        ):  # fmt: skip
            self.assertEqual(self.run_it(*words)[0], EXIT_USAGE, words)


class InfoTests(TestCase):
    def test_drained_cannot_be_reached_and_that_is_told_at_once(self) -> None:
        gsn = {**driver_status()["gsn"], "mirrored": 800}
        group = driver_status(gsn=gsn, checkpoint=HELD, mode_details=[])
        told: list[str] = []
        now = [0.0]

        def sleep(seconds: float) -> None:
            now[0] += seconds

        with self.assertRaisesRegex(DegradedError, "nightly holds at the secondary.*off -g 0"):
            info.wait(lambda: ("alpha", [group]), "drained", 1.0, lambda: now[0], sleep,
                      told.append)  # fmt: skip
        self.assertEqual(len(told), 1)
        self.assertIn("qdscheckpoint off", told[0])

    def test_shown_on_both_sides(self) -> None:
        group = driver_status(checkpoint={k: v for k, v in HELD.items() if k != "nbd_uris"})
        self.assertIn(
            "dsgrp000: checkpoint nightly holds at the secondary at GSN 812",
            info_view.remarks(group),
        )
        group = driver_status(role="secondary", checkpoint=HELD)
        self.assertIn(
            f"dsgrp000: checkpoint nightly holds at GSN 812; read it at {URI}",
            info_view.remarks(group),
        )


class BeforeImagesTests(TestCase):
    def line(self, **told: Any) -> list[str]:
        kept = {"state": "keeping", "size": 1 << 30, "used_bytes": 1 << 20, "needed_bytes": 1 << 24,
                "full": "give-up", "rollback_gsn": 811, "reason": "", **told}  # fmt: skip
        group = driver_status(role="secondary", before_images=kept)
        return [line for line in info_view.remarks(group) if "roll" in line]

    def test_whether_and_how_far_a_refresh_can_be_rolled_back(self) -> None:
        self.assertEqual(
            self.line(),
            [
                "dsgrp000: can be rolled back to GSN 811: 1 MiB of 1 GiB for before-images used, "
                "about 16 MiB will be needed"
            ],
        )
        self.assertNotIn("about", self.line(needed_bytes=None)[0])
        self.assertEqual(
            self.line(state="given-up", reason="used up"),
            ["dsgrp000: the refresh cannot be rolled back any more: used up"],
        )
        self.assertEqual(self.line(state="ready"), [])
