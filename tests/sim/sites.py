"""A group's two sites: their disks, their daemons, and the ways between these."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from qdsmirror.config import GroupConfig, HostConfig, LdsuConfig, Tunables
from qdsmirror.configvalues import NetworkPath
from qdsmirror.core.backfresh import INTERRUPTED
from qdsmirror.core.bitmap import DirtyBitmap
from qdsmirror.core.records import BoundUnit, Generation
from qdsmirror.core.superblock import Superblock
from qdsmirror.errors import BrokenError, CorruptError, QdsError, UnreachableError
from qdsmirror.groups.driver import DriverGroup
from qdsmirror.groups.primary import PrimaryGroup
from qdsmirror.groups.remote import RemoteGroup
from qdsmirror.groups.runtime import Runtime
from qdsmirror.groups.unapplied import Unapplied
from qdsmirror.interfaces import IBlockDevice
from qdsmirror.limits import KIB
from qdsmirror.paths import Paths
from qdsmirror.storage.extension import PoolDevice
from qdsmirror.storage.latch import FailureLatch, FailureMemory
from qdsmirror.storage.memory import absent_memory
from qdsmirror.storage.memorylog import MemoryLogDevice
from qdsmirror.storage.superblock import read_superblock
from qdsmirror.storage.writelog import Writelog
from tests.fakes import Choice, MemoryDevice, Unsynced, at_random, everything, nothing
from tests.sim.backfreshes import Backfreshes
from tests.sim.corruption import Corruption
from tests.sim.disk import Disk, Memory
from tests.sim.history import Violation, payload
from tests.sim.model import Model
from tests.sim.process import Process, Wire
from tests.sim.profile import Profile

#: Of each extension device.
POOL_BYTES = 192 * KIB

#: Of a writelog in memory.
BITMAP_DEVICE_BYTES = 64 * KIB
MEMORY = "/near/memory"

_EPOCH = 1_790_000_000.0
#: By how many seconds a process's clock may be wrong (rules.md 26).
_CLOCKS = (0.0, 0.0, 3600.0, -3600.0, -1e8)


def is_memory(path: str) -> bool:
    """Tell a writelog's memory from a disk."""
    return path.startswith(MEMORY)


