"""The groups inside one child: started, retried, stopped, each without regard to the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred, DeferredLock, gatherResults, inlineCallbacks
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from qdsmirror import errors, limits
from qdsmirror.config import GroupConfig, HostConfig, load_group, load_host
from qdsmirror.daemons import logfields
from qdsmirror.daemons.auditing import Auditor
from qdsmirror.errors import DeviceFailedError, QdsError
from qdsmirror.interfaces import IGroup
from qdsmirror.net.certificates import CredentialsError
from qdsmirror.net.control import ControlServer
from qdsmirror.paths import Paths, group_name
from qdsmirror.pidfile import PidFile
from qdsmirror.storage.latch import FailureLatch, FailureMemory

_log = Logger()

#: After these the same attempt would fail in the same way: somebody has to do something first.
FATAL_CODES = frozenset({errors.EXIT_CONFIG, errors.EXIT_IDENTITY, errors.EXIT_BROKEN})


class GroupParts(NamedTuple):
    """What a group is made of.

    :ivar nbd: the driver's listening NBD socket, else ``None``; it stays the child's.
    :ivar memory: of the driver's writelogs in memory, else ``None``; it stays the child's.
    :ivar latch: knows the group's failed devices, and is to learn of more.
    """

    config: GroupConfig
    host: HostConfig
    paths: Paths
    reactor: Any
    nbd: int | None
    latch: FailureLatch
    memory: int | None = None


#: Makes a group, without starting it.
Factory = Callable[[GroupParts], IGroup]
Report = Callable[[int, str, str, int], None]
#: Told (group number, device path, reason) of a failed sync.
ReportFailure = Callable[[int, str, str], None]
#: Has the sessions to come begun with the certificate, key and CA that the host's files hold now.
Reload = Callable[[HostConfig], None]


class HostedGroup:
    """One group's life in a child.

    :param report: told (number, state, reason, exit code) at each change; states are
        ``starting``, ``running``, ``retrying``, ``failed`` and ``stopped``.
    :param give_up: called with the exit code after a failed start; ends the child and gives
        ``True`` if it has no other group, so that the master's back-off applies.  Otherwise the
        group is retried here.
    :param latch: knows the group's failed devices.
    """

    def __init__(
        self,
        number: int,
        role: str,
        paths: Paths,
        reactor: Any,
        factory: Factory,
        report: Report,
        give_up: Callable[[int], bool],
        latch: FailureLatch,
        nbd: int | None = None,
        memory: int | None = None,
    ) -> None:
        self.number = number
        self.group: IGroup | None = None
        self._name = f"{group_name(number)}.{role}"
        self._paths = paths
        self._reactor = reactor
        self._factory = factory
        self._report = report
        self._give_up = give_up
        self._latch = latch
        self._nbd = nbd
        self._memory = memory
        self._lock = DeferredLock()
        self._pid_file = PidFile(paths.pid_file(self._name))
        self._control: ControlServer | None = None
        self._retry: IDelayedCall | None = None
        self._delay_seconds = limits.CHILD_RESTART_SECONDS_MIN
        self._wanted = False

    def start(self) -> Deferred[None]:
        """Start the group; never fails, but reports."""
        self._wanted = True
        return self._lock.run(self._start)

    def stop(self) -> Deferred[None]:
        """Stop the group in order; never fails."""
        self._wanted = False
        self._cancel_retry()
        return self._lock.run(self._stop)

    def restart(self, memory: int | None = None) -> Deferred[None]:
        """Stop the group and start it from its files as they are now.

        :param memory: what it is to work in from then on, a descriptor; belongs to it then.
        """
        self._cancel_retry()
        self._delay_seconds = limits.CHILD_RESTART_SECONDS_MIN
        self._wanted = True
        self._lock.run(self._stop)
        self._lock.run(self._take_memory, memory)
        return self._lock.run(self._start)

    def hint(self) -> None:
        """Tell the group that something may have been mended: a refused link is tried again."""
        retry = getattr(self.group, "retry", None)
        if retry is not None:
            retry()

    def adopt(self, descriptor: int, ended: Callable[[], None]) -> None:
        """Give an accepted connection to the group, or close it.

        :param ended: called once, when the connection's handshake is over.
        """
        adopt = getattr(self.group, "adopt", None)
        if adopt is None:
            os.close(descriptor)
            ended()
        else:
            adopt(descriptor, ended)

    def close(self) -> None:
        """Close the listening socket, and let the memory go, after the group was removed."""
        for one in (self._nbd, self._memory):
            if one is not None:
                os.close(one)
        self._nbd = self._memory = None

    def _take_memory(self, memory: int | None) -> None:
        before, self._memory = self._memory, memory
        if before is not None:
            os.close(before)

    @inlineCallbacks
    def _start(self) -> Any:
        if not self._wanted or self.group is not None:
            return
        self._report(self.number, "starting", "", 0)
        try:
            self._pid_file.acquire()
            self._pid_file.write()
            group = self._make()
            yield group.start()
            control = ControlServer(
                self._reactor,
                self._paths.control_socket(self._name),
                group,
                Auditor(self._paths, self._name),
            )
            control.start()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other groups go on
            self._failed(error)
            return
        self.group, self._control = group, control
        logfields.follow(group_name(self.number), lambda: getattr(group, "log_gsn", None))
        self._delay_seconds = limits.CHILD_RESTART_SECONDS_MIN
        self._report(self.number, "running", "", 0)

    def _make(self) -> IGroup:
        host = load_host(self._paths)
        config = load_group(self._paths, self.number)
        return self._factory(
            GroupParts(
                config, host, self._paths, self._reactor, self._nbd, self._latch, self._memory
            )
        )

    def _failed(self, error: Exception) -> None:
        """Report a failed start, and try again later if that can help."""
        self._pid_file.release()
        if isinstance(error, DeviceFailedError) and error.path:
            self._latch_failure(error)
        if isinstance(error, QdsError):
            code = error.exit_code
            reason = f"{error.message}; {error.hint}" if error.hint else error.message
            _log.error("{name}: {reason}", name=self._name, reason=reason)
        else:
            code, reason = errors.EXIT_FAILED, f"{type(error).__name__}: {error}"
            _log.failure("{name} does not start", name=self._name)
        passing = isinstance(error, CredentialsError)
        retrying = self._wanted and (passing or code not in FATAL_CODES)
        self._report(self.number, "retrying" if retrying else "failed", reason, code)
        ending = errors.EXIT_FAILED if passing else code
        if self._wanted and not self._give_up(ending) and retrying:
            self._retry = self._reactor.callLater(self._delay_seconds, self._try_again)
            self._delay_seconds = min(2 * self._delay_seconds, limits.CHILD_RESTART_SECONDS_MAX)

    def _latch_failure(self, error: DeviceFailedError) -> None:
        """Remember a sync that failed while the group was being started."""
        try:
            self._latch.record(error.path, error)
        except QdsError as cause:
            _log.error("{name}: {cause}", name=self._name, cause=cause.message)

    def _try_again(self) -> None:
        self._retry = None
        self._lock.run(self._start)

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    @inlineCallbacks
    def _stop(self) -> Any:
        group, self.group = self.group, None
        logfields.forget(group_name(self.number))
        control, self._control = self._control, None
        try:
            if control is not None:
                yield control.stop()
            if group is not None:
                yield group.stop()
        except Exception:  # noqa: BLE001 - the others are to be stopped too
            _log.failure("{name} did not stop in order", name=self._name)
        self._pid_file.release()
        if group is not None:  # else what was reported last, a failure, stands
            self._report(self.number, "stopped", "", 0)


_NOTHING: Mapping[int, int] = {}


def _taken(message: dict[str, Any], descriptors: list[int]) -> dict[str, int]:
    """Take what came with an order, by name."""
    names = message.get("passed", [])
    found = dict(zip(names, descriptors, strict=False))
    del descriptors[: len(found)]
    return found


class Hosting:
    """All groups of one child.

    :param role: ``driver``, ``pmd`` or ``rmd``.
    :param report: as for :class:`HostedGroup`.
    :param end: called with an exit code when the only group did not start.
    :param report_failure: told of each failed sync.
    :param handshake_over: told the number that an adopted connection came with.
    :param answer: called with the number of each question whether this loop turns.
    :param reload: see :data:`Reload`.
    :ivar memory: the failed syncs that the master has told us of, and our own.
    """

    def __init__(
        self,
        role: str,
        paths: Paths,
        reactor: Any,
        factory: Factory,
        report: Report,
        end: Callable[[int], None],
        report_failure: ReportFailure,
        handshake_over: Callable[[int], None],
        answer: Callable[[int], None],
        reload: Reload = lambda _host: None,
    ) -> None:
        self.memory = FailureMemory()
        self._report_failure = report_failure
        self._handshake_over = handshake_over
        self._answer = answer
        self._reload = reload
        self._role = role
        self._paths = paths
        self._reactor = reactor
        self._factory = factory
        self._report = report
        self._end = end
        self._reload_failed = False
        self._groups: dict[int, HostedGroup] = {}

    def start(
        self, groups: Iterable[tuple[int, int | None]], memories: Mapping[int, int] = _NOTHING
    ) -> Deferred[Any]:
        """Start groups, each (number, listening NBD socket); done when each was tried once.

        :param memories: descriptors of the memory that groups work in, by their numbers.
        """
        added = [self._add(number, nbd, memories.get(number)) for number, nbd in groups]
        return gatherResults([one.start() for one in added])

    def _add(self, number: int, nbd: int | None, memory: int | None) -> HostedGroup:
        self._groups[number] = HostedGroup(
            number,
            self._role,
            self._paths,
            self._reactor,
            self._factory,
            self._report,
            self._give_up,
            FailureLatch(
                self._paths.state_file(number),
                partial(self.memory.of, number),
                partial(self._failed, number),
            ),
            nbd,
            memory,
        )
        return self._groups[number]

    def _failed(self, number: int, device: str, reason: str) -> None:
        self.memory.remember(number, device, reason)
        self._report_failure(number, device, reason)

    def _give_up(self, code: int) -> bool:
        if len(self._groups) > 1:
            return False
        self._end(code)
        return True

    def stop(self) -> Deferred[Any]:
        """Stop every group."""
        return gatherResults([one.stop() for one in self._groups.values()])

    def ordered(self, message: dict[str, Any], descriptors: list[int]) -> None:
        """Do what the master says with a group.

        ``start``, ``stop``, ``restart``, ``adopt`` a connection, take a ``hint``, ``remember``
        failed devices (of any group) or ``forget`` a group's; ``reload`` the host's certificate,
        and answer a ``ping``.
        """
        order, number = message.get("order"), message.get("group")
        group = self._groups.get(number) if isinstance(number, int) else None
        if self._reload_failed and order in ("hint", "restart"):
            # Somebody has acted; the master, whose own files are good, does not say it again.
            self._reload_credentials()
        if order == "start" and isinstance(number, int) and group is None:
            passed = _taken(message, descriptors)
            self._add(number, passed.get("listening"), passed.get("memory")).start()
        elif order == "adopt" and group is not None and descriptors:
            group.adopt(
                descriptors.pop(), partial(self._handshake_over, int(message["connection"]))
            )
        elif order == "remember" and descriptors:
            self.memory.take(descriptors.pop())
        elif order == "forget" and isinstance(number, int):
            self.memory.forget(number)
        elif order == "restart" and group is not None:
            passed = _taken(message, descriptors)
            if "listening" in passed:
                # It is the one that we have.
                descriptors.append(passed["listening"])
            group.restart(passed.get("memory"))
        elif order == "hint" and group is not None:
            group.hint()
        elif order == "ping":
            self._answer(int(message["number"]))
        elif order == "reload":
            self._reload_credentials()
        elif order == "stop" and group is not None:
            del self._groups[group.number]
            group.stop().addCallback(lambda _: group.close())
        else:
            _log.error("cannot {order} group {number}", order=order, number=number)
        for one in descriptors:
            os.close(one)

    def _reload_credentials(self) -> None:
        try:
            self._reload(load_host(self._paths))
            self._reload_failed = False
        except QdsError as error:
            self._reload_failed = True
            # The master has tried it before it told us: somebody has changed them since.
            _log.error("certificate, key and CA stay as they were: {error}", error=error)
