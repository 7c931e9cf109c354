"""A client that writes numbered blocks to several exports and survives its server's restarts.

``python -m tests.integration.writer SOCKET --slots N EXPORT...`` writes round-robin with a bounded
number of unanswered writes until its standard input ends, then waits for all answers, flushes, and
prints a JSON object.  When a connection ends it makes a new one and sends again what was
unanswered, as QEMU's ``reconnect-delay`` or libnbd with retry do.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import struct
import sys
import time
from collections.abc import Sequence

from qdsmirror.errors import ProtocolError, UnreachableError
from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.order import SLOT_BYTES, Layout, payload

_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_WRITE, _FLUSH = 1, 3
_FUA = 1
#: Nothing heard from the server for so long: it will not come back.
STUCK_SECONDS = 40.0
RETRY_SECONDS = 0.05
FUA_EVERY = 16
FLUSH_EVERY = 64


class Connection:
    """One export: what is unanswered, by cookie, and the connection of the moment."""

    def __init__(self, path: str, export: str) -> None:
        self.path = path
        self.export = export
        self.unanswered: dict[int, bytes] = {}
        self.reconnects = -1
        self._received = b""
        self.connect()

    def connect(self) -> None:
        deadline = time.monotonic() + STUCK_SECONDS
        while True:
            try:
                client = NbdClient.connect(self.path, self.export, STUCK_SECONDS)
                break
            except (UnreachableError, ProtocolError, OSError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)
        self.socket: socket.socket = client._socket
        self.reconnects += 1
        self._received = b""
        for request in list(self.unanswered.values()):
            self._send(request)

    def ask(
        self, kind: int, cookie: int, offset: int = 0, data: bytes = b"", flags: int = 0
    ) -> None:
        head = _REQUEST.pack(0x25609513, flags, kind, cookie, offset, len(data))
        self.unanswered[cookie] = head + data
        self._send(head + data)

    def _send(self, request: bytes) -> None:
        try:
            self.socket.sendall(request)
        except ConnectionError:
            pass  # the end of the connection is seen when it is read from

    def answers(self) -> list[int] | None:
        """Read; give the cookies answered, or ``None`` when the connection has ended."""
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            self.socket.close()
            return None
        self._received += data
        cookies = []
        while len(self._received) >= _REPLY.size:
            _, code, cookie = _REPLY.unpack_from(self._received)
            self._received = self._received[_REPLY.size :]
            if code:
                raise OSError(code, f"{self.export}: {os.strerror(code)}")
            if self.unanswered.pop(cookie, None) is not None:
                cookies.append(cookie)
        return cookies


class Writer:
    """The one writer: numbers, depth, and which slots wait for an answer."""

    def __init__(self, path: str, exports: Sequence[str], slots: int, depth: int) -> None:
        self.layout = Layout(len(exports), slots)
        self.depth = depth
        self.number = 0
        self.flushes = 0
        self.unanswered: set[int] = set()
        self.connections = [Connection(path, export) for export in exports]
        self.selector = selectors.DefaultSelector()
        for connection in self.connections:
            self.selector.register(connection.socket, selectors.EVENT_READ, connection)

    def issue(self) -> bool:
        """Send the next write, unless too many or its slot's last one are unanswered."""
        number = self.number + 1
        if len(self.unanswered) >= self.depth or number - self.layout.period in self.unanswered:
            return False
        device, slot = self.layout.place(number)
        data = payload(number, self.unanswered)
        self.number = number
        self.unanswered.add(number)
        flags = _FUA if number % FUA_EVERY == 0 else 0
        self.connections[device].ask(_WRITE, number, slot * SLOT_BYTES, data, flags)
        if number % FLUSH_EVERY == 0:
            self._flush(self.connections[(device + 1) % self.layout.devices])
        return True

    def _flush(self, connection: Connection) -> None:
        self.flushes += 1
        connection.ask(_FLUSH, 1 << 62 | self.flushes)

    def hear(self) -> None:
        """Take what the server says, or make new connections; wait for something of it."""
        events = self.selector.select(STUCK_SECONDS)
        if not events:
            raise TimeoutError(f"no answer for {STUCK_SECONDS:.0f} s")
        for key, _ in events:
            connection = key.data
            if connection is None:
                continue
            before = connection.socket
            answered = connection.answers()
            if answered is not None:
                self.unanswered.difference_update(answered)
                continue
            self.selector.unregister(before)
            connection.connect()
            self.selector.register(connection.socket, selectors.EVENT_READ, connection)

    def run(self, stop: int) -> None:
        self.selector.register(stop, selectors.EVENT_READ, None)
        while True:
            while self.issue():
                pass
            if any(key.data is None for key, _ in self.selector.select(0)):
                break
            self.hear()
        self.selector.unregister(stop)
        for connection in self.connections:
            self._flush(connection)
        while any(connection.unanswered for connection in self.connections):
            self.hear()

    def report(self) -> dict[str, int]:
        return {
            "writes": self.number,
            "flushes": self.flushes,
            "reconnects": sum(connection.reconnects for connection in self.connections),
        }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="writer", description="Write numbered blocks.")
    parser.add_argument("socket")
    parser.add_argument("exports", nargs="+")
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--depth", type=int, default=24)
    chosen = parser.parse_args(arguments)
    writer = Writer(chosen.socket, chosen.exports, chosen.slots, chosen.depth)
    try:
        writer.run(sys.stdin.fileno())
        error = ""
    except (OSError, ProtocolError, UnreachableError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    print(json.dumps({**writer.report(), "error": error}), flush=True)
    return 1 if error else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
