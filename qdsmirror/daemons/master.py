"""What the three masters share: configuration, pid file, control socket, children."""

# Twisted's Service has no annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twisted.internet.defer import inlineCallbacks
from twisted.logger import Logger

from qdsmirror import __version__
from qdsmirror.config import GroupConfig, HostConfig, Problem, load_host, scan_groups
from qdsmirror.daemons.auditing import Auditor
from qdsmirror.daemons.certificate import HostCertificate
from qdsmirror.daemons.notify import Notifier
from qdsmirror.daemons.service import Daemon, apply_at_hang_up, become_user, ignore_hang_up
from qdsmirror.daemons.statistics import Statistics
from qdsmirror.daemons.supervise import CHILD_COMMAND, Setting, Supervisor
from qdsmirror.daemons.vigil import Vigil
from qdsmirror.errors import ConfigError, QdsError
from qdsmirror.net.control import ControlServer
from qdsmirror.paths import Paths, file_identity, group_name, make_directories
from qdsmirror.pidfile import PidFile

_log = Logger()
#: A group's configuration with whatever else its processes depend on; equal means undisturbed.
Fingerprint = tuple[Any, ...]


class Master(Daemon):
    """A master daemon.

    :cvar daemon: the name of its pid file, control socket and log, e.g. ``qdsdriver``.
    :cvar role: of its children.
    :cvar side: the part this host plays in the groups it takes.
    :cvar has_statistics: whether a process for their statistics runs beside its other children.
    :cvar has_certificate: whether its children show the host's certificate to peers.
    :param command: how a child is started.
    """

    daemon = ""
    role = ""
    side = ""
    has_certificate = False
    has_statistics = False

    def __init__(
        self, reactor: Any, paths: Paths, command: tuple[str, ...] = CHILD_COMMAND
    ) -> None:
        self.reactor = reactor
        self.paths = paths
        self.groups: dict[int, GroupConfig] = {}
        self._command = command
        self._pid_file = PidFile(paths.pid_file(self.daemon))
        self._auditor = Auditor(paths, self.daemon)
        self._control = ControlServer(
            reactor, paths.control_socket(self.daemon), self, self._auditor
        )
        self._fingerprints: dict[int, Fingerprint] = {}
        self._certificate: HostCertificate | None = None
        self._problems: list[Problem] = []
        self._since = time.time()
        self._log_descriptor: int | None = None
        self._host: HostConfig
        self._supervisor: Supervisor
        self._vigil: Vigil
        self._statistics: Statistics | None = None

    # -- what a role adds -----------------------------------------------------------------------

    def open_group(self, group: GroupConfig) -> None:
        """Open what the master holds for a group.

        :raises QdsError: that is not possible.
        """

    def close_group(self, number: int) -> None:
        """Close what the master holds for a group; its child may still be ending."""

    def close(self) -> None:
        """Stop taking anything new; called before the children are stopped."""

    def listening(self, number: int) -> int | None:
        """Give the listening descriptor that a group's child inherits."""
        return None

    def memory(self, number: int) -> int | None:
        """Give the descriptor of the memory that a group's child works in."""
        return None

    def depends_on(self, number: int) -> list[Path]:
        """Name the files whose change means a restart of a group's process."""
        return []

    # -- life -----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Claim the name and load the configuration; still in the foreground, on stderr.

        :raises QdsError: another master runs, or a directory cannot be made.
        :raises ConfigError: there is nothing to run.
        """
        make_directories(self.paths)
        self._host = load_host(self.paths)
        self._pid_file.acquire()
        try:
            self._load()
        except QdsError:
            self._pid_file.release()
            raise

    def _load(self) -> None:
        found, self._problems = scan_groups(self.paths)
        mine = [group for group in found if group.role_of(self._host.name) == self.side]
        if not mine:
            raise ConfigError(
                "; ".join(str(problem) for problem in self._problems)
                or f"no dsgrpNNN.cfg in {self.paths.etc} names {self._host.name} as its "
                f"{self.side} host",
                hint=" ".join(["qdsconfigtool check", *self.paths.arguments()]),
            )
        self._tell_problems()
        self.groups = {group.number: group for group in mine}
        self._fingerprints = {group.number: self._fingerprint(group) for group in mine}

    def _tell_problems(self) -> None:
        for problem in self._problems:
            _log.error("{problem}", problem=problem)

    def begin(self) -> None:
        """Become the user, serve, and have the children started.

        :raises QdsError: that is not possible.
        """
        become_user(self._host, self.paths, self._pid_file)
        self._log_descriptor = _log_for_children(self.paths.log_file(self.daemon))
        self._pid_file.write()
        for group in self.groups.values():
            self.open_group(group)
        self._control.start()
        _log.info(
            "{daemon} {version} on {host}: {names}",
            daemon=self.daemon,
            version=__version__,
            host=self._host.name,
            names=" ".join(map(group_name, sorted(self.groups))),
        )
        setting = Setting(
            self.reactor,
            self.role,
            self.paths,
            self.listening,
            self._children_log,
            self._command,
            memory_of=self.memory,
            changed=lambda: self._vigil.look(),
        )
        self._supervisor = Supervisor(setting, self._host.children)
        if self.has_statistics:
            self._statistics = Statistics(
                self.reactor, self.paths, self._children_log, self._command
            )
        self._vigil = Vigil(self.reactor, Notifier(), self._supervisor, self._ask_statistics)
        if self.has_certificate:
            self._certificate = HostCertificate(self.reactor, self._host)
            self._certificate.begin()
        # Not before the reactor reaps.
        self.reactor.callWhenRunning(self._start_children)
        apply_at_hang_up(self.reactor, self.apply, self._vigil)
        self._note_configuration("start", {})

    def _ask_statistics(self) -> None:
        if self._statistics is not None:
            self._statistics.ask()

    def _start_children(self) -> None:
        if self.running:
            self._supervisor.start(self.groups)
            self._vigil.begin()
            if self._statistics is not None:
                self._statistics.start(self.groups)

    def _children_log(self) -> int:
        return 2 if self._log_descriptor is None else self._log_descriptor

    @inlineCallbacks
    def stopService(self) -> Any:  # noqa: N802
        """Stop the children in order; done when they are reaped; part of IService."""
        ignore_hang_up()
        _log.info("{daemon} is told to end", daemon=self.daemon)
        super().stopService()
        self._vigil.end()
        if self._certificate is not None:
            self._certificate.end()
        self.close()
        watched = self._statistics.stop() if self._statistics is not None else None
        yield self._supervisor.stop()
        yield watched
        self._supervisor.keep_failures()
        for number in list(self.groups):
            self.close_group(number)
        yield self._control.stop()
        self._pid_file.release()
        if self._log_descriptor is not None:
            os.close(self._log_descriptor)

    # -- control channel and signals ------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Give the master's Status: itself, ``children``, ``groups``, configuration ``errors``."""
        return {
            "name": self.daemon,
            "role": self.role,
            "host": self._host.name,
            "pid": os.getpid(),
            "since": self._since,
            "errors": [str(problem) for problem in self._problems],
            **self._supervisor.status(),
            "statistics": self._statistics.status() if self._statistics is not None else None,
        }

    def apply(self) -> dict[str, list[Any]]:
        """Take up changed, new and removed group files; unchanged groups are not disturbed.

        A group whose file is broken goes on as it is.  What failed before is tried again.

        A new certificate, key or CA is for the sessions to come; those that run go on.

        :returns: the group numbers ``started``, ``stopped``, ``restarted``, ``retried``, and those
            ``retuned``, of which only throttles and statistics go by something else; the
            certificate ``renewed``; and the ``errors`` as lines.
        :raises ConfigError: qds.cfg is wrong; nothing was changed.
        """
        host = load_host(self.paths)
        if host.name != self._host.name:
            raise ConfigError(
                f"{self.paths.host_config}: name: changed from {self._host.name} to {host.name}",
                hint="stop the daemons and start them again",
            )
        found, self._problems = scan_groups(self.paths)
        self._tell_problems()
        if self._statistics is not None:
            self._statistics.retry()
        self._host = host
        self._supervisor.children_max = host.children
        wanted = {one.number: one for one in found if one.role_of(host.name) == self.side}
        broken = {problem.file for problem in self._problems}
        errors = [str(problem) for problem in self._problems]
        renewed = self._renew_certificate(host, errors)
        result: dict[str, list[Any]] = {
            "started": [],
            "stopped": [],
            "restarted": [],
            "retuned": [],
            "retried": self._supervisor.retry(),
            "renewed": renewed,
            "errors": errors,
        }
        for number in sorted(self.groups.keys() | wanted.keys()):
            try:
                done = self._apply_one(number, wanted.get(number), broken)
            except QdsError as error:
                _log.error("{error}", error=error)
                errors.append(str(error))
                continue
            if done:
                result[done].append(number)
                if self._statistics is not None:
                    self._statistics.changed(done, number)
        _log.info("configuration applied: {done}", done=_described(result))
        self._note_configuration("apply", result)
        return result

    def _renew_certificate(self, host: HostConfig, errors: list[str]) -> list[str]:
        """Have new sessions show another certificate, key or CA; give its path if there is one.

        :param errors: gets a line where they cannot be used; then the former stay.
        """
        if self._certificate is None:
            return []
        try:
            renewed = self._certificate.renew(host)
        except QdsError as error:
            _log.error("certificate, key and CA stay as they were: {error}", error=error)
            errors.append(str(error))
            return []
        if not renewed:
            return []
        # Before links that were refused are tried again.
        self._supervisor.reload()
        return [str(host.certificate)]

    def _note_configuration(self, event: str, changes: Mapping[str, Any]) -> None:
        """Have the audit log say what is in effect from now on."""
        self._auditor.configuration(
            event,
            {group.name: self.side for group in self.groups.values()},
            [
                self.paths.host_config,
                *(self.paths.group_config(one) for one in sorted(self.groups)),
            ],
            changes,
        )

    def forget_failures(self, group: str) -> dict[str, list[str]]:
        """Forget the failed devices of a group whose logs the operator has initialised anew.

        :param group: its number.
        :returns: ``devices``, those forgotten.
        """
        number = int(group)
        devices = self._supervisor.forget(number)
        if devices:
            _log.info(
                "{name}: initialised anew; {devices} may be used again",
                name=group_name(number),
                devices=", ".join(devices),
            )
        return {"devices": devices}

    def _apply_one(self, number: int, group: GroupConfig | None, broken: set[Path]) -> str:
        """Bring one group to its wanted state; give what that took, nothing if nothing."""
        if group is None:
            if self.paths.group_config(number) in broken:
                return ""
            self._supervisor.remove(number)
            self.close_group(number)
            del self.groups[number], self._fingerprints[number]
            return "stopped"
        fingerprint = self._fingerprint(group)
        if number not in self.groups:
            self.open_group(group)
            self.groups[number], self._fingerprints[number] = group, fingerprint
            self._supervisor.add(number)
            return "started"
        if fingerprint == self._fingerprints[number]:
            before, self.groups[number] = self.groups[number], group
            return "retuned" if group != before and self._statistics is not None else ""
        self.open_group(group)
        self.groups[number], self._fingerprints[number] = group, fingerprint
        self._supervisor.restart(number)
        return "restarted"

    def _fingerprint(self, group: GroupConfig) -> Fingerprint:
        files = self.depends_on(group.number)
        return (group.of_data_path(), *map(file_identity, files))


def _described(result: Mapping[str, list[Any]]) -> str:
    """Say in a line what :meth:`Master.apply` did."""
    changes = [
        f"{word} {', '.join(map(group_name, result[word]))}"
        for word in ("started", "stopped", "restarted", "retuned", "retried")
        if result[word]
    ]
    if result["renewed"]:
        changes.append("new sessions show the certificate as it is now")
    return "; ".join(changes) or "nothing to change"


def _log_for_children(path: Path) -> int | None:
    """Open the log for children where the master's stderr leads nowhere (twistd's daemons)."""
    if os.fstat(2).st_rdev != os.stat(os.devnull).st_rdev:
        return None
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
