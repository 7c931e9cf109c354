"""A group's extension pool: extending and freeing logs in use, and every crash of that."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Generator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import deferLater
from twisted.trial.unittest import SynchronousTestCase, TestCase

from qdsmirror.core.superblock import SLOT_BYTES
from qdsmirror.core.watermark import Committed
from qdsmirror.errors import (
    CorruptError,
    DegradedError,
    DeviceError,
    DeviceFailedError,
    LimitError,
    QdsError,
    UsageError,
)
from qdsmirror.groups.unit import DriverUnit
from qdsmirror.storage.device import open_device
from qdsmirror.storage.extension import PoolDevice, read_extension
from qdsmirror.storage.latch import FailureLatch
from tests.fakes import MemoryDevice, at_random, nothing
from tests.groups.site import Sites, reactor
from tests.groups.world import BLOCK, KIB, DriverWorld, WatchedDevice, unique

Steps = Generator[Deferred[Any], Any, None]
LOG = 256 * KIB
SPARE = 192 * KIB


class AllDevices(MemoryDevice):
    """A writelog and all extension devices, for the watch over NO-HIDDEN."""

    parts: Callable[[], list[MemoryDevice]]

    def durable(self) -> bytes:
        return b"".join(part.durable() for part in self.parts())


class PoolWorld(DriverWorld):
    """A driver in memory whose group has an extension pool."""

    def __init__(self, test: SynchronousTestCase, spares: int = 2, **how: Any) -> None:
        super().__init__(test, log=LOG, **how)
        self.pool = tuple(f"/near/pool{number}" for number in range(spares))
        self.config = dataclasses.replace(self.config, pool=self.pool)
        for path in self.pool:
            device = MemoryDevice(SPARE, path=path, role="extension")
            self.devices[path] = device
            PoolDevice.initialise(device, 0)
        for index in range(len(self.config.ldsus)):
            self.data(index).log = self._watched(index)
        self.count = 0

    def _watched(self, index: int) -> Callable[[], MemoryDevice]:
        every = AllDevices(0)
        every.parts = lambda: [self.log(index), *(self.devices[path] for path in self.pool)]
        return lambda: every

    def _open(self, path: str, **how: Any) -> MemoryDevice:
        if path not in self.devices:
            raise DeviceError(f"{path} does not exist")
        return super()._open(path, **how)

    def extend(self, ldsu: str = "qds0", path: str = "") -> dict[str, Any]:
        return dict(self.test.successResultOf(self.group.extend(ldsu, path)))

    def free(self, ldsu: str = "qds0", path: str = "") -> dict[str, Any]:
        return dict(self.test.successResultOf(self.group.free(ldsu, path)))

    def states(self) -> list[str]:
        return [row["state"] for row in self.group.status()["pool"]["devices"]]

    def write(self, unit: DriverUnit, fua: bool = False) -> Any:
        self.count += 1
        return self.client.write(unit, self.count * BLOCK % unit.size, unique(self.count), fua)

    def fill(self, unit: DriverUnit) -> Any:
        """Write until a write waits; give it."""
        while True:
            made = self.write(unit)
            self.settle()
            if not self.client.answered(made):
                return made

    def drain(self) -> None:
        """Let the secondary commit everything."""
        ends = [Committed(u.index, u.durable_end, *u.durable_point) for u in self.group.units]
        self.commit(ends=ends)
        self.settle(5.0)


class UseTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.world = PoolWorld(self)
        self.unit = self.world.start()

    def refused(self, call: Callable[..., Any], kind: type[QdsError], *words: str) -> None:
        try:
            deferred = call()
        except QdsError as caught:
            error = caught
        else:
            error = self.failureResultOf(deferred).value
        self.assertIs(type(error), kind)
        for word in words:
            self.assertIn(word, f"{error.message}; {error.hint}")

    def test_waiting_writes_go_on_at_once(self) -> None:
        waiting = self.world.fill(self.unit)
        size = self.unit.writelog.ring.size
        answer = self.world.extend()
        self.assertTrue(self.world.client.answered(waiting))
        self.assertEqual((answer["device"], answer["state"]), ("/near/pool0", "chained"))
        self.assertEqual(answer["pool_free"], 1)
        self.assertGreater(answer["size"], size + SPARE // 2)
        self.assertEqual(self.world.states(), ["chained", "free"])

    def test_they_wait_for_nothing_else(self) -> None:
        world = PoolWorld(self, stepped=True)
        world.begin()
        world.settle()
        world.fill(world.group.units[0])
        world.group.extend("qds0", "")
        while world.group.extensions.changes(world.group.units[0]):
            world.step("qds0 commit")
        self.assertTrue(world.steps["qds0 writelog"].waiting, "nothing is appended")

    def test_status(self) -> None:
        status = self.world.group.status()
        rows = [
            {"device": path, "state": "free", "ldsu": None, "reason": ""}
            for path in self.world.pool
        ]
        self.assertEqual(status["pool"], {"devices": rows, "free": 2, "used": 0})
        self.assertEqual(status["ldsus"][0]["writelog"]["extensions"], [])
        self.world.extend(path="/near/../near/pool1")
        self.world.fill(self.unit)
        status = self.world.group.status()
        log = status["ldsus"][0]["writelog"]
        (one,) = log["extensions"]
        self.assertEqual(log["devices"], ["/near/log0", "/near/pool1"])
        self.assertEqual((one["device"], one["leaving"]), ("/near/pool1", False))
        self.assertTrue(0 < one["used_bytes"] <= one["size"] < SPARE, one)
        self.assertEqual((status["pool"]["free"], status["pool"]["used"]), (1, 1))
        self.assertEqual(status["pool"]["devices"][1]["ldsu"], "qds0")

    def test_freed_when_drained(self) -> None:
        self.world.fill(self.unit)
        self.world.extend()
        for _ in range(4):
            self.world.write(self.unit)
        self.world.settle()
        self.world.attach()
        self.world.commit(self.world.group.durable_gsn // 2)
        self.world.settle(5.0)
        answer = self.world.free()
        self.assertEqual(answer["state"], "leaving")
        self.assertTrue(0 < answer["uncommitted_bytes"] <= answer["drain_bytes"], answer)
        self.assertEqual(self.world.states(), ["leaving", "free"])
        self.refused(lambda: self.world.group.free("qds0", ""), DegradedError, "not drained")
        path = self.world.pool[0]
        self.refused(
            lambda: self.world.group.extend("qds0", path), DegradedError, "still being drained"
        )
        self.world.attach()
        self.world.drain()
        self.assertEqual(self.world.states(), ["free", "free"])
        self.assertEqual(self.unit.writelog.extensions, {})
        self.assertEqual(read_extension(self.world.devices[path]).log, b"")

    def test_the_pmd_attaches_again_where_another_device_took_the_place(self) -> None:
        world = self.world
        world.extend(path=world.pool[0])
        ring = self.unit.writelog.ring
        world.attach()
        transport = world.pmd.transport
        world.free()
        world.extend(path=world.pool[1])
        self.assertEqual(self.unit.writelog.ring, ring)
        self.assertFalse(transport.disconnecting or transport.disconnected)
        world.write(self.unit, fua=True)
        world.settle()
        self.assertTrue(transport.disconnecting or transport.disconnected)

    def test_what_the_secondary_has_waits_for_a_checkpoint_only(self) -> None:
        world = PoolWorld(self, stepped=True)
        unit = world.start()
        world.fill(unit)
        extended = world.group.extend("qds0", "")
        world.settle()
        self.successResultOf(extended)
        for _ in range(4):
            world.write(unit)
            world.settle()
        world.attach()
        world.commit(world.group.durable_gsn // 2)
        world.settle(5.0)
        freed = world.group.free("qds0", "")
        world.commit()
        world.step("qds0 commit")
        answer = self.successResultOf(freed)
        self.assertEqual((answer["state"], answer["uncommitted_bytes"]), ("leaving", 0))
        self.assertGreater(answer["drain_bytes"], 0)
        self.refused(lambda: world.group.free("qds0", ""), DegradedError, "checkpoint frees it")
        world.settle()
        self.assertEqual(world.states(), ["free", "free"])

    def test_an_unused_one_is_free_at_once(self) -> None:
        self.world.extend()
        self.world.extend()
        self.assertEqual(self.world.free(path="/near/pool0")["state"], "free")
        self.assertEqual(self.world.states(), ["free", "chained"])
        self.assertEqual(self.world.free()["device"], "/near/pool1")
        self.assertEqual(self.world.states(), ["free", "free"])

    def test_refusals(self) -> None:
        group = self.world.group
        self.refused(lambda: group.extend("qds7", ""), UsageError, "qds7")
        self.refused(lambda: group.extend("qds0", "/else"), UsageError, "/else")
        self.refused(lambda: group.free("qds0", ""), UsageError, "not extended")
        self.world.extend()
        self.refused(lambda: group.extend("qds0", "/near/pool0"), DegradedError, "qds0 has it")
        self.refused(lambda: group.free("qds0", "/near/pool1"), UsageError, "by /near/pool1")
        self.world.extend()
        self.refused(lambda: group.extend("qds0", ""), DegradedError, "no device", "qdsfree")

    def test_fifteen_at_most(self) -> None:
        world = PoolWorld(self, 16)
        world.start()
        for _ in range(15):
            world.extend()
        self.refused(lambda: world.group.extend("qds0", ""), LimitError, "15")
        self.assertEqual(world.states(), ["chained"] * 15 + ["free"])

    def test_a_failing_device_does_no_harm(self) -> None:
        waiting = self.world.fill(self.unit)
        self.world.devices["/near/pool0"].fail("pwritev")
        self.refused(lambda: self.world.group.extend("qds0", ""), QdsError, "/near/pool0")
        self.assertEqual(self.world.states(), ["unusable", "free"])
        self.assertEqual(self.unit.errors, [])
        self.assertFalse(self.world.client.answered(waiting))
        self.world.extend()
        self.assertTrue(self.world.client.answered(waiting))

    def test_a_failed_sync_is_remembered(self) -> None:
        paths = self.world.paths = dataclasses.replace(self.world.paths)
        self.world.latch = FailureLatch(paths.state_file(0), lambda: {"/near/pool1": "EIO"})
        self.world.kill()
        self.world.start()
        self.assertEqual(self.world.states(), ["free", "unusable"])
        self.assertEqual(self.world.devices["/near/pool1"].syncs, 0)

    def test_a_failing_writelog_is_failed(self) -> None:
        """Which layout a crash would leave is not known: nothing is placed any more."""
        self.world.log().fail("fdatasync")
        self.refused(lambda: self.world.group.extend("qds0", ""), DeviceFailedError)
        self.assertIn("failed", self.unit.errors[0])

    def test_bypass_is_not_entered_meanwhile(self) -> None:
        world = PoolWorld(self, stepped=True)
        world.config = dataclasses.replace(world.config, on_overflow="bypass")
        unit = world.start()
        world.write(unit)
        world.settle(5.0)
        deferred = world.group.extend("qds0", "")
        with unit.writelog._holding():
            self.assertFalse(world.client.answered(world.write(unit)))
            self.assertEqual(world.group.bypass.phase, "off")
        world.settle()
        self.successResultOf(deferred)
        self.assertEqual(world.group.bypass.phase, "off")

    def test_an_orderly_stop_in_the_midst(self) -> None:
        world = PoolWorld(self, stepped=True)
        world.start()
        deferred = world.group.extend("qds0", "")
        deferred.addCallback(lambda _: world.group.is_serving)
        stopped = world.group.stop()
        world.settle()
        self.assertTrue(self.successResultOf(deferred), "it did not wait for it")
        self.successResultOf(stopped)
        self.assertTrue(all(device.closed for device in world.devices.values()))
        world.begin()
        world.settle()
        self.assertEqual(world.states(), ["chained", "free"])


class StartTests(SynchronousTestCase):
    """What a crash, or somebody, has left."""

    def setUp(self) -> None:
        self.world = PoolWorld(self)
        self.unit = self.world.start()

    def test_owned_but_in_no_chain(self) -> None:
        PoolDevice.open(self.world.devices["/near/pool0"], 0).own(self.unit.writelog.log)
        self.world.kill()
        self.world.start()
        self.assertEqual(self.world.states(), ["free", "free"])
        self.world.crash(nothing)
        self.assertEqual(read_extension(self.world.devices["/near/pool0"]).log, b"")

    def test_in_a_chain_but_not_owned(self) -> None:
        """Only an older copy of the device is so: the log is refused."""
        self.world.extend()
        PoolDevice.open(self.world.devices["/near/pool0"], 0).own(b"")
        self.world.kill()
        self.failureResultOf(self.world.begin(), CorruptError)
        for path in ("/near/log0", *self.world.pool):
            self.assertTrue(self.world.devices[path].closed, path)

    def test_a_missing_one_that_is_needed(self) -> None:
        self.world.extend()
        self.world.kill()
        del self.world.devices["/near/pool0"]
        error = self.failureResultOf(self.world.begin(), DeviceError).value
        self.assertIn("missing", error.message)

    def test_others_that_cannot_be_used(self) -> None:
        del self.world.devices["/near/pool0"]
        self.world.devices["/near/pool1"].corrupt(0, bytes(2 * max(SLOT_BYTES[:1])))
        self.world.kill()
        self.world.start()
        self.assertEqual(self.world.states(), ["unusable", "unusable"])
        reasons = [row["reason"] for row in self.world.group.status()["pool"]["devices"]]
        self.assertIn("does not exist", reasons[0])
        self.assertIn("no intact", reasons[1])


class CrashTests(SynchronousTestCase):
    """The driver is killed, or the power cut, at every I/O of extending and freeing under load."""

    def test_at_every_io(self) -> None:
        crashes = changes = 0
        for seed in range(2):
            run = Run(self, seed)
            run.go()
            crashes += run.crashes
            changes += run.changes
        self.assertGreater(crashes, 60)
        self.assertGreater(changes, 20)


def copied(device: MemoryDevice) -> MemoryDevice:
    """Give a device as it is now, cache and all, and leave it to its user."""
    copy = type(device)(
        device.size,
        path=device.path,
        role=device.role,
        logical_block=device.logical_block,
        content=device.durable(),
    )
    copy._seen[:] = device.content()
    copy.unsynced = list(device.unsynced)
    return copy


class Run:
    """Random writes, extending, freeing, and commits; recovery from a copy at each I/O."""

    def __init__(self, test: SynchronousTestCase, seed: int) -> None:
        self.test = test
        self.random = random.Random(seed)
        self.world = PoolWorld(test, 3, ldsus=2, stepped=True, size=64 * KIB)
        self.crashes = self.changes = 0
        self.asked: list[tuple[int, int, Any]] = []
        #: By LDSU and offset, the newest number whose write was answered as durable.
        self.floor: dict[tuple[int, int], int] = {}
        self.newest: dict[tuple[int, int], int] = {}
        self._recovering = False
        self.failures: list[BaseException] = []

    def go(self) -> None:
        started = self.world.begin()
        self.world.settle()
        self.test.successResultOf(started)
        self.world.attach()
        for device in self.world.devices.values():
            self._watch(device)
        for _ in range(90):
            self._act()
            self._note()
            if self.failures:
                raise self.failures[0]

    def _watch(self, device: MemoryDevice) -> None:
        for name in ("pwritev", "fdatasync"):
            method = getattr(device, name)

            def watched(*args: Any, method: Callable[..., Any] = method) -> Any:
                group = self.world.group
                if any(map(group.extensions.changes, group.units)) or (
                    "leaving" in self.world.states() and self.random.random() < 0.1
                ):
                    self._crash()
                return method(*args)

            setattr(device, name, watched)

    def _act(self) -> None:
        group, world = self.world.group, self.world
        what = self.random.random()
        unit = self.random.choice(group.units)
        if what < 0.5:
            for _ in range(self.random.randrange(1, 12)):
                self._write(unit)
        elif what < 0.8:
            call = group.extend if self.random.random() < 0.5 else group.free
            try:
                call(unit.name, "").addErrback(lambda failure: failure.trap(DegradedError))
                self.changes += 1
            except (DegradedError, UsageError):
                pass
        elif what < 0.9:
            world.attach()
            world.commit()
        for worker in list(world.steps.values()):
            for _ in range(self.random.randrange(4)):
                worker.step()
        if self.random.random() < 0.2:
            world.settle(2.0)

    def _write(self, unit: DriverUnit) -> None:
        self.world.count += 1
        number, offset = self.world.count, self.random.randrange(unit.size // BLOCK) * BLOCK
        self.newest[unit.index, offset] = number
        fua = self.random.random() < 0.5
        request = self.world.client.write(unit, offset, unique(number), fua)
        if fua:
            self.asked.append((unit.index, number, request))

    def _note(self) -> None:
        done = set(map(id, self.world.client.done))
        for index, number, request in self.asked:
            if id(request) in done:
                key = (index, request.offset)
                self.floor[key] = max(number, self.floor.get(key, 0))
        self.asked = [one for one in self.asked if id(one[2]) not in done]

    def _crash(self) -> None:
        if self._recovering:
            return
        self._recovering = True
        try:
            self._recover()
        except BaseException as error:  # noqa: BLE001 - a worker would take it for its job's
            self.failures.append(error)
        self._recovering = False

    def _recover(self) -> None:
        self._note()
        self.crashes += 1
        kill, choose = self.random.random() < 0.3, at_random(self.random)
        found = PoolWorld(self.test, 3, ldsus=2, size=64 * KIB)
        found.devices = {path: copied(one) for path, one in self.world.devices.items()}
        for index in range(2):
            data = found.devices[f"/near/data{index}"]
            assert isinstance(data, WatchedDevice)
            data.log = found._watched(index)
        found.devices = {
            path: found._again(one, one.reopen() if kill else one.crash(choose))
            for path, one in found.devices.items()
        }
        self._check(found)

    def _check(self, found: PoolWorld) -> None:
        found.start()
        for (index, offset), newest in self.newest.items():
            data = found.data(index).content()[offset : offset + BLOCK]
            number = int(data[:16]) if data[:16].strip(b"\0") else 0
            self.test.assertTrue(self.floor.get((index, offset), 0) <= number <= newest)
        chained = [
            one.device.path for unit in found.group.units
            for one in unit.writelog.extensions.values()
        ]  # fmt: skip
        self.test.assertEqual(len(chained), len(set(chained)))
        for path, state in zip(found.pool, found.states(), strict=True):
            self.test.assertIn(state, ("chained", "leaving") if path in chained else ("free",))
        # All of it can be freed and used again.
        found.attach()
        found.drain()
        for unit in found.group.units:
            while any(not one.leaving for one in unit.writelog.superblock.extensions):
                found.free(unit.name)
        for unit in found.group.units:
            found.write(unit)
        found.attach()
        found.drain()
        self.test.assertEqual(found.states(), ["free"] * 3)
        for _ in range(3):
            found.extend("qds1")
        found.kill()
        found.start()
        self.test.assertEqual(found.states(), ["chained"] * 3)
        found.close()


class SiteTests(TestCase):
    """Both sites: the log is extended while the link is down, and freed when it is back."""

    timeout = 300

    def make(self) -> Sites:
        sites = Sites(self, ldsus=1, writelog=512 * KIB)
        paths = tuple(str(sites.base / f"pool{number}") for number in range(3))
        sites.config = dataclasses.replace(sites.config, pool=paths)
        for path in paths:
            with open(path, "wb") as file:
                file.truncate(512 * KIB)
            device = open_device(path, writable=True)
            PoolDevice.initialise(device, 0)
            device.close()
        return sites

    @inlineCallbacks
    def test_an_outage(self) -> Steps:
        sites = self.make()
        yield sites.start()
        yield sites.connected()
        yield sites.refresh()
        yield sites.stop_rmd()
        yield sites.until(lambda: "accumulating" in sites.modes(), "the outage")
        group = sites.driver
        assert group is not None
        number, before = 0, sites.unit(0).writelog.ring.size
        for _ in range(3):
            waiting: Any = None
            while waiting is None or sites.client.answered(waiting):
                number += 1
                waiting = sites.write(0, number * BLOCK % sites.size, unique(number))
                yield sites.until(
                    lambda one=waiting: sites.client.answered(one) or is_full(sites),
                    "an answer, or a full log",
                )
            yield group.extend("qds0", "")
            yield sites.until(lambda one=waiting: sites.client.answered(one), "room")
        self.assertGreater(sites.unit(0).writelog.used_bytes, 5 * before // 2)
        yield sites.start_rmd()
        freed = 0
        while freed < 3:
            try:
                yield group.free("qds0", "")
                freed += 1
            except DegradedError:
                # As long as what is left would not hold what the log holds.
                yield deferLater(reactor, 0.01)
        yield sites.drained()
        yield sites.until(lambda: group.status()["pool"]["free"] == 3, "the extensions to be free")
        sites.write(0, 0, unique(number + 1))
        yield sites.drained()
        sites.assert_equal()
        self.assertEqual(sites.client.errors, {})


def is_full(sites: Sites) -> bool:
    """Tell whether the writelog has no room for another write, and nobody frees any."""
    unit = sites.unit(0)
    return bool(unit.waiting) and not unit.appending and unit.writelog.free_bytes < 3 * BLOCK
