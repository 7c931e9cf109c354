"""What the daemons of this host say, gathered for whoever looks: all are asked at once.

They are asked at most once a second, however many look, and one that does not answer costs its
time-out, not that of the others.  Nothing here can hold a daemon up: each answers from memory, over
its control socket, as it answers ``qdsinfo``.
"""

# Twisted's deferreds have few annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, DeferredSemaphore, gatherResults, inlineCallbacks
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from qdsmirror import pki
from qdsmirror.config import GroupConfig, HostConfig, load_host, scan_groups
from qdsmirror.errors import QdsError, UnreachableError
from qdsmirror.limits import CONSOLE_ASK_SECONDS, CONSOLE_ASKS_MAX, CONSOLE_LOOK_SECONDS
from qdsmirror.net.asking import ask
from qdsmirror.net.control import Status
from qdsmirror.paths import Paths
from qdsmirror.tools.status import Group, collect_groups

#: Which processes host a group, by the part that this host plays in it.
DAEMONS = {"primary": ("driver", "pmd", "stats"), "secondary": ("rmd", "stats")}
#: Those with a master of their own.
_MASTERS = ("qdsdriver", "qdspmd", "qdsrmd")

#: Asks the daemon behind a control socket for its status.
Ask = Callable[[Path], Deferred[dict[str, Any]]]


@dataclass(frozen=True)
class Configuration:
    """What is configured, as the files were when they were last read.

    :ivar groups: those of the good files; ``problems`` counts what is wrong in the others.
    """

    host: HostConfig
    groups: tuple[GroupConfig, ...]
    problems: int = 0


@dataclass(frozen=True)
class Look:
    """What was seen.

    :ivar groups: as ``qdsinfo --json`` shows them.
    :ivar answers: what each daemon said that answered, by the name of its control socket.
    :ivar expiries: by ``host`` and ``ca``, when the certificate ends (the authority's: the first of
        them), in seconds since 1970; those that could be read.
    :ivar seconds: how long it took to ask.
    """

    configuration: Configuration
    groups: list[Group]
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    expiries: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class Looking:
    """Looks at the daemons of this host.

    :param reactor: timers, Unix sockets, threads.
    :param ask_one: how a daemon is asked.
    """

    log = Logger()

    def __init__(self, reactor: Any, paths: Paths, ask_one: Ask | None = None) -> None:
        self._reactor = reactor
        self._paths = paths
        self._ask = ask_one or self._ask_status
        self._read: tuple[object, Configuration] | None = None
        self._last: Look | None = None
        self._last_at = 0.0
        self._waiting: list[Deferred[Look]] | None = None

    def look(self) -> Deferred[Look]:
        """Give how things are: what was seen a moment ago, or what is seen now.

        Fails with a ConfigError when ``qds.cfg`` is wrong, or an UnreachableError when this user
        may not ask.
        """
        fired: Deferred[Look] = Deferred()
        since = self._reactor.seconds() - self._last_at
        if self._last is not None and 0 <= since < CONSOLE_LOOK_SECONDS:
            fired.callback(self._last)
        elif self._waiting is not None:
            self._waiting.append(fired)
        else:
            self._waiting = [fired]
            self._look_now().addCallbacks(self._looked, self._failed)
        return fired

    def _looked(self, look: Look) -> None:
        self._last, self._last_at = look, self._reactor.seconds()
        for fired in self._take_waiting():
            fired.callback(look)

    def _failed(self, failure: Any) -> None:
        for fired in self._take_waiting():
            fired.errback(failure)

    def _take_waiting(self) -> Iterable[Deferred[Look]]:
        waiting, self._waiting = self._waiting or [], None
        return waiting

    @inlineCallbacks
    def _look_now(self) -> Any:
        begun = self._reactor.seconds()
        pool = self._reactor.getThreadPool()
        configuration, expiries = yield deferToThreadPool(self._reactor, pool, self._read_files)
        host = configuration.host.name
        names = list(_MASTERS)
        for group in configuration.groups:
            roles = DAEMONS.get(group.role_of(host) or "", ())
            names += [f"{group.name}.{role}" for role in roles]
        answers: dict[str, dict[str, Any]] = {}
        turns = DeferredSemaphore(CONSOLE_ASKS_MAX)
        until = begun + 2 * CONSOLE_ASK_SECONDS
        yield gatherResults([turns.run(self._ask_into, answers, name, until) for name in names])

        def answered(path: Path) -> dict[str, Any]:
            found = answers.get(path.stem)
            if found is None:
                raise UnreachableError(f"no daemon answers on {path}")
            return found

        groups = collect_groups(self._paths, host, configuration.groups, answered)
        return Look(configuration, groups, answers, expiries, self._reactor.seconds() - begun)

    @inlineCallbacks
    def _ask_into(self, answers: dict[str, dict[str, Any]], name: str, until: float) -> Any:
        if self._reactor.seconds() >= until:
            # Enough others did not answer.
            return
        try:
            answers[name] = yield self._ask(self._paths.control_socket(name))
        except QdsError:
            pass

    def _ask_status(self, path: Path) -> Deferred[dict[str, Any]]:
        asked: Deferred[dict[str, Any]] = ask(self._reactor, path, Status, CONSOLE_ASK_SECONDS)
        return asked

    # -- files, in a thread ------------------------------------------------------------------------

    def _read_files(self) -> tuple[Configuration, dict[str, float]]:
        state = self._state_of_files()
        if self._read is None or self._read[0] != state:
            host = load_host(self._paths)
            groups, problems = scan_groups(self._paths)
            here = tuple(group for group in groups if group.role_of(host.name) is not None)
            self._read = state, Configuration(host, here, len(problems))
        return self._read[1], _expiries(self._read[1].host)

    def _state_of_files(self) -> object:
        """Give what changes whenever a file of the configuration does."""
        etc = self._paths.etc
        try:
            names = [name for name in os.listdir(etc) if name.endswith(".cfg")]
        except OSError:
            return None
        return {name: _identity(etc / name) for name in names}


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


def _expiries(host: HostConfig) -> dict[str, float]:
    found = {}
    for name, path in (("host", host.certificate), ("ca", host.ca)):
        try:
            ends = [one.not_valid_after_utc for one in pki.read_certificates(path)]
        except QdsError:
            continue
        # The host's own comes first of its chain; any authority may count.
        found[name] = (ends[0] if name == "host" else min(ends)).timestamp()
    return found
