"""The memory that the driver's master holds for writelogs, and hands to its children."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

from qdsmirror.daemons import driver as driver_module
from qdsmirror.limits import KIB, MIB
from tests.daemons.test_master import MasterCase
from tests.daemons.world import until


class HeldMemoryTests(MasterCase):
    async def memory(self, number: int) -> Any:
        """Ask a group's child for the memory that it was given: inode, size, first bytes."""
        return (await self.call(f"dsgrp{number:03d}.driver", "Status"))["memory"]

    def write(self, master: Any, number: int, data: bytes) -> None:
        os.pwrite(master.memory(number), data, 0)

    async def test_the_next_child_finds_it_as_it_was(self) -> None:
        self.world.host()
        self.world.group(0)
        self.world.keep_in_memory(0, "256K")
        self.world.group(1)
        master = self.begin()
        await self.running(master, 0, 1)
        self.assertIsNone(await self.memory(1))
        before = await self.memory(0)
        self.assertEqual(before[1:], [256 * KIB, "00000000"])
        self.write(master, 0, b"kept")
        os.kill(self.world.pid(0, "driver"), signal.SIGKILL)
        await until(lambda: len(self.world.events(0)) == 2)
        await self.running(master, 0, 1)
        self.assertEqual(await self.memory(0), [before[0], 256 * KIB, b"kept".hex()])

    async def check_apply(self, children: int) -> None:
        """Another size is another memory; a new group gets its own."""
        self.world.host(children=children)
        self.world.group(0)
        self.world.keep_in_memory(0, "256K")
        master = self.begin()
        await self.running(master, 0)
        self.write(master, 0, b"kept")
        before = await self.memory(0)
        self.world.group(0, window="8M")
        self.world.keep_in_memory(0, "256K")
        self.world.group(1)
        self.world.keep_in_memory(1, "1M")
        master.apply()
        await until(lambda: len(self.world.events(0)) == 3)
        await self.running(master, 0, 1)
        self.assertEqual(await self.memory(0), [before[0], 256 * KIB, b"kept".hex()])
        self.assertEqual((await self.memory(1))[1], MIB)
        self.world.group(0)
        self.world.keep_in_memory(0, "512K")
        master.apply()
        await until(lambda: len(self.world.events(0)) == 5)
        await self.running(master, 0, 1)
        self.assertEqual((await self.memory(0))[1:], [512 * KIB, "00000000"])
        self.world.group(0)
        master.apply()
        await until(lambda: len(self.world.events(0)) == 7)
        await self.running(master, 0, 1)
        self.assertEqual((await self.memory(0), master.memory(0)), (None, None))

    async def test_a_child_of_its_own(self) -> None:
        await self.check_apply(children=8)

    async def test_a_shared_child(self) -> None:
        await self.check_apply(children=1)

    async def test_too_much_is_told_and_the_other_groups_go_on(self) -> None:
        self.world.host()
        for number in (0, 1):
            self.world.group(number)
            self.world.keep_in_memory(number, f"{number + 1}M")
        real = driver_module.make_memory

        def make(group: Any) -> int:
            if group.number == 0:
                raise OSError(12, "Cannot allocate memory")
            return real(group)

        with mock.patch.object(driver_module, "make_memory", make):
            master = self.begin()
            await self.running(master, 0, 1)
        self.assertIsNone(await self.memory(0))
        self.assertEqual((await self.memory(1))[1], 2 * MIB)

    async def test_nothing_is_left_open(self) -> None:
        self.world.host()
        self.world.group(0)
        self.world.keep_in_memory(0, "256K")
        self.world.group(1)
        master = self.begin()
        await self.running(master, 0, 1)
        self.assertEqual(self.held(), 1)
        self.world.paths.group_config(0).unlink()
        master.apply()
        self.assertEqual(self.held(), 0)

    def held(self) -> int:
        links = [os.path.realpath(one) for one in Path("/proc/self/fd").iterdir()]
        return sum("memfd:dsgrp000" in link for link in links)
