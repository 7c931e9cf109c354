"""Backfresh over both sites, TLS and files: what is fetched, refused, interrupted, given up."""

from __future__ import annotations

import errno
import json
import os
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import TestCase

from qdsmirror.core import nbd
from qdsmirror.core.questions import READ
from qdsmirror.errors import BrokenError, DegradedError, QdsError
from qdsmirror.groups import agreeing
from qdsmirror.groups import backfresh as backfresh_module
from qdsmirror.groups import fetching as fetching_module
from qdsmirror.storage.device import open_device
from qdsmirror.storage.journal import Mirror
from qdsmirror.storage.keep import KeepFile, KeepWriter
from qdsmirror.storage.rollback import roll_back
from qdsmirror.storage.superblock import read_superblock
from tests.fakes import MemoryDevice
from tests.groups.site import MIB, Sites, Steps

CHUNK = 64 << 10


class BackfreshTestCase(TestCase):
    timeout = 300

    @inlineCallbacks
    def begin_work(self, **more: Any) -> Steps:
        """Start both sites, with a first mirror."""
        self.sites = sites = Sites(self, **more)
        yield sites.start()
        yield sites.connected()
        for n in range(8):
            sites.write(n % 2, n * 3 * CHUNK % MIB, bytes([n + 1]) * 8192)
        yield sites.refresh()
        sites.assert_equal()

    @property
    def driver(self) -> Any:
        assert self.sites.driver is not None
        return self.sites.driver

    def spoil(self, index: int, offset: int, length: int = 512) -> None:
        """Change a data device behind the driver's back."""
        with open(self.sites.base / f"data{index}", "r+b") as file:
            file.seek(offset)
            file.write(b"!" * length)

    def begin(self, options: str = "", keep: str = "") -> Any:
        return self.driver.begin_backfresh(options, keep)

    def ended(self) -> Any:
        return self.sites.until(
            lambda: "backfresh" not in self.sites.modes(), "the backfresh to end"
        )

    def written(self, index: int, offset: int, data: bytes) -> Any:
        """Write, and wait for the answer."""
        request = self.sites.write(index, offset, data)
        return self.sites.until(lambda: self.sites.client.answered(request), "an answer")

    def superblock(self, index: int) -> Any:
        content = (self.sites.base / f"log{index}").read_bytes()
        return read_superblock(MemoryDevice(len(content), content=content))


