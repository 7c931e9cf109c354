"""A dirty refresh: what it sends, when it will do, and what ends that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qdsmirror.core.frames import ENTRIES, REFRESH, REFRESH_ZEROES, entries
from qdsmirror.core.watermark import LINK, Committed, pack_json
from qdsmirror.errors import DegradedError, UsageError
from tests.fakes import nothing
from tests.groups.test_bypass import CHUNK, Case, make_coherent, overflowing
from tests.groups.world import BLOCK, DriverWorld, durable_superblock, unique


class DirtyRefreshTests(Case):
    def setUp(self) -> None:
        self.world = DriverWorld(self, ldsus=2, size=16 * CHUNK)
        make_coherent(self.world)
        self.world.start()

    def write(self, ldsu: int, offset: int, number: int) -> None:
        self.world.client.write(self.world.group.units[ldsu], offset, unique(number))
        self.world.settle()

    def sent(self, ldsu: int) -> list[tuple[int, int]]:
        """Read the ranges that refreshes have put into a writelog, joined."""
        unit = self.world.group.units[ldsu]
        ranges: list[tuple[int, int]] = []
        for found in unit.writelog.reader(unit.writelog.superblock.tail):
            if found.header.kind != ENTRIES:
                continue
            for offset, length, kind, _ in entries(found.header, found.frame):
                if kind in (REFRESH, REFRESH_ZEROES):
                    ranges.append((offset, offset + length))
        ranges.sort()
        joined: list[tuple[int, int]] = []
        for start, end in ranges:
            if joined and joined[-1][1] >= start:
                start, before = joined.pop()
                end = max(before, end)
            joined.append((start, end))
        return joined

    def begin(self, kind: str) -> dict[str, Any]:
        asked = self.world.group.refresh(kind)
        self.world.settle()
        status: dict[str, Any] = self.successResultOf(asked)
        return status

    def refuse_refresh(self, kind: str, text: str) -> None:
        failure = self.failureResultOf(self.world.group.refresh(kind), DegradedError)
        self.assertIn(text, failure.getErrorMessage())
        self.assertIn("qdsrefresh --smart", failure.value.hint)

    def tracked(self) -> list[bool]:
        logs = [self.world.log(index).durable() for index in range(2)]
        return [durable_superblock(log).tracked for log in logs]

    def diverge(self) -> None:
        said = {"state": "refused", "code": 4, "reason": "another history", "diverged": True}
        self.world.pmd.dataReceived(pack_json(LINK, {**said, "pid": 1}))
        self.world.settle()

    def test_sends_what_is_dirty(self) -> None:
        self.switch("on")
        self.write(0, 2 * CHUNK + BLOCK, 1)
        self.write(0, 3 * CHUNK, 2)
        self.write(0, 15 * CHUNK, 3)
        self.write(1, 0, 4)
        told = self.switch("off")
        self.assertEqual(told["kind"], "dirty")
        self.assertEqual(told["remaining_bytes"] + told["done_bytes"], 4 * CHUNK)
        self.assertEqual(self.sent(0), [(2 * CHUNK, 4 * CHUNK), (15 * CHUNK, 16 * CHUNK)])
        self.assertEqual(self.sent(1), [(0, CHUNK)])
        self.world.attach()
        self.mirror_all()
        self.assertEqual(self.tracked(), [False, False])

    def test_nothing_was_written(self) -> None:
        self.switch("on")
        self.switch("off")
        self.assertEqual((self.sent(0), self.sent(1)), ([], []))
        self.world.attach()
        self.mirror_all()

    def test_the_operator_has_the_choice(self) -> None:
        self.switch("on")
        self.write(0, 0, 1)
        self.assertEqual(self.begin("full")["kind"], "full")
        self.assertEqual(self.sent(0), [(0, 16 * CHUNK)])
        self.successResultOf(self.world.group.kill_refresh())
        self.failureResultOf(self.world.group.refresh("half"), UsageError)

    def test_goes_on_after_a_power_cut(self) -> None:
        self.switch("on")
        self.write(0, 5 * CHUNK, 1)
        self.switch("off")
        self.assertEqual(self.tracked(), [True, True])
        self.world.crash(nothing)
        self.world.start()
        job = self.world.group.refresh_job
        assert job is not None
        self.world.settle()
        self.assertEqual((job.kind, job.status()["remaining_bytes"]), ("dirty", CHUNK))
        self.assertEqual(self.sent(0), [(5 * CHUNK, 6 * CHUNK)])
        self.assertEqual(self.sent(1), [])
        self.world.attach()
        self.mirror_all()

    def test_one_that_was_ended_is_made_up_for(self) -> None:
        self.switch("on")
        self.write(0, 0, 1)
        self.switch("off")
        self.switch("on")
        self.assertFalse(self.world.group.coherent)
        self.write(0, 4 * CHUNK, 2)
        self.assertEqual(self.switch("off")["kind"], "dirty")
        self.successResultOf(self.world.group.kill_refresh())
        self.world.kill()
        self.world.start()
        told = self.begin("auto")
        self.assertEqual(told["kind"], "dirty")
        self.assertEqual(told["remaining_bytes"] + told["done_bytes"], 2 * CHUNK)
        self.world.attach()
        self.mirror_all()

    def test_a_full_one_that_was_ended_is_not(self) -> None:
        self.begin("full")
        self.assertEqual(self.tracked(), [False, False])
        self.successResultOf(self.world.group.kill_refresh())
        self.refuse_refresh("dirty", "lacks more")
        self.world.kill()
        self.world.start()
        self.refuse_refresh("dirty", "lacks more")
        self.switch("on")
        self.write(0, 0, 1)
        self.refuse_refresh("dirty", "lacks more")
        self.assertEqual(self.switch("off")["kind"], "smart")

    def test_a_coherent_mirror_lacks_nothing(self) -> None:
        self.refuse_refresh("dirty", "lacks nothing")
        self.assertEqual(self.begin("auto")["kind"], "smart")

    def test_no_secondary_may_begin_anew_with_it(self) -> None:
        self.switch("on")
        self.switch("off")
        job = self.world.group.refresh_job
        assert job is not None and job.begun.called
        self.assertIsNone(job.announcement())
        self.assertIsNone(self.world.attach()["refresh"])

    def test_a_secondary_with_another_history_ends_it(self) -> None:
        self.switch("on")
        self.write(0, 0, 1)
        self.switch("off")
        self.world.attach()
        self.diverge()
        status = self.world.group.status()
        self.assertEqual((status["refresh"], status["coherent"]), (None, False))
        self.assertEqual(self.tracked(), [False, False])
        self.refuse_refresh("dirty", "lacks more")
        self.assertEqual(self.begin("auto")["kind"], "smart")

    def test_the_secondary_loses_the_mirror_while_bypass_is_left(self) -> None:
        world = self.world = DriverWorld(self, ldsus=2, size=16 * CHUNK, stepped=True)
        make_coherent(world)
        world.start()
        world.attach()
        self.switch("on")
        self.write(0, 0, 1)
        leaving = world.group.switch_bypass("off")
        said = {"state": "refused", "code": 4, "reason": "another history", "diverged": True}
        world.pmd.dataReceived(pack_json(LINK, {**said, "pid": 1}))
        world.settle()
        failure = self.failureResultOf(leaving, DegradedError)
        self.assertIn("another history", failure.getErrorMessage())
        self.assertEqual(self.tracked(), [False, False])
        status = world.group.status()
        self.assertEqual((status["bypass"], status["refresh"]), (None, None))
        self.assertEqual(self.begin("auto")["kind"], "smart")

    def test_one_that_is_ended_while_it_is_marked_does_not_begin(self) -> None:
        world = self.world = DriverWorld(self, stepped=True)
        make_coherent(world)
        world.start()
        begun = world.group.refresh("full")
        killed = world.group.kill_refresh()
        world.settle()
        self.successResultOf(killed)
        self.failureResultOf(begun, DegradedError)
        status = world.group.status()
        self.assertEqual((status["state"], status["refresh"]), ("accumulating", None))

    def test_in_bypass_too_the_secondary_may_lose_the_mirror(self) -> None:
        self.world.attach()
        self.switch("on")
        self.diverge()
        self.world.kill()
        self.world.start()
        self.assertEqual(self.switch("off")["kind"], "smart")

    def test_what_others_have_written_is_not_in_the_bitmap(self) -> None:
        self.switch("on")
        stopped = self.world.group.stop()
        self.world.settle()
        self.successResultOf(stopped)
        self.world.kill()
        self.world.data().corrupt(CHUNK, b"?" * 512)
        self.world.start()
        self.assertFalse(self.world.group.coherent)
        self.assertEqual(self.switch("off")["kind"], "smart")


class HealTests(Case):
    """``auto_refresh``: an overflow's bypass ends by itself."""

    def setUp(self) -> None:
        self.make("yes")

    def make(self, auto: str, **more: Any) -> None:
        world = self.world = overflowing(self, **more)
        tunables = replace(world.config.tunables, auto_refresh=auto == "yes")
        world.config = replace(world.config, tunables=tunables)
        make_coherent(world)
        world.start()

    def overflow(self) -> None:
        unit = self.world.group.units[0]
        for number in range(100):
            self.world.client.write(unit, number * BLOCK, unique(number))
        self.world.settle()
        self.assertEqual(self.world.group.bypass.phase, "on")

    def link(self, state: str) -> None:
        said = {"state": state, "code": 0, "reason": "", "pid": 1}
        self.world.pmd.dataReceived(pack_json(LINK, said))
        self.world.settle()

    def test_once_the_secondary_has_what_came_before(self) -> None:
        self.overflow()
        self.world.kill()
        self.world.start()
        self.world.attach()
        self.link("connected")
        group = self.world.group
        self.assertEqual(group.bypass.phase, "on")
        unit = group.units[0]
        self.world.commit(ends=[Committed(0, unit.durable_end, *unit.durable_point)])
        self.world.settle(30.0)
        self.assertEqual(group.bypass.phase, "off")
        job = group.refresh_job
        self.assertEqual(job.kind if job is not None else "", "dirty")
        self.mirror_all()

    def test_where_the_secondary_has_it_before_bypass_is_entered(self) -> None:
        self.make("yes", stepped=True)
        group = self.world.group
        self.world.attach()
        self.link("connected")
        group.bypass._begin_overflow(group.units[0])
        unit = group.units[0]
        for name in ("qds0 writelog", "qds0 commit", "qds0 data"):
            self.world.step(name)
        self.assertEqual(group.bypass.phase, "entering")
        self.world.commit(ends=[Committed(0, unit.durable_end, *unit.durable_point)])
        self.world.settle(30.0)
        self.assertEqual(group.bypass.phase, "off")

    def test_not_where_it_is_not_wanted(self) -> None:
        self.make("no")
        self.overflow()
        self.everything_committed()
        self.assertEqual(self.world.group.bypass.phase, "on")

    def test_not_what_an_operator_has_begun(self) -> None:
        self.switch("on")
        self.everything_committed()
        self.assertEqual(self.world.group.bypass.phase, "on")

    def test_not_after_a_failed_writelog(self) -> None:
        self.overflow()
        self.world.log().fail("fdatasync")
        self.world.client.write(self.world.group.units[0], 15 * CHUNK, unique(7))
        self.world.settle()
        self.everything_committed()
        self.assertEqual(self.world.group.bypass.phase, "on")
        notes = [note for note in self.world.group.notes if "cannot be left" in note]
        self.assertEqual(notes, [])

    def everything_committed(self) -> None:
        self.world.attach()
        self.link("connected")
        unit = self.world.group.units[0]
        self.world.commit(ends=[Committed(0, unit.durable_end, *unit.durable_point)])
        self.world.settle(30.0)
