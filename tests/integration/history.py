"""Blocks written to an LDSU one after the other: what any prefix of them makes of it."""

from __future__ import annotations

import random
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import COMMAND_SECONDS
from tests.integration.world import World

BLOCK = 64 << 10


class HistoryCase(TestCase):
    """Tests that write to one LDSU, and know in which order.

    :cvar size: of the LDSU, bytes.
    """

    size: int

    def begin_history(self, seed: int) -> None:
        self.source = random.Random(seed)
        self.history: list[tuple[int, bytes]] = []

    def connect(self, world: World) -> NbdClient:
        client: Any = world.until(
            lambda: NbdClient.connect(world.uri(), timeout_seconds=COMMAND_SECONDS),
            "the driver to serve",
        )
        assert isinstance(client, NbdClient)
        return client

    def write_some(self, client: NbdClient, count: int) -> None:
        """Write blocks and keep their history; any error is raised."""
        for _ in range(count):
            offset = self.source.randrange(self.size // BLOCK) * BLOCK
            data = self.source.randbytes(BLOCK)
            client.write(offset, data)
            self.history.append((offset, data))

    def content(self, count: int | None = None) -> bytes:
        """Give what the first writes make of the LDSU; by default all of them."""
        made = bytearray(self.size)
        for offset, data in self.history[:count]:
            made[offset : offset + BLOCK] = data
        return bytes(made)

    def check_mirror_is_prefix(self, world: World, at_least: int = 0) -> None:
        mirror = world.device("secondary", "qds0.mirror").read_bytes()
        counts = [n for n in range(len(self.history) + 1) if self.content(n) == mirror]
        self.assertTrue(counts and counts[-1] >= at_least, f"{counts}, not from {at_least} on")
