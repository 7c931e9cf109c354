"""A secondary that is replaced: a refresh does not count what only the old one held (COHERENT)."""

from __future__ import annotations

from twisted.internet.defer import inlineCallbacks
from twisted.trial.unittest import SynchronousTestCase, TestCase

from qdsmirror.groups import retry as retry_module
from qdsmirror.net.handshake import RebasePosition
from tests.fakes import nothing
from tests.groups.site import MIB, Sites, Steps
from tests.groups.test_remote import JOURNAL, MIRROR, RemoteWorld
from tests.groups.world import unique
from tests.storage.logworld import GENERATION, OTHER_GENERATION

BLOCK = 4096


class ReplacedSecondaryTests(TestCase):
    timeout = 60

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


class RebaseTests(SynchronousTestCase):
    """A history is replaced when nothing of the old one is under way any more."""

    def test_what_is_being_applied_comes_first(self) -> None:
        world = RemoteWorld(self)
        group = world.start()
        world.deliver(world.connect(), world.frame())
        world.step(JOURNAL)
        self.assertEqual(len(world.steps[MIRROR].waiting), 1)
        group.supersede()
        done = group.rebase(
            [
                RebasePosition(
                    index=index,
                    generation=OTHER_GENERATION,
                    predecessor=GENERATION,
                    next_sequence=9,
                    chain=b"C" * 16,
                    next_gsn=20,
                    refresh_id=b"R" * 16,
                )
                for index in range(2)
            ]
        )
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
