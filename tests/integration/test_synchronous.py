"""Synchronous and near-synchronous operation with real daemons (SYNC)."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import COMMAND_SECONDS, WAIT_SECONDS, draw_seed, in_thread
from tests.integration.power import PowerWorld, need_fuse
from tests.integration.world import World, need, need_attached_ext4

SIZES = ("--size", "4M", "--writelog", "4M", "--journal", "6M")
BLOCK = 4096
#: Answered writes after each of which the secondary loses its power.
CUTS = 6


class Thread(threading.Thread):
    """Something that may have to wait."""

    def __init__(self, job: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._job = job
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._job()
        except BaseException as error:  # noqa: BLE001 - whoever waits for it is told
            self.error = error

    @property
    def ended(self) -> bool:
        return not self.is_alive()

    def end_well(self) -> None:
        """Wait until it is done.

        :raises AssertionError: it is not, or has failed.
        """
        self.join(WAIT_SECONDS)
        assert self.ended and self.error is None, self.error


class Write(Thread):
    """A write to an LDSU."""

    def __init__(self, client: NbdClient, offset: int, data: bytes) -> None:
        super().__init__(lambda: client.write(offset, data))


class PowerTests(TestCase):
    """What was answered is on the secondary's platters in that moment."""

    timeout = 1200
    statistics = False

    def setUp(self) -> None:
        need_fuse()
        self.random = random.Random(draw_seed(self))

    @in_thread
    def test_the_power_goes_after_each_answered_write(self) -> None:
        world = PowerWorld(self, *SIZES, "--mode", "sync", "--ldsus", "2")
        world.create()
        world.start()
        held: dict[tuple[int, int], bytes] = {}
        for turn in range(CUTS):
            ldsu = turn % 2
            with world.connect(f"qds{ldsu}") as client:
                for _ in range(self.random.randrange(4)):
                    self.write(client, ldsu, held)
                self.write(client, ldsu, held)
                # Nothing that the platters have not been told to keep is on them.
                world.cut(("secondary",), self.random.randrange(1 << 32), 0.0)
            world.power_on("secondary")
            self.check(world.recovered_mirrors(), held)
            world.start("secondary")
            world.wait("synchronous")

    def write(self, client: NbdClient, ldsu: int, held: dict[tuple[int, int], bytes]) -> None:
        """Write something; from its answer on the secondary must have it."""
        offset = self.random.randrange(1024) * BLOCK
        data = self.random.randbytes(BLOCK)
        client.write(offset, data, fua=self.random.random() < 0.2)
        held[ldsu, offset] = data

    def check(self, mirrors: list[bytes], held: dict[tuple[int, int], bytes]) -> None:
        lost = [
            place
            for place, data in held.items()
            if mirrors[place[0]][place[1] : place[1] + BLOCK] != data
        ]
        self.assertEqual(lost, [], "SYNC: answered, and not on the secondary")

    @in_thread
    def test_both_sites_lose_their_power_in_a_degraded_group(self) -> None:
        """It says so when it is back, and no longer when it has caught up."""
        world = PowerWorld(self, *SIZES, "--mode", "sync")
        world.create()
        world.edit_both("operation = sync", "operation = sync\non_disconnect = async")
        world.start()
        world.cut(("secondary",), 1, 0.0)
        with world.connect() as client:
            client.write(0, b"a" * BLOCK, fua=True)
        world.cut(("primary",), 2, 0.0)
        world.power_on("primary")
        world.launch_driver()
        world.until(lambda: world.ask("primary", "qdsinfo", "--is", "degraded").returncode == 0,
                    "the group to say so")  # fmt: skip
        world.power_on("secondary")
        world.start("secondary")
        world.start("primary")
        world.wait("synchronous")
        self.assertIsNone(world.info()["degraded"])
        world.settle()


