"""What a group needs of the machine it runs on, so that tests can give it another one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qdsmirror.core.nbd_requests import Budget
from qdsmirror.interfaces import IBlockDevice, IWorker
from qdsmirror.storage.device import open_device
from qdsmirror.storage.worker import AdaptiveWorker, ReadWorkers, ThreadWorker

#: Application reads of one LDSU that may wait for its data device at the same time.
READ_THREADS = 4


@dataclass
class Runtime:
    """Reactor, clocks, devices and workers.

    :ivar reactor: timers and sockets.
    :ivar open_device: as :func:`qdsmirror.storage.device.open_device`.
    :ivar quick_worker: for I/O that mostly ends in the page cache: inline while that is quick.
    :ivar slow_worker: for I/O that blocks (bulk reads).
    :ivar read_worker: for application reads, several at once.
    :ivar wall: seconds since 1970, for people only.
    :ivar budget: bytes of unanswered requests, shared by all groups of a child.
    """

    reactor: Any
    open_device: Callable[..., IBlockDevice]
    quick_worker: Callable[[str], IWorker]
    slow_worker: Callable[[str], IWorker]
    read_worker: Callable[[str], IWorker]
    wall: Callable[[], float] = time.time
    budget: Budget = field(default_factory=Budget)

    @classmethod
    def real(cls, reactor: Any) -> Runtime:
        """Give the runtime of a daemon."""
        return cls(
            reactor=reactor,
            open_device=open_device,
            quick_worker=lambda name: AdaptiveWorker(reactor, name),
            slow_worker=lambda name: ThreadWorker(reactor, name),
            read_worker=lambda name: ReadWorkers(reactor, READ_THREADS, name),
        )

    def wall_ns(self) -> int:
        """Give nanoseconds since 1970, for a frame's header."""
        return int(self.wall() * 1e9)
