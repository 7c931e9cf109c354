"""Processes of the simulation: each is a reactor, its workers, its connections and its devices.

Everything that could happen waits until the simulation steps it, so that one seed decides the
order of all of it.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

from qdsmirror.interfaces import IWorker
from qdsmirror.net.tls import JudgedConnection
from tests.sim.disk import Disk, Gone, SimDevice


class Fuse(NamedTuple):
    """How a process will end in the middle of its I/O.

    :ivar left: writes and syncs until then.
    :ivar behind: whether the last one still happens.
    :ivar power: a power cut of its site; otherwise a kill -9.
    """

    left: int
    behind: bool
    power: bool


@implementer(IWorker)
class SimWorker:
    """Jobs wait until they are stepped.

    :param random: given for workers whose jobs need no order: takes any of them.
    """

    def __init__(self, process: Process, name: str, random: Random | None = None) -> None:
        self.name = name
        self.waiting: deque[tuple[Callable[[], Any], Callable[..., None]]] = deque()
        self._process = process
        self._random = random
        self._stopped: list[Deferred[None]] | None = None
        self._stepping = False

    def run(self, job: Callable[[], Any], done: Callable[..., None]) -> None:
        if not self._process.alive:
            return
        if self._stopped is not None:
            raise RuntimeError("a stopped worker takes no jobs")
        self.waiting.append((job, done))

    def step(self) -> None:
        """Run a job and tell its owner, unless the process ends in it."""
        if self._random is not None:
            self.waiting.rotate(-self._random.randrange(len(self.waiting)))
        job, done = self.waiting.popleft()
        self._stepping = True
        try:
            try:
                result, error = job(), None
            except Gone:
                return
            except BaseException as caught:  # noqa: BLE001 - it belongs to the job's owner
                result, error = None, caught
            done(result, error)
        finally:
            self._stepping = False
        self._check_stopped()

    def stop(self) -> Deferred[None]:
        fired: Deferred[None] = Deferred()
        self._stopped = [*(self._stopped or ()), fired]
        self._check_stopped()
        return fired

    def _check_stopped(self) -> None:
        if self._stopped and not self.waiting and not self._stepping:
            fired, self._stopped = self._stopped, []
            for deferred in fired:
                deferred.callback(None)


class Process:
    """One daemon's process; what a group calls its reactor.

    :ivar group: the group that runs in it.
    :ivar fuse: how it is to end.
    :ivar ended: how it did end in the middle of I/O, until the simulation has seen to it.
    :ivar descriptors: writelogs that were passed to it, with the disk behind each.
    """

    def __init__(self, name: str, clock: Clock, random: Random) -> None:
        self.name = name
        self.alive = True
        self.group: Any = None
        self.fuse: Fuse | None = None
        self.ended: Fuse | None = None
        self.workers: list[SimWorker] = []
        self.ends: list[End] = []
        self.devices: list[SimDevice] = []
        self.descriptors: list[tuple[int, Disk]] = []
        self.adoptable: dict[int, Wire] = {}
        self._clock = clock
        self._random = random
        self._pool = self.worker(f"{name} pool")

    # -- workers and devices ------------------------------------------------------------------

    def worker(self, name: str) -> SimWorker:
        made = SimWorker(self, name)
        self.workers.append(made)
        return made

    def read_worker(self, name: str) -> SimWorker:
        made = SimWorker(self, name, self._random)
        self.workers.append(made)
        return made

    def open(self, disk: Disk, role: str, logical_block: int) -> SimDevice:
        device = SimDevice(disk, self, role, logical_block)
        self.devices.append(device)
        return device

    def before_io(self, device: SimDevice, method: str) -> bool:
        if not self.alive or self.ended is not None:
            raise Gone
        fuse = self.fuse
        if fuse is None:
            return False
        if fuse.left:
            self.fuse = fuse._replace(left=fuse.left - 1)
            return False
        self.fuse, self.ended = None, fuse
        if fuse.behind:
            return True
        raise Gone

    def gone(self) -> Gone:
        return Gone()

    # -- the reactor --------------------------------------------------------------------------

    def seconds(self) -> float:
        return self._clock.seconds()  # type: ignore[no-any-return,no-untyped-call]

    def callLater(self, delay: float, call: Callable[..., Any], *args: Any, **kw: Any) -> Any:  # noqa: N802
        return self._clock.callLater(delay, self._timed, call, args, kw)

    def _timed(self, call: Callable[..., Any], args: Any, kw: Any) -> None:
        if self.alive:
            call(*args, **kw)

    def getThreadPool(self) -> Process:  # noqa: N802
        return self

    def callInThreadWithCallback(  # noqa: N802
        self, told: Callable[[bool, Any], None], job: Callable[..., Any], *args: Any
    ) -> None:
        def done(result: Any, error: BaseException | None) -> None:
            if error is None:
                told(True, result)
            else:
                told(False, Failure(error))

        self._pool.run(lambda: job(*args), done)

    def callFromThread(self, call: Callable[..., Any], *args: Any) -> None:  # noqa: N802
        call(*args)

    def adoptStreamConnection(self, fd: int, family: int, factory: Any) -> None:  # noqa: N802
        wire = self.adoptable.pop(fd, None) or Wire(self._random, local=True)
        wire.join(self, factory.buildProtocol(None))

    # -- the end ------------------------------------------------------------------------------

    def kill(self, silently: bool = False) -> None:
        """End at once.

        :param silently: peers on other hosts are not told: the host lost its power.
        """
        self.alive = False
        self.fuse = self.ended = None
        for call in self._clock.getDelayedCalls():
            if getattr(call.func, "__self__", None) is self:
                call.cancel()
        for worker in self.workers:
            worker.waiting.clear()
        for end in self.ends:
            end.die(silently and not end.wire.local)
        for device in self.devices:
            device.close()
        for descriptor, disk in self.descriptors:
            _close_descriptor(descriptor, disk)
        self.descriptors.clear()


def _close_descriptor(descriptor: int, disk: Disk) -> None:
    """Close what a killed process had open, unless it had closed it itself."""
    try:
        ours = os.fstat(descriptor).st_ino == disk.inode
    except OSError:
        return
    if ours:
        os.close(descriptor)


class _Handle(JudgedConnection):
    """Stands for the TLS connection: its peer was judged, and its exporter is the wire's."""

    def __init__(self, exported: bytes) -> None:
        self._exported = exported

    def export_keying_material(self, label: bytes, length: int, context: Any = None) -> bytes:
        return self._exported


