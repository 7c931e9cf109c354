"""What every daemon does as a service: its options, its start and its user, and SIGHUP.

Privileges: a daemon that root starts, with ``user`` in qds.cfg, opens the port(s) as root and
becomes that user itself before it makes anything else, children included.  So it is the same
under twistd, systemd (which better starts it unprivileged at once) and the launch commands, and
no ``--uid`` is needed.  That user must be able to open the devices, the key and the secrets; its
run and var directories are given to it.
"""

# Twisted's Service and switchUID have no annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import os
import pwd
import signal
import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from twisted.application.service import Service
from twisted.internet.interfaces import IReactorFromThreads
from twisted.logger import Logger
from twisted.python import usage
from twisted.python.util import switchUID

from qdsmirror.config import HostConfig
from qdsmirror.daemons.clock import use_monotonic_time
from qdsmirror.errors import ConfigError, QdsError
from qdsmirror.paths import Paths
from qdsmirror.pidfile import PidFile

_log = Logger()
#: twistd's default; ours is in the run directory.
_TWISTD_PID_FILE = "twistd.pid"


class Options(usage.Options):
    """What every daemon takes on twistd's command line."""

    optParameters = [  # noqa: RUF012
        ["root", None, None, "Use DIR/etc, DIR/var, DIR/run, DIR/dev instead of the system's."],
    ]

    def postOptions(self) -> None:  # noqa: N802
        """Keep twistd from a pid file of its own in whatever directory it was started in."""
        if self.parent is not None and self.parent.get("pidfile") == _TWISTD_PID_FILE:
            self.parent["pidfile"] = ""


class Daemon(Service):
    """A daemon's life as a service: what needs root comes first, then it becomes its user."""

    _opened = False

    def open_privileged(self) -> None:
        """Open what needs root, before privileges are given up.

        :raises QdsError: that is not possible.
        """

    def begin(self) -> None:
        """Become the user, and serve.

        :raises QdsError: that is not possible.
        """

    def privilegedStartService(self) -> None:  # noqa: N802
        """Open what needs root; part of IService."""
        super().privilegedStartService()
        self._opened = True
        exiting(self.open_privileged)

    def startService(self) -> None:  # noqa: N802
        """Become the user and serve; part of IService."""
        if not self._opened:  # daemons.run has no privileged start of its own.
            self.privilegedStartService()
        super().startService()
        exiting(self.begin)


class Prepared(Protocol):
    """A daemon that looks in the foreground whether it can run."""

    def prepare(self) -> None:
        """Claim its name and load the configuration.

        :raises QdsError: it cannot run.
        """


class Reloads(Protocol):
    """Tells a service manager that the configuration is being taken up."""

    def reloading(self) -> None:
        """Tell that it begins."""

    def reloaded(self) -> None:
        """Tell that it has ended."""


_T = TypeVar("_T")
_P = TypeVar("_P", bound=Prepared)


def make_service(kind: Callable[[Any, Paths], _P], options: Any) -> _P:
    """Make a daemon for twistd; what is wrong ends the process with its exit code.

    :param options: parsed :class:`Options`.
    """
    from twisted.internet import reactor

    def make() -> _P:
        use_monotonic_time(reactor)
        daemon = kind(reactor, Paths.of(options["root"]))
        daemon.prepare()
        return daemon

    return exiting(make)


def exiting(step: Callable[[], _T]) -> _T:
    """Run a step of the start; an error of the world is told and ends the process."""
    try:
        return step()
    except QdsError as error:
        text = f"{error.message}; {error.hint}" if error.hint else error.message
        _log.error("{text}", text=text)
        sys.stderr.write(f"{text}\n")
        sys.exit(error.exit_code)


def become_user(host: HostConfig, paths: Paths, pid_file: PidFile) -> None:
    """Become the user that ``qds.cfg`` names, where root has started us.

    :param pid_file: acquired; given to that user, as the run and var directories are.
    :raises ConfigError: there is no such user.
    :raises QdsError: that is not possible.
    """
    if not host.user or os.geteuid() != 0:
        return
    try:
        user = pwd.getpwnam(host.user)
    except KeyError:
        raise ConfigError(
            f"{paths.host_config}: user: no such user {host.user}",
            hint="create the user, or remove the line",
        ) from None
    try:
        for path in (paths.run, paths.var, pid_file.path):
            os.chown(path, user.pw_uid, user.pw_gid)
        if user.pw_uid != 0:
            switchUID(user.pw_uid, user.pw_gid)
    except OSError as error:
        raise QdsError(
            f"cannot become user {host.user}: {error.strerror}",
            hint="let the service manager start it as that user",
        ) from None


def apply_at_hang_up(
    reactor: IReactorFromThreads, apply: Callable[[], object], vigil: Reloads
) -> None:
    """Take up the configuration at each SIGHUP; what is wrong with it is told in the log.

    :param apply: takes it up, in the reactor's turn; raises QdsError where it changed nothing.
    """

    def apply_quietly() -> None:
        vigil.reloading()
        try:
            apply()
        except QdsError as error:
            _log.error("configuration not applied: {error}", error=error)
        vigil.reloaded()

    def hang_up(_signal: int, _frame: object) -> None:
        reactor.callFromThread(apply_quietly)

    signal.signal(signal.SIGHUP, hang_up)


def ignore_hang_up() -> None:
    """Take up nothing any more: the daemon is ending."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