class DrainedTests(BackfreshTestCase):
    @inlineCallbacks
    def test_what_differs_is_fetched_and_the_history_goes_on(self) -> Steps:
        yield self.begin_work()
        generation = self.driver.generation
        self.spoil(0, 0)
        self.spoil(0, 5 * CHUNK + 100, CHUNK)
        self.spoil(1, MIB - 512)
        passed = self.sites.cable.passed
        yield self.begin()
        yield self.ended()
        self.sites.assert_equal()
        # Four chunks, hashes, and what goes by the way.
        self.assertLess(self.sites.cable.passed - passed, 5 * CHUNK)
        self.assertTrue(self.driver.coherent)
        self.assertEqual(self.driver.generation, generation)
        yield self.written(0, 4096, b"a" * 4096)
        yield self.sites.drained()
        self.sites.assert_equal()

    @inlineCallbacks
    def test_by_chunks_of_the_configured_size(self) -> Steps:
        yield self.begin_work(tunables="chunk_size = 4K")
        self.spoil(0, 5 * CHUNK + 100)
        self.spoil(1, 0)
        passed = self.sites.cable.passed
        yield self.begin("dry-run")
        yield self.sites.until(
            lambda: self.driver.status()["backfresh"]["state"] == "counted", "the count"
        )
        self.assertEqual(self.driver.status()["backfresh"]["changed_bytes"], 2 * 4096)
        yield self.begin()
        yield self.ended()
        self.sites.assert_equal()
        # Two chunks, 2 x 256 hashes, twice, and what goes by the way.
        self.assertLess(self.sites.cable.passed - passed, CHUNK)

    @inlineCallbacks
    def test_what_a_refresh_was_to_bring_is_there(self) -> Steps:
        """Also a synchronous group needs none then: it is degraded no longer than it lags."""
        yield self.begin_work()
        yield self.sites.drained()
        yield self.sites.stop_driver()
        self.spoil(0, 0)
        yield self.sites.start_driver()
        yield self.sites.connected()
        self.assertFalse(self.driver.coherent)
        yield self.begin()
        yield self.ended()
        yield self.driver.set_live(json.dumps({"operation": "sync", "on_disconnect": "async"}))
        yield self.sites.stop_rmd()
        yield self.written(0, 4096, b"a" * 4096)
        self.assertIsNotNone(self.driver.status()["degraded"])
        yield self.sites.start_rmd()
        yield self.sites.until(lambda: self.driver.status()["degraded"] is None, "it to catch up")
        yield self.sites.drained()
        self.sites.assert_equal()

    @inlineCallbacks
    def test_closed_while_it_runs(self) -> Steps:
        yield self.begin_work()
        unit = self.sites.unit(0)
        yield self.sites.stop_rmd()
        yield self.sites.start_rmd()
        yield self.sites.connected()
        self.patch(fetching_module, "BACKFRESH_SPANS_MAX", 0)
        status = yield self.begin()
        self.assertEqual(status["state"], "fetching")
        self.assertEqual(self.driver.status()["state"], "backfresh")
        for command in (nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_FLUSH):
            data = b"x" * 512 if command == nbd.CMD_WRITE else None
            request = self.sites.client.ask(unit, command, 0, 512, data)
            self.assertIn(request, self.sites.client.errors)
        self.assertIn("backfresh", self.driver.status()["ldsus"][0]["closed"])
        for asked in (self.begin(), self.driver.refresh("full"), self.driver.switch_bypass("on")):
            yield self.assertFailure(asked, DegradedError)
        self.patch(fetching_module, "BACKFRESH_SPANS_MAX", 8)
        self.driver.backfresh.job.poke()
        yield self.ended()
        yield self.written(0, 0, b"b" * 512)
        self.assertEqual(self.driver.status()["ldsus"][0]["closed"], "")

    @inlineCallbacks
    def test_refused_while_clients_are_connected(self) -> Steps:
        yield self.begin_work()
        unit = self.sites.unit(1)
        unit.attach(self.sites.client)
        failure = yield self.assertFailure(self.begin(), DegradedError)
        self.assertIn("qds1", failure.message)
        self.assertIn("--force", failure.hint)
        self.assertFalse(unit.closed)
        yield self.begin("force")
        self.assertTrue(self.sites.client.gone)
        yield self.ended()

    @inlineCallbacks
    def test_refused_while_the_secondary_lacks_something(self) -> Steps:
        self.patch(backfresh_module.Agreement, "_pause", lambda _: None)
        yield self.begin_work()
        yield self.sites.stop_rmd()
        yield self.written(0, 0, b"c" * 512)
        yield self.sites.until(lambda: "connected" not in self.sites.modes(), "the link's end")

        self.patch(agreeing, "BACKFRESH_DRAIN_SECONDS", 0.0)
        failure = yield self.assertFailure(self.begin(), DegradedError)
        self.assertIn("no link", failure.message)
        self.assertFalse(self.sites.unit(0).closed)
        yield self.written(0, 0, b"d" * 512)

    @inlineCallbacks
    def test_a_dry_run_counts_and_changes_nothing(self) -> Steps:
        yield self.begin_work()
        self.spoil(0, 3 * CHUNK)
        before = self.sites.data(0)
        yield self.begin("dry-run")
        yield self.sites.until(
            lambda: self.driver.status()["backfresh"]["state"] == "counted", "the count"
        )
        status = self.driver.status()
        self.assertEqual(status["backfresh"]["changed_bytes"], CHUNK)
        self.assertEqual(status["state"], "connected")
        self.assertEqual(self.sites.data(0), before)
        self.assertIsNone(self.superblock(0).backfresh)

    @inlineCallbacks
    def test_a_mirror_that_is_not_coherent_is_refused(self) -> Steps:
        self.sites = Sites(self)
        yield self.sites.start()
        yield self.sites.connected()
        failure = yield self.assertFailure(self.begin(), BrokenError)
        self.assertIn("not coherent", failure.message)
        self.assertFalse(self.sites.unit(0).closed)


