"""An outage longer than the writelog lasts, with real daemons: the application notices nothing."""

from __future__ import annotations

import json
from pathlib import Path

from qdsmirror.errors import EXIT_DEGRADED
from tests.integration.history import HistoryCase
from tests.integration.lab import in_thread
from tests.integration.world import World

SIZE = 8 << 20
#: Far less than is written in bypass, more than an allocator's whims.
GROWTH_BYTES_MAX = 16 << 20


class BypassTests(HistoryCase):
    timeout = 1200
    size = SIZE

    def resident(self, world: World) -> int:
        pid = world.pid("dsgrp000.driver")
        status = Path(f"/proc/{pid}/status").read_text()
        return next(int(x.split()[1]) * 1024 for x in status.splitlines() if "VmRSS" in x)

    @in_thread
    def test_outage_overflow_kill_and_return(self) -> None:
        self.begin_history(3)
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
                self.content(),
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
            self.check_mirror_is_prefix(world)
            world.at("secondary", "qdsinfo", "--is", "coherent")

            begun = json.loads(world.at("primary", "qdsbypass", "off", "--json"))
            self.assertEqual(begun["groups"][0]["kind"], "dirty")
            self.write_some(client, 20)
            world.wait("coherent", 60)
            client.flush()
        world.settle()
        self.assertEqual(world.device("secondary", "qds0.mirror").read_bytes(), self.content())

    @staticmethod
    def at_the_break(world: World) -> bool:
        gsn = world.info()["gsn"]
        return bool(gsn["written"] and gsn["mirrored"] == gsn["written"])
