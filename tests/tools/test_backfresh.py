"""qdsbackfresh, launchbackfresh, killbackfresh beside fake daemons; --replay over real files."""

from __future__ import annotations

import json
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.core.backfresh import NEEDED, RUNNING, BackfreshState
from qdsmirror.errors import (
    EXIT_BROKEN,
    EXIT_CONFIG,
    EXIT_DEGRADED,
    EXIT_USAGE,
    BrokenError,
    DegradedError,
)
from qdsmirror.storage.keep import KeepWriter, Kept
from qdsmirror.tools import backfresh, following
from tests.tools.offline import DATA, Site
from tests.tools.sites import FakeDaemon, captured, driver_status, host_root, pmd_status

ID = "ab" * 16


def progress(state: str, done: int = 0, remaining: int = 100, **more: Any) -> dict[str, Any]:
    return {
        "state": state,
        "id": ID,
        "dry_run": state in ("counting", "counted"),
        "done_bytes": done,
        "remaining_bytes": remaining,
        "changed_bytes": done // 2,
        "rate": None,
        "eta_seconds": None,
        "started": 1790000000.0,
        "keep": "",
        "waits": "",
    } | more


class CommandTests(TestCase):
    def driver(self, answers: dict[str, Any]) -> FakeDaemon:
        self.patch(following, "POLL_SECONDS", 0.001)
        paths = host_root(self)
        self.root = str(paths.root)
        FakeDaemon(self, paths.control_socket("dsgrp000.pmd"), {"Status": pmd_status()})
        return FakeDaemon(self, paths.control_socket("dsgrp000.driver"), answers)

    def following(self, *steps: dict[str, Any] | None) -> FakeDaemon:
        left = list(steps)

        def status(_words: dict[str, str]) -> dict[str, Any]:
            return driver_status(backfresh=left.pop(0) if len(left) > 1 else left[0])

        return self.driver({"Backfresh": progress("fetching"), "Status": status})

    def run_it(self, *words: str, main: Any = backfresh.main) -> tuple[int, str, str]:
        return captured(self, main, "--root", self.root, *words)

    def test_foreground(self) -> None:
        driver = self.following(
            progress("fetching"), progress("fetching", 60, 40), progress("ended", 100, 0)
        )
        code, output, errors = self.run_it("--yes", "--discard", "--force")
        self.assertEqual((code, errors), (0, ""))
        self.assertEqual(driver.calls[0], ("Backfresh", {"options": "discard force", "keep": ""}))
        self.assertEqual(output.splitlines()[0], "dsgrp000: backfresh 0 %, 100 B remain")
        self.assertEqual(
            output.splitlines()[-1], "dsgrp000: backfreshed, 50 B fetched; its LDSUs are open"
        )

    def test_a_driver_that_was_restarted_behind_the_end(self) -> None:
        self.following(progress("fetching"), None)
        code, output, _ = self.run_it("--yes")
        self.assertEqual(code, 0)
        self.assertIn("its LDSUs are open", output)

    def test_killed(self) -> None:
        self.following(progress("fetching"), {"state": "needed", "id": ID, "reason": "x"})
        code, _, errors = self.run_it("--yes")
        self.assertEqual(code, EXIT_DEGRADED)
        self.assertIn("ended before its end", errors)
        self.assertIn("qdsbackfresh -g 0 --yes", errors)

    def test_dry_run(self) -> None:
        driver = self.following(progress("counting"), progress("counted", 100, 0))
        code, output, _ = self.run_it("--dry-run", "--json")
        self.assertEqual(code, 0)
        (found,) = json.loads(output)["groups"]
        self.assertEqual((found["changed_bytes"], found["remaining_bytes"]), (50, 0))
        self.assertEqual(driver.calls[0], ("Backfresh", {"options": "dry-run", "keep": ""}))

    def test_a_dry_run_that_a_restart_has_forgotten(self) -> None:
        self.following(progress("counting"), None)
        code, _, errors = self.run_it("--dry-run")
        self.assertEqual(code, EXIT_DEGRADED)
        self.assertIn("interrupted", errors)

    def test_nothing_without_consent(self) -> None:
        driver = self.following(None)
        for main in (backfresh.main, backfresh.launch_main):
            code, _, errors = self.run_it(main=main)
            self.assertEqual(code, EXIT_USAGE)
            self.assertIn("--yes", errors)
        code, _, errors = self.run_it("--online", main=backfresh.kill_main)
        self.assertEqual(code, EXIT_USAGE)
        self.assertEqual(driver.calls, [])

    def test_what_does_not_go_together(self) -> None:
        self.following(None)
        for words in (("--dry-run", "--keep", "x"), ("--replay", "x", "--discard", "--yes")):
            self.assertEqual(self.run_it(*words)[0], EXIT_USAGE, words)

    def test_launch(self) -> None:
        driver = self.following(None)
        code, output, _ = self.run_it("--yes", "--keep", "/tmp/x", main=backfresh.launch_main)
        self.assertEqual(code, 0)
        self.assertIn("has begun", output)
        self.assertEqual(driver.calls[0], ("Backfresh", {"options": "", "keep": "/tmp/x"}))

    def test_refused(self) -> None:
        for error, code in (
            (DegradedError("not drained", "wait"), EXIT_DEGRADED),
            (BrokenError("its mirror is not coherent"), EXIT_BROKEN),
        ):
            self.driver({"Backfresh": error, "Status": driver_status()})
            self.assertEqual(self.run_it("--yes")[0], code)

    def test_kill(self) -> None:
        driver = self.driver({"KillBackfresh": {"state": "needed"}})
        code, output, _ = self.run_it(main=backfresh.kill_main)
        self.assertEqual(code, 0)
        self.assertIn("stay closed", output)
        self.assertEqual(driver.calls[0], ("KillBackfresh", {"options": ""}))
        driver = self.driver({"KillBackfresh": {}})
        code, output, _ = self.run_it("--online", "--yes", main=backfresh.kill_main)
        self.assertIn("are open", output)
        self.assertEqual(driver.calls[0], ("KillBackfresh", {"options": "online"}))


