"""Who wrote to a data device behind the driver's back is found out, and so is another device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from twisted.internet.defer import inlineCallbacks
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase, TestCase

from qdsmirror.core.superblock import Superblock
from qdsmirror.errors import DeviceFailedError, MismatchError
from qdsmirror.groups import retry as retry_module
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.superblock import read_superblock
from qdsmirror.storage.writelog import Writelog
from tests.fakes import MemoryDevice, everything, nothing
from tests.groups.site import MIB, Sites, Steps
from tests.groups.world import BLOCK, DriverWorld, durable_superblock, unique

SIZE = 8 * MIB


class Interrupted(BaseException):
    """The power is cut here."""


class DataDeviceTests(SynchronousTestCase):
    def world(self, **options: Any) -> DriverWorld:
        """Make a group with a coherent mirror, its driver started and stopped once."""
        world = DriverWorld(self, size=SIZE, **options)
        for ldsu in world.config.ldsus:
            self.update(world, ldsu.index, coherent=True, reason="")
        unit = world.start()
        world.client.write(unit, 3 * MIB, unique(1))
        self.stop(world)
        return world

    def update(self, world: DriverWorld, index: int, **changes: Any) -> None:
        Writelog.open(world._open(f"/near/log{index}")).update(both=True, **changes)

    def stop(self, world: DriverWorld) -> None:
        stopped = world.group.stop()
        world.settle()
        self.successResultOf(stopped)

    def superblock(self, world: DriverWorld, index: int = 0) -> Superblock:
        return durable_superblock(world.log(index).durable())

    def test_unchanged(self) -> None:
        world = self.world()
        self.assertIn("0", self.superblock(world).fingerprints or {})
        world.start()
        self.assertTrue(world.group.coherent)
        self.assertIsNone(self.superblock(world).fingerprints)
        self.stop(world)

    def test_a_change_is_told_and_the_mirror_incoherent(self) -> None:
        for at, words in ((5, "bytes 0 to 1048575"), (3 * MIB + 5, "bytes 3145728 to 3211263")):
            world = self.world()
            world.data().corrupt(at, b"X")
            unit = world.start()
            self.assertFalse(world.group.coherent)
            self.assertIn("data device /near/data0", world.group.reason)
            self.assertIn(words, world.group.reason)
            durable = self.superblock(world)
            self.assertEqual((durable.coherent, durable.fingerprints), (False, None))
            self.assertIn(words, durable.reason)
            # It serves.
            there = world.data().content()[3 * MIB :][:BLOCK]
            self.assertEqual(world.client.read(unit, 3 * MIB, BLOCK), there)
            self.stop(world)
            # What is there now is known, but the mirror stays what it is.
            world.start()
            self.assertFalse(world.group.coherent)
            self.assertIn(words, world.group.reason)
            self.stop(world)

    def test_the_log_names_it_as_an_error(self) -> None:
        world = self.world()
        world.data().corrupt(5, b"X")
        events: list[Any] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        world.start()
        told = [e["text"] for e in events if e["log_level"].name == "error" and "text" in e]
        self.assertEqual(len(told), 1)
        self.assertIn("qdsrefresh -g 0 --full", told[0])
        self.stop(world)

    def test_all_ldsus_learn_of_a_change_in_one(self) -> None:
        world = self.world(ldsus=2)
        world.data(1).corrupt(5, b"X")
        world.start()
        for index in range(2):
            self.assertIn("/near/data1", self.superblock(world, index).reason)
        self.stop(world)

    def test_a_refresh_that_may_have_read_what_was_changed_does_not_count(self) -> None:
        world = DriverWorld(self, size=SIZE)
        world.start()
        world.group.refresh("full")
        self.assertIsNotNone(world.group.refresh_job)
        self.stop(world)
        world.data().corrupt(5, b"X")
        world.start()
        self.assertIsNone(world.group.refresh_job)
        self.assertFalse(world.group.coherent)
        self.stop(world)

    def test_nothing_is_claimed_after_a_crash(self) -> None:
        for choose in (nothing, everything):
            world = self.world()
            world.start()
            world.crash(choose)
            self.assertIsNone(read_superblock(world.log()).fingerprints)
            world.data().corrupt(5, b"X")
            world.start()
            self.assertTrue(world.group.coherent)
            self.stop(world)

    def test_a_crash_at_every_write_of_the_start(self) -> None:
        """However far it came, a change before is found, and none is made up."""
        for changed in (False, True):
            for after in range(20):
                world = self.world(ldsus=2)
                if changed:
                    world.data(1).corrupt(5, b"X")
                ended = self.interrupt(world, after)
                world.crash(nothing if after % 2 else everything)
                world.start()
                self.assertEqual(world.group.coherent, not changed, (changed, after))
                self.stop(world)
                world.close()
                if ended:
                    break
            self.assertTrue(ended)

    def interrupt(self, world: DriverWorld, after: int) -> bool:
        """Start until so many syncs are done; tell whether the start came to its end."""
        left = after

        def cut(device: MemoryDevice) -> None:
            synced = device.fdatasync

            def fdatasync() -> None:
                nonlocal left
                if left == 0:
                    raise Interrupted
                left -= 1
                synced()

            device.fdatasync = fdatasync  # type: ignore[method-assign]

        opened = world._open

        def open_device(path: str, **more: Any) -> MemoryDevice:
            device = opened(path, **more)
            cut(device)
            return device

        world._open = open_device  # type: ignore[method-assign]
        started = world.begin()
        del world._open  # type: ignore[method-assign]
        done = not isinstance(getattr(started.result, "value", None), Interrupted)
        if not done:
            self.failureResultOf(started, Interrupted)
        return done

    def test_no_first_write_before_the_fingerprints_are_gone(self) -> None:
        world = self.world()
        unit = world.start()
        self.assertIsNone(self.superblock(world).fingerprints)
        world.client.write(unit, 0, unique(9))
        world.crash(everything)
        world.start()
        self.assertTrue(world.group.coherent)
        self.stop(world)

    def test_none_are_left_of_a_device_that_failed_in_between(self) -> None:
        # As qdswlscan(1) may find: the writelog may be written to from now on.
        world = self.world(ldsus=2)
        world.latch = FailureLatch(Path(self.mktemp()))
        world.latch.record("/near/data0", DeviceFailedError("a sync failed", path="/near/data0"))
        world.start()
        self.assertTrue(world.group.units[0].dead)
        for index in range(2):
            self.assertIsNone(self.superblock(world, index).fingerprints, index)

    def test_none_for_an_ldsu_that_failed(self) -> None:
        for method in ("pwritev", "fdatasync"):
            world = DriverWorld(self, size=SIZE, ldsus=2)
            unit = world.start()
            world.data(0).fail(method)
            world.client.write(unit, 0, unique(1))
            self.stop(world)
            self.assertIsNone(self.superblock(world, 0).fingerprints)
            self.assertIsNotNone(self.superblock(world, 1).fingerprints, method)

    def test_one_that_cannot_be_recorded_does_not_keep_the_others_from_it(self) -> None:
        world = DriverWorld(self, size=SIZE, ldsus=2)
        world.start()
        world.data(0).fail("pread")
        self.stop(world)
        self.assertIsNone(self.superblock(world, 0).fingerprints)
        self.assertIsNotNone(self.superblock(world, 1).fingerprints)

    # -- identity -------------------------------------------------------------------------------

    def bind(self, world: DriverWorld, *names: str) -> None:
        for index, name in enumerate(names):
            world.data(index).stable = name
            unit = self.superblock(world, index).units[0]
            self.update(world, index, units=(replace(unit, identity=name),))

    def test_the_first_start_binds_what_has_an_identity(self) -> None:
        world = self.world()
        world.data().stable = "wwid:naa.5"
        world.start()
        self.assertEqual(self.superblock(world).units[0].identity, "wwid:naa.5")
        self.stop(world)

    def test_another_device_is_refused_and_nothing_written(self) -> None:
        world = DriverWorld(self, size=SIZE)
        self.bind(world, "wwid:naa.5 serial:A")
        world.data().stable = "wwid:naa.6 serial:A"
        before = world.log().content()
        error = self.failureResultOf(world.begin(), MismatchError).value
        for words in ("/near/data0", "naa.5", "naa.6", "qds0"):
            self.assertIn(words, error.message)
        self.assertIn("qdswlinit -g 0 --yes, then qdsrefresh -g 0 --full", error.hint)
        self.assertEqual(world.log().content(), before)

    def test_the_same_content_under_another_identity_is_accepted(self) -> None:
        world = self.world()
        self.bind(world, "wwid:naa.5")
        world.data().stable = "wwid:naa.6"
        world.start()
        self.assertTrue(world.group.coherent)
        self.assertEqual(self.superblock(world).units[0].identity, "wwid:naa.6")
        self.stop(world)

    def test_another_device_with_other_content_is_refused(self) -> None:
        world = self.world()
        self.bind(world, "wwid:naa.5")
        world.data().stable = "wwid:naa.6"
        world.data().corrupt(0, b"X")
        self.failureResultOf(world.begin(), MismatchError)
        self.assertIsNotNone(self.superblock(world).fingerprints)

    def test_swapped_devices_are_told_by_whose_they_are(self) -> None:
        world = DriverWorld(self, size=SIZE, ldsus=2)
        world.start()
        self.stop(world)
        self.bind(world, "serial:A", "serial:B")
        world.data(0).stable, world.data(1).stable = "serial:B", "serial:A"
        error = self.failureResultOf(world.begin(), MismatchError).value
        self.assertIn("the one of qds1", error.message)

    def test_an_identity_that_cannot_be_told_is_no_other(self) -> None:
        world = DriverWorld(self, size=SIZE)
        self.bind(world, "serial:A")
        world.data().stable = ""
        world.start()
        self.assertEqual(self.superblock(world).units[0].identity, "serial:A")
        self.stop(world)


class MirrorDeviceTests(TestCase):
    timeout = 300

    @inlineCallbacks
    def test_a_mirror_that_was_written_to_takes_nothing_but_a_refresh(self) -> Steps:
        self.patch(retry_module, "REFUSED_RETRY_SECONDS", 0.1)
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        yield sites.refresh()
        sites.write(0, 0, b"x" * BLOCK)
        yield sites.drained()
        yield sites.stop_rmd()
        with (sites.base / "mirror1").open("r+b") as file:
            file.seek(MIB // 2)
            file.write(b"X")
        yield sites.start_rmd()
        rmd, driver = sites.rmd, sites.driver
        assert rmd is not None and rmd.mirror is not None and driver is not None
        known = rmd.mirror.journal.superblock
        self.assertFalse(known.coherent)
        self.assertIn(f"{sites.base}/mirror1 (bytes 0 to {MIB - 1})", known.reason)
        yield sites.until(lambda: driver.pmd.link["code"] == 4, "the refusal")
        yield sites.until(lambda: not driver.coherent, "the primary's knowledge")
        yield sites.refresh()
        yield sites.drained()
        sites.assert_equal()
        self.assertTrue(rmd.mirror.journal.superblock.coherent)

    @inlineCallbacks
    def test_a_mirror_that_was_left_alone_goes_on(self) -> Steps:
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        yield sites.refresh()
        yield sites.stop_rmd()
        sites.write(0, 0, b"y" * BLOCK)
        yield sites.start_rmd()
        yield sites.drained()
        sites.assert_equal()
        driver, rmd = sites.driver, sites.rmd
        assert rmd is not None and rmd.mirror is not None and driver is not None
        self.assertTrue(driver.coherent)
        self.assertIsNone(rmd.mirror.journal.superblock.fingerprints)
