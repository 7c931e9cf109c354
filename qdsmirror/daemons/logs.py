"""What the daemons log, and how a line looks: time, process, level, text.

    2026-11-23T00:46:29+0000 rmd[938]: dsgrp000: connected

Only our own lines are of use to an operator, with Twisted's warnings and errors; its reports of
ports, factories and the reactor are left out.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
from functools import partial
from typing import Any, TextIO

from twisted.logger import (
    FileLogObserver,
    FilteringLogObserver,
    ILogObserver,
    LogEvent,
    LogLevel,
    LogLevelFilterPredicate,
    eventAsText,
    formatTime,
    globalLogBeginner,
)

from qdsmirror.daemons.logwriter import LogWriter

#: The masters, by which twistd's command line says what it runs.
DAEMONS = ("qdsdriver", "qdspmd", "qdsrmd")
#: ``log_legacy`` is what comes by twisted.python.log; failures are critical and pass.
_FOREIGN = ("twisted", "log_legacy")


def line(name: str, event: LogEvent) -> str | None:
    """Make the line of an event; a failure's traceback follows, indented.

    :param name: of the process.
    """
    text = eventAsText(event, includeTimestamp=False, includeSystem=False)
    if not text:
        return None
    level: Any = event.get("log_level", LogLevel.info)
    words = "" if level is LogLevel.info else f"{level.name}: "
    body = text.rstrip("\n").replace("\n", "\n\t")
    return f"{formatTime(event.get('log_time'))} {name}[{os.getpid()}]: {words}{body}\n"


def observer(name: str, output: Any) -> ILogObserver:
    """Make the observer that writes a process's lines.

    :param name: of the process, ``qdsdriver``, ``driver`` …
    :param output: where to: a text file, or a :class:`LogWriter`.
    """
    enough = LogLevelFilterPredicate(LogLevel.info)
    for namespace in _FOREIGN:
        enough.setLogLevelForNamespace(namespace, LogLevel.warn)
    return FilteringLogObserver(FileLogObserver(output, partial(line, name)), [enough])


def twistd() -> ILogObserver:
    """Make the observer for ``twistd -n --logger=qdsmirror.daemons.logs.twistd qdsdriver``."""
    name = next((one for one in sys.argv[1:] if one in DAEMONS), "twistd")
    return observer(name, _unblocked(sys.stderr))


def _unblocked(stream: TextIO) -> Any:
    """Give what writes to a stream's descriptor without ever waiting for it."""
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:
        return stream
    writer = LogWriter(descriptor)
    atexit.register(writer.finish)
    return writer


def begin(name: str) -> None:
    """Log to stderr from now on, what was logged until now included.

    :param name: of the process.
    """
    globalLogBeginner.beginLoggingTo(
        [observer(name, _unblocked(sys.stderr))], redirectStandardIO=False
    )
