"""PrimaryGroup: a group's primary mirror daemon (patent: "child primary mirror daemon").

Attaches to the group's driver, connects to the secondary, proves where the two histories meet, and
ships the journal.  Losing either is ordinary: it goes back and tries again; what was not
acknowledged is sent again, and the secondary's sequence numbers see to it that nothing doubles.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from qdsmirror.config import GroupConfig, HostConfig, load_secret
from qdsmirror.core import stream, watermark
from qdsmirror.core.compression import Method, known
from qdsmirror.core.records import Cursor
from qdsmirror.core.stream import Message
from qdsmirror.core.watermark import Committed
from qdsmirror.errors import (
    CorruptError,
    DivergedError,
    ProtocolError,
    QdsError,
)
from qdsmirror.groups.attached import PmdEnd
from qdsmirror.groups.band import Band
from qdsmirror.groups.holdback import HoldBack
from qdsmirror.groups.live import LiveSettings
from qdsmirror.groups.network_paths import REFUSALS, NetworkPaths
from qdsmirror.groups.outbound import Outbound
from qdsmirror.groups.resume import (
    AwaitsRefreshError,
    RefreshLostError,
    Resumption,
    agreed_gsn,
    at_cut,
    is_covered,
    meeting_places,
)
from qdsmirror.groups.retry import Retry
from qdsmirror.groups.runtime import Runtime
from qdsmirror.groups.traffic import Traffic
from qdsmirror.groups.wire import Wire
from qdsmirror.interfaces import IGroup, IWorker
from qdsmirror.limits import COMPRESSION_THREADS, SEND_WINDOW_BYTES_MAX, STRIPE_BYTES
from qdsmirror.net.handshake import PrimaryOffer, RebasePosition, UnitOffer, UnitPosition
from qdsmirror.net.link import ILinkOwner, LinkFactory
from qdsmirror.paths import Paths

#: What the secondary says to the driver: types in the stream, and on the watermark socket.
_RELAYED = {stream.ANSWER: watermark.ANSWER, stream.REPORT: watermark.REPORT}


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
        self._driver: PmdEnd | None = None
        self._outbound: Outbound | None = None
        self._resumption: Resumption | None = None
        self._link: Band | None = None
        self._ways = NetworkPaths(config, host, self.runtime)
        self._method = Method.of(config.tunables.compression)
        self._wire = Wire(str(self._method))
        self._traffic = Traffic([ldsu.name for ldsu in config.ldsus])
        self._compressors: list[IWorker] = []
        self._ended: Deferred[str] | None = None
        self.settings = LiveSettings(self, "pmd", self._go_by_settings)
        self._hold_back = HoldBack(self._reactor, self._send_more)
        self._retry = Retry(self._reactor, config.tunables.reconnect_max)
        #: Somebody has acted since the attempt under way began.
        self._outdated = False
        self._gsn: dict[str, int | None] = {"sent": None, "committed": None, "mirrored": None}
        self.link_state: dict[str, Any] = {"state": "stopped", "code": 0, "reason": "", "hint": ""}

    # -- life ---------------------------------------------------------------------------------

    def start(self) -> Deferred[None]:
        """Begin to attach and connect; succeeds at once, for both may take their time."""

        async def begin() -> None:
            self._secret = load_secret(self.paths, self.number)
            # Also reads the certificate and key: a broken one is told at once.
            self.runtime.endpoint(self._reactor, self.host, self.config, self.config.ways[0])
            self._worker = self.runtime.quick_worker(f"{self.name} reader")
            self._finder = self.runtime.slow_worker(f"{self.name} finder")
            self._running = ensureDeferred(self._run())
            self._running.addErrback(self._run_failed)

        return ensureDeferred(begin())

    def stop(self) -> Deferred[None]:
        """End the link in order, then let go of the driver."""

        async def end() -> None:
            running, self._running = self._running, None
            self._retry.stop()
            self._say("stopped", "the pmd was stopped")
            if self._link is not None:
                ended = self._ended
                self._link.close("the primary mirror daemon was stopped")
                if ended is not None:
                    await ended
            if running is not None:
                running.cancel()
            self._ways.end()
            self._detach()
            for worker in (*self._compressors, self._finder, self._worker):
                await worker.stop()

        return ensureDeferred(end())

    def _run_failed(self, failure: Failure) -> None:
        # A connection attempt that is cancelled by a stop fails in its own way.
        if self._running is not None and not isinstance(failure.value, CancelledError):
            self.log.failure("{group}: pmd", failure, group=self.name)
            self._say("refused", f"internal error: {failure.getErrorMessage()}", 1)

    @property
    def log_gsn(self) -> int | None:
        """The sequence number that lines of the log bear: what is sent."""
        return self._gsn["sent"]

    def set_live(self, settings: str) -> Deferred[dict[str, Any]]:
        """See :meth:`LiveSettings.set`."""
        return self.settings.set(settings)

    def set_knobs(self, knobs: str) -> dict[str, Any]:
        """Take what throttles hold it back by: ``sleep_us`` and ``limit_kbps``.

        :param knobs: see :func:`parse_knobs`.
        """
        return {"knobs": self._hold_back.set(knobs)}

    def _send_more(self) -> None:
        if self._link is not None:
            self._link.go_on()

    def _go_by_settings(self) -> None:
        tunables = self.config.tunables
        self._retry.longest_seconds = tunables.reconnect_max
        method = Method.of(tunables.compression)
        if method != self._method:
            self._method, self._wire.wanted = method, str(method)
            if self._link is not None:
                # It is agreed upon when a session begins.
                self._link.close("the compression was changed")
        if self._outbound is not None:
            self._outbound.window = tunables.send_window
            self._outbound.pump()

    async def _run(self) -> None:
        """Attach, connect, ship; again and again."""
        while True:
            try:
                driver = await self._attach()
                while not driver.lost:
                    await self._session(driver)
            except QdsError as error:
                self._say("connecting", error.message)
                await self._retry.pause()
            finally:
                self._detach()

    async def _session(self, driver: PmdEnd) -> None:
        """Have one connection, from its making to its end, and the pause after it."""
        self._outdated = False
        try:
            ended = await self._connect(driver)
        except REFUSALS as error:
            if self._outdated:
                # What it was refused for may be so no longer: to say so would mislead whoever
                # has mended that and waits.
                self._retry.go_on()
                return
            awaits = isinstance(error, AwaitsRefreshError)
            said: dict[str, Any] = {
                "diverged": isinstance(error, DivergedError) and not awaits,
                "awaits_refresh": awaits,
            }
            if awaits and self.config.tunables.auto_refresh:
                # Nobody has to do anything.
                self._say("connecting", error.message, **said)
            else:
                self._say("refused", error.message, error.exit_code, error.hint, **said)
            await self._retry.pause(refused=True)
            return
        except QdsError as error:
            lost = error.refresh if isinstance(error, RefreshLostError) else ""
            self._say("connecting", error.message, 0, error.hint, refresh_lost=lost)
            await self._retry.pause()
            return
        self._retry.succeeded()
        reason = await ended
        if self.link_state["state"] == "refused":
            await self._retry.pause(refused=True)
            return
        self._say("connecting", reason)
        if not driver.lost:
            await self._retry.pause()

    # -- the driver -----------------------------------------------------------------------------

    async def _attach(self) -> PmdEnd:
        path = self.paths.control_socket(f"{self.name}.driver")
        info, descriptors, end = await self.runtime.attach(self._reactor, path)
        driver = self._driver = PmdEnd(self, info, descriptors)
        driver.adopt(self._reactor, end)
        was = self.link_state
        # Why there was no connection until now says nothing about the next try.
        reason = "" if was["state"] == "connecting" else was["reason"]
        self._say(was["state"], reason, was["code"], was.get("hint", "") if reason else "")
        return driver

    def _detach(self) -> None:
        driver, self._driver = self._driver, None
        self._hold_back.end()
        if self._outbound is not None:
            self._outbound.end()
            self._outbound = None
        if driver is not None:
            driver.close()
            self._close_logs(driver)

    def _close_logs(self, driver: PmdEnd) -> None:
        """Close the writelogs once no worker reads them any more."""

        def close(_result: None, _error: BaseException | None) -> None:
            driver.close_logs()

        self._finder.run(_nothing, lambda _result, _error: self._worker.run(_nothing, close))

    def driver_durable(self, gsn: int) -> None:
        """Learn how far the driver's writelogs are durable."""
        if self._outbound is not None:
            self._outbound.durable(gsn)

    def ask(self, question: bytes) -> None:
        """Relay a question; the driver asks again what a lost link leaves without an answer."""
        if self._link is not None:
            self._link.send(stream.pack_relayed(stream.ASK, question))

    def driver_lost(self, driver: PmdEnd) -> None:
        """Lose the driver: without it nothing may be sent."""
        if driver is self._driver:
            if self._link is not None:
                self._link.close("the primary's driver is gone")
            self._retry.wake()

    def retry(self) -> None:
        """Do not wait any longer after a refusal: the operator says that something has changed."""
        self._retry.mended()
        self._outdated = True
        if self.link_state["state"] == "refused":
            self.try_again()

    def try_again(self) -> None:
        """Try at once: what it was refused for may be so no longer."""
        self._outdated = True
        if self.link_state["state"] == "refused":
            self._say("connecting", "")
        self._retry.wake()
        self._ways.try_again()

    def _say(self, state: str, reason: str, code: int = 0, hint: str = "", **more: Any) -> None:
        """Set the link's state and tell log and driver, with what else that must know now.

        :param hint: the next step, for the log and for ``qdsdoctor``.
        """
        was = self.link_state
        if (state, reason) != (was["state"], was["reason"]) and (reason or state == "connected"):
            tell = self.log.error if state == "refused" else self.log.info
            text = f"{state}: {reason}" if reason else state
            text = f"{text}; {hint}" if hint else text
            tell("{group}: {text}", group=self.name, text=text)
        self.link_state = {
            "state": state, "code": code, "reason": reason, "hint": hint, "pid": os.getpid(),
        }  # fmt: skip
        if self._driver is not None:
            said = {**self.link_state, **more}
            self._driver.write(watermark.pack_json(watermark.LINK, said))

    # -- the secondary ----------------------------------------------------------------------------

    async def _connect(self, driver: PmdEnd) -> Deferred[str]:
        """Connect, authenticate, map, and begin to send.

        :returns: fires with the reason when the link has ended.
        :raises QdsError: with the reason, when any of that fails.
        """
        # A refusal stands while it is merely tried again: it says more, and waiting does not help.
        if self.link_state["state"] not in ("connecting", "refused"):
            self._say("connecting", "")
        config = self.config
        self._outbound = Outbound(
            driver.units,
            self._worker,
            config.tunables.send_window,
            self._committed,
            self._writelog_failed,
            STRIPE_BYTES if self._ways.several else SEND_WINDOW_BYTES_MAX,
            self._traffic,
            self._hold_back,
        )
        band = Band(
            self,
            self._reactor,
            self._wire,
            several=self._ways.several,
            method=self._method,
            compressors=self._make_compressors,
            hold_back=self._hold_back,
        )
        ended = self._ended = Deferred()
        offer = PrimaryOffer(
            group=self.number,
            digest=config.identity_digest(),
            secret=self._secret,
            units=[UnitOffer(unit.index, unit.name, unit.size) for unit in driver.units],
            decide=partial(self._decide, driver),
            session=secrets.token_bytes(16),
            stream_factory=LinkFactory(band, self._reactor),
            compression=known(self._method.name),
            agreed=partial(self._agreed, band),
            paths=len(self._ways),
        )
        await self._ways.open(offer, band)
        return ended

    def _make_compressors(self) -> Sequence[IWorker]:
        while len(self._compressors) < COMPRESSION_THREADS:
            self._compressors.append(self.runtime.slow_worker(f"{self.name} compressor"))
        return self._compressors

    def _agreed(self, band: Band, name: str) -> None:
        """Learn what compression the secondary takes."""
        band.agreed(name)
        self._wire.compression = str(band.method)
        if self._wire.compression != self._wire.wanted:
            self.log.warn(
                "{group}: nothing is compressed: not both hosts know {wanted}",
                group=self.name, wanted=self._wire.wanted,
            )  # fmt: skip

    async def _decide(
        self, driver: PmdEnd, acks: Sequence[UnitPosition]
    ) -> Sequence[RebasePosition]:
        """Find where the histories meet, or begin anew with a refresh (rules.md 8).

        For a driver that only asks, they need not.
        """
        if driver.held:
            self._resumption = Resumption({}, 0)
            return ()
        try:
            gsn = agreed_gsn(acks, driver.generations)
            cursors = await self._found(partial(meeting_places, driver.units, acks))
            self._resumption = Resumption(cursors, gsn)
        except DivergedError as error:
            covered = is_covered(acks, driver.units, driver.generations, driver.covered_gsn)
            if driver.refresh is None and covered:
                raise AwaitsRefreshError(self.number) from error
            if driver.refresh is None or (driver.refresh.get("dirty") and not covered):
                raise
            newest = driver.generations[-1]
            self._resumption = at_cut(driver.refresh, acks, driver.units, newest, error)
            self.log.warn("{group}: the refresh replaces the secondary's history", group=self.name)
            # Known before it may happen: driver, pmd or connection may be lost in the middle of it.
            self._say("connecting", "the refresh replaces the secondary's history", rebased=True)
            await driver.knows_rebase()
        return self._resumption.rebases

    def _found(self, search: Callable[[], dict[int, Cursor]]) -> Deferred[dict[int, Cursor]]:
        found: Deferred[dict[int, Cursor]] = Deferred()

        def done(cursors: dict[int, Cursor] | None, error: BaseException | None) -> None:
            if error is not None:
                found.errback(error)
            elif cursors is not None:
                found.callback(cursors)

        self._finder.run(search, done)
        return found

    def _committed(
        self, sent: int, committed: int, mirrored: int, ends: Iterable[Committed]
    ) -> None:
        self._gsn = {"sent": sent, "committed": committed, "mirrored": mirrored}
        if self._driver is not None:
            self._driver.write(watermark.pack_committed(sent, committed, mirrored, ends))

    def _writelog_failed(self, error: CorruptError) -> None:
        self._say("refused", error.message, error.exit_code)
        if self._link is not None:
            self._link.close(error.message)

    # -- ILinkOwner -------------------------------------------------------------------------------

    def link_made(self, link: Band) -> None:
        """See :class:`ILinkOwner`."""
        driver, start = self._driver, self._resumption
        if self._outbound is None or start is None or driver is None or driver.lost:
            link.abort("the primary's driver is gone")
            return
        self._link = link
        self._say("connected", "", rebased=bool(start.rebases))
        if driver.held:
            self._outbound = None
            return
        self._outbound.begin(link, start.cursors, start.next_gsn, driver.durable_gsn)

    def link_message(self, link: Band, message: Message) -> None:
        """See :class:`ILinkOwner`."""
        relayed = _RELAYED.get(message.type)
        if relayed is not None:
            if self._driver is not None and link is self._link:
                self._driver.write(watermark.pack_relayed(relayed, bytes(message.payload)))
        elif message.type != stream.ACK:
            raise ProtocolError(f"the secondary sent a message of type {message.type}")
        elif self._outbound is not None and link is self._link:
            self._outbound.acknowledged(stream.parse_ack(message.payload))

    def link_writable(self, link: Band) -> None:
        """See :class:`ILinkOwner`."""
        if self._outbound is not None:
            self._outbound.pump()

    def link_lost(self, link: Band, reason: str) -> None:
        """See :class:`ILinkOwner`."""
        self._ways.end()
        self._wire.compression = ""
        if self._outbound is not None:
            self._outbound.end()
            self._outbound = None
        self._hold_back.end()
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
            "settings": self.settings.status(),
            "wire": self._wire.status(self._ways.status()),
            "traffic": self._traffic.status(),
            "knobs": self._hold_back.status(),
        }


def _nothing() -> None:
    """Wait in a worker's queue."""
