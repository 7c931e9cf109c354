"""What the daemons log, and how a line looks: time, process, level, text.

    2026-11-23T00:46:29+0000 rmd[938]: dsgrp000: connected (GSN 812)

Under systemd entries go to the journal in its own form instead, with group, LDSU and sequence
number as fields.  Lines that repeat themselves are counted, not written (daemons.lograte).

Only our own lines are of use to an operator, with Twisted's warnings and errors; its reports of
ports, factories and the reactor are left out.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

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

from qdsmirror.daemons import journald
from qdsmirror.daemons.logfields import fields_of
from qdsmirror.daemons.lograte import Later, RateLimit
from qdsmirror.daemons.logwriter import LogWriter

#: The masters, by which twistd's command line says what it runs.
DAEMONS = ("qdsdriver", "qdspmd", "qdsrmd", "qdsconsole")
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
    first, *others = text.rstrip("\n").split("\n")
    sequence = fields_of(event).sequence
    if sequence is not None and "gsn" not in event:
        first += f" (GSN {sequence})"
    body = "\n\t".join([first, *others])
    return f"{formatTime(event.get('log_time'))} {name}[{os.getpid()}]: {words}{body}\n"


def observer(name: str, output: Any, later: Later | None = None) -> ILogObserver:
    """Make the observer that writes a process's lines.

    :param name: of the process, ``qdsdriver``, ``driver`` …
    :param output: where to: a text file, a :class:`LogWriter`, or a
        :class:`qdsmirror.daemons.journald.JournalWriter`.
    :param later: as for :class:`qdsmirror.daemons.lograte.RateLimit`.
    """
    enough = LogLevelFilterPredicate(LogLevel.info)
    for namespace in _FOREIGN:
        enough.setLogLevelForNamespace(namespace, LogLevel.warn)
    written: ILogObserver = (
        journald.JournalObserver(name, output)
        if isinstance(output, journald.JournalWriter)
        else FileLogObserver(output, partial(line, name))
    )
    limit = RateLimit(written, later)
    if later is not None:
        atexit.register(limit.flush)
    return FilteringLogObserver(limit, [enough])


def twistd() -> ILogObserver:
    """Make the observer for ``twistd -n --logger=qdsmirror.daemons.logs.twistd qdsdriver``."""
    name = next((one for one in sys.argv[1:] if one in DAEMONS), "twistd")
    return observer(name, _output(name), _later)


def _output(name: str) -> Any:
    """Give what writes to the journal, or to standard error, without ever waiting for it."""
    try:
        descriptor = sys.stderr.fileno()
    except io.UnsupportedOperation:
        return sys.stderr
    writer = (
        journald.JournalWriter(journald.identifier(name))
        if journald.is_journal(descriptor, os.environ)
        else LogWriter(descriptor)
    )
    atexit.register(writer.finish)
    return writer


def _later(seconds: float, call: Callable[[], None]) -> None:
    """Call a function in the reactor after some time."""
    from twisted.internet import reactor as installed

    reactor: Any = installed
    reactor.callFromThread(reactor.callLater, seconds, call)


def begin(name: str) -> None:
    """Log to stderr, or the journal, from now on, what was logged until now included.

    :param name: of the process.
    """
    globalLogBeginner.beginLoggingTo(
        [observer(name, _output(name), _later)], redirectStandardIO=False
    )
