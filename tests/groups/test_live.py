"""Settings that change while both sites run."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import TestCase

from qdsmirror.limits import MIB
from tests.groups.site import Sites
from tests.groups.world import unique

Steps = Generator[Deferred[Any], Any, None]


class LiveTests(TestCase):
    timeout = 300

    @inlineCallbacks
    def test_at_every_daemon(self) -> Steps:
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        yield sites.refresh()
        driver, pmd, rmd = sites.driver, sites.pmd, sites.rmd
        assert driver is not None and pmd is not None and rmd is not None
        told = yield pmd.set_live(json.dumps({"send_window": "2M", "reconnect_max": "0.3"}))
        self.assertEqual(told["settings"]["send_window"], 2 * MIB)
        self.assertEqual(pmd.status()["settings"]["send_window"], 2 * MIB)
        assert pmd._outbound is not None
        self.assertEqual(pmd._outbound.window, 2 * MIB)
        self.assertEqual(pmd._retry.longest_seconds, 0.3)
        wanted = {"metadata_entries": "7", "checkpoint_hold": "strict"}
        yield rmd.set_live(json.dumps({**wanted, "before_images_full": "stop"}))
        assert rmd.committing is not None and rmd.mirror is not None
        self.assertEqual(rmd.committing.config.tunables.metadata_entries, 7)
        self.assertEqual(rmd.mirror.config.tunables.checkpoint_hold, "strict")
        self.assertEqual(rmd.mirror.images.config.tunables.before_images_full, "stop")
        yield driver.set_live(json.dumps({"operation": "sync", "verify_every": "1 h"}))
        self.assertEqual(driver.status()["settings"]["operation"], "sync")

    @inlineCallbacks
    def test_another_compression_begins_another_session(self) -> Steps:
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        yield sites.refresh()
        pmd = sites.pmd
        assert pmd is not None
        yield pmd.set_live(json.dumps({"compression": "zstd:3"}))
        yield sites.until(lambda: pmd.status()["wire"]["compression"] == "zstd:3", "zstd")
        sites.write(0, 0, unique(1))
        yield sites.drained()
        sites.assert_equal()

    @inlineCallbacks
    def test_synchronous_over_the_link(self) -> Steps:
        """What was answered is in the journal; the mode changes on the way."""
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        yield sites.refresh()
        driver = sites.driver
        assert driver is not None
        yield driver.set_live(json.dumps({"operation": "sync"}))
        for number in range(20):
            request = sites.write(number % 2, number * 4096, unique(number))
            yield sites.until(lambda r=request: sites.client.answered(r), "an answer")
            assert sites.rmd is not None and sites.rmd.committing is not None
            self.assertEqual(sites.rmd.committing.committed_gsn, driver.next_gsn - 1)
            if number == 10:
                sites.cable.cut()
