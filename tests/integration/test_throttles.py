"""Real daemons: throttles extend and free a writelog through crashes, page, and hold back.

They are evaluated every second; a writelog that overflows would lead into bypass.
"""

from __future__ import annotations

import json
import subprocess

from twisted.trial.unittest import TestCase

from tests.integration.lab import WAIT_SECONDS, LabFixture, console_script, in_thread

SLOTS = 512
#: A log of 64 MiB lasts for many evaluations, whatever a process has to wait for its turn.
WRITES_PER_SECOND = 1000
POOL = 3
THROTTLES = """
[throttles]
  [[filling]]
  test = pctwl > 60
  actions = extend
  [[slow down]]
  test = pctwl > 30
  actions = writesleep set 50000
  [[go on]]
  test = pctwl <= 30
  actions = writesleep set 0
  [[empty again]]
  test = pctwl < 20
  actions = free
  [[late]]
  test = lag T> 2
  actions = console "the mirror is late"
  [[on time]]
  test = lag T<= 1
  actions = console "the mirror is on time"
"""


class ThrottleTests(TestCase):
    timeout = 1200

    def start_lab(self, throttles: str, *options: str) -> LabFixture:
        lab = LabFixture(self, "--size", "2M", "--overflow", "bypass", *options)
        lab.create()
        path = lab.primary / "etc" / "dsgrp000.cfg"
        text = path.read_text()
        text = text.replace("[ldsus]", "[tunables]\nthrottle_interval = 1\n[ldsus]")
        path.write_text(text + throttles)
        lab.start()
        return lab

    def write(self, lab: LabFixture) -> subprocess.Popen[str]:
        """Have an application write without end."""
        module = [console_script("python"), "-m", "tests.integration.writer"]
        socket = str(lab.primary / "run" / "dsgrp000.nbd")
        options = ["--slots", str(SLOTS), "--rate", str(WRITES_PER_SECOND)]
        return lab.start_program([*module, socket, "qds0", *options])

    def finish(self, lab: LabFixture, writer: subprocess.Popen[str]) -> None:
        output, errors = writer.communicate(timeout=WAIT_SECONDS)
        self.assertEqual(writer.returncode, 0, f"{output}{errors}{lab.logs()}")
        self.assertGreater(json.loads(output)["writes"], 0)

    def events(self, lab: LabFixture) -> str:
        path = lab.primary / "var" / "dsgrp000.evt"
        return path.read_text() if path.exists() else ""

    @in_thread
    def test_a_writelog_is_extended_and_freed_across_crashes(self) -> None:
        lab = self.start_lab(
            THROTTLES, "--writelog", "64M", "--journal", "64M", "--pool", str(POOL),
            "--pool-size", "64M",
        )  # fmt: skip

        def chained(count: int) -> bool:
            info = lab.info()
            self.assertNotIn("bypass", info["modes"], self.events(lab))
            states = [row["state"] for row in info["pool"]["devices"]]
            return states.count("chained") >= count if count else states == ["free"] * POOL

        lab.stop("secondary")
        writer = self.write(lab)
        lab.until(lambda: chained(1), "the first extension")
        victim = lab.kill("dsgrp000.driver")
        lab.until(lambda: lab.pid("dsgrp000.driver") not in (None, victim), "another driver")
        lab.until(lambda: chained(2), "the second extension", 2 * WAIT_SECONDS)
        self.finish(lab, writer)
        lab.until(lambda: "the mirror is late" in self.events(lab), "the page")
        victim = lab.kill("dsgrp000.driver")
        lab.start("secondary")
        lab.wait("drained")
        lab.until(lambda: chained(0), "all to be free again")
        lab.until(lambda: "the mirror is on time" in self.events(lab).rpartition("late")[2],
                  "the all-clear")  # fmt: skip
        lab.stop()
        for data, mirror in zip(lab.images("primary"), lab.images("secondary"), strict=True):
            self.assertEqual(data.read_bytes(), mirror.read_bytes())

    @in_thread
    def test_what_is_sent_is_limited_and_new_throttles_disturb_nobody(self) -> None:
        limit = "\n[throttles]\n[[limit]]\ntest = netkbps >= 0\nactions = limit 50\n"
        lab = self.start_lab(limit, "--writelog", "32M", "--journal", "16M", "--overflow", "block")
        pid = lab.pid("dsgrp000.pmd")
        path = lab.primary / "etc" / "dsgrp000.cfg"
        text = path.read_text()
        writer = self.write(lab)
        lab.until(lambda: lab.info()["lag"]["seconds"] > 2, "the limit to be felt")
        self.finish(lab, writer)
        self.set_while_it_runs(lab)
        path.write_text(text.replace("limit 50", "limit off"))
        lab.tool("qdsconfigtool", "apply", "--root", str(lab.primary))
        lab.wait("drained")
        self.assertEqual(lab.pid("dsgrp000.pmd"), pid)
        # What was set lasted until the file said something else.
        self.assertEqual(lab.info()["settings"], {})
        lab.stop()

    def set_while_it_runs(self, lab: LabFixture) -> None:
        """The limit becomes another at once, stays so after a crash, and who asked is noted."""
        root = str(lab.primary)
        said = lab.tool("qdsset", "limit.limit=40", "perf_interval=2", "--root", root)
        self.assertEqual(said, "dsgrp000: limit.limit = 40\ndsgrp000: perf_interval = 2\n")
        self.assertEqual(lab.info()["throttled"]["limit_kbps"], 40)
        victim = lab.kill("dsgrp000.stats")
        lab.until(lambda: lab.pid("dsgrp000.stats") not in (None, victim), "another process")
        wanted = {"limit.limit": 40, "perf_interval": 2.0}
        lab.until(lambda: lab.info()["settings"] == wanted, "what was set to be in force again")
        self.assertEqual(lab.info()["throttled"]["limit_kbps"], 40)
        records = map(json.loads, (lab.primary / "var" / "audit.log").read_text().splitlines())
        asked = [one for one in records if one.get("command") == "Set" and one["event"] == "done"]
        self.assertEqual([one["daemon"] for one in asked], ["dsgrp000.stats"])
        self.assertEqual(
            json.loads(asked[0]["arguments"]["settings"]),
            {"limit.limit": "40", "perf_interval": "2"},
        )
