"""PrimaryGroup: a group's primary mirror daemon (patent: "child primary mirror daemon").

Attaches to the group's driver, connects to the secondary, proves where the two histories meet, and
ships the journal.  Losing either is ordinary: it goes back and tries again; what was not
acknowledged is sent again, and the secondary's sequence numbers see to it that nothing doubles.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterable, Sequence
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.endpoints import connectProtocol
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from qdsmirror.config import GroupConfig, HostConfig, load_secret
from qdsmirror.core import stream, watermark
from qdsmirror.core.records import Cursor, Point
from qdsmirror.core.stream import Message
from qdsmirror.core.watermark import Committed
from qdsmirror.errors import (
    BrokenError,
    ConfigError,
    CorruptError,
    DivergedError,
    IdentityError,
    ProtocolError,
    QdsError,
    UnreachableError,
)
from qdsmirror.groups.outbound import Outbound, OutUnit
from qdsmirror.groups.runtime import Runtime
from qdsmirror.interfaces import IGroup, IWorker
from qdsmirror.limits import (
    RECONNECT_SECONDS_MIN,
    REFUSED_RETRY_SECONDS,
    REFUSED_RETRY_SECONDS_MIN,
)
from qdsmirror.net.control import why_unconnected
from qdsmirror.net.handshake import (
    PrimaryHandshake,
    PrimaryOffer,
    RebasePosition,
    UnitOffer,
    UnitPosition,
)
from qdsmirror.net.link import ILinkOwner, Link, LinkFactory
from qdsmirror.paths import Paths

#: Errors after which the same attempt would fail again: an operator must act first.
_REFUSALS = (IdentityError, ConfigError, BrokenError)


class _WatermarkClient(Protocol):
    """The pmd's end of the watermark socket."""

    transport: Any

    def __init__(self, owner: PrimaryGroup) -> None:
        self._owner = owner
        self._parser = watermark.WatermarkParser()

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        try:
            for kind, payload in self._parser.feed(data):
                if kind == watermark.DURABLE:
                    self._owner.driver_durable(*watermark.parse_durable(payload))
                elif kind == watermark.GENERATIONS:
                    self._owner.driver_generations(watermark.parse_json(payload)["generations"])
                elif kind == watermark.REFRESH:
                    self._owner.driver_refresh(watermark.parse_json(payload) or None)
        except ProtocolError:
            self.transport.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: N802
        self._owner.driver_lost(self)


