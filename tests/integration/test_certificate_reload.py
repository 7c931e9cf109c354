"""New certificates by SIGHUP: sessions that run go on, new ones use them (security.md 11)."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
from pathlib import Path
from typing import Any

from cryptography import x509
from twisted.trial.unittest import TestCase

from qdsmirror import pki
from qdsmirror.core.clienthello import server_name_for
from tests.integration.lab import WAIT_SECONDS, in_thread
from tests.integration.proxy import Proxy
from tests.integration.test_link_faults import LinkWorld
from tests.integration.world import SITES

PARTS = ("host.pem", "host.key")
IDENTITY = 12
CONFIGURATION = 10


class ReloadWorld(LinkWorld):
    """A lab with a writer, and a proxy that can cut its link."""

    def __init__(self, test: TestCase) -> None:
        super().__init__(test)
        # A session that goes on must not end because a process had to wait for its turn.
        self.customised = None
        self.proxy = Proxy(test, self.port())
        self.edit(self.config("primary"), f"port = {self.port()}", f"port = {self.proxy.port}")

    def install(self, site: str, source: Path, *parts: str) -> None:
        """Put a certificate, or its key, or both, in place of a site's own."""
        for part in parts or PARTS:
            shutil.copy2(source / site / part, self.config(site).with_name(part))

    def serial(self, site: str) -> int:
        """Give the serial number of the certificate that lies at a site."""
        data = self.config(site).with_name("host.pem").read_bytes()
        return x509.load_pem_x509_certificates(data)[0].serial_number

    def shown(self) -> int:
        """Give the serial number of the certificate that the rmd shows to a new session."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with (
            socket.create_connection(("127.0.0.1", self.port())) as plain,
            context.wrap_socket(plain, server_hostname=server_name_for(0)) as connection,
        ):
            data = connection.getpeercert(binary_form=True)
        assert data is not None
        return x509.load_der_x509_certificate(data).serial_number

    def hang_up(self, daemon: str) -> None:
        """Send SIGHUP to a master, and wait until it has applied its configuration."""

        def applied() -> int:
            return self.log(daemon).count("configuration applied")

        before = applied()
        self.kill(daemon, signal.SIGHUP)
        self.until(lambda: applied() > before, f"{daemon} to apply")

    def unbroken(self) -> tuple[Any, ...]:
        """Give what changes with a new session or process."""
        pids = [self.pid(f"dsgrp000.{role}") for role in ("driver", "pmd", "rmd")]
        return (*pids, len(self.proxy.made), self.info()["since"])

    def cut(self) -> None:
        """Cut the link, and wait until the pmd has tried to connect again."""
        before = len(self.proxy.made)
        self.proxy.cut()
        self.until(lambda: len(self.proxy.made) > before, "another connection")


class ReloadTests(TestCase):
    timeout = 1200
    statistics = False

    def begin(self) -> ReloadWorld:
        world = ReloadWorld(self)
        world.start()
        world.write()
        world.goes_on()
        return world

    @in_thread
    def test_renewed(self) -> None:
        """While writes go on: the session goes on, and the next one shows what is new."""
        world = self.begin()
        before, first = world.unbroken(), world.shown()
        self.assertEqual(first, world.serial("secondary"))
        pki.make_hosts(world.directory / "pki", SITES, [], overwrite=True)
        for site in SITES:
            world.install(site, world.directory / "pki")
        # Nothing is taken from the files but on that word.
        self.assertEqual(world.shown(), first)
        self.assertNotEqual(world.serial("secondary"), first)
        for daemon in ("qdsrmd", "qdspmd"):
            world.hang_up(daemon)
            self.assertIn("the certificate as it is now", world.log(daemon))
        world.until(lambda: world.shown() == world.serial("secondary"), "the new certificate")
        world.goes_on()
        self.assertEqual(world.unbroken(), before)
        world.cut()
        world.goes_on()
        self.assertEqual(world.unbroken()[:3], before[:3])
        world.end()

    @in_thread
    def test_of_another_authority(self) -> None:
        """The new one is no good to the peer: only the next session learns of it."""
        world = self.begin()
        before = world.unbroken()
        strangers = world.base / "strangers"
        pki.make_hosts(strangers, SITES, [])
        world.install("primary", strangers)
        world.hang_up("qdspmd")
        world.goes_on()
        self.assertEqual(world.unbroken(), before)
        world.cut()
        # The driver learns of it after the pmd.
        world.until(lambda: world.info()["state"] == "accumulating", "the loss to be known")
        wait = ("qdsinfo", "--wait", "connected", "--timeout", str(WAIT_SECONDS))
        done = world.ask("primary", *wait)
        self.assertEqual(done.returncode, IDENTITY, done.stderr)
        world.install("primary", world.directory / "pki")
        world.hang_up("qdspmd")
        world.goes_on()
        self.assertEqual(world.unbroken()[:3], before[:3])
        world.end()

    @in_thread
    def test_half_in_place(self) -> None:
        """A certificate without its key is refused by apply; sessions go on with the old pair."""
        world = self.begin()
        before, first = world.unbroken(), world.shown()
        old = world.base / "old"
        shutil.copytree(world.directory / "pki", old)
        pki.make_hosts(world.directory / "pki", SITES, [], overwrite=True)
        for site in SITES:
            world.install(site, world.directory / "pki", "host.pem")
            done = world.ask(site, "qdsconfigtool", "apply")
            self.assertEqual(done.returncode, CONFIGURATION, done.stdout)
            self.assertIn("not the key of the certificate", done.stdout)
        world.goes_on()
        self.assertEqual(world.unbroken(), before)
        world.cut()
        world.goes_on()
        self.assertEqual(world.shown(), first)
        for site in SITES:
            world.install(site, world.directory / "pki")
            world.at(site, "qdsconfigtool", "apply")
        world.until(lambda: world.shown() == world.serial("secondary"), "the new certificate")
        world.end()
