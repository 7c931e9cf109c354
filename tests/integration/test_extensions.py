"""Real daemons: a writelog is extended and freed under load while the driver is killed."""

from __future__ import annotations

import json
import random
import subprocess
import time

from twisted.trial.unittest import TestCase

from tests.integration.lab import WAIT_SECONDS, LabFixture, console_script, in_thread
from tests.integration.order import Layout, check

SLOTS = 512
ROUNDS = 6
POOL = 3
#: A log is full in a second or two, and the daemons have time for what is told them.
WRITES_PER_SECOND = "500"
#: Some 50 ms apart.
LOOKS = 10


class ExtensionTests(TestCase):
    timeout = 1200
    statistics = False

    def start_lab(self, writelog: str, *options: str) -> LabFixture:
        lab = LabFixture(
            self, "--size", "2M", "--writelog", writelog, "--journal", "6M", "--pool", str(POOL),
            "--pool-size", "1M", *options,
        )  # fmt: skip
        lab.create()
        lab.start()
        return lab

    def tell(self, lab: LabFixture, command: str) -> subprocess.Popen[str]:
        """Begin to extend or free; whether that succeeds is open."""
        root = str(lab.primary)
        return lab.start_program([console_script(command), "--json", "--root", root, "qds0"])

    def pool(self, lab: LabFixture) -> list[str]:
        return [row["state"] for row in lab.info()["pool"]["devices"]]

    def settled(self, lab: LabFixture) -> list[str] | None:
        states = self.pool(lab)
        return None if "changing" in states else states

    def free_all(self, lab: LabFixture) -> None:
        def freed() -> bool:
            states = self.pool(lab)
            if "chained" in states:
                lab.tool("qdsfree", "--root", str(lab.primary), "qds0", codes=(0, 3, 11))
            return states == ["free"] * POOL

        lab.until(freed, "the pool to be free again")

    @in_thread
    def test_the_driver_is_killed_in_the_midst(self) -> None:
        chosen = random.Random()
        lab = self.start_lab("1M")
        layout = Layout(1, SLOTS)
        module = [console_script("python"), "-m", "tests.integration.writer"]
        socket = str(lab.primary / "run" / "dsgrp000.nbd")
        writer = lab.start_program(
            [*module, socket, "qds0", "--slots", str(SLOTS), "--rate", WRITES_PER_SECOND]
        )
        for turn in range(ROUNDS):
            program = self.tell(lab, "qdsextend" if turn % 2 == 0 else "qdsfree")
            # A command takes so long to start.
            time.sleep(chosen.uniform(0.1, 0.5))
            victim = lab.kill("dsgrp000.driver")
            program.communicate(timeout=WAIT_SECONDS)
            lab.until(lambda v=victim: lab.pid("dsgrp000.driver") not in (None, v), "another")
            lab.wait("connected")
            # One that is drained by now is on its way back.
            states = lab.until(lambda: self.settled(lab), "no device to change")
            self.assertEqual(set(states) - {"free", "chained", "leaving"}, set(), states)
            self.assertIsNone(writer.poll(), "the writer ended")
        self.free_all(lab)
        output, errors = writer.communicate(timeout=WAIT_SECONDS)
        self.assertEqual(writer.returncode, 0, f"{output}{errors}{lab.logs()}")
        report = json.loads(output)
        self.assertGreaterEqual(report["reconnects"], ROUNDS // 2)
        lab.wait("drained")
        lab.stop()
        self.assert_equal_sites(lab)
        images = [path.read_bytes() for path in lab.images("secondary")]
        self.assertEqual(check(images, layout), report["writes"])

    @in_thread
    def test_an_outage_and_its_end(self) -> None:
        """Writes wait for room in a full log, and get it; the pool is full again at the end."""
        lab = self.start_lab("512K")
        lab.stop("secondary")
        module = [console_script("python"), "-m", "tests.integration.writer"]
        socket = str(lab.primary / "run" / "dsgrp000.nbd")
        writer = lab.start_program(
            [*module, socket, "qds0", "--slots", str(SLOTS), "--rate", WRITES_PER_SECOND]
        )
        root = ["--root", str(lab.primary)]
        for number in range(POOL):
            before = self.full(lab)
            told = json.loads(lab.tool("qdsextend", "--json", *root, "qds0"))
            self.assertEqual((told["state"], told["pool_free"]), ("chained", POOL - 1 - number))
            lab.until(lambda b=before: lab.info()["gsn"]["written"] > b, "writes to go on")
        lab.tool("qdsextend", *root, "qds0", codes=(3,))
        (unit,) = lab.info()["ldsus"]
        self.assertEqual(len(unit["writelog"]["devices"]), 1 + POOL)
        lab.stop("primary")
        lab.tool("qdswlscan", "--check", *root)
        lab.start()
        self.free_all(lab)
        output, errors = writer.communicate(timeout=WAIT_SECONDS)
        self.assertEqual(writer.returncode, 0, f"{output}{errors}{lab.logs()}")
        lab.wait("drained")
        lab.stop()
        self.assert_equal_sites(lab)

    def full(self, lab: LabFixture) -> int:
        """Wait until nothing more is framed; give the last GSN."""
        seen: list[int] = []

        def stands() -> bool:
            # Nobody tells that a write waits: many looks at a log that is nearly full find none.
            info = lab.info()
            if info["ldsus"][0]["writelog"]["used_ratio"] > 0.5:
                seen.append(int(info["gsn"]["written"]))
            return len(seen) >= LOOKS and len(set(seen[-LOOKS:])) == 1

        lab.until(stands, "the log to be full")
        return seen[-1]

    def assert_equal_sites(self, lab: LabFixture) -> None:
        for data, mirror in zip(lab.images("primary"), lab.images("secondary"), strict=True):
            self.assertTrue(data.read_bytes() == mirror.read_bytes(), f"{data} {mirror}")
