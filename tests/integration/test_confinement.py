"""The daemons do their work with the system calls that the systemd units leave them."""

from __future__ import annotations

import platform
import signal

from twisted.trial.unittest import SkipTest, TestCase

from tests.integration import confine
from tests.integration.lab import REPOSITORY, console_script, in_thread
from tests.integration.test_link_faults import LinkWorld
from tests.integration.world import need

UNITS = REPOSITORY / "conf" / "systemd"


class ConfinementTests(TestCase):
    timeout = 1200

    @in_thread
    def test_system_calls(self) -> None:
        need("systemd-analyze")
        if platform.machine() != "x86_64" or not confine.HEADER.exists():
            raise SkipTest(f"{confine.HEADER} is missing")
        world = LinkWorld(self)
        for site, command, unit in (
            ("secondary", "launchrmds", "qdsrmd"),
            ("primary", "launchdriver", "qdsdriver"),
            ("primary", "launchpmds", "qdspmd"),
        ):
            world.run(
                [
                    console_script("python"), "-m", "tests.integration.confine",
                    str(UNITS / f"{unit}.service"), console_script(command),
                    "--root", str(world.directory / site),
                ]
            )  # fmt: skip
            pid = world.pid(unit)
            with open(f"/proc/{pid}/status") as status:
                self.assertIn("Seccomp:\t2", status.read())
        world.start()
        world.write()
        world.goes_on()
        for role in ("driver", "pmd", "rmd"):
            world.kill(f"dsgrp000.{role}")
        for daemon in ("qdsrmd", "qdsdriver", "qdspmd"):
            world.kill(daemon, signal.SIGHUP)
        world.goes_on()
        world.stop()
        for daemon in ("qdsrmd", "qdsdriver", "qdspmd"):
            # Memory and niceness are granted by other settings of the units.
            lines = [line for line in world.log(daemon).splitlines() if "was granted" not in line]
            self.assertNotIn("not permitted", "\n".join(lines).lower())
            self.assertNotIn("Traceback", world.log(daemon))
