"""Writelogs in memory, with real daemons: what a child's, a master's and an orderly end leave."""

from __future__ import annotations

import json
import signal
from typing import Any

from tests.integration.history import BLOCK, HistoryCase
from tests.integration.lab import in_thread
from tests.integration.world import World

SIZE = 16 << 20


class MemoryLogTests(HistoryCase):
    timeout = 1200
    statistics = False
    size = SIZE

    def start(self, *options: str) -> World:
        self.begin_history(5)
        world = World(self, "--size", "16M", "--memory", *options)
        world.create()
        world.start()
        return world

    def kill(self, world: World, name: str) -> int:
        """Kill a process, and wait for the next one's first word."""
        victim = world.kill(name)
        world.until(lambda: world.pid(name) not in (None, victim), "another one")
        return victim

    def refresh(self, world: World) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(world.at("primary", "launchrefresh", "--json"))
        return dict(told["groups"][0])

    @in_thread
    def test_a_killed_child_loses_nothing(self) -> None:
        world = self.start("--writelog", "8M")
        before = world.info()["generation"]
        rmd = world.pid("dsgrp000.rmd")
        assert rmd is not None
        # What it has not got stands in the memory alone.
        world.kill("dsgrp000.rmd", signal.SIGSTOP)
        with self.connect(world) as client:
            self.write_some(client, 40)
            self.kill(world, "dsgrp000.driver")
        with self.connect(world) as client:
            self.assertEqual(client.read(0, SIZE // 4), self.content(40)[: SIZE // 4])
            self.write_some(client, 10)
            info = world.info()
            self.assertEqual((info["generation"], info["bypass"]), (before, None))
            self.assertGreater(info["lag"]["entries"], 0)
            world.kill("dsgrp000.rmd", signal.SIGCONT)
            client.flush()
        world.settle()
        self.assertEqual(world.device("secondary", "qds0.mirror").read_bytes(), self.content(50))

    @in_thread
    def test_a_killed_master_needs_a_dirty_refresh(self) -> None:
        world = self.start("--writelog", "8M")
        before = world.info()["generation"]
        with self.connect(world) as client:
            self.write_some(client, 20)
            client.flush()
            world.wait("drained")
            world.stop("secondary")
            self.write_some(client, 10)
            client.flush()
            world.kill("qdsdriver")
        world.until(lambda: world.pid("dsgrp000.driver") is None, "the child's end")
        world.at("primary", "launchdriver")
        with self.connect(world) as client:
            info = world.info()
            self.assertEqual((info["state"], info["coherent"]), ("bypass", True))
            self.assertIn("memory were lost (qds0)", info["reason"])
            self.assertTrue(info["bypass"]["lost"])
            # What was synced is there, and all that the mirror lacks is marked.
            self.assertEqual(world.device("primary", "qds0.data").read_bytes(), self.content(30))
            self.check_mirror_is_prefix(world, 20)
            self.assertGreaterEqual(info["bypass"]["dirty_bytes"], 10 * BLOCK)
            self.assertLess(info["bypass"]["dirty_bytes"], SIZE)
            self.write_some(client, 10)
            world.at("secondary", "launchrmds")
            world.until(lambda: world.info()["pmd"]["state"] == "refused", "the meeting")
            self.assertIn("waits for a refresh", world.info()["pmd"]["reason"])
            self.check_mirror_is_prefix(world, 20)
            begun = self.refresh(world)
            self.assertEqual(begun["kind"], "dirty")
            self.write_some(client, 10)
            world.wait("coherent")
            client.flush()
        world.settle()
        self.assertNotEqual(world.info()["generation"], before)
        self.assertEqual(world.device("secondary", "qds0.mirror").read_bytes(), self.content(50))

    @in_thread
    def test_by_itself_with_auto_refresh(self) -> None:
        world = self.start("--writelog", "8M")
        world.stop()
        world.edit_both("[ldsus]", "[tunables]\nauto_refresh = yes\n[ldsus]")
        world.start()
        with self.connect(world) as client:
            world.kill("dsgrp000.rmd", signal.SIGSTOP)
            self.write_some(client, 30)
            client.flush()
            world.kill("qdsdriver")
        world.until(lambda: world.pid("dsgrp000.driver") is None, "the child's end")
        world.kill("dsgrp000.rmd", signal.SIGCONT)
        world.at("primary", "launchdriver")
        world.wait("connected")
        world.wait("coherent")
        world.settle()
        self.assertEqual(world.device("secondary", "qds0.mirror").read_bytes(), self.content(30))

    @in_thread
    def test_overflow_into_bypass_and_back(self) -> None:
        world = self.start("--writelog", "2M", "--overflow", "bypass")
        world.stop("secondary")
        with self.connect(world) as client:
            while world.info()["state"] != "bypass":
                self.write_some(client, 10)
            self.write_some(client, 50)
            client.flush()
            self.kill(world, "dsgrp000.driver")
        with self.connect(world) as client:
            info = world.info()
            self.assertEqual((info["state"], info["bypass"]["lost"]), ("bypass", False))
            world.start("secondary")
            gsn = world.info()["gsn"]
            world.until(lambda: world.info()["gsn"]["mirrored"] == gsn["written"], "the break")
            self.check_mirror_is_prefix(world, 10)
            begun = json.loads(world.at("primary", "qdsbypass", "off", "--json"))
            self.assertEqual(begun["groups"][0]["kind"], "dirty")
            self.write_some(client, 10)
            world.wait("coherent")
            client.flush()
        world.settle()
        self.assertEqual(world.device("secondary", "qds0.mirror").read_bytes(), self.content())

    @in_thread
    def test_an_orderly_end_goes_on_where_it_was(self) -> None:
        world = self.start("--writelog", "8M")
        before = world.info()["generation"]
        with self.connect(world) as client:
            self.write_some(client, 20)
        world.stop()
        found = world.at("primary", "qdswlscan", "--check")
        self.assertIn("8 MiB in memory, empty", found)
        world.start()
        info = world.info()
        self.assertEqual((info["generation"], info["bypass"]), (before, None))
        world.settle()

    @in_thread
    def test_another_size_needs_to_be_initialised(self) -> None:
        world = self.start("--writelog", "8M")
        world.stop()
        world.edit_both("memory:8388608", "memory:4M")
        refused = world.ask("primary", "launchdriver")
        self.assertNotEqual(refused.returncode, 0)
        self.assertIn("qdswlinit --yes", refused.stderr)
        world.at("primary", "killdriver")
        world.at("primary", "qdswlinit", "--yes")
        world.launch()
        world.at("primary", "qdsrefresh", "--full")
        world.settle()
