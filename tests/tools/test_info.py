"""qdsinfo: what it merges, prints, decides and waits for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
from twisted.trial.unittest import TestCase

from qdsmirror.config import load_groups
from qdsmirror.errors import (
    EXIT_BROKEN,
    EXIT_CONFIG,
    EXIT_IDENTITY,
    BrokenError,
    ConfigError,
    DegradedError,
    IdentityError,
    UnreachableError,
)
from qdsmirror.paths import Paths
from qdsmirror.tools import info, info_table, info_view, status
from tests.tools.sites import FakeDaemon, captured, driver_status, host_root, pmd_status

SCHEMA = json.loads(info.schema_text())
REFRESH = {
    "kind": "full",
    "id": "ab",
    "done_bytes": 3 << 20,
    "remaining_bytes": 1 << 20,
    "rate": 1048576.0,
    "eta_seconds": 1.0,
    "started": 1790000000.0,
}
RMD = {
    "group": 0,
    "name": "dsgrp000",
    "role": "secondary",
    "state": "connected",
    "modes": ["connected"],
    "mode_details": [{"mode": "connected", "since": 1790000000.0, "reason": "linked"}],
    "since": 1790000000.0,
    "reason": "",
    "coherent": True,
    "generation": "00" * 16,
    "peer": "alpha",
    "gsn": {"committed": 5, "mirrored": 4},
    "lag": {"entries": None, "bytes": None, "seconds": None},
    "refresh": None,
    "bypass": None,
    "backfresh": None,
    "verify": None,
    "driver": {"pid": None},
    "pmd": {"pid": None, "state": "connected"},
    "rmd": {"pid": 13, "state": "connected"},
    "ldsus": [{"name": "qds0", "size": 268435456, "coherent": True, "errors": []}],
    "journal": {
        "devices": ["/dev/vg0/j0"],
        "size": 1 << 27,
        "used_bytes": 0,
        "used_ratio": 0.0,
        "seconds_to_full": None,
        "entries": 0,
    },
}


class Answers:
    """Stands in for ask_status: what each control socket says; others are unreachable."""

    def __init__(self, **told: Any) -> None:
        self.told = {name.replace("_", "."): value for name, value in told.items()}
        self.asked: list[str] = []

    def __call__(self, path: Path) -> dict[str, Any]:
        self.asked.append(path.stem)
        if path.stem not in self.told:
            raise UnreachableError(f"nobody at {path}")
        answer: dict[str, Any] = self.told[path.stem]
        return answer


class MergeTests(TestCase):
    """Group objects out of what the daemons say."""

    def groups(self, paths: Paths, answers: Answers, name: str = "alpha") -> list[status.Group]:
        found = status.collect_groups(paths, name, load_groups(paths), answers)
        jsonschema.validate({"schema": 1, **info.report(name, found)}, SCHEMA)
        return found

    def test_all_up(self) -> None:
        paths = host_root(self)
        answers = Answers(dsgrp000_driver=driver_status(), dsgrp000_pmd=pmd_status())
        (group,) = self.groups(paths, answers)
        self.assertEqual(group["state"], "connected")
        self.assertEqual((group["driver"]["pid"], group["pmd"]["pid"]), (11, 12))
        unit = group["ldsus"][0]
        self.assertEqual(unit["nbd_uri"], f"nbd+unix:///qds0?socket={paths.run}/dsgrp000.nbd")
        self.assertEqual((unit["size"], unit["data_device"]), (268435456, "/dev/vg0/data0"))
        self.assertIs(unit["device"], None)
        asked = ["dsgrp000.driver", "dsgrp000.pmd", "dsgrp000.stats"]
        self.assertEqual(answers.asked, asked)

    def test_what_was_set_at_each_daemon(self) -> None:
        paths = host_root(self)
        driver = {**driver_status(), "settings": {"operation": "sync"}}
        pmd = {**pmd_status(), "settings": {"send_window": 1 << 21}}
        stats = {"settings": {"office hours.limit": 100}}
        answers = Answers(dsgrp000_driver=driver, dsgrp000_pmd=pmd, dsgrp000_stats=stats)
        (group,) = self.groups(paths, answers)
        wanted = {"operation": "sync", "send_window": 1 << 21, "office hours.limit": 100}
        self.assertEqual(group["settings"], wanted)
        said = "operation = sync, send_window = 2097152, office hours.limit = 100"
        self.assertIn(f"dsgrp000: set until the next start: {said}", info_view.remarks(group))
        # Whether the driver answers or not.
        answers = Answers(dsgrp000_pmd=pmd, dsgrp000_stats=stats)
        (group,) = self.groups(paths, answers)
        self.assertEqual(group["settings"], {key: wanted[key] for key in list(wanted)[1:]})
        far = host_root(self, "beta")
        rmd = {**RMD, "settings": {"checkpoint_hold": "strict"}}
        answers = Answers(dsgrp000_rmd=rmd, dsgrp000_stats={"settings": {"perf_interval": 2.0}})
        (group,) = self.groups(far, answers, "beta")
        self.assertEqual(group["settings"], {"checkpoint_hold": "strict", "perf_interval": 2.0})

    def test_held_back_by_throttles(self) -> None:
        paths = host_root(self)
        answers = Answers(dsgrp000_driver=driver_status(), dsgrp000_pmd=pmd_status())
        self.assertIsNone(self.groups(paths, answers)[0]["throttled"])
        driver = {**driver_status(), "knobs": {"writesleep_us": 1500}}
        pmd = {**pmd_status(), "knobs": {"sleep_us": 30000, "limit_kbps": 250}}
        (group,) = self.groups(paths, Answers(dsgrp000_driver=driver, dsgrp000_pmd=pmd))
        wanted = {"sleep_us": 30000, "writesleep_us": 1500, "limit_kbps": 250}
        self.assertEqual(group["throttled"], wanted)
        said = (
            "30 ms before each entry is sent, 1.5 ms before a write is answered, 250 KB/s at most"
        )
        self.assertIn(f"dsgrp000: held back by throttles: {said}", info_view.remarks(group))
        idle = {**driver_status(), "knobs": {"writesleep_us": 0}}
        (group,) = self.groups(paths, Answers(dsgrp000_driver=idle))
        self.assertIsNone(group["throttled"])

    def test_attached_device(self) -> None:
        paths = host_root(self)
        (paths.dev / "qds0").symlink_to("/dev/null")
        (group,) = self.groups(paths, Answers())
        self.assertEqual(group["ldsus"][0]["device"], str(paths.dev / "qds0"))

    def test_nothing_runs(self) -> None:
        (group,) = self.groups(host_root(self), Answers())
        self.assertEqual((group["state"], group["reason"]), ("setup", "driver not running"))
        self.assertEqual(group["pmd"]["state"], "stopped")
        self.assertIs(group["coherent"], None)
        self.assertTrue(group["ldsus"][0]["nbd_uri"].startswith("nbd+unix:///qds0"))

    def test_driver_relaunched(self) -> None:
        answers = Answers(dsgrp000_pmd=pmd_status(state="connecting"), qdsdriver={"groups": []})
        (group,) = self.groups(host_root(self), answers)
        self.assertEqual(group["reason"], "driver is being relaunched")
        self.assertIs(group["driver"]["pid"], None)
        self.assertEqual((group["gsn"]["written"], group["gsn"]["committed"]), (None, 812))
        self.assertEqual(group["pmd"]["state"], "connecting")

    def test_driver_failed_for_good(self) -> None:
        entry = {"group": 0, "state": "failed", "reason": "disk is foreign", "code": EXIT_BROKEN}
        (group,) = self.groups(host_root(self), Answers(qdsdriver={"groups": [entry]}))
        self.assertEqual(group["reason"], "disk is foreign")
        self.assertEqual(status.failure_of(group), (EXIT_BROKEN, "disk is foreign"))

    def test_pmd_down(self) -> None:
        """The driver's memory of the pmd does not count when the pmd itself is gone."""
        (group,) = self.groups(host_root(self), Answers(dsgrp000_driver=driver_status()))
        self.assertEqual(
            (group["pmd"]["pid"], group["pmd"]["state"], group["pmd"]["reason"]),
            (None, "stopped", "pmd not running"),
        )
        self.assertEqual(group["rmd"]["state"], "stopped")

    def test_refused(self) -> None:
        refused = {"state": "refused", "reason": "wrong name", "code": EXIT_IDENTITY}
        answers = Answers(dsgrp000_driver=driver_status(), dsgrp000_pmd=pmd_status(**refused))
        (group,) = self.groups(host_root(self), answers)
        self.assertEqual(status.failure_of(group), (EXIT_IDENTITY, "wrong name"))

    def test_refresh(self) -> None:
        told = driver_status(refresh=REFRESH, modes=["refresh", "connected"], state="refresh")
        (group,) = self.groups(host_root(self), Answers(dsgrp000_driver=told))
        self.assertEqual(group["refresh"], REFRESH)

    def test_secondary(self) -> None:
        (group,) = self.groups(host_root(self, "beta"), Answers(dsgrp000_rmd=RMD), "beta")
        self.assertEqual((group["role"], group["peer"]), ("secondary", "alpha"))
        self.assertEqual((group["gsn"]["written"], group["gsn"]["committed"]), (None, 5))
        self.assertEqual(group["rmd"]["pid"], 13)
        self.assertEqual(group["ldsus"][0]["mirror_device"], "/dev/vg0/mirror0")

    def test_null_says_nothing_new(self) -> None:
        """What a daemon does not know stays as the configuration has it."""
        told = {**RMD, "peer": None, "ldsus": [{"name": "qds0", "data_device": None}]}
        (group,) = self.groups(host_root(self, "beta"), Answers(dsgrp000_rmd=told), "beta")
        self.assertEqual(group["peer"], "alpha")
        self.assertEqual(group["ldsus"][0]["data_device"], "/dev/vg0/data0")

    def test_secondary_down(self) -> None:
        (group,) = self.groups(host_root(self, "beta"), Answers(), "beta")
        self.assertEqual((group["state"], group["reason"]), ("setup", "rmd not running"))

    def test_masters_are_asked_once(self) -> None:
        answers = Answers()
        self.groups(host_root(self, groups=3), answers)
        self.assertEqual(answers.asked.count("qdsdriver"), 1)

    def test_not_permitted(self) -> None:
        paths = host_root(self)
        self.patch(os, "access", lambda path, mode: False)
        self.assertRaises(
            UnreachableError, status.collect_groups, paths, "alpha", load_groups(paths), Answers()
        )


