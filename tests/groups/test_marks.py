"""An application's marker at the primary: behind what was answered, durable before it is told."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.frames import MARK, control_payload
from qdsmirror.core.held import mark_name
from qdsmirror.core.records import Cursor
from qdsmirror.errors import DegradedError, UsageError
from tests.groups.world import BLOCK, DriverWorld, unique


class MarkTests(SynchronousTestCase):
    def world(self, coherent: bool = True, **options: Any) -> DriverWorld:
        world = DriverWorld(self, ldsus=2, **options)
        world.start()
        world.group.coherence.coherent = coherent
        return world

    def test_behind_what_was_answered_and_durable(self) -> None:
        world = self.world(stepped=True)
        group = world.group
        written = world.client.write(group.units[1], 0, unique(1))
        world.settle()
        self.assertTrue(world.client.answered(written))
        told = group.mark("nightly")
        self.assertNoResult(told)
        world.settle()
        self.assertEqual(self.successResultOf(told), {"mark": "nightly", "gsn": 2})
        self.assertEqual(group.durable_gsn, 2)
        found = list(group.units[0].writelog.reader(Cursor()))
        self.assertEqual([one.header.kind for one in found], [MARK])
        self.assertEqual(mark_name(control_payload(found[0].header, found[0].frame)), "nightly")
        later = world.client.write(group.units[0], BLOCK, unique(2))
        world.settle()
        self.assertTrue(world.client.answered(later))
        self.assertEqual(group.next_gsn, 4)

    def test_refused_where_the_mirror_would_not_be_usable(self) -> None:
        world = self.world(coherent=False)
        error = self.failureResultOf(world.group.mark("x"), DegradedError).value
        self.assertIn("--wait coherent", error.hint)
        world = self.world()
        self.successResultOf(world.group.switch_bypass("on"))
        error = self.failureResultOf(world.group.mark("x"), DegradedError).value
        self.assertIn("in bypass", error.message)
        self.failureResultOf(world.group.mark("no name"), UsageError)

    def test_the_reserve_is_not_for_marks(self) -> None:
        world = self.world(log=256 << 10)
        group = world.group
        count = 0
        while True:
            told = group.mark(f"m{count}")
            if not isinstance(told.result, dict):
                break
            self.successResultOf(told)
            count += 1
        error = self.failureResultOf(told, DegradedError).value
        self.assertIn("no room for a mark", error.message)
        log = group.units[0].writelog
        self.assertGreaterEqual(log.ring.size - log.used_bytes, log._reserve)

    def test_what_the_secondary_reports(self) -> None:
        world = self.world()
        group = world.group
        group.pmd.link = {**group.pmd.link, "state": "connected"}
        held = {"name": "nightly", "gsn": 3, "since": 1.0, "hold": "strict", "mark": True}
        listener = group.pmd.listeners["checkpoint"]
        listener({"about": "checkpoint", "checkpoint": held})
        self.assertEqual(group.status()["checkpoint"], held)
        group.pmd.link = {**group.pmd.link, "state": "connecting"}
        self.assertIsNone(group.status()["checkpoint"])
        group.pmd.link = {**group.pmd.link, "state": "connected"}
        for wrong in (None, 3, {"name": "\x1b[2J"}, {**held, "gsn": -1}, {**held, "more": 1}):
            listener({"about": "checkpoint", "checkpoint": held})
            listener({"about": "checkpoint", "checkpoint": wrong})
            self.assertIsNone(group.status()["checkpoint"])