class OrderTests(BackfreshTestCase):
    @inlineCallbacks
    def test_not_before_all_is_applied(self) -> Steps:
        yield self.begin_work()
        unit = self.sites.unit(0)
        go_on, late = unit.applying.go_on, []
        unit.applying.go_on = lambda: late.append(True)  # type: ignore[method-assign]
        self.sites.write(0, 0, b"z" * 4096)
        yield self.sites.until(lambda: late, "a frame to be durable")
        begun = self.begin()
        yield self.sites.until(lambda: unit.closed, "the LDSU to be closed")
        self.assertIsNone(self.superblock(0).backfresh)
        unit.applying.go_on = go_on  # type: ignore[method-assign]
        go_on()
        yield begun
        found = self.superblock(0)
        self.assertEqual(found.applied.position, found.head.position)
        self.assertEqual(found.applied.gsn, self.driver.next_gsn)
        yield self.ended()
        self.sites.assert_equal()
        self.assertEqual(self.sites.data(0)[:4096], b"z" * 4096)

    @inlineCallbacks
    def test_nothing_is_written_once_it_was_killed(self) -> Steps:
        yield self.begin_work()
        self.spoil(0, 0)
        before = self.sites.data(0)
        questions = self.driver.pmd.questions
        real, held = questions.ask, []

        def ask(kind: int, *args: Any) -> Any:
            asked = real(kind, *args)
            if kind == READ:
                waiting: Deferred[bytes] = Deferred()
                asked.addCallback(lambda body: held.append((waiting, body)))
                return waiting
            return asked

        self.patch(questions, "ask", ask)
        yield self.begin()
        yield self.sites.until(lambda: held, "a block to be on its way")
        record = self.driver.backfresh._record

        def come_late(states: Any) -> Any:
            for waiting, body in held:
                waiting.callback(body)
            return record(states)

        self.patch(self.driver.backfresh, "_record", come_late)
        yield self.driver.kill_backfresh("")
        yield self.written(1, 0, b"q" * 512)
        self.assertEqual(self.sites.data(0), before)

    @inlineCallbacks
    def test_kept_before_it_is_overwritten(self) -> Steps:
        yield self.begin_work()
        self.spoil(0, 0)
        path = os.path.join(self.sites.base, "kept")
        before = self.sites.data(0)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def fail(*_: Any) -> None:
            raise full

        append = KeepWriter.append
        self.patch(KeepWriter, "append", fail)
        yield self.begin("", path)
        yield self.sites.until(
            lambda: "No space left" in self.driver.status()["reason"], "the lack of space"
        )
        self.assertEqual(self.driver.status()["backfresh"]["state"], "waiting")
        self.assertEqual(self.sites.data(0), before)
        self.patch(KeepWriter, "append", append)
        yield self.ended()
        self.sites.assert_equal()

    @inlineCallbacks
    def test_somebody_elses_writes_make_it_begin_anew(self) -> Steps:
        yield self.begin_work()
        self.spoil(1, 0)
        self.patch(fetching_module, "BACKFRESH_SPANS_MAX", 1)
        self.patch(fetching_module, "COMPARE_SPAN_BYTES", MIB)
        real = fetching_module.Fetching._go_on

        def go_on(job: Any, part: Any) -> None:
            if part.unit.index == 0:
                real(job, part)
            else:
                job._stalled.append(part)

        self.patch(fetching_module.Fetching, "_go_on", go_on)
        yield self.begin()
        yield self.sites.until(lambda: self.driver.backfresh.job.done[0], "the first LDSU")
        yield self.driver.backfresh._record_progress()
        yield self.sites.stop_driver()
        self.assertEqual(self.superblock(0).backfresh["done"], MIB)
        self.spoil(0, 0)
        self.patch(fetching_module.Fetching, "_go_on", real)
        yield self.sites.start_driver()
        yield self.ended()
        self.sites.assert_equal()


class KeepTests(BackfreshTestCase):
    @inlineCallbacks
    def test_what_is_overwritten_is_kept(self) -> Steps:
        yield self.begin_work()
        self.spoil(1, 2 * CHUNK)
        before = self.sites.data(1)
        path = os.path.join(self.sites.base, "kept")
        yield self.begin("", path)
        yield self.ended()
        with KeepFile(path) as kept:
            (one,) = kept.backwards()
        self.assertEqual((one.ldsu, one.offset), (1, 2 * CHUNK))
        self.assertEqual(one.data, before[2 * CHUNK : 3 * CHUNK])
        self.sites.assert_equal()


