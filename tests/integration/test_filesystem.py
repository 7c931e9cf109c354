"""A file system on an LDSU's block device, and its copy on the mirror device."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import TestCase

from tests.integration.lab import in_thread
from tests.integration.world import World, digests, need_attached_ext4

OPTIONS = ("--size", "40M", "--writelog", "16M", "--journal", "16M")
FSCK_SECONDS = 60.0
#: Commits numbered transactions and says so; the last one is never committed.
CLIENT = """
import os, sqlite3, sys
base = sqlite3.connect(sys.argv[1], isolation_level=None)
base.execute("pragma journal_mode = delete")
# Extra: a commit is not told before the journal's removal is on the disk.
base.execute("pragma synchronous = extra")
base.execute("pragma cache_size = 10")
base.execute("create table entries (number integer primary key, text blob)")
for number in range(10**6):
    base.execute("begin")
    for one in range(40):
        base.execute("insert into entries (text) values (?)", (os.urandom(900),))
    base.execute("commit")
    print(number, flush=True)
"""
ROWS = 40


class FilesystemTests(TestCase):
    """ext4 through qdsattach."""

    timeout = 1200
    statistics = False

    def setUp(self) -> None:
        need_attached_ext4()

    def start(self) -> tuple[World, Path, Path]:
        """Give a lab, its LDSU's block device, and where that is mounted."""
        world = World(self, *OPTIONS)
        world.create()
        world.start()
        world.at("primary", "qdsattach", "--via", "fuse")
        device = world.primary / "dev" / "qds0"
        return world, device, world.mount_new(device)

    def check(self, world: World, image: Path) -> None:
        """Check a file system that was unmounted; nothing may have to be mended."""
        done = world.ended("e2fsck", "-f", "-n", str(image), seconds=FSCK_SECONDS)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    @in_thread
    def test_files(self) -> None:
        world, device, place = self.start()
        self.assertTrue(device.is_block_device())
        source = random.Random(3)
        for number in range(60):
            directory = place / f"d{number % 7}"
            directory.mkdir(exist_ok=True)
            (directory / f"f{number}").write_bytes(source.randbytes(source.randrange(200_000)))
        for number in range(0, 60, 5):
            (place / f"d{number % 7}" / f"f{number}").unlink()
        (place / "d1" / "f1").rename(place / "renamed")
        expected = digests(place)
        self.assertEqual(len(expected), 48)
        world.unmount(place)
        world.at("primary", "qdsdetach")
        self.assertFalse(device.exists())
        world.settle()

        self.check(world, world.device("secondary", "qds0.mirror"))
        copy = world.base / "copy"
        shutil.copy2(world.device("secondary", "qds0.mirror"), copy)
        mirrored = world.mount(copy, "-o", "loop,ro")
        self.assertEqual(digests(mirrored), expected)
        world.unmount(mirrored)

    @in_thread
    def test_sqlite_killed_with_everything(self) -> None:
        world, device, place = self.start()
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(place / "base")], stdout=subprocess.PIPE, text=True
        )
        self.addCleanup(client.stdout.close)  # type: ignore[union-attr]
        self.addCleanup(client.wait)
        self.addCleanup(client.kill)
        committed = -1
        for line in client.stdout or ():
            committed = int(line)
            if committed >= 12:
                break
        # It is now in a transaction, or about to begin one.  Children, masters and keeper too.
        client.send_signal(signal.SIGKILL)
        world.kill_all()
        client.wait()
        world.untangle()
        shutil.rmtree(world.primary / "run" / "attach", ignore_errors=True)
        device.unlink(missing_ok=True)

        # The mirror as it stands, before any daemon has run again.
        before = world.base / "before"
        world.at("secondary", "qdsrmdreco")
        shutil.copy2(world.device("secondary", "qds0.mirror"), before)
        self.healthy(world, before)

        world.start()
        world.settle()
        after = world.base / "after"
        shutil.copy2(world.device("secondary", "qds0.mirror"), after)
        self.assertGreaterEqual(self.healthy(world, after), (committed + 1) * ROWS)
        world.at("primary", "qdsattach", "--via", "fuse")
        self.assertGreaterEqual(
            self.healthy(world, Path(os.path.realpath(device))), (committed + 1) * ROWS
        )
        world.at("primary", "qdsdetach")

    def healthy(self, world: World, image: Path) -> int:
        """Mount (ext4 replays its own journal), check the data base; give its rows."""
        loop = image if image.is_block_device() else Path(world.loop(image))
        place = world.mount(loop)
        with sqlite3.connect(place / "base") as base:
            self.assertEqual(base.execute("pragma integrity_check").fetchone(), ("ok",))
            (rows,) = base.execute("select count(*) from entries").fetchone()
        base.close()
        self.assertEqual(rows % ROWS, 0)
        world.unmount(place)
        self.check(world, loop)
        return int(rows)
