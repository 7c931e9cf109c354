"""The systemd units: valid, and granting what the daemons ask for, and no more (rules.md 20)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from grp import getgrgid
from pathlib import Path
from pwd import getpwuid

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from qdsmirror.limits import STOP_SECONDS_MAX
from qdsmirror.tools.info import PREDICATES

CONF = Path(__file__).parents[2] / "conf"
UNITS = CONF / "systemd"
DAEMONS = ("qdsdriver.service", "qdspmd.service", "qdsrmd.service")
SERVICES = (*DAEMONS, "qdsgroup@.service", "qdsconsole.service")
#: What "systemd-analyze security" says of a unit, security.md 11.
EXPOSURE_MAX = 2.0


def settings(name: str) -> dict[str, str]:
    lines = (UNITS / name).read_text().splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line and line[0] not in "#[")
    return {key: value for key, _, value in pairs}


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        raise SkipTest("systemd-analyze is missing")
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=240
    )


class UnitTests(SynchronousTestCase):
    def test_driver_and_pmd_may_protect_their_memory(self) -> None:
        for name in ("qdsdriver.service", "qdspmd.service"):
            unit = settings(name)
            self.assertEqual(unit["LimitMEMLOCK"], "infinity")
            self.assertEqual(unit["OOMScoreAdjust"], "-1000")
            for capabilities in ("CapabilityBoundingSet", "AmbientCapabilities"):
                self.assertEqual(unit[capabilities], "CAP_SYS_RESOURCE", name)

    def test_the_rmd_has_no_capability(self) -> None:
        unit = settings("qdsrmd.service")
        self.assertEqual((unit["CapabilityBoundingSet"], unit["AmbientCapabilities"]), ("", ""))
        self.assertNotIn("OOMScoreAdjust", unit)

    def test_a_child_killed_for_memory_is_the_masters_to_restart(self) -> None:
        for name in DAEMONS:
            self.assertEqual(settings(name)["OOMPolicy"], "continue")

    def test_daemons_are_nobody_special(self) -> None:
        for name in SERVICES:
            self.assertEqual(settings(name)["User"], "qdsmirror", name)
        users = (CONF / "sysusers.d" / "qdsmirror.conf").read_text()
        self.assertRegex(users, re.compile(r"^u qdsmirror ", re.MULTILINE))

    def test_devices_are_listed(self) -> None:
        for name in ("qdsdriver.service", "qdsrmd.service"):
            self.assertEqual(settings(name)["DevicePolicy"], "closed")
        self.assertEqual(settings("qdspmd.service")["PrivateDevices"], "yes")

    def test_they_tell_how_they_are(self) -> None:
        for name in DAEMONS:
            unit = settings(name)
            self.assertEqual((unit["Type"], unit["NotifyAccess"]), ("notify", "main"))
            self.assertGreater(int(unit["WatchdogSec"]), 0)
            self.assertGreater(int(unit["TimeoutStopSec"]), STOP_SECONDS_MAX)
            self.assertEqual(unit["ExecReload"], "/bin/kill -HUP $MAINPID")

    def test_the_console_goes_before_the_others(self) -> None:
        unit = settings("qdsconsole.service")
        self.assertEqual((unit["CapabilityBoundingSet"], unit["AmbientCapabilities"]), ("", ""))
        self.assertGreater(int(unit["OOMScoreAdjust"]), 0)
        self.assertEqual((unit["Type"], unit["NotifyAccess"]), ("notify", "main"))
        self.assertEqual(unit["ExecReload"], "/bin/kill -HUP $MAINPID")

    def test_a_group_is_waited_for(self) -> None:
        unit = settings("qdsgroup@.service")
        found = re.search(r"qdsinfo -g %i --wait (\w+) --timeout (\d+)$", unit["ExecStart"])
        assert found is not None
        self.assertIn(found[1], PREDICATES)
        self.assertGreater(int(unit["TimeoutStartSec"]), int(found[2]))

    def test_a_daemons_restart_does_not_stop_what_needs_a_group(self) -> None:
        for name in ("qdsgroup@.service", "qdsgroup@.target"):
            unit = settings(name)
            for key in ("PartOf", "BindsTo", "Requires"):
                for daemon in DAEMONS:
                    self.assertNotIn(daemon, unit.get(key, ""))

    def test_systemd_understands_them(self) -> None:
        done = analyze("verify", *sorted(map(str, UNITS.iterdir())))
        # The manual pages need not be installed here, nor the units.
        wrong = [
            line for line in done.stderr.splitlines()
            if line.startswith(("qds", str(UNITS))) and "Command 'man " not in line
        ]  # fmt: skip
        self.assertEqual(wrong, [])

    def test_exposure(self) -> None:
        if "--offline" not in analyze("--help").stdout:
            raise SkipTest("systemd-analyze here (before 250) does not look at files")
        for name in SERVICES:
            done = analyze("security", "--offline=true", "--no-pager", str(UNITS / name))
            found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
            self.assertIsNotNone(found, done.stderr)
            assert found is not None
            self.assertLess(float(found[1]), EXPOSURE_MAX, f"{name}\n{done.stdout}")

    def test_logs_are_rotated(self) -> None:
        text = (CONF / "logrotate.d" / "qdsmirror").read_text()
        for name in ("audit.log", "qdsdriver.log", "qdspmd.log", "qdsrmd.log", "qdsconsole.log"):
            self.assertIn(f"/var/opt/QLIXds/{name}", text)
        if shutil.which("logrotate") is None:
            raise SkipTest("logrotate is missing")
        ours = Path(self.mktemp())
        # The daemons' user need not be known here.
        user, group = (getpwuid(os.geteuid()).pw_name, getgrgid(os.getegid()).gr_name)
        ours.write_text(text.replace("su qdsmirror qdsmirror", f"su {user} {group}"))
        ours.chmod(0o644)
        done = subprocess.run(
            ["logrotate", "--debug", str(ours)], capture_output=True, text=True, timeout=240
        )
        self.assertNotIn("error:", done.stderr)
