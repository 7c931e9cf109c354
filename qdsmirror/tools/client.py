"""The blocking client of the control sockets, for the tools: no Twisted, one call at a time."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path
from typing import Any

from qdsmirror.core import ampbox
from qdsmirror.core.jsontext import parse_object
from qdsmirror.errors import ProtocolError, QdsError, UnreachableError, UsageError

TIMEOUT_SECONDS = 5.0
_RECEIVE_BYTES = 256 * 1024
#: Which command starts the daemon behind a control socket, by the last part of its name.
LAUNCHERS = {
    "driver": "launchdriver",
    "pmd": "launchpmds",
    "rmd": "launchrmds",
    "console": "launchconsole",
}


def launcher_of(path: str | os.PathLike[str]) -> str:
    """Name the command that starts the daemon of a control socket or a pid file.

    :param path: e.g. ``.../qdsdriver.ctl`` or ``.../dsgrp000.pmd.ctl``.
    """
    stem = Path(path).stem
    role = stem.rpartition(".")[2].removeprefix("qds")
    return LAUNCHERS.get(role, "")


class ControlClient:
    """Calls the commands of one daemon.

    :param path: the control socket (``Paths.control_socket``).
    :param timeout_seconds: for one call, connecting included.
    """

    def __init__(
        self, path: str | os.PathLike[str], timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        self._path = os.fspath(path)
        self._timeout_seconds = timeout_seconds

    def call(self, command: str, **arguments: str) -> dict[str, Any]:
        """Run a command of the daemon and give its answer.

        :param command: ``Status``, ``Refresh`` (``kind="full"``), ``KillRefresh``, ``Apply``,
            ``ForgetFailures`` (``group="0"``).
        :raises UnreachableError: nobody listens, or no answer came in time.
        :raises QdsError: the daemon's own error, of the class it had there.
        """
        deadline = time.monotonic() + self._timeout_seconds
        request = {ampbox.ASK: b"1", ampbox.COMMAND: command.encode("ascii")}
        for name, value in arguments.items():
            request[name.encode("ascii")] = value.encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            try:
                self._wait_until(connection, deadline)
                connection.connect(self._path)
                connection.sendall(ampbox.encode_box(request))
                box = self._answer(connection, deadline)
            except TimeoutError:
                raise UnreachableError(
                    f"no answer from {self._path} within {self._timeout_seconds:g} s",
                    hint="try again; if it stays so: qdsdoctor, then the daemon's log",
                ) from None
            except OSError as error:
                raise self._unreachable(error) from None
        return self._result(command, box)

    def _unreachable(self, error: OSError) -> UnreachableError:
        """Say why nobody was reached, and the command that helps."""
        if error.errno in (errno.EACCES, errno.EPERM):
            return UnreachableError(
                f"no permission for {self._path}", hint="run as root or as the daemon's user"
            )
        launcher = launcher_of(self._path)
        return UnreachableError(
            f"no daemon answers on {self._path}: {error.strerror or error}",
            hint=f"start it with {launcher}" if launcher else "qdsinfo tells what runs",
        )

    def _wait_until(self, connection: socket.socket, deadline: float) -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        connection.settimeout(remaining)

    def _answer(self, connection: socket.socket, deadline: float) -> dict[bytes, bytes]:
        """Receive one box."""
        decoder = ampbox.BoxDecoder()
        while True:
            self._wait_until(connection, deadline)
            data = connection.recv(_RECEIVE_BYTES)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
            boxes = decoder.feed(data)
            if boxes:
                return boxes[0]

    def _result(self, command: str, box: dict[bytes, bytes]) -> dict[str, Any]:
        """Give what the answer box holds, or raise what it reports."""
        if ampbox.ERROR in box:
            raise self._error(command, box)
        if ampbox.ANSWER not in box:
            raise ProtocolError(f"{self._path} sent something that is no answer")
        return parse_object(ampbox.gather(b"json", box), "the answer")

    def _error(self, command: str, box: dict[bytes, bytes]) -> QdsError:
        description = box.get(ampbox.ERROR_DESCRIPTION, b"")
        code = box.get(ampbox.ERROR_CODE, b"")
        if code == ampbox.QDS_ERROR:
            return ampbox.decode_error(description)
        if code == b"UNHANDLED":
            return UsageError(f"the daemon on {self._path} has no command {command}")
        return QdsError(f"{self._path}: {command} failed: {description.decode('utf-8', 'replace')}")
