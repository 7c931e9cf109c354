"""A checkpoint on the secondary with real daemons: read while the primary writes, killed, cut."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.errors import EXIT_DEGRADED
from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import in_thread
from tests.integration.world import World, need

SIZE = 8 << 20
BLOCK = 64 << 10


class CheckpointTests(TestCase):
    timeout = 1200
    statistics = False

    def begin(self, *options: str) -> None:
        self.source = random.Random(9)
        self.content = [bytearray(SIZE), bytearray(SIZE)]
        world = self.world = World(
            self, "--size", "8M", "--ldsus", "2", "--writelog", "8M", *options
        )
        world.create()
        world.start()

    def client(self, index: int) -> NbdClient:
        world = self.world
        return world.until(  # type: ignore[no-any-return]
            lambda: NbdClient.connect(world.uri(f"qds{index}")), "the driver to serve"
        )

    def write_some(self, count: int) -> None:
        """Write to both LDSUs in turn, all answered."""
        with self.client(0) as first, self.client(1) as second:
            for number in range(count):
                offset = self.source.randrange(SIZE // BLOCK) * BLOCK
                data = self.source.randbytes(BLOCK)
                (first, second)[number % 2].write(offset, data)
                self.content[number % 2][offset : offset + BLOCK] = data

    def checkpoint(self, *words: str, site: str = "secondary") -> dict[str, Any]:
        told = json.loads(self.world.at(site, "qdscheckpoint", *words, "--json"))
        return told["groups"][0]  # type: ignore[no-any-return]

    def read(self, uri: str) -> bytes:
        """Read an export to its end."""
        with NbdClient.connect(uri) as client:
            return b"".join(client.read(at, 1 << 20) for at in range(0, SIZE, 1 << 20))

    @in_thread
    def test_backed_up_at_a_mark_while_the_primary_writes(self) -> None:
        need("qemu-img")
        self.begin("--journal", "128M")
        world = self.world
        self.write_some(40)
        marked = self.checkpoint("--mark", "nightly", site="primary")
        then = [bytes(content) for content in self.content]
        stop = threading.Event()

        def go_on() -> None:
            # Less than the journal takes before the checkpoint would be released.
            for _ in range(280):
                if stop.is_set():
                    break
                self.write_some(4)

        writer = threading.Thread(target=go_on)
        writer.start()
        try:
            held = world.until(lambda: self.checkpoint("list")["checkpoint"], "the mark")
            self.assertEqual((held["name"], held["gsn"]), ("nightly", marked["gsn"]))
            uris = held["nbd_uris"]
            self.assertEqual([self.read(uris[name]) for name in ("qds0", "qds1")], then)
            backup = world.base / "backup.raw"
            world.run(["qemu-img", "convert", "-O", "raw", uris["qds1"], str(backup)])
            self.assertEqual(backup.read_bytes(), then[1])
            self.assertEqual(world.info("secondary")["ldsus"][0]["nbd_uri"], uris["qds0"])
            # A kill does not loosen it.
            victim = world.kill("dsgrp000.rmd")
            world.until(lambda: world.pid("dsgrp000.rmd") not in (None, victim), "another rmd")
            held = world.until(lambda: self.held_again(), "the exports")
            self.assertEqual(self.read(held["nbd_uris"]["qds0"]), then[0])
        finally:
            stop.set()
            writer.join()
        world.until(lambda: world.info()["checkpoint"], "the primary to know")
        waited = world.ask("primary", "qdsinfo", "--wait", "drained", "--timeout", "1")
        self.assertEqual(waited.returncode, EXIT_DEGRADED)
        self.assertIn("checkpoint nightly holds at the secondary", waited.stderr)
        self.assertEqual(world.ask("secondary", "qdscheckpoint", "on").returncode, EXIT_DEGRADED)
        self.checkpoint("off")
        world.wait("drained")
        world.compare()

    def held_again(self) -> Any:
        done = self.world.ask("secondary", "qdscheckpoint", "list", "--json")
        if done.returncode:
            return None
        held = json.loads(done.stdout)["groups"][0]["checkpoint"]
        return held if held["nbd_uris"] else None

    @in_thread
    def test_a_replay_by_hand_stops_at_it(self) -> None:
        self.begin("--journal", "64M")
        world = self.world
        self.write_some(10)
        world.wait("drained")
        self.checkpoint("on", "--name", "before")
        then = [bytes(content) for content in self.content]
        self.write_some(20)
        world.until(self.all_committed, "all to be committed")
        world.stop("secondary")
        told = json.loads(world.at("secondary", "qdsrmdreco", "--json"))["groups"][0]
        self.assertEqual(told["checkpoint"]["name"], "before")
        mirrors = [world.device("secondary", f"qds{n}.mirror") for n in (0, 1)]
        self.assertEqual([mirror.read_bytes() for mirror in mirrors], then)
        told = json.loads(world.at("secondary", "qdsrmdreco", "--release", "--json"))["groups"][0]
        self.assertIsNone(told["checkpoint"])
        self.assertEqual([mirror.read_bytes() for mirror in mirrors],
                         [bytes(content) for content in self.content])  # fmt: skip
        world.start("secondary")
        world.wait("drained")

    def all_committed(self) -> bool:
        gsn = self.world.info()["gsn"]
        return bool(gsn["written"] and gsn["committed"] == gsn["written"])

    @in_thread
    def test_released_before_the_journal_is_full(self) -> None:
        self.begin("--journal", "8M")
        world = self.world
        self.write_some(4)
        world.wait("drained")
        self.checkpoint("on")
        self.write_some(200)
        world.wait("drained")
        world.compare()
        errors = world.info("secondary")["errors"]
        self.assertIn("of the journal is in use", str(errors))
        self.assertIn("is released", str(errors))
        world.logged("qdsrmd", "is released")
