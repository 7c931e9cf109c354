"""Programs that throttles run: in a clean environment, and not for ever (security.md 9)."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO

from qdsmirror.errors import QdsError
from qdsmirror.limits import EXEC_OUTPUT_BYTES_MAX

#: What every program has in its environment, whatever ours is.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
_LOOK_SECONDS = 0.1
_READ_BYTES = 65536


def run_program(
    argv: Sequence[str],
    variables: Mapping[str, str],
    seconds: float,
    given_up: Callable[[], bool] = lambda: False,
) -> str:
    """Run a program to its end; blocking.

    No shell takes part, and it inherits nothing of ours; what it starts is killed with it when its
    time is over.

    :param argv: its absolute path and arguments.
    :param variables: ``QDS_*``.
    :param given_up: whether nobody wants it to go on.
    :returns: the beginning of what it has written.
    :raises QdsError: it cannot be started, takes too long, or ends with an error.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={**ENVIRONMENT, **variables},
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise QdsError(f"{argv[0]}: {getattr(error, 'strerror', None) or error}") from None
    assert process.stdout is not None
    with process.stdout as output:
        deadline = time.monotonic() + seconds
        said = _listen(process, output, lambda: given_up() or time.monotonic() >= deadline)
    code = process.poll()
    text = " ".join(said.decode("utf-8", "replace").split())
    if code is None:
        _kill(process)
        why = "is killed at our end" if given_up() else f"took longer than {seconds:g} s; killed"
        raise QdsError(f"{argv[0]} {why}")
    if code:
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise QdsError(f"{argv[0]} {how}" + (f": {text}" if text else ""))
    return text


def _listen(
    process: subprocess.Popen[bytes], output: IO[bytes], is_over: Callable[[], bool]
) -> bytes:
    """Keep the beginning of what a program writes, until its end, or until its time is over."""
    said = b""
    readable = select.poll()
    readable.register(output, select.POLLIN | select.POLLHUP)
    closed = ended = False
    while not ended and not is_over():
        if closed:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_SECONDS)
        # What it has left running in the background may keep its output open.
        ended = process.poll() is not None
        if not closed and readable.poll(0 if ended else int(1000 * _LOOK_SECONDS)):
            piece = os.read(output.fileno(), _READ_BYTES)
            said = (said + piece)[:EXEC_OUTPUT_BYTES_MAX]
            closed = not piece
    return said


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
