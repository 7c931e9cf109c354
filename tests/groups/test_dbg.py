"""A secondary that is replaced: a refresh does not count what only the old one held (COHERENT)."""

from __future__ import annotations

from twisted.internet.defer import inlineCallbacks
from twisted.trial.unittest import TestCase

from qdsmirror.groups import primary as primary_module
from tests.groups.site import MIB, Sites, Steps

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
        try:
            yield sites.until(lambda: driver.coherent, "the end of the refresh")
        except AssertionError:
            j=driver.refresh_job; print("JOB", j is job, j._phase, j._reading, j._poking, j._retry, j.begun.called, j.cut, j._mark and j._mark.gsn_last, driver.durable_gsn, driver.may_frame, [u.is_locked for u in driver.units], sites.pmd._refresh)
            raise
        yield sites.drained()
        sites.assert_equal()
        rmd = sites.rmd
        assert rmd is not None and rmd.mirror is not None
        self.assertTrue(rmd.mirror.journal.superblock.coherent)
        self.assertNotEqual(begun["id"], "")

    @inlineCallbacks
    def test_a_blank_secondary_is_no_coherent_mirror(self) -> Steps:
        self.patch(primary_module, "REFUSED_RETRY_SECONDS", 0.1)
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