def group_of(**changes: Any) -> status.Group:
    return {**driver_status(), **changes}


class PredicateTests(TestCase):
    """What --is and --wait ask."""

    def test_states(self) -> None:
        group = group_of(state="refresh", modes=["refresh", "connected"])
        self.assertTrue(info.is_so(group, "refresh"))
        self.assertTrue(info.is_so(group, "connected"))
        self.assertFalse(info.is_so(group, "accumulating"))
        self.assertIn("is refresh+connected", info.describe(group, "accumulating"))

    def test_coherent(self) -> None:
        self.assertTrue(info.is_so(group_of(), "coherent"))
        self.assertFalse(info.is_so(group_of(coherent=False), "coherent"))
        self.assertFalse(info.is_so(group_of(coherent=None), "coherent"))

    def test_synchronous_and_degraded(self) -> None:
        for told, degraded, expected in (
            (None, None, (False, False)),
            ({"kept": True}, None, (True, False)),
            ({"kept": False}, {"since": 1.0, "reason": "so"}, (False, True)),
        ):
            group = group_of(synchronous=told, degraded=degraded)
            found = tuple(info.is_so(group, one) for one in ("synchronous", "degraded"))
            self.assertEqual(found, expected)

    def test_drained(self) -> None:
        self.assertTrue(info.is_so(group_of(), "drained"))
        for key in ("written", "applied", "committed", "mirrored"):
            for value in (811, None):
                gsn = {**driver_status()["gsn"], key: value}
                self.assertFalse(info.is_so(group_of(gsn=gsn), "drained"), key)
        nothing = dict.fromkeys(driver_status()["gsn"])
        self.assertFalse(info.is_so(group_of(gsn=nothing), "drained"))

    def test_served(self) -> None:
        for role, server, other in (("primary", "driver", "rmd"), ("secondary", "rmd", "driver")):
            for pid in (1, None):
                group = group_of(role=role, **{server: {"pid": pid}, other: {"pid": 7}})
                self.assertEqual(info.is_so(group, "served"), pid is not None, (role, pid))

    def test_all_groups(self) -> None:
        apart = group_of(coherent=False)
        self.assertEqual(info.others([group_of(), apart], "coherent"), [apart])


