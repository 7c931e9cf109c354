"""Driver, pmd and rmd of a group together: the link cut anywhere, refreshes, refusals."""

from __future__ import annotations

import random
from collections.abc import Generator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import TestCase

from qdsmirror import limits
from qdsmirror.core.frames import REFRESH, REFRESH_ZEROES
from qdsmirror.errors import DegradedError, UsageError
from qdsmirror.groups import committing as committing_module
from qdsmirror.groups import retry as retry_module
from tests.groups.site import Sites
from tests.groups.world import BLOCK, KIB, MIB, unique

Steps = Generator[Deferred[Any], Any, None]


class LinkTests(TestCase):
    """Nothing lost, nothing doubled, whatever happens to the link."""

    timeout = 300

    @inlineCallbacks
    def test_writes_reach_the_mirror(self) -> Steps:
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        yield sites.refresh()
        for number in range(200):
            sites.write(number % 2, number * BLOCK % MIB, unique(number))
        yield sites.drained()
        sites.assert_equal()
        self.assertEqual(sites.client.errors, {})

    @inlineCallbacks
    def test_link_cut_at_any_byte_loses_and_doubles_nothing(self) -> Steps:
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        chooser = random.Random(5)
        mirrored = []
        apply = sites.rmd.mirror.apply  # type: ignore[union-attr]

        def keep(changes: Any) -> Any:
            mirrored.extend(change.header.gsn_first for change in changes)
            return apply(changes)

        sites.rmd.mirror.apply = keep  # type: ignore[union-attr, method-assign]
        number = 0
        # First through the handshake in small steps, then anywhere in a stream of frames.
        for budget in [*range(1, 9000, 450), *(chooser.randrange(200_000) for _ in range(25))]:
            sites.cable.budget = budget
            for _ in range(budget // 5000 + 3):
                number += 1
                sites.write(number % 2, chooser.randrange(256) * BLOCK, unique(number))
            yield sites.until(
                lambda: sites.cable.budget is None or sites.is_drained(), "a cut, or all mirrored"
            )
        sites.cable.budget = None
        yield sites.drained()
        sites.assert_equal()
        self.assertEqual(mirrored, sorted(set(mirrored)))
        self.assertGreater(sites.cable.made, 20)
        self.assertEqual(sites.client.errors, {})

    @inlineCallbacks
    def test_every_daemon_may_come_and_go(self) -> Steps:
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        yield sites.refresh()
        number = 0
        for stop, start in (
            (sites.stop_rmd, sites.start_rmd),
            (sites.stop_pmd, sites.start_pmd),
            (sites.stop_driver, sites.start_driver),
        ) * 2:
            for _ in range(50):
                number += 1
                sites.write(number % 2, number * BLOCK % MIB, unique(number))
            yield stop()
            if sites.driver is not None:
                yield sites.until(lambda: "accumulating" in sites.modes(), "the loss to be seen")
                sites.write(0, 0, unique(number + 1000))
            yield start()
            yield sites.connected()
        yield sites.drained()
        sites.assert_equal()

    @inlineCallbacks
    def test_accumulated_writes_are_sent_when_the_secondary_comes(self) -> Steps:
        sites = Sites(self)
        yield sites.start_driver()
        yield sites.start_pmd()
        for number in range(100):
            sites.write(number % 2, number * BLOCK, unique(number))
        yield sites.until(lambda: len(sites.client.done) == 100, "answers")
        self.assertEqual(sites.driver.status()["state"], "accumulating")  # type: ignore[union-attr]
        yield sites.start_rmd()
        yield sites.drained()
        sites.assert_equal()

    @inlineCallbacks
    def test_full_journal_presses_back_and_goes_on(self) -> Steps:
        self.patch(committing_module, "RECEIVED_BYTES_MAX", 128 * KIB)
        sites = Sites(self, journal=3 * MIB, size=8 * MIB, writelog=16 * MIB)
        yield sites.start()
        yield sites.connected()
        rmd = sites.rmd
        assert rmd is not None and rmd.committing is not None
        committing = rmd.committing
        committing.mirroring.running = True  # the mirror devices do not keep up
        for number in range(1500):
            sites.write(number % 2, number * BLOCK, unique(number))
        yield sites.until(lambda: committing._journal_full and rmd._paused, "a full journal")
        self.assertLess(committing.received_bytes, 128 * KIB + limits.SEND_BUFFER_BYTES)
        self.assertEqual(len(sites.client.done), 1500)
        committing.mirroring.running = False
        committing.mirroring.go_on()
        yield sites.drained()
        sites.assert_equal()

    @inlineCallbacks
    def test_frame_that_no_journal_of_this_size_takes_is_refused_by_name(self) -> Steps:
        sites = Sites(self, journal=512 * KIB, writelog=16 * MIB)
        yield sites.start()
        yield sites.connected()
        driver = sites.driver
        assert driver is not None
        sites.write(0, 0, b"".join(unique(number) for number in range(200)))
        yield sites.until(lambda: "too small" in driver.status()["reason"], "the reason")
        self.assertIn(f"journal {sites.base}/journal", driver.status()["reason"])
        self.assertEqual(sites.mirror(0), bytes(MIB))

    @inlineCallbacks
    def test_small_window_goes_on(self) -> Steps:
        sites = Sites(self, tunables="send_window = 1M", size=4 * MIB, writelog=16 * MIB)
        yield sites.start()
        yield sites.connected()
        for number in range(1000):
            sites.write(number % 2, number * BLOCK, unique(number))
        yield sites.drained()
        sites.assert_equal()

    @inlineCallbacks
    def test_newer_session_supersedes_the_older(self) -> Steps:
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        old = sites.rmd._link  # type: ignore[union-attr]
        epoch = sites.rmd.epoch  # type: ignore[union-attr]
        first, sites.pmd = sites.pmd, None
        yield sites.start_pmd()
        yield sites.until(
            lambda: sites.rmd._link not in (None, old),  # type: ignore[union-attr]
            "the second session",
        )
        self.assertGreater(sites.rmd.epoch, epoch)  # type: ignore[union-attr]
        yield first.stop()  # type: ignore[union-attr]
        yield sites.connected()
        sites.write(0, 0, unique(1))
        yield sites.drained()
        sites.assert_equal()

    @inlineCallbacks
    def test_rmd_replays_what_its_journal_holds(self) -> Steps:
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        rmd = sites.rmd
        assert rmd is not None and rmd.committing is not None
        committing = rmd.committing
        # The frames get into the journal and are acknowledged, but not onto the mirror.
        committing.mirroring.running = True
        for number in range(20):
            sites.write(number % 2, number * BLOCK, unique(number))
        driver = sites.driver
        assert driver is not None
        yield sites.until(lambda: driver.committed_gsn == 20, "the commit")
        self.assertEqual(sites.mirror(0), bytes(MIB))
        committing._timer.cancel()
        sites.rmd = None
        sites.cable.cut()
        yield committing._journal_worker.stop()
        yield committing._mirror_worker.stop()
        committing.mirror.close()
        yield sites.stop_pmd()
        yield sites.start_rmd()
        self.assertEqual(sites.rmd.committing.mirrored_gsn, 20)  # type: ignore[union-attr]
        sites.assert_equal()


class RefreshTests(TestCase):
    """A full refresh between writes that go on."""

    timeout = 300

    @inlineCallbacks
    def fill(self, sites: Sites) -> Steps:
        """Give the data devices a content that no log knows."""
        for index in range(sites.ldsus):
            content = random.Random(index).randbytes(sites.size // 2)
            (sites.base / f"data{index}").write_bytes(content + bytes(sites.size // 2))
        yield sites.start()

    @inlineCallbacks
    def test_writes_go_on_and_the_log_never_overflows(self) -> Steps:
        sites = Sites(self, size=3 * MIB, writelog=MIB, journal=MIB)
        yield self.fill(sites)
        yield sites.connected()
        driver = sites.driver
        assert driver is not None
        begun = yield driver.refresh("full")
        self.assertEqual(begun["kind"], "full")
        self.assertEqual(driver.status()["state"], "refresh")
        yield self.assertFailure(driver.refresh("full"), DegradedError)
        yield self.assertFailure(driver.refresh("sly"), UsageError)
        number, done = 0, [0]
        while driver.refresh_job is not None:
            number += 1
            sites.write(number % 2, number * 5 % 768 * BLOCK, unique(number))
            status = driver.refresh_job.status()
            done.append(status["done_bytes"])
            self.assertEqual(status["done_bytes"] + status["remaining_bytes"], 6 * MIB)
            self.assertFalse(driver.status()["coherent"])
            for unit in driver.units:
                ring = unit.writelog.ring.size
                self.assertLess(unit.writelog.used_bytes, ring)
            # A lively application, but not one that alone fills the link.  What is not framed has
            # no GSN yet: it must let the reactor turn all the same (Sites.until does).
            yield sites.until(lambda: driver.next_gsn - driver.committed_gsn < 40, "commits")
        self.assertEqual(done, sorted(done))
        self.assertGreater(number, 20)
        yield sites.until(lambda: driver.coherent, "the end")
        yield sites.drained()
        sites.assert_equal()
        self.assertTrue(sites.rmd.status()["coherent"])  # type: ignore[union-attr]
        self.assertEqual(driver.status()["state"], "connected")

    @inlineCallbacks
    def test_mirror_is_incoherent_before_the_first_chunk(self) -> Steps:
        sites = Sites(self, writelog=MIB)
        yield self.fill(sites)
        yield sites.connected()
        rmd, driver = sites.rmd, sites.driver
        assert rmd is not None and rmd.mirror is not None and driver is not None
        yield sites.refresh()
        self.assertTrue(rmd.status()["coherent"])
        apply = rmd.mirror.apply
        seen: list[bool] = []

        def watched(changes: Any) -> list[Any]:
            verdicts = []
            for change in changes:
                if any(e.kind in (REFRESH, REFRESH_ZEROES) for e in change.entries):
                    seen.append(rmd.mirror.journal.superblock.coherent)  # type: ignore[union-attr]
                verdicts += apply([change])
            return verdicts

        rmd.mirror.apply = watched  # type: ignore[method-assign]
        yield sites.refresh()
        self.assertTrue(seen)
        self.assertNotIn(True, seen)

    @inlineCallbacks
    def test_killed_refresh_leaves_both_sides_incoherent(self) -> Steps:
        sites = Sites(self, size=6 * MIB, writelog=MIB)
        yield self.fill(sites)
        yield sites.connected()
        driver, rmd = sites.driver, sites.rmd
        assert driver is not None and rmd is not None
        yield self.assertFailure(driver.kill_refresh(), DegradedError)
        yield driver.refresh("full")
        yield driver.kill_refresh()
        self.assertIsNone(driver.refresh_job)
        yield sites.drained()
        self.assertFalse(driver.status()["coherent"])
        self.assertIn("ended before", driver.status()["reason"])
        self.assertFalse(rmd.status()["coherent"])
        yield sites.refresh()
        sites.assert_equal()
        self.assertTrue(rmd.status()["coherent"])

    @inlineCallbacks
    def test_refresh_goes_on_after_restarts(self) -> Steps:
        sites = Sites(self, size=6 * MIB, writelog=MIB)
        yield self.fill(sites)
        yield sites.connected()
        begun = yield sites.driver.refresh("full")  # type: ignore[union-attr]
        for stop, start in (
            (sites.stop_rmd, sites.start_rmd),
            (sites.stop_driver, sites.start_driver),
            (sites.stop_pmd, sites.start_pmd),
        ):
            yield stop()
            yield start()
            yield sites.connected()
        driver = sites.driver
        assert driver is not None
        if driver.refresh_job is not None:
            self.assertEqual(driver.refresh_job.status()["id"], begun["id"])
        yield sites.until(lambda: driver.coherent, "the end")
        yield sites.drained()
        sites.assert_equal()
        self.assertTrue(sites.rmd.status()["coherent"])  # type: ignore[union-attr]

    @inlineCallbacks
    def test_blank_secondary_is_refused_until_a_refresh_rebases_it(self) -> Steps:
        self.patch(retry_module, "REFUSED_RETRY_SECONDS", 0.1)
        sites = Sites(self)
        yield self.fill(sites)
        yield sites.connected()
        yield sites.refresh()
        for number in range(50):
            sites.write(number % 2, number * BLOCK, unique(number))
        yield sites.drained()
        yield sites.stop_rmd()
        sites.initialise_journal()
        for index in range(2):
            (sites.base / f"mirror{index}").write_bytes(bytes(sites.size))
        yield sites.start_rmd()
        driver, rmd = sites.driver, sites.rmd
        assert driver is not None and rmd is not None
        yield sites.until(lambda: driver.pmd.link["state"] == "refused", "the refusal")
        self.assertEqual(driver.pmd.link["code"], 4)
        self.assertIn("lost committed frames", driver.status()["reason"])
        yield sites.until(lambda: rmd.link_state["state"] == "refused", "the refusal there")
        self.assertIn("lost committed frames", rmd.status()["reason"])
        sites.write(0, 0, unique(99))
        yield sites.refresh()
        sites.assert_equal()
        self.assertTrue(rmd.status()["coherent"])

    @inlineCallbacks
    def test_other_history_is_refused(self) -> Steps:
        self.patch(retry_module, "REFUSED_RETRY_SECONDS", 0.1)
        sites = Sites(self)
        yield self.fill(sites)
        yield sites.connected()
        yield sites.refresh()
        yield sites.stop_pmd()
        yield sites.stop_driver()
        sites.initialise_writelogs()
        yield sites.start_driver()
        yield sites.start_pmd()
        driver = sites.driver
        assert driver is not None
        yield sites.until(lambda: driver.pmd.link["state"] == "refused", "the refusal")
        self.assertIn("another generation", driver.status()["reason"])
        before = [sites.mirror(index) for index in range(2)]
        sites.write(0, 0, unique(1))
        self.assertEqual([sites.mirror(index) for index in range(2)], before)
        yield sites.refresh()
        sites.assert_equal()

    @inlineCallbacks
    def test_restored_primary_is_found_out(self) -> None:
        """A secondary that is ahead is a divergence, not something to skip (rules.md 8)."""
        self.patch(retry_module, "REFUSED_RETRY_SECONDS", 0.1)
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        yield sites.stop_pmd()
        yield sites.stop_driver()
        names = [f"{kind}{index}" for kind in ("data", "log") for index in range(2)]
        snapshot = {name: (sites.base / name).read_bytes() for name in names}
        yield sites.start_driver()
        yield sites.start_pmd()
        yield sites.connected()
        sites.write(0, 0, unique(1))
        yield sites.drained()
        yield sites.stop_pmd()
        yield sites.stop_driver()
        for name, content in snapshot.items():
            (sites.base / name).write_bytes(content)
        yield sites.start_driver()
        sites.write(0, BLOCK, unique(2))
        sites.write(0, BLOCK, unique(3))
        yield sites.start_pmd()
        driver = sites.driver
        assert driver is not None
        yield sites.until(lambda: driver.pmd.link["state"] == "refused", "the refusal")
        self.assertIn("history differs", driver.status()["reason"])


class LimitTests(TestCase):
    def test_bounds_fit_each_other(self) -> None:
        self.assertLess(limits.RECEIVED_BYTES_MAX, limits.SEND_WINDOW_BYTES)
