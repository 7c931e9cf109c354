"""Devices that may not be used are named and left as they are; odd ones that may are used."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

from twisted.trial.unittest import TestCase

from tests.integration.lab import WAIT_SECONDS, in_thread
from tests.integration.world import World, need, need_root

FAILED = 1
CONFIGURATION = 10
SMALL = ("--size", "2M", "--writelog", "2M", "--journal", "3M")


class RefusedDeviceTests(TestCase):
    """Named, with the exit code of the trouble, and no byte of any device is changed."""

    timeout = 1200
    statistics = False

    def create(self, *options: str) -> World:
        world = World(self, *SMALL, *options)
        world.create()
        return world

    def contents(self, world: World) -> dict[Path, bytes]:
        """Give the bytes of all devices of both sites."""
        return {path: path.read_bytes() for path in world.directory.glob("*/devices/*")}

    def refuse(
        self, world: World, site: str, command: Sequence[str], code: int, *told: str
    ) -> None:
        """Run a command that must name what is wrong and leave everything as it is."""
        before = self.contents(world)
        done = world.ask(site, *command)
        self.assertEqual(done.returncode, code, (command, done.stdout, done.stderr))
        for text in told:
            self.assertIn(text, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        after = self.contents(world)
        self.assertEqual(before.keys(), after.keys())
        for path, data in before.items():
            self.assertTrue(data == after[path], f"{command} wrote to {path}")

    @in_thread
    def test_mirror_smaller_than_its_data_device(self) -> None:
        world = self.create()
        data = world.device("primary", "qds0.data")
        mirror = world.device("secondary", "qds0.mirror")
        mirror.write_bytes(random.Random(1).randbytes(2 << 20))
        os.truncate(data, 3 << 20)
        data.write_bytes(random.Random(2).randbytes(3 << 20))
        world.at("primary", "qdswlinit", "--yes")
        world.launch()
        before = mirror.read_bytes()
        wait = ["qdsinfo", "--wait", "connected", "--timeout", str(WAIT_SECONDS)]
        for site in ("primary", "secondary"):
            done = world.ask(site, *wait)
            self.assertEqual(done.returncode, CONFIGURATION, done.stderr)
            self.assertIn(str(mirror), done.stderr)
            self.assertIn(str(3 << 20), done.stderr)
        done = world.ask("primary", "qdsrefresh", "--full")
        self.assertEqual(done.returncode, CONFIGURATION, done.stderr)
        self.assertIn(str(mirror), done.stderr)
        self.assertTrue(mirror.read_bytes() == before)

    @in_thread
    def test_in_use(self) -> None:
        world = self.create()
        world.launch()
        self.refuse(world, "primary", ["qdswlinit", "--yes"], FAILED, "driver runs", "killdriver")
        self.refuse(world, "primary", ["qdswlscan"], FAILED, "driver runs", "killdriver")
        self.refuse(world, "secondary", ["qdswlinit", "--yes"], FAILED, "rmd runs", "killrmds")
        self.refuse(world, "secondary", ["qdsrmdreco"], FAILED, "rmd runs", "killrmds")
        # Another lab whose group names a device of this one.
        other = self.create()
        data = world.device("primary", "qds0.data")
        other.edit_both(str(other.device("primary", "qds0.data")), str(data))
        before = data.read_bytes()
        done = other.ask("primary", "launchdriver")
        self.assertEqual(done.returncode, FAILED, done.stderr)
        self.assertIn(str(data), done.stderr)
        self.assertIn("in use", done.stderr)
        told = other.ask("primary", "qdsinfo")
        self.assertEqual(told.returncode, 0)
        self.assertIn(str(data), told.stdout)
        self.assertTrue(data.read_bytes() == before)

    @in_thread
    def test_foreign_signature(self) -> None:
        need("mkfs.ext4")
        world = self.create()
        mirror = world.device("secondary", "qds0.mirror")
        log = world.device("primary", "qds0.writelog")
        for site, device in (("secondary", mirror), ("primary", log)):
            device.write_bytes(bytes(2 << 20))
            world.run(["mkfs.ext4", "-q", "-F", str(device)])
            self.refuse(world, site, ["qdswlinit"], FAILED, str(device), "ext", "--yes")
        # The writelog is no log any more: the driver does not touch it either.
        self.refuse(world, "primary", ["launchdriver"], 4, str(log))
        world.at("primary", "killdriver")
        world.at("primary", "qdswlinit", "--yes")
        world.at("primary", "launchdriver")

    @in_thread
    def test_missing(self) -> None:
        world = self.create()
        for site, name, command in (
            ("primary", "qds0.data", "launchdriver"),
            ("primary", "qds0.writelog", "launchdriver"),
            ("secondary", "qds0.mirror", "launchrmds"),
            ("secondary", "dsgrp000.journal", "launchrmds"),
        ):
            device = world.device(site, name)
            away = world.base / name
            device.rename(away)
            self.refuse(world, site, [command], FAILED, str(device))
            self.refuse(world, site, ["qdswlinit", "--yes"], FAILED, str(device))
            away.rename(device)
        # It goes missing while the daemons run, and is taken up again when it is back.
        world.launch()
        mirror = world.device("secondary", "qds0.mirror")
        mirror.rename(world.base / "away")
        world.kill("dsgrp000.rmd")
        for site in ("secondary", "primary"):
            world.until(
                lambda site=site: str(mirror) in world.info(site)["reason"],
                f"the missing device's name at the {site}",
            )
        (world.base / "away").rename(mirror)
        world.start()
        world.settle()

    @in_thread
    def test_key(self) -> None:
        world = self.create()
        sites = {"primary": "launchpmds", "secondary": "launchrmds"}
        world.at("primary", "launchdriver")
        for site, command in sites.items():
            key = world.directory / site / "etc" / "host.key"
            right = key.read_bytes()
            key.unlink()
            self.refuse(world, site, [command], CONFIGURATION, str(key))
            key.write_text("not a key\n")
            key.chmod(0o600)
            self.refuse(world, site, [command], CONFIGURATION, str(key))
            # Still so for whoever asks again; mended is taken up by apply.
            self.refuse(world, site, [command], CONFIGURATION, str(key))
            key.write_bytes(right)
            world.at(site, "qdsconfigtool", "apply")
            world.at(site, command)
            world.at(site, command.replace("launch", "kill"))
            key.chmod(0o644)
            self.refuse(world, site, [command], CONFIGURATION, str(key), "mode")
            world.at(site, command.replace("launch", "kill"))
            key.chmod(0o600)
            secret = world.directory / site / "etc" / "dsgrp000.secret"
            secret.chmod(0o644)
            self.refuse(world, site, [command], CONFIGURATION, str(secret), "mode")
            secret.chmod(0o600)
        world.start()
        world.settle()


class UsedDeviceTests(TestCase):
    """Block devices, small logs, many LDSUs."""

    timeout = 1200
    statistics = False

    def load(self, world: World, name: str = "qds0", number: int = 0) -> None:
        """Write in several sizes, zeroes too, more than any log holds."""
        world.qemu_io(
            "write -P 1 0 4M",
            "write -P 2 4k 512k",
            "aio_write -P 3 1M 1M",
            "aio_write -P 4 2M 64k",
            "aio_flush",
            "write -z 64k 128k",
            "write -f -P 5 300k 4k",
            "discard 3M 256k",
            "write -P 6 1M 3M",
            "flush",
            "read -P 5 300k 4k",
            "read -P 0 64k 128k",
            "read -P 6 1M 3M",
            name=name,
            number=number,
        )

    def on_blocks(self, sector_bytes: int) -> None:
        need_root()
        need("losetup", "cmp", "qemu-io")
        world = World(self, "--size", "4M", "--writelog", "2M", "--journal", "3M")
        world.create()
        for site, name in (
            ("primary", "qds0.data"),
            ("primary", "qds0.writelog"),
            ("secondary", "qds0.mirror"),
            ("secondary", "dsgrp000.journal"),
        ):
            file = world.device(site, name)
            file.write_bytes(bytes(file.stat().st_size))
            world.edit_both(f'"{file}"', world.loop(file, sector_bytes))
        for site in ("primary", "secondary"):
            world.at(site, "qdswlinit")
        world.start()
        unit = world.info()["ldsus"][0]
        self.assertTrue(Path(unit["data_device"]).is_block_device())
        self.load(world)
        world.settle()
        for name in ("dsgrp000.driver", "dsgrp000.rmd"):
            world.kill(name)
        self.load(world)
        world.settle()
        done = world.ask("primary", "qdswlinit", "--yes")
        self.assertEqual(done.returncode, FAILED, done.stderr)
        self.assertIn("driver runs", done.stderr)

    @in_thread
    def test_loop_devices_of_512_bytes_a_sector(self) -> None:
        self.on_blocks(512)

    @in_thread
    def test_loop_devices_of_4096_bytes_a_sector(self) -> None:
        self.on_blocks(4096)

    @in_thread
    def test_large_writes_into_a_tiny_log(self) -> None:
        need("qemu-io")
        world = World(self, "--size", "16M", "--writelog", "1M", "--journal", "3M")
        world.create()
        world.start()
        world.qemu_io(
            "write -P 7 0 16M",
            "aio_write -P 8 0 8M",
            "aio_write -P 9 8M 4M",
            "aio_flush",
            "read -P 8 0 8M",
            "read -P 9 8M 4M",
            "read -P 7 12M 4M",
        )
        self.load(world)
        world.settle()

    @in_thread
    def test_ldsus_that_share_a_writelog_device(self) -> None:
        """Two of three name the same one: it is divided, and each part is a log of its own."""
        need("qemu-io")
        world = World(self, "--size", "4M", "--writelog", "3M", "--journal", "6M", "--ldsus", "3")
        world.create()
        logs = [str(world.device("primary", f"qds{n}.writelog")) for n in range(3)]
        world.edit_both(logs[2], logs[0])
        world.at("primary", "qdswlinit", "--yes")
        world.start()
        units = world.info()["ldsus"]
        self.assertEqual(
            [one["writelog"]["devices"] for one in units], [[logs[n]] for n in (0, 1, 0)]
        )
        sizes = [one["writelog"]["size"] for one in units]
        self.assertEqual(sizes[0], sizes[2])
        self.assertLess(2 * sizes[0], 3 << 20)
        for name in ("dsgrp000.driver", "dsgrp000.pmd", "dsgrp000.rmd"):
            for ldsu in ("qds0", "qds2", "qds1"):
                self.load(world, ldsu)
            world.kill(name)
        # What stands in each part while the secondary is away is found after a kill.
        world.stop("secondary")
        for ldsu, byte in (("qds0", 41), ("qds2", 42), ("qds1", 43)):
            world.qemu_io(f"write -P {byte} 8k 256k", "flush", name=ldsu)
        world.kill("dsgrp000.driver")
        world.start()
        world.settle()
        for ldsu, byte in (("qds0", 41), ("qds2", 42), ("qds1", 43)):
            world.qemu_io(f"read -P {byte} 8k 256k", name=ldsu)
        world.stop()
        world.at("primary", "qdswlscan", "--check")

    @in_thread
    def test_many_ldsus_in_several_groups(self) -> None:
        need("qemu-io")
        world = World(self, "--size", "4M", "--writelog", "2M", "--journal", "3M",
                      "--groups", "2", "--ldsus", "3")  # fmt: skip
        world.create()
        world.start()
        self.assertEqual(len({one["driver"]["pid"] for one in world.groups()}), 2)
        clients = []
        for index in range(6):
            number = index // 3
            options = ["-c", f"write -P {index + 1} 0 4M", "-c", f"write -P {index + 11} 64k 1M"]
            uri = world.uri(f"qds{index}", number)
            clients.append(world.start_program(["qemu-io", "-f", "raw", *options, uri]))
        for client in clients:
            output, errors = client.communicate(timeout=WAIT_SECONDS)
            self.assertEqual(client.returncode, 0, output + errors)
        self.load(world, "qds4", 1)
        world.settle()
        for index in (0, 5):
            mirror = world.device("secondary", f"qds{index}.mirror").read_bytes()
            self.assertEqual(mirror[:4], bytes([index + 1]) * 4)
            self.assertEqual(mirror[64 << 10 : (64 << 10) + 4], bytes([index + 11]) * 4)