class WaitTests(TestCase):
    """--wait on a fake clock."""

    def wait(self, predicate: str, looks: list[Any], timeout: float = 10.0) -> Any:
        self.now = 0.0

        def look() -> tuple[str, list[status.Group]]:
            one = looks.pop(0) if len(looks) > 1 else looks[0]
            if isinstance(one, Exception):
                raise one
            return "alpha", [one]

        def sleep(seconds: float) -> None:
            self.assertTrue(0 <= seconds <= 0.2)
            self.now += max(seconds, 0.001)

        return info.wait(look, predicate, timeout, lambda: self.now, sleep)

    def test_relaunched_meanwhile(self) -> None:
        down = group_of(state="setup", modes=["setup"], reason="driver is being relaunched")
        _, groups = self.wait("connected", [UnreachableError("x"), down, down, group_of()])
        self.assertEqual(groups[0]["state"], "connected")

    def test_timeout(self) -> None:
        down = group_of(state="accumulating", modes=["accumulating"], reason="no route")
        error = self.assertRaises(DegradedError, self.wait, "connected", [down])
        self.assertIn("accumulating (no route)", str(error))
        self.assertTrue(10.0 <= self.now < 10.3)

    def test_timeout_zero_looks_once(self) -> None:
        self.wait("connected", [group_of()], 0.0)

    def test_refused_ends_at_once(self) -> None:
        for code, kind in (
            (EXIT_IDENTITY, IdentityError),
            (EXIT_CONFIG, ConfigError),
            (EXIT_BROKEN, BrokenError),
        ):
            link = {"pid": 1, "state": "refused", "reason": "because", "code": code}
            group = group_of(state="accumulating", modes=["accumulating"], pmd=link)
            error = self.assertRaises(kind, self.wait, "connected", [group])
            self.assertEqual((error.exit_code, self.now), (code, 0.0))
            self.assertIn("because", str(error))

    def test_what_is_so_counts_before_a_refusal(self) -> None:
        link = {"pid": 1, "state": "refused", "reason": "because", "code": EXIT_CONFIG}
        self.wait("accumulating", [group_of(modes=["accumulating"], pmd=link)])

    def test_drained_on_a_host_with_both_parts(self) -> None:
        """Groups of which it is secondary are not waited for; only what is known counts."""
        away = group_of(role="secondary", gsn=dict.fromkeys(group_of()["gsn"]))
        self.assertEqual(info.others([group_of(), away], "drained"), [])
        self.assertEqual(info.others([away], "drained"), [away])
        behind = group_of(gsn={**group_of()["gsn"], "mirrored": 5})
        self.assertEqual(info.others([behind, away], "drained"), [behind])

    def test_drained_at_the_secondary(self) -> None:
        gsn = dict.fromkeys(driver_status()["gsn"])
        group = group_of(role="secondary", gsn=gsn)
        error = self.assertRaises(DegradedError, self.wait, "drained", [group])
        self.assertIn("only its primary knows", str(error))


