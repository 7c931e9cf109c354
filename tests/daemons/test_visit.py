"""A visit to a secondary that runs: what it is told, and that nobody notices."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import TestCase

from qdsmirror import __version__
from qdsmirror.daemons.visit import visit_all
from tests.groups.site import Sites
from tests.groups.world import BLOCK, MIB, unique

reactor: Any = _reactor
Steps = Generator[Deferred[Any], Any, None]


class VisitTests(TestCase):
    timeout = 300

    @inlineCallbacks
    def test_a_session_goes_on(self) -> Steps:
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        yield sites.refresh()
        rmd = sites.rmd
        assert rmd is not None
        made, before, notes = sites.cable.made, rmd.epoch, list(rmd.notes)
        for number in range(50):
            sites.write(number % 2, number * BLOCK, unique(number))
            if number % 10 == 0:
                found = yield visit_all(reactor, sites.paths["alpha"], [0])
        (way,) = found["groups"][0]["ways"]
        self.assertIsNone(way["error"])
        self.assertEqual(way["facts"]["version"], __version__)
        self.assertEqual(way["facts"]["state"], "connected")
        self.assertEqual(way["facts"]["configuration"], sites.config.comparable())
        self.assertGreater(way["facts"]["journal_bytes"], MIB)
        self.assertEqual(
            way["ldsus"],
            [
                {"name": f"qds{n}", "mirror_device": f"{sites.base}/mirror{n}", "size": MIB}
                for n in (0, 1)
            ],
        )
        self.assertLessEqual(way["asked"], way["facts"]["time"])
        self.assertLessEqual(way["facts"]["time"], way["answered"])
        yield sites.drained()
        sites.assert_equal()
        self.assertEqual(sites.cable.made, made + 5)
        self.assertEqual((rmd.epoch, list(rmd.notes)), (before, notes))
        self.assertEqual(rmd.link_state["state"], "connected")

    @inlineCallbacks
    def test_while_there_is_no_session(self) -> Steps:
        """It leaves the secondary waiting for its primary, as it was."""
        sites = Sites(self)
        yield sites.start_rmd()
        assert sites.rmd is not None
        before = dict(sites.rmd.link_state)
        found = yield visit_all(reactor, sites.paths["alpha"], [0])
        self.assertIsNone(found["groups"][0]["ways"][0]["error"])
        self.assertEqual(sites.rmd.link_state, before)
        self.assertEqual(list(sites.rmd.notes), [])

    @inlineCallbacks
    def test_nobody_there(self) -> Steps:
        sites = Sites(self)
        yield sites.cable.close()
        found = yield visit_all(reactor, sites.paths["alpha"], [0])
        (way,) = found["groups"][0]["ways"]
        error = way["error"]
        self.assertEqual((error["code"], error["exit_code"]), ("unreachable", 11))
        self.assertIn("beta does not answer at 127.0.0.1", error["message"])
        self.assertIn("on beta: launchrmds", error["hint"])

    @inlineCallbacks
    def test_every_path(self) -> Steps:
        sites = Sites(self, paths=2)
        yield sites.start_rmd()
        yield sites.cables[1].close()
        found = yield visit_all(reactor, sites.paths["alpha"], [0])
        good, bad = found["groups"][0]["ways"]
        self.assertIsNone(good["error"])
        self.assertEqual(bad["error"]["exit_code"], 11)
