"""A child whose groups are fake: daemons.child with a factory of its own (see world.py)."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from zope.interface import implementer

from qdsmirror.daemons import child
from qdsmirror.daemons.hosting import GroupParts
from qdsmirror.errors import BrokenError, DeviceError
from qdsmirror.interfaces import IGroup
from qdsmirror.net.certificates import CredentialsError


class Greeter:
    """Greets whoever connects (a Twisted port would unlink the socket when it is closed)."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=os.dup(descriptor))

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return "greeter"

    def doRead(self) -> None:
        with self._socket.accept()[0] as client:
            client.sendall(b"hello from %d" % os.getpid())

    def connectionLost(self, reason: object) -> None:
        self._socket.close()


@implementer(IGroup)
class FakeGroup:
    def __init__(self, parts: GroupParts) -> None:
        self.number = parts.config.number
        self._config = parts.config
        self._paths = parts.paths
        self._reactor = parts.reactor
        self._nbd = parts.nbd
        self._memory = parts.memory
        self._greeter: Greeter | None = None
        self._kept: list[int] = []

    def _event(self, what: str) -> None:
        with open(self._paths.var / f"events{self.number}", "a") as file:
            file.write(f"{what} {os.getpid()}\n")

    def start(self) -> Deferred[None]:
        path = self._paths.var / f"behaviour{self.number}"
        behaviour = path.read_text() if path.exists() else "good"
        self._event(f"start-{behaviour}")
        if behaviour == "fatal":
            return fail(BrokenError("the log is broken", "look"))
        if behaviour == "unpaired":
            return fail(CredentialsError("not the key of the certificate", "wait"))
        if behaviour == "fail":
            return fail(DeviceError("the device is in use", "wait"))
        if behaviour == "bug":
            raise ZeroDivisionError("oops")
        if behaviour == "hang":
            return Deferred()
        if self._nbd is not None:
            self._greeter = Greeter(self._nbd)
            self._reactor.addReader(self._greeter)
        return succeed(None)

    def stop(self) -> Deferred[None]:
        self._event("stop")
        if self._greeter is not None:
            self._reactor.removeReader(self._greeter)
            self._greeter.connectionLost(None)
        return succeed(None)

    def status(self) -> dict[str, Any]:
        memory = None
        if self._memory is not None:
            found = os.fstat(self._memory)
            memory = [found.st_ino, found.st_size, os.pread(self._memory, 4, 0).hex()]
        window = self._config.tunables.send_window
        return {"group": self.number, "window": window, "memory": memory}

    def adopt(self, descriptor: int, ended: Callable[[], None]) -> None:
        path = self._paths.var / f"behaviour{self.number}"
        if path.exists() and path.read_text() == "dawdle":
            # The handshake does not end, as long as this process lives.
            self._kept.append(descriptor)
            return
        ended()
        with socket.socket(fileno=descriptor) as connection:
            hello = connection.recv(1 << 16)
            connection.sendall(b"adopted %d %d" % (self.number, hello[0]))


@implementer(IGroup)
class FakeStatistics:
    """Of groups that are fake there are none."""

    def __init__(self, parts: GroupParts) -> None:
        self.number = parts.config.number
        self._interval = parts.config.tunables.perf_interval
        self._journal = parts.paths.var / f"watched{self.number}"

    def start(self) -> Deferred[None]:
        with open(self._journal, "a") as file:
            file.write(f"{self._interval}\n")
        return succeed(None)

    def stop(self) -> Deferred[None]:
        return succeed(None)

    def status(self) -> dict[str, Any]:
        return {"group": self.number}


if __name__ == "__main__":
    factories = dict.fromkeys(("driver", "pmd", "rmd"), FakeGroup)
    sys.exit(child.main(factories={**factories, "stats": FakeStatistics}))
