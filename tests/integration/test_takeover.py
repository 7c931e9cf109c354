"""A takeover by hand, word for word as qdsmirror-takeover(7) has it, and the way back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from twisted.trial.unittest import TestCase

from qdsmirror.config import load_group
from qdsmirror.paths import Paths
from tests.integration.lab import WAIT_SECONDS, in_thread
from tests.integration.world import World, digests, need_attached_ext4

OPTIONS = ("--size", "24M", "--writelog", "12M", "--journal", "12M")
#: What the two group files say once the roles are reversed.
REVERSED = """\
operation = async
on_overflow = block
[primary]
host = secondary
address = 127.0.0.1
[secondary]
host = primary
address = 127.0.0.1
port = {port}
journal_device = {old}/dsgrp000.journal
[ldsus]
  [[qds0]]
  data_device = {new}/qds0.mirror
  writelog_device = {new}/qds0.writelog
  mirror_device = {old}/qds0.data
"""


class TakeoverTests(TestCase):
    timeout = 1200

    def setUp(self) -> None:
        need_attached_ext4()

    def start(self) -> tuple[World, Path]:
        world = World(self, *OPTIONS)
        world.create()
        world.start()
        world.at("primary", "qdsattach")
        return world, world.mount_new(world.primary / "dev" / "qds0")

    def write(self, place: Path, name: str) -> None:
        """Write a file as an application does that wants it to last."""
        with open(place / name, "wb") as file:
            file.write(os.urandom(50_000))
            file.flush()
            os.fsync(file.fileno())

    def recover(self, world: World) -> None:
        """Replay the journal; its mirror must be usable."""
        told = json.loads(world.at("secondary", "qdsrmdreco", "--json"))
        self.assertTrue(told["groups"][0]["coherent"], told)

    def take_over(self, world: World) -> Path:
        """Check and mount the mirror, once the journal is replayed."""
        mirror = world.device("secondary", "qds0.mirror")
        checked = world.ended("e2fsck", "-f", "-p", str(mirror))
        # 1: it replayed the file system's own journal, as after any power cut.
        self.assertIn(checked.returncode, (0, 1), checked.stdout + checked.stderr)
        return world.mount(mirror, "-o", "loop")

    def reverse(self, world: World) -> None:
        """Make the old secondary the primary, and mirror back to the old primary."""
        old, new = world.primary / "devices", world.secondary / "devices"
        port = load_group(Paths.of(world.primary), 0).port
        text = REVERSED.format(old=old, new=new, port=port)
        for site in ("primary", "secondary"):
            world.config(site).write_text(text)
        shutil.copy2(old / "qds0.writelog", new / "qds0.writelog")
        shutil.copy2(new / "dsgrp000.journal", old / "dsgrp000.journal")
        for site in ("primary", "secondary"):
            world.at(site, "qdswlinit", "--yes")
        world.at("primary", "launchrmds")
        world.at("secondary", "launchdriver")
        world.at("secondary", "launchpmds")
        world.at("secondary", "qdsrefresh")

    def assert_reversed(self, world: World) -> None:
        world.at("secondary", "qdsinfo", "--wait", "drained", "--timeout", str(WAIT_SECONDS))
        data, mirror = (
            world.device("secondary", "qds0.mirror"),
            world.device("primary", "qds0.data"),
        )
        self.assertTrue(data.read_bytes() == mirror.read_bytes(), "the way back is not complete")

    @in_thread
    def test_the_primary_is_gone(self) -> None:
        world, place = self.start()
        for number in range(5):
            self.write(place, f"kept{number}")
        kept = digests(place)
        world.wait("drained")
        # From here on the network is gone too: nothing of this may be missed at the secondary.
        world.at("primary", "killpmds")
        self.write(place, "lost")
        world.kill_all()
        world.untangle()

        self.recover(world)
        copy = self.take_over(world)
        found = digests(copy)
        self.assertEqual({name: found.get(name) for name in kept}, kept)
        self.assertNotIn("lost", found)
        self.write(copy, "after")
        expected = digests(copy)
        world.unmount(copy)

        self.reverse(world)
        self.assert_reversed(world)
        world.at("secondary", "killpmds")
        world.at("secondary", "killdriver")
        world.at("primary", "killrmds")
        back = world.mount(world.device("primary", "qds0.data"), "-o", "loop,ro")
        self.assertEqual(digests(back), expected)
        world.unmount(back)

    @in_thread
    def test_moving_a_data_centre(self) -> None:
        world, place = self.start()
        self.write(place, "all")
        expected = digests(place)
        world.unmount(place)
        world.at("primary", "qdsdetach")
        world.wait("drained")
        world.at("primary", "killpmds")
        world.at("primary", "killdriver")
        refused = world.ask("secondary", "qdsrmdreco")
        self.assertEqual(refused.returncode, 1, refused.stdout + refused.stderr)
        self.assertIn("killrmds", refused.stderr)
        world.at("secondary", "killrmds")
        self.recover(world)
        data, mirror = world.images("primary")[0], world.images("secondary")[0]
        self.assertTrue(data.read_bytes() == mirror.read_bytes(), "not drained")
        copy = self.take_over(world)
        self.assertEqual(digests(copy), expected)
        world.unmount(copy)
        self.reverse(world)
        self.assert_reversed(world)
