"""A driver whose writelog is extended and freed under load, and the pmd that reads it."""

from __future__ import annotations

import os
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.groups.outbound import OutUnit
from qdsmirror.groups.unit import DriverUnit
from qdsmirror.storage.extension import PoolDevice
from tests.fakes import MemoryDevice
from tests.groups.world import GENERATION, DriverWorld, unique

SIZE = 256 * 1024


class BothDevices(MemoryDevice):
    """What is durable of a writelog on two devices, for the watch over NO-HIDDEN."""

    parts: tuple[MemoryDevice, ...] = ()

    def durable(self) -> bytes:
        return b"".join(part.durable() for part in self.parts)


class ExtendedLogTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.world = DriverWorld(self)
        self.unit = self.world.start()
        extension = MemoryDevice(SIZE, path="/near/extension")
        self.pool = PoolDevice.initialise(extension, 0)
        both = BothDevices(0)
        both.parts = (self.world.log(), extension)
        self.world.data().log = lambda: both
        self.count = 0

    def attach(self) -> OutUnit:
        info, descriptors, end = self.world.group.attach_pmd()
        for descriptor in (*descriptors, end):
            self.addCleanup(os.close, descriptor)
        each = iter(descriptors)
        out = OutUnit.from_info(info["units"][0], {GENERATION}, each)
        self.assertEqual(list(each), [])
        return out

    def fill(self, unit: DriverUnit) -> None:
        """Write until the log is full."""
        before = -1
        while unit.writelog.head != before:
            before = unit.writelog.head
            self.count += 1
            self.world.client.write(unit, 0, unique(self.count))
            self.world.settle()

    def read(self, out: OutUnit) -> tuple[int, Any]:
        reader = out.read_from(out.committed)
        count = 0
        while found := reader.read(1 << 20, self.unit.durable_end):
            count += len(found)
        return count, reader.position

    def test_the_pmd_attaches_again_and_reads_all_devices(self) -> None:
        self.fill(self.unit)
        old = self.attach()
        transport = self.world.reactor.adopted[-1].transport
        end = self.unit.durable_end
        before, position = self.read(old)
        self.assertEqual(position, end)
        self.unit.writelog.extend(self.pool)
        self.assertFalse(transport.disconnecting or transport.disconnected)
        self.unit.pump()
        self.world.settle()
        self.fill(self.unit)
        self.assertGreater(self.unit.durable_end, end)
        self.assertTrue(transport.disconnecting or transport.disconnected, "it reads an old layout")
        new = self.attach()
        self.assertEqual(sorted(new.devices), [0, 1])
        after, position = self.read(new)
        self.assertEqual(position, self.unit.durable_end)
        self.assertGreater(after, before + 20)
