"""RemoteGroup: a group's remote mirror daemon, its one writer at the secondary (rules.md 17).

Its life and its connections; what arrives goes to :class:`Committing`.  A newer authenticated
connection supersedes an older one; where it goes on is what is durable in the journal then.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.protocol import Factory
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from zope.interface import implementer

from qdsmirror.config import GroupConfig, HostConfig, load_secret
from qdsmirror.core import stream
from qdsmirror.core.compression import Method
from qdsmirror.core.records import Cursor, Generation, Point
from qdsmirror.core.stream import Message
from qdsmirror.core.verify import VERIFY, Verdict
from qdsmirror.errors import (
    BrokenError,
    ConfigError,
    DeviceFailedError,
    IdentityError,
    ProtocolError,
    QdsError,
)
from qdsmirror.groups.authority import Authority
from qdsmirror.groups.committing import Committing
from qdsmirror.groups.holding import Holding
from qdsmirror.groups.live import LiveSettings
from qdsmirror.groups.remote_status import remote_status
from qdsmirror.groups.replies import Replies
from qdsmirror.groups.runtime import Runtime
from qdsmirror.groups.session import Session
from qdsmirror.groups.wire import Wire
from qdsmirror.interfaces import IGroup, IWorker
from qdsmirror.limits import UNAUTHENTICATED_MAX
from qdsmirror.net.handshake import RebasePosition, RemoteHandshake, UnitPosition
from qdsmirror.net.link import ILinkOwner
from qdsmirror.net.sending import UnbufferedTlsFactory
from qdsmirror.paths import Paths
from qdsmirror.storage.journal import Mirror
from qdsmirror.storage.latch import FailureLatch

_ERRORS_KEPT = 8


@implementer(IGroup, ILinkOwner)
class RemoteGroup:
    """The remote mirror daemon of one group.

    :ivar committing: what is received, from the start to the end of :meth:`stop`.
    :ivar holding: the group's checkpoint.
    :ivar since: when the link's state was entered, seconds since 1970.
    :ivar notes: the last errors, for ``qdsinfo``.
    :ivar epoch: counts what invalidates positions that a handshake was told.
    """

    log = Logger()

    def __init__(
        self,
        config: GroupConfig,
        host: HostConfig,
        paths: Paths,
        reactor: Any,
        runtime: Runtime | None = None,
        latch: FailureLatch | None = None,
    ) -> None:
        self.config = config
        self.host = host
        self.paths = paths
        self.number = config.number
        self.name = config.name
        self.runtime = runtime or Runtime.real(reactor)
        self._reactor = self.runtime.reactor
        self._latch = latch or FailureLatch(paths.state_file(config.number))
        self.secret = b""
        self.settings = LiveSettings(self, "rmd", self._go_by_settings)
        self.committing: Committing | None = None
        self.holding = Holding(self)
        self.epoch = 0
        self.link_state: dict[str, Any] = {"state": "stopped", "code": 0, "reason": "", "hint": ""}
        self.since = self.runtime.wall()
        self.notes: deque[str] = deque(maxlen=_ERRORS_KEPT)
        self._replies: Replies | None = None
        self._link: Session | None = None
        self._unpacker: IWorker | None = None
        self.wire = Wire(str(Method.of(config.tunables.compression)))
        self._handshakes = 0
        self._paused = False
        #: Whether the primary may not know on this link what verifies have found.
        self._untold = False

    @property
    def mirror(self) -> Mirror | None:
        """The journal and the mirror devices, while they are open."""
        return self.committing.mirror if self.committing is not None else None

    @property
    def failed(self) -> str:
        """Why nothing is committed any more; empty while all is well."""
        return self.committing.failed if self.committing is not None else ""

    @property
    def log_gsn(self) -> int | None:
        """The sequence number that lines of the log bear: what is committed."""
        return self.committing.committed_gsn if self.committing is not None else None

    # -- life ---------------------------------------------------------------------------------

    @inlineCallbacks
    def start(self) -> Any:
        """Open and lock everything, replay the journal, then take connections."""
        self.secret = load_secret(self.paths, self.number)
        self._latch.check(
            (self.config.journal_device, *(ldsu.mirror_device for ldsu in self.config.ldsus))
        )
        self.runtime.server_tls(self.host, self.config.primary_host)
        mirror: Mirror = yield self._in_thread(Mirror.open, self.config, self.runtime.open_device)
        try:
            replayed = yield self._in_thread(mirror.replay)
        except BaseException:
            mirror.close()
            raise
        for text in mirror.take_told():
            self.log.error("{group}: {text}", group=self.name, text=text)
        if replayed:
            self.log.info(
                "{group}: replayed {count} frames of the journal", group=self.name, count=replayed
            )
        self.committing = Committing(
            mirror,
            self.runtime,
            self._acknowledge,
            self._press,
            self._verified,
            self._committing_failed,
            self.holding,
        )
        hasher = self.runtime.slow_worker(f"{self.name} questions")
        self._replies = Replies(mirror, hasher, self.committing.standing)
        self.holding.begin()
        self._say("connecting", "waiting for the primary")

    @inlineCallbacks
    def stop(self) -> Any:
        """End the link, commit and apply what has arrived, close the devices."""
        committing = self.committing
        if committing is None:
            return
        self._drop_link("the remote mirror daemon was stopped")
        yield self.holding.stop()
        yield committing.stop()
        if self._replies is not None:
            yield self._replies.stop()
            self._replies = None
        if self._unpacker is not None:
            yield self._unpacker.stop()
            self._unpacker = None
        if not committing.failed:
            yield self._leave_devices(committing.mirror)
        self.committing = None
        committing.mirror.close()
        self._say("stopped", "the rmd was stopped")

    def _leave_devices(self, mirror: Mirror) -> Deferred[None]:
        return self._in_thread(mirror.seal).addErrback(
            lambda failure: self.log.warn(
                "{group}: changes made while it is stopped will not be noticed: {why}",
                group=self.name, why=failure.getErrorMessage(),
            )
        )  # fmt: skip

    def _in_thread(self, job: Callable[..., Any], *args: Any) -> Deferred[Any]:
        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), job, *args)

    def _say(self, state: str, reason: str, code: int = 0, hint: str = "") -> None:
        if state != self.link_state["state"]:
            self.since = self.runtime.wall()
        self.link_state = {"state": state, "code": code, "reason": reason, "hint": hint}

    # -- connections --------------------------------------------------------------------------

    def adopt(self, fd: int, ended: Callable[[], None] = lambda: None) -> None:
        """Take an accepted connection: TLS and authentication happen here.

        :param fd: a connected TCP socket; closed here.
        :param ended: called once, when its handshake has succeeded or come to nothing.
        """
        with socket.socket(fileno=fd) as accepted:
            handshake = self.handshake(ended)
            if handshake is None:
                ended()
                return
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            factory = Factory.forProtocol(lambda: handshake)
            factory.noisy = False
            tls = UnbufferedTlsFactory(
                self.runtime.server_tls(self.host, self.config.primary_host), False, factory
            )
            self._reactor.adoptStreamConnection(accepted.fileno(), accepted.family, tls)

    def handshake(self, ended: Callable[[], None] = lambda: None) -> RemoteHandshake | None:
        """Make the protocol of an accepted connection, to go inside TLS.

        :param ended: as for :meth:`adopt`; not called where nothing is made.
        :returns: ``None`` while no more are taken.
        """
        if self.committing is None or self._handshakes >= UNAUTHENTICATED_MAX:
            return None
        self._handshakes += 1
        authority = Authority(self, partial(self._handshake_ended, ended))
        return RemoteHandshake(authority, self._reactor)

    def _handshake_ended(self, ended: Callable[[], None]) -> None:
        self._handshakes -= 1
        ended()

    def refused(self, error: QdsError) -> None:
        """Learn why a connection did not become a stream."""
        refused = isinstance(error, (IdentityError, ConfigError, BrokenError))
        note = f"refused: {error.message}" if refused else error.message
        if note not in self.notes:
            self.notes.append(note)
        if self._link is not None or self.failed:
            # With a failed device every connection is refused, for that reason only.
            return
        if refused:
            self._say("refused", error.message, error.exit_code, error.hint)
        else:
            # A connection that broke says nothing about the next one.
            self._say("connecting", error.message, 0, error.hint)

    def supersede(self) -> None:
        """End the present session: an authenticated peer is about to begin another.

        :raises QdsError: see :meth:`Committing.forget`.
        """
        self._drop_link("superseded by a newer connection")
        assert self.committing is not None
        self.committing.forget()
        # Also an older handshake that is not yet a session is over.
        self.epoch += 1

    def new_session(self, ident: bytes, paths: int, method: str) -> Session:
        """Make the stream of a session that is about to begin."""
        committing = self.committing
        assert committing is not None
        return Session(
            self,
            self._reactor,
            ident,
            paths=paths,
            method=method,
            wire=self.wire,
            unpacker=self._make_unpacker,
            next_gsn=lambda: committing.next_gsn,
        )

    def joined(self, ident: bytes) -> Session:
        """Give the present session, for a further path.

        :raises ProtocolError: there is none, it is another, or it has paths enough.
        """
        if self._link is None:
            raise ProtocolError("the session that the path is for is over")
        self._link.check_join(ident)
        return self._link

    def _make_unpacker(self) -> IWorker:
        if self._unpacker is None:
            self._unpacker = self.runtime.slow_worker(f"{self.name} unpacker")
        return self._unpacker

    @property
    def network_paths(self) -> list[dict[str, Any]]:
        """The present session's paths, for ``qdsinfo``."""
        return self._link.paths_status() if self._link is not None else []

    def position(self, index: int) -> UnitPosition:
        """Give where an LDSU's durable history ends."""
        assert self.committing is not None
        durable = self.committing.durable
        generation = self.committing.mirror.journal.superblock.generation
        return UnitPosition(index, generation, *durable.point(index), durable.gsn)

    @inlineCallbacks
    def rebase(self, positions: Sequence[RebasePosition]) -> Any:
        """Replace the history: durably incoherent, then the new place (rules.md 7).

        :param positions: of every LDSU, where the primary's refresh begins.
        :raises ProtocolError: a checkpoint holds; another connection came meanwhile; it stops.
        :raises DeviceFailedError: it cannot be recorded, or nothing is committed any more.
        """
        committing = self.committing
        assert committing is not None
        epoch = self.epoch
        self.holding.check_rebase()
        yield committing.quiet()
        # What it has waited for may have been a checkpoint's beginning.
        self.holding.check_rebase()
        committing.check_failed()
        if self.epoch != epoch:
            raise ProtocolError("another connection came first; try again")
        first = positions[0]
        self.log.warn(
            "{group}: a refresh replaces the history of generation {old}",
            group=self.name, old=first.predecessor.hex() or "(none)",
        )  # fmt: skip
        cursor = Cursor(
            committing.mirror.journal.head,
            first.next_gsn,
            {p.index: Point(p.next_sequence, p.chain) for p in positions},
        )
        try:
            yield committing.begin_anew(
                first.refresh_id, Generation(first.generation, first.next_gsn), cursor
            )
        except (OSError, DeviceFailedError) as error:
            committing.fail(f"another history cannot be begun: {error}", error)
            raise DeviceFailedError(
                committing.failed, hint="see qdsinfo on the secondary"
            ) from error
        self.epoch += 1

    def _drop_link(self, reason: str) -> None:
        link, self._link = self._link, None
        if link is not None:
            self.epoch += 1
            link.close(reason)

    # -- ILinkOwner ---------------------------------------------------------------------------

    def link_made(self, link: Session) -> None:
        """See :class:`ILinkOwner`."""
        if self.committing is None:
            link.abort("the remote mirror daemon was stopped")
            return
        self._drop_link("superseded by a newer connection")
        self._link = link
        self._paused = False
        self.wire.compression = link.method
        self._say("connected", "")
        self.log.info("{group}: connected", group=self.name)
        self._untold = True
        self.committing.acknowledge()
        self.holding.report()

    def link_message(self, link: Session, message: Message) -> None:
        """See :class:`ILinkOwner`."""
        if link is not self._link or self.committing is None:
            return
        if message.type == stream.ASK:
            assert self._replies is not None
            self._replies.take(message.payload, partial(self._answer, link))
        elif message.type != stream.FRAME:
            raise ProtocolError(f"the primary sent a message of type {message.type}")
        else:
            self.committing.take(message.payload, bool(message.flags & stream.ACK_REQUESTED))

    def link_writable(self, link: Session) -> None:
        """See :class:`ILinkOwner`."""

    def link_lost(self, link: Session, reason: str) -> None:
        """See :class:`ILinkOwner`."""
        if link is self._link:
            self._link = None
            self.wire.compression = ""
            self.epoch += 1
            self._say("connecting", reason)
            self.log.info("{group}: link lost: {reason}", group=self.name, reason=reason)
            if self.committing is not None:
                self.committing.commit()

    # -- what is received ---------------------------------------------------------------------

    def _acknowledge(self, committed: int, mirrored: int) -> None:
        if self._untold and committed == mirrored and self.mirror is not None:
            # While more is under way, it may mend that.
            self._untold = False
            for verdict in self.mirror.found_before():
                self.report({"about": VERIFY, **verdict.to_json()})
        if self._link is not None:
            self._link.acknowledge(committed, mirrored)

    def _answer(self, link: Session, answer: bytes) -> None:
        if link is self._link:
            link.send(stream.pack_relayed(stream.ANSWER, answer))

    def report(self, report: dict[str, Any]) -> None:
        """Tell the driver something unasked; lost where there is no link.

        :param report: a JSON object that says what it is ``about``; small.
        """
        if self._link is not None:
            self._link.send(stream.pack_report(report))

    def _verified(self, verdict: Verdict) -> None:
        if verdict.differs:
            self.log.error(
                "{group}: a verify has found that the mirror differs: {ranges}",
                group=self.name, ranges=verdict.differs,
            )  # fmt: skip
        self.report({"about": VERIFY, **verdict.to_json()})

    def _press(self, full: bool) -> None:
        """Pause or resume the peer (BOUND)."""
        if full != self._paused and self._link is not None:
            self._paused = full
            if full:
                self._link.pause_reading()
            else:
                self._link.resume_reading()

    def _committing_failed(self, reason: str, error: BaseException) -> None:
        """Latch a failure: every connection is refused from now on (LOUD)."""
        self.notes.append(reason)
        if isinstance(error, DeviceFailedError):
            try:
                self._latch.record(error.path, error)
            except QdsError as cause:
                self.notes.append(cause.message)
        self.log.error("{group}: {reason}", group=self.name, reason=reason)
        self._drop_link(reason)
        self._say("refused", reason, DeviceFailedError.exit_code)

    def switch_checkpoint(self, to: str, name: str, hold: str) -> Deferred[dict[str, Any]]:
        """See :meth:`Holding.switch`."""
        return self.holding.switch(to, name, hold)

    # -- status -------------------------------------------------------------------------------

    def set_live(self, settings: str) -> Deferred[dict[str, Any]]:
        """See :meth:`LiveSettings.set`."""
        return self.settings.set(settings)

    def _go_by_settings(self) -> None:
        if self.committing is not None:
            self.committing.config = self.config
            self.committing.mirror.go_by(self.config)

    def status(self) -> dict[str, Any]:
        """See :class:`IGroup`."""
        return remote_status(self, os.getpid())
