"""The pmd's end of the watermark socket: what it knows of the driver that it is attached to."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure

from qdsmirror.core import watermark
from qdsmirror.errors import ProtocolError, QdsError
from qdsmirror.groups.outbound import OutUnit
from qdsmirror.net.sending import send_now

if TYPE_CHECKING:
    from qdsmirror.groups.primary import PrimaryGroup


class PmdEnd(Protocol):
    """Takes what the driver says, from an attachment on until it is gone.

    :param group: told of what it must act on.
    :param info: what the driver said at attach; ``descriptors``: of its writelogs.
    :ivar units: the writelogs; ``durable_gsn``: how far all of them are durable.
    :ivar generations: those that frames may be of, newest last.
    :ivar refresh: the refresh that may replace the secondary's history.
    :ivar covered_gsn: up to this number dirty bits stand for all that the secondary may not have
        committed, though the writelogs do not hold it; ``None`` where they hold it all.
    :ivar held: whether nothing is sent, and the secondary only asked, whatever its history is.
    :ivar lost: whether the driver is gone.
    """

    transport: Any

    def __init__(
        self, group: PrimaryGroup, info: dict[str, Any], descriptors: Sequence[int]
    ) -> None:
        self._group = group
        self._parser = watermark.WatermarkParser()
        self._descriptors = descriptors
        # Those that left the list may still be read from places that were free by then.
        self._valid: set[bytes] = set()
        self._take_generations(info["generations"])
        each = iter(descriptors)
        self.units = [OutUnit.from_info(unit, self._valid, each) for unit in info["units"]]
        self.durable_gsn: int = info["durable_gsn"]
        self.refresh: dict[str, Any] | None = info["refresh"]
        self.covered_gsn: int | None = info["covered_gsn"]
        self.held: bool = info["held"]
        self.lost = False
        self._knowing: list[Deferred[None]] = []

    def adopt(self, reactor: Any, end: int) -> None:
        """Speak over our end of a socket pair, a descriptor; closed here."""
        factory = Factory.forProtocol(lambda: self)
        factory.noisy = False
        reactor.adoptStreamConnection(end, socket.AF_UNIX, factory)
        os.close(end)

    def write(self, data: bytes) -> None:
        """Tell the driver, if it is still there."""
        if not self.lost:
            self.transport.write(data)
            send_now(self.transport)

    def knows_rebase(self) -> Deferred[None]:
        """Fire once the driver knows of a rebase what it was just told (rules.md 21).

        It may let go of this end without reading on: then it does not know.

        :raises QdsError: the driver is gone.
        """
        known: Deferred[None] = Deferred()
        self._knowing.append(known)
        if self.lost:
            self._fail_knowing()
        return known

    def _fail_knowing(self) -> None:
        waiting, self._knowing = self._knowing, []
        for one in waiting:
            one.errback(QdsError("the primary's driver is gone"))

    def close(self) -> None:
        """Let go of the driver; its writelogs are still open."""
        if not self.lost:
            self.transport.loseConnection()

    def close_logs(self) -> None:
        """Close the writelogs, which nobody may read any more."""
        for fd in self._descriptors:
            os.close(fd)

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        """See :class:`Protocol`."""
        try:
            for kind, payload in self._parser.feed(data):
                if kind == watermark.DURABLE:
                    self._take_durable(*watermark.parse_durable(payload))
                elif kind == watermark.GENERATIONS:
                    self._take_generations(watermark.parse_json(payload)["generations"])
                elif kind == watermark.ASK:
                    self._group.ask(payload)
                elif kind == watermark.REBASE_KNOWN:
                    waiting, self._knowing = self._knowing, []
                    for one in waiting:
                        one.callback(None)
                elif kind == watermark.REFRESH:
                    self.refresh = watermark.parse_json(payload) or None
                    if self.refresh is not None:
                        # It may overcome what a connection was refused for.
                        self._group.try_again()
        except ProtocolError:
            self.transport.abortConnection()

    def _take_durable(self, gsn: int, ends: list[tuple[int, int]]) -> None:
        self.durable_gsn = gsn
        for index, position in ends:
            self.units[index].durable = position
        self._group.driver_durable(gsn)

    def _take_generations(self, ids: Sequence[str]) -> None:
        self.generations = [bytes.fromhex(one) for one in ids]
        self._valid.update(self.generations)

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: N802
        """See :class:`Protocol`."""
        self.lost = True
        self._fail_knowing()
        self._group.driver_lost(self)
