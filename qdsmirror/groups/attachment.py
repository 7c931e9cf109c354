"""The pmd at the driver: attached over a watermark socket, it says what is sent and committed."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from qdsmirror.core import watermark
from qdsmirror.core.extension import Extension
from qdsmirror.core.records import Cursor
from qdsmirror.core.ring import Ring
from qdsmirror.core.states import Event
from qdsmirror.core.watermark import Committed
from qdsmirror.errors import ProtocolError, QdsError
from qdsmirror.groups.questions import Questions
from qdsmirror.net.sending import send_now
from qdsmirror.storage.writelog import SharedDevice

if TYPE_CHECKING:
    from qdsmirror.groups.driver import DriverGroup
    from qdsmirror.groups.unit import DriverUnit


class Attachment:
    """The pmd of a group: what it is told and what it says; only the latest counts (rules.md 17).

    :ivar end: our end of the socket to it; ``None`` while no pmd is attached.
    :ivar sent_gsn: what it has sent; ``mirrored_gsn``: what is on the mirror devices; both ``None``
        while no pmd has said so.
    :ivar link: state, reason and code of its link to the secondary.
    :ivar held: whether nothing is sent, and the secondary only asked, whatever its history is.
    :ivar questions: what the secondary is asked by it.
    :ivar listeners: by what they are ``about``, who takes the secondary's reports; one that nobody
        takes is dropped.
    """

    log = Logger()

    def __init__(self, group: DriverGroup) -> None:
        self._group = group
        self.end: DriverEnd | None = None
        self.sent_gsn: int | None = None
        self.mirrored_gsn: int | None = None
        self.link: dict[str, Any] = {"state": "stopped", "code": 0, "reason": ""}
        self.held = False
        self.questions = Questions(self)
        self.listeners: dict[str, Callable[[dict[str, Any]], None]] = {}

    @property
    def is_connected(self) -> bool:
        """Whether there is a link to the secondary."""
        return bool(self.link["state"] == "connected")

    def attach(self) -> tuple[dict[str, Any], list[int], int]:
        """Take a pmd; an earlier one is cut off.

        :returns: what it must know; read-only descriptors of the writelogs' devices, by LDSU
            (rules.md 10); its end of the watermark socket.  The caller closes the descriptors.
        :raises QdsError: the driver does not serve this group (yet).
        """
        group = self._group
        if not group.is_serving:
            raise QdsError(f"{group.name}: the driver does not serve this group yet")
        if group.failures.restarted:
            raise QdsError(
                f"{group.name}: nothing is sent: {group.bypass.reason}",
                hint="see Failed devices in qdsmirror-architecture(7)",
            )
        self.close()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.end = DriverEnd(group)
        self.end.adopt(group.runtime.reactor, ours)
        shared = [unit.writelog.open_shared() for unit in group.units]
        refresh = group.refresh_job
        info = {
            "group": group.number,
            "generations": [
                one.id.hex() for one in group.units[0].writelog.superblock.generations
            ],
            "durable_gsn": group.durable_gsn,
            "committed_gsn": group.committed_gsn,
            "refresh": refresh.announcement() if refresh is not None else None,
            "covered_gsn": group.memory.covered_gsn,
            "held": self.held,
            "units": [
                _unit_info(unit, self.end.layouts[unit.index][0], shared[unit.index])
                for unit in group.units
            ],
        }  # fmt: skip
        return info, [one.fd for row in shared for one in row], theirs.detach()

    def close(self) -> None:
        """Cut the pmd off, if there is one."""
        if self.end is not None:
            self.end.close()

    @property
    def awaits_refresh(self) -> bool:
        """Whether the secondary was reached, and has what came before a log that was lost."""
        return bool(self.link.get("awaits_refresh"))

    def hold(self, held: bool) -> None:
        """Have nothing sent, or all again; where that changes, the pmd attaches anew."""
        if held is self.held:
            return
        self.held = held
        self.renew()

    def renew(self) -> None:
        """Have the pmd attach anew: what it was told is so no longer."""
        end = self.end
        if end is not None:
            self.close()
            self.lost(end)

    # -- what it is told ------------------------------------------------------------------------

    def tell_generations(self, ids: Sequence[bytes]) -> None:
        """Say of which generations frames may be."""
        if self.end is not None:
            self.end.generations(ids)

    def tell_refresh(self, announcement: dict[str, Any] | None) -> None:
        """Say which refresh is in progress."""
        if self.end is not None:
            self.end.refresh(announcement)

    # -- what it says ---------------------------------------------------------------------------

    def said_committed(
        self, end: DriverEnd, sent: int, committed: int, mirrored: int, ends: Sequence[Committed]
    ) -> None:
        """Take its watermarks."""
        if end is not self.end:
            return
        self.sent_gsn = sent
        self.mirrored_gsn = mirrored
        self._group.committed(committed, ends)

    def said_link(self, end: DriverEnd, link: dict[str, Any]) -> None:
        """Take the state of its link."""
        if end is not self.end:
            return
        group = self._group
        was = self.link["state"]
        self.link = link
        up = self.is_connected
        if not up:
            self.questions.fail_all(link["reason"] or "no link")
        if link.get("refresh_lost"):
            group.coherence.restart(link["refresh_lost"])
        if link.get("diverged"):
            group.coherence.diverged(link["reason"])
        if link.get("rebased"):
            group.answering.skip()
            end.know_rebase()
        event = Event.LINK_UP if up else Event.LINK_DOWN
        group.modes.happen(event, group.runtime.wall(), link["reason"])
        if up and link["state"] != was:
            group.bypass.link_up()
            group.backfresh.link_up()
            group.coherence.link_up()
        elif self.awaits_refresh:
            group.bypass.link_up()
        group.memory.look()
        group.answering.link_changed()
        if link["state"] != was:
            self.log.info(
                "{group}: link {state}: {reason}" if link["reason"] else "{group}: link {state}",
                group=group.name, state=link["state"], reason=link["reason"],
            )  # fmt: skip

    def said_answer(self, end: DriverEnd, payload: bytes) -> None:
        """Take the secondary's answer to a question.

        :raises ProtocolError: see :meth:`Questions.answered`.
        """
        if end is self.end:
            self.questions.answered(payload)

    def said_report(self, end: DriverEnd, report: dict[str, Any]) -> None:
        """Take what the secondary tells unasked."""
        listener = self.listeners.get(str(report.get("about")))
        if end is self.end and listener is not None:
            listener(report)

    def lost(self, end: DriverEnd) -> None:
        """Learn that an attachment has ended."""
        if end is not self.end:
            return
        group = self._group
        self.end = None
        self.sent_gsn = self.mirrored_gsn = None
        self.link = {"state": "stopped", "code": 0, "reason": "no pmd is attached"}
        self.questions.fail_all(self.link["reason"])
        group.modes.happen(Event.LINK_DOWN, group.runtime.wall(), "the pmd is gone")
        group.memory.look()
        group.answering.link_changed()


def _layout(unit: DriverUnit) -> tuple[Ring, tuple[Extension, ...]]:
    superblock = unit.writelog.superblock
    return superblock.ring, superblock.extensions


def _unit_info(unit: DriverUnit, ring: Ring, shared: Sequence[SharedDevice]) -> dict[str, Any]:
    tail = Cursor(unit.committed_end, unit.committed_gsn + 1, {unit.index: unit.committed_point})
    return {
        "index": unit.index,
        "name": unit.name,
        "size": unit.size,
        "log": unit.writelog.log.hex(),
        "ring": ring.to_json(),
        "devices": [[one.number, one.shift] for one in shared],
        "tail": tail.to_json(),
        "durable": unit.durable_end,
    }


@implementer(IPushProducer)
class DriverEnd(Protocol):
    """Sends what became durable; a pmd that reads slowly gets the newest state, not a queue.

    :ivar layouts: by LDSU, the writelog's ring and extensions that the pmd was given: it is cut off
        where they have changed, to attach again.  (Another device may have taken an extension's
        number, in the same ring.)
    """

    log = Logger()
    transport: Any

    def __init__(self, group: DriverGroup) -> None:
        self._group = group
        self._parser = watermark.WatermarkParser()
        self._paused = False
        self._missed: dict[int, DriverUnit] = {}
        self.layouts = {unit.index: _layout(unit) for unit in group.units}

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
        if any(_layout(unit) != self.layouts[unit.index] for unit in units):
            self.close()
        else:
            self.transport.write(watermark.pack_durable(gsn, ends))
            if not self._paused:
                send_now(self.transport)

    def refresh(self, announcement: dict[str, Any] | None) -> None:
        """Say which refresh is in progress."""
        self.transport.write(watermark.pack_json(watermark.REFRESH, announcement or {}))

    def generations(self, ids: Sequence[bytes]) -> None:
        """Say of which generations frames may be, before the first of a new one is durable."""
        said = {"generations": [one.hex() for one in ids]}
        self.transport.write(watermark.pack_json(watermark.GENERATIONS, said))

    def ask(self, question: bytes) -> None:
        """Have the secondary asked."""
        self.transport.write(watermark.pack_relayed(watermark.ASK, question))

    def know_rebase(self) -> None:
        """Say that what it told of a rebase is known here."""
        self.transport.write(watermark.pack_rebase_known())

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
                    self._group.pmd.said_committed(self, *watermark.parse_committed(payload))
                elif kind == watermark.LINK:
                    self._group.pmd.said_link(self, watermark.parse_json(payload))
                elif kind == watermark.ANSWER:
                    self._group.pmd.said_answer(self, payload)
                elif kind == watermark.REPORT:
                    self._group.pmd.said_report(self, watermark.parse_json(payload))
        except ProtocolError as error:
            self.log.error("{group}: {error}", group=self._group.name, error=error.message)
            self.close()

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: N802
        """See :class:`Protocol`."""
        self._group.pmd.lost(self)

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
