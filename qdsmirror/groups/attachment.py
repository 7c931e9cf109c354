"""The driver's end of the watermark socket to the attached pmd."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from qdsmirror.core import watermark
from qdsmirror.errors import ProtocolError

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit


@implementer(IPushProducer)
class DriverEnd(Protocol):
    """Sends what became durable; a pmd that reads slowly gets the newest state, not a queue.

    :ivar rings: by LDSU, what the pmd was told of its writelog's layout: it is cut off where that
        has changed, to attach again.
    """

    log = Logger()
    transport: Any

    def __init__(self, group: DriverGroup) -> None:
        self._group = group
        self._parser = watermark.WatermarkParser()
        self._paused = False
        self._missed: dict[int, DriverUnit] = {}
        self.rings = {unit.index: unit.writelog.ring for unit in group.units}

    def adopt(self, reactor: Any, end: socket.socket) -> None:
        """Speak over our end of a socket pair."""
        reactor.adoptStreamConnection(end.fileno(), socket.AF_UNIX, _Once(self))
        end.close()

    def connectionMade(self) -> None:  # noqa: N802
        """See :class:`Protocol`."""
        self.transport.registerProducer(self, True)

    def durable(self, gsn: int, unit: DriverUnit) -> None:
        """Say how far the group and one LDSU's writelog are durable."""
        if self.transport is None or self._paused:
            self._missed[unit.index] = unit
            return
        self._say(gsn, [unit])

    def _say(self, gsn: int, units: Sequence[DriverUnit]) -> None:
        ends = [(unit.index, unit.durable_end) for unit in units]
        if any(unit.writelog.ring != self.rings[unit.index] for unit in units):
            self.close()
        else:
            self.transport.write(watermark.pack_durable(gsn, ends))

    def refresh(self, announcement: dict[str, Any] | None) -> None:
        """Say which refresh is in progress."""
        self.transport.write(watermark.pack_json(watermark.REFRESH, announcement or {}))

    def generations(self, ids: Sequence[bytes]) -> None:
        """Say of which generations frames may be, before the first of a new one is durable."""
        said = {"generations": [one.hex() for one in ids]}
        self.transport.write(watermark.pack_json(watermark.GENERATIONS, said))

    def pauseProducing(self) -> None:  # noqa: N802
        """See :class:`IPushProducer`."""
        self._paused = True

    def resumeProducing(self) -> None:  # noqa: N802
        """See :class:`IPushProducer`."""
        self._paused = False
        if self._missed and self.transport is not None:
            units = list(self._missed.values())
            self._missed.clear()
            self._say(self._group.durable_gsn, units)

    def stopProducing(self) -> None:  # noqa: N802
        """See :class:`IPushProducer`."""

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        """See :class:`Protocol`."""
        try:
            for kind, payload in self._parser.feed(data):
                if kind == watermark.COMMITTED:
                    self._group.pmd_committed(self, *watermark.parse_committed(payload))
                elif kind == watermark.LINK:
                    self._group.pmd_link(self, watermark.parse_json(payload))
        except ProtocolError as error:
            self.log.error("{error}", error=error.message)
            self.close()

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: N802
        """See :class:`Protocol`."""
        self._group.pmd_lost(self)

    def close(self) -> None:
        """Cut the pmd off."""
        if self.transport is not None:
            self.transport.abortConnection()


class _Once(Factory):
    """Gives one protocol that exists already."""

    noisy = False

    def __init__(self, protocol: Protocol) -> None:
        self._made = protocol

    def buildProtocol(self, addr: object) -> Protocol:  # noqa: N802
        return self._made
