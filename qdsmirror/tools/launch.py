"""launchdriver, launchpmds, launchrmds, launchconsole; kill* likewise; in.pmd, in.rmd, qdsconsole.

A launch command looks first whether the daemon can work here, starts its master in the
background (a session of its own, log in the var directory) and returns when every group has been
started or has failed.  All are idempotent: what already is as asked for is a success.
"""

from __future__ import annotations

import argparse
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qdsmirror import errors, limits
from qdsmirror.config import (
    POOL_KEY,
    GroupConfig,
    HostConfig,
    load_host,
    load_secret,
    load_token,
    scan_groups,
)
from qdsmirror.errors import ConfigError, DeviceError, QdsError, UnreachableError
from qdsmirror.paths import Paths, make_directories
from qdsmirror.pidfile import running_pid
from qdsmirror.tools import cli, progress
from qdsmirror.tools.client import ControlClient

_POLL_SECONDS = 0.05
#: What is read back from the log of a daemon that ended at once.
_LOG_TAIL_BYTES = 16 * 1024


@dataclass(frozen=True)
class _Daemon:
    """What the commands of one daemon differ in."""

    name: str
    role: str
    side: str
    title: str


_DRIVER = _Daemon("qdsdriver", "driver", "primary", "device driver")
_PMD = _Daemon("qdspmd", "pmd", "primary", "primary mirror daemons")
_RMD = _Daemon("qdsrmd", "rmd", "secondary", "remote mirror daemons")
#: It has no groups, and no side.
_CONSOLE = _Daemon("qdsconsole", "console", "", "console")

_COMMANDS = {
    "launchdriver": (_DRIVER, "Start the device driver in the background."),
    "launchpmds": (_PMD, "Start the primary mirror daemons in the background."),
    "launchrmds": (_RMD, "Start the remote mirror daemons in the background."),
    "launchconsole": (_CONSOLE, "Start the console, which serves the metrics, in the background."),
    "killconsole": (_CONSOLE, "End the console in order."),
    "qdsconsole": (_CONSOLE, "Run the console, which serves the metrics, in the foreground."),
    "killdriver": (_DRIVER, "End the device driver in order."),
    "killpmds": (_PMD, "End the primary mirror daemons in order."),
    "killrmds": (_RMD, "End the remote mirror daemons in order."),
    "in.pmd": (_PMD, "Run the master primary mirror daemon in the foreground."),
    "in.rmd": (
        _RMD,
        "Run the master remote mirror daemon in the foreground, also from inetd (wait) or by "
        "socket activation.",
    ),
}


def build_parser(name: str) -> argparse.ArgumentParser:
    """Make the parser of one of this module's commands, by its name."""
    return cli.parser(name, _COMMANDS[name][1])


# -- sanity checks ---------------------------------------------------------------------------------


def _check(daemon: _Daemon, paths: Paths) -> list[QdsError]:
    """Look whether the daemon can work here.

    :returns: what is wrong in group files; the good ones do not wait for them.
    :raises QdsError: what is missing, and where.
    """
    host = load_host(paths)
    if daemon is _CONSOLE:
        load_token(host.metrics_token_file)
        _check_directories(paths)
        return []
    found, problems = scan_groups(paths)
    groups = [one for one in found if one.role_of(host.name) == daemon.side]
    broken = list(cli.broken_files(paths, problems).values())
    if not groups and broken:
        raise broken[0]
    if not groups:
        raise ConfigError(
            f"no dsgrpNNN.cfg in {paths.etc} names {host.name} as its {daemon.side} host",
            hint=" ".join(["qdsconfigtool check", *paths.arguments()]),
        )
    _check_directories(paths)
    if daemon.role != "driver":
        _check_identity(paths, host, groups)
    if daemon.role != "pmd":
        _check_devices(groups, host.name)
    if daemon.role == "rmd":
        for port in sorted({group.port for group in groups}):
            _check_port(port)
    return broken


def _check_directories(paths: Paths) -> None:
    make_directories(paths)
    for directory in (paths.run, paths.var):
        if not os.access(directory, os.W_OK | os.X_OK):
            raise QdsError(f"{directory}: not writable", hint="run as root or as its owner")


def _check_identity(paths: Paths, host: HostConfig, groups: list[GroupConfig]) -> None:
    for key in ("certificate", "key", "ca"):
        path: Path = getattr(host, key)
        try:
            path.open("rb").close()
        except OSError as error:
            raise ConfigError(
                f"{paths.host_config}: {key}: {path}: {error.strerror}",
                hint="make it with qdsconfigtool pki, or correct the path",
            ) from None
    for group in groups:
        load_secret(paths, group.number)


