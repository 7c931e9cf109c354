"""What a daemon writes into the audit log: commands over control sockets, and configurations.

The file is written by a thread: a disk that hangs holds up no group (rules.md 20).  What cannot be
written there is in the log all the same, which has each outcome too.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from twisted.logger import Logger

from qdsmirror import audit
from qdsmirror.daemons.logfields import group_in
from qdsmirror.daemons.logwriter import LogWriter
from qdsmirror.errors import EXIT_OK, QdsError
from qdsmirror.net.control_audit import Asked
from qdsmirror.paths import Paths

_log = Logger()

_numbers = count(1)


class AuditWriter(LogWriter):
    """Appends records to the audit log, from a thread of its own."""

    def __init__(self, path: Path) -> None:
        super().__init__(-1)
        self._path = path
        self._failed = False

    def record(self, record: Mapping[str, Any]) -> None:
        """Queue a record; never waits."""
        self.put(json.dumps(record).encode())

    def _put(self, data: bytes) -> bool:
        try:
            audit.append(self._path, audit.encode(json.loads(data)))
        except OSError as error:
            if not self._failed:
                _log.error(
                    "{path}: nothing can be written into the audit log: {why}",
                    path=str(self._path),
                    why=error.strerror,
                )
            self._failed = True
            return False
        self._failed = False
        return True

    def _loss(self, count: int) -> bytes:
        return json.dumps({"time": audit.now(), "event": "lost", "records": count}).encode()


@functools.cache
def writer(path: Path) -> AuditWriter:
    """Give this process's writer of a file."""
    made = AuditWriter(path)
    atexit.register(made.finish)
    return made


class Auditor:
    """Notes what one control socket is asked for.

    :param daemon: by the name of its socket, ``qdspmd`` or ``dsgrp000.driver``.
    :param records: takes them; default: the file of this host.
    """

    def __init__(
        self,
        paths: Paths,
        daemon: str,
        records: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._daemon = daemon
        self._write = records if records is not None else writer(paths.audit_log).record

    def __call__(self, asked: Asked) -> Callable[[QdsError | None], None]:
        """Note that a command was asked for; what this gives notes its outcome."""
        begun = time.monotonic()
        fields = {
            "id": f"{os.getpid()}-{next(_numbers)}",
            **audit.process(asked.pid, asked.uid),
            "daemon": self._daemon,
            "command": asked.command,
            "arguments": asked.arguments,
        }
        self._write({"time": audit.now(), "event": "asked", **fields})

        def answered(error: QdsError | None) -> None:
            seconds = round(time.monotonic() - begun, 3)
            self._answered(fields, seconds, error)

        return answered

    def _answered(self, fields: dict[str, Any], seconds: float, error: QdsError | None) -> None:
        event = "done" if error is None else "refused"
        outcome = {
            "code": EXIT_OK if error is None else error.exit_code,
            "message": "" if error is None else error.message,
            "seconds": seconds,
        }
        self._write({"time": audit.now(), "event": event, **fields, **outcome})
        given = fields["arguments"].items()
        arguments = "".join(f" {key}={value}" for key, value in given if value)
        _log.info(
            "{daemon}: {command}{arguments}, asked for by uid {uid}{program}: {outcome}",
            group=group_in(self._daemon),
            daemon=self._daemon,
            command=fields["command"],
            arguments=arguments,
            uid=fields["uid"],
            program=f" ({fields['program']})" if "program" in fields else "",
            outcome=outcome["message"] or "done",
            audit=True,
        )

    def configuration(
        self,
        event: str,
        roles: Mapping[str, str],
        files: Iterable[Path],
        changes: Mapping[str, Any],
    ) -> None:
        """Note the configuration that is in effect from now on.

        :param event: ``start``, or ``apply``: by command or SIGHUP.
        :param roles: this host's part in each group, by its name.
        :param files: configuration files; what is kept of them is a digest.
        :param changes: what was started, stopped, restarted ...
        """
        self._write(
            {
                "time": audit.now(),
                "event": event,
                "uid": os.geteuid(),
                "pid": os.getpid(),
                "daemon": self._daemon,
                "roles": dict(roles),
                "files": {path.name: _digest(path) for path in files},
                "changes": {key: value for key, value in changes.items() if value},
            }
        )


def _digest(path: Path) -> str | None:
    """Give the beginning of a file's SHA-256, as ``sha256sum`` shows it."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return None
