"""What may not be connected is refused, with the reason at both ends; mended, it connects."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import time
from collections.abc import Generator
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.endpoints import HostnameEndpoint, connectProtocol, wrapClientTLS
from twisted.internet.protocol import ClientFactory
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from qdsmirror import pki
from qdsmirror.config import load_group, load_host, load_secret
from qdsmirror.core.clienthello import server_name_for
from qdsmirror.errors import MismatchError
from qdsmirror.net import handshake_primary
from qdsmirror.net.handshake import PrimaryHandshake, PrimaryOffer, UnitOffer
from qdsmirror.net.tls import client_options
from qdsmirror.paths import Paths
from tests.integration.lab import in_thread
from tests.integration.world import SITES, World, attempts

reactor: Any = _reactor

IDENTITY = 12
CONFIGURATION = 10
BROKEN = 4
#: Long enough to see a storm: a refused link is tried again after a minute only.
WATCH_SECONDS = 3.0
SMALL = ("--size", "2M", "--writelog", "2M", "--journal", "2M")


class RefusalTests(TestCase):
    """Each wrong thing, on either side."""

    timeout = 180

    def refused(
        self, world: World, number: int, code: int, reason: str, at_secondary: str = ""
    ) -> None:
        """A group is refused: both ends' qdsinfo and logs say why, and waiting ends at once."""
        reasons = {"primary": reason, "secondary": at_secondary or reason}
        for site, reason in reasons.items():
            begun = time.monotonic()
            done = world.ask(site, "qdsinfo", "-g", str(number), "--wait", "connected",
                             "--timeout", "60")  # fmt: skip
            told = (site, number, done.returncode, done.stderr, world.logs())
            self.assertEqual(done.returncode, code, told)
            self.assertIn(reason, done.stderr, told)
            self.assertLess(time.monotonic() - begun, 50, told)
            (group,) = [one for one in world.groups(site) if one["group"] == number]
            self.assertIn(reason, group["reason"], told)
        for daemon, reason in zip(("qdspmd", "qdsrmd"), reasons.values(), strict=True):
            lines = [
                line for line in world.log(daemon).splitlines() if f"dsgrp{number:03d}" in line
            ]
            self.assertTrue(any(reason in line for line in lines), (daemon, reason, world.logs()))

    def no_storm(self, world: World, *numbers: int) -> None:
        """In some seconds nobody tries again more than a time or two."""

        def tries() -> dict[int, int]:
            log = world.log("qdsrmd")
            return {
                n: attempts(log, rf"dsgrp{n:03d} secondary: handshake.*refused") for n in numbers
            }

        before = tries()
        time.sleep(WATCH_SECONDS)
        for number, count in tries().items():
            self.assertGreaterEqual(count, 1, number)
            self.assertLessEqual(count - before[number], 2, (number, world.logs()))

    def apply(self, world: World, *sites: str) -> None:
        # The primary last: it is told then that another attempt is worth while.
        for site in sites or reversed(SITES):
            world.at(site, "qdsconfigtool", "apply")

    def connected(self, world: World, number: int = 0) -> None:
        for site in SITES:
            world.at(site, "qdsinfo", "-g", str(number), "--wait", "connected", "--timeout", "60")

    @in_thread
    def test_groups(self) -> None:
        """Secret, mapping and size, of one group each; the other groups are not disturbed."""
        world = World(self, "--groups", "7", "--ldsus", "2", *SMALL)
        world.create()
        etc = {site: world.directory / site / "etc" for site in SITES}
        wrong_secrets = {0: "secondary", 1: "primary"}
        right = (etc["primary"] / "dsgrp000.secret").read_text()
        for number, site in wrong_secrets.items():
            (etc[site] / f"dsgrp{number:03d}.secret").write_text(secrets.token_hex(32) + "\n")
        # Group 2: another mirror device in the primary's file.
        world.edit(world.config("primary", 2), "qds4.mirror", "qds99.mirror")
        # Group 3: an LDSU of another name at the primary; group 4: the other order.
        world.edit(world.config("primary", 3), "[[qds6]]", "[[other]]")
        text = world.config("primary", 4).read_text()
        start = text.index("  [[qds8]]")
        middle = text.index("  [[qds9]]")
        world.config("primary", 4).write_text(text[:start] + text[middle:] + text[start:middle])
        # Group 5: a data device larger than its mirror.
        os.truncate(world.device("primary", "qds10.data"), 3 << 20)
        for number in (3, 4, 5):
            world.at("primary", "qdswlinit", "-g", str(number), "--yes")
        world.launch()

        self.refused(world, 0, IDENTITY, "did not prove the secret of dsgrp000")
        self.refused(world, 1, IDENTITY, "did not prove the secret of dsgrp001")
        for number in (2, 3, 4):
            self.refused(
                world, number, CONFIGURATION, f"dsgrp{number:03d}.cfg differs between the two hosts"
            )
        self.refused(world, 5, CONFIGURATION, "mirror device")
        self.no_storm(world, *range(6))
        self.connected(world, 6)
        pids = {one["group"]: one["driver"]["pid"] for one in world.groups()}
        for place in world.directory.glob("*/var/*.log"):
            self.assertNotIn(right.strip(), place.read_text())

        # Mended, and taken up: no daemon is started by hand.
        for number, site in wrong_secrets.items():
            other = etc["secondary" if site == "primary" else "primary"]
            name = f"dsgrp{number:03d}.secret"
            (etc[site] / name).write_text((other / name).read_text())
        world.edit(world.config("primary", 2), "qds99.mirror", "qds4.mirror")
        self.apply(world)
        for number in (0, 1, 2, 6):
            self.connected(world, number)
        after = {one["group"]: one["driver"]["pid"] for one in world.groups()}
        self.assertEqual(after[6], pids[6])

    @in_thread
    def test_group_that_the_secondary_cannot_serve(self) -> None:
        """Another mapping in the secondary's file than its journal has; no group there at all."""
        world = World(self, "--groups", "3", *SMALL)
        world.create()
        journal = world.device("secondary", "dsgrp000.journal")
        world.edit(world.config("secondary"), "[[qds0]]", "[[other]]")
        away = world.base / "dsgrp001.cfg"
        world.config("secondary", 1).rename(away)
        self.assertEqual(world.ask("secondary", "launchrmds").returncode, BROKEN)
        world.at("primary", "launchdriver")
        world.at("primary", "launchpmds")
        self.connected(world, 2)
        for number, reason in ((0, "see qdsinfo on secondary"), (1, "secondary has no such group")):
            done = world.ask("primary", "qdsinfo", "-g", str(number), "--wait", "connected")
            self.assertEqual(done.returncode, CONFIGURATION, done.stderr)
            self.assertIn(reason, done.stderr)
            self.assertIn(reason, world.log("qdspmd"))
        done = world.ask("secondary", "qdsinfo", "-g", "0", "--wait", "connected")
        self.assertEqual(done.returncode, BROKEN, done.stderr)
        self.assertIn(str(journal), done.stderr)
        self.assertIn(str(journal), world.log("qdsrmd"))

        world.edit(world.config("secondary"), "[[other]]", "[[qds0]]")
        away.rename(world.config("secondary", 1))
        self.apply(world)
        for number in range(3):
            self.connected(world, number)

    @in_thread
    def test_certificates(self) -> None:
        """A certificate of another authority, then of another name, at each end in turn."""
        world = World(self, *SMALL)
        world.create()
        strangers = world.base / "strangers"
        pki.make_hosts(strangers, SITES, [])
        own = {site: world.base / f"own-{site}" for site in SITES}

        def exchange(site: str) -> None:
            etc = world.directory / site / "etc"
            shutil.copytree(etc, own[site], dirs_exist_ok=True)
            for name in ("host.pem", "host.key"):
                shutil.copy2(strangers / site / name, etc / name)

        def mend(site: str) -> None:
            for name in ("host.pem", "host.key"):
                shutil.copy2(own[site] / name, world.directory / site / "etc" / name)

        exchange("secondary")
        world.launch()
        self.refused(world, 0, IDENTITY, "certificate")
        mend("secondary")
        self.apply(world, "secondary")
        # The pmd waits a minute after a refusal, unless it is told that something has changed.
        self.apply(world, "primary")
        self.connected(world)

        exchange("primary")
        self.apply(world, "primary")
        self.refused(world, 0, IDENTITY, "certificate")
        self.no_storm(world, 0)
        mend("primary")
        for name in ("qdsdriver", "qdspmd"):
            os.kill(world.pid(name) or 0, signal.SIGHUP)
        self.connected(world)

        # The right authority, another host's name.
        theirs = "it is not for the host its group file names"
        for site, section in (("secondary", "primary"), ("primary", "secondary")):
            group = world.config(site)
            text = group.read_text()
            group.write_text(text.replace(f"host = {section}", "host = stranger"))
            self.apply(world)
            told = (theirs, "stranger") if site == "secondary" else ("stranger", theirs)
            self.refused(world, 0, IDENTITY, *told)
            group.write_text(text)
            self.apply(world)
            self.connected(world)

    @inlineCallbacks
    def test_version(self) -> Generator[Deferred[Any], Any, None]:
        """A peer that speaks another version of the protocol, and a group that is another."""
        world = World(self, *SMALL)
        yield deferToThread(world.create)
        yield deferToThread(world.at, "secondary", "launchrmds")
        paths = Paths.of(world.primary)
        config, host = load_group(paths, 0), load_host(paths)

        def attempt(group: int) -> Deferred[Any]:
            async def nothing(_acks: object) -> list[Any]:
                return []

            offer = PrimaryOffer(
                group=group,
                digest=config.identity_digest(),
                secret=load_secret(paths, 0),
                units=[UnitOffer(0, "qds0", 2 << 20)],
                decide=nothing,
                session=bytes(16),
                stream_factory=ClientFactory(),
            )
            handshake = PrimaryHandshake(offer, reactor)
            options = client_options(host, "secondary", server_name_for(0))
            endpoint = wrapClientTLS(options, HostnameEndpoint(reactor, "127.0.0.1", config.port))
            made = connectProtocol(endpoint, handshake)
            return made.addCallback(lambda _: handshake.done)

        versions = self.patch(handshake_primary, "PROTOCOL_VERSION", 99)
        error = yield self.assertFailure(attempt(0), MismatchError)
        self.assertIn("protocol version", error.message)
        versions.restore()
        done = yield deferToThread(
            world.ask, "secondary", "qdsinfo", "--wait", "connected", "--timeout", "30"
        )
        self.assertEqual(done.returncode, CONFIGURATION, done.stderr)
        self.assertIn("protocol version", done.stderr)
        self.assertIn("99", world.log("qdsrmd"))
        error = yield self.assertFailure(attempt(7), MismatchError)
        self.assertIn("group", error.message)
        self.assertIn("7 on the other side", world.log("qdsrmd"))
