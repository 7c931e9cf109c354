"""An outage longer than the writelog lasts, with real daemons: the application notices nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

from twisted.trial.unittest import TestCase

from qdsmirror.errors import EXIT_DEGRADED
from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import in_thread
from tests.integration.world import World

SIZE = 8 << 20
BLOCK = 64 << 10
#: Far less than is written in bypass, more than an allocator's whims.
GROWTH_BYTES_MAX = 16 << 20


class BypassTests(TestCase):
    timeout = 400

    def connect(self, world: World) -> NbdClient:
        return world.until(lambda: NbdClient.connect(world.uri()), "the driver to serve")  # type: ignore[no-any-return]

    def write_some(self, client: NbdClient, count: int) -> None:
        """Write blocks and keep their history; any error is raised."""
        for _ in range(count):
            offset = self.source.randrange(SIZE // BLOCK) * BLOCK
            data = self.source.randbytes(BLOCK)
            client.write(offset, data)
            self.history.append((offset, data))

    def content(self, count: int) -> bytes:
        made = bytearray(SIZE)
        for offset, data in self.history[:count]:
            made[offset : offset + BLOCK] = data
        return bytes(made)

    def resident(self, world: World) -> int:
        pid = world.pid("dsgrp000.driver")
        status = Path(f"/proc/{pid}/status").read_text()
        return next(int(x.split()[1]) * 1024 for x in status.splitlines() if "VmRSS" in x)

    @in_thread
    def test_outage_overflow_kill_and_return(self) -> None:
        self.source = random.Random(3)
        self.history: list[tuple[int, bytes]] = []
        world = World(self, "--size", "8M", "--writelog", "2M", "--journal", "8M",
                      "--overflow", "bypass")  # fmt: skip
        world.create()
        world.start()
        world.stop("secondary")
        with self.connect(world) as client:
            while world.info()["state"] != "bypass":
                self.write_some(client, 10)
            before = self.resident(world)
            self.write_some(client, 1000)
            self.assertLess(self.resident(world) - before, GROWTH_BYTES_MAX)
            client.flush()
            victim = world.kill("dsgrp000.driver")
        world.until(lambda: world.pid("dsgrp000.driver") not in (None, victim), "another driver")
        with self.connect(world) as client:
            self.write_some(client, 20)
            self.assertEqual(
                b"".join(client.read(at, 1 << 20) for at in range(0, SIZE, 1 << 20)),
                self.content(len(self.history)),
            )
            info = world.info()
            self.assertEqual((info["state"], info["coherent"]), ("bypass", True))
            self.assertEqual(info["reason"], "the writelog of qds0 is full")
            self.assertGreater(info["ldsus"][0]["dirty_bytes"], 0)
            again = world.ask("primary", "qdsbypass", "on")
            self.assertEqual(again.returncode, EXIT_DEGRADED)
            self.assertIn("qdsbypass off", again.stderr)

            world.start("secondary")
            world.until(lambda: self.at_the_break(world), "all before the break")
            mirror = world.device("secondary", "qds0.mirror").read_bytes()
            counts = [n for n in range(len(self.history)) if self.content(n) == mirror]
            self.assertTrue(counts, "the mirror is no prefix of what was written")
            world.at("secondary", "qdsinfo", "--is", "coherent")

            begun = json.loads(world.at("primary", "qdsbypass", "off", "--json"))
            self.assertEqual(begun["groups"][0]["kind"], "dirty")
            self.write_some(client, 20)
            world.wait("coherent", 60)
            client.flush()
        world.settle()
        self.assertEqual(
            world.device("secondary", "qds0.mirror").read_bytes(), self.content(len(self.history))
        )

    @staticmethod
    def at_the_break(world: World) -> bool:
        gsn = world.info()["gsn"]
        return bool(gsn["mirrored"] == gsn["written"])
