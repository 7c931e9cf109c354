"""A primary's driver in memory: fake clock, memory devices, stepped or immediate workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from qdsmirror.config import GroupConfig, HostConfig, LdsuConfig, Tunables
from qdsmirror.core import nbd, watermark
from qdsmirror.core.bitmap import DirtyBitmap
from qdsmirror.core.nbd import Request
from qdsmirror.core.records import BoundUnit, Generation
from qdsmirror.core.superblock import Superblock
from qdsmirror.core.watermark import Committed
from qdsmirror.groups.driver import DriverGroup
from qdsmirror.groups.framing import UnitFrame
from qdsmirror.groups.runtime import Runtime
from qdsmirror.groups.unit import DriverUnit
from qdsmirror.interfaces import INbdConnection
from qdsmirror.paths import Paths
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.memory import absent_memory
from qdsmirror.storage.memorylog import MemoryLogDevice
from qdsmirror.storage.superblock import read_superblock
from qdsmirror.storage.writelog import Writelog
from tests.fakes import Choice, ImmediateWorker, MemoryDevice, StepWorker

KIB = 1024
MIB = 1024 * KIB
BLOCK = 4096
GENERATION = b"G" * 16
BITMAP_DEVICE_BYTES = 64 * KIB


class FakeReactor(Clock):
    """A clock with a thread pool that runs at once, and transports in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.adopted: list[Any] = []

    def getThreadPool(self) -> FakeReactor:  # noqa: N802
        return self

    def callInThreadWithCallback(  # noqa: N802
        self, done: Callable[[bool, Any], None], job: Callable[..., Any], *args: Any
    ) -> None:
        try:
            result = job(*args)
        except BaseException:  # noqa: BLE001 - whatever it is belongs to the job's owner
            done(False, Failure())
        else:
            done(True, result)

    def callFromThread(self, call: Callable[..., Any], *args: Any) -> None:  # noqa: N802
        call(*args)

    def adoptStreamConnection(self, fd: int, family: int, factory: Any) -> None:  # noqa: N802
        protocol = factory.buildProtocol(None)
        self.adopted.append(protocol)
        protocol.makeConnection(StringTransport())


class FakeListener:
    """Where the NBD server would be."""

    def stopListening(self) -> Deferred[None]:  # noqa: N802
        return succeed(None)

    def disconnect_all(self) -> Deferred[None]:
        return succeed(None)