class CommandTests(TestCase):
    """The command beside fake daemons."""

    def root(self, **driver: Any) -> str:
        paths = host_root(self)
        told = driver_status(**driver)
        FakeDaemon(self, paths.control_socket("dsgrp000.driver"), {"Status": told})
        FakeDaemon(self, paths.control_socket("dsgrp000.pmd"), {"Status": pmd_status()})
        return str(paths.root)

    def run_it(self, *argv: str) -> tuple[int, str, str]:
        return captured(self, info.main, *argv)

    def test_json(self) -> None:
        code, output, errors = self.run_it("--json", "--root", self.root())
        self.assertEqual((code, errors), (0, ""))
        report = json.loads(output)
        jsonschema.validate(report, SCHEMA)
        self.assertEqual((report["host"], len(report["groups"])), ("alpha", 1))

    def test_schema(self) -> None:
        """It is printed as it is published; no daemon or configuration is needed."""
        code, output, errors = self.run_it("--schema", "--root", "/nowhere")
        self.assertEqual((code, errors), (0, ""))
        self.assertEqual(json.loads(output), SCHEMA)
        jsonschema.Draft202012Validator.check_schema(SCHEMA)

    def test_is(self) -> None:
        root = self.root(coherent=False)
        self.assertEqual(self.run_it("--root", root, "--is", "connected"), (0, "", ""))
        self.assertEqual(self.run_it("--root", root, "--is", "coherent"), (3, "", ""))

    def test_wait(self) -> None:
        root = self.root(coherent=False)
        self.assertEqual(self.run_it("--root", root, "--wait", "drained")[0], 0)
        code, output, _ = self.run_it(
            "--json", "--root", root, "--wait", "coherent", "--timeout", "0"
        )
        self.assertEqual((code, json.loads(output)["error"]["code"]), (3, "degraded"))

    def test_plain_table(self) -> None:
        why = [{"mode": "refresh", "since": 1790000000.0, "reason": "bypass was left"}]
        code, output, _ = self.run_it("--root", self.root(refresh=REFRESH, mode_details=why))
        self.assertEqual(code, 0)
        lines = output.splitlines()
        self.assertEqual(lines[0].split()[:3], ["GROUP", "ROLE", "STATE"])
        self.assertEqual(lines[1].split()[:3], ["dsgrp000", "primary", "connected"])
        self.assertIn(
            "full refresh 75 %, 1 MiB remain, 1 MiB/s, 1.0 s to go (bypass was left)", output
        )
        self.assertNotIn("\x1b", output)

    def test_not_running(self) -> None:
        code, output, _ = self.run_it("--root", str(host_root(self).root))
        self.assertEqual(code, 0)
        self.assertIn("dsgrp000: driver not running", output)

    def test_not_of_this_host(self) -> None:
        root = str(host_root(self, "gamma").root)
        code, _, errors = self.run_it("--root", root)
        self.assertEqual(code, 10)
        self.assertIn("gamma is neither primary nor secondary", errors)

    def test_usage(self) -> None:
        root = self.root()
        for argv in (
            ["--is", "perfect"],
            ["--timeout", "5"],
            ["--interval", "5"],
            ["--wait", "connected", "--watch"],
            ["--wait", "connected", "--timeout", "-1"],
            ["--wait", "connected", "--timeout", "nan"],
            ["-g", "7"],
        ):
            self.assertEqual(self.run_it("--root", root, *argv)[0], 2, argv)

    def test_watch(self) -> None:
        groups = [group_of(peer="beta")]
        looks = iter([groups, groups])

        def sleep(seconds: float) -> None:
            self.assertEqual(seconds, 0.5)

        def watch(argv: list[str]) -> int:
            def look() -> tuple[str, list[status.Group]]:
                return "alpha", next(looks)

            broken = [ConfigError("dsgrp001.cfg: no such key", hint="correct it")]
            self.assertRaises(StopIteration, info.watch, look, 0.5, True, sleep, broken)
            return 0

        _, output, _ = captured(self, watch)
        lines = [json.loads(line) for line in output.splitlines()]
        self.assertEqual([line["schema"] for line in lines], [1, 1])
        for line in lines:
            jsonschema.validate({**line, "groups": []}, SCHEMA)
            self.assertEqual([one["message"] for one in line["errors"]], [line["error"]["message"]])
            self.assertIn("dsgrp001.cfg", line["error"]["message"])


