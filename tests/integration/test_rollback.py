"""A refresh that is interrupted for good, with real daemons: rolled back, and refreshed anew."""

from __future__ import annotations

import json
import random

from twisted.trial.unittest import TestCase

from qdsmirror.config import load_group
from qdsmirror.errors import EXIT_BROKEN, EXIT_DEGRADED, EXIT_USAGE
from qdsmirror.paths import Paths
from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import in_thread
from tests.integration.proxy import Proxy
from tests.integration.world import World

SIZE = 32 << 20
BLOCK = 64 << 10
#: Of each piece of 64 KiB: a refresh takes half a minute then.
DELAY_SECONDS = 0.05


class RollbackTests(TestCase):
    timeout = 1200
    statistics = False

    def begin(self, *options: str) -> World:
        self.source = random.Random(5)
        world = self.world = World(
            self, "--size", "32M", "--ldsus", "2", "--journal", "96M", *options
        )
        world.create()
        port = load_group(Paths.of(world.primary), 0).port
        self.proxy = Proxy(self, port)
        world.edit(world.config("primary"), f"port = {port}", f"port = {self.proxy.port}")
        world.start()
        return world

    def write_some(self, count: int) -> None:
        for name in ("qds0", "qds1"):
            with self.world.until(
                lambda n=name: NbdClient.connect(self.world.uri(n)), "a driver"
            ) as c:  # type: ignore[misc]  # noqa: E501
                for _ in range(count):
                    at = self.source.randrange(SIZE // BLOCK) * BLOCK
                    c.write(at, self.source.randbytes(BLOCK))

    def mirrors(self) -> list[bytes]:
        names = ("qds0.mirror", "qds1.mirror")
        return [self.world.device("secondary", name).read_bytes() for name in names]

    def change_behind_the_mirror(self) -> None:
        """Change much of the data devices while the secondary is away, past the writelogs."""
        world = self.world
        world.stop("secondary")
        world.at("primary", "qdsbypass", "on")
        self.write_some(200)

    def interrupt_a_refresh(self) -> None:
        """Let a refresh change the mirror, and kill both sites in the middle of it."""
        world = self.world
        world.start("secondary")
        self.go_slowly()
        world.at("primary", "launchrefresh", "--full")
        self.write_some(20)

        def is_under_way() -> bool:
            kept = world.info("secondary")["before_images"]
            return bool(kept and kept["used_bytes"] > 1 << 20)

        world.until(is_under_way, "the refresh to change the mirror")
        self.kill_the_link()

    def go_slowly(self) -> None:
        """Have what is sent take its time: it passes through this process, as the kills do."""
        self.proxy.delay = DELAY_SECONDS

    def kill_the_link(self) -> None:
        """Kill both ends of it, in the middle of what they do."""
        self.world.kill_together("qdspmd", "dsgrp000.pmd", "qdsrmd", "dsgrp000.rmd")
        self.proxy.delay = 0.0

    @in_thread
    def test_back_to_the_last_coherent_state_and_mended(self) -> None:
        world = self.begin()
        self.write_some(60)
        world.settle()
        told = world.info("secondary")["before_images"]
        self.assertEqual((told["state"], told["rollback_gsn"]), ("ready", None))
        self.assertGreater(told["size"], 40 << 20)
        then = self.mirrors()
        self.change_behind_the_mirror()
        self.interrupt_a_refresh()
        recover = ("secondary", "qdsrmdreco")
        self.assertNotEqual(self.mirrors(), then)
        self.assertEqual(world.ask(*recover, "--rollback").returncode, EXIT_USAGE)
        would = json.loads(world.at(*recover, "--rollback", "--dry-run", "--json"))["groups"][0]
        self.assertNotEqual(self.mirrors(), then)
        done = json.loads(world.at(*recover, "--rollback", "--yes", "--json"))["groups"][0]
        self.assertEqual(
            (would["would_roll_back_to"], would["would_restore_bytes"]),
            (done["gsn"], done["restored_bytes"]),
        )
        self.assertTrue(done["coherent"])
        self.assertGreater(done["restored_bytes"], 1 << 20)
        self.assertTrue(self.mirrors() == then, "not what it was")
        again = world.ask(*recover, "--rollback", "--yes")
        self.assertEqual(again.returncode, EXIT_DEGRADED)
        self.assertIn("nothing to roll back", again.stderr)
        # The primary is told, and makes the mirror anew.
        world.start()
        world.wait("coherent", 120)
        world.settle()
        self.assertNotEqual(self.mirrors(), then)

    @in_thread
    def test_refused_where_it_was_given_up(self) -> None:
        world = self.begin()
        world.edit_both("[ldsus]", "[tunables]\nbefore_image_bytes = 1M\n[ldsus]")
        world.stop("secondary")
        world.start("secondary")
        self.write_some(60)
        world.settle()
        world.at("primary", "qdsrefresh", "--full")
        self.change_behind_the_mirror()
        world.start("secondary")
        self.go_slowly()
        world.at("primary", "launchrefresh", "--full")

        def is_given_up() -> bool:
            kept = world.info("secondary")["before_images"]
            return bool(kept and kept["state"] == "given-up")

        world.until(is_given_up, "rolling back to be given up")
        self.assertIn("cannot be rolled back any more", str(world.info("secondary")["errors"]))
        self.kill_the_link()
        refused = world.ask("secondary", "qdsrmdreco", "--rollback", "--yes")
        self.assertEqual(refused.returncode, EXIT_BROKEN)
        self.assertIn("used up", refused.stderr)
        world.start()
        world.wait("coherent", 120)
        world.settle()
