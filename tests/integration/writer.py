"""A client that writes numbered blocks to several exports and survives its server's restarts.

``python -m tests.integration.writer SOCKET --slots N EXPORT...`` writes round-robin with a bounded
number of unanswered writes until its standard input ends, then waits for all answers, flushes, and
prints a JSON object.  When a connection ends it makes a new one and sends again what was
unanswered, as QEMU's ``reconnect-delay`` or libnbd with retry do.

With ``--promises FILE`` it notes there, line by line, the numbers of writes that a power cut must
not take any more (invariant DURABLE): those answered with FUA, and those of an export answered
before a flush of it that is answered itself; with ``--always`` all that are answered.
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
from collections.abc import Collection, Sequence

from qdsmirror.errors import ProtocolError, UnreachableError
from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.order import SLOT_BYTES, Layout, payload

_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_WRITE, _FLUSH = 1, 3
_FUA = 1
_FLUSH_COOKIES = 1 << 62
#: Nothing heard from the server for so long: it will not come back.
STUCK_SECONDS = 100.0
RETRY_SECONDS = 0.05
FUA_EVERY = 16
FLUSH_EVERY = 64
#: At a rate, what was not written in time is made up for as far as this: an outage's is not.
BURST_SECONDS = 0.1


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
    """The one writer: numbers, depth, and which slots wait for an answer.

    :param first: the first number to write.
    :param promises: the descriptor of a file, see above; -1 for none.
    :param always: whether an answer is a promise.
    :param rate: writes a second at most; 0 for as many as are answered.
    """

    def __init__(
        self,
        path: str,
        exports: Sequence[str],
        slots: int,
        depth: int,
        first: int = 1,
        promises: int = -1,
        always: bool = False,
        rate: float = 0.0,
    ) -> None:
        self.layout = Layout(len(exports), slots)
        self.depth = depth
        self.number = first - 1
        self.rate = rate
        self.next = time.monotonic()
        self.promises = promises
        self.always = always
        self.flushes = 0
        #: Answered since the last flush, by device; and what a flush under way will promise.
        self.loose: list[set[int]] = [set() for _ in exports]
        self.flushing: dict[int, set[int]] = {}
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
        if self.rate:
            self.next += 1 / self.rate
        self.unanswered.add(number)
        flags = _FUA if number % FUA_EVERY == 0 else 0
        self.connections[device].ask(_WRITE, number, slot * SLOT_BYTES, data, flags)
        if number % FLUSH_EVERY == 0:
            self._flush((device + 1) % self.layout.devices)
        return True

    def _flush(self, device: int) -> None:
        self.flushes += 1
        cookie = _FLUSH_COOKIES | self.flushes
        self.flushing[cookie], self.loose[device] = self.loose[device], set()
        self.connections[device].ask(_FLUSH, cookie)

    def _answered(self, cookies: Sequence[int]) -> None:
        """Take answers, and note what they promise."""
        promised: set[int] = set()
        for cookie in cookies:
            if cookie & _FLUSH_COOKIES:
                promised |= self.flushing.pop(cookie)
            elif self.always or cookie % FUA_EVERY == 0:
                promised.add(cookie)
            else:
                self.loose[self.layout.place(cookie)[0]].add(cookie)
        self.unanswered.difference_update(cookies)
        self._promise(promised)

    def _promise(self, numbers: Collection[int]) -> None:
        if numbers and self.promises >= 0:
            os.write(self.promises, (" ".join(map(str, sorted(numbers))) + "\n").encode())

    def _due(self) -> float:
        """Give how long it is until the next write may be issued at this rate."""
        if not self.rate:
            return 0.0
        now = time.monotonic()
        self.next = max(self.next, now - BURST_SECONDS)
        return max(0.0, self.next - now)

    def hear(self, wait: float = 0.0) -> None:
        """Take what the server says, or make new connections.

        :param wait: how long to wait for something of it at most; 0 is until it must be stuck.
        """
        events = self.selector.select(wait or STUCK_SECONDS)
        if not events:
            if wait:
                return
            raise TimeoutError(f"no answer for {STUCK_SECONDS:.0f} s")
        for key, _ in events:
            connection = key.data
            if connection is None:
                continue
            before = connection.socket
            answered = connection.answers()
            if answered is not None:
                self._answered(answered)
                continue
            self.selector.unregister(before)
            connection.connect()
            self.selector.register(connection.socket, selectors.EVENT_READ, connection)

    def run(self, stop: int) -> None:
        self.selector.register(stop, selectors.EVENT_READ, None)
        while True:
            while not (due := self._due()) and self.issue():
                pass
            if any(key.data is None for key, _ in self.selector.select(0)):
                break
            self.hear(due)
        self.selector.unregister(stop)
        for device in range(self.layout.devices):
            self._flush(device)
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
    parser.add_argument("--first", type=int, default=1, help="the first number")
    parser.add_argument("--promises", help="where to note what must survive a power cut")
    parser.add_argument("--always", action="store_true", help="every answer is a promise")
    parser.add_argument("--rate", type=float, default=0.0, help="writes a second, at most")
    chosen = parser.parse_args(arguments)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    promises = os.open(chosen.promises, flags, 0o600) if chosen.promises else -1
    writer = Writer(
        chosen.socket,
        chosen.exports,
        chosen.slots,
        chosen.depth,
        chosen.first,
        promises,
        chosen.always,
        chosen.rate,
    )
    try:
        writer.run(sys.stdin.fileno())
        error = ""
    except (OSError, ProtocolError, UnreachableError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    print(json.dumps({**writer.report(), "error": error}), flush=True)
    return 1 if error else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
