"""Records name the position up to which their log was durable, and never more (rules.md 6)."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.records import FRAME, parse_record
from qdsmirror.storage.writelog import Writelog
from tests.fakes import MemoryDevice
from tests.groups.test_remote import JOURNAL, RemoteWorld
from tests.groups.world import DriverWorld, unique


def named(log: Writelog, device: MemoryDevice) -> list[tuple[int, int]]:
    """Give each record's end and the durable position that it names."""
    found = []
    content = device.content()
    position = 0
    while position < log.head:
        record = parse_record(content[log.ring.physical(position).offset :], log.log, position)
        position += record.record_bytes
        if record.kind == FRAME:
            found.append((position, record.durable))
    return found


class DriverTests(SynchronousTestCase):
    def test_a_writelog_s_records(self) -> None:
        world = DriverWorld(self, stepped=True)
        unit = world.start()
        client = world.client
        client.write(unit, 0, unique(1), fua=True)
        world.settle()
        durable = unit.durable_end
        self.assertEqual(durable, unit.writelog.head)
        # Two more, appended one after the other; neither is synced.
        for number in (2, 3):
            client.write(unit, 0, unique(number))
            world.step("qds0 writelog")
        self.assertEqual(unit.durable_end, durable)
        world.settle()
        client.write(unit, 0, unique(4))
        world.step("qds0 writelog")
        (one, _), (_, two), (end, three), (_, four) = named(unit.writelog, world.log())
        self.assertEqual((one, two, three), (durable, durable, durable))
        self.assertEqual(four, end)
        world.kill()


class JournalTests(SynchronousTestCase):
    def test_a_journal_s_records(self) -> None:
        world = RemoteWorld(self)
        group = world.start()
        link = world.connect()
        for _ in range(3):
            world.deliver(link, world.frame())
        world.step(JOURNAL)
        world.settle()
        world.deliver(link, world.frame())
        world.settle()
        assert group.mirror is not None
        found = named(group.mirror.journal, world.journal)
        ends = [end for end, _ in found]
        # The second and the third came while the first was being synced.
        self.assertEqual([durable for _, durable in found], [0, ends[0], ends[0], ends[2]])