def _check_devices(groups: list[GroupConfig], host: str) -> None:
    for group in groups:
        for key, owner, path in group.devices():
            if owner != host:
                continue
            where = f"{group.path}: {'.'.join(key)}: {path}"
            if key == POOL_KEY:
                # A writelog that needs it is refused by the driver; the others do without.
                if not os.access(path, os.R_OK | os.W_OK):
                    print(f"warning: {where}: cannot be used", file=sys.stderr)
                continue
            if not os.path.exists(path):
                raise DeviceError(f"{where}: does not exist", hint="create it, or correct the path")
            if not os.access(path, os.R_OK | os.W_OK):
                raise DeviceError(f"{where}: no permission to read and write it")


def _check_port(port: int) -> None:
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        raise QdsError(
            f"port {port}: {os.strerror(error.errno or 0)}",
            hint=f"see who listens there: ss -ltnp sport = {port}"
            if in_use
            else "a port below 1024 needs root or socket activation",
        ) from None


# -- launch ----------------------------------------------------------------------------------------


def _command(daemon: _Daemon, paths: Paths, *options: str) -> list[str]:
    """Give the command line of a master."""
    # -P: nothing is imported from the directory that the caller happens to stand in.
    python = [sys.executable, "-P", "-m", "qdsmirror.daemons.run"]
    return [*python, daemon.name, *paths.arguments(), *options]


def _launch(name: str, argv: Sequence[str] | None) -> int:
    arguments = build_parser(name).parse_args(argv)
    daemon = _COMMANDS[name][0]
    paths = cli.paths_of(arguments)
    log = paths.log_file(daemon.name)
    pid = running_pid(paths.pid_file(daemon.name))
    if pid is not None:
        try:
            _wait_until_started(daemon, paths, None, log, 0)
        except _GoneError:
            # It was about to end, killed perhaps: then this is the first launch.
            pass
        else:
            return _tell(arguments.json, f"{daemon.name} is already running (pid {pid})", pid)
    broken = _check(daemon, paths)
    with open(log, "ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            _command(daemon, paths),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            start_new_session=True,
        )
    with progress.waiting(arguments.json, daemon.name, "waiting until its groups serve"):
        status = _wait_until_started(daemon, paths, process, log, start)
    count = len(status["groups"])
    groups = "1 group" if count == 1 else f"{count} groups"
    text = f"runs with {groups}" if daemon.side else f"runs: {status['url']}"
    return _tell(arguments.json, f"{daemon.name} {text}", status["pid"], broken)


def _tell(as_json: bool, text: str, pid: int | None, broken: Sequence[QdsError] = ()) -> int:
    if as_json:
        cli.print_json({"pid": pid, "message": text, **cli.errors_json(broken)})
    else:
        print(text)
    return cli.report_all(broken, as_json)


class _GoneError(Exception):
    """A master that ran before has ended."""


def _wait_until_started(
    daemon: _Daemon, paths: Paths, process: subprocess.Popen[bytes] | None, log: Path, start: int
) -> dict[str, Any]:
    """Wait until every group of a master serves; give the master's status.

    :param process: the master, unless it ran before.
    :raises QdsError: the master ended, a group does not start, or it takes too long.
    :raises _GoneError: the master that ran before has ended.
    """
    client = ControlClient(paths.control_socket(daemon.name))
    begun = time.monotonic()
    while True:
        elapsed = time.monotonic() - begun
        code = process.poll() if process is not None else None
        if code is not None:
            _ended(daemon, code, log, start)
        status = _status(client)
        gone = process is None and running_pid(paths.pid_file(daemon.name)) is None
        if status is None and gone:
            raise _GoneError
        if status is not None and (not daemon.side or _all_running(status, elapsed)):
            return status
        if status is not None and process is None and not status["groups"]:
            return status
        if elapsed > limits.LAUNCH_SECONDS_MAX:
            raise QdsError(
                f"{daemon.name} was started, but not all its groups are ready "
                f"after {limits.LAUNCH_SECONDS_MAX:g} s",
                hint=f"look into {log}",
            )
        time.sleep(_POLL_SECONDS)


def _status(client: ControlClient) -> dict[str, Any] | None:
    try:
        return client.call("Status")
    except UnreachableError:
        return None


def _all_running(status: dict[str, Any], elapsed_seconds: float) -> bool:
    """Tell whether all groups of a master's status run.

    :raises QdsError: one has failed, or failed and is still being retried by now.
    """
    states = [group["state"] for group in status["groups"]]
    settled = {"running", "failed"}
    if elapsed_seconds > limits.LAUNCH_RETRY_SECONDS_MAX:
        settled.add("retrying")
    if not states or not settled.issuperset(states):
        return False
    for group in status["groups"]:
        if group["state"] != "running":
            hint = (
                "it is tried again by itself"
                if group["state"] == "retrying"
                else "when that is mended: qdsconfigtool apply"
            )
            raise _error(group["code"], f"{group['name']}: {group['reason']}", hint)
    return True


