"""What the tests of the tools share: a configured host and daemons that answer from a script."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.core import ampbox
from qdsmirror.core.jsontext import dump_json
from qdsmirror.errors import QdsError, UsageError
from qdsmirror.paths import Paths

GROUP = """\
operation = async
[primary]
host = alpha
[secondary]
host = beta
port = 20575
journal_device = /dev/vg0/j{number}
[ldsus]
  [[qds{number}]]
  data_device = /dev/vg0/data{number}
  writelog_device = /dev/vg0/log{number}
  mirror_device = /dev/vg0/mirror{number}
"""


def host_root(test: TestCase, name: str = "alpha", groups: int = 1) -> Paths:
    """Make a QDS_ROOT with a configuration, removed after the test."""
    directory = Path(tempfile.mkdtemp(prefix="qds-", dir="/tmp"))
    test.addCleanup(shutil.rmtree, directory)
    paths = Paths.of(directory)
    for one in (paths.etc, paths.var, paths.run, paths.dev):
        one.mkdir()
    paths.host_config.write_text(f"name = {name}\n")
    for number in range(groups):
        paths.group_config(number).write_text(GROUP.format(number=number))
    return paths


class FakeDaemon:
    """A control socket in a thread; ``answers`` maps a command to a dict, a callable or an error.

    A callable gets the request's arguments.
    """

    def __init__(self, test: TestCase, path: Path, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.calls: list[tuple[str, dict[str, str]]] = []
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        test.addCleanup(self.stop)

    def stop(self) -> None:
        """Hang up; idempotent."""
        if self._listener.fileno() < 0:
            return
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        self._listener.close()
        os.unlink(self._path)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                decoder = ampbox.BoxDecoder()
                while data := connection.recv(65536):
                    for box in decoder.feed(data):
                        connection.sendall(ampbox.encode_box(self._answer(box)))

    def _answer(self, box: dict[bytes, bytes]) -> dict[bytes, bytes]:
        command = box.pop(ampbox.COMMAND).decode()
        number = box.pop(ampbox.ASK)
        words = {key.decode(): value.decode() for key, value in box.items()}
        self.calls.append((command, words))
        answer = self.answers.get(command, UsageError(f"no command {command}"))
        try:
            if callable(answer):
                answer = answer(words)
            if isinstance(answer, QdsError):
                raise answer
        except QdsError as error:
            return {
                ampbox.ERROR: number,
                ampbox.ERROR_CODE: ampbox.QDS_ERROR,
                ampbox.ERROR_DESCRIPTION: ampbox.encode_error(error),
            }
        return {ampbox.ANSWER: number, **ampbox.spread(b"json", dump_json(answer))}


def driver_status(number: int = 0, **changes: Any) -> dict[str, Any]:
    """Give a driver's Status: connected, coherent and drained, unless changed."""
    status = {
        "group": number,
        "name": f"dsgrp{number:03d}",
        "role": "primary",
        "operation": "async",
        "degraded": None,
        "synchronous": None,
        "settings": {},
        "state": "connected",
        "modes": ["connected"],
        "mode_details": [{"mode": "connected", "since": 1790000000.0, "reason": "linked"}],
        "since": 1790000000.0,
        "reason": "",
        "coherent": True,
        "generation": "00" * 16,
        "peer": "beta",
        "gsn": dict.fromkeys(
            ("written", "durable", "applied", "sent", "committed", "mirrored"), 812
        ),
        "lag": {"entries": 0, "bytes": 0, "seconds": 0.0},
        "refresh": None,
        "bypass": None,
        "backfresh": None,
        "verify": None,
        "driver": {"pid": 11},
        "pmd": {"pid": 12, "state": "connected", "reason": "", "code": 0},
        "rmd": {"pid": None, "state": "connected"},
        "ldsus": [
            {
                "name": f"qds{number}",
                "size": 268435456,
                "coherent": True,
                "writelog": {
                    "devices": [f"/dev/vg0/log{number}"],
                    "size": 1 << 26,
                    "used_bytes": 4096,
                    "used_ratio": 0.01,
                    "entries": 12,
                    "oldest_age_seconds": 0.2,
                    "seconds_to_full": None,
                },
                "errors": [],
            }
        ],
    }
    return {**status, **changes}


def pmd_status(number: int = 0, **changes: Any) -> dict[str, Any]:
    """Give a pmd's Status; ``changes`` are of its ``pmd`` part."""
    return {
        "group": number,
        "name": f"dsgrp{number:03d}",
        "role": "primary",
        "pmd": {"pid": 12, "state": "connected", "reason": "", "code": 0, **changes},
        "gsn": {"sent": 812, "committed": 812, "mirrored": 812},
    }


def captured(test: TestCase, main: Callable[[list[str]], int], *argv: str) -> tuple[int, str, str]:
    """Run a command's main; give its exit code, standard output and standard error."""
    import contextlib
    import io

    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(list(argv))
    return code, output.getvalue(), errors.getvalue()
