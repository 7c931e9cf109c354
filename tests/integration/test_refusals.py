"""What may not be connected is refused, with the reason at both ends; mended, it connects."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import ssl
import time
from collections.abc import Generator
from pathlib import Path
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
from qdsmirror.limits import REFUSED_RETRY_SECONDS
from qdsmirror.net import handshake_primary
from qdsmirror.net.handshake import PrimaryHandshake, PrimaryOffer, UnitOffer
from qdsmirror.net.tls import client_options
from qdsmirror.paths import Paths
from tests.integration.lab import WAIT_SECONDS, CommandError, in_thread
from tests.integration.world import SITES, World, attempts
from tests.net.tlsworld import authority, issue

reactor: Any = _reactor

IDENTITY = 12
CONFIGURATION = 10
BROKEN = 4
#: Long enough to see a storm: a refused link is tried again after 1, 2, 4 ... seconds.
WATCH_SECONDS = 2.0
TRIES_MAX = 3
#: A link is back within about as long again as it was refused, and it is tried so often at least.
MENDED_SECONDS = REFUSED_RETRY_SECONDS + WAIT_SECONDS
DEGRADED = 3
WAIT_CONNECTED = ("--wait", "connected", "--timeout", str(WAIT_SECONDS))


def swapped(text: str, first: str, second: str) -> str:
    """Give a group's file with its two LDSUs in the other order."""
    start, middle = text.index(f"  [[{first}]]"), text.index(f"  [[{second}]]")
    return text[:start] + text[middle:] + text[start:middle]


SMALL = ("--size", "2M", "--writelog", "2M", "--journal", "3M")


