"""Several network paths and compression between real sites: cut, hung, pulled and plugged in."""

from __future__ import annotations

import random
import subprocess
from typing import Any

from twisted.trial.unittest import TestCase

from tests.integration.lab import draw_seed, in_thread
from tests.integration.proxy import PASS, SWALLOW, Proxy
from tests.integration.test_link_faults import LinkWorld, Space
from tests.integration.world import need, need_root

CUTS = 12
NETWORK = "10.77"
#: Of each cable, bytes (10^6) per second.
RATE = 20
#: A path that hangs is given up soon, but none whose process has to wait for its turn.
SOON = """
from qdsmirror import limits
limits.PING_SECONDS = 1.0
limits.SILENT_PEER_SECONDS = 10.0
"""


class PathWorld(LinkWorld):
    """A lab with a writer whose group has several paths."""

    def __init__(self, test: TestCase) -> None:
        super().__init__(test)
        self.customise(SOON)

    def have_paths(self, *paths: str, compression: str = "none") -> None:
        """Give the primary its paths, and a compression."""
        tunables = f"[tunables]\nreconnect_max = 0.5\ncompression = {compression}\n[ldsus]"
        config = self.config("primary")
        self.edit(config, "[ldsus]", f"paths = {', '.join(paths)}\n{tunables}")

    def wire(self, site: str = "primary") -> dict[str, Any]:
        found: dict[str, Any] = self.info(site)["wire"]
        return found

    def states(self) -> list[str]:
        """Give the paths' states, in their order."""
        return [path["state"] for path in self.wire()["paths"]]

    def all_up(self) -> None:
        self.until(lambda: set(self.states()) == {"connected"}, "all paths")

    def down(self, number: int) -> None:
        """Wait until one path is known to be gone; the group stays connected."""
        self.until(lambda: self.states()[number] != "connected", "the loss to be seen")
        self.test.assertIn("connected", self.states())
        self.test.assertEqual(self.info()["state"], "connected")


class ProxyTests(TestCase):
    timeout = 1200
    statistics = False

    def setUp(self) -> None:
        self.random = random.Random(draw_seed(self))

    def start(self, compression: str = "none") -> tuple[PathWorld, list[Proxy]]:
        world = PathWorld(self)
        proxies = [Proxy(self, world.port()) for _ in range(2)]
        ways = [f"127.0.0.1>127.0.0.1:{proxy.port}" for proxy in proxies]
        world.have_paths(*ways, compression=compression)
        world.start()
        world.all_up()
        return world, proxies

    @in_thread
    def test_paths_are_cut_anywhere_and_the_group_stays_connected(self) -> None:
        world, proxies = self.start("zstd:3")
        since = world.info()["since"]
        world.write()
        world.goes_on()
        for _ in range(CUTS):
            proxy = self.random.choice(proxies)
            before = len(proxy.made)
            proxy.budget = self.random.randrange(1, 100_000)
            world.until(lambda one=proxy: one.budget is None, "a cut")
            world.until(lambda one=proxy, count=before: len(one.made) > count, "another connection")
            world.all_up()
        world.goes_on()
        self.assertEqual(world.info()["since"], since)
        wire = world.wire()
        self.assertEqual(wire["compression"], "zstd:3")
        self.assertLess(wire["wire_bytes"], wire["frame_bytes"])
        world.end()
        self.assertEqual(world.wire("secondary")["compression"], "zstd")

    @in_thread
    def test_a_path_that_hangs_holds_nothing_up(self) -> None:
        """Nobody is told; what was on its way goes over the other path before it is given up."""
        world, proxies = self.start()
        world.write()
        for proxy in proxies:
            world.goes_on()
            proxy.mode = SWALLOW
            world.goes_on()
            world.down(proxies.index(proxy))
            world.goes_on()
            proxy.mode = PASS
            proxy.cut()
            world.all_up()
        world.end()

    @in_thread
    def test_daemons_are_killed(self) -> None:
        world, _ = self.start("lz4")
        world.write()
        for name in ("dsgrp000.pmd", "dsgrp000.rmd", "qdspmd", "dsgrp000.pmd"):
            world.goes_on()
            world.kill(name)
            if name == "qdspmd":
                world.insist_at("primary", "launchpmds")
            world.goes_on()
            world.all_up()
        world.end()


class CableTests(TestCase):
    timeout = 1200
    statistics = False

    def connect(self) -> tuple[Space, Space]:
        """Make two namespaces with two narrow cables between them."""
        need_root()
        need("ip", "tc")
        near, far = Space(self, 1), Space(self, 2)
        for cable in (1, 2):
            ends = [f"qp{cable}a", f"qp{cable}b"]
            near.ip(
                *("link", "add", ends[0], "type", "veth"),
                *("peer", "name", ends[1], "netns", far.name),
            )
            for number, (space, link) in enumerate(zip((near, far), ends, strict=True), 1):
                space.ip("address", "add", f"{NETWORK}.{80 + cable}.{number}/24", "dev", link)
                space.ip("link", "set", link, "up")
                shape = ["tbf", "rate", f"{RATE * 10**6}bps", "burst", "256kb", "latency", "50ms"]
                subprocess.run(
                    ["tc", "-n", space.name, "qdisc", "add", "dev", link, "root", *shape],
                    check=True,
                )
        return near, far

    @in_thread
    def test_a_cable_is_pulled_while_both_are_full(self) -> None:
        near, far = self.connect()
        for space in (near, far):
            space.hosts.write_text("")
        world = PathWorld(self)
        ways = [f"{NETWORK}.{80 + cable}.1>{NETWORK}.{80 + cable}.2" for cable in (1, 2)]
        world.have_paths(*ways)
        world.start_in(near.name, far.name)
        # A path that joins behind the refresh would have nothing to carry of it.
        world.all_up()
        world.at("primary", "qdsrefresh", "--full")
        world.all_up()
        sent = [path["sent_bytes"] for path in world.wire()["paths"]]
        self.assertGreater(min(sent), 0)
        world.write()
        for cable in (0, 1):
            link = f"qp{cable + 1}a"
            # A refresh fills both; in the middle of it one is pulled.
            world.at("primary", "launchrefresh", "--full")
            near.ip("link", "set", link, "down")
            world.wait("coherent")
            world.goes_on()
            world.down(cable)
            near.ip("link", "set", link, "up")
            world.all_up()
        world.end()
