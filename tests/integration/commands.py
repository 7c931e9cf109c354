"""The project's commands, without an interpreter's start and all imports for each.

A server that has loaded their modules forks for each command that is run here.  What runs is a
process of its own as ever, with its own arguments, environment, directory, streams and exit code.
"""

from __future__ import annotations

import atexit
import configparser
import functools
import gc
import importlib
import json
import os
import pkgutil
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
#: Of a command's arguments and environment.
_REQUEST_BYTES_MAX = 128 * 1024
_FDS = 4
#: Of the server, with many commands at once.
_FDS_MAX = 512
#: Until the server has ended, once nobody can ask it any more.
_END_SECONDS = 10.0
#: What commands import when they need it.
_LATER = (
    "cryptography.x509",
    "cryptography.hazmat.primitives.asymmetric.ec",
    "cryptography.hazmat.primitives.serialization",
    "qdsmirror.pki",
)


@functools.cache
def entries() -> dict[str, str]:
    """Give the console scripts of setup.cfg: name to ``module:function``."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].strip().splitlines()
    return {line.split("=")[0].strip(): line.split("=")[1].strip() for line in lines}


# -- who asks -------------------------------------------------------------------------------------


class Commands:
    """Runs commands; the server starts with the first of them, and ends with this process."""

    def __init__(self) -> None:
        self._started: set[str] = set()
        self._socket: socket.socket | None = None

    def knows(self, program: str) -> bool:
        """Tell whether a command may be forked: the first of its name is started in earnest."""
        path = Path(program)
        if path.parent != Path(sys.executable).parent or path.name not in entries():
            return False
        if path.name in self._started:
            return True
        self._started.add(path.name)
        return False

    def run(
        self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], seconds: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end.

        :raises subprocess.TimeoutExpired: it was killed after ``seconds``.
        """
        outputs = [os.memfd_create("stdout"), os.memfd_create("stderr")]
        reader, writer = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        try:
            told = json.dumps([list(arguments), str(cwd), dict(environment)]).encode()
            socket.send_fds(self._server(), [told], [nothing, *outputs, writer])
            os.close(writer)
            writer = -1
            pid, code = self._wait(reader, seconds)
            said = [_content(output) for output in outputs]
        finally:
            for descriptor in (*outputs, reader, writer, nothing):
                if descriptor >= 0:
                    os.close(descriptor)
        if code is None:
            raise subprocess.TimeoutExpired(list(arguments), seconds, *said)
        return subprocess.CompletedProcess(list(arguments), code, *said)

    @staticmethod
    def _wait(reader: int, seconds: float) -> tuple[int, int | None]:
        """Wait for the pid and the exit code; kill what takes too long, whose code is ``None``."""
        deadline = time.monotonic() + seconds
        words = b""
        pid, late, killed = 0, False, False
        while words.count(b"\n") < 2:
            left = max(0.0, deadline - time.monotonic())
            late = late or not select.select([reader], [], [], left)[0]
            # (Time may be up before the server has had any to fork.)
            if late and pid and not killed:
                killed = True
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            data = os.read(reader, 100)
            if not data:
                raise RuntimeError("the server of commands has ended")
            words += data
            pid = int(words.split(b"\n")[0])
        return pid, None if late else int(words.split(b"\n")[1])

    def _server(self) -> socket.socket:
        if self._socket is None:
            ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            server = subprocess.Popen(
                [sys.executable, "-m", __name__, str(its.fileno())],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
            )
            its.close()
            self._socket = ours
            atexit.register(server.wait, _END_SECONDS)
            atexit.register(ours.close)
        return self._socket


def _content(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        return file.read().decode()


COMMANDS = Commands()


# -- the server -----------------------------------------------------------------------------------


def serve(asked: socket.socket) -> None:
    """Fork for each request, until who asks is gone."""
    _load()
    selector = selectors.DefaultSelector()
    selector.register(asked, selectors.EVENT_READ, None)
    while True:
        for key, _ in selector.select():
            if key.data is not None:
                pid, report = key.data
                selector.unregister(key.fileobj)
                os.close(key.fd)
                _, status = os.waitpid(pid, 0)
                _tell(report, os.waitstatus_to_exitcode(status))
                os.close(report)
                continue
            message, given, _, _ = socket.recv_fds(asked, _REQUEST_BYTES_MAX, _FDS)
            if not message:
                return
            pid = os.fork()
            if not pid:
                _become(json.loads(message), given[:3])
            for descriptor in given[:3]:
                os.close(descriptor)
            _tell(given[3], pid)
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, given[3]))


def _tell(report: int, number: int) -> None:
    try:
        os.write(report, b"%d\n" % number)
    except BrokenPipeError:
        pass  # nobody waits any more


def _load() -> None:
    import qdsmirror.tools

    for found in pkgutil.iter_modules(qdsmirror.tools.__path__, "qdsmirror.tools."):
        importlib.import_module(found.name)
    for name in _LATER:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _become(request: Any, streams: Sequence[int]) -> NoReturn:
    """Be the command."""
    code = 1
    try:
        arguments, directory, environment = request
        for place, descriptor in enumerate(streams):
            os.dup2(descriptor, place)
        os.closerange(3, _FDS_MAX)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        sys.argv = list(arguments)
        # As execve(2) names it: the audit log tells who asked.
        Path("/proc/self/comm").write_text(Path(arguments[0]).name)
        module, _, function = entries()[Path(arguments[0]).name].partition(":")
        code = getattr(importlib.import_module(module), function)()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
