"""What driver and pmd tell each other leaves before the reactor's turn is over."""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IWriteDescriptor
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from qdsmirror.groups.attached import PmdEnd
from tests.groups.world import DriverWorld, unique


@implementer(IWriteDescriptor)
class Transport:
    """Of a socket; counts how often it has what was written sent at once."""

    connected, disconnecting = True, False

    def __init__(self) -> None:
        self.written = self.sent = 0

    def write(self, data: bytes) -> None:
        self.written += 1

    def doWrite(self) -> None:  # noqa: N802
        self.sent = self.written

    def abortConnection(self) -> None:  # noqa: N802
        self.connected = False

    loseConnection = abortConnection


class PromptTests(SynchronousTestCase):
    def test_the_driver_tells_what_is_durable(self) -> None:
        world = DriverWorld(self)
        world.start()
        world.attach()
        end: Any = world.group.pmd.end
        real, end.transport = end.transport, Transport()
        world.client.write(world.group.units[0], 0, unique(1))
        world.settle()
        self.assertGreater(end.transport.written, 0)
        self.assertEqual(end.transport.sent, end.transport.written)
        # Its producer is paused: what is new waits until it goes on.
        end.pauseProducing()
        before = end.transport.written
        world.client.write(world.group.units[0], 512, unique(2))
        world.settle()
        self.assertEqual(end.transport.written, before)
        end.transport = real

    def test_the_pmd_tells_what_is_committed(self) -> None:
        info = {
            "generations": [], "units": [], "durable_gsn": 0, "refresh": None,
            "covered_gsn": None, "held": False,
        }  # fmt: skip
        group: Any = object()
        end = PmdEnd(group, info, [])
        end.transport = Transport()
        end.write(b"watermarks")
        self.assertEqual((end.transport.written, end.transport.sent), (1, 1))
