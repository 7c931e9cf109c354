"""NetworkPaths: the network paths of a group, at the primary; each fails and returns by itself.

A session is begun over the first path that answers.  While it lasts, every other path joins it, and
one that is lost joins again, after pauses that double.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.endpoints import connectProtocol
from twisted.internet.error import (
    ConnectError,
    ConnectingCancelledError,
    ConnectionRefusedError,
    DNSLookupError,
)
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from qdsmirror.config import GroupConfig, HostConfig
from qdsmirror.configvalues import NetworkPath
from qdsmirror.errors import (
    BrokenError,
    ConfigError,
    IdentityError,
    ProtocolError,
    QdsError,
    UnreachableError,
)
from qdsmirror.groups.band import Band
from qdsmirror.groups.retry import Retry
from qdsmirror.groups.runtime import Runtime
from qdsmirror.net.asking import why_unconnected
from qdsmirror.net.handshake import PrimaryHandshake, PrimaryOffer
from qdsmirror.net.link import Link

#: Errors after which the same attempt would fail again: an operator must act first.
REFUSALS = (IdentityError, ConfigError, BrokenError)


class Path:
    """One path.

    :ivar state: ``connected``, ``connecting``, ``refused``, or ``stopped``; with its ``reason``.
    :ivar since: when the state was entered, seconds since 1970.
    """

    def __init__(self, way: NetworkPath, wall: Callable[[], float] = time.time) -> None:
        self.way = way
        self.state = "stopped"
        self.reason = ""
        self._wall = wall
        self.since = wall()
        self._link: Link | None = None
        self._sent = 0
        self._received = 0

    def __str__(self) -> str:
        return str(self.way)

    def up(self, link: Link) -> None:
        """Carry frames over a link."""
        self._link = link
        self.enter("connected")

    def enter(self, state: str, reason: str = "") -> bool:
        """Enter a state; tell whether that is news."""
        if state != "connected" and self._link is not None:
            self._sent += self._link.sent_bytes
            self._received += self._link.received_bytes
            self._link = None
        news = (state, reason) != (self.state, self.reason)
        if state != self.state:
            self.since = self._wall()
        self.state, self.reason = state, reason
        return news

    def status(self) -> dict[str, Any]:
        """Describe it, for ``qdsinfo``; bytes of the stream, before TLS."""
        link = self._link
        return {
            "local": self.way.local or None,
            "remote": self.way.remote,
            "port": self.way.port,
            "state": self.state,
            "reason": self.reason,
            "since": self.since,
            "sent_bytes": self._sent + (link.sent_bytes if link is not None else 0),
            "received_bytes": self._received + (link.received_bytes if link is not None else 0),
        }


class NetworkPaths:
    """All paths of a group.

    :ivar several: whether there is more than one.
    """

    log = Logger()

    def __init__(self, config: GroupConfig, host: HostConfig, runtime: Runtime) -> None:
        self._config = config
        self._host = host
        self._runtime = runtime
        self._paths = [Path(way, runtime.wall) for way in config.ways]
        self.several = len(self._paths) > 1
        self._keepers: list[Deferred[None]] = []
        self._retries: list[Retry] = []

    def __len__(self) -> int:
        """Count them."""
        return len(self._paths)

    async def open(self, offer: PrimaryOffer, band: Band) -> None:
        """Begin a session over the first path that answers, that of the last one first.

        :raises QdsError: none does, or the session was refused.
        """
        errors: list[QdsError] = []
        for path in list(self._paths):
            try:
                link = await self._connect(path, offer)
            except QdsError as error:
                path.enter(
                    "refused" if isinstance(error, REFUSALS) else "connecting", error.message
                )
                # Any other error was had from the secondary itself, whatever the path.
                if type(error) not in (UnreachableError, ProtocolError, IdentityError):
                    raise
                errors.append(error)
                continue
            self._paths.sort(key=lambda one: one is not path)
            if self.several:
                self._keep_all(replace(offer, joins=True), band, path, link)
            return
        raise next((one for one in errors if not isinstance(one, REFUSALS)), errors[0])

    def end(self) -> None:
        """Let go of the session's paths."""
        keepers, self._keepers = self._keepers, []
        self._retries.clear()
        for keeper in keepers:
            keeper.cancel()
        for path in self._paths:
            path.enter("stopped", path.reason)

    def try_again(self) -> None:
        """Have every path that waits try at once."""
        for retry in self._retries:
            retry.mended()
            retry.wake()

    def status(self) -> list[dict[str, Any]]:
        """Describe them in the order of the configuration."""
        ways = self._config.ways
        paths = sorted(self._paths, key=lambda one: ways.index(one.way))
        return [path.status() for path in paths]

    async def _connect(self, path: Path, offer: PrimaryOffer) -> Link:
        reactor = self._runtime.reactor
        if path.state == "stopped":
            path.enter("connecting")
        endpoint = self._runtime.endpoint(reactor, self._host, self._config, path.way)
        handshake = PrimaryHandshake(offer, reactor)
        try:
            await connectProtocol(endpoint, handshake)  # type: ignore[no-untyped-call]
        except (ConnectError, DNSLookupError, OSError) as error:
            handshake.done.addErrback(lambda _: None)
            raise unanswered(self._config, path.way, error) from None
        except (CancelledError, ConnectingCancelledError):
            # The connection may be made nevertheless: then it ends before it says anything.
            handshake.done.addErrback(lambda _: None)
            handshake.done.cancel()
            raise
        link = await handshake.done
        assert isinstance(link, Link)
        path.up(link)
        return link

    # -- while a session lasts ------------------------------------------------------------------

    def _keep_all(self, offer: PrimaryOffer, band: Band, first: Path, link: Link) -> None:
        for path in self._paths:
            retry = Retry(self._runtime.reactor, self._config.tunables.reconnect_max)
            self._retries.append(retry)
            keeping = self._keep(path, offer, band, retry, link if path is first else None)
            keeper = ensureDeferred(keeping)
            keeper.addErrback(self._keeper_failed)
            self._keepers.append(keeper)

    async def _keep(
        self, path: Path, offer: PrimaryOffer, band: Band, retry: Retry, link: Link | None
    ) -> None:
        """Have a path in the session for as long as that lasts."""
        while not band.ended:
            refused = False
            if link is not None:
                reason = await band.lost(link)
                link = None
                self._say(path, "connecting", reason)
            else:
                try:
                    link = await self._connect(path, offer)
                    retry.succeeded()
                    self._say(path, "connected", "")
                    continue
                except QdsError as error:
                    refused = isinstance(error, REFUSALS)
                    self._say(path, _state_after(error), error.message)
            await retry.pause(refused=refused)

    def _say(self, path: Path, state: str, reason: str) -> None:
        news = path.enter(state, reason)
        if news or state == "connected":
            self.log.emit(
                LogLevel.error if state == "refused" else LogLevel.info,
                "{group}: path {path} {state}{reason}",
                group=self._config.name,
                path=str(path),
                state=state,
                reason=f": {reason}" if reason else "",
            )

    def _keeper_failed(self, failure: Failure) -> None:
        # Those that are cancelled were forgotten before.
        if self._keepers:
            self.log.failure("{group}: path", failure, group=self._config.name)


def unanswered(config: GroupConfig, way: NetworkPath, error: Exception) -> UnreachableError:
    """Say that nobody answered on a path, and why.

    :param error: of the attempt to connect.
    """
    local, remote, port = way
    source = f" from {local}" if local else ""
    return UnreachableError(
        f"{config.secondary_host} does not answer at {remote} port {port}{source}: "
        f"{why_unconnected(error)}",
        hint=_next_step(config, remote, port, error),
    )


def _next_step(config: GroupConfig, remote: str, port: int | None, error: Exception) -> str:
    """Give what to do about an attempt to connect that failed."""
    if isinstance(error, DNSLookupError):
        return f"see what the name is here: qdshostinfo {remote}; correct address in {config.path}"
    if isinstance(error, ConnectionRefusedError):
        return f"on {config.secondary_host}: launchrmds; if it runs, there: qdsdoctor"
    return (
        f"see whether the network and its firewalls let TCP through: nc -vz {remote} {port}; "
        f"on {config.secondary_host}: qdsinfo"
    )


def _state_after(error: QdsError) -> str:
    return "refused" if isinstance(error, REFUSALS) else "connecting"