@implementer(INbdConnection)
class FakeConnection:
    """A client: asks, and keeps the answers by request."""

    def __init__(self) -> None:
        self.done: list[Request] = []
        self.data: dict[Request, bytes] = {}
        self.errors: dict[Request, int] = {}
        self.extents: dict[Request, list[tuple[int, int]]] = {}
        self.abandoned: list[Request] = []
        self.gone = False
        self.released: list[Request] = []

    def release(self, request: Request) -> None:
        self.released.append(request)

    def answer(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._once(request)
            self.done.append(request)

    def answer_read(self, request: Request, pieces: Sequence[bytes | memoryview]) -> None:
        self._once(request)
        self.data[request] = b"".join(pieces)

    def answer_error(self, request: Request, errno_code: int, message: str) -> None:
        self._once(request)
        self.errors[request] = errno_code

    def abandon(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._once(request)
            self.abandoned.append(request)
        self.gone = True

    def answer_status(self, request: Request, extents: Sequence[tuple[int, int]]) -> None:
        self._once(request)
        self.extents[request] = list(extents)

    def hung_up(self) -> bool:
        return self.gone

    def _once(self, request: Request) -> None:
        assert not self.answered(request), f"answered twice: {request}"

    def answered(self, request: Request) -> bool:
        return any(
            request in kept
            for kept in (self.done, self.data, self.errors, self.extents, self.abandoned)
        )

    # -- asking -------------------------------------------------------------------------------

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        data: bytes | None = None,
        flags: int = 0,
    ) -> Request:
        return Request(self, bytes(8), command, flags, offset, length, data)

    def write(self, unit: DriverUnit, offset: int, data: bytes, fua: bool = False) -> Request:
        flags = nbd.CMD_FLAG_FUA if fua else 0
        return self.ask(unit, nbd.CMD_WRITE, offset, len(data), data, flags)

    def read(self, unit: DriverUnit, offset: int, length: int) -> bytes:
        """Read what must be there at once."""
        return self.data[self.ask(unit, nbd.CMD_READ, offset, length)]

    def flush(self, unit: DriverUnit) -> Request:
        return self.ask(unit, nbd.CMD_FLUSH)

    def ask(
        self,
        unit: DriverUnit,
        command: int,
        offset: int = 0,
        length: int = 0,
        data: bytes | None = None,
        flags: int = 0,
    ) -> Request:
        made = self.request(command, offset, length, data, flags)
        unit.submit([made])
        return made


class WatchedDevice(MemoryDevice):
    """A data device that checks NO-HIDDEN: what is written to it is durable in its writelog.

    Or, in bypass, its dirty bits are.  Only for payloads that the test makes unique.
    """

    log: Callable[[], MemoryDevice]
    violations = 0

    def pwritev(self, buffers: Sequence[bytes | bytearray | memoryview], offset: int) -> None:
        durable = self.log().durable()
        at = offset
        for buffer in buffers:
            if not marked(durable, at, len(buffer)) and durable.find(bytes(buffer)) < 0:
                self.violations += 1
            at += len(buffer)
        super().pwritev(buffers, offset)

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        durable = self.log().durable()
        superblock = durable_superblock(durable)
        direct = superblock.bypass is not None or superblock.memory is not None
        if direct and not marked(durable, offset, length):
            self.violations += 1
        super().zero(offset, length, unmap)


def durable_superblock(log: bytes) -> Superblock:
    """Give the superblock that a power cut would leave of a log."""
    return read_superblock(MemoryDevice(len(log), content=log))


def marked(log: bytes, offset: int, length: int) -> bool:
    """Tell whether a log's durable bytes say bypass, and that the whole of a range is dirty.

    A full refresh that has yet to begin says no less: bypass was to be left, and was not.  Of a
    writelog in memory the bits alone count.
    """
    superblock = durable_superblock(log)
    area, refresh = superblock.bitmap, superblock.refresh
    past = superblock.bypass is not None or (refresh is not None and not refresh["done"])
    if area is None or not (past or superblock.memory is not None):
        return False
    stored = log[area.start : area.start + area.size]
    dirty = DirtyBitmap(area, superblock.units[0].size, superblock.log, stored)
    return not dirty.damaged and all(
        dirty.is_marked(at) for at in range(offset, offset + length, 512)
    )


def group_config(
    ldsus: int, durability: str = "flush", memory: int = 0, **tunables: Any
) -> GroupConfig:
    """Make the configuration of group 0.

    :param memory: bytes of each writelog where they are in memory.
    """

    def ldsu(i: int) -> LdsuConfig:
        log, mirror = f"/near/log{i}", f"/far/mirror{i}"
        if not memory:
            return LdsuConfig(i, f"qds{i}", f"/near/data{i}", log, mirror)
        return LdsuConfig(i, f"qds{i}", f"/near/data{i}", f"memory:{memory}", mirror, log)

    return GroupConfig(
        number=0,
        name="dsgrp000",
        path=Path("/nowhere/dsgrp000.cfg"),
        operation="async",
        durability=durability,
        on_overflow="block",
        primary_host="alpha",
        primary_address="127.0.0.1",
        secondary_host="beta",
        secondary_address="127.0.0.1",
        port=575,
        journal_device="/far/journal",
        tunables=Tunables(**tunables),
        ldsus=tuple(map(ldsu, range(ldsus))),
    )


def _memory(ldsu: LdsuConfig) -> str:
    return f"/memory/{ldsu.index}"


class DriverWorld:
    """A group's devices, and the driver over them.

    :ivar steps: the workers by name ("qds0 writelog", "... commit", "... data", "... read"), when
        they are stepped.
    :ivar frames: what the present driver framed.
    :ivar latch: what the group is given; by default its state file cannot be written.
    """

    def __init__(
        self,
        test: SynchronousTestCase,
        *,
        ldsus: int = 1,
        size: int = MIB,
        log: int = MIB,
        durability: str = "flush",
        stepped: bool = False,
        block: int = 512,
        memory: bool = False,
        **tunables: Any,
    ) -> None:
        self.test = test
        self.stepped = stepped
        self.config = group_config(ldsus, durability, log if memory else 0, **tunables)
        self.devices: dict[str, MemoryDevice] = {}
        for ldsu in self.config.ldsus:
            data = WatchedDevice(size, path=ldsu.data_device, logical_block=block)
            data.log = lambda path=ldsu.log_device: self.devices[path]
            self.devices[ldsu.data_device] = data
            on_device = BITMAP_DEVICE_BYTES if memory else log
            device = MemoryDevice(on_device, path=ldsu.log_device, role="writelog")
            self.devices[ldsu.log_device] = device
            if memory:
                self.devices[_memory(ldsu)] = MemoryDevice(log, path=_memory(ldsu))
            Writelog.initialise(
                MemoryLogDevice(device, absent_memory(ldsu)) if memory else device,
                role="writelog",
                group=0,
                units=[BoundUnit(ldsu.index, ldsu.name, size, ldsu.data_device)],
                generations=[Generation(GENERATION, 1)],
            )
        self.host = HostConfig("alpha", Path("c"), Path("k"), Path("a"))
        self.paths = Paths.of("/tmp/qds-no-such-root")
        self.latch: FailureLatch | None = None
        self._descriptors: list[int] = []
        test.addCleanup(self.close)

    def data(self, index: int = 0) -> WatchedDevice:
        device = self.devices[f"/near/data{index}"]
        assert isinstance(device, WatchedDevice)
        return device

    def log(self, index: int = 0) -> MemoryDevice:
        return self.devices[f"/near/log{index}"]

    # -- life ---------------------------------------------------------------------------------

    def begin(self) -> Deferred[Any]:
        """Make a driver and start it."""
        self.reactor = FakeReactor()
        self.steps: dict[str, StepWorker] = {}
        self.frames: list[UnitFrame] = []
        self.client = FakeConnection()
        runtime = Runtime(
            reactor=self.reactor,
            open_device=self._open,
            quick_worker=self._worker,
            slow_worker=self._worker,
            read_worker=self._worker,
            wall=lambda: 1_790_000_000.0 + self.reactor.seconds(),
            listen=lambda *_: FakeListener(),
        )
        self.group = DriverGroup(
            self.config,
            self.host,
            self.paths,
            self.reactor,
            -1,
            runtime,
            self.latch,
            lambda ldsu: self._open(_memory(ldsu)),
        )
        framed = self.group.framed

        def keep(frame: UnitFrame) -> None:
            self.frames.append(frame)
            framed(frame)

        self.group.framed = keep  # type: ignore[method-assign]
        return self.group.start()  # type: ignore[no-any-return]

    def start(self) -> DriverUnit:
        """Start a driver; give its first LDSU."""
        self.test.successResultOf(self.begin())
        return self.group.units[0]

    def kill(self) -> None:
        """Kill the driver with -9: the page cache stays."""
        self._forget()
        self.devices = {path: self._again(d, d.reopen()) for path, d in self.devices.items()}

    def crash(self, choose: Choice) -> None:
        """Cut the primary's power."""
        self._forget()
        self.devices = {path: self._again(d, d.crash(choose)) for path, d in self.devices.items()}
        self._lose_memory()

    def kill_master(self) -> None:
        """Kill the driver and its master with -9: the page cache stays, writelogs in memory go."""
        self.kill()
        self._lose_memory()

    def _lose_memory(self) -> None:
        for path in [path for path in self.devices if path.startswith("/memory/")]:
            size = self.devices[path].size
            self.devices.pop(path).discard()
            self.devices[path] = MemoryDevice(size, path=path)

    def _again(self, old: MemoryDevice, new: MemoryDevice) -> MemoryDevice:
        if isinstance(old, WatchedDevice):
            self.test.assertEqual(old.violations, 0, "NO-HIDDEN")
            new.__class__ = WatchedDevice
            assert isinstance(new, WatchedDevice)
            new.log = old.log
        old.discard()
        return new

    def _forget(self) -> None:
        for worker in self.steps.values():
            worker.drop()
        for call in self.reactor.getDelayedCalls():
            call.cancel()

    def close(self) -> None:
        """Check it for the last time, and give all back; a test of many worlds does so at once."""
        devices, self.devices = list(self.devices.values()), {}
        descriptors, self._descriptors = self._descriptors, []
        for device in devices:
            device.discard()
        for descriptor in descriptors:
            os.close(descriptor)
        for device in devices:
            if isinstance(device, WatchedDevice):
                self.test.assertEqual(device.violations, 0, "NO-HIDDEN")

    def _open(self, path: str, **_: Any) -> MemoryDevice:
        device = self.devices[path]
        if device.closed:
            device = self.devices[path] = self._again(device, device.reopen())
        return device

    def _worker(self, name: str) -> Any:
        if not self.stepped:
            return ImmediateWorker()
        return self.steps.setdefault(name, StepWorker())

    def step(self, name: str, times: int = 1) -> None:
        """Step a worker that must have something to do."""
        for _ in range(times):
            self.test.assertTrue(self.steps[name].step(), f"{name} has no job")

    def settle(self, seconds: float = 0.1) -> None:
        """Let everything happen that can happen by itself."""
        for _ in range(20):
            while any(worker.step() for worker in list(self.steps.values())):
                pass
            self.reactor.advance(seconds / 20)

    # -- the pmd ------------------------------------------------------------------------------

    def attach(self) -> dict[str, Any]:
        """Attach a pmd; give what it was told."""
        info, descriptors, end = self.group.attach_pmd()
        self._descriptors += [*descriptors, end]
        self.pmd = self.reactor.adopted[-1]
        return info

    def commit(self, gsn: int | None = None, ends: list[Committed] | None = None) -> int:
        """Say, as the pmd, that the secondary has committed up to a GSN (all that is durable)."""
        upto = self.group.durable_gsn if gsn is None else gsn
        if ends is None:
            last: dict[int, UnitFrame] = {}
            for frame in self.frames:
                if frame.gsn_last <= upto:
                    last[frame.unit.index] = frame
            ends = [Committed(i, f.end, *f.next_point) for i, f in last.items()]
        self.pmd.dataReceived(watermark.pack_committed(upto, upto, upto, ends))
        return upto


def unique(number: int, length: int = BLOCK) -> bytes:
    """Give bytes that no other number has."""
    return (b"%016d" % number) * (length // 16)