class ReplayTests(TestCase):
    """Writing back what was kept, with no driver running."""

    ABOUT = {"group": 0, "id": ID, "ldsus": [[0, "qds0", DATA], [1, "qds1", DATA]]}

    def setUp(self) -> None:
        self.site = Site(self)
        self.site.initialise()
        self.path = str(self.site.directory / "kept")

    def keep(self, *blocks: Kept, about: dict[str, Any] | None = None) -> None:
        writer = KeepWriter(self.path, about or self.ABOUT)
        writer.create()
        writer.append(blocks)
        writer.close()

    def left_by(self, phase: str, number: str = ID) -> None:
        state = BackfreshState(bytes.fromhex(number), phase, 1.0, keep=self.path)
        for index in range(2):
            with self.site.log(f"log{index}") as log:
                log.update(both=True, coherent=True, backfresh=state.to_json())

    def run_it(self, *words: str, consent: str = "--yes") -> tuple[int, str, str]:
        root = str(self.site.directory)
        return captured(
            self, backfresh.main, "--root", root, "--replay", self.path, consent, *words
        )

    def superblocks(self) -> list[Any]:
        return [self.site.superblock(f"log{index}") for index in range(2)]

    def test_the_first_that_was_kept_counts(self) -> None:
        self.left_by(RUNNING)
        self.keep(
            Kept(0, 4096, b"a" * 512), Kept(1, 0, b"b" * 1024), Kept(0, 4096, b"c" * 1024)
        )  # fmt: skip
        code, output, errors = self.run_it()
        self.assertEqual((code, errors), (0, ""))
        self.assertIn("3 records", output)
        data = self.site.device("data0").read_bytes()
        self.assertEqual(data[4096 : 4096 + 1024], b"a" * 512 + b"c" * 512)
        self.assertEqual(self.site.device("data1").read_bytes()[:1024], b"b" * 1024)
        for one in self.superblocks():
            self.assertIsNone(one.backfresh)
            self.assertFalse(one.coherent)
            self.assertIn("got back", one.reason)

    def test_dry_run(self) -> None:
        """It checks what a run would, and changes nothing."""
        self.left_by(RUNNING)
        self.keep(Kept(0, 4096, b"a" * 512))
        before = self.site.content()
        code, output, _ = self.run_it(consent="--dry-run")
        self.assertEqual((code, output), (0, "dsgrp000: 1 records, 512 B would be written back\n"))
        self.assertEqual(self.site.content(), before)
        self.left_by(NEEDED, "cd" * 16)
        self.assertEqual(self.run_it(consent="--dry-run")[0], EXIT_CONFIG)

    def test_marked_before_the_first_block(self) -> None:
        from qdsmirror.storage.filedevice import FileDevice

        self.left_by(RUNNING)
        self.keep(Kept(1, 0, b"b" * 512))
        seen: list[Any] = []

        def fail(*_: Any) -> None:
            seen.extend((one.coherent, one.backfresh["phase"]) for one in self.superblocks())
            raise OSError(5, "I/O error")

        real = FileDevice.pwritev

        def pwritev(device: Any, buffers: Any, offset: int) -> None:
            if device.path.endswith("data1"):
                fail()
            real(device, buffers, offset)

        self.patch(FileDevice, "pwritev", pwritev)
        self.assertNotEqual(self.run_it()[0], 0)
        self.assertEqual(seen, [(False, NEEDED)] * 2)

    def audited(self) -> list[dict[str, Any]]:
        """Give what the audit log has behind the initialising of the site."""
        lines = self.site.paths.audit_log.read_text().splitlines()
        return [json.loads(line) for line in lines[1:]]

    def test_who_wrote_back_what(self) -> None:
        self.keep(Kept(0, 0, b"a" * 512))
        self.assertEqual(self.run_it(consent="--dry-run")[0], 0)
        self.assertEqual(self.audited(), [])
        self.assertEqual(self.run_it()[0], 0)
        self.left_by(NEEDED, "cd" * 16)
        self.assertEqual(self.run_it()[0], EXIT_CONFIG)
        done, refused = self.audited()
        self.assertEqual((done["event"], done["command"]), ("done", "qdsbackfresh"))
        self.assertEqual(done["arguments"]["replay"], self.path)
        self.assertEqual((refused["event"], refused["code"]), ("refused", EXIT_CONFIG))
        self.assertIn("another backfresh", refused["message"])

    def test_anothers_file(self) -> None:
        self.left_by(NEEDED, "cd" * 16)
        self.keep(Kept(0, 0, b"a" * 512))
        code, _, errors = self.run_it()
        self.assertEqual(code, EXIT_CONFIG)
        self.assertIn("another backfresh", errors)
        self.assertEqual(self.site.device("data0").read_bytes()[:512], bytes(512))

    def test_another_groups_file(self) -> None:
        self.keep(Kept(0, 0, b"a" * 512), about=self.ABOUT | {"ldsus": [[0, "other", DATA]]})
        self.assertEqual(self.run_it()[0], EXIT_CONFIG)

    def test_after_the_end_it_is_a_change_like_another(self) -> None:
        self.keep(Kept(0, 0, b"a" * 512))
        self.assertEqual(self.run_it("--json")[0], 0)
        self.assertEqual(self.site.device("data0").read_bytes()[:512], b"a" * 512)
        self.assertFalse(self.superblocks()[0].coherent)