class RefusalTests(TestCase):
    """Each wrong thing, on either side."""

    timeout = 1200
    statistics = False

    def refused(
        self, world: World, number: int, code: int, reason: str, at_secondary: str = ""
    ) -> None:
        """A group is refused: both ends' qdsinfo and logs say why, and waiting ends at once.

        (It ends with another exit code when its time is up.)
        """
        reasons = {"primary": reason, "secondary": at_secondary or reason}
        for site, reason in reasons.items():
            last: list[Any] = []

            def told(site: str = site, reason: str = reason, last: list[Any] = last) -> bool:
                """Look; until it is known that a session is over, it is connected."""
                done = world.ask(site, "qdsinfo", "-g", str(number), *WAIT_CONNECTED)
                last[:] = [site, number, done.returncode, done.stderr]
                self.assertIn(done.returncode, (0, code), (*last, world.logs()))
                # An end that learns of it last may still say why it was refused before.
                known = (done.stderr, self.group(world, site, number)["reason"])
                return done.returncode == code and all(reason in text for text in known)

            try:
                world.until(told, f"{reason!r} at the {site}")
            except CommandError as error:
                self.fail(f"{last}: {error}")
        for daemon, reason in zip(("qdspmd", "qdsrmd"), reasons.values(), strict=True):
            self.logged(world, daemon, number, reason)

    def logged(self, world: World, daemon: str, number: int, reason: str) -> None:
        """Check that a group's reason is, or comes to be, in a daemon's log."""
        group = f"dsgrp{number:03d}"

        def found() -> bool:
            lines = world.log(daemon).splitlines()
            return any(group in line and reason in line for line in lines)

        world.until(found, f"{group}: {reason!r} in the log of {daemon}")

    def no_storm(self, world: World, *numbers: int) -> None:
        """In some seconds nobody tries again more than a time or two."""

        def tries() -> dict[int, int]:
            log = world.log("qdsrmd")
            return {
                n: attempts(log, rf"dsgrp{n:03d} secondary: handshake.*refused") for n in numbers
            }

        before = tries()
        begun = time.monotonic()
        # What shall not come cannot be waited for: this wait is the test.
        time.sleep(WATCH_SECONDS)
        after = tries()
        # One a second at most, however long it was.
        most = TRIES_MAX + int(time.monotonic() - begun - WATCH_SECONDS)
        for number, count in after.items():
            self.assertGreaterEqual(count, 1, number)
            self.assertLessEqual(count - before[number], most, (number, world.logs()))

    def group(self, world: World, site: str, number: int) -> dict[str, Any]:
        (found,) = [one for one in world.groups(site) if one["group"] == number]
        return found

    def untouched(self, world: World, before: dict[Path, bytes], *served: int) -> None:
        """No byte was written to a device of any group but those that are served.

        A writelog and a journal whose daemon has opened them may have a new superblock.
        """
        own = {
            name
            for number in served
            for one in self.group(world, "primary", number)["ldsus"]
            for name in (one["data_device"], one["mirror_device"], one["writelog"]["devices"][0])
        }
        after = world.contents()
        for path, digest in before.items():
            if str(path) not in own and path.suffix in (".data", ".mirror"):
                self.assertEqual(after[path], digest, f"{path} was written")

    def apply(self, world: World, *sites: str) -> None:
        # The primary last: it then tries at once.
        for site in sites or reversed(SITES):
            world.at(site, "qdsconfigtool", "apply")

    def connected(self, world: World, number: int = 0) -> None:
        for site in SITES:
            world.at(site, "qdsinfo", "-g", str(number), *WAIT_CONNECTED)

    def again(self, world: World, *numbers: int) -> None:
        """Refused groups are connected by the primary's own next attempts."""
        world.until(
            lambda: all(
                one["state"] == "connected" for one in world.groups() if one["group"] in numbers
            ),
            "the refused groups",
            MENDED_SECONDS,
        )

    @in_thread
    def test_groups(self) -> None:
        """Secret, mapping and size, of one group each; the other groups are not disturbed."""
        world = World(self, "--groups", "11", "--ldsus", "2", *SMALL)
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
        for number, first, second, site in ((4, "qds8", "qds9", "primary"),
                                            (7, "qds14", "qds15", "secondary")):  # fmt: skip
            text = world.config(site, number).read_text()
            world.config(site, number).write_text(swapped(text, first, second))
        # Group 5: a data device larger than its mirror.
        os.truncate(world.device("primary", "qds10.data"), 3 << 20)
        # Groups 7 and 8: another order and another name at the secondary; group 9: fewer LDSUs.
        world.edit(world.config("secondary", 8), "[[qds16]]", "[[other]]")
        text = world.config("primary", 9).read_text()
        world.config("primary", 9).write_text(text[: text.index("  [[qds19]]")])
        # Group 10: fewer LDSUs at the secondary; group 6: a larger mirror, which is good.
        text = world.config("secondary", 10).read_text()
        world.config("secondary", 10).write_text(text[: text.index("  [[qds21]]")])
        os.truncate(world.device("secondary", "qds12.mirror"), 3 << 20)
        for site in SITES:
            with world.config(site).with_name("qds.cfg").open("a") as file:
                file.write("children = 3\n")
        for number in (3, 4, 5, 9):
            world.at("primary", "qdswlinit", "-g", str(number), "--yes")
        for number in (6, 7, 8, 10):
            world.at("secondary", "qdswlinit", "-g", str(number), "--yes")
        before = world.contents()
        world.launch()

        self.refused(world, 0, IDENTITY, "did not prove the secret of dsgrp000")
        self.refused(world, 1, IDENTITY, "did not prove the secret of dsgrp001")
        for number in (2, 3, 4, 7, 8, 9, 10):
            self.refused(
                world, number, CONFIGURATION, f"dsgrp{number:03d}.cfg differs between the two hosts"
            )
        self.refused(world, 5, CONFIGURATION, "mirror device")
        self.no_storm(world, *range(6), *range(7, 11))
        self.connected(world, 6)
        self.untouched(world, before, 6)
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
        """Another mapping or size at the secondary than its journal has; no such group there."""
        world = World(self, "--groups", "6", "--ldsus", "2", *SMALL)
        world.create()
        journals = [world.device("secondary", f"dsgrp00{n}.journal") for n in range(6)]
        mirror = world.device("secondary", "qds4.mirror")
        # Group 0: a name, changed at both; group 1: the order; group 2: a mirror has grown since.
        world.edit_both("[[qds0]]", "[[other]]")
        world.at("primary", "qdswlinit", "-g", "0", "--yes")
        right = world.config("secondary", 1).read_text()
        world.config("secondary", 1).write_text(swapped(right, "qds2", "qds3"))
        os.truncate(mirror, 3 << 20)
        # Group 3 is another one there; group 4 will miss its mirror.
        away = world.config("secondary", 9)
        world.config("secondary", 3).rename(away)
        secret = away.with_name("dsgrp003.secret")
        shutil.copy2(secret, secret.with_name("dsgrp009.secret"))
        missing = world.device("secondary", "qds8.mirror")
        before = world.contents()
        self.assertEqual(world.ask("secondary", "launchrmds").returncode, CONFIGURATION)
        world.at("primary", "launchdriver")
        world.at("primary", "launchpmds")
        self.connected(world, 5)
        missing.rename(world.base / "missing")
        world.kill("dsgrp004.rmd")
        for number, reasons in (
            (0, (str(journals[0]), "other LDSUs", "qds0", "qdswlinit")),
            (2, (str(mirror), str(3 << 20), str(2 << 20))),
        ):
            for reason in reasons:
                self.refused(world, number, CONFIGURATION, reason)
        self.refused(world, 1, CONFIGURATION, "dsgrp001.cfg differs", "other LDSUs")
        done = world.ask("primary", "qdsinfo", "-g", "3", "--wait", "connected")
        self.assertEqual(done.returncode, CONFIGURATION, done.stderr)
        self.assertIn("secondary has no such group", done.stderr)
        world.logged("qdspmd", "secondary has no such group")
        world.logged("qdsrmd", "dsgrp003: refused")
        # A device may come back by itself: not refused for good, and named at both ends.
        for site, daemon in zip(SITES, ("qdspmd", "qdsrmd"), strict=True):
            world.until(
                lambda site=site: str(missing) in self.group(world, site, 4)["reason"],
                f"the missing device's name at the {site}",
            )
            world.logged(daemon, str(missing))
            waiting = ("qdsinfo", "-g", "4", "--wait", "connected", "--timeout", "1")
            # In the moment of another attempt no reason is known.
            done = world.until(
                lambda site=site, waiting=waiting: next(
                    (d for d in [world.ask(site, *waiting)] if str(missing) in d.stderr), None
                ),
                f"the name from qdsinfo --wait at the {site}",
            )
            self.assertEqual(done.returncode, DEGRADED, done.stderr)
        self.no_storm(world, 0, 1, 2, 4)
        (world.base / "missing").rename(missing)
        self.untouched(world, before, 5)

        # Mended: the missing device needs no word, the others an apply there; the primary's
        # comes first here, and finds the secondary as it was.
        self.connected(world, 4)
        world.at("secondary", "qdswlinit", "-g", "0", "--yes")
        world.config("secondary", 1).write_text(right)
        os.truncate(mirror, 2 << 20)
        away.rename(world.config("secondary", 3))
        world.at("primary", "qdsconfigtool", "apply")
        world.until(
            lambda: all(self.group(world, "primary", n)["pmd"]["state"] == "refused"
                        for n in range(4)),
            "the refusals",
        )  # fmt: skip
        world.at("secondary", "qdsconfigtool", "apply")
        self.again(world, *range(6))

    @in_thread
    def test_mapping_of_the_primary(self) -> None:
        """Another mapping or size at the primary than its logs have: refused by its driver."""
        world = World(self, "--groups", "5", "--ldsus", "2", *SMALL)
        world.create()
        for site in SITES:
            with world.config(site).with_name("qds.cfg").open("a") as file:
                file.write("children = 2\n")
        data = world.device("primary", "qds4.data")
        # As in the test before, at the primary; group 3's writelogs are another group's.
        world.edit(world.config("primary"), "[[qds0]]", "[[other]]")
        world.config("primary", 1).write_text(
            swapped(world.config("primary", 1).read_text(), "qds2", "qds3")
        )
        os.truncate(data, 3 << 20)
        log = world.device("primary", "qds6.writelog")
        log.write_bytes(world.device("primary", "qds0.writelog").read_bytes())
        before = world.contents()
        world.at("secondary", "launchrmds")
        self.assertEqual(world.ask("primary", "launchdriver").returncode, CONFIGURATION)
        world.at("primary", "launchpmds")
        self.connected(world, 4)
        for number, reasons in (
            (0, (str(world.device("primary", "qds0.writelog")), "not of other")),
            (1, (str(world.device("primary", "qds3.writelog")), "not of qds3")),
            (2, (str(data), str(3 << 20), str(2 << 20))),
            (3, (str(log), "dsgrp000, not the writelog of dsgrp003")),
        ):
            done = world.ask("primary", "qdsinfo", "-g", str(number), "--wait", "connected")
            self.assertEqual(done.returncode, CONFIGURATION, done.stderr)
            for reason in reasons:
                self.assertIn(reason, done.stderr)
                world.logged("qdsdriver", reason)
        self.untouched(world, before, 4)

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
        # Nobody tells the primary, which tries again by itself before long.
        self.again(world, 0)

        exchange("primary")
        self.apply(world, "primary")
        # The session that runs goes on (tests/integration/test_certificate_reload.py).
        self.assertEqual(world.info()["state"], "connected")
        world.at("secondary", "killrmds")
        world.at("secondary", "launchrmds")
        self.refused(world, 0, IDENTITY, "certificate")
        self.no_storm(world, 0)
        mend("primary")
        for name in ("qdsdriver", "qdspmd"):
            world.kill(name, signal.SIGHUP)
        # A signal is taken up in its own time; until then qdsinfo would not wait.
        self.again(world, 0)
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

    @in_thread
    def test_dates(self) -> None:
        """A certificate that has expired, or is not valid yet, at each end; and none at all."""
        world = World(self, *SMALL)
        world.create()
        before = world.contents()

        def certify(site: str, **how: bool) -> None:
            etc = world.directory / site / "etc"
            leaf = issue(site, **how)
            (etc / "ca.pem").write_bytes(authority("ours").cert_pem.bytes())
            (etc / "host.pem").write_bytes(leaf.cert_chain_pems[0].bytes())
            (etc / "host.key").write_bytes(leaf.private_key_pem.bytes())

        for site in SITES:
            certify(site, expired=site == "secondary")
        world.launch()
        self.refused(world, 0, IDENTITY, "expired")
        for site, how, primary, secondary in (
            ("secondary", "early", "is not valid before", "primary refuses our certificate"),
            ("primary", "expired", "expired, by its clock", "expired on"),
            ("primary", "early", "secondary refuses our certificate", "is not valid before"),
        ):
            # What a daemon has loaded stays in use until it is told, and a session goes on.
            world.at("primary", "killpmds")
            for one in SITES:
                certify(one, **{how: one == site})
            self.apply(world, "secondary")
            world.at("primary", "launchpmds")
            self.refused(world, 0, IDENTITY, primary, secondary)
        self.no_storm(world, 0)
        self.untouched(world, before)
        certify("primary")
        self.apply(world)
        self.connected(world)
        world.at("primary", "killpmds")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        port = load_group(Paths.of(world.primary), 0).port
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            context.wrap_socket(plain, server_hostname=server_name_for(0)) as connection,
        ):
            self.assertRaises(ssl.SSLError, connection.recv, 1)
        world.until(lambda: "showed no certificate" in world.log("qdsrmd"), "the reason in the log")
        done = world.ask("secondary", "qdsinfo", *WAIT_CONNECTED)
        self.assertEqual(done.returncode, IDENTITY, done.stderr)

    @in_thread
    def test_versions(self) -> None:
        """Another version of the protocol at the primary, then at the secondary."""
        world = World(self, *SMALL)
        world.create()
        before = world.contents()
        for site in SITES:
            world.customise(
                "import qdsmirror.net.handshake_commands as c\nc.PROTOCOL_VERSION = 99\n"
            )
            if site == "primary":
                world.at("primary", "launchpmds")
            else:
                world.at("secondary", "launchrmds")
            world.customised = None
            world.launch()
            self.refused(world, 0, CONFIGURATION, "protocol version")
            for daemon in ("qdspmd", "qdsrmd"):
                world.logged(daemon, "protocol version")
                world.logged(daemon, "99")
            self.no_storm(world, 0)
            self.untouched(world, before)
            world.at("primary", "killpmds" if site == "primary" else "killdriver")
            world.stop()

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
        done = yield deferToThread(world.ask, "secondary", "qdsinfo", *WAIT_CONNECTED)
        self.assertEqual(done.returncode, CONFIGURATION, done.stderr)
        self.assertIn("protocol version", done.stderr)
        world.logged("qdsrmd", "99")
        error = yield self.assertFailure(attempt(7), MismatchError)
        self.assertIn("group", error.message)
        world.logged("qdsrmd", "7 on the other side")
