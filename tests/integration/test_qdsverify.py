"""qdsverify with real daemons: a client that writes, a mirror that somebody has changed, kills."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import WAIT_SECONDS, in_thread
from tests.integration.world import World, need

SIZE = 64 << 20
CHUNK = 64 << 10
#: For a command that waits for the end of a verify: beside an application that may take long.
VERIFY_SECONDS = 300.0


class VerifyCommandTests(TestCase):
    timeout = 1200
    statistics = False

    def start(self, *tunables: str) -> World:
        world = World(self, "--size", "64M", "--writelog", "16M", "--journal", "32M")
        world.create()
        world.edit_both("[ldsus]", "\n".join(["[tunables]", *tunables, "[ldsus]"]))
        content = random.Random(1).randbytes(SIZE // 2)
        with world.device("primary", "qds0.data").open("r+b") as device:
            device.write(content)
        world.start()
        return world

    def damage(self, world: World, offset: int) -> None:
        """Flip a byte of the mirror behind everybody's back."""
        with world.device("secondary", "qds0.mirror").open("r+b") as device:
            device.seek(offset)
            was = device.read(1)
            device.seek(offset)
            device.write(bytes([was[0] ^ 1]))

    def verify(self, world: World, code: int, *how: str) -> Any:
        done = world.ask("primary", "qdsverify", "--json", *how, seconds=VERIFY_SECONDS)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return json.loads(done.stdout)["groups"][0]

    def assert_equal(self, world: World) -> None:
        world.settle()
        primary = world.device("primary", "qds0.data").read_bytes()
        self.assertTrue(primary == world.device("secondary", "qds0.mirror").read_bytes())
        for site in ("primary", "secondary"):
            world.at(site, "qdsinfo", "--is", "coherent")

    @in_thread
    def test_no_false_alarm_under_load_and_each_difference_found_and_mended(self) -> None:
        need("fio")
        world = self.start("verify_rate = 16M")
        if "nbd" not in world.ended("fio", "--enghelp").stdout.split():
            self.skipTest("fio has no nbd engine")
        load = world.start_program(
            ["fio", "--name=load", "--ioengine=nbd", f"--uri={world.uri()}", "--rw=randwrite"]
            + ["--bs=4k", "--size=48M", "--iodepth=8", "--rate_iops=400", "--time_based"]
            + ["--runtime=10000", "--fsync=64"],
            output=world.base / "fio.out",
        )
        found = self.verify(world, 0)
        self.assertEqual((found["result"], found["done_bytes"]), ("equal", SIZE))
        # fio leaves the end of the LDSU alone.
        self.damage(world, 50 * 1024 * 1024 + 77)
        self.damage(world, SIZE - 1)
        ranges = [
            {"ldsu": "qds0", "offset": 50 << 20, "length": CHUNK},
            {"ldsu": "qds0", "offset": SIZE - CHUNK, "length": CHUNK},
        ]
        found = self.verify(world, 4)
        self.assertEqual((found["differing"], found["differing_bytes"]), (ranges, 2 * CHUNK))
        for site in ("primary", "secondary"):
            self.assertEqual(world.ask(site, "qdsinfo", "--is", "coherent").returncode, 3)
        said = world.ask("primary", "qdsverify", seconds=VERIFY_SECONDS)
        self.assertEqual(said.returncode, 4)
        self.assertIn("dsgrp000: qds0: bytes 52428800 to 52494335 differ", said.stdout)
        self.assertIn("qdsverify --repair -g 0", said.stderr)
        mended = self.verify(world, 0, "--repair")
        self.assertEqual((mended["result"], mended["repaired_bytes"]), ("equal", 2 * CHUNK))
        self.assertIsNone(load.poll(), "fio has ended")
        load.terminate()
        load.wait(WAIT_SECONDS)
        self.assert_equal(world)

    @in_thread
    def test_killed_again_and_again(self) -> None:
        # So slow that it ends after all of this, however long that takes.
        world = self.start("verify_rate = 512K")
        # A replay of what made the mirror would mend the damage.
        world.until(lambda: not world.info("secondary")["journal"]["used_bytes"], "a checkpoint")
        self.damage(world, SIZE - 5)
        ended: list[Any] = []
        command = threading.Thread(
            target=lambda: ended.append(
                world.ask("primary", "qdsverify", "--json", seconds=VERIFY_SECONDS)
            ),
            daemon=True,
        )
        command.start()
        begun = world.until(lambda: world.info()["verify"], "the verify")
        source = random.Random(3)
        for victim in ("dsgrp000.rmd", "dsgrp000.driver", "dsgrp000.pmd"):
            before = world.info()["verify"]["done_bytes"]
            world.until(
                lambda b=before: (world.info()["verify"] or {"done_bytes": 0})["done_bytes"] > b,
                "progress",
            )
            killed = world.kill(victim)
            world.until(lambda v=victim, k=killed: world.pid(v) not in (None, k), "another")
            with world.until(lambda: NbdClient.connect(world.uri()), "the driver") as client:
                for _ in range(20):
                    client.write(source.randrange(SIZE // 8192) * 4096, source.randbytes(4096))
        world.at("primary", "qdsset", "verify_rate=1G")
        command.join(VERIFY_SECONDS)
        self.assertEqual(ended[0].returncode, 4, ended[0].stderr)
        found = json.loads(ended[0].stdout)["groups"][0]
        self.assertEqual(found["id"], begun["id"])
        self.assertEqual(
            found["differing"], [{"ldsu": "qds0", "offset": SIZE - CHUNK, "length": CHUNK}]
        )
        self.assertEqual(self.verify(world, 0, "--repair")["repaired_bytes"], CHUNK)
        self.assert_equal(world)

    @in_thread
    def test_scheduled(self) -> None:
        world = self.start("verify_every = 2 s", "verify_rate = 1G")

        def ended(after: float = 0.0) -> Any:
            # The next one may have begun by the time of another look.
            found = world.info()["verify"] or {}
            return found if (found.get("finished") or 0.0) > after else None

        first = world.until(ended, "a verify")
        self.assertEqual(first["result"], "equal")
        another = world.until(lambda: ended(first["finished"]), "another")
        self.assertEqual(another["result"], "equal")
        self.damage(world, 123)
        world.until(lambda: world.info()["verify"]["result"] == "differs", "the difference")
        world.at("primary", "qdsrefresh")
        self.assert_equal(world)
