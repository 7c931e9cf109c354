"""The system's log: one message to its socket, in RFC 3164's form, as syslog(3) does."""

from __future__ import annotations

import errno
import os
import socket
import time

SOCKET = "/dev/log"
_DAEMON = 3 << 3
_NOTICE = 5


def send_syslog(text: str, path: str = SOCKET) -> None:
    """Log a text as a notice of facility daemon; never waits.

    :raises OSError: nobody takes it.
    """
    when = time.strftime("%b %e %H:%M:%S")
    line = f"<{_DAEMON | _NOTICE}>{when} qdsmirror[{os.getpid()}]: {' '.join(text.split())}"
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as log:
            try:
                log.connect(path)
            except OSError as error:
                # A log that is listened to as a stream refuses datagrams.
                if kind == socket.SOCK_DGRAM and error.errno == errno.EPROTOTYPE:
                    continue
                raise
            end = b"\0" if kind == socket.SOCK_STREAM else b""
            log.send(line.encode("utf-8", "replace") + end)
            return