class Sites:
    """The two sites.

    :ivar trace: a running hash of everything that happened.
    :ivar serving: whether the driver has started; ``receiving``: whether the rmd has.
    :ivar hanging: network paths on which nothing moves, though nobody is told.
    :ivar due: when which daemon is to be started.
    :ivar latched: devices that were made to fail.
    :ivar memory: what the driver's master remembers of them, until its site's power is cut.
    """

    def __init__(self, seed: int, base: Path, profile: Profile | None = None) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.profile = profile or Profile.draw(self.random, Random(f"operation of {seed}"))
        self.base = base
        self.clock = Clock()
        self.trace = hashlib.blake2b(digest_size=16)
        self.log: list[str] = []
        self.keep_log = False
        self.random_bytes = Random(self.random.getrandbits(64))
        self._clocks = Random(f"clocks {seed}")
        self.steps = 0
        self.driver: Process | None = None
        self.pmd: Process | None = None
        self.rmd: Process | None = None
        self.serving = False
        self.receiving = False
        self.wires: list[Wire] = []
        self.link_up = True
        self.hanging: set[str] = set()
        self.counts: dict[str, int] = {}
        self.due: dict[str, float] = {}
        self.latched: set[str] = set()
        self.memory = FailureMemory()
        self.numbers = 0
        #: By id, the step at which each verify was asked for.
        self.verifies: dict[bytes, int] = {}
        self.logged: list[Any] = []
        #: By path the first superblock of each writelog: its UUID and its bitmap's place stay.
        self._writelogs: dict[str, Superblock] = {}
        self._old_memory: list[Disk] = []
        self._make_sites()

    # -- the sites ----------------------------------------------------------------------------

    def _make_sites(self) -> None:
        profile = self.profile
        self.config = GroupConfig(
            number=0,
            name="dsgrp000",
            path=Path("/nowhere/dsgrp000.cfg"),
            operation=profile.operation,
            on_disconnect=profile.on_disconnect,
            near_sync_entries=profile.near_sync_entries,
            durability=profile.durability,
            on_overflow=profile.on_overflow,
            primary_host="alpha",
            primary_address="127.0.0.1",
            secondary_host="beta",
            secondary_address="127.0.0.1",
            port=575,
            journal_device="/far/journal",
            pool=tuple(f"/near/pool{number}" for number in range(profile.pool)),
            tunables=Tunables(
                metadata_entries=profile.metadata_entries,
                metadata_seconds=profile.metadata_seconds,
                send_window=profile.window,
                auto_refresh=profile.auto_refresh,
                checkpoint_hold=profile.checkpoint_hold,
                before_images_full=profile.before_images_full,
                compression=profile.compression,
                verify_rate=profile.verify_rate,
                verify_every=profile.verify_every,
                chunk_size=4 * KIB,
            ),
            paths=tuple(
                NetworkPath(f"10.{number}.0.1", f"10.{number}.0.2")
                for number in range(profile.paths if profile.paths > 1 else 0)
            ),
            ldsus=tuple(map(self._ldsu, range(profile.ldsus))),
        )
        self.disks: dict[str, Disk] = {}
        self.host = {
            name: HostConfig(name, Path("c"), Path("k"), Path("a")) for name in ("alpha", "beta")
        }
        self.paths = {name: Paths.of(self.base / name) for name in ("alpha", "beta")}
        for paths in self.paths.values():
            paths.state_file(0).unlink(missing_ok=True)

    def _ldsu(self, i: int) -> LdsuConfig:
        log, place = f"/near/log{i}", (f"qds{i}", f"/near/data{i}")
        if not self.profile.memory:
            return LdsuConfig(i, *place, log, f"/far/mirror{i}")
        return LdsuConfig(i, *place, f"memory:{self.profile.log}", f"/far/mirror{i}", log)

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
            self._make_writelog(ldsu, unit, generation)
        self._make_memory()
        for path in self.config.pool:
            disk = self.disks[path] = Disk(path, POOL_BYTES)
            device = Process("qdswlinit", self.clock, self.random).open(disk, "extension", 512)
            PoolDevice.initialise(device, 0)
            device.close()
        journal = profile.journal + profile.before_bytes
        # A secondary that has committed nothing yet cannot be told from one that lost its journal.
        begun = [generation] if profile.memory else []
        self._make_log(self.config.journal_device, journal, "journal", units, begun)
        self.model = Model(
            generation,
            contents,
            self.disks,
            [self.disks[ldsu.data_device] for ldsu in self.config.ldsus],
            [self.disks[ldsu.mirror_device] for ldsu in self.config.ldsus],
            self.disks[self.config.journal_device],
        )
        ldsus = self.config.ldsus
        logs = [ldsu.log_device for ldsu in ldsus]
        self.model.backfreshes = Backfreshes(self.model, logs, Random(f"backfresh {self.seed}"))
        self.corruption = {
            "alpha": Corruption(
                self.disks,
                [ldsu.log_device for ldsu in ldsus],
                [ldsu.data_device for ldsu in ldsus],
                self.random,
            ),
            "beta": Corruption(
                self.disks,
                [self.config.journal_device],
                [ldsu.mirror_device for ldsu in ldsus],
                self.random,
            ),
        }
        self.model.in_memory = profile.memory
        self.model.goes_direct = self._goes_direct
        self.model.dirty = partial(self.dirty_bitmap, self.disks)
        self.model.is_coherent = self._is_coherent
        self.model.is_exempt = self._is_exempt
        self.model.journal_generation = self._journal_generation

    def dirty_bitmap(self, disks: Mapping[str, Disk], index: int) -> DirtyBitmap:
        """Read an LDSU's dirty bitmap from the platters."""
        path = self.config.ldsus[index].log_device
        superblock = self._writelogs[path]
        area = superblock.bitmap
        assert area is not None
        stored = bytes(disks[path].durable[area.start : area.start + area.size])
        bitmap = DirtyBitmap(area, self.profile.size, superblock.log, stored)
        if bitmap.damaged:
            raise Violation(f"NO-HIDDEN: the dirty bitmap of LDSU {index} is damaged")
        return bitmap

    def known_dirty(self, index: int) -> DirtyBitmap:
        """Give an LDSU's dirty bitmap as the driver has it."""
        assert self.driver is not None
        dirty: DirtyBitmap = self.driver.group.units[index].dirty
        return dirty

    def _is_coherent(self) -> bool:
        stored = self._journal_stored()
        return stored is not None and stored.coherent

    def _journal_generation(self) -> bytes:
        stored = self._journal_stored()
        return stored.generation or b"" if stored is not None else b""

    def _journal_stored(self) -> Superblock | None:
        """Give the journal's superblock as it is on the platters."""
        disk = self.disks[self.config.journal_device]
        try:
            return read_superblock(MemoryDevice(disk.size, content=bytes(disk.durable)))
        except CorruptError:
            return None

    def _goes_direct(self) -> bool:
        """Tell whether a writelog's failure is on record, so that writes may go past it."""
        if not any(path.startswith(("/near/log", "/near/pool")) for path in self.latched):
            return False
        state = self.paths["alpha"].state_file(0)
        return state.exists() and any(path in state.read_text() for path in self.latched)

    def _is_exempt(self, ldsu: int) -> bool:
        """Tell whether it is on record that a data device has failed (rules.md 16)."""
        state = self.paths["alpha"].state_file(0)
        found = json.loads(state.read_bytes()).get("group") if state.exists() else None
        return found is not None and str(ldsu) in found["dead"]

    def _make_writelog(self, ldsu: LdsuConfig, unit: BoundUnit, generation: bytes) -> None:
        size = BITMAP_DEVICE_BYTES if self.profile.memory else self.profile.log
        memory = absent_memory(ldsu) if self.profile.memory else None
        self._make_log(ldsu.log_device, size, "writelog", [unit], [generation], memory)

    def _make_memory(self) -> None:
        """Give the driver's master memory, with nothing in it; who has the old one keeps it."""
        if not self.profile.memory:
            return
        for ldsu in self.config.ldsus:
            path = f"{MEMORY}{ldsu.index}"
            if path in self.disks:
                self._old_memory.append(self.disks[path])
            self.disks[path] = Memory(path, ldsu.memory_bytes)

    def _make_log(
        self,
        path: str,
        size: int,
        role: str,
        units: list[BoundUnit],
        ids: list[bytes],
        memory: IBlockDevice | None = None,
    ) -> None:
        disk = self.disks[path] = Disk(path, size)
        device: Any = Process("qdswlinit", self.clock, self.random).open(disk, role, 512)
        if memory is not None:
            device = MemoryLogDevice(device, memory)
        log = Writelog.initialise(
            device,
            role=role,
            group=0,
            units=units,
            generations=[Generation(one, 1) for one in ids],
            before_bytes=self.profile.before_bytes if role == "journal" else 0,
        )
        log.update(both=True, coherent=True, reason="")
        if role == "writelog":
            self._writelogs[path] = log.superblock
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
        # A verify that is due by the clock has its own tests.
        wrong = 0.0 if self.profile.verify_every else self._clocks.choice(_CLOCKS)
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
            wall=lambda: _EPOCH + wrong + process.seconds(),
            listen=lambda *_: _Listener(),
            bind=lambda _path: _Bound(),
            attach=lambda _reactor, _path: self._attach(process),
            endpoint=lambda *given: _Way(self, process, given[-1].remote),
            unapplied=Unapplied(self.profile.limit, 0),
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
            memory = self.memory
            latch = FailureLatch(
                self.paths[site].state_file(0), partial(memory.of, 0), partial(memory.remember, 0)
            )
            process.group = DriverGroup(
                *common,
                -1,
                runtime=runtime,
                latch=latch,
                open_memory=lambda ldsu: process.open(
                    self.disks[f"{MEMORY}{ldsu.index}"], "memory", 512
                ),
            )
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
                direct=group.bypass.phase != "off",
                lacking={u.index for u in group.units if u.closed or INTERRUPTED in u.dead},
            )
            self.serving = True
            self.corruption["alpha"].heal()
            self.driver_began()
        elif process is self.rmd:
            self.receiving = True
            self.corruption["beta"].heal()
            self.check_mirror()
            self.check_held()
        self.note(f"started {process.name}")

    def driver_began(self) -> None:
        """Learn that the driver serves."""

    def driver_ended(self) -> None:
        """Learn that the driver is gone."""

    def _start_failed(self, process: Process, failure: Failure) -> None:
        corruption = self.corruption["beta" if process is self.rmd else "alpha"]
        if corruption.is_told_by(failure.value):
            self.count("refused over corruption")
            if corruption.has_spread():
                Violation(f"RECOVER: {process.name} refuses its log, and has changed a device")
            corruption.heal()
        elif not isinstance(failure.value, Violation) and not self._excused(failure.value):
            Violation(f"RECOVER: {process.name} does not start: {failure.value!r}")
        self.note(f"{process.name} does not start")
        process.kill()
        setattr(self, process.name, None)
        self._restart_later(process.name)

    def _excused(self, error: BaseException) -> bool:
        """Tell whether a device's failure explains why a daemon does not start (LOUD)."""
        if isinstance(error, BrokenError) and "before-images are used up" in str(error):
            self.count("refused for want of before-images")
            return True
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
            self.rmd.group.committing.durable,
        )

    def check_held(self) -> None:
        """DURABLE: a checkpoint that was told is there after any end."""
        assert self.rmd is not None
        held = self.rmd.group.mirror.held
        if self.model.is_held and held is None:
            raise Violation("DURABLE: the checkpoint is gone")
        # One that was never told may have become durable.
        self.model.is_held = held is not None

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
            self.driver_ended()
        elif name == "rmd":
            self.receiving = False
        self._restart_later(name)

    def _restart_later(self, name: str) -> None:
        self.due[name] = self.clock.seconds() + self.random.choice((0.0, 0.1, 1.0, 5.0))

    def power_cut(self, site: str) -> None:
        """Cut a site's power: its processes end, and so does what its disks had not written."""
        self.count(f"power cut {site}")
        self.note(f"power cut {site}")
        if site == "alpha":
            self.memory = FailureMemory()
        for name in ("rmd",) if site == "beta" else ("driver", "pmd"):
            process: Process | None = getattr(self, name)
            setattr(self, name, None)
            if process is not None:
                process.kill(silently=True)
            self._after_end(name)
        near = "/far/" if site == "beta" else "/near/"
        choose = self._choice()
        for path, disk in self.disks.items():
            if path.startswith(near) and not is_memory(path):
                disk.power_cut(choose)
        if site == "alpha":
            self._lose_memory()
        else:
            self.model.backfreshes.awaits_replay = True
        if self.random.random() < self.profile.corruption and not self.corruption[site].any:
            struck = self.corruption[site].strike()
            if struck:
                self.count("corruption")
                self.note(struck)

    def kill_master(self) -> None:
        """kill -9 of the driver's master: its child ends, and the memory is gone."""
        self.note("kill master")
        self.count("kill master")
        self.memory = FailureMemory()
        if self.driver is not None:
            self.kill("driver")
        self._lose_memory()

    def _lose_memory(self) -> None:
        self._make_memory()
        self.model.memory_lost = self.profile.memory

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
            disks = {disk.inode: disk for disk in (*self._old_memory, *self.disks.values())}
            pmd.descriptors += [(fd, disks[os.fstat(fd).st_ino]) for fd in descriptors]
            answered.callback((json.loads(json.dumps(info)), descriptors, end))

        pmd.callLater(self.random.random() * 0.01, ask)
        return answered

    def passes(self, wire: Wire) -> bool:
        """Tell whether anything moves on a wire."""
        return wire.local or (self.link_up and wire.path not in self.hanging)

    def connect(self, pmd: Process, factory: Any, path: str) -> Deferred[Any]:
        made: Deferred[Any] = Deferred()

        def reach() -> None:
            rmd = self.rmd
            reaches = self.link_up and path not in self.hanging
            server = rmd.group.handshake() if rmd is not None and reaches else None
            if rmd is None or server is None:
                made.errback(ConnectionRefusedError())
                return
            wire = Wire(self.random, local=False, path=path)
            self.wires = [one for one in self.wires if not one.over]
            self.wires.append(wire)
            client = factory.buildProtocol(None)
            wire.join(rmd, server)
            wire.join(pmd, client)
            made.callback(client)

        pmd.callLater(self.random.random() * 0.05, reach)
        return made

    def processes(self) -> list[Process]:
        return [one for one in (self.driver, self.pmd, self.rmd) if one is not None]

    def close(self) -> None:
        """Free what the disks take."""
        for process in self.processes():
            process.kill()
        for disk in (*self._old_memory, *self.disks.values()):
            disk.discard()


class AllButTheFirst:
    """Loses the first unsynced write of a site, and keeps what was written after it."""

    _lost = False

    def __call__(self, write: Unsynced) -> list[tuple[int, int]]:
        kept = everything(write) if self._lost else []
        self._lost = True
        return kept


class _Bound:
    """Where a listening socket would be."""

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        """Leave it."""


class _Listener:
    """Where the NBD server would be.

    :ivar connections: none: the simulation's clients have no sockets.
    """

    connections: tuple[object, ...] = ()

    def stopListening(self) -> Deferred[None]:  # noqa: N802
        return succeed(None)

    def disconnect_all(self) -> Deferred[None]:
        return succeed(None)


class _Way:
    """The pmd's way to its secondary."""

    def __init__(self, world: Sites, process: Process, path: str) -> None:
        self._world = world
        self._process = process
        self._path = path

    def connect(self, factory: Any) -> Deferred[Any]:
        return self._world.connect(self._process, factory, self._path)


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
