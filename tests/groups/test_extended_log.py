"""A driver whose writelog is extended and freed under load, and the pmd that reads it."""

from __future__ import annotations

import os
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.records import Cursor
from qdsmirror.groups.outbound import OutUnit
from qdsmirror.groups.unit import DriverUnit
from qdsmirror.storage.extension import PoolDevice
from qdsmirror.storage.partition import divide
from tests.fakes import MemoryDevice
from tests.groups.world import GENERATION, DriverWorld, unique
from tests.storage.logworld import FrameMaker, append, initialise, write

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


class SharedLogTests(SynchronousTestCase):
    def test_the_pmd_reads_its_part_of_a_shared_device(self) -> None:
        device = MemoryDevice(2 * SIZE)
        self.addCleanup(device.close)
        log = initialise(divide(device, ["one", "two"])[1])
        maker = FrameMaker()
        append(log, maker.make(0, [write(0, b"x" * 512)]))
        (shared,) = log.open_shared()
        self.addCleanup(os.close, shared.fd)
        info = {
            "index": 0,
            "name": "qds0",
            "size": SIZE,
            "log": log.log.hex(),
            "ring": log.ring.to_json(),
            "devices": [[shared.number, shared.shift]],
            "tail": Cursor().to_json(),
            "durable": log.head,
        }
        out = OutUnit.from_info(info, {maker.generation}, iter([shared.fd]))
        (found,) = out.read_from(out.committed).read(1 << 20, out.durable)
        self.assertEqual(found.header.gsn_first, 1)