class Wire:
    """A connection; bytes move when it is stepped.

    :param local: a socket within a host: neither cut nor slow.
    :param path: which way it goes, where there are several.
    :ivar written: bytes by the process that wrote them.
    """

    def __init__(self, random: Random, local: bool, path: str = "") -> None:
        self.random = random
        self.local = local
        self.path = path
        self.exported = random.randbytes(32)
        self.ends: list[End] = []
        self.written: Counter[str] = Counter()
        self.room = random.choice((512, 4096, 65536))
        #: Nothing arrives before this time.
        self.slow_until = 0.0

    def join(self, process: Process, protocol: Any) -> End:
        """Give the wire its next end."""
        end = End(self, process, protocol)
        self.ends.append(end)
        process.ends.append(end)
        if len(self.ends) == 2:
            one, other = self.ends
            one.peer, other.peer = other, one
        protocol.makeConnection(end)
        if not self.local and not end.lost:
            protocol.handshakeCompleted()
        return end

    def cut(self) -> None:
        """Lose the connection, in the middle of whatever is under way."""
        for end in self.ends:
            end.lose_some()
            end.hears_end = True

    @property
    def over(self) -> bool:
        return all(end.lost for end in self.ends)


class End:
    """One end of a wire: a transport.

    :ivar out: written and not yet received by the peer.
    :ivar hears_end: the peer's end, or the network's, arrives here after what is on its way.
    :ivar lost: nothing arrives or leaves any more.
    """

    def __init__(self, wire: Wire, process: Process, protocol: Any) -> None:
        self.wire = wire
        self.process = process
        self.protocol = protocol
        self.peer: End | None = None
        self.out = bytearray()
        self.hears_end = False
        self.lost = False
        self._closing = False
        self._aborted = False
        self.reading = True
        self._producer: Any = None
        self._told_to_wait = False
        self._handle = _Handle(wire.exported)

    # -- ITransport and kin -------------------------------------------------------------------

    def getHandle(self) -> _Handle:  # noqa: N802
        return self._handle

    def getPeer(self) -> str:  # noqa: N802
        return "the peer"

    getHost = getPeer  # noqa: N815

    def write(self, data: bytes) -> None:
        # Behind a gap that a cut has made nothing arrives any more.
        if self.lost or self._aborted or self.hears_end:
            return
        self.wire.written[self.process.name] += len(data)
        self.out += data
        if len(self.out) > self.wire.room and self._producer and not self._told_to_wait:
            self._told_to_wait = True
            self._producer.pauseProducing()

    def writeSequence(self, pieces: list[bytes]) -> None:  # noqa: N802
        self.write(b"".join(pieces))

    def registerProducer(self, producer: Any, streaming: bool) -> None:  # noqa: N802
        self._producer = producer

    def unregisterProducer(self) -> None:  # noqa: N802
        self._producer = None

    def pauseProducing(self) -> None:  # noqa: N802
        self.reading = False

    def resumeProducing(self) -> None:  # noqa: N802
        self.reading = True

    def loseConnection(self, _reason: Any = None) -> None:  # noqa: N802
        self._closing = True

    def abortConnection(self) -> None:  # noqa: N802
        if not self._aborted and not self.lost:
            self._aborted = True
            self.lose_some()
            if self.peer is not None:
                self.peer.hears_end = True

    # -- what the simulation does -------------------------------------------------------------

    def lose_some(self) -> None:
        """Forget some of what is on its way."""
        if self.out and not self.wire.local:
            del self.out[self.wire.random.randrange(len(self.out) + 1) :]

    def die(self, silently: bool) -> None:
        """Go with the process; nobody here is told."""
        self.lost = True
        if self.peer is not None and not silently:
            self.lose_some()
            self.peer.hears_end = True
        elif silently:
            self.out.clear()

    @property
    def _coming(self) -> bool:
        """Whether something is on its way here."""
        return self.peer is not None and bool(self.peer.out) and not self._aborted

    @property
    def ready(self) -> bool:
        """Whether stepping this end would do something."""
        if self.lost:
            return False
        slow_until = self.wire.slow_until
        if slow_until and self.process.seconds() < slow_until:
            return False
        # (As in _coming; this is asked of every end after every step.)
        if self._aborted:
            return True
        if self.peer is not None and self.peer.out:
            if self.reading:
                return True
        elif self.hears_end:
            return True
        return self._closing and not (self.out and self.peer is not None and not self.peer.deaf)

    @property
    def deaf(self) -> bool:
        """Whether it takes nothing more."""
        return self.lost or self._aborted

    def step(self, limit: int) -> None:
        """Let something arrive, or an end take effect."""
        peer = self.peer
        if self._coming and self.reading and peer is not None:
            data = bytes(peer.out[:limit])
            del peer.out[:limit]
            self.protocol.dataReceived(data)
            peer._has_room()
        elif self._aborted:
            self._lose(ConnectionAborted())
        else:
            self._lose(ConnectionDone())

    def _has_room(self) -> None:
        if self._told_to_wait and len(self.out) <= self.wire.room // 2 and not self.deaf:
            self._told_to_wait = False
            if self._producer:
                self._producer.resumeProducing()

    def _lose(self, reason: Exception) -> None:
        self.lost = True
        if self.peer is not None:
            self.peer.hears_end = True
            self.peer.out.clear()
        self.process.ends.remove(self)
        self.protocol.connectionLost(Failure(reason))
