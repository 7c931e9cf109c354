"""What a service manager is told: ready, what we do, alive, ending (sd_notify(3)).

One datagram of ``NAME=VALUE`` lines to the socket that ``NOTIFY_SOCKET`` names.  Nothing here ever
waits, and nothing happens where there is no such socket.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

from twisted.logger import Logger

from qdsmirror.limits import STATUS_TEXT_CHARACTERS_MAX

_log = Logger()

#: What is for the process alone that the service manager has started.
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """The way to the service manager.

    :param environment: with ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID``; default:
        this process's.
    :ivar watchdog_seconds: a sign of life is expected at least so often; 0: none is.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        given = os.environ if environment is None else environment
        self._address = _address(given.get("NOTIFY_SOCKET", ""))
        self.watchdog_seconds = _watchdog_seconds(given) if self._address else 0.0
        self._socket: socket.socket | None = None
        self._told = ""
        self._complained = False

    def __bool__(self) -> bool:
        """Whether there is a service manager that wants to be told."""
        return bool(self._address)

    def ready(self) -> None:
        """Say that all that was asked for is served, or was tried."""
        self._tell("READY=1")

    def reloading(self) -> None:
        """Say that the configuration is being taken up; :meth:`ready` ends it."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={now}")

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._tell("STOPPING=1")

    def alive(self) -> None:
        """Give a sign of life."""
        self._tell("WATCHDOG=1")

    def still_starting(self, seconds: float) -> None:
        """Ask for more time to become ready, from now on."""
        self._tell(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def status(self, text: str) -> None:
        """Say in words how things are; the same again is not repeated."""
        line = " ".join(text.split())[:STATUS_TEXT_CHARACTERS_MAX]
        if line != self._told:
            self._told = line
            self._tell(f"STATUS={line}")

    def close(self) -> None:
        """Let go of the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, text: str) -> None:
        if not self._address:
            return
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.setblocking(False)
            self._socket.sendto(text.encode(errors="replace"), self._address)
        except OSError as error:
            if not self._complained:
                self._complained = True
                _log.warn("the service manager cannot be told: {error}", error=error)
        else:
            self._complained = False


def _address(text: str) -> str:
    """Give the socket's address; ``@`` begins an abstract one."""
    if text.startswith("/"):
        return text
    return f"\0{text[1:]}" if text.startswith("@") else ""


def _watchdog_seconds(given: Mapping[str, str]) -> float:
    text = given.get("WATCHDOG_USEC", "")
    for_us = given.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(text) / 1e6 if text.isdecimal() and for_us else 0.0
