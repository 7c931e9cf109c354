"""A child process: ``python -m qdsmirror.daemons.child ROLE [--root DIR] --groups .. --fds ..``.

It hosts groups (daemons.hosting) for the master that started it and ends when that one is gone:
the end of file on the channel is noticed by the kernel's word, so a master killed with -9 leaves
nothing behind.  Its standard error is the log.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import os
import signal
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.threads import blockingCallFromThread
from twisted.logger import Logger
from twisted.python.threadable import isInIOThread

from qdsmirror import errors, limits
from qdsmirror.config import load_group
from qdsmirror.daemons import logs
from qdsmirror.daemons.channel import Channel
from qdsmirror.daemons.clock import use_monotonic_time
from qdsmirror.daemons.hosting import Factory, GroupParts, Hosting
from qdsmirror.daemons.protection import Protection, protect, unprotect
from qdsmirror.groups.runtime import Runtime
from qdsmirror.interfaces import IGroup
from qdsmirror.paths import Paths
from qdsmirror.storage.memory import GroupMemory

_log = Logger()

# mallopt(3), glibc.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MALLOC_KEPT_BYTES = 8 * limits.MIB
#: A worker thread that holds the interpreter delays the reactor by at most this.
_SWITCH_INTERVAL_SECONDS = 0.0005
#: Where processors are short the application's writes come first: the writelog absorbs the rest.
_NICE = {"driver": 0, "pmd": 5, "rmd": 5, "stats": 0}


@functools.cache
def _runtime(reactor: Any) -> Runtime:
    """Give what all groups of this child share."""
    return Runtime.real(reactor)


def _driver(parts: GroupParts) -> IGroup:
    from qdsmirror.groups.driver import DriverGroup

    config, host, paths, reactor, nbd, latch, held = parts
    assert nbd is not None
    group: IGroup = DriverGroup(
        config,
        host,
        paths,
        reactor,
        nbd,
        runtime=_runtime(reactor),
        latch=latch,
        open_memory=GroupMemory(config, held).open,
    )
    return group


def _primary(parts: GroupParts) -> IGroup:
    from qdsmirror.groups.primary import PrimaryGroup

    config, host, paths, reactor, _, _, _ = parts
    group: IGroup = PrimaryGroup(config, host, paths, reactor, runtime=_runtime(reactor))
    return group


def _remote(parts: GroupParts) -> IGroup:
    from qdsmirror.groups.remote import RemoteGroup

    config, host, paths, reactor, _, latch, _ = parts
    runtime = _runtime(reactor)
    group: IGroup = RemoteGroup(config, host, paths, reactor, runtime=runtime, latch=latch)
    return group


def _statistics(parts: GroupParts) -> IGroup:
    from qdsmirror.groups.statistics import Machine, StatisticsGroup

    role = parts.config.role_of(parts.host.name)
    assert role is not None
    machine = Machine.real(parts.reactor)
    group: IGroup = StatisticsGroup(parts.config, role, parts.paths, machine, _means())
    return group


@functools.cache
def _means() -> Any:
    """Give that by which throttles act: programs of all groups run one after another."""
    from qdsmirror.groups.actions import Means

    return Means()


#: What each role's groups are; the modules load only in the processes that need them.
FACTORIES: Mapping[str, Factory] = {
    "driver": _driver,
    "pmd": _primary,
    "rmd": _remote,
    "stats": _statistics,
}


class _Child:
    """The process: its channel to the master, its groups, its end."""

    def __init__(
        self,
        role: str,
        paths: Paths,
        groups: dict[int, int | None],
        factory: Factory,
        failures: int | None,
        protection: Protection | None,
        memories: dict[int, int],
    ) -> None:
        from twisted.internet import reactor

        self._reactor: Any = reactor
        use_monotonic_time(reactor)
        self._groups = groups
        self._memories = memories
        self._protection = protection
        self._hosting = Hosting(
            role,
            paths,
            reactor,
            factory,
            self._report,
            self._end,
            self._report_failure,
            self._handshake_over,
            self._answer,
            _runtime(reactor).credentials.reload,
        )
        if failures is not None:
            self._hosting.memory.take(failures)
        self._channel: Channel | None = None
        self.exit_code = errors.EXIT_OK

    def run(self, channel: socket.socket) -> int:
        """Serve until told to end; give the exit code."""
        self._channel = Channel(self._reactor, channel, self._hosting.ordered, _end_at_once)
        self._reactor.callWhenRunning(self._begin)
        self._reactor.addSystemEventTrigger("before", "shutdown", self._finish)
        self._reactor.run()
        return self.exit_code

    def _begin(self) -> None:
        assert self._channel is not None
        if self._protection is not None:
            self._channel.send({"memory": self._protection.to_json()})
        self._hosting.start(self._groups.items(), self._memories).addCallback(lambda _: _freeze())

    def _report(self, number: int, state: str, reason: str, code: int) -> None:
        assert self._channel is not None
        text = reason[: limits.REASON_CHARACTERS_MAX]
        self._channel.send({"group": number, "state": state, "reason": text, "code": code})

    def _report_failure(self, number: int, device: str, reason: str) -> None:
        if not isInIOThread():  # type: ignore[no-untyped-call]
            # Devices are opened, and may fail, in a thread; the channel is the reactor's.
            blockingCallFromThread(self._reactor, self._report_failure, number, device, reason)
            return
        assert self._channel is not None
        text = reason[: limits.REASON_CHARACTERS_MAX]
        if not self._channel.send({"group": number, "failed": device, "reason": text}):
            _log.error("the master could not be told that {device} has failed", device=device)

    def _handshake_over(self, connection: int) -> None:
        assert self._channel is not None
        self._channel.send({"handshake": connection})

    def _answer(self, number: int) -> None:
        """Tell the master that this loop turns, and the channel works both ways."""
        assert self._channel is not None
        self._channel.send({"pong": number})

    def _finish(self) -> Deferred[None]:
        """Stop the groups; then close the channel, whose end from here on means nothing."""
        assert self._channel is not None
        channel = self._channel
        return self._hosting.stop().addCallback(lambda _: channel.close())

    def _end(self, code: int) -> None:
        """End after a failed start, not from within the reactor's own start."""
        self.exit_code = code
        self._reactor.callLater(0, self._stop)

    def _stop(self) -> None:
        if self._reactor.running:
            self._reactor.stop()