class ViewTests(TestCase):
    """Texts for a person."""

    def test_sizes_and_durations(self) -> None:
        self.assertEqual(
            [info_view.size_text(n) for n in (None, 0, 512, 4096, 268435456, 3 << 40)],
            ["-", "0 B", "512 B", "4 KiB", "256 MiB", "3 TiB"],
        )
        self.assertEqual(
            [info_view.duration_text(n) for n in (None, 0.2, 42, 600, 9000)],
            ["-", "0.2 s", "42 s", "10 min", "2.5 h"],
        )
        days = [info_view.duration_text(n) for n in (47 * 3600, 50 * 3600)]
        self.assertEqual(days, ["47.0 h", "2 days"])
        told = [info_view.full_text(n) for n in (None, 0.0, 42.0)]
        self.assertEqual(told, ["-", "FULL", "42 s"])

    def test_lag(self) -> None:
        """In entries, bytes and seconds, as far as they are known."""
        for entries, size, seconds, expected in (
            (0, 0, 0.0, "none"),
            (1, 4096, 0.5, "1 entry, 4 KiB, 0.5 s"),
            (12, 49152, None, "12 entries, 48 KiB"),
            (None, None, None, "-"),
        ):
            group = group_of(lag={"entries": entries, "bytes": size, "seconds": seconds})
            self.assertEqual(info_view.group_row(group, 0.0)[-1], expected)

    def test_a_reason_is_told_once(self) -> None:
        why = "mirror device /m has 1 bytes, the data device 2"
        group = group_of(
            reason=why,
            refresh=None,
            ldsus=[],
            pmd={"reason": why},
            rmd={"reason": ""},
            errors=[f"refused: {why}", f"refused: {why}", "another", "another"],
        )
        name = group["name"]
        # What was noted may be over.
        told = [f"{name}: {why}", f"{name}: earlier: another"]
        self.assertEqual(info_view.remarks(group), told)
        group["ldsus"] = [{"name": "qds0", "errors": [why]}]
        told = [f"{name}: earlier: another", f"{name}: qds0: {why}"]
        self.assertEqual(info_view.remarks(group), told)

    def test_what_follows_from_a_missing_daemon_is_not_told(self) -> None:
        name = group_of()["name"]
        link = {"state": "stopped", "code": 0, "reason": "no pmd is attached"}
        gone = {"pid": None, "state": "stopped", "code": None, "reason": "pmd not running"}
        group = group_of(
            role="primary", reason=link["reason"], refresh=None, pmd=gone, rmd=link, ldsus=[]
        )
        self.assertEqual(info_view.remarks(group), [f"{name}: pmd not running"])
        pmd = {"pid": 7, "state": "connecting", "code": 0, "reason": "no driver answers on x.ctl"}
        group = group_of(
            role="primary",
            reason="driver not running",
            refresh=None,
            driver={"pid": None},
            pmd=pmd,
            ldsus=[],
        )
        self.assertEqual(info_view.remarks(group), [f"{name}: driver not running"])
        group["pmd"] = {**pmd, "state": "refused", "code": 12, "reason": "wrong name"}
        self.assertIn(f"{name}: wrong name", info_view.remarks(group))

    def test_a_bypass_tells_its_reason_once(self) -> None:
        bypass = {"id": "x", "since": 1.0, "reason": "asked for", "dirty_bytes": 4096}
        group = group_of(
            role="primary", reason="asked for", refresh=None, bypass=bypass, ldsus=[], errors=["y"]
        )
        line, other = info_view.remarks(group)
        self.assertIn("in bypass (asked for), 4 KiB dirty", line)
        self.assertEqual(other, f"{group['name']}: earlier: y")

    def test_compression_and_paths(self) -> None:
        path = {"local": "10.1.0.1", "remote": "10.1.0.2", "port": 575, "state": "connected"}
        down = {**path, "local": "10.2.0.1", "state": "connecting", "reason": "no route"}
        wire = {"compression": "zstd:3", "wanted": "zstd:3", "paths": [path, down]}
        wire |= {"frame_bytes": 4 << 20, "wire_bytes": 1 << 20}
        link = {"pid": 1, "state": "connected"}
        group = group_of(role="primary", refresh=None, pmd=link, ldsus=[], reason="", wire=wire)
        name = group["name"]
        self.assertEqual(
            info_view.remarks(group)[:2],
            [
                f"{name}: zstd:3 made 1 MiB of 4 MiB",
                f"{name}: path 10.2.0.1>10.1.0.2 connecting: no route",
            ],
        )
        group["wire"] = {**wire, "compression": "none", "paths": [path]}
        self.assertIn("not both hosts know zstd:3", info_view.remarks(group)[0])
        group["wire"] |= {"wanted": "none"}
        self.assertEqual(info_view.remarks(group), [])

    def test_bypass_names_the_way_out(self) -> None:
        for trusted, way in ((True, "qdsbypass off"), (False, "qdsmirror-architecture")):
            unit = {"name": "qds0", "errors": [], "writelog": {"trusted": trusted}}
            bypass = {"id": "x", "since": 1.0, "reason": "y", "dirty_bytes": 4096}
            group = group_of(role="primary", refresh=None, bypass=bypass, ldsus=[unit])
            self.assertIn(way, info_view.remarks(group)[0])

    def test_rich(self) -> None:
        from io import StringIO

        from rich.console import Console

        paths = host_root(self)
        groups = status.collect_groups(paths, "alpha", load_groups(paths), Answers())
        output = StringIO()
        console = Console(file=output, width=200, force_terminal=True, no_color=False)
        console.print(info_table.tables(groups, 1790000000.0, 200))
        self.assertIn("driver not running", output.getvalue())
