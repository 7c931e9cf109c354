"""A smart refresh with real daemons: sends what differs, while they are killed and writes go on."""

from __future__ import annotations

import json
import random

from twisted.trial.unittest import TestCase

from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import in_thread
from tests.integration.world import World

SIZE = 128 << 20
PIECE = 64 << 10


class SmartRefreshTests(TestCase):
    timeout = 1200
    statistics = False

    def start(self) -> World:
        world = World(self, "--size", "128M", "--writelog", "16M", "--journal", "32M")
        world.create()
        # Content that the first mirror has to carry.
        content = random.Random(1).randbytes(SIZE // 4)
        with world.device("primary", "qds0.data").open("r+b") as device:
            device.write(content)
        world.start()
        return world

    def change(self, world: World, pieces: int) -> None:
        """Write scattered pieces in bypass."""
        world.at("primary", "qdsbypass", "on")
        source = random.Random(2)
        with NbdClient.connect(world.uri()) as client:
            for piece in source.sample(range(SIZE // PIECE), pieces):
                client.write(piece * PIECE, source.randbytes(PIECE))
            client.flush()

    def assert_equal(self, world: World) -> None:
        world.settle()
        primary = world.device("primary", "qds0.data").read_bytes()
        self.assertTrue(primary == world.device("secondary", "qds0.mirror").read_bytes())
        world.at("primary", "qdsinfo", "--is", "coherent")

    @in_thread
    def test_sends_what_differs(self) -> None:
        world = self.start()
        self.change(world, 20)
        before = world.info()["gsn"]["written"]
        told = json.loads(world.at("primary", "qdsrefresh", "--smart", "--json"))
        self.assertEqual(told["groups"][0]["kind"], "smart")
        # A frame for each piece, the marks, and what tells the state of things.
        self.assertLess(world.info()["gsn"]["written"] - before, 40)
        self.assert_equal(world)

    @in_thread
    def test_killed_again_and_again_under_load(self) -> None:
        world = self.start()
        source = random.Random(3)
        for victim in ("dsgrp000.rmd", "dsgrp000.driver", "dsgrp000.pmd", "dsgrp000.driver"):
            self.change(world, 200)
            told = json.loads(world.at("primary", "launchrefresh", "--smart", "--json"))
            killed = world.kill(victim)
            world.until(lambda v=victim, k=killed: world.pid(v) not in (None, k), "another")
            info = world.info()
            if info["refresh"] is not None:
                self.assertEqual(info["refresh"]["id"], told["groups"][0]["id"])
            with world.until(lambda: NbdClient.connect(world.uri()), "the driver") as client:
                for _ in range(50):
                    client.write(source.randrange(SIZE // 4096) * 4096, source.randbytes(4096))
            world.wait("coherent", 60)
        self.assert_equal(world)
