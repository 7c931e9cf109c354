"""A very small NBD server on a Unix socket: every byte of its export is zero."""

from __future__ import annotations

import os
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path

from tests.tools.nbdkernel import WAIT_SECONDS, answer_zeroes, hang_up

#: HAS_FLAGS, SEND_FLUSH, SEND_FUA
FLAGS = 13
_IHAVEOPT = b"IHAVEOPT"


class NbdServer:
    """Serves one export of any name until it is stopped."""

    def __init__(self, path: Path, size: int = 1 << 20) -> None:
        self.path = path
        self.size = size
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        # A client's thread may start it again as soon as it sees that it is being stopped.
        self._lock = threading.Lock()
        self.start()

    def start(self) -> None:
        with self._lock:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(str(self.path))
            self._listener.listen()
            self._thread(self._accept, self._listener)

    def stop(self) -> None:
        """End, and end every connection; idempotent."""
        with self._lock:
            if self._listener is not None:
                self._listener.shutdown(socket.SHUT_RDWR)
                self._listener.close()
                self._listener = None
                os.unlink(self.path)
            self.hang_up()
            for thread in self._threads:
                thread.join(WAIT_SECONDS)
            self._threads.clear()

    def hang_up(self) -> None:
        """End every connection."""
        # A client that is fast may be back before the last one is ended: it is none of these.
        ended, self._connections = self._connections, []
        for connection in ended:
            hang_up(connection)
            connection.close()

    def _thread(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection = listener.accept()[0]
                self._connections.append(connection)
                self._thread(self._serve, connection.dup())

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, struct.error):
            connection.sendall(b"NBDMAGIC" + _IHAVEOPT + struct.pack(">H", 3))
            connection.recv(4, socket.MSG_WAITALL)
            head = connection.recv(16, socket.MSG_WAITALL)
            _, option, length = struct.unpack(">8sII", head)
            connection.recv(length, socket.MSG_WAITALL)
            told = struct.pack(">HQH", 0, self.size, FLAGS)
            for kind, data in ((3, told), (1, b"")):
                reply = struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data))
                connection.sendall(reply + data)
            answer_zeroes(connection)
