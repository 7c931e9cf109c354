"""The link between real sites: cut at any byte, delayed, half open, pulled, moved; under load."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

from twisted.trial.unittest import SkipTest, TestCase

from tests.integration.lab import WAIT_SECONDS, console_script, draw_seed, in_thread
from tests.integration.order import Layout, check
from tests.integration.proxy import REFUSE, SWALLOW, Proxy
from tests.integration.world import World, need, need_root

LDSUS = 2
SLOTS = 1024
#: So few that no outage here fills a writelog.
WRITES_PER_SECOND = 200
LAYOUT = Layout(LDSUS, SLOTS)
#: The deadlines of qdsmirror.limits, for a test that does not wait for long; but a busy machine
#: must have shaken hands by then, and found the time for a ping.
QUICK = """
from qdsmirror import limits
limits.PING_SECONDS = 0.5
limits.SILENT_PEER_SECONDS = 5.0
limits.HANDSHAKE_SECONDS = 6.0
limits.HELLO_SECONDS = 2.5
"""
#: A handshake and the first frames take about so many bytes, both ways.
SESSION_BYTES = 12_000
CUTS = 40
#: Attempts while every connection is ended at once; pauses double from RECONNECT_SECONDS_MIN.
REFUSED = 5
NETWORK = "10.77.76"


class LinkWorld(World):
    """A lab with a writer."""

    def __init__(self, test: TestCase) -> None:
        super().__init__(
            test, "--ldsus", str(LDSUS), "--size", "4M", "--writelog", "16M", "--journal", "6M"
        )
        self.create()
        self.customise(QUICK)
        self._writer: subprocess.Popen[str] | None = None

    def port(self) -> int:
        """Give the rmd's port."""
        lines = self.config("secondary").read_text().splitlines()
        return int(next(line.split("=")[1] for line in lines if line.startswith("port =")))

    def write(self) -> None:
        """Start the writer."""
        module = [console_script("python"), "-m", "tests.integration.writer"]
        socket = str(self.primary / "run" / "dsgrp000.nbd")
        names = [f"qds{index}" for index in range(LDSUS)]
        options = ["--slots", str(SLOTS), "--rate", str(WRITES_PER_SECOND)]
        self._writer = self.start_program([*module, socket, *names, *options])

    def end(self) -> None:
        """End the writer, and check that each of its writes is there, at both sites, once."""
        assert self._writer is not None
        output, errors = self._writer.communicate(timeout=WAIT_SECONDS)
        self.test.assertEqual(self._writer.returncode, 0, f"{output}{errors}{self.logs()}")
        self.test.assertIn('"reconnects": 0', output, "the application noticed")
        self.settle()
        number = check([path.read_bytes() for path in self.images("secondary")], LAYOUT)
        self.test.assertIn(f'"writes": {number},', output)

    def gsn(self, which: str) -> int:
        return int(self.info()["gsn"][which] or 0)

    def goes_on(self) -> None:
        """Wait until more is committed at the secondary than was written before."""
        written = self.gsn("written")
        self.until(lambda: self.gsn("committed") > written, "more to be committed")

    def accumulates(self) -> None:
        """Wait until the link is known to be gone, and writes go on nevertheless."""
        self.until(lambda: self.info()["state"] == "accumulating", "the loss to be seen")
        written = self.gsn("written")
        self.until(lambda: self.gsn("written") > written, "more to be written")
        self.test.assertLess(self.gsn("committed"), self.gsn("written"))


