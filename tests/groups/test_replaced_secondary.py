"""A secondary that is replaced: a refresh does not count what only the old one held (COHERENT)."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import SynchronousTestCase, TestCase

from qdsmirror.errors import DegradedError, DeviceFailedError, ProtocolError
from qdsmirror.groups import retry as retry_module
from qdsmirror.groups.attachment import Attachment, DriverEnd
from qdsmirror.groups.remote import RemoteGroup
from qdsmirror.net.handshake import RebasePosition
from tests.fakes import nothing
from tests.groups.site import MIB, Sites, Steps
from tests.groups.test_holding import HoldingWorld
from tests.groups.test_remote import JOURNAL, MIRROR
from tests.groups.world import unique
from tests.storage.logworld import GENERATION, OTHER_GENERATION

BLOCK = 4096


class ReplacedSecondaryTests(TestCase):
    timeout = 300

    def blank(self, sites: Sites) -> None:
        sites.initialise_journal()
        for index in range(2):
            (sites.base / f"mirror{index}").write_bytes(bytes(sites.size))

    @inlineCallbacks
    def test_a_refresh_begins_anew_for_another_secondary(self) -> Steps:
        sites = Sites(self, size=8 * MIB, writelog=MIB)
        yield sites.start()
        yield sites.connected()
        content = bytes(range(256)) * 16
        for index in range(2):
            for number in range(0, sites.size // BLOCK, 16):
                sites.write(index, number * BLOCK, content)
        yield sites.drained()
        driver = sites.driver
        assert driver is not None
        begun = yield driver.refresh("full")
        job = driver.refresh_job
        assert job is not None
        yield sites.until(lambda: job.status()["done_bytes"] > MIB, "some progress")
        yield sites.stop_rmd()
        self.assertIs(driver.refresh_job, job)
        self.blank(sites)
        yield sites.start_rmd()
        yield sites.until(lambda: driver.coherent, "the end of the refresh")
        yield sites.drained()
        sites.assert_equal()
        rmd = sites.rmd
        assert rmd is not None and rmd.mirror is not None
        self.assertTrue(rmd.mirror.journal.superblock.coherent)
        self.assertNotEqual(begun["id"], "")

    @inlineCallbacks
    def test_a_blank_secondary_is_no_coherent_mirror(self) -> Steps:
        self.patch(retry_module, "REFUSED_RETRY_SECONDS", 0.1)
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        sites.write(0, 0, b"x" * BLOCK)
        yield sites.refresh()
        yield sites.stop_rmd()
        self.blank(sites)
        yield sites.start_rmd()
        driver = sites.driver
        assert driver is not None
        yield sites.until(lambda: not driver.coherent, "the loss of coherence")
        self.assertEqual(driver.status()["pmd"]["code"], 4)
        # Durably: the next driver knows it too.
        yield sites.stop_pmd()
        yield sites.stop_driver()
        yield sites.start_driver()
        assert sites.driver is not None
        self.assertFalse(sites.driver.coherent)

    @inlineCallbacks
    def test_nothing_is_replaced_that_the_driver_does_not_know(self) -> Steps:
        """The driver lets go of the pmd with what was said unread: the next pmd says it again."""
        real = Attachment.said_link
        heard: list[DriverEnd] = []

        def said_link(pmd: Attachment, end: DriverEnd, link: dict[str, Any]) -> None:
            if not link.get("rebased") or heard:
                real(pmd, end, link)
                return
            heard.append(end)
            end.close()

        begun: list[Any] = []

        def rebase(rmd: RemoteGroup, positions: Any) -> Any:
            driver = sites.driver
            begun.append(driver is not None and driver.answering._skipping)
            return real_rebase(rmd, positions)

        real_rebase = RemoteGroup.rebase
        sites = Sites(self, size=MIB, writelog=MIB)
        yield sites.start()
        yield sites.connected()
        sites.write(0, 0, b"x" * BLOCK)
        yield sites.drained()
        yield sites.stop_rmd()
        self.blank(sites)
        driver = sites.driver
        assert driver is not None
        self.patch(Attachment, "said_link", said_link)
        self.patch(RemoteGroup, "rebase", rebase)
        yield driver.refresh("full")
        yield sites.start_rmd()
        yield sites.until(lambda: driver.coherent, "the end of the refresh")
        self.assertEqual((len(heard), begun), (1, [True]))
        yield sites.drained()
        sites.assert_equal()


class RebaseTests(SynchronousTestCase):
    """A history is replaced when nothing of the old one is under way any more."""

    def setUp(self) -> None:
        self.world = HoldingWorld(self)

    def rebase(self) -> Deferred[None]:
        """Have the history replaced by one that begins with GSN 20."""
        positions = [
            RebasePosition(index, OTHER_GENERATION, GENERATION, 9, b"C" * 16, 20, b"R" * 16)
            for index in range(2)
        ]
        done: Deferred[None] = self.world.group.rebase(positions)
        return done

    def assert_begun(self) -> None:
        """It begins at the new place, and nowhere else."""
        found = self.world.superblock
        self.assertEqual(found.generation, OTHER_GENERATION)
        self.assertEqual((found.applied.gsn, found.tail.gsn, found.head.gsn), (20, 20, 20))
        self.assertFalse(found.coherent)
        self.assertEqual(self.world.reached, (19, 19))

    def test_no_checkpoint_is_taken_of_the_old_one_meanwhile(self) -> None:
        """It would bring the old place back, under the new history's name."""
        world = self.world
        world.write(2)
        world.group.supersede()
        done = self.rebase()
        committing = world.group.committing
        assert committing is not None
        quiet = committing.quiet()
        told = world.switch("on", "late")
        self.assertNoResult(told)
        self.assertNoResult(quiet)
        world.settle()
        self.successResultOf(done)
        self.successResultOf(quiet)
        error = self.failureResultOf(told, DegradedError).value
        self.assertIn("a refresh is in progress", error.message)
        self.assertIsNone(world.held)
        self.assert_begun()

    def test_it_waits_for_no_checkpoint_that_has_come_first(self) -> None:
        world = self.world
        world.write(2)
        told = world.switch("on", "first")
        world.group.supersede()
        done = self.rebase()
        self.assertNoResult(done)
        world.settle()
        self.successResultOf(told)
        error = self.failureResultOf(done, ProtocolError).value
        self.assertIn("first holds", error.message)
        self.assertEqual(world.superblock.generation, GENERATION)
        self.assertEqual(world.reached, (2, 2))

    def test_a_superblock_that_is_due_does_not_bring_the_old_place_back(self) -> None:
        world = self.world
        world.write(2)
        world.group.supersede()
        done = self.rebase()
        world.reactor.advance(world.group.config.tunables.metadata_seconds)
        world.settle()
        self.successResultOf(done)
        self.assert_begun()

    def test_another_connection_comes_while_it_waits(self) -> None:
        world, group = self.world, self.world.group
        world.deliver(world.link, world.frame())
        world.step(JOURNAL)
        group.supersede()
        done = self.rebase()
        group.supersede()
        newer = self.rebase()
        world.settle()
        error = self.failureResultOf(done, ProtocolError).value
        self.assertIn("another connection", error.message)
        self.successResultOf(newer)
        self.assert_begun()

    def test_a_stop_waits_for_it(self) -> None:
        world, group = self.world, self.world.group
        world.write(1)
        group.supersede()
        done = self.rebase()
        stopped = group.stop()
        self.assertNoResult(stopped)
        world.settle()
        self.successResultOf(done)
        self.successResultOf(stopped)
        world.devices = {path: device.reopen() for path, device in world.devices.items()}
        world.start()
        self.assert_begun()

    def test_none_begins_once_it_stops(self) -> None:
        world, group = self.world, self.world.group
        world.deliver(world.link, world.frame())
        world.step(JOURNAL)
        group.supersede()
        stopped = group.stop()
        done = self.rebase()
        world.settle()
        self.failureResultOf(done, ProtocolError)
        self.successResultOf(stopped)
        world.devices = {path: device.reopen() for path, device in world.devices.items()}
        self.assertEqual(world.superblock.generation, GENERATION)

    def test_none_begins_where_a_device_fails_before(self) -> None:
        world, group = self.world, self.world.group
        world.deliver(world.link, world.frame())
        world.step(JOURNAL)
        group.supersede()
        done = self.rebase()
        world.devices["/far/mirror0"].fail("pwritev")
        world.settle()
        self.failureResultOf(done, DeviceFailedError)
        self.assertEqual(world.superblock.generation, GENERATION)

    def test_what_is_being_applied_comes_first(self) -> None:
        world, group = self.world, self.world.group
        world.deliver(world.link, world.frame())
        world.step(JOURNAL)
        self.assertEqual(len(world.steps[MIRROR].waiting), 1)
        group.supersede()
        done = self.rebase()
        self.assertNoResult(done)
        world.step(MIRROR)
        self.assertNoResult(done)
        self.assertEqual(world.superblock.generation, GENERATION)
        world.step(MIRROR)
        self.successResultOf(done)
        self.assertEqual(world.block(0, 1), unique(1))
        world.settle()
        world.reactor.advance(group.config.tunables.metadata_seconds)
        world.settle()
        # The old history's end does not come back.
        self.assertEqual(world.reached, (19, 19))
        self.assertEqual(world.superblock.generation, OTHER_GENERATION)
        self.assertEqual(world.superblock.applied.gsn, 20)
        world.crash(nothing)
        self.assertEqual(world.start().position(0).next_sequence, 9)
