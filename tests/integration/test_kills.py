"""kill -9 of every daemon under load: no I/O error, nothing lost, the mirror always a prefix."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time

from twisted.trial.unittest import SkipTest, TestCase

from tests.integration.lab import WAIT_SECONDS, LabFixture, console_script, draw_seed, in_thread
from tests.integration.order import Layout, check

SLOTS = 2048
LDSUS = 3
#: The children most often, and each master.
VICTIMS = (
    ("dsgrp000.rmd", "dsgrp000.driver", "dsgrp000.pmd", "qdsrmd", "dsgrp000.driver")
    + ("dsgrp000.pmd", "dsgrp000.rmd", "qdsdriver", "dsgrp000.rmd", "qdspmd")
) * 2
CHECK_EVERY = 5
BLOCK = 4096
#: So that there is something under way whenever a daemon ends, and time for that to happen.
WRITES_PER_SECOND = 400
#: The driver is killed so often under a QEMU client ...
QEMU_KILLS = 3
#: ... that never has nothing to do: it is given more than it may write by the next look.
QEMU_BATCH = 40
QEMU_WRITES_PER_SECOND = 400


class KillTests(TestCase):
    timeout = 1200

    def setUp(self) -> None:
        self.random = random.Random(draw_seed(self))
        self.layout = Layout(LDSUS, SLOTS)

    def start_lab(self) -> LabFixture:
        lab = LabFixture(
            self, "--ldsus", str(LDSUS), "--size", "8M", "--writelog", "16M", "--journal", "12M"
        )
        lab.create()
        lab.start()
        return lab

    def start_writer(self, lab: LabFixture) -> subprocess.Popen[str]:
        module = [console_script("python"), "-m", "tests.integration.writer"]
        socket = str(lab.primary / "run" / "dsgrp000.nbd")
        names = [f"qds{index}" for index in range(LDSUS)]
        return lab.start_program(
            [*module, socket, *names, "--slots", str(SLOTS), "--rate", str(WRITES_PER_SECOND)]
        )

    def end_writer(self, lab: LabFixture, writer: subprocess.Popen[str]) -> dict[str, int]:
        output, errors = writer.communicate(timeout=WAIT_SECONDS)
        self.assertEqual(writer.returncode, 0, f"{output}{errors}{lab.logs()}")
        return dict(json.loads(output))

    def kill(self, lab: LabFixture, name: str) -> None:
        lab.kill(name)
        if not name.startswith("dsgrp"):
            # What the service manager does.
            site = "secondary" if name == "qdsrmd" else "primary"
            launch = {"qdsrmd": "launchrmds", "qdsdriver": "launchdriver", "qdspmd": "launchpmds"}
            lab.tool(launch[name], "--root", str(lab.directory / site))

    def gsn(self, lab: LabFixture, which: str) -> int:
        """Give a GSN, e.g. ``written``: the last that is framed; 0 while no driver says so."""
        gsn = lab.info()["gsn"]
        return int(gsn[which] or 0) if gsn else 0

    def check_prefix(self, lab: LabFixture) -> int:
        """Kill the whole secondary, replay its journal, and check copies of the mirror devices."""
        lab.kill("qdsrmd")
        # Its child follows it, also one that was being relaunched and has no pid file yet.
        lab.until_gone("secondary")
        told = json.loads(lab.tool("qdsrmdreco", "--json", "--root", str(lab.secondary)))
        self.assertTrue(told["groups"][0]["coherent"], told)
        images = [path.read_bytes() for path in lab.images("secondary")]
        lab.tool("launchrmds", "--root", str(lab.secondary))
        return check(images, self.layout)

    def assert_equal_sites(self, lab: LabFixture) -> None:
        lab.wait("drained")
        lab.stop()
        for data, mirror in zip(lab.images("primary"), lab.images("secondary"), strict=True):
            self.assertEqual(data.read_bytes() == mirror.read_bytes(), True, f"{data} {mirror}")

    @in_thread
    def test_kills_in_turn_under_load(self) -> None:
        lab = self.start_lab()
        writer = self.start_writer(lab)
        tops: list[int] = []
        seen = 0
        for count, name in enumerate(VICTIMS, 1):
            time.sleep(self.random.uniform(0.1, 0.6))
            self.kill(lab, name)
            self.assertIsNone(writer.poll(), "the writer ended")
            if count % CHECK_EVERY == 0:
                lab.wait("connected")
                # Only what was written since the last time can be seen to go forward.
                lab.until(
                    lambda seen=seen: self.gsn(lab, "committed") > seen, "more to be committed"
                )
                time.sleep(self.random.uniform(0.0, 0.5))
                tops.append(self.check_prefix(lab))
                seen = lab.until(lambda: self.gsn(lab, "written"), "the driver's word")
        report = self.end_writer(lab, writer)
        self.assertGreaterEqual(report["reconnects"], LDSUS)
        self.assertEqual(tops, sorted(set(tops)), "the mirror did not go forward")
        self.assert_equal_sites(lab)
        images = [path.read_bytes() for path in lab.images("secondary")]
        self.assertEqual(check(images, self.layout), report["writes"])

    @in_thread
    def test_qemu_client_reconnects(self) -> None:
        qemu = shutil.which("qemu-io")
        if qemu is None:
            raise SkipTest("qemu-io is not installed")
        lab = self.start_lab()
        options = {
            "driver": "throttle",
            "throttle-group": "slow",
            "file.driver": "nbd",
            "file.server.type": "unix",
            "file.server.path": str(lab.primary / "run" / "dsgrp000.nbd"),
            "file.export": "qds1",
            "file.reconnect-delay": "300",
        }
        said = lab.directory / "qemu-io.out"
        client = lab.start_program(
            [qemu, "--object", f"throttle-group,id=slow,x-iops-total={QEMU_WRITES_PER_SECOND}"]
            + ["-t", "none", "--image-opts"]
            + [",".join(f"{key}={value}" for key, value in options.items())],
            said,
        )
        model = bytearray(8 << 20)
        # What is framed by now is not the client's: it may be at its handshake still.
        asked, written = 0, self.gsn(lab, "written")

        def goes_on() -> bool:
            """Ask for more writes than are done at once; tell whether some were framed since."""
            nonlocal asked
            assert client.stdin is not None
            framed = self.gsn(lab, "written")
            if asked - framed > QEMU_WRITES_PER_SECOND:
                # Enough for a second; what waits too long would outlast the test.
                return framed > written
            commands = []
            for number in range(asked, asked + QEMU_BATCH):
                offset, byte = number * BLOCK % len(model), number % 255 + 1
                model[offset : offset + BLOCK] = bytes([byte]) * BLOCK
                commands.append(f"aio_write -q -P {byte} {offset} 4k\n")
            try:
                client.stdin.write("".join(commands))
                client.stdin.flush()
            except BrokenPipeError:
                ended = client.wait(WAIT_SECONDS)
                self.fail(f"the client ended with {ended}: {said.read_text()}{lab.logs()}")
            asked += QEMU_BATCH
            return framed > written

        for _ in range(QEMU_KILLS):
            lab.until(goes_on, "the client to write")
            victim = lab.kill("dsgrp000.driver")
            lab.until(lambda v=victim: lab.pid("dsgrp000.driver") not in (None, v), "another")
            # It knows what was framed by the one that was killed.
            written = lab.until(lambda: self.gsn(lab, "written"), "the driver to recover")
        lab.until(goes_on, "the client to write again")
        self.assertIsNone(client.poll())
        client.communicate("aio_flush\nflush\nquit\n", timeout=WAIT_SECONDS)
        told = f"{said.read_text()}{lab.logs()}"
        self.assertEqual(client.returncode, 0, told)
        self.assertNotIn("aio_write failed", told)
        self.assert_equal_sites(lab)
        self.assertEqual(lab.images("primary")[1].read_bytes() == model, True)

    @in_thread
    def test_stopped_secondary_does_not_hold_up_the_application(self) -> None:
        lab = self.start_lab()
        lab.kill("dsgrp000.rmd", signal.SIGSTOP)
        writer = self.start_writer(lab)
        before = lab.info()["gsn"]
        lab.until(lambda: lab.info()["gsn"]["written"] > before["written"] + 1000, "writes")
        self.assertLess(lab.info()["gsn"]["committed"], lab.info()["gsn"]["written"])
        lab.kill("dsgrp000.rmd", signal.SIGCONT)
        report = self.end_writer(lab, writer)
        self.assertEqual(report["reconnects"], 0)
        self.assert_equal_sites(lab)