class ProxyTests(TestCase):
    timeout = 1200
    statistics = False

    def setUp(self) -> None:
        self.random = random.Random(draw_seed(self))

    def start(self, *tunables: str) -> tuple[LinkWorld, Proxy]:
        world = LinkWorld(self)
        port = world.port()
        proxy = Proxy(self, port)
        world.edit(world.config("primary"), f"port = {port}", f"port = {proxy.port}")
        if tunables:
            world.edit(
                world.config("primary"), "[ldsus]", "\n".join(["[tunables]", *tunables, "[ldsus]"])
            )
        world.start()
        return world, proxy

    @in_thread
    def test_cut_anywhere(self) -> None:
        """Cut in mid-stream, in the handshake and behind it; the last piece is truncated."""
        world, proxy = self.start("reconnect_max = 0.1")
        world.write()
        world.goes_on()
        steps = range(1, SESSION_BYTES, SESSION_BYTES // (CUTS // 2))
        anywhere = [self.random.randrange(1, 300_000) for _ in range(CUTS // 2)]
        for budget in self.random.sample([*steps, *anywhere], CUTS):
            before = len(proxy.made)
            proxy.delay = self.random.choice((0.0, 0.0, 0.002))
            proxy.budget = budget
            world.until(lambda: proxy.budget is None, f"a cut after {budget} bytes")
            world.until(lambda b=before: len(proxy.made) > b, "another connection")
        proxy.delay = 0.0
        world.goes_on()
        world.end()
        # Each cut ends one connection; one more may have been refused while the rmd was busy.
        self.assertLess(len(proxy.made), 3 * CUTS)

    @in_thread
    def test_half_open(self) -> None:
        """What is sent vanishes, and nobody is told: the silent peer is given up, on both sides."""
        world, proxy = self.start("reconnect_max = 0.5")
        world.write()
        world.goes_on()
        proxy.mode = SWALLOW
        world.accumulates()
        # The reason now may be another one already, of the next attempt.
        world.logged("qdspmd", "silent")
        world.until(lambda: world.info("secondary")["state"] == "accumulating", "the rmd to see it")
        # The next ones come to nothing too, in the handshake.
        made = len(proxy.made)
        world.until(lambda: len(proxy.made) >= made + 2, "two more attempts")
        proxy.mode = "pass"
        proxy.cut()
        world.wait("connected")
        world.goes_on()
        world.end()

    @in_thread
    def test_no_storm_of_attempts(self) -> None:
        """The pauses between attempts double."""
        world, proxy = self.start()
        world.write()
        world.goes_on()
        proxy.mode = REFUSE
        del proxy.made[:]
        proxy.cut()
        world.until(lambda: len(proxy.made) >= REFUSED, "attempts")
        proxy.mode = "pass"
        made = proxy.made[:REFUSED]
        for number, (one, other) in enumerate(zip(made, made[1:], strict=False)):
            self.assertGreater(other - one, 0.1 * 2**number, made)
        world.wait("connected")
        world.end()


class Space:
    """A network namespace with one end of a cable.

    :param number: 1 or 2; its address ends in it.
    """

    def __init__(self, test: TestCase, number: int) -> None:
        self.name = f"ql{os.getpid()}n{number}"
        self.link = f"ql{number}"
        if subprocess.run(["ip", "netns", "add", self.name], check=False).returncode != 0:
            raise SkipTest("network namespaces are not permitted")
        test.addCleanup(subprocess.run, ["ip", "netns", "del", self.name], check=True)
        files = Path("/etc/netns", self.name)
        files.mkdir(parents=True)
        test.addCleanup(shutil.rmtree, files)
        self.hosts = files / "hosts"
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", "-n", self.name, *arguments], check=True)

    def address(self, number: int, change: str = "add") -> None:
        self.ip("address", change, f"{NETWORK}.{number}/24", "dev", self.link)


class CableTests(TestCase):
    timeout = 1200
    statistics = False

    def connect(self) -> tuple[Space, Space]:
        need_root()
        need("ip")
        near, far = Space(self, 1), Space(self, 2)
        near.ip(
            *("link", "add", near.link, "type", "veth"),
            *("peer", "name", far.link, "netns", far.name),
        )
        for number, space in enumerate((near, far), 1):
            space.address(number)
            space.ip("link", "set", space.link, "up")
        return near, far

    @in_thread
    def test_cable_route_and_address(self) -> None:
        """The cable is pulled, the route leads nowhere, the secondary moves: each is got over."""
        near, far = self.connect()
        near.hosts.write_text(f"{NETWORK}.2 secondary.test\n")
        far.hosts.write_text("")
        world = LinkWorld(self)
        config = world.config("primary")
        world.edit(
            config, "host = secondary\naddress = 127.0.0.1",
            "host = secondary\naddress = secondary.test",
        )  # fmt: skip
        world.start_in(near.name, far.name)
        world.at("primary", "qdsrefresh", "--full")
        world.wait("coherent")
        world.write()
        world.goes_on()

        near.ip("link", "set", near.link, "down")
        world.accumulates()
        world.until(lambda: "does not answer" in world.info()["reason"], "an attempt in vain")
        near.ip("link", "set", near.link, "up")
        world.goes_on()

        near.ip("route", "add", "blackhole", f"{NETWORK}.2/32")
        world.accumulates()
        near.ip("route", "del", "blackhole", f"{NETWORK}.2/32")
        world.goes_on()

        far.address(2, "del")
        far.address(3)
        world.accumulates()
        near.hosts.write_text(f"{NETWORK}.3 secondary.test\n")
        world.goes_on()
        world.end()
