"""From a failed writelog, and from a dead data device, to a good mirror again: word for word.

And by nbdkit's error filter under them.  What each failure looks like otherwise:
tests/integration/test_faults.py.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import in_thread
from tests.integration.power import PowerWorld
from tests.integration.world import World, need, need_root

BLOCK = 4096
SIZE = 1 << 20
FAILED = 1


class WayBackTests(TestCase):
    """As qdsmirror-architecture(7) says, after a kill -9 in between."""

    timeout = 1200
    statistics = False

    def start(self) -> PowerWorld:
        world = PowerWorld(
            self, "--ldsus", "2", "--size", "1M", "--writelog", "2M", "--journal", "3M"
        )
        world.create()
        world.start()
        return world

    def fail(self, world: PowerWorld, device: str, operation: str) -> None:
        world.tell_disks(
            "primary", "fault", file=device, operation=operation, errno=errno.EIO, times=1
        )

    def status(self, world: PowerWorld) -> dict[str, Any]:
        return world.groups("primary")[0]

    def kill_driver(self, world: PowerWorld) -> None:
        victim = world.kill("dsgrp000.driver")
        world.until(lambda: world.pid("dsgrp000.driver") not in (None, victim), "another driver")

    def write(self, world: PowerWorld, ldsu: int, block: int, byte: bytes) -> bytes:
        data = byte * BLOCK
        with world.connect(f"qds{ldsu}") as client:
            client.write(block * BLOCK, data, True)
            client.flush()
            self.assertEqual(client.read(block * BLOCK, BLOCK), data)
        return data

    def replace(self, world: PowerWorld, device: str, content: bytes | None = None) -> None:
        """Put a new disk in the place of one that has failed."""
        path = world.device("primary", device)
        with open(path, "r+b") as file:
            file.write(content if content is not None else b"\xa5" * path.stat().st_size)

    @in_thread
    def test_writelog(self) -> None:
        world = self.start()
        kept = {(0, 0): self.write(world, 0, 0, b"a"), (1, 0): self.write(world, 1, 0, b"b")}
        self.fail(world, "qds0.writelog", "fsync")
        kept[0, 1] = self.write(world, 0, 1, b"c")
        kept[1, 1] = self.write(world, 1, 1, b"d")
        told = self.status(world)
        self.assertEqual(told["state"], "bypass")
        self.assertIn("qds0.writelog failed", told["reason"])
        self.assertTrue(told["coherent"])
        self.assertEqual([one["writelog"]["trusted"] for one in told["ldsus"]], [False, True])
        self.kill_driver(world)
        kept[0, 0] = self.write(world, 0, 0, b"e")
        self.assertEqual(self.status(world)["state"], "bypass")
        for command in (("qdsbypass", "off"), ("qdsrefresh", "--full")):
            done = world.ask("primary", command[0], "-g", "0", *command[1:])
            self.assertEqual(done.returncode, FAILED, done.stdout)
            self.assertIn("qdswlinit -g 0 --yes", done.stderr)
        world.at("primary", "killdriver")
        world.at("primary", "killpmds")
        self.replace(world, "qds0.writelog")
        world.at("primary", "qdswlinit", "-g", "0", "--yes")
        world.at("primary", "launchdriver")
        world.at("primary", "launchpmds")
        world.at("primary", "qdsrefresh", "-g", "0", "--full")
        self.assert_good(world, kept)

    @in_thread
    def test_data_device(self) -> None:
        world = self.start()
        kept = {(0, 0): self.write(world, 0, 0, b"a"), (1, 0): self.write(world, 1, 0, b"b")}
        self.fail(world, "qds0.data", "write")
        with world.connect("qds0") as client:
            client.write(BLOCK, b"c" * BLOCK, True)
        kept[0, 1] = b"c" * BLOCK

        def is_dead() -> bool:
            return bool(self.status(world)["ldsus"][0]["dead"])

        world.until(is_dead, "the death of a data device")
        for _ in range(2):
            with world.connect("qds0") as client:
                for ask in (lambda: client.read(0, BLOCK), lambda: client.write(0, bytes(BLOCK))):
                    self.assertRaises(OSError, ask)
            self.kill_driver(world)
            kept[1, 1] = self.write(world, 1, 1, b"d")
            self.assertIn("qds0.data failed", self.status(world)["reason"])

        def is_committed() -> bool:
            gsn = self.status(world)["gsn"]
            return gsn["written"] is not None and gsn["written"] == gsn["committed"]

        world.until(is_committed, "everything to be committed")
        world.stop("primary")
        world.stop("secondary")
        world.at("secondary", "qdsrmdreco", "-g", "0")
        mirror = world.device("secondary", "qds0.mirror").read_bytes()
        self.replace(world, "qds0.data", mirror)
        world.at("primary", "qdswlinit", "-g", "0", "--yes")
        world.launch()
        world.at("primary", "qdsrefresh", "-g", "0", "--full")
        self.assert_good(world, kept)

    @in_thread
    def test_data_device_replaced_and_backfreshed(self) -> None:
        """What is not yet at the secondary when the device dies gets there, and comes back."""
        world = self.start()
        kept = {(0, 0): self.write(world, 0, 0, b"a"), (1, 0): self.write(world, 1, 0, b"b")}
        world.stop("secondary")
        self.fail(world, "qds0.data", "write")
        with world.connect("qds0") as client:
            client.write(BLOCK, b"c" * BLOCK, True)
        kept[0, 1] = b"c" * BLOCK
        world.until(lambda: self.status(world)["ldsus"][0]["dead"], "the death of a data device")
        kept[1, 1] = self.write(world, 1, 1, b"d")
        world.at("primary", "killdriver")
        self.replace(world, "qds0.data", bytes(world.device("primary", "qds1.data").stat().st_size))
        world.at("primary", "qdswlinit", "-g", "0", "--replaced", "qds0")
        world.at("primary", "launchdriver")
        told = self.status(world)
        self.assertIn("its data device was replaced", told["ldsus"][0]["closed"])
        self.assertEqual((told["ldsus"][0]["dead"], told["ldsus"][1]["closed"]), (False, ""))
        # The other LDSU goes on, also before the secondary is back.
        kept[1, 2] = self.write(world, 1, 2, b"e")
        refused = world.ask("primary", "qdsrefresh", "--full")
        self.assertIn("qdsbackfresh -g 0 --yes", refused.stderr)
        world.start("secondary")
        world.at("primary", "qdsinfo", "-g", "0", "--wait", "connected")
        world.at("primary", "qdsbackfresh", "-g", "0", "--yes")
        self.assert_good(world, kept)

    def assert_good(self, world: PowerWorld, kept: dict[tuple[int, int], bytes]) -> None:
        for ldsu in range(2):
            with world.connect(f"qds{ldsu}") as client:
                for (index, block), data in kept.items():
                    if index == ldsu:
                        self.assertEqual(client.read(block * BLOCK, BLOCK), data, (ldsu, block))
        self.write(world, 0, 9, b"z")
        world.wait("coherent")
        world.settle()
        told = self.status(world)
        self.assertEqual((told["state"], told["reason"]), ("connected", ""))
        self.assertTrue(told["coherent"])
        world.stop()


class ErrorFilterTests(TestCase):
    """Devices over nbdkit's error filter.

    Of a block device what is written fails when it is synced, and with EIO; of a file, at once.
    """

    timeout = 1200

    def setUp(self) -> None:
        need_root()
        need("nbdkit", "nbdfuse", "losetup", "umount")
        if not os.path.exists("/dev/fuse"):
            self.skipTest("/dev/fuse is missing")

    def start(self, name: str, error: str, block: bool) -> World:
        """Start a lab of which one device at the primary is such a block device, or a file.

        :ivar trigger: while it exists, whatever is written there ends with that error.
        """
        world = World(self, "--ldsus", "2", "--size", "4M", "--writelog", "4M", "--journal", "6M")
        world.create()
        self.trigger = world.base / "trigger"
        file, place = world.device("primary", name), world.base / "fuse"
        place.mkdir()
        failing = [f"error-{kind}-rate=100%" for kind in ("pwrite", "trim", "zero")]
        world.start_program(
            ["nbdfuse", str(place / "disk"), "[", "nbdkit", "--filter=error", "file", str(file)]
            + [f"error={error}", "error-rate=0", f"error-file={self.trigger}", *failing, "]"]
        )
        world.until((place / "disk").exists, "the disk")
        self.device = world.loop(place / "disk") if block else str(place / "disk")
        world.edit_both(f'"{file}"', self.device)
        world.at("primary", "qdswlinit", "--yes")
        world.start()
        self.assertEqual(Path(self.device).is_block_device(), block)
        return world

    def client(self, world: World, name: str) -> NbdClient:
        return world.until(lambda: NbdClient.connect(world.uri(name)), "the driver")  # type: ignore[no-any-return]

    def write(self, world: World, name: str, block: int, byte: bytes) -> None:
        """Write and flush; both are answered."""
        with self.client(world, name) as client:
            client.write(block * BLOCK, byte * BLOCK)
            client.flush()
            self.assertEqual(client.read(block * BLOCK, BLOCK), byte * BLOCK)

    def restart(self, world: World) -> None:
        """The disk is well again, and a new driver looks at it."""
        self.trigger.unlink()
        victim = world.kill("dsgrp000.driver")
        world.until(lambda: world.pid("dsgrp000.driver") not in (None, victim), "another driver")

    @in_thread
    def test_data_device(self) -> None:
        world = self.start("qds0.data", "EIO", block=True)
        self.write(world, "qds0", 0, b"a")
        self.trigger.touch()
        with self.client(world, "qds0") as client:
            client.write(BLOCK, b"b" * BLOCK, True)
        world.until(lambda: world.info()["ldsus"][0]["dead"], "the death of the data device")
        world.logged("qdsdriver", f"data device {self.device} failed")
        self.restart(world)
        with self.client(world, "qds0") as client:
            for ask in (lambda: client.read(0, BLOCK), lambda: client.write(0, bytes(BLOCK))):
                self.assertEqual(self.assertRaises(OSError, ask).errno, errno.EIO)
        self.write(world, "qds1", 2, b"c")
        told = world.info()
        self.assertEqual([one["dead"] for one in told["ldsus"]], [True, False])
        self.assertIn(f"{self.device} failed", told["reason"])
        self.assertIn(os.strerror(errno.EIO), told["reason"])
        world.until(lambda: self.is_committed(world), "everything to be committed")
        for name, block, byte in (("qds0", 1, b"b"), ("qds1", 2, b"c")):
            world.until(
                lambda name=name, block=block, byte=byte: (
                    self.mirror(world, name, block) == byte * BLOCK
                ),
                f"{name} to be mirrored",
            )

    @in_thread
    def test_writelog(self) -> None:
        world = self.start("qds0.writelog", "ENOSPC", block=False)
        self.write(world, "qds0", 0, b"a")
        world.settle()
        self.trigger.touch()
        self.write(world, "qds0", 1, b"b")
        self.write(world, "qds1", 2, b"c")
        world.logged("qdsdriver", f"writelog {self.device} failed")
        self.restart(world)
        self.write(world, "qds0", 3, b"d")
        told = world.info()
        self.assertEqual((told["state"], told["coherent"]), ("bypass", True))
        self.assertIn(f"{self.device} failed", told["reason"])
        self.assertIn(os.strerror(errno.ENOSPC), told["reason"])
        self.assertEqual([one["writelog"]["trusted"] for one in told["ldsus"]], [False, True])
        # The mirror is what it was: nothing behind the break is ever sent.
        self.assertEqual(self.mirror(world, "qds0", 0), b"a" * BLOCK)
        for name, block in (("qds0", 1), ("qds0", 3), ("qds1", 2)):
            self.assertEqual(self.mirror(world, name, block), bytes(BLOCK))

    def is_committed(self, world: World) -> bool:
        gsn = world.info()["gsn"]
        return gsn["written"] is not None and gsn["written"] == gsn["committed"]

    def mirror(self, world: World, name: str, block: int) -> bytes:
        with open(world.device("secondary", f"{name}.mirror"), "rb") as file:
            file.seek(block * BLOCK)
            return file.read(BLOCK)