@implementer(IGroup, ILinkOwner)
class PrimaryGroup:
    """The primary mirror daemon of one group."""

    log = Logger()

    def __init__(
        self,
        config: GroupConfig,
        host: HostConfig,
        paths: Paths,
        reactor: Any,
        runtime: Runtime | None = None,
    ) -> None:
        self.config = config
        self.host = host
        self.paths = paths
        self.number = config.number
        self.name = config.name
        self.runtime = runtime or Runtime.real(reactor)
        self._reactor = self.runtime.reactor
        self._worker: IWorker
        self._finder: IWorker
        self._secret = b""
        self._running: Deferred[None] | None = None
        self._driver: _WatermarkClient | None = None
        self._units: list[OutUnit] = []
        #: Newest last; and the same for the readers, who ask for membership.
        self._generations: list[bytes] = []
        self._valid: set[bytes] = set()
        self._durable_gsn = 0
        self._refresh: dict[str, Any] | None = None
        self._outbound: Outbound | None = None
        self._lost_refresh = ""
        self._start_at: tuple[dict[int, Cursor], int] | None = None
        self._link: Link | None = None
        self._ended: Deferred[str] | None = None
        self._sleep: Deferred[None] | None = None
        self._delay = RECONNECT_SECONDS_MIN
        self._refused_delay = REFUSED_RETRY_SECONDS_MIN
        self._gsn: dict[str, int | None] = {"sent": None, "committed": None, "mirrored": None}
        self.link_state: dict[str, Any] = {"state": "stopped", "code": 0, "reason": ""}

    # -- life ---------------------------------------------------------------------------------

    def start(self) -> Deferred[None]:
        """Begin to attach and connect; succeeds at once, for both may take their time."""

        async def begin() -> None:
            self._secret = load_secret(self.paths, self.number)
            # Also reads the certificate and key: a broken one is told at once.
            self.runtime.endpoint(self._reactor, self.host, self.config)
            self._worker = self.runtime.quick_worker(f"{self.name} reader")
            self._finder = self.runtime.slow_worker(f"{self.name} finder")
            self._running = ensureDeferred(self._run())
            self._running.addErrback(self._run_failed)

        return ensureDeferred(begin())

    def stop(self) -> Deferred[None]:
        """End the link in order, then let go of the driver."""

        async def end() -> None:
            running, self._running = self._running, None
            self._say("stopped", "the pmd was stopped")
            if self._link is not None:
                ended = self._ended
                self._link.close("the primary mirror daemon was stopped")
                if ended is not None:
                    await ended
            if running is not None:
                running.cancel()
            self._detach()
            await self._finder.stop()
            await self._worker.stop()

        return ensureDeferred(end())

    def _run_failed(self, failure: Failure) -> None:
        # A connection attempt that is cancelled by a stop fails in its own way.
        if self._running is not None and not isinstance(failure.value, CancelledError):
            self.log.failure("{group}: pmd", failure, group=self.name)
            self._say("refused", f"internal error: {failure.getErrorMessage()}", 1)

    async def _run(self) -> None:
        """Attach, connect, ship; again and again."""
        while True:
            try:
                await self._attach()
                while self._driver is not None:
                    await self._session()
            except QdsError as error:
                self._say("connecting", error.message)
                await self._pause(self._backoff())
            finally:
                self._detach()

    async def _session(self) -> None:
        """Have one connection, from its making to its end, and the pause after it."""
        try:
            ended = await self._connect()
        except _REFUSALS as error:
            diverged = isinstance(error, DivergedError)
            self._say("refused", error.message, error.exit_code, error.hint, diverged=diverged)
            await self._pause(self._refused_backoff())
            return
        except QdsError as error:
            lost, self._lost_refresh = self._lost_refresh, ""
            self._say("connecting", error.message, refresh_lost=lost)
            await self._pause(self._backoff())
            return
        self._delay = RECONNECT_SECONDS_MIN
        self._refused_delay = REFUSED_RETRY_SECONDS_MIN
        reason = await ended
        if self.link_state["state"] == "refused":
            await self._pause(self._refused_backoff())
            return
        self._say("connecting", reason)
        if self._driver is not None:
            await self._pause(self._backoff())

    def _backoff(self) -> float:
        delay = self._delay
        self._delay = min(self._delay * 2, self.config.tunables.reconnect_max)
        return delay

    def _refused_backoff(self) -> float:
        """Give the pause after a refusal.

        What is mended at the secondary cannot be told to the primary.  Doubling from the last
        ``apply`` here on, the link is back at the latest after as long again as the mending
        took, and at most REFUSED_RETRY_SECONDS after it.
        """
        delay = min(self._refused_delay, REFUSED_RETRY_SECONDS)
        self._refused_delay = min(delay * 2, REFUSED_RETRY_SECONDS)
        return delay

    async def _pause(self, seconds: float) -> None:
        """Wait, or until something makes another try worth while."""
        self._sleep = Deferred()
        call = self._reactor.callLater(seconds, self._wake)
        try:
            await self._sleep
        finally:
            self._sleep = None
            if call.active():
                call.cancel()

    def _wake(self) -> None:
        sleep, self._sleep = self._sleep, None
        if sleep is not None:
            sleep.callback(None)

    # -- the driver -----------------------------------------------------------------------------

    async def _attach(self) -> None:
        path = self.paths.control_socket(f"{self.name}.driver")
        info, descriptors, end = await self.runtime.attach(self._reactor, path)
        self._valid = set()
        self.driver_generations(info["generations"])
        each = iter(descriptors)
        self._units = [OutUnit.from_info(unit, self._valid, each) for unit in info["units"]]
        self._durable_gsn = info["durable_gsn"]
        self._refresh = info["refresh"]
        client = _WatermarkClient(self)
        self._driver = client
        factory = Factory.forProtocol(lambda: client)
        factory.noisy = False
        self._reactor.adoptStreamConnection(end, socket.AF_UNIX, factory)
        os.close(end)
        was = self.link_state
        # Why there was no connection until now says nothing about the next try.
        reason = "" if was["state"] == "connecting" else was["reason"]
        self._say(was["state"], reason, was["code"])

    def _detach(self) -> None:
        driver, self._driver = self._driver, None
        if self._outbound is not None:
            self._outbound.end()
            self._outbound = None
        if driver is not None:
            driver.transport.loseConnection()
        if self._units:
            self._close_logs([fd for unit in self._units for fd, _ in unit.devices.values()])
            self._units = []

    def _close_logs(self, descriptors: list[int]) -> None:
        """Close the writelogs once no worker reads them any more."""

        def close(_result: None, _error: BaseException | None) -> None:
            for fd in descriptors:
                os.close(fd)

        self._finder.run(_nothing, lambda _result, _error: self._worker.run(_nothing, close))

    def driver_durable(self, gsn: int, ends: list[tuple[int, int]]) -> None:
        """Learn what the driver made durable."""
        self._durable_gsn = gsn
        if self._outbound is not None:
            self._outbound.durable(gsn, ends)
        else:
            for index, position in ends:
                self._units[index].durable = position

    def driver_generations(self, ids: Sequence[str]) -> None:
        """Learn the generations that frames may be of, newest last (rules.md 7)."""
        self._generations = [bytes.fromhex(one) for one in ids]
        # Those that left the list may still be read from places that were free by then.
        self._valid.update(self._generations)

    def driver_refresh(self, refresh: dict[str, Any] | None) -> None:
        """Learn of a refresh: it may overcome what a connection was refused for."""
        self._refresh = refresh
        if refresh is not None:
            self._again()

    def retry(self) -> None:
        """Do not wait any longer after a refusal: the operator says that something has changed."""
        self._refused_delay = REFUSED_RETRY_SECONDS_MIN
        if self.link_state["state"] == "refused":
            self._again()

    def _again(self) -> None:
        """Try at once; what it was refused for may be so no longer."""
        if self.link_state["state"] == "refused":
            self._say("connecting", "")
        self._wake()

    def driver_lost(self, client: _WatermarkClient) -> None:
        """Lose the driver: without it nothing may be sent."""
        if client is self._driver:
            self._driver = None
            if self._link is not None:
                self._link.close("the primary's driver is gone")
            self._wake()

    def _say(self, state: str, reason: str, code: int = 0, hint: str = "", **more: Any) -> None:
        """Set the link's state and tell log and driver, with what else that must know now.

        :param hint: the next step, for the log.
        """
        was = self.link_state
        if (state, reason) != (was["state"], was["reason"]) and (reason or state == "connected"):
            tell = self.log.error if state == "refused" else self.log.info
            text = f"{state}: {reason}" if reason else state
            text = f"{text}; {hint}" if hint else text
            tell("{group}: {text}", group=self.name, text=text)
        self.link_state = {"state": state, "code": code, "reason": reason, "pid": os.getpid()}
        if self._driver is not None:
            said = {**self.link_state, **more}
            self._driver.transport.write(watermark.pack_json(watermark.LINK, said))

    # -- the secondary ----------------------------------------------------------------------------

    async def _connect(self) -> Deferred[str]:
        """Connect, authenticate, map, and begin to send.

        :returns: fires with the reason when the link has ended.
        :raises QdsError: with the reason, when any of that fails.
        """
        # A refusal stands while it is merely tried again: it says more, and waiting does not help.
        if self.link_state["state"] not in ("connecting", "refused"):
            self._say("connecting", "")
        config = self.config
        endpoint = self.runtime.endpoint(self._reactor, self.host, config)
        self._outbound = Outbound(
            self._units,
            self._worker,
            config.tunables.send_window,
            self._committed,
            self._writelog_failed,
        )
        ended = self._ended = Deferred()
        offer = PrimaryOffer(
            group=self.number,
            digest=config.identity_digest(),
            secret=self._secret,
            units=[UnitOffer(unit.index, unit.name, unit.size) for unit in self._units],
            decide=self._decide,
            session=secrets.token_bytes(16),
            stream_factory=LinkFactory(self, self._reactor),
        )
        handshake = PrimaryHandshake(offer, self._reactor)
        try:
            await connectProtocol(endpoint, handshake)  # type: ignore[no-untyped-call]
        except (ConnectError, DNSLookupError, OSError) as error:
            handshake.done.addErrback(lambda _: None)
            raise UnreachableError(
                f"{config.secondary_host} does not answer at {config.secondary_address} port "
                f"{config.port}: {why_unconnected(error)}",
                hint="start its remote mirror daemon with launchrmds",
            ) from None
        await handshake.done
        return ended

    async def _decide(self, acks: list[UnitPosition]) -> Sequence[RebasePosition]:
        """Find where the histories meet, or begin anew with a refresh (rules.md 8)."""
        gsns = {ack.next_gsn for ack in acks}
        if len(gsns) != 1:
            raise ProtocolError("the secondary names different next GSNs for LDSUs of one group")
        try:
            self._start_at = await self._resume(acks, gsns.pop())
            return []
        except DivergedError as error:
            if self._refresh is None:
                raise
            cut = self._refresh["cut"]["points"]
            if any(unit.committed.position > cut[str(unit.index)][0] for unit in self._units):
                # The refresh's first part was committed by a secondary that is no more.
                self._lost_refresh = self._refresh["id"]
                raise ProtocolError(
                    f"the secondary lost part of the refresh ({error.message}); it begins anew"
                ) from error
        return self._rebase(acks, self._refresh)

    async def _resume(
        self, acks: list[UnitPosition], next_gsn: int
    ) -> tuple[dict[int, Cursor], int]:
        blank = all(not ack.generation and ack.next_sequence == 1 for ack in acks)
        if not blank and any(ack.generation not in self._generations for ack in acks):
            raise DivergedError(
                f"the secondary holds another generation ({acks[0].generation.hex() or 'none'}) "
                f"than the primary ({self._generations[-1].hex()})",
                hint="make a new mirror with qdsrefresh --full",
            )

        def find() -> dict[int, Cursor]:
            return {
                ack.index: self._units[ack.index].find(Point(ack.next_sequence, ack.chain))
                for ack in acks
            }

        found: Deferred[dict[int, Cursor]] = Deferred()

        def done(cursors: dict[int, Cursor] | None, error: BaseException | None) -> None:
            if error is not None:
                found.errback(error)
            elif cursors is not None:
                found.callback(cursors)

        self._finder.run(find, done)
        return await found, next_gsn

    def _rebase(
        self, acks: list[UnitPosition], refresh: dict[str, Any]
    ) -> Sequence[RebasePosition]:
        """Let the secondary's history be replaced from the refresh's cut on."""
        cut = refresh["cut"]
        gsn: int = cut["gsn"]
        cursors: dict[int, Cursor] = {}
        positions: list[RebasePosition] = []
        for ack in acks:
            position, sequence, chain = cut["points"][str(ack.index)]
            point = Point(sequence, bytes.fromhex(chain))
            cursors[ack.index] = Cursor(position, gsn, {ack.index: point})
            positions.append(
                RebasePosition(
                    index=ack.index,
                    generation=self._generations[-1],
                    predecessor=ack.generation,
                    next_sequence=sequence,
                    chain=point.chain,
                    next_gsn=gsn,
                    refresh_id=bytes.fromhex(refresh["id"]),
                )
            )
        self.log.warn("{group}: the refresh replaces the secondary's history", group=self.name)
        self._start_at = cursors, gsn
        return positions

    def _committed(
        self, sent: int, committed: int, mirrored: int, ends: Iterable[Committed]
    ) -> None:
        self._gsn = {"sent": sent, "committed": committed, "mirrored": mirrored}
        if self._driver is not None:
            self._driver.transport.write(watermark.pack_committed(sent, committed, mirrored, ends))

    def _writelog_failed(self, error: CorruptError) -> None:
        self._say("refused", error.message, error.exit_code)
        if self._link is not None:
            self._link.close(error.message)

    # -- ILinkOwner -------------------------------------------------------------------------------

    def link_made(self, link: Link) -> None:
        """See :class:`ILinkOwner`."""
        if self._outbound is None or self._start_at is None or self._driver is None:
            link.abort("the primary's driver is gone")
            return
        self._link = link
        self._say("connected", "")
        cursors, gsn = self._start_at
        self._outbound.begin(link, cursors, gsn, self._durable_gsn)

    def link_message(self, link: Link, message: Message) -> None:
        """See :class:`ILinkOwner`."""
        if message.type != stream.ACK:
            raise ProtocolError(f"the secondary sent a message of type {message.type}")
        if self._outbound is not None and link is self._link:
            self._outbound.acknowledged(stream.parse_ack(message.payload))

    def link_writable(self, link: Link) -> None:
        """See :class:`ILinkOwner`."""
        if self._outbound is not None:
            self._outbound.pump()

    def link_lost(self, link: Link, reason: str) -> None:
        """See :class:`ILinkOwner`."""
        if self._outbound is not None:
            self._outbound.end()
            self._outbound = None
        self._link = None
        ended, self._ended = self._ended, None
        if ended is not None:
            ended.callback(reason)

    # -- status -----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """See :class:`IGroup`."""
        return {
            "group": self.number,
            "name": self.name,
            "role": "primary",
            "peer": self.config.secondary_host,
            "pmd": {**self.link_state, "pid": os.getpid()},
            "gsn": self._gsn,
        }


def _nothing() -> None:
    """Wait in a worker's queue."""
