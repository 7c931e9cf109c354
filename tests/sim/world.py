"""A group's two sites in one process, on a fake clock: one seed decides all that happens.

``World(seed).run()`` is one run: faults and work, then an end to the faults, after which everything
must come to rest.  Invariants are checked on the way, and after each recovery.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.logger import LogLevel, globalLogPublisher
from twisted.python.failure import Failure
from zope.interface import implementer

from qdsmirror.config import GroupConfig, HostConfig, LdsuConfig, Tunables
from qdsmirror.core import frames, nbd, stream
from qdsmirror.core.nbd import Request
from qdsmirror.core.records import RECORD_HEADER_BYTES, BoundUnit, Generation
from qdsmirror.errors import BrokenError, QdsError, UnreachableError
from qdsmirror.groups import driver as driver_module
from qdsmirror.groups import outbound as outbound_module
from qdsmirror.groups import remote as remote_module
from qdsmirror.groups.driver import DriverGroup
from qdsmirror.groups.primary import PrimaryGroup
from qdsmirror.groups.remote import RemoteGroup
from qdsmirror.groups.runtime import Runtime
from qdsmirror.groups.unit import DriverUnit
from qdsmirror.interfaces import INbdConnection
from qdsmirror.limits import KIB, MIB, WRITELOG_BYTES_MIN
from qdsmirror.net.handshake import RebasePosition
from qdsmirror.net.link import Link
from qdsmirror.paths import Paths
from qdsmirror.storage.writelog import Writelog
from tests.fakes import Choice, Unsynced, at_random, everything, nothing
from tests.sim.disk import Disk
from tests.sim.model import SECTOR, Model, Violation, payload
from tests.sim.process import Fuse, Process, Wire

#: After the faults have ended everything must be mirrored within so many simulated seconds.
LIVENESS_SECONDS = 600.0
STEPS_MAX = 200_000
#: How many runs go on with logs that were initialised anew.
ANEW_CHANCE = 0.1
#: More than this does not arrive at once.
CHUNK_BYTES_MAX = 16 * KIB
_EPOCH = 1_790_000_000.0


@dataclass(frozen=True)
class Profile:
    """What a run is made of; drawn from the seed.

    :ivar steps: of the safety phase.
    :ivar faults: of each kind, one in so many steps on the average; 0: never.
    """

    steps: int
    ldsus: int
    size: int
    log: int
    journal: int
    block: int
    durability: str
    metadata_entries: int
    metadata_seconds: float
    window: int
    limit: int
    buffer: int
    clients: int
    eager: float
    faults: dict[str, int]

    @classmethod
    def draw(cls, random: Random) -> Profile:
        choose = random.choice
        small = WRITELOG_BYTES_MIN // SECTOR * SECTOR
        log = choose((small, small, 300 * KIB))
        kinds = ("kill driver", "kill pmd", "kill rmd", "cut alpha", "cut beta", "cut link")
        faults = {kind: choose((0, 100, 300, 800)) for kind in kinds}
        faults["fuse"] = choose((0, 60, 200))
        faults["hang link"] = choose((0, 0, 400))
        faults["slow link"] = choose((0, 30, 100))
        faults["stop driver"] = choose((0, 0, 400))
        faults["error"] = choose((0, 0, 0, 500))
        faults["refresh"] = choose((0, 0, 300))
        return cls(
            steps=choose((200, 400, 800)),
            ldsus=choose((1, 2, 2, 3)),
            size=choose((16, 64)) * KIB,
            log=log,
            journal=choose((log, 400 * KIB)),
            block=choose((512, 512, 4096)),
            durability=choose(("flush", "flush", "always")),
            metadata_entries=choose((1, 5, 50, 4096)),
            metadata_seconds=choose((0.1, 1.0, 20.0)),
            window=choose((8, 64, 1024)) * KIB,
            limit=choose((16, 64, 1024)) * KIB,
            buffer=choose((8, 32, 1024)) * KIB,
            clients=choose((1, 1, 2)),
            eager=random.random(),
            faults=faults,
        )


@implementer(INbdConnection)
class Client:
    """A client's connection to the driver."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.gone = False
        self.open: dict[int, Asked] = {}

    def __hash__(self) -> int:
        return self.number

    def answer(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.world.answered(self._asked(request))

    def answer_read(self, request: Request, pieces: Sequence[bytes | memoryview]) -> None:
        self.world.was_read(self._asked(request), b"".join(pieces))

    def answer_error(self, request: Request, errno_code: int, message: str) -> None:
        self.world.was_refused(self._asked(request), message)

    def answer_status(self, request: Request, extents: Sequence[tuple[int, int]]) -> None:
        self._asked(request)

    def abandon(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._asked(request)
        self.gone = True

    def hung_up(self) -> bool:
        return self.gone

    def _asked(self, request: Request) -> Asked:
        asked = self.open.pop(id(request), None)
        if asked is None:
            raise Violation("DURABLE: a request is answered twice")
        return asked


class Asked:
    """A request that a client waits for.

    :ivar expected: of a read, the newest answered write of each sector.
    :ivar answer: when a write was answered, or a flush asked for; in the order of numbers.
    """

    def __init__(self, number: int, ldsu: int, request: Request) -> None:
        self.number = number
        self.ldsu = ldsu
        self.request = request
        self.expected: dict[int, int] = {}
        self.answer = 0

    def __str__(self) -> str:
        asked = self.request
        return f"command {asked.command} of {asked.length} bytes at {asked.offset}"


class World:
    """The two sites and what happens to them.

    :ivar trace: a running hash of everything that happened.
    """

    def __init__(self, seed: int, base: Path, profile: Profile | None = None) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.profile = profile or Profile.draw(self.random)
        self.base = base
        self.clock = Clock()
        self.trace = hashlib.blake2b(digest_size=16)
        self.log: list[str] = []
        self.keep_log = False
        self.random_bytes = Random(self.random.getrandbits(64))
        self.steps = 0
        self.driver: Process | None = None
        self.pmd: Process | None = None
        self.rmd: Process | None = None
        self.serving = False
        self.receiving = False
        self.wires: list[Wire] = []
        self.link_up = True
        self.quiet = False
        self.counts: dict[str, int] = {}
        self.due: dict[str, float] = {}
        self.latched: set[str] = set()
        self.refreshing = False
        self.numbers = 0
        self.clients: list[Client] = []
        self.answered_writes: list[list[Asked]] = []
        self.logged: list[Any] = []
        self._make_sites()

    # -- the sites ----------------------------------------------------------------------------

    def _make_sites(self) -> None:
        profile = self.profile
        self.config = GroupConfig(
            number=0,
            name="dsgrp000",
            path=Path("/nowhere/dsgrp000.cfg"),
            operation="async",
            durability=profile.durability,
            on_overflow="block",
            primary_host="alpha",
            primary_address="127.0.0.1",
            secondary_host="beta",
            secondary_address="127.0.0.1",
            port=575,
            journal_device="/far/journal",
            tunables=Tunables(
                metadata_entries=profile.metadata_entries,
                metadata_seconds=profile.metadata_seconds,
                send_window=profile.window,
            ),
            ldsus=tuple(
                LdsuConfig(i, f"qds{i}", f"/near/data{i}", f"/near/log{i}", f"/far/mirror{i}")
                for i in range(profile.ldsus)
            ),
        )
        self.disks: dict[str, Disk] = {}
        self.host = {
            name: HostConfig(name, Path("c"), Path("k"), Path("a")) for name in ("alpha", "beta")
        }
        self.paths = {name: Paths.of(self.base / name) for name in ("alpha", "beta")}
        for paths in self.paths.values():
            paths.state_file(0).unlink(missing_ok=True)

    def _make_disks(self) -> None:
        """Make the state after a first full mirror."""
        profile = self.profile
        generation = secrets.token_bytes(16)
        units = []
        contents = []
        for ldsu in self.config.ldsus:
            content = payload(self._number(), profile.size) if self.random.random() < 0.5 else b""
            content = content.ljust(profile.size, b"\0")
            contents.append(content)
            for path in (ldsu.data_device, ldsu.mirror_device):
                self.disks[path] = Disk(path, profile.size, content)
            unit = BoundUnit(ldsu.index, ldsu.name, profile.size, ldsu.data_device)
            units.append(unit)
            self._make_log(ldsu.writelog_device, profile.log, "writelog", [unit], [generation])
        self._make_log(self.config.journal_device, profile.journal, "journal", units, [])
        self.model = Model(
            generation,
            contents,
            [self.disks[ldsu.writelog_device] for ldsu in self.config.ldsus],
            [self.disks[ldsu.data_device] for ldsu in self.config.ldsus],
            [self.disks[ldsu.mirror_device] for ldsu in self.config.ldsus],
            self.disks[self.config.journal_device],
        )
        self.answered_writes = [[] for _ in self.config.ldsus]
        self.model.goes_direct = self._goes_direct

    def _goes_direct(self) -> bool:
        """Tell whether a writelog's failure is on record, so that writes may go past it."""
        if not any(path.startswith("/near/log") for path in self.latched):
            return False
        state = self.paths["alpha"].state_file(0)
        return state.exists() and "/near/log" in state.read_text()

    def _make_log(
        self, path: str, size: int, role: str, units: list[BoundUnit], ids: list[bytes]
    ) -> None:
        disk = self.disks[path] = Disk(path, size)
        device = Process("qdswlinit", self.clock, self.random).open(disk, role, 512)
        log = Writelog.initialise(
            device,
            role=role,
            group=0,
            units=units,
            generations=[Generation(one, 1) for one in ids],
        )
        log.update(both=True, coherent=True, reason="")
        device.close()

    def _number(self) -> int:
        self.numbers += 1
        return self.numbers

    def note(self, text: str) -> None:
        """Add to the trace."""
        self.trace.update(text.encode() + b"\n")
        if self.keep_log:
            self.log.append(f"{self.clock.seconds():9.4f} {text}")

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    # -- processes ----------------------------------------------------------------------------

    def _process(
        self,
        name: str,
        kind: type[Process] = Process,
        disks: Mapping[str, Disk] | None = None,
    ) -> tuple[Process, Runtime]:
        process = kind(name, self.clock, self.random)
        block = self.profile.block
        found = self.disks if disks is None else disks

        def open_device(path: str, *, role: str, **_: Any) -> Any:
            logical = block if path.startswith(("/near/data", "/far/mirror")) else 512
            return process.open(found[path], role, logical)

        runtime = Runtime(
            reactor=process,
            open_device=open_device,
            quick_worker=process.worker,
            slow_worker=process.worker,
            read_worker=process.read_worker,
            wall=lambda: _EPOCH + process.seconds(),
            listen=lambda *_: _Listener(),
            attach=lambda _reactor, _path: self._attach(process),
            endpoint=lambda *_: _Way(self, process),
            server_tls=lambda *_: None,
        )
        return process, runtime

    def start(self, name: str) -> None:
        """Start a daemon, as its master would."""
        self.count(f"start {name}")
        process, runtime = self._process(name)
        setattr(self, name, process)
        site = "beta" if name == "rmd" else "alpha"
        common = (self.config, self.host[site], self.paths[site], process)
        if name == "driver":
            self.serving = False
            process.group = DriverGroup(*common, -1, runtime=runtime)
        elif name == "pmd":
            process.group = PrimaryGroup(*common, runtime=runtime)
        else:
            self.receiving = False
            process.group = RemoteGroup(*common, runtime=runtime)
        started: Deferred[Any] = maybeDeferred(process.group.start)
        started.addCallback(lambda _: self._started(process))
        started.addErrback(lambda failure: self._start_failed(process, failure))

    def _started(self, process: Process) -> None:
        if process is self.driver:
            group = process.group
            self.model.recovered(
                group.generation,
                [unit.framed_point for unit in group.units],
                group.next_gsn,
                direct=group.bypass.phase != "off" or bool(self.latched),
            )
            self.answered_writes = [[] for _ in self.config.ldsus]
            self.serving = True
            self.clients = [Client(self, n) for n in range(self.profile.clients)]
        elif process is self.rmd:
            self.receiving = True
            self.check_mirror()
        self.note(f"started {process.name}")

    def _start_failed(self, process: Process, failure: Failure) -> None:
        if not isinstance(failure.value, Violation) and not self._excused(process, failure.value):
            Violation(f"RECOVER: {process.name} does not start: {failure.value!r}")
        self.note(f"{process.name} does not start")
        process.kill()
        setattr(self, process.name, None)
        self._restart_later(process.name)

    def _excused(self, process: Process, error: BaseException) -> bool:
        """Tell whether a device's failure explains why a daemon does not start (LOUD)."""
        if isinstance(error, BrokenError) and any(path in str(error) for path in self.latched):
            self.count("refused over a latched device")
            return True
        return bool(self.latched) and isinstance(error, OSError | QdsError)

    def check_mirror(self) -> None:
        assert self.rmd is not None
        mirror = self.rmd.group.mirror
        self.model.check_mirror(
            mirror.applied,
            mirror.journal.superblock,
            [self.disks[ldsu.mirror_device].seen for ldsu in self.config.ldsus],
        )

    def kill(self, name: str) -> None:
        """kill -9."""
        process: Process | None = getattr(self, name)
        if process is None:
            return
        self.count(f"kill {name}")
        self.note(f"kill {name}")
        process.kill()
        setattr(self, name, None)
        self._after_end(name)

    def _after_end(self, name: str) -> None:
        if name == "driver":
            self.serving = False
            self.refreshing = False
            for client in self.clients:
                client.open.clear()
            self.clients = []
        elif name == "rmd":
            self.receiving = False
        self._restart_later(name)

    def _restart_later(self, name: str) -> None:
        self.due[name] = self.clock.seconds() + self.random.choice((0.0, 0.1, 1.0, 5.0))

    def power_cut(self, site: str) -> None:
        """Cut a site's power: its processes end, and so does what its disks had not written."""
        self.count(f"power cut {site}")
        self.note(f"power cut {site}")
        for name in ("rmd",) if site == "beta" else ("driver", "pmd"):
            process: Process | None = getattr(self, name)
            setattr(self, name, None)
            if process is not None:
                process.kill(silently=True)
            self._after_end(name)
        near = "/far/" if site == "beta" else "/near/"
        choose = self._choice()
        for path, disk in self.disks.items():
            if path.startswith(near):
                disk.power_cut(choose)

    def _choice(self) -> Choice:
        match self.random.randrange(6):
            case 0:
                return nothing
            case 1:
                return everything
            case 2:
                return AllButTheFirst()
            case _:
                return at_random(self.random)

    # -- ways between processes ---------------------------------------------------------------

    def _attach(self, pmd: Process) -> Deferred[Any]:
        answered: Deferred[Any] = Deferred()

        def ask() -> None:
            driver = self.driver
            if driver is None or not self.serving:
                answered.errback(UnreachableError("no driver answers"))
                return
            try:
                info, descriptors, end = driver.group.attach_pmd()
            except QdsError as error:
                answered.errback(error)
                return
            pmd.adoptable[end] = driver.ends[-1].wire
            logs = [self.disks[ldsu.writelog_device] for ldsu in self.config.ldsus]
            pmd.descriptors += zip(descriptors, logs, strict=True)
            answered.callback((json.loads(json.dumps(info)), descriptors, end))

        pmd.callLater(self.random.random() * 0.01, ask)
        return answered

    def connect(self, pmd: Process, factory: Any) -> Deferred[Any]:
        made: Deferred[Any] = Deferred()

        def reach() -> None:
            rmd = self.rmd
            server = rmd.group.handshake() if rmd is not None and self.link_up else None
            if rmd is None or server is None:
                made.errback(ConnectionRefusedError())
                return
            wire = Wire(self.random, local=False)
            self.wires = [one for one in self.wires if not one.over]
            self.wires.append(wire)
            client = factory.buildProtocol(None)
            wire.join(rmd, server)
            wire.join(pmd, client)
            made.callback(client)

        pmd.callLater(self.random.random() * 0.05, reach)
        return made

    # -- clients ------------------------------------------------------------------------------

    def ask(self) -> None:
        """Let a client ask for one thing or several."""
        random = self.random
        ldsu = random.randrange(self.profile.ldsus)
        client = random.choice(self.clients)
        if len(client.open) > 64:
            return
        assert self.driver is not None
        unit: DriverUnit = self.driver.group.units[ldsu]
        asked = [self._request(client, ldsu) for _ in range(random.choice((1, 1, 1, 2, 5)))]
        self.note(f"ask {ldsu} {[(a.request.command, a.request.offset) for a in asked]}")
        unit.submit([one.request for one in asked])

    def _request(self, client: Client, ldsu: int) -> Asked:
        random = self.random
        block = self.profile.block
        blocks = self.profile.size // block
        command = random.choices(
            (nbd.CMD_WRITE, nbd.CMD_READ, nbd.CMD_FLUSH, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES),
            (60, 8, 16, 4, 4),
        )[0]
        if command == nbd.CMD_FLUSH:
            return self.submit(client, ldsu, command, 0, 0)
        length = random.choice((1, 1, 2, 8, min(blocks, 64 * KIB // block)))
        length = min(length, blocks)
        offset = random.randrange(blocks - length + 1)
        return self.submit(client, ldsu, command, offset * block, length * block)

    def submit(self, client: Client, ldsu: int, command: int, offset: int, length: int) -> Asked:
        """Make a request and know it; the caller hands it to the LDSU."""
        number = self._number()
        flags = 0
        data: bytes | None = None
        sectors = self.model.sectors[ldsu]
        if command in (nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES):
            if self.random.random() < 0.15:
                flags |= nbd.CMD_FLAG_FUA
            if command == nbd.CMD_WRITE:
                data = payload(number, length)
            elif command == nbd.CMD_WRITE_ZEROES and self.random.random() < 0.5:
                flags |= nbd.CMD_FLAG_NO_HOLE
            sectors.write(number, offset, length, data)
        request = Request(client, bytes(8), command, flags, offset, length, data)
        asked = Asked(number, ldsu, request)
        if command == nbd.CMD_READ:
            asked.expected = sectors.expect(offset, length)
        elif command == nbd.CMD_FLUSH:
            asked.answer = number
        client.open[id(request)] = asked
        return asked

    def answered(self, asked: Asked) -> None:
        """Take a success; from now on it is a promise."""
        self.count("answers")
        request, ldsu = asked.request, asked.ldsu
        sectors = self.model.sectors[ldsu]
        if request.command == nbd.CMD_FLUSH:
            safe = [one for one in self.answered_writes[ldsu] if one.answer < asked.answer]
            self.answered_writes[ldsu] = [
                one for one in self.answered_writes[ldsu] if one.answer > asked.answer
            ]
        else:
            sectors.answered(asked.number, request.offset, request.length)
            if request.flags & nbd.CMD_FLAG_FUA or self.profile.durability == "always":
                safe = [asked]
            else:
                safe = []
                asked.answer = self._number()
                self.answered_writes[ldsu].append(asked)
        for one in safe:
            done = one.request
            if not self.model.is_safe(ldsu, one.number, done.offset, done.length):
                why = "LOUD" if self.latched else "DURABLE"
                raise Violation(f"{why}: LDSU {ldsu} promises what is on no platters: {one}")
            sectors.made_safe(one.number, done.offset, done.length)

    def was_read(self, asked: Asked, data: bytes) -> None:
        self.count("reads")
        self.model.sectors[asked.ldsu].check_read(
            asked.expected, asked.request.offset, data, f"read of LDSU {asked.ldsu}"
        )

    def was_refused(self, asked: Asked, message: str) -> None:
        self.count("refused requests")
        if not any(path in message for path in self.latched):
            raise Violation(f"LOUD: a request is refused without a failed device: {message}")

    # -- what happens -------------------------------------------------------------------------

    def processes(self) -> list[Process]:
        return [one for one in (self.driver, self.pmd, self.rmd) if one is not None]

    def run(self) -> World:
        """Run to the end; raises Violation."""
        Violation.seen.clear()
        with self.installed():
            self._make_disks()
            for name in ("driver", "pmd", "rmd"):
                self.due[name] = 0.0
            if self.random.random() < ANEW_CHANCE:
                self._begin_anew(early=True)
            self._safety()
            self._liveness()
            if not self.latched and self.random.random() < ANEW_CHANCE:
                self._begin_anew()
        return self

    def close(self) -> None:
        """Free what the disks take."""
        for process in self.processes():
            process.kill()
        for disk in self.disks.values():
            disk.discard()

    def _safety(self) -> None:
        faults = [(kind, 1 / each) for kind, each in self.profile.faults.items() if each]
        for _ in range(self.profile.steps):
            for kind, chance in faults:
                if self.random.random() < chance:
                    self._fault(kind)
            if self.serving and self.random.random() < 0.3:
                self.ask()
                self._after()
            self.step()

    def _fault(self, kind: str) -> None:
        what, _, whom = kind.partition(" ")
        if what == "kill":
            self.kill(whom)
        elif kind == "cut link":
            self._cut_link()
        elif kind == "slow link":
            self._slow_link()
        elif what == "stop":
            self._stop_driver()
        elif kind == "hang link":
            self.count("hang link")
            self.link_up = not self.link_up
        elif what == "cut":
            self.power_cut(whom)
        elif what == "fuse":
            self._light_fuse()
        elif what == "refresh":
            self._refresh()
        else:
            self._spoil()

    def _cut_link(self) -> None:
        self.count("cut link")
        self.note("cut link")
        for wire in self.wires:
            wire.cut()

    def _slow_link(self) -> None:
        until = self.clock.seconds() + self.random.choice((0.01, 0.3, 3.0))
        for wire in self.wires:
            wire.slow_until = until

    def _stop_driver(self) -> None:
        """Stop the driver in order; its clients leave it first."""
        driver = self.driver
        if driver is None or not self.serving:
            return
        self.count("stop driver")
        self.note("stop driver")
        for client in self.clients:
            client.gone = True
        self.clients = []
        self.serving = False

        def stopped(_: Any) -> None:
            if driver is self.driver:
                driver.kill()
                self.driver = None
                self._after_end("driver")

        driver.group.stop().addBoth(stopped)

    def _light_fuse(self) -> None:
        process = self.random.choice([self.driver, self.rmd])
        if process is not None:
            process.fuse = Fuse(
                self.random.randrange(12), self.random.random() < 0.5, self.random.random() < 0.6
            )

    def _refresh(self) -> None:
        if not self.serving or self.driver is None or self.driver.group.refresh_job is not None:
            return
        self.count("refresh")
        self.note("refresh")
        begun = maybeDeferred(self.driver.group.refresh, "full")
        begun.addErrback(lambda failure: failure.trap(QdsError))

    def _spoil(self) -> None:
        if self.latched:
            return
        path = self.random.choice(sorted(self.disks))
        method = self.random.choice(("fdatasync", "pwritev"))
        self.latched.add(path)
        self.disks[path].faults[method] = 1
        for start, failed in (("/near/data", self.model.dead), ("/near/log", self.model.unlogged)):
            if path.startswith(start):
                failed.add(int(path.removeprefix(start)))
        self.count("error")
        self.note(f"{method} on {path} fails")

    def step(self) -> None:
        """Let one thing happen."""
        self.steps += 1
        random = self.random
        # Some runs are slow to deliver, others let everything that can happen happen at once.
        doable = self._doable()
        if doable and random.random() < 0.9:
            count = 1 if random.random() > self.profile.eager else 8
            for _ in range(count):
                name, action = random.choice(doable)
                self.note(name)
                action()
                self._after()
                doable = self._doable()
                if not doable:
                    break
        else:
            self.advance()

    def _doable(self) -> list[tuple[str, Callable[[], None]]]:
        found: list[tuple[str, Callable[[], None]]] = []
        for process in self.processes():
            for worker in process.workers:
                if worker.waiting:
                    found.append((worker.name, worker.step))
            for end in process.ends:
                if end.ready and (end.wire.local or self.link_up):
                    found.append((process.name, lambda end=end: end.step(self._some())))
        return found

    def _some(self) -> int:
        return self.random.choice((1, 100, 5000, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX))

    def _after(self) -> None:
        """See to processes that ended in the middle of I/O, and look at the limits."""
        for name in ("driver", "rmd"):
            process: Process | None = getattr(self, name)
            if process is not None and process.ended is not None:
                if process.ended.power:
                    self.power_cut("beta" if name == "rmd" else "alpha")
                else:
                    self.kill(name)
        self._check_bounds()
        if Violation.seen:
            raise Violation.seen[0]
        if self.logged:
            raise Violation(f"BOUND: an unexpected error was logged: {self.logged[0]}")

    def _check_bounds(self) -> None:
        """BOUND: what waits somewhere is limited."""
        profile = self.profile
        frame = profile.log // 4 + 8 * KIB
        if self.driver is not None and self.driver.group._unapplied_bytes > profile.limit + frame:
            raise Violation("BOUND: too much is unapplied at the driver")
        if self.pmd is not None and self.pmd.group._outbound is not None:
            flying = sum(size for _, size, _, _ in self.pmd.group._outbound._in_flight)
            if flying > profile.window + profile.buffer + frame:
                raise Violation("BOUND: more is on its way than the window allows")
        if self.rmd is not None and self.receiving:
            group = self.rmd.group
            received = profile.limit + CHUNK_BYTES_MAX + frame
            if group._received_bytes > received:
                raise Violation("BOUND: too much is received at the secondary")
            if group.unmirrored_bytes > 2 * profile.limit + received:
                raise Violation("BOUND: too much waits for the mirror")

    def advance(self) -> None:
        """Let time pass, up to the next thing that waits for it."""
        now = self.clock.seconds()
        times = [call.getTime() for call in self.clock.getDelayedCalls()]
        times += self.due.values()
        times += [wire.slow_until for wire in self.wires if wire.slow_until > now]
        later = max(0.0, min(times, default=now + 1.0) - now)
        self.note(f"advance {later:.6f}")
        self.clock.advance(later)
        self._after()
        for name, at in list(self.due.items()):
            if at <= self.clock.seconds():
                del self.due[name]
                self.start(name)
                self._after()

    # -- the end ------------------------------------------------------------------------------

    def _liveness(self) -> None:
        """Stop the faults; everything must be mirrored before long."""
        self.quiet = True
        self.link_up = True
        for wire in self.wires:
            wire.slow_until = 0.0
        for process in self.processes():
            process.fuse = None
        for disk in self.disks.values():
            disk.faults.clear()
        if self.latched:
            # With a failed device there is nothing to wait for, but for somebody to say so.
            deadline = self.clock.seconds() + 10.0
            self._until(lambda: self._at_rest() or self.clock.seconds() > deadline, "a moment")
            if not self._at_rest():
                self._check_told()
            else:
                self.check_mirror()
            return
        self._until(self._at_rest, "everything to be mirrored")
        self._check_equal()

    def _until(self, happened: Callable[[], bool], what: str) -> None:
        """Go on without faults until something is so."""
        deadline = self.clock.seconds() + LIVENESS_SECONDS
        for _ in range(STEPS_MAX):
            if happened():
                return
            if self.clock.seconds() > deadline:
                break
            doable = self._doable()
            if doable:
                name, action = self.random.choice(doable)
                self.note(name)
                action()
                self._after()
            else:
                self.advance()
        raise Violation(f"LIVENESS: waited in vain for {what}: {self._state()}")

    def _begin_anew(self, early: bool = False) -> None:
        """Initialise the writelogs again: the secondary keeps its old history until a refresh.

        GENERATION: nothing of the new one may be taken before.

        :param early: while the histories are short, and so alike in numbers.
        """
        self._until(lambda: self.serving and self.receiving, "the start")
        assert self.rmd is not None
        while early and not self.rmd.group.committed_gsn:
            self.ask()
            self.advance()
            self._until(self._at_rest, "the first writes")
        if not self.rmd.group.mirror.journal.superblock.generations:
            return
        self.count("generations")
        self.note("begin anew")
        self._stop_driver()
        self._until(lambda: self.driver is None, "the driver's end")
        self.due.pop("driver", None)
        self.kill("pmd")
        self.model.begin_generation(
            self._initialise_writelogs(),
            [bytes(self.disks[ldsu.data_device].seen) for ldsu in self.config.ldsus],
        )
        self.start("driver")
        self._until(lambda: self.serving, "the driver")
        before = [bytes(disk.seen) for disk in self.model.mirrors]
        for _ in range(self.random.randrange(1, 12)):
            self.ask()
        self._until(self._refused, "a refusal")
        if before != [bytes(disk.seen) for disk in self.model.mirrors]:
            raise Violation("GENERATION: the mirror takes up another history")
        self._refresh()
        self._until(self._at_rest, "the refresh")
        self._check_equal()

    def _refused(self) -> bool:
        return self.driver is not None and self.driver.group.link["state"] == "refused"

    def _initialise_writelogs(self) -> bytes:
        generation = secrets.token_bytes(16)
        for ldsu in self.config.ldsus:
            self.disks[ldsu.writelog_device].discard()
            unit = BoundUnit(ldsu.index, ldsu.name, self.profile.size, ldsu.data_device)
            self._make_log(ldsu.writelog_device, self.profile.log, "writelog", [unit], [generation])
        self.model.logs = [self.disks[ldsu.writelog_device] for ldsu in self.config.ldsus]
        return generation

    def _at_rest(self) -> bool:
        if not self.serving or not self.receiving or self.driver is None or self.rmd is None:
            return False
        gsn = self.driver.group.status()["gsn"]
        return (
            gsn["written"] == gsn["applied"] == gsn["mirrored"]
            and self.driver.group.refresh_job is None
            and self.driver.group.coherent
            and not any(client.open for client in self.clients)
        )

    def _state(self) -> str:
        states = []
        for process in self.processes():
            try:
                states.append(process.group.status())
            except Exception as error:  # noqa: BLE001
                states.append(repr(error))
        return f"{states}, {[len(c.open) for c in self.clients]} open"

    def _check_told(self) -> None:
        """LOUD: what failed is named where an operator looks."""
        state = self._state()
        if self.driver is None or self.rmd is None:
            return
        if not any(path in state for path in self.latched):
            raise Violation(f"LOUD: nobody names the failed device: {state}")

    def _check_equal(self) -> None:
        self.check_mirror()
        for index, ldsu in enumerate(self.config.ldsus):
            tip = self.model.tips[index].content()
            for path in (ldsu.data_device, ldsu.mirror_device):
                if bytes(self.disks[path].seen) != tip:
                    raise Violation(f"PREFIX: at rest, {path} differs from the history")
        assert self.rmd is not None
        if not self.rmd.group.mirror.journal.superblock.coherent:
            raise Violation("COHERENT: at rest, the mirror does not say that it is coherent")

    # -- what is replaced while it runs ---------------------------------------------------------

    @contextmanager
    def installed(self, watching: bool = True) -> Iterator[None]:
        """Take the place of chance, and watch what the groups do."""
        profile = self.profile
        bytes_of = self.random_bytes.randbytes
        with ExitStack() as stack:

            def patch(owner: Any, name: str, value: Any) -> None:
                stack.enter_context(mock.patch.object(owner, name, value))

            patch(os, "urandom", bytes_of)
            patch(os, "getpid", lambda: 4711)
            patch(secrets, "token_bytes", bytes_of)
            patch(driver_module, "UNAPPLIED_BYTES_MAX", profile.limit)
            patch(remote_module, "RECEIVED_BYTES_MAX", profile.limit)
            patch(remote_module, "UNMIRRORED_BYTES_MAX", 2 * profile.limit)
            patch(outbound_module, "SEND_BUFFER_BYTES", profile.buffer)
            patch(DriverUnit, "_frame", _watched_frame(self, DriverUnit._frame))
            if not watching:
                yield
                return
            patch(Link, "send_frames", _watched_send_frames(self, Link.send_frames))
            patch(RemoteGroup, "rebase", _watched_rebase(self, RemoteGroup.rebase))
            patch(Link, "send", _watched_send(self, Link.send))
            patch(
                Writelog, "write_superblock", _watched_superblock(self, Writelog.write_superblock)
            )
            globalLogPublisher.addObserver(self._observe)
            stack.callback(globalLogPublisher.removeObserver, self._observe)
            yield

    def _observe(self, event: Any) -> None:
        if "log_failure" in event and event.get("log_level") is LogLevel.critical:
            self.logged.append(event["log_failure"].getTraceback())


def _watched_frame(world: World, original: Any) -> Any:
    def frame(
        unit: DriverUnit,
        kind: int,
        placement: Any,
        entries: Any = (),
        control: Any = (),
        gsns: Any = None,
    ) -> Any:
        before = unit._chain
        group = unit.group
        first = gsns[0] if gsns else group.next_gsn
        made, writes = original(unit, kind, placement, entries, control, gsns)
        world.model.framed(
            unit.index,
            group.generation,
            before,
            made.sequence,
            made.chain,
            kind,
            (first, made.gsn_last),
            list(entries),
            made.end,
            _essence(writes),
            b"".join(control),
        )
        return made, writes

    return frame


def _watched_rebase(world: World, original: Any) -> Any:
    def rebase(group: RemoteGroup, positions: Sequence[RebasePosition]) -> Any:
        for one in positions:
            world.model.rebased(one.index, one.generation, one.chain, one.next_gsn)
        return original(group, positions)

    return rebase


def _essence(writes: Any) -> list[tuple[int, bytes]]:
    """Give what must be on the platters: not what fills up a block."""
    *pads, (at, pieces) = writes
    essence = [(where.offset, bytes(pad[0][:RECORD_HEADER_BYTES])) for where, pad in pads]
    return [*essence, (at.offset, b"".join(pieces[:-1]))]


def _watched_send_frames(world: World, original: Any) -> Any:
    def send_frames(link: Link, sent: Sequence[memoryview]) -> None:
        for frame in sent:
            world.model.sent(frame)
        original(link, sent)

    return send_frames


def _watched_send(world: World, original: Any) -> Any:
    def send(link: Link, data: bytes) -> None:
        if data[0] == stream.ACK and isinstance(link._owner, RemoteGroup):
            group = link._owner
            ack = stream.parse_ack(data[stream.HEADER_BYTES :])
            world.model.told(ack.committed, group.position(0).generation or b"")
        original(link, data)

    return send


def _watched_superblock(world: World, original: Any) -> Any:
    def write_superblock(log: Writelog, *args: Any, **kw: Any) -> None:
        before = log.superblock
        original(log, *args, **kw)
        if not hasattr(world, "model"):
            return
        if log.superblock.role == "writelog":
            world.model.writelog_recorded(log.superblock)
        else:
            world.model.journal_recorded(before, log.superblock)

    return write_superblock


class AllButTheFirst:
    """Loses the first unsynced write of a site, and keeps what was written after it."""

    _lost = False

    def __call__(self, write: Unsynced) -> list[tuple[int, int]]:
        kept = everything(write) if self._lost else []
        self._lost = True
        return kept


class _Listener:
    """Where the NBD server would be."""

    def stopListening(self) -> Deferred[None]:  # noqa: N802
        return succeed(None)

    def disconnect_all(self) -> Deferred[None]:
        return succeed(None)


class _Way:
    """The pmd's way to its secondary."""

    def __init__(self, world: World, process: Process) -> None:
        self._world = world
        self._process = process

    def connect(self, factory: Any) -> Deferred[Any]:
        return self._world.connect(self._process, factory)


def make_base(base: Path) -> Path:
    """Make the directories and the secret that runs need."""
    for name in ("alpha", "beta"):
        paths = Paths.of(base / name)
        paths.etc.mkdir(parents=True)
        paths.var.mkdir()
        secret = paths.group_secret(0)
        secret.write_text("5a" * 32 + "\n")
        secret.chmod(0o600)
    return base


__all__ = ["MIB", "Profile", "World", "frames", "make_base", "socket"]