class DaemonTests(TestCase):
    timeout = 1200
    statistics = False

    def start(self, mode: str, *more: str) -> World:
        world = World(self, *SIZES, "--mode", mode)
        world.create()
        for line in more:
            world.edit_both(f"operation = {mode}", f"operation = {mode}\n{line}")
        world.start()
        return world

    def connect(self, world: World) -> NbdClient:
        # What has to wait for the secondary waits long on a busy machine.
        client = NbdClient.connect(world.uri(), timeout_seconds=COMMAND_SECONDS)
        self.addCleanup(client.close)
        return client

    def waiting(self, world: World) -> int:
        told: dict[str, Any] = world.info()["synchronous"]
        return int(told["waiting"])

    @in_thread
    def test_writes_wait_while_the_secondary_is_away(self) -> None:
        world = self.start("sync")
        client = self.connect(world)
        client.write(0, b"a" * BLOCK)
        gsn = world.info()["gsn"]
        self.assertEqual(gsn["written"], gsn["committed"])
        # The master first: it would have its child running again at once.
        world.kill("qdsrmd")
        world.until(lambda: world.info()["state"] == "accumulating", "the loss to be seen")
        write = Write(client, BLOCK, b"b" * BLOCK)
        world.until(lambda: self.waiting(world) == 1, "the write to wait")
        self.assertFalse(write.ended)
        # Reads do not wait.
        reader = self.connect(world)
        self.assertEqual(reader.read(BLOCK, BLOCK), b"b" * BLOCK)
        self.assertFalse(write.ended)
        world.start("secondary")
        write.end_well()
        client.flush()
        world.settle()

    @in_thread
    def test_kills_under_way(self) -> None:
        """Neither a killed rmd nor a killed pmd lets an answer out too soon, or loses one."""
        world = self.start("sync")
        client = self.connect(world)
        for turn in range(8):
            world.kill("dsgrp000.rmd" if turn % 2 else "dsgrp000.pmd")
            client.write(turn * BLOCK, bytes([turn + 1]) * BLOCK)
            gsn = world.info()["gsn"]
            self.assertEqual(gsn["committed"], gsn["written"])
        world.wait("synchronous")
        world.settle()

    @in_thread
    def test_it_goes_on_degraded(self) -> None:
        world = self.start("sync", "on_disconnect = async")
        client = self.connect(world)
        world.stop("secondary")
        client.write(0, b"a" * BLOCK)
        told = world.info()
        self.assertIn("not connected", told["degraded"]["reason"])
        self.assertFalse(told["synchronous"]["kept"])
        world.kill("dsgrp000.driver")
        world.until(lambda: world.info()["degraded"], "the group to know it again")
        world.start("secondary")
        world.wait("synchronous")
        self.assertIsNone(world.info()["degraded"])
        world.settle()

    @in_thread
    def test_near_synchronous_with_another_n(self) -> None:
        world = self.start("near-sync", "near_sync_entries = 4")
        client = self.connect(world)
        world.stop("secondary")
        for number in range(4):
            client.write(number * BLOCK, bytes([number + 1]) * BLOCK)
        write = Write(client, 4 * BLOCK, b"e" * BLOCK)
        world.until(lambda: self.waiting(world) == 1, "the fifth to wait")
        world.at("primary", "qdsset", "near_sync_entries=6")
        write.end_well()
        client.write(5 * BLOCK, b"f" * BLOCK)
        write = Write(client, 6 * BLOCK, b"g" * BLOCK)
        world.until(lambda: self.waiting(world) == 1, "the seventh to wait")
        self.assertEqual(world.info()["settings"], {"near_sync_entries": 6})
        world.start("secondary")
        write.end_well()
        world.settle()

    @in_thread
    def test_the_operation_is_changed_while_writes_wait(self) -> None:
        world = self.start("sync")
        client = self.connect(world)
        world.stop("secondary")
        write = Write(client, 0, b"a" * BLOCK)
        world.until(lambda: self.waiting(world) == 1, "the write to wait")
        world.at("primary", "qdsset", "operation=async")
        write.end_well()
        client.write(BLOCK, b"b" * BLOCK)
        world.at("primary", "qdsset", "operation=sync")
        write = Write(client, 2 * BLOCK, b"c" * BLOCK)
        world.until(lambda: self.waiting(world) == 1, "the write to wait")
        self.assertFalse(world.info()["synchronous"]["kept"])
        world.start("secondary")
        write.end_well()
        world.wait("synchronous")
        world.settle()

    @in_thread
    def test_a_stop_leaves_what_waits_to_the_client(self) -> None:
        world = self.start("sync")
        world.stop("secondary")
        client = NbdClient.connect(world.uri(), timeout_seconds=COMMAND_SECONDS)
        ended = threading.Event()

        def write() -> None:
            try:
                client.write(0, b"a" * BLOCK)
            except Exception:  # noqa: BLE001 - the connection ends, in whatever way
                ended.set()

        threading.Thread(target=write, daemon=True).start()
        world.until(lambda: self.waiting(world) == 1, "the write to wait")
        world.stop("primary")
        self.assertTrue(ended.wait(WAIT_SECONDS), "neither an answer nor the connection's end")
        client.close()
        world.start()
        world.settle()


