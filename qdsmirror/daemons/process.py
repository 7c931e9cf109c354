"""One child process of a master: spawned, told, reaped, relaunched with back-off.

States of a child: ``starting`` (spawned, a group has not reported yet), ``running``, ``waiting``
(ended, relaunched when the back-off is over), ``failed`` (ended for a reason that a relaunch
would meet again), ``stopping``, ``stopped``.  It is relaunched only after it was reaped
(rules.md 17).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IDelayedCall, IProcessTransport
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from qdsmirror import limits
from qdsmirror.daemons import notify
from qdsmirror.daemons.channel import Channel, Message, channel_pair
from qdsmirror.daemons.hosting import FATAL_CODES
from qdsmirror.errors import EXIT_FAILED
from qdsmirror.paths import Paths, group_name
from qdsmirror.pidfile import clear_stale
from qdsmirror.storage.latch import FailureMemory

_log = Logger()

#: ``-P``: nothing is imported from the directory that the daemon happens to stand in.
CHILD_COMMAND = (sys.executable, "-P", "-m", "qdsmirror.daemons.child")
#: A child's first descriptors: null, log, log, channel; the listening sockets follow.
_CHANNEL_FD = 3


@dataclass
class GroupState:
    """What the master knows of a group.

    :ivar state: ``starting``, ``running``, ``retrying``, ``failed`` or ``stopped``.
    :ivar reason: why it is not running, else empty.
    :ivar code: the exit code that goes with the reason, errors.py.
    """

    state: str = "starting"
    reason: str = ""
    code: int = 0


@dataclass(frozen=True)
class Setting:
    """What all children of one master have in common.

    :ivar role: ``driver``, ``pmd`` or ``rmd``.
    :ivar listening: gives the listening descriptor that a group's child inherits, or ``None``.
    :ivar log: gives the descriptor that becomes a child's standard output and error.
    :ivar memory: devices whose sync has failed, kept for the master's life (rules.md 4).
    :ivar memory_of: by group, the descriptor of the memory that it works in (rules.md 23).
    :ivar changed: called when the state of a group may have changed.
    """

    reactor: Any
    role: str
    paths: Paths
    listening: Callable[[int], int | None]
    log: Callable[[], int]
    command: Sequence[str] = CHILD_COMMAND
    memory: FailureMemory = field(default_factory=FailureMemory)
    memory_of: Callable[[int], int | None] = lambda _number: None
    changed: Callable[[], None] = lambda: None


class Child(ProcessProtocol):
    """One child process, through all its lives.

    :ivar memory: what protects it from a shortage of memory (daemons.protection), as it has told;
        ``None`` where nothing is asked for.
    """

    def __init__(self, setting: Setting) -> None:
        self.groups: dict[int, GroupState] = {}
        self.state = "stopped"
        self.restarts = 0
        self.memory: dict[str, Any] | None = None
        self._setting = setting
        self._reactor = setting.reactor
        self._process: IProcessTransport | None = None
        self._channel: Channel | None = None
        self._timer: IDelayedCall | None = None
        self._delay_seconds = limits.CHILD_RESTART_SECONDS_MIN
        self._spawned_at = 0.0
        self._stopped: list[Deferred[None]] = []
        self._handshakes: dict[int, Callable[[], None]] = {}
        self._connections = 0
        self._last_names = ""
        self._questions = 0
        #: ``None``: nothing was asked yet.
        self._unanswered: int | None = None
        self._has_answered = False

    @property
    def pid(self) -> int | None:
        """The process, ``None`` while there is none."""
        return None if self._process is None else self._process.pid

    # -- what the master wants ------------------------------------------------------------------

    def spawn(self) -> None:
        """Start the process with the groups assigned."""
        self._cancel_timer()
        setting = self._setting
        self._spawned_at = self._reactor.seconds()
        ours, theirs = channel_pair()
        inherited = {"channel": theirs.fileno()}
        for number in sorted(self.groups):
            descriptor = setting.listening(number)
            if descriptor is not None:
                inherited[str(number)] = descriptor
            memory = setting.memory_of(number)
            if memory is not None:
                inherited[f"memory{number}"] = memory
            self.groups[number] = GroupState()
        failures: int | None = None
        try:
            failures = setting.memory.hand_over(self.groups)
            if failures is not None:
                inherited["failures"] = failures
            self._spawn_with(inherited, ours)
        except OSError as error:
            self._channel = None
            ours.close()
            self._relaunch_later(f"no process could be made: {error.strerror}", EXIT_FAILED)
        finally:
            theirs.close()
            if failures is not None:
                os.close(failures)

    def _spawn_with(self, inherited: dict[str, int], ours: socket.socket) -> None:
        """Start the process with these descriptors, by name."""
        setting = self._setting
        named = {name: _CHANNEL_FD + place for place, name in enumerate(inherited)}
        arguments = [
            *setting.command,
            setting.role,
            *setting.paths.arguments(),
            "--groups",
            ",".join(map(str, sorted(self.groups))),
            "--fds",
            ",".join(f"{name}={number}" for name, number in named.items()),
        ]
        descriptors = {named[name]: here for name, here in inherited.items()}
        self.state = "starting"
        self.memory = None
        self._unanswered, self._has_answered = None, False
        self._fork(arguments, descriptors)
        self._channel = Channel(self._reactor, ours, self._received, _ignore_end)

    def _fork(self, arguments: list[str], descriptors: dict[int, int]) -> None:
        log = self._setting.log()
        with open(os.devnull, "rb") as null:
            self._process = self._reactor.spawnProcess(
                self,
                arguments[0],
                arguments,
                env=_environment(),
                childFDs={0: null.fileno(), 1: log, 2: log, **descriptors},
            )
        _log.info(
            "{names}: {role} started, pid {pid}",
            names=self.names,
            role=self._setting.role,
            pid=self.pid,
        )

    @property
    def names(self) -> str:
        """The groups, for the log; the last ones when they are removed."""
        if self.groups:
            self._last_names = " ".join(group_name(number) for number in sorted(self.groups))
        return self._last_names

    def add(self, number: int) -> None:
        """Host one more group."""
        self.groups[number] = GroupState()
        if self._process is None:
            self.kick()
        else:
            self._remind(number)
            self._order_with_descriptors("start", number)

    def _remind(self, number: int) -> None:
        """Tell the process what another one, or itself in earlier days, said of the group."""
        failures = self._setting.memory.hand_over([number])
        if failures is not None:
            self._order("remember", number, [failures])
            os.close(failures)

    def remove(self, number: int) -> None:
        """Stop a group; the process ends with its last one."""
        del self.groups[number]
        if self.groups:
            self._order("stop", number)
        else:
            self.stop()

    def restart(self, number: int) -> None:
        """Let a group take up its changed files, or try again what failed."""
        self.groups[number] = GroupState()
        if self._process is None:
            self.kick()
        else:
            self._order_with_descriptors("restart", number)

    def hint(self, number: int) -> None:
        """Tell a running group that something may have been mended."""
        if self._process is not None:
            self._order("hint", number)

    def forget(self, number: int) -> None:
        """Let a process that runs forget the group's failed devices too."""
        if self._process is not None:
            self._order("forget", number)

    def reload(self) -> None:
        """Have the process begin sessions with the host's certificate as it is now."""
        if self._channel is not None:
            self._channel.send({"order": "reload", "group": None})

    def ask(self) -> None:
        """Ask the process for a sign of life; kill it if it has left too many unanswered."""
        if self._channel is None or self.state == "stopping":
            return
        allowed = limits.UNANSWERED_MAX if self._has_answered else limits.UNANSWERED_AT_START_MAX
        if self._unanswered == allowed:
            _log.error(
                "{names}: {role}, pid {pid}, does not answer and is killed",
                names=self.names,
                role=self._setting.role,
                pid=self.pid,
            )
            self._signal("KILL")
        self._unanswered = (self._unanswered or 0) + 1
        self._questions += 1
        self._channel.send({"order": "ping", "group": None, "number": self._questions})

    @property
    def answered(self) -> bool | None:
        """Whether it has answered the last question; ``None`` where none had to be answered."""
        if self._channel is None or self.state == "stopping" or self._unanswered is None:
            return None
        return self._unanswered == 0

    def kick(self) -> None:
        """Start a child that waits or has failed now, with a fresh back-off."""
        if self._process is None:
            self._delay_seconds = limits.CHILD_RESTART_SECONDS_MIN
            self.spawn()

    def adopt(self, number: int, descriptor: int, ended: Callable[[], None]) -> bool:
        """Pass an accepted connection on; ``False`` while the group cannot take it.

        :param ended: called once if it was passed on: its handshake, or the process, is over.
        """
        if self._channel is None or self.groups[number].state != "running":
            return False
        self._connections += 1
        order = {"order": "adopt", "group": number, "connection": self._connections}
        if not self._channel.send(order, [descriptor]):
            return False
        self._handshakes[self._connections] = ended
        return True

    def stop(self) -> Deferred[None]:
        """End the process in order, by force after STOP_SECONDS_MAX; done when it is reaped."""
        if self._process is None:
            self._cancel_timer()
            self.state = "stopped"
            return succeed(None)
        if self.state != "stopping":
            self.state = "stopping"
            self._signal("TERM")
            self._timer = self._reactor.callLater(limits.STOP_SECONDS_MAX, self._kill)
        done: Deferred[None] = Deferred()
        self._stopped.append(done)
        return done

    # -- what happens ---------------------------------------------------------------------------

    def processExited(self, reason: Failure) -> None:  # noqa: N802
        """Take note that the process is reaped; relaunch it if that can help."""
        self._process = None
        self._cancel_timer()
        if self._channel is not None:
            self._channel.drain()
            self._channel = None
        handshakes, self._handshakes = self._handshakes, {}
        for ended in handshakes.values():
            ended()
        for number in self.groups:
            clear_stale(self._setting.paths.pid_file(self._file_name(number)))
        text, code = _why(reason)
        if self.state == "stopping":
            _log.info("{names}: {role} has ended", names=self.names, role=self._setting.role)
            self._finish_stop()
            return
        _log.warn("{names}: {role}: {why}", names=self.names, role=self._setting.role, why=text)
        if code in FATAL_CODES:
            self.state = "failed"
            self._mark("failed", text, code)
        else:
            self._relaunch_later(text, code)

    def _relaunch_later(self, text: str, code: int) -> None:
        uptime = self._reactor.seconds() - self._spawned_at
        if uptime >= limits.CHILD_HEALTHY_SECONDS:
            self._delay_seconds = limits.CHILD_RESTART_SECONDS_MIN
        self.state = "waiting"
        self.restarts += 1
        self._mark("retrying", text, code)
        self._timer = self._reactor.callLater(self._delay_seconds, self.spawn)
        self._delay_seconds = min(2 * self._delay_seconds, limits.CHILD_RESTART_SECONDS_MAX)

    def _finish_stop(self) -> None:
        self.state = "stopped"
        done, self._stopped = self._stopped, []
        if self.groups:
            self._mark("stopped", "", 0)
        for one in done:
            one.callback(None)

    def _mark(self, state: str, text: str, code: int) -> None:
        """Set the groups' state after the process's end; a reason they reported stands."""
        for group in self.groups.values():
            if group.state not in ("retrying", "failed"):
                group.reason, group.code = text, code
            group.state = state
        self._setting.changed()

    def _received(self, message: Message, descriptors: list[int]) -> None:
        for one in descriptors:
            os.close(one)
        if "pong" in message:
            self._has_answered = True
            if message["pong"] == self._questions:
                self._unanswered = 0
            return
        if "handshake" in message:
            ended = self._handshakes.pop(message["handshake"], None)
            if ended is not None:
                ended()
            return
        if "memory" in message:
            self.memory = message["memory"]
            return
        number = int(message.get("group", -1))
        if "failed" in message:
            # Whether it has been removed since or not.
            self._setting.memory.remember(number, message["failed"], message["reason"])
            return
        group = self.groups.get(number)
        if group is None:
            return
        group.state = str(message.get("state"))
        group.reason = str(message.get("reason", ""))
        group.code = int(message.get("code", 0))
        if self.state == "starting" and all(
            one.state != "starting" for one in self.groups.values()
        ):
            self.state = "running"
        self._setting.changed()

    def _order_with_descriptors(self, order: str, number: int) -> None:
        """Give an order, and what the group needs of us: all of it, in case some has changed."""
        found = {
            "listening": self._setting.listening(number),
            "memory": self._setting.memory_of(number),
        }
        passed = {name: one for name, one in found.items() if one is not None}
        if self._channel is not None:
            message = {"order": order, "group": number, "passed": list(passed)}
            self._channel.send(message, list(passed.values()))

    def _order(self, order: str, number: int, descriptors: Sequence[int] = ()) -> None:
        if self._channel is not None:
            self._channel.send({"order": order, "group": number}, descriptors)

    def _signal(self, name: str) -> None:
        try:
            if self._process is not None:
                self._process.signalProcess(name)
        except ProcessExitedAlready:
            pass

    def _kill(self) -> None:
        self._timer = None
        _log.error("{names}: the process did not end in time and is killed", names=self.names)
        self._signal("KILL")

    def _cancel_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()

    def _file_name(self, number: int) -> str:
        return f"{group_name(number)}.{self._setting.role}"


def _ignore_end() -> None:
    """Wait for the process to be reaped: that the channel ended says less."""


def _environment() -> dict[str, str]:
    """Give a child's environment: ours, without what is meant for the master alone."""
    private = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", *notify.VARIABLES)
    return {name: value for name, value in os.environ.items() if name not in private}


def _why(reason: Failure) -> tuple[str, int]:
    """Tell how a process ended, and the exit code that this amounts to."""
    number = getattr(reason.value, "signal", None)
    if number is not None:
        return f"its process was ended by {signal.Signals(number).name}", EXIT_FAILED
    code = getattr(reason.value, "exitCode", None) or 0
    return f"its process ended with exit code {code}", code
