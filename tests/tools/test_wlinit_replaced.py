"""qdswlinit --replaced, and what a new writelog must know of its LDSU's data device."""

from __future__ import annotations

import json
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.core.backfresh import INTERRUPTED, NEEDED, RUNNING, BackfreshState
from qdsmirror.core.failures import Dead, Failed
from qdsmirror.errors import EXIT_FAILED, EXIT_USAGE, DeviceFailedError
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.tools import wlinit
from tests.tools.offline import DATA, Site


class FailedTestCase(TestCase):
    def setUp(self) -> None:
        self.site = Site(self)
        self.site.initialise()
        self.latch = FailureLatch(self.site.paths.state_file(0))

    def die(self, *indices: int, reason: str = "EIO") -> None:
        """Have data devices failed, on record."""
        generation = self.site.superblock("log0").generation.hex()
        failed = Failed({}, {i: Dead(reason, 1.0, DATA) for i in indices}, generation)
        for index in range(2):
            with self.site.log(f"log{index}") as log:
                log.update(both=True, coherent=True, failures=failed.to_json())
        self.latch.record_group(failed)
        for index in indices:
            device = str(self.site.device(f"data{index}"))
            self.latch.record(device, DeviceFailedError("fdatasync: EIO"))

    def states(self) -> list[BackfreshState | None]:
        return [BackfreshState.of(self.site.superblock(f"log{n}")) for n in range(2)]


class ReplacedTests(FailedTestCase):
    def take(self, *names: str) -> tuple[int, str, str]:
        words = [word for name in names for word in ("--replaced", name)]
        return self.site.run(wlinit.main, *words)

    def test_closed_until_it_is_backfreshed_and_its_failure_forgotten(self) -> None:
        self.die(1)
        history = self.site.superblock("log1").generations
        code, output, errors = self.take("qds1")
        self.assertEqual((code, errors), (0, ""))
        self.assertIn("closed until qdsbackfresh -g 0 --yes", output)
        first, second = self.states()
        assert second is not None
        self.assertEqual((first, second.phase), (None, NEEDED))
        self.assertIn("replaced", second.reason)
        for name in ("log0", "log1"):
            self.assertIsNone(self.site.superblock(name).failures)
        self.assertEqual(self.site.superblock("log1").generations, history)
        self.assertEqual((self.latch.failures(), bool(self.latch.group())), ({}, False))

    def test_other_failures_stay(self) -> None:
        self.die(0, 1)
        self.assertEqual(self.take("qds1")[0], 0)
        self.assertEqual(list(self.latch.group().dead), [0])
        self.assertEqual(list(self.latch.failures()), [str(self.site.device("data0"))])
        left = Failed.from_json(self.site.superblock("log1").failures)
        self.assertEqual(list(left.dead), [0])

    def test_marked_before_the_failure_is_forgotten(self) -> None:
        self.die(1)
        seen: list[Any] = []

        def forget(_latch: Any, *_: Any) -> None:
            seen.extend(self.states())
            raise OSError(5, "I/O error")

        self.patch(FailureLatch, "forget", forget)
        self.assertNotEqual(self.take("qds1")[0], 0)
        self.assertEqual([one and one.phase for one in seen], [None, NEEDED])

    def test_a_backfresh_under_way_does_not_go_on(self) -> None:
        state = BackfreshState(b"I" * 16, RUNNING, 1.0)
        for index in range(2):
            with self.site.log(f"log{index}") as log:
                log.update(both=True, backfresh=state.to_json())
        self.die(1)
        self.assertEqual(self.take("qds1")[0], 0)
        self.assertEqual([one and one.phase for one in self.states()], [NEEDED, NEEDED])

    def test_one_of_another_size(self) -> None:
        self.die(1)
        self.site.make("data1", 2 * DATA)
        self.site.refused(wlinit.main, EXIT_FAILED, "data1", str(DATA), argv=("--replaced", "qds1"))

    def test_what_cannot_be(self) -> None:
        for words in (("--replaced", "qds9"), ("--replaced", "qds1", "--yes")):
            self.site.refused(wlinit.main, EXIT_USAGE, argv=words)
        with self.site.daemon("dsgrp000.driver"):
            self.site.refused(wlinit.main, EXIT_FAILED, "driver", argv=("--replaced", "qds1"))

    def test_json(self) -> None:
        code, output, _ = self.site.run(wlinit.main, "--json", "--replaced", "qds1")
        self.assertEqual(code, 0)
        (told,) = json.loads(output)["initialised"]
        self.assertEqual(told["device"], str(self.site.device("data1")))


class AnewTests(FailedTestCase):
    """Writelogs that are initialised anew."""

    def test_blocks_that_are_lacking_still_are(self) -> None:
        state = BackfreshState(b"I" * 16, RUNNING, 1.0)
        with self.site.log("log0") as log:
            log.update(both=True, backfresh=state.to_json())
        self.site.initialise()
        first, second = self.states()
        assert first is not None
        self.assertEqual((first.id, first.phase, second), (state.id, NEEDED, None))

    def test_also_where_the_log_that_said_so_is_gone(self) -> None:
        self.die(0, reason=f"data device data0 failed: incoherent: {INTERRUPTED}")
        self.site.put("log0", 0, bytes(1 << 20))
        self.site.initialise()
        first, second = self.states()
        assert first is not None
        self.assertEqual((first.phase, second), (NEEDED, None))
