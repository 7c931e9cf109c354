"""Backfresh with real daemons: whoever is killed in the middle, data devices are the mirror's."""

from __future__ import annotations

import json
import random

from twisted.trial.unittest import TestCase

from qdsmirror.errors import EXIT_DEGRADED, EXIT_USAGE, ProtocolError
from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import WAIT_SECONDS, in_thread
from tests.integration.world import World

MIB = 1 << 20
SIZE = 32 * MIB
BLOCK = 64 << 10
KILLS = ("dsgrp000.driver", "dsgrp000.pmd", "dsgrp000.rmd")


class BackfreshTests(TestCase):
    timeout = 1200
    statistics = False

    def lab(self, *options: str) -> World:
        self.source = random.Random(5)
        world = World(self, "--size", "32M", "--writelog", "8M", "--journal", "8M", *options)
        world.create()
        world.start()
        with self.connect(world) as client:
            for _ in range(40):
                client.write(self.source.randrange(SIZE // BLOCK) * BLOCK, self.block())
            client.flush()
        world.wait("drained")
        return world

    def block(self) -> bytes:
        return self.source.randbytes(BLOCK)

    @staticmethod
    def connect(world: World) -> NbdClient:
        return world.until(lambda: NbdClient.connect(world.uri()), "the driver to serve")  # type: ignore[no-any-return]

    def spoil(self, world: World, share: float = 0.02) -> None:
        """Write to the data device while the driver is stopped."""
        world.at("primary", "killdriver")
        with open(world.device("primary", "qds0.data"), "r+b") as file:
            for number in range(SIZE // BLOCK):
                if not number or self.source.random() < share:
                    file.seek(number * BLOCK)
                    file.write(self.block())
        world.at("primary", "launchdriver")
        world.wait("connected")

    def content(self, world: World) -> bytes:
        return world.device("primary", "qds0.data").read_bytes()

    @in_thread
    def test_a_device_that_somebody_has_written_to(self) -> None:
        world = self.lab()
        before = self.content(world)
        self.spoil(world)
        spoilt = self.content(world)
        self.assertFalse(world.info()["coherent"])
        self.assertIn("changed while its daemon was stopped", world.info()["reason"])
        differing = sum(
            before[at : at + BLOCK] != spoilt[at : at + BLOCK] for at in range(0, SIZE, BLOCK)
        )
        refused = world.ask("primary", "qdsbackfresh")
        self.assertEqual(refused.returncode, EXIT_USAGE)
        told = json.loads(world.at("primary", "qdsbackfresh", "--dry-run", "--json"))
        self.assertEqual(told["groups"][0]["changed_bytes"], differing * BLOCK)
        with self.connect(world):
            refused = world.ask("primary", "qdsbackfresh", "--yes")
            self.assertEqual(refused.returncode, EXIT_DEGRADED)
            self.assertIn("clients are connected to qds0", refused.stderr)
        self.assertEqual(self.content(world), spoilt)

        kept = world.base / "kept"
        told = json.loads(
            world.at("primary", "qdsbackfresh", "--keep", str(kept), "--yes", "--json")
        )
        self.assertEqual(told["groups"][0]["changed_bytes"], differing * BLOCK)
        self.assertEqual(self.content(world), before)
        self.assertTrue(world.info()["coherent"])
        world.compare()

        # An orderly restart finds nothing to complain of.
        world.at("primary", "killdriver")
        world.at("primary", "launchdriver")
        world.wait("coherent")
        world.at("primary", "killdriver")
        world.at("primary", "qdsbackfresh", "--replay", str(kept), "--yes")
        self.assertEqual(self.content(world), spoilt)
        world.at("primary", "launchdriver")
        world.wait("connected")
        self.assertFalse(world.info()["coherent"])
        world.at("primary", "qdsrefresh")
        world.settle()

    #: Blocks are overwritten one by one, with time between, until the test says otherwise.
    SLOW = """\
import os, time
from qdsmirror.groups import fetching
inner = fetching._overwrite
def overwrite(*arguments):
    for _ in range(20):
        if not os.path.exists({go!r}):
            time.sleep(0.05)
    return inner(*arguments)
fetching._overwrite = overwrite
"""

    def begin_slowly(self, world: World) -> bytes:
        """Begin a backfresh of much, and meet it in the middle; give what was there before."""
        world.customise(self.SLOW.format(go=str(world.base / "go")))
        self.spoil(world, 0.6)
        spoilt = self.content(world)
        kept = str(world.base / "kept")
        world.at("primary", "launchbackfresh", "--keep", kept, "--yes")
        self.assertEqual(world.info()["state"], "backfresh")
        return spoilt

    @in_thread
    def test_every_daemon_killed_in_the_middle(self) -> None:
        world = self.lab()
        before = self.content(world)
        self.begin_slowly(world)
        for victim in KILLS:
            killed = world.kill(victim)
            world.until(
                lambda v=victim, k=killed: world.pid(v) not in (None, k), f"another {victim}"
            )
            if victim.endswith("driver"):
                with self.assertRaises(ProtocolError) as caught:
                    NbdClient.connect(world.uri())
                self.assertIn("(backfresh)", caught.exception.message)
        (world.base / "go").touch()
        world.until(
            lambda: world.info()["state"] not in ("backfresh", "setup"), "the backfresh's end", 120
        )
        self.assertEqual(self.content(world), before)
        world.wait("coherent")
        with self.connect(world) as client:
            client.write(0, self.block())
            client.flush()
        world.settle()

    @in_thread
    def test_killed_it_stays_closed_until_another(self) -> None:
        world = self.lab()
        before = self.content(world)
        spoilt = self.begin_slowly(world)
        world.until(lambda: self.content(world) != spoilt, "some blocks")
        self.assertIn("stay closed", world.at("primary", "killbackfresh"))
        self.assertNotIn(self.content(world), (before, spoilt))
        world.at("primary", "killdriver")
        world.at("primary", "launchdriver")
        info = world.info()
        self.assertEqual(info["backfresh"]["state"], "needed")
        self.assertIn("qds0 closed, backfresh needed", info["reason"])
        refused = world.ask("primary", "qdsrefresh", "--full")
        self.assertEqual(refused.returncode, EXIT_DEGRADED)
        self.assertIn("qdsbackfresh", refused.stderr)

        # One way out is back to what was there before, another forward to the mirror.
        world.at("primary", "killdriver")
        world.at("primary", "qdsbackfresh", "--replay", str(world.base / "kept"), "--yes")
        self.assertEqual(self.content(world), spoilt)
        (world.base / "go").touch()
        world.at("primary", "launchdriver")
        world.wait("connected")
        self.assertEqual(world.info()["ldsus"][0]["closed"], "")
        world.at("primary", "qdsbackfresh", "--yes")
        self.assertEqual(self.content(world), before)
        world.settle()

    @in_thread
    def test_back_to_the_state_before_a_bypass(self) -> None:
        world = self.lab()
        before = self.content(world)
        world.at("primary", "qdsbypass", "on")
        with self.connect(world) as client:
            for _ in range(20):
                client.write(self.source.randrange(SIZE // BLOCK) * BLOCK, self.block())
            client.flush()
        refused = world.ask("primary", "qdsbackfresh", "--yes")
        self.assertEqual(refused.returncode, EXIT_DEGRADED)
        self.assertIn("--discard", refused.stderr)
        world.at("primary", "qdsbackfresh", "--yes", "--discard")
        self.assertEqual(self.content(world), before)
        info = world.info()
        self.assertEqual((info["state"], info["coherent"]), ("bypass", True))
        self.assertEqual(info["ldsus"][0]["dirty_bytes"], 0)
        world.at("primary", "qdsbypass", "off")
        world.wait("coherent")
        world.settle()

    @in_thread
    def test_what_the_secondary_never_had_is_given_up(self) -> None:
        world = self.lab()
        before = self.content(world)
        world.stop("secondary")
        with self.connect(world) as client:
            for _ in range(20):
                client.write(self.source.randrange(SIZE // BLOCK) * BLOCK, self.block())
            client.flush()
        # Nothing of it may be sent before the operator says what is to become of it.
        world.at("primary", "killpmds")
        world.start("secondary")
        waiting = world.start_program(
            [*self.command("qdsbackfresh"), "--root", str(world.primary)]
            # What it does meanwhile is told every ten seconds, but not among JSON.
            + ["--discard", "--yes", "--json"]
        )
        world.until(lambda: world.info()["ldsus"][0]["closed"], "the LDSU to be closed")
        world.at("primary", "launchpmds")
        output, errors = waiting.communicate(timeout=WAIT_SECONDS)
        self.assertEqual((waiting.returncode, errors), (0, ""), output)
        self.assertEqual(self.content(world), before)
        with self.connect(world) as client:
            client.write(BLOCK, self.block())
            client.flush()
        world.settle()
        world.at("secondary", "qdsinfo", "--is", "coherent")

    @staticmethod
    def command(name: str) -> list[str]:
        from tests.integration.lab import console_script

        return [console_script(name)]