class MiddleTestCase(BackfreshTestCase):
    @inlineCallbacks
    def in_the_middle(self, lacking: bool = False) -> Steps:
        """Begin, and stop behind the first chunk.

        :param lacking: the secondary lacks something, which is given up.
        """
        yield self.begin_work()
        for index in range(2):
            self.spoil(index, 0, CHUNK * 3)
        self.patch(fetching_module, "BACKFRESH_SPANS_MAX", 1)
        self.patch(fetching_module, "COMPARE_SPAN_BYTES", CHUNK)
        real = fetching_module.Fetching._go_on

        def go_on(job: Any, part: Any) -> None:
            if part.unit.index == 0 and part.offset == 0:
                real(job, part)
            else:
                job._stalled.append(part)

        self.patch(fetching_module.Fetching, "_go_on", go_on)
        if lacking:
            yield self.sites.stop_rmd()
            yield self.written(0, MIB // 2, b"y" * 512)
        begun = self.begin("discard" if lacking else "")
        if lacking:
            yield self.sites.start_rmd()
        yield begun
        yield self.sites.until(lambda: self.driver.backfresh.job.done[0], "the first chunk")
        self.patch(fetching_module.Fetching, "_go_on", real)


class InterruptedTests(MiddleTestCase):
    @inlineCallbacks
    def test_a_link_that_is_cut_is_waited_for(self) -> Steps:
        yield self.in_the_middle()
        self.sites.cable.cut()
        yield self.sites.until(lambda: "connected" not in self.sites.modes(), "the cut")
        self.driver.backfresh.job.poke()
        yield self.ended()
        self.sites.assert_equal()

    @inlineCallbacks
    def test_an_orderly_restart_goes_on_by_itself(self) -> Steps:
        yield self.in_the_middle()
        yield self.driver.backfresh._record_progress()
        yield self.sites.stop_driver()
        self.assertEqual(self.superblock(0).backfresh["done"], CHUNK)
        yield self.sites.start_driver()
        self.assertTrue(self.sites.unit(0).closed)
        self.assertIn("backfresh", self.sites.modes())
        self.assertEqual(self.driver.backfresh.job.done, [CHUNK, 0])
        yield self.ended()
        self.sites.assert_equal()
        self.assertTrue(self.driver.coherent)

    @inlineCallbacks
    def test_killed_it_stays_closed_until_another(self) -> Steps:
        yield self.in_the_middle()
        yield self.driver.kill_backfresh("")
        self.assertEqual(self.driver.status()["backfresh"]["state"], "needed")
        self.assertTrue(self.sites.unit(1).closed)
        yield self.sites.stop_driver()
        yield self.sites.start_driver()
        yield self.sites.connected()
        self.assertTrue(self.sites.unit(1).closed)
        self.assertIn("backfresh needed", self.driver.status()["reason"])
        failure = yield self.assertFailure(self.driver.refresh("full"), DegradedError)
        self.assertIn("qdsbackfresh", failure.hint)
        yield self.begin()
        yield self.ended()
        self.sites.assert_equal()
        yield self.written(1, 0, b"e" * 512)

    @inlineCallbacks
    def test_a_writelog_that_fails_while_another_begins(self) -> Steps:
        """Perhaps only its superblock would have said what the data devices lack."""
        yield self.in_the_middle()
        yield self.driver.kill_backfresh("")
        quiet: list[bool] = []
        self.patch(self.driver.backfresh, "_is_quiet", lambda: bool(quiet))
        begun = self.begin()
        unit = self.sites.unit(0)
        unit.fail_log(OSError(errno.EIO, "gone"))
        self.assertIn("incoherent", unit.dead)
        self.assertIn("incoherent", self.sites.unit(1).dead)
        quiet.append(True)
        self.driver.bypass.poke()
        yield self.assertFailure(begun, QdsError)
        self.assertTrue(unit.closed)

    @inlineCallbacks
    def test_killed_and_opened_by_consent(self) -> Steps:
        yield self.in_the_middle()
        yield self.driver.kill_backfresh("")
        yield self.driver.kill_backfresh("online")
        self.assertFalse(self.sites.unit(0).closed)
        self.assertFalse(self.driver.coherent)
        self.assertIn("opened by the operator", self.driver.status()["reason"])
        yield self.sites.refresh()
        self.sites.assert_equal()

    @inlineCallbacks
    def test_killed_before_anything_was_overwritten(self) -> Steps:
        yield self.begin_work()
        self.patch(fetching_module, "BACKFRESH_SPANS_MAX", 0)
        yield self.begin()
        yield self.driver.kill_backfresh("")
        self.assertFalse(self.sites.unit(0).closed)
        self.assertIsNone(self.superblock(1).backfresh)
        self.assertTrue(self.driver.coherent)
        yield self.written(1, 0, b"e" * 512)

    @inlineCallbacks
    def test_a_mirror_that_has_changed_meanwhile_is_not_gone_on_with(self) -> Steps:
        yield self.in_the_middle()
        yield self.sites.stop_rmd()
        with open(self.sites.base / "mirror1", "r+b") as file:
            file.write(b"?" * 512)
        yield self.sites.start_rmd()
        yield self.sites.until(
            lambda: "another generation" in self.driver.status()["reason"], "the refusal"
        )
        self.assertEqual(self.driver.status()["backfresh"]["state"], "waiting")
        self.assertNotEqual(self.sites.data(1)[:512], b"?" * 512)


class DiscardTests(MiddleTestCase):
    @inlineCallbacks
    def test_what_the_secondary_lacks_is_given_up(self) -> Steps:
        yield self.begin_work()
        before = [self.sites.data(index) for index in range(2)]
        generation = self.driver.generation
        yield self.sites.stop_rmd()
        for n in range(5):
            yield self.written(n % 2, n * CHUNK, b"f" * 4096)
        begun = self.begin("discard")
        # Held before the link is back: nothing of it is sent.
        self.assertTrue(self.driver.pmd.held)
        yield self.sites.start_rmd()
        yield begun
        yield self.ended()
        self.assertEqual([self.sites.data(index) for index in range(2)], before)
        self.sites.assert_equal()
        self.assertNotEqual(self.driver.generation, generation)
        self.assertTrue(self.driver.coherent)
        yield self.written(0, 0, b"g" * 4096)
        yield self.written(1, CHUNK, b"h" * 4096)
        yield self.sites.drained()
        self.sites.assert_equal()
        yield self.sites.stop_driver()
        yield self.sites.start_driver()
        yield self.written(1, CHUNK, b"i" * 4096)
        yield self.sites.drained()
        self.sites.assert_equal()

    @inlineCallbacks
    def test_not_from_a_mirror_that_has_changed_meanwhile(self) -> Steps:
        yield self.in_the_middle(lacking=True)
        yield self.sites.stop_rmd()
        with open(self.sites.base / "mirror1", "r+b") as file:
            file.write(b"?" * 512)
        yield self.sites.start_rmd()
        yield self.sites.until(
            lambda: "is not what it was" in self.driver.status()["reason"], "the refusal"
        )
        self.assertNotEqual(self.sites.data(1)[:512], b"?" * 512)

    @inlineCallbacks
    def test_back_to_a_mirror_of_another_history(self) -> Steps:
        """New writelogs know nothing of the mirror, which has what the data devices should."""
        yield self.begin_work()
        before = [self.sites.mirror(index) for index in range(2)]
        yield self.sites.stop_pmd()
        yield self.sites.stop_driver()
        self.sites.initialise_writelogs()
        self.spoil(0, 0, MIB)
        yield self.sites.start_driver()
        yield self.sites.start_pmd()
        yield self.written(1, 0, b"o" * 512)
        link = self.driver.pmd
        yield self.sites.until(lambda: link.link["state"] == "refused", "the refusal")
        self.patch(agreeing, "BACKFRESH_DRAIN_SECONDS", 0.0)
        failure = yield self.assertFailure(self.begin(), DegradedError)
        self.assertIn("--discard", failure.hint)
        self.patch(agreeing, "BACKFRESH_DRAIN_SECONDS", 10.0)
        yield self.begin("discard")
        yield self.ended()
        self.assertEqual([self.sites.data(index) for index in range(2)], before)
        self.assertTrue(self.driver.coherent)
        yield self.written(0, MIB // 2, b"p" * 4096)
        yield self.sites.drained()
        self.sites.assert_equal()

    @inlineCallbacks
    def test_back_to_a_mirror_that_was_rolled_back(self) -> Steps:
        """Its history is its own: the primary follows it, and the mirror the primary from there."""
        yield self.begin_work(before_bytes=3 * MIB, journal=8 * MIB)
        yield self.written(0, 0, b"q" * 4096)
        yield self.sites.drained()
        before = [self.sites.mirror(index) for index in range(2)]
        self.spoil(0, 0, MIB)
        self.spoil(1, 0, MIB)
        self.sites.cable.budget = MIB
        yield self.driver.refresh("full")
        yield self.sites.until(lambda: not self.sites.cable.pipes, "the link to be cut")
        yield self.sites.stop_rmd()
        yield self.driver.kill_refresh()
        self.assertNotEqual([self.sites.mirror(index) for index in range(2)], before)
        mirror = Mirror.open(self.sites.config, open_device)
        roll_back(mirror)
        mirror.close()
        self.assertEqual([self.sites.mirror(index) for index in range(2)], before)
        yield self.sites.start_rmd()
        link = self.driver.pmd
        yield self.sites.until(lambda: link.link["state"] == "refused", "the refusal")
        yield self.begin("discard")
        yield self.ended()
        self.assertEqual([self.sites.data(index) for index in range(2)], before)
        self.assertTrue(self.driver.coherent)
        for n in range(4):
            yield self.written(n % 2, n * CHUNK, bytes([n + 1]) * 8192)
        yield self.sites.drained()
        self.sites.assert_equal()
        yield self.sites.stop_rmd()
        yield self.sites.start_rmd()
        yield self.written(1, MIB // 2, b"r" * 4096)
        yield self.sites.drained()
        self.sites.assert_equal()