class FileSystemTests(TestCase):
    """What a synchronous mirror has of files: see FILE SYSTEMS in qdsmirror-synchronous(7)."""

    timeout = 1200
    statistics = False

    def setUp(self) -> None:
        need_attached_ext4()
        need_fuse()

    def check(self, size: str, *mkfs: str) -> None:
        world = PowerWorld(self, "--size", size, "--writelog", "32M", "--journal", "48M",
                           "--mode", "sync")  # fmt: skip
        world.create()
        world.start()
        world.at("primary", "qdsattach", "--via", "fuse")
        device = world.primary / "dev" / "qds0"
        world.run([*mkfs, str(device)])
        place = world.mount(device)
        data = random.Random(1).randbytes(50_000)
        self.write_synced(place / "other", data)
        # It does not return before the secondary has it.
        world.kill("dsgrp000.rmd", signal.SIGSTOP)
        write = Thread(lambda: self.write_synced(place / "synced", data))
        world.until(lambda: world.info()["synchronous"]["waiting"], "the write to wait")
        self.assertFalse(write.ended)
        world.kill("dsgrp000.rmd", signal.SIGCONT)
        write.end_well()
        # Renamed into its place, as careful programs do.
        self.write_synced(place / "new", data[::-1])
        (place / "new").rename(place / "renamed")
        self.sync_directory(place)
        # Written carelessly, but mounted with care.
        world.run(["mount", "-o", "remount,sync", str(place)])
        (place / "mounted").write_bytes(data)
        world.run(["mount", "-o", "remount,async", str(place)])
        # It returns as well; but nothing has made the file system write it.
        (place / "lazy").write_bytes(data)
        world.cut(("secondary",), 1, 0.0)
        self.assertEqual((place / "lazy").read_bytes(), data)
        world.power_on("secondary")
        (mirror,) = world.recovered_mirrors()
        copy = world.base / "copy"
        copy.write_bytes(mirror)
        options = "loop,nouuid" if "mkfs.xfs" in mkfs else "loop"
        mirrored = world.mount(copy, "-o", options)
        self.assertEqual((mirrored / "synced").read_bytes(), data)
        self.assertEqual((mirrored / "renamed").read_bytes(), data[::-1])
        self.assertFalse((mirrored / "new").exists())
        self.assertEqual((mirrored / "mounted").read_bytes(), data)
        lazy = mirrored / "lazy"
        self.assertFalse(
            lazy.exists() and lazy.read_bytes() == data,
            "a file that nobody has synced is there: then the manual is too careful",
        )
        world.unmount(mirrored)
        world.start("secondary")
        world.wait("synchronous")
        world.run(["sync", "--file-system", str(place)])
        world.unmount(place)
        world.at("primary", "qdsdetach")
        world.settle()

    def write_synced(self, path: Path, data: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_SYNC)
        try:
            self.assertEqual(os.write(descriptor, data), len(data))
        finally:
            os.close(descriptor)
        self.sync_directory(path.parent)

    def sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @in_thread
    def test_ext4(self) -> None:
        self.check("40M", "mkfs.ext4", "-q", "-F")

    @in_thread
    def test_xfs(self) -> None:
        need("mkfs.xfs")
        self.check("320M", "mkfs.xfs", "-q", "-f")
