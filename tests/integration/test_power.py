"""Power cuts under load, with disks that lose or tear what no fsync has covered.

Each test prints its seed; ``QDS_SEED`` sets it.
"""

from __future__ import annotations

import random
import time

from twisted.trial.unittest import TestCase

from tests.integration.lab import draw_seed, in_thread
from tests.integration.order import Layout
from tests.integration.power import Application, PowerWorld

LDSUS = 3
SIZE = 4 << 20
LAYOUT = Layout(LDSUS, SIZE // 4096)
BOTH = ("primary", "secondary")
ROUNDS = (("primary",), ("secondary",), BOTH) * 2
#: How likely an unsynced write is on the platter: never, in part, nearly always.
KEEPS = (0.0, 0.0, 0.5, 0.9)
#: What was promised by the time of a cut, at least: else there was no load.
PROMISES_MIN = 50


class PowerTests(TestCase):
    timeout = 1200
    statistics = False

    keeps: tuple[float, ...] = KEEPS

    def setUp(self) -> None:
        self.random = random.Random(draw_seed(self))

    def start(self, durability: str = "flush", *options: str) -> PowerWorld:
        sizes = ("--size", "4M", "--writelog", "4M", "--journal", "6M")
        world = PowerWorld(self, "--ldsus", str(LDSUS), *sizes, *options)
        world.create()
        world.edit_both("operation = async", f"operation = async\ndurability = {durability}")
        world.start()
        return world

    def load(self, world: PowerWorld, application: Application) -> None:
        """Let the application write for a while."""
        world.until(lambda: application.promises() >= PROMISES_MIN, "promises")
        time.sleep(self.random.uniform(0.1, 1.0))

    def cut(self, world: PowerWorld, sites: tuple[str, ...]) -> int:
        return world.cut(sites, self.random.randrange(1 << 32), self.random.choice(self.keeps))

    def cut_secondary(self, world: PowerWorld, application: Application) -> None:
        """Cut the secondary alone: the application notices nothing."""
        self.cut(world, ("secondary",))
        time.sleep(self.random.uniform(0.0, 0.5))
        world.power_on("secondary")
        application.check_prefix(world.recovered_mirrors())
        world.start("secondary")
        self.load(world, application)

    def cut_primary(
        self, world: PowerWorld, application: Application, sites: tuple[str, ...]
    ) -> None:
        """Cut the primary, and perhaps the secondary: the application dies with its host."""
        self.cut(world, sites)
        application.die()
        if "secondary" in sites:
            world.power_on("secondary")
        else:
            world.kill("qdsrmd")
            world.until_gone("secondary")
        mirrors = world.recovered_mirrors()
        application.check_prefix(mirrors)
        world.power_on("primary")
        world.launch_driver()
        images = world.read_exports(LDSUS, SIZE)
        application.check_durable(images)
        application.check_not_ahead(mirrors, images)
        world.start("secondary")
        world.start("primary")
        application.advance()
        application.begin(images)
        self.load(world, application)

    def end(self, world: PowerWorld, application: Application) -> None:
        """Let everything drain, stop in order, and cut the power of what stands still."""
        report = application.end()
        world.settle()
        last = report["writes"]
        self.assertEqual(application.check_prefix(world.read_exports(LDSUS, SIZE)), last)
        world.stop()
        world.cut(BOTH, 1, 0.0)
        for site in BOTH:
            world.power_on(site)
        for data, mirror in zip(world.images("primary"), world.images("secondary"), strict=True):
            self.assertTrue(data.read_bytes() == mirror.read_bytes(), f"{data} {mirror}")
        mirrors = [path.read_bytes() for path in world.images("secondary")]
        self.assertEqual(application.check_prefix(mirrors), last)

    def cut_in_turn(
        self, durability: str, rounds: tuple[tuple[str, ...], ...], *options: str
    ) -> None:
        world = self.start(durability, *options)
        application = Application(world, LAYOUT, durability == "always")
        application.begin()
        self.load(world, application)
        for sites in self.random.sample(rounds, len(rounds)):
            if "primary" in sites:
                self.cut_primary(world, application, sites)
            else:
                self.cut_secondary(world, application)
        self.end(world, application)

    @in_thread
    def test_cuts_in_turn_under_load(self) -> None:
        """Nothing that was promised is lost, the mirror is a prefix, in the end all is equal."""
        self.cut_in_turn("flush", ROUNDS)

    @in_thread
    def test_writelogs_in_memory(self) -> None:
        """What is synced is there, the mirror an older prefix; a dirty refresh makes it equal.

        (Unsynced writes are lost as a whole here: nothing replays what a cut has torn.)
        """
        self.keeps = (0.0,)
        self.cut_in_turn("flush", (("primary",), BOTH, ("primary",)), "--memory")

    @in_thread
    def test_always_durable(self) -> None:
        """With ``durability = always`` every answer is a promise."""
        self.cut_in_turn("always", (("primary",), BOTH))

    @in_thread
    def test_disks_that_lie_are_found_out(self) -> None:
        """The test of the test: with syncs that do nothing, writes are lost, and it is noticed."""
        world = self.start()
        for site in BOTH:
            world.tell_disks(site, "lie")
        application = Application(world, LAYOUT)
        application.begin()
        self.load(world, application)
        mirrors = [path.read_bytes() for path in world.images("secondary")]
        self.assertGreater(world.cut(("secondary",), 1, 0.0), 0)
        world.power_on("secondary")
        world.at("secondary", "launchrmds")

        def refused() -> bool:
            info = world.info()
            return info["pmd"]["state"] == "refused" and "lost" in info["reason"]

        world.until(refused, "the refusal")
        self.assertGreater(world.cut(("primary",), 1, 0.0), 0)
        application.die()
        world.power_on("primary")
        world.launch_driver()
        images = world.read_exports(LDSUS, SIZE)
        self.assertRaises(self.failureException, application.check_durable, images)
        self.assertRaises(self.failureException, application.check_not_ahead, mirrors, images)
