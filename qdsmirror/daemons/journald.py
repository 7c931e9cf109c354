"""Log entries in the journal's own form, with fields to search by.

    journalctl QDS_GROUP=dsgrp000 QDS_LDSU=qds0

An entry is one datagram to journald's socket: ``NAME=value`` lines, or, where a value has several
lines, the name, its length as 64 bits little-endian, and the value.

Source: systemd's "Native Journal Protocol"; systemd.journal-fields(7).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping

from twisted.logger import ILogObserver, LogEvent, LogLevel, eventAsText
from zope.interface import implementer

from qdsmirror.daemons.logfields import fields_of
from qdsmirror.daemons.logwriter import LogWriter
from qdsmirror.limits import LOG_ENTRY_BYTES_MAX

SOCKET = "/run/systemd/journal/socket"

# syslog(3).
_PRIORITIES = {
    LogLevel.debug: 7,
    LogLevel.info: 6,
    LogLevel.warn: 4,
    LogLevel.error: 3,
    LogLevel.critical: 2,
}


def is_journal(descriptor: int, environment: Mapping[str, str]) -> bool:
    """Tell whether a descriptor leads to the journal (``JOURNAL_STREAM``, systemd.exec(5))."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def entry(fields: Mapping[str, str | int | None]) -> bytes:
    """Make an entry; fields that are ``None`` are left out.

    :param fields: names are capitals, digits and ``_``.
    """
    parts = []
    for name, value in fields.items():
        if value is None:
            continue
        data = str(value).encode(errors="backslashreplace")[:LOG_ENTRY_BYTES_MAX]
        if b"\n" in data:
            parts.append(b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(data)), data))
        else:
            parts.append(b"%s=%s\n" % (name.encode(), data))
    return b"".join(parts)


class JournalWriter(LogWriter):
    """Sends entries from a thread of its own.

    :param identifier: what the entries are by, for those that tell of lost ones.
    """

    def __init__(self, identifier: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._identifier = identifier
        super().__init__(self._socket.fileno())

    def close(self) -> None:
        """Close the socket, when all is written."""
        self.finish()
        self._socket.close()

    def _put(self, data: bytes) -> bool:
        try:
            self._socket.sendto(data, SOCKET)
        except OSError:
            return False
        return True

    def _loss(self, count: int) -> bytes:
        return entry(
            {
                "MESSAGE": f"{count} entries of the log before this one were lost",
                "PRIORITY": _PRIORITIES[LogLevel.warn],
                "SYSLOG_IDENTIFIER": self._identifier,
            }
        )


@implementer(ILogObserver)
class JournalObserver:
    """Writes a process's events.

    :param name: of the process, ``qdsdriver``, ``driver`` …
    :param writer: takes the entries.
    """

    def __init__(self, name: str, writer: LogWriter) -> None:
        self._identifier = identifier(name)
        self._writer = writer

    def __call__(self, event: LogEvent) -> None:
        """Write an event."""
        text = eventAsText(event, includeTimestamp=False, includeSystem=False)
        if not text:
            return
        about = fields_of(event)
        suppressed = event.get("suppressed_lines")
        self._writer.put(
            entry(
                {
                    "MESSAGE": text.rstrip("\n"),
                    "PRIORITY": _PRIORITIES[event.get("log_level", LogLevel.info)],
                    "SYSLOG_IDENTIFIER": self._identifier,
                    "QDS_GROUP": about.group,
                    "QDS_LDSU": about.ldsu,
                    "QDS_SEQUENCE": about.sequence,
                    "QDS_MODULE": str(event.get("log_namespace", "")) or None,
                    "QDS_AUDIT": "1" if event.get("audit") is True else None,
                    "QDS_SUPPRESSED": suppressed if isinstance(suppressed, int) else None,
                }
            )
        )


def identifier(name: str) -> str:
    """Name the daemon that a process is of: ``qdsdriver`` for its children too."""
    return name if name.startswith("qds") else f"qds{name}"
