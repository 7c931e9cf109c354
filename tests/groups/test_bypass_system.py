"""Bypass with both sites: up to the break, the older mirror, and the way back to an equal one."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import TestCase

from tests.groups.site import MIB, Sites
from tests.groups.world import BLOCK, KIB, unique

Steps = Generator[Deferred[Any], Any, None]


class BypassTests(TestCase):
    timeout = 300

    def sites(self, **more: Any) -> Sites:
        sites = Sites(self, writelog=512 * KIB, size=MIB, **more)
        sites.config = replace(sites.config, on_overflow="bypass")
        return sites

    @inlineCallbacks
    def outage(self, sites: Sites) -> Steps:
        """Make a mirror, lose the secondary, and write until the group is in bypass."""
        yield sites.start()
        yield sites.connected()
        yield sites.refresh()
        yield sites.stop_rmd()
        yield sites.until(lambda: "accumulating" in sites.modes(), "the loss to be seen")
        self.before: list[bytes] = [sites.data(index) for index in range(sites.ldsus)]
        self.number = 0
        while sites.driver.status()["state"] != "bypass":  # type: ignore[union-attr]
            self.number += 1
            request = sites.write(self.number % 2, self.number * BLOCK % MIB, unique(self.number))
            yield sites.until(lambda request=request: sites.client.answered(request), "an answer")
        for _ in range(50):
            self.number += 1
            sites.write(self.number % 2, self.number * BLOCK % MIB, unique(self.number))
        yield sites.until(lambda: len(sites.client.done) == self.number, "every answer")
        self.assertEqual(sites.client.errors, {})

    def prefix(self, count: int, index: int) -> bytes:
        """What an LDSU held when so many of the writes were done."""
        content = bytearray(self.before[index])
        for number in range(1, count + 1):
            if number % 2 == index:
                at = number * BLOCK % MIB
                content[at : at + BLOCK] = unique(number)
        return bytes(content)

    @inlineCallbacks
    def drained_to_the_break(self, sites: Sites) -> Steps:
        driver = sites.driver
        assert driver is not None
        yield sites.start_rmd()
        yield sites.until(
            lambda: driver.status()["gsn"]["mirrored"] == driver.next_gsn - 1, "the break"
        )

    @inlineCallbacks
    def test_overflow_and_back(self) -> Steps:
        sites = self.sites()
        yield self.outage(sites)
        driver = sites.driver
        assert driver is not None
        generation = driver.generation
        yield self.drained_to_the_break(sites)
        status = driver.status()
        self.assertEqual((status["state"], status["coherent"]), ("bypass", True))
        self.assertIn("is full", status["reason"])
        self.assertGreater(status["bypass"]["dirty_bytes"], 0)
        # The mirror is a prefix: all that was journaled, and nothing that was not.
        count = next(
            n for n in range(self.number + 1)
            if all(self.prefix(n, i) == sites.mirror(i) for i in range(sites.ldsus))
        )  # fmt: skip
        self.assertTrue(50 < count < self.number - 49, count)
        far = sites.rmd.status()  # type: ignore[union-attr]
        self.assertEqual((far["state"], far["coherent"]), ("bypass", True))
        self.assertIn("complete up to then", far["reason"])
        yield driver.switch_bypass("off")
        self.assertEqual(driver.status()["state"], "refresh")
        sites.write(0, 0, unique(7777))
        yield sites.until(lambda: driver.coherent, "the refresh to end")
        yield sites.drained()
        sites.assert_equal()
        self.assertNotEqual(driver.generation, generation)
        far = sites.rmd.status()  # type: ignore[union-attr]
        self.assertEqual((far["state"], far["bypass"]), ("connected", None))
        self.assertEqual(far["generation"], driver.generation.hex())
        self.assertEqual(driver.status()["bypass"], None)

    @inlineCallbacks
    def test_left_while_all_before_the_break_is_still_to_be_sent(self) -> Steps:
        sites = self.sites()
        yield self.outage(sites)
        driver = sites.driver
        assert driver is not None
        yield driver.switch_bypass("off")
        sites.write(1, 0, unique(7777))
        yield sites.start_rmd()
        yield sites.until(lambda: driver.coherent, "the refresh to end")
        yield sites.drained()
        sites.assert_equal()
        self.assertEqual(sites.client.errors, {})
        # What lay before the break was sent: the history was continued, not replaced.
        journal = sites.rmd.mirror.journal  # type: ignore[union-attr]
        self.assertEqual(len(journal.superblock.generations), 2)

    @inlineCallbacks
    def test_every_daemon_may_come_and_go_in_bypass(self) -> Steps:
        sites = self.sites()
        yield self.outage(sites)
        yield sites.stop_driver()
        yield sites.start_driver()
        driver = sites.driver
        assert driver is not None
        self.assertEqual(driver.status()["state"], "bypass")
        self.assertGreater(driver.status()["bypass"]["dirty_bytes"], 0)
        yield self.drained_to_the_break(sites)
        yield sites.stop_rmd()
        yield sites.start_rmd()
        self.assertEqual(sites.rmd.status()["state"], "bypass")  # type: ignore[union-attr]
        yield driver.refresh("full")
        yield sites.stop_driver()
        yield sites.start_driver()
        driver = sites.driver
        yield sites.until(lambda: driver.coherent, "the refresh to end")
        yield sites.drained()
        sites.assert_equal()

    @inlineCallbacks
    def test_again_and_again(self) -> Steps:
        sites = self.sites()
        yield sites.start()
        yield sites.connected()
        yield sites.refresh()
        driver = sites.driver
        assert driver is not None
        for turn in range(20):
            yield driver.switch_bypass("on")
            sites.write(turn % 2, turn * BLOCK, unique(turn + 1))
            yield driver.switch_bypass("off")
            yield sites.until(lambda: driver.coherent, "the refresh to end")
        yield sites.drained()
        sites.assert_equal()
        self.assertEqual(len(driver.units[0].writelog.superblock.generations), 16)

    @inlineCallbacks
    def test_a_replaced_secondary_gets_a_mirror_of_the_new_generation(self) -> Steps:
        sites = self.sites()
        yield self.outage(sites)
        driver = sites.driver
        assert driver is not None
        sites.initialise_journal()
        yield sites.start_rmd()
        yield sites.until(lambda: driver.pmd.link["state"] == "refused", "the refusal")
        yield driver.switch_bypass("off")
        yield sites.until(lambda: driver.coherent, "the refresh to end")
        yield sites.drained()
        sites.assert_equal()
