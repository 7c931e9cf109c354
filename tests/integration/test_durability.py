"""What was answered is there after kill -9; one group's trouble is no other's; a full log waits."""

from __future__ import annotations

import os
import random
import subprocess

from twisted.trial.unittest import TestCase

from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import WAIT_SECONDS, console_script, in_thread
from tests.integration.world import World, need, pattern_file

SIZE = 8 << 20
BLOCK = 4096
BROKEN = 4
#: Some 50 ms apart.
LOOKS = 20


class DurabilityTests(TestCase):
    timeout = 1200
    statistics = False

    def start(self, *options: str, durability: str = "flush") -> World:
        world = World(self, "--size", "8M", "--journal", "8M", *options)
        world.create()
        if durability != "flush":
            world.edit_both("operation = async", f"operation = async\ndurability = {durability}")
        world.start()
        return world

    def connect(self, world: World) -> NbdClient:
        """Connect as soon as the driver serves again."""
        return world.until(lambda: NbdClient.connect(world.uri()), "the driver to serve")  # type: ignore[no-any-return]

    def answered_survives(self, durability: str) -> None:
        """Kill the driver's child right after an answer, a few times."""
        world = self.start("--writelog", "4M", durability=durability)
        source = random.Random(11)
        model = bytearray(SIZE)
        for _ in range(4):
            with self.connect(world) as client:
                for _ in range(source.randrange(20, 120)):
                    length = BLOCK * source.randrange(1, 9)
                    offset = BLOCK * source.randrange((SIZE - length) // BLOCK)
                    data = source.randbytes(length)
                    client.write(offset, data)
                    model[offset : offset + length] = data
                victim = world.kill("dsgrp000.driver")
            world.until(
                lambda victim=victim: world.pid("dsgrp000.driver") not in (None, victim),
                "another driver",
            )
            with self.connect(world) as client:
                for offset in range(0, SIZE, 1 << 20):
                    self.assertEqual(client.read(offset, 1 << 20), model[offset:][: 1 << 20])
        world.settle()
        self.assertEqual(world.device("secondary", "qds0.mirror").read_bytes(), model)

    @in_thread
    def test_answered_writes_survive_a_kill(self) -> None:
        self.answered_survives("flush")

    @in_thread
    def test_answered_writes_survive_a_kill_always_durable(self) -> None:
        self.answered_survives("always")

    @in_thread
    def test_fua_and_flush(self) -> None:
        """What was answered with FUA, or before a flush, or ever, is durable in the log by then."""
        for durability in ("flush", "always"):
            world = self.start("--writelog", "4M", durability=durability)
            world.stop("secondary")

            def durable(world: World = world) -> None:
                gsn = world.info()["gsn"]
                self.assertEqual(gsn["durable"], gsn["written"])

            # No program that flushes of its own accord when it ends.
            with self.connect(world) as client:
                client.write(0, b"\1" * BLOCK)
                if durability == "flush":
                    client.flush()
                durable()
                fua = durability == "flush"
                client.write(BLOCK, b"\2" * BLOCK, fua)
                durable()
                client.write(2 * BLOCK, b"\3" * (512 << 10), fua)
                durable()
                client.zeroes(1 << 20, BLOCK, fua)
                durable()
                world.kill("dsgrp000.driver")
            world.start("secondary")
            world.settle()
            mirror = world.device("secondary", "qds0.mirror").read_bytes()
            self.assertEqual(mirror[:BLOCK], b"\1" * BLOCK)
            self.assertEqual(mirror[BLOCK : 2 * BLOCK], b"\2" * BLOCK)
            self.assertEqual(mirror[2 * BLOCK : 130 * BLOCK], b"\3" * (128 * BLOCK))

    @in_thread
    def test_broken_group_leaves_the_other_alone(self) -> None:
        world = self.start("--writelog", "4M", "--groups", "3")
        world.qemu_io("write -P 7 0 1M", name="qds1", number=1)
        world.settle()
        world.stop()
        log = world.device("primary", "qds0.writelog")
        with open(log, "r+b") as file:
            file.write(os.urandom(256 << 10))
        missing = world.device("primary", "qds2.data")
        missing.rename(world.base / "away")
        done = world.ended(console_script("qdslab"), "start", str(world.directory))
        self.assertNotEqual(done.returncode, 0)
        self.assertIn(str(missing), done.stderr)
        (world.base / "away").rename(missing)

        world.at("secondary", "launchrmds")
        done = world.ask("primary", "launchdriver")
        self.assertEqual(done.returncode, BROKEN, done.stderr)
        self.assertIn(str(log), done.stderr)
        world.at("primary", "launchpmds")
        ended = world.ask("primary", "qdsinfo", "-g", "0", "--wait", "connected")
        self.assertEqual(ended.returncode, BROKEN, ended.stderr)
        self.assertIn(str(log), ended.stderr)
        for number in (1, 2):
            world.at("primary", "qdsinfo", "-g", str(number), "--wait", "connected")
        world.qemu_io("write -P 9 0 2M", "flush", name="qds1", number=1)
        world.qemu_io("write -P 8 0 2M", "flush", name="qds2", number=2)
        for number in (1, 2):
            world.at("primary", "qdsinfo", "-g", str(number), "--wait", "drained")
            data = world.device("primary", f"qds{number}.data").read_bytes()
            self.assertEqual(data, world.device("secondary", f"qds{number}.mirror").read_bytes())
            self.assertEqual(data[: 2 << 20], bytes([10 - number]) * (2 << 20))

    @in_thread
    def test_full_log_waits(self) -> None:
        """The secondary is gone: the log fills, writes wait; it is back: they go on."""
        need("nbdcopy")
        world = self.start("--writelog", "2M")
        world.stop("secondary")
        data = pattern_file(world.base / "source", SIZE, 5)
        writer = world.start_program(["nbdcopy", "--flush", "source", world.uri()])
        world.until(
            lambda: world.info()["ldsus"][0]["writelog"]["used_ratio"] > 0.5, "the log to fill"
        )
        seen: list[int] = []

        def stands_still() -> bool:
            # Nobody tells that a write waits: many looks find no progress.
            seen.append(world.info()["gsn"]["written"])
            return len(seen) >= LOOKS and len(set(seen[-LOOKS:])) == 1

        world.until(stands_still, "the writer to wait")
        self.assertIsNone(writer.poll())
        info = world.info()
        self.assertEqual(info["state"], "accumulating")
        self.assertGreater(info["lag"]["entries"], 0)
        self.assertLess(info["ldsus"][0]["writelog"]["used_bytes"], 2 << 20)
        world.start("secondary")
        try:
            _, errors = writer.communicate(timeout=WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.fail(f"the writer still waits\n{world.logs()}")
        self.assertEqual(writer.returncode, 0, errors)
        world.settle()
        self.assertEqual(world.device("secondary", "qds0.mirror").read_bytes(), data)