def _end_at_once() -> None:
    """End without any order: the master is gone, and its successor must find nothing held."""
    os._exit(errors.EXIT_FAILED)


def _freeze() -> None:
    """Keep the collector from walking what was loaded at start, again and again."""
    gc.collect()
    gc.freeze()


def _keep_large_buffers() -> None:
    """Let malloc use a megabyte's memory again, instead of asking the kernel for zeroed pages."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _MALLOC_KEPT_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _MALLOC_KEPT_BYTES)


def _descriptors(text: str) -> dict[str, int]:
    """Parse ``NAME=FD,...``."""
    pairs = (one.partition("=") for one in text.split(","))
    return {name: int(number) for name, _, number in pairs}


def _niceness(role: str, groups: Iterable[int], paths: Paths) -> int:
    """Give how far a child stands back for others.

    Not at all where an application waits for the secondary.
    """
    for number in groups:
        # (A file that cannot be read is told of when the group is started.)
        with suppress(errors.QdsError):
            if load_group(paths, number).operation != "async":
                return 0
    return _NICE[role]


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of a child's command line; only masters write it."""
    parser = argparse.ArgumentParser(prog="qdsmirror.daemons.child")
    parser.add_argument("role", choices=sorted(FACTORIES))
    parser.add_argument("--root")
    parser.add_argument("--groups", type=lambda text: [int(one) for one in text.split(",")])
    given = "channel=FD,NUMBER=FD,memoryNUMBER=FD,failures=FD"
    parser.add_argument("--fds", type=_descriptors, help=given)
    return parser


def main(argv: Sequence[str] | None = None, factories: Mapping[str, Factory] = FACTORIES) -> int:
    """Run a child.

    :param argv: the command line; default: the process's.
    :param factories: what makes the groups of each role.
    :returns: the exit code, errors.py.
    """
    arguments = build_parser().parse_args(argv)
    if arguments.role == "stats":
        unprotect()
    # The master passes on what it means for us; a terminal's signals are for the master.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for one in arguments.fds.values():
        os.set_inheritable(one, False)
    # Before there are threads: they inherit it.
    protection = protect() if arguments.role in ("driver", "pmd") else None
    logs.begin(arguments.role)
    sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
    paths = Paths.of(arguments.root)
    niceness = _niceness(arguments.role, arguments.groups, paths)
    if niceness:
        os.nice(niceness)
    _keep_large_buffers()
    if protection is not None and protection.refused:
        _log.info(
            "{role}: not all that protects from a shortage of memory was granted: {why}",
            role=f"qds{arguments.role}",
            why="; ".join(protection.refused),
        )
    groups = {number: arguments.fds.get(str(number)) for number in arguments.groups}
    child = _Child(
        arguments.role,
        paths,
        groups,
        factories[arguments.role],
        arguments.fds.get("failures"),
        protection,
        {n: arguments.fds[f"memory{n}"] for n in groups if f"memory{n}" in arguments.fds},
    )
    return child.run(socket.socket(fileno=arguments.fds["channel"]))


if __name__ == "__main__":
    sys.exit(main())
