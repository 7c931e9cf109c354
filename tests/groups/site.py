"""Both sites of a group in one process: real reactor, TLS and files; a link that can be cut."""

from __future__ import annotations

import random
import shutil
import socket
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from qdsmirror import pki
from qdsmirror.config import GroupConfig, load_group, load_host
from qdsmirror.core import nbd
from qdsmirror.core.records import BoundUnit, Generation
from qdsmirror.groups import primary as primary_module
from qdsmirror.groups.driver import DriverGroup
from qdsmirror.groups.primary import PrimaryGroup
from qdsmirror.groups.remote import RemoteGroup
from qdsmirror.groups.unit import DriverUnit
from qdsmirror.net.control import ControlServer
from qdsmirror.paths import Paths
from qdsmirror.storage.device import open_device
from qdsmirror.storage.writelog import Writelog
from tests.groups.world import FakeConnection

reactor: Any = _reactor
Steps = Generator[Deferred[Any], Any, Any]
WAIT_SECONDS = 120.0
MIB = 1 << 20


class _Pipe(Protocol):
    """One connection through the link: bytes from the pmd, in order, as far as they may go."""

    def __init__(self, cable: Cable) -> None:
        self.cable = cable
        self.far: socket.socket | None = None
        self.peer: _FarEnd | None = None

    def connectionMade(self) -> None:
        if self.cable.pulled:
            self.cut()
            return
        self.cable.pipes.add(self)
        ours, theirs = _tcp_pair()
        factory = Factory.forProtocol(lambda: _FarEnd(self))
        factory.noisy = False
        reactor.adoptStreamConnection(ours.fileno(), socket.AF_INET, factory)
        ours.close()
        self.cable.adopt(theirs.detach())

    def dataReceived(self, data: bytes) -> None:
        if self.peer is not None:
            self.cable.pass_on(self, self.peer.transport, data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.cable.pipes.discard(self)
        if self.peer is not None:
            self.peer.transport.abortConnection()

    def cut(self) -> None:
        assert self.transport is not None
        self.transport.abortConnection()


class _FarEnd(Protocol):
    """The rmd's side of a pipe."""

    transport: Any

    def __init__(self, pipe: _Pipe) -> None:
        self.pipe = pipe
        pipe.peer = self

    def dataReceived(self, data: bytes) -> None:
        self.pipe.cable.pass_on(self.pipe, self.pipe.transport, data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.pipe.cut()


class Cable:
    """The network between the sites.

    :ivar passed: bytes that went through, both ways.
    :ivar budget: a connection is cut, in mid-byte-stream, when this many more have passed.
    :ivar made: connections so far.
    :ivar pulled: connections end at once.
    """

    def __init__(self, adopt: Callable[[int], None]) -> None:
        self.adopt = adopt
        self.pipes: set[_Pipe] = set()
        self.passed = 0
        self.made = 0
        self.budget: int | None = None
        self.pulled = False
        factory = Factory.forProtocol(self._pipe)
        factory.noisy = False
        self.port = reactor.listenTCP(0, factory, interface="127.0.0.1")

    def _pipe(self) -> _Pipe:
        self.made += 1
        return _Pipe(self)

    def pass_on(self, pipe: _Pipe, to: Any, data: bytes) -> None:
        if self.budget is not None:
            data = data[: self.budget]
            self.budget -= len(data)
        self.passed += len(data)
        to.write(data)
        if self.budget == 0:
            # What was passed on arrives; nothing after it does.
            self.budget = None
            to.loseConnection()
            pipe.cut()

    def cut(self) -> None:
        for pipe in list(self.pipes):
            pipe.cut()

    def pull(self) -> None:
        """Cut it, and let no new connection be made."""
        self.pulled = True
        self.cut()

    def close(self) -> Deferred[None]:
        self.cut()
        return self.port.stopListening()  # type: ignore[no-any-return]


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    one.setblocking(False)
    other.setblocking(False)
    return one, other


class Sites:
    """A group's two sites.

    :ivar driver, pmd, rmd: the groups that run; ``None`` while they do not.
    """

    def __init__(
        self,
        test: TestCase,
        *,
        ldsus: int = 2,
        size: int = MIB,
        writelog: int = 4 * MIB,
        journal: int = 4 * MIB,
        tunables: str = "",
        mirror_size: int | None = None,
        paths: int = 1,
        before_bytes: int = 0,
    ) -> None:
        self.test = test
        place = "/dev/shm" if Path("/dev/shm").is_dir() else "/tmp"
        self.base = Path(tempfile.mkdtemp(prefix="qdsg", dir=place))
        test.addCleanup(shutil.rmtree, self.base, True)
        self.ldsus = ldsus
        self.size = size
        self.driver: DriverGroup | None = None
        self.pmd: PrimaryGroup | None = None
        self.rmd: RemoteGroup | None = None
        self.client = FakeConnection()
        self._control: ControlServer | None = None
        self.cables = [Cable(self._adopt) for _ in range(paths)]
        self.cable = self.cables[0]
        pki.make_hosts(self.base / "pki", ("alpha", "beta"), [0])
        self.paths = {name: self._site(name) for name in ("alpha", "beta")}
        self._write_group(tunables)
        self.config: GroupConfig = load_group(self.paths["alpha"], 0)
        self._sparse(writelog, journal, mirror_size or size)
        self.initialise_writelogs()
        self.initialise_journal(before_bytes)
        self._nbd = socket.socket(socket.AF_UNIX)
        self._nbd.bind(str(self.base / "nbd"))
        self._nbd.listen()
        test.addCleanup(self.end)

    def _site(self, name: str) -> Paths:
        paths = Paths.of(self.base / name)
        for directory in (paths.etc, paths.var, paths.run, paths.dev):
            directory.mkdir(parents=True)
        for made in (self.base / "pki" / name).iterdir():
            shutil.copy2(made, paths.etc / made.name)
        paths.host_config.write_text(f"name = {name}\n")
        return paths

    def _write_group(self, tunables: str) -> None:
        lines = ["operation = async", "on_overflow = block", "[primary]", "host = alpha"]
        lines += ["address = 127.0.0.1", "[secondary]", "host = beta", "address = 127.0.0.1"]
        lines += [
            f"port = {self.cable.port.getHost().port}",
            f"journal_device = {self.base}/journal",
        ]
        if len(self.cables) > 1:
            ways = [f"127.0.0.1>127.0.0.1:{one.port.getHost().port}" for one in self.cables]
            lines += [f"paths = {', '.join(ways)}"]
        lines += ["[tunables]", "reconnect_max = 0.2", tunables, "[ldsus]"]
        for index in range(self.ldsus):
            lines += [f"  [[qds{index}]]"]
            lines += [
                f"  {kind}_device = {self.base}/{short}{index}"
                for kind, short in (("data", "data"), ("writelog", "log"), ("mirror", "mirror"))
            ]
        for paths in self.paths.values():
            paths.group_config(0).write_text("\n".join(lines) + "\n")

    def _sparse(self, writelog: int, journal: int, mirror_size: int) -> None:
        sizes = {"journal": journal}
        for index in range(self.ldsus):
            sizes |= {f"data{index}": self.size, f"log{index}": writelog}
            sizes[f"mirror{index}"] = mirror_size
        for name, size in sizes.items():
            with open(self.base / name, "wb") as file:
                file.truncate(size)

    def _units(self, kind: str) -> list[BoundUnit]:
        return [
            BoundUnit(ldsu.index, ldsu.name, (self.base / f"{kind}{ldsu.index}").stat().st_size, "")
            for ldsu in self.config.ldsus
        ]

    def initialise_writelogs(self) -> None:
        generation = Generation(random.randbytes(16), 1)
        for unit in self._units("data"):
            device = open_device(self.base / f"log{unit.index}", writable=True)
            Writelog.initialise(
                device, role="writelog", group=0, units=[unit], generations=[generation]
            )
            device.close()

    def initialise_journal(self, before_bytes: int = 0) -> None:
        device = open_device(self.base / "journal", writable=True)
        units = self._units("mirror")
        Writelog.initialise(device, role="journal", group=0, units=units, before_bytes=before_bytes)
        device.close()

    # -- life ---------------------------------------------------------------------------------

    @inlineCallbacks
    def start_driver(self) -> Steps:
        paths = self.paths["alpha"]
        self.driver = DriverGroup(self.config, load_host(paths), paths, reactor, self._nbd.fileno())
        yield self.driver.start()
        self._control = ControlServer(reactor, paths.control_socket("dsgrp000.driver"), self.driver)
        self._control.start()

    @inlineCallbacks
    def stop_driver(self) -> Steps:
        driver, self.driver = self.driver, None
        control, self._control = self._control, None
        if control is not None:
            yield control.stop()
        if driver is not None:
            yield driver.stop()

    @inlineCallbacks
    def start_pmd(self) -> Steps:
        paths = self.paths["alpha"]
        self.pmd = PrimaryGroup(self.config, load_host(paths), paths, reactor)
        yield self.pmd.start()

    @inlineCallbacks
    def stop_pmd(self) -> Steps:
        pmd, self.pmd = self.pmd, None
        if pmd is not None:
            yield pmd.stop()

    @inlineCallbacks
    def start_rmd(self) -> Steps:
        paths = self.paths["beta"]
        rmd = RemoteGroup(self.config, load_host(paths), paths, reactor)
        yield rmd.start()
        self.rmd = rmd

    @inlineCallbacks
    def stop_rmd(self) -> Steps:
        rmd, self.rmd = self.rmd, None
        if rmd is not None:
            yield rmd.stop()

    @inlineCallbacks
    def start(self) -> Steps:
        yield self.start_rmd()
        yield self.start_driver()
        yield self.start_pmd()

    @inlineCallbacks
    def end(self) -> Steps:
        yield self.stop_pmd()
        yield self.stop_driver()
        yield self.stop_rmd()
        for cable in self.cables:
            yield cable.close()
        self._nbd.close()
        # Aborted connections tell their protocols in the next turns.
        yield deferLater(reactor, 0.05)

    def _adopt(self, fd: int) -> None:
        if self.rmd is None:
            socket.socket(fileno=fd).close()
        else:
            self.rmd.adopt(fd)

    # -- work and waiting ---------------------------------------------------------------------

    def unit(self, index: int) -> DriverUnit:
        assert self.driver is not None
        return self.driver.units[index]

    def write(self, index: int, offset: int, data: bytes) -> Any:
        return self.client.ask(self.unit(index), nbd.CMD_WRITE, offset, len(data), data)

    @inlineCallbacks
    def until(self, happened: Callable[[], Any], what: str) -> Steps:
        """Wait until something is true; it is looked at after each turn of the reactor."""
        deadline = reactor.seconds() + WAIT_SECONDS
        # One turn at least: a test that asks in a loop would otherwise never let anything happen.
        yield deferLater(reactor, 0)
        while not happened():
            if reactor.seconds() > deadline:
                states = [g.status() for g in (self.driver, self.pmd, self.rmd) if g is not None]
                raise AssertionError(f"waited in vain for {what}: {states}")
            yield deferLater(reactor, 0.002)

    def connected(self) -> Any:
        return self.until(lambda: "connected" in self.modes(), "the link")

    def modes(self) -> list[str]:
        assert self.driver is not None
        return list(self.driver.status()["modes"])

    def drained(self) -> Any:
        return self.until(self.is_drained, "all to be mirrored")

    def is_drained(self) -> bool:
        assert self.driver is not None
        gsn = self.driver.status()["gsn"]
        return bool(gsn["written"] == gsn["applied"] == gsn["mirrored"])

    @inlineCallbacks
    def refresh(self) -> Steps:
        """Make a first mirror."""
        assert self.driver is not None
        driver = self.driver
        yield driver.refresh("full")
        yield self.until(lambda: driver.coherent, "the refresh to end")
        yield self.drained()

    def data(self, index: int) -> bytes:
        return (self.base / f"data{index}").read_bytes()

    def mirror(self, index: int) -> bytes:
        return (self.base / f"mirror{index}").read_bytes()

    def assert_equal(self) -> None:
        for index in range(self.ldsus):
            self.test.assertTrue(self.data(index) == self.mirror(index), f"LDSU {index} differs")


__all__ = ["Cable", "Sites", "primary_module", "reactor"]