def _ended(daemon: _Daemon, code: int, log: Path, start: int) -> NoReturn:
    """Say why a master ended at once: the last line that it logged."""
    with open(log, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - _LOG_TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").split("\n")
    said = [line for line in lines if line.strip()] or [f"it ended with exit code {code}"]
    raise _error(code, f"{daemon.name} did not start: {said[-1]}", f"look into {log}")


def _error(code: int, message: str, hint: str = "qdsinfo") -> QdsError:
    """Make the error that ends this command with the daemon's own exit code."""
    kinds: dict[int, type[QdsError]] = {
        errors.EXIT_BROKEN: errors.BrokenError,
        errors.EXIT_CONFIG: errors.ConfigError,
        errors.EXIT_IDENTITY: errors.IdentityError,
    }
    return kinds.get(code, QdsError)(message, hint)


# -- kill ------------------------------------------------------------------------------------------


def _kill(name: str, argv: Sequence[str] | None) -> int:
    arguments = build_parser(name).parse_args(argv)
    daemon = _COMMANDS[name][0]
    paths = cli.paths_of(arguments)
    pid_file = paths.pid_file(daemon.name)
    pid = running_pid(pid_file)
    if pid is None:
        return _tell(arguments.json, f"{daemon.name} is not running", None)
    with progress.waiting(arguments.json, daemon.name, "waiting for its end"):
        _end(daemon, pid, pid_file)
    return _tell(arguments.json, f"{daemon.name} has ended", pid)


def _end(daemon: _Daemon, pid: int, pid_file: Path) -> None:
    """Send SIGTERM to a master and wait until it is gone.

    :raises QdsError: that is not permitted, or it takes too long.
    """
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # The descriptor and the lock together say that this is the process meant.
        if running_pid(pid_file) != pid:
            return
        signal.pidfd_send_signal(process, signal.SIGTERM)
        ended = select.poll()
        ended.register(process, select.POLLIN)
        # It kills children that do not end in time, and needs a moment for itself.
        if not ended.poll(2000 * limits.STOP_SECONDS_MAX):
            raise QdsError(
                f"{daemon.name} (pid {pid}) has not ended after {2 * limits.STOP_SECONDS_MAX:g} s",
                hint="qdsdoctor; then look into its log",
            )
    except PermissionError:
        raise QdsError(
            f"no permission to end {daemon.name} (pid {pid})", hint="run as root or as its user"
        ) from None
    finally:
        os.close(process)


# -- foreground ------------------------------------------------------------------------------------


def _foreground(name: str, argv: Sequence[str] | None) -> NoReturn:
    arguments = build_parser(name).parse_args(argv)
    daemon = _COMMANDS[name][0]
    paths = cli.paths_of(arguments)
    options = []
    if daemon is _CONSOLE:
        _check(daemon, paths)
    if daemon is _RMD and _is_listening_socket(0):
        options.append("--inetd")
        # inetd makes the socket our output too; what we log does not belong there.
        _check_directories(paths)
        log = os.open(paths.log_file(daemon.name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        os.dup2(log, 1)
        os.dup2(log, 2)
    command = _command(daemon, paths, *options)
    os.execv(command[0], command)


def _is_listening_socket(descriptor: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as one:
            return bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


# -- console scripts -------------------------------------------------------------------------------


@cli.run
def launchdriver(argv: Sequence[str] | None = None) -> int:
    """Start the device driver; returns an exit code."""
    return _launch("launchdriver", argv)


@cli.run
def launchpmds(argv: Sequence[str] | None = None) -> int:
    """Start the primary mirror daemons; returns an exit code."""
    return _launch("launchpmds", argv)


@cli.run
def launchrmds(argv: Sequence[str] | None = None) -> int:
    """Start the remote mirror daemons; returns an exit code."""
    return _launch("launchrmds", argv)


@cli.run
def killdriver(argv: Sequence[str] | None = None) -> int:
    """End the device driver; returns an exit code."""
    return _kill("killdriver", argv)


@cli.run
def killpmds(argv: Sequence[str] | None = None) -> int:
    """End the primary mirror daemons; returns an exit code."""
    return _kill("killpmds", argv)


@cli.run
def killrmds(argv: Sequence[str] | None = None) -> int:
    """End the remote mirror daemons; returns an exit code."""
    return _kill("killrmds", argv)


@cli.run
def in_pmd(argv: Sequence[str] | None = None) -> int:
    """Become the master primary mirror daemon."""
    _foreground("in.pmd", argv)


@cli.run
def in_rmd(argv: Sequence[str] | None = None) -> int:
    """Become the master remote mirror daemon."""
    _foreground("in.rmd", argv)


@cli.run
def launchconsole(argv: Sequence[str] | None = None) -> int:
    """Start the console; returns an exit code."""
    return _launch("launchconsole", argv)


@cli.run
def killconsole(argv: Sequence[str] | None = None) -> int:
    """End the console; returns an exit code."""
    return _kill("killconsole", argv)


@cli.run
def qdsconsole(argv: Sequence[str] | None = None) -> int:
    """Become the console."""
    _foreground("qdsconsole", argv)
