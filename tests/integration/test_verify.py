"""fio verifies what it wrote through a client that reconnects, while any daemon is killed -9."""

from __future__ import annotations

import json
import random
import time
from typing import Any

from twisted.trial.unittest import SkipTest, TestCase

from tests.integration.lab import WAIT_SECONDS, draw_seed, in_thread
from tests.integration.world import World, need

VICTIMS = (
    *("dsgrp000.driver", "dsgrp000.rmd", "dsgrp000.pmd", "dsgrp000.driver"),
    *("qdsrmd", "qdsdriver", "qdspmd", "dsgrp000.driver"),
)
LAUNCHERS = {
    "qdsrmd": ("secondary", "launchrmds"),
    "qdsdriver": ("primary", "launchdriver"),
    "qdspmd": ("primary", "launchpmds"),
}
WRITES_PER_SECOND = 300
#: It is ended before.
SECONDS = 10_000


def _json(text: str) -> Any:
    """Give what fio reports, behind what it says of a signal."""
    return json.loads(text[text.index("{") :])


class VerifyTests(TestCase):
    timeout = 1200

    @in_thread
    def test_fio_verifies_under_kills(self) -> None:
        need("fio", "nbdkit")
        seed = draw_seed(self)
        source = random.Random(seed)
        world = World(self, "--size", "4M", "--writelog", "8M", "--journal", "6M")
        if "nbd" not in world.ended("fio", "--enghelp").stdout.split():
            raise SkipTest("fio has no nbd engine")
        world.create()
        world.start()
        socket = world.base / "retry"
        client = world.start_program(
            ["nbdkit", "-f", "-U", str(socket), "--filter=retry", "nbd"]
            + [f"socket={world.primary}/run/dsgrp000.nbd", "export=qds0"]
            + ["retries=100", "retry-delay=1", "retry-exponential=no"]
        )
        world.until(socket.exists, "nbdkit to serve")
        fio = world.start_program(
            ["fio", "--name=verify", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}"]
            + ["--rw=randwrite", "--bs=4k", "--size=4M", "--iodepth=16", "--verify=crc32c"]
            + ["--verify_backlog=128", "--verify_fatal=1", "--fsync=32", f"--randseed={seed}"]
            + [f"--rate_iops={WRITES_PER_SECOND}", "--time_based", f"--runtime={SECONDS}"]
            + ["--output-format=json", "--output=verified"]
        )
        for name in source.sample(VICTIMS, len(VICTIMS)):
            before = world.info()["gsn"]
            world.until(
                lambda b=before: (
                    fio.poll() is not None or (world.info()["gsn"] or b)["written"] != b["written"]
                ),
                "writes",
            )
            time.sleep(source.uniform(0.0, 0.5))
            self.assertIsNone(fio.poll(), f"fio ended\n{world.logs()}")
            world.kill(name)
            if name in LAUNCHERS:
                site, launch = LAUNCHERS[name]
                world.insist_at(site, launch)
        fio.terminate()
        _, errors = fio.communicate(timeout=WAIT_SECONDS)
        told = _json((world.base / "verified").read_text())["jobs"][0]
        self.assertEqual(told["error"], 0, f"{told}{errors}{world.logs()}")
        self.assertNotIn("verify", errors)
        # What is read is read to be verified.
        self.assertGreater(told["read"]["total_ios"], WRITES_PER_SECOND)
        client.terminate()
        _, errors = client.communicate(timeout=WAIT_SECONDS)
        self.assertIn("error", errors, "the client never lost its connection")
        world.settle()
