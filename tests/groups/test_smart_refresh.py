"""A smart refresh: what it sends, what it counts, and for which secondary."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import inlineCallbacks
from twisted.trial.unittest import SynchronousTestCase, TestCase

from qdsmirror.core import nbd, watermark
from qdsmirror.core.frames import ENTRIES, REFRESH, REFRESH_ZEROES, entries
from qdsmirror.core.questions import Answer, Question, pack_answer, parse_question
from qdsmirror.core.watermark import LINK, Committed, pack_json
from qdsmirror.groups import compare
from qdsmirror.limits import COMPARE_CHUNK_BYTES as CHUNK
from qdsmirror.limits import COMPARE_SPAN_BYTES, COMPARE_SPANS_MAX, KIB
from qdsmirror.storage.hashing import chunk_digests
from tests.fakes import MemoryDevice, nothing
from tests.groups.site import MIB, Sites, Steps
from tests.groups.world import DriverWorld, durable_superblock, unique

SIZE = 16 * CHUNK


class SmartRefreshTests(SynchronousTestCase):
    """The driver, with a secondary that the test plays."""

    def begin(self, size: int = SIZE, **more: Any) -> None:
        """Start with LDSUs that are equal to their mirrors, at zero."""
        self.world = DriverWorld(self, ldsus=2, size=size, **more)
        self.mirrors = [MemoryDevice(size) for _ in range(2)]
        self.start()

    def start(self) -> None:
        self.world.start()
        self.asked: list[Question] = []
        self.world.attach()
        end = self.world.group.pmd.end
        assert end is not None
        end.ask = lambda raw: self.asked.append(parse_question(raw))  # type: ignore[method-assign]

    def link(self, state: str, **more: Any) -> None:
        said = {"state": state, "code": 0, "reason": "", "pid": 1, **more}
        self.world.pmd.dataReceived(pack_json(LINK, said))
        self.world.settle()
        if state == "connected":
            # The mirror devices have what there is by now.
            self.commit()

    def differ(self, ldsu: int, chunk: int) -> None:
        self.mirrors[ldsu].corrupt(chunk * CHUNK + 512, b"another")

    def refresh(self) -> None:
        begun = self.world.group.refresh("smart")
        self.world.settle()
        self.successResultOf(begun)
        if self.world.group.pmd.is_connected:
            self.commit()

    def say(self, question: Question, body: bytes, error: str = "") -> None:
        raw = pack_answer(Answer(question.id, body, error))
        self.world.pmd.dataReceived(watermark.pack_relayed(watermark.ANSWER, raw))

    def answer(self, asked: list[Question]) -> None:
        for question in asked:
            device = self.mirrors[question.ldsu]
            self.say(
                question,
                chunk_digests(device, question.offset, question.length, question.chunk),
            )
        self.world.settle()

    def answer_all(self) -> None:
        while self.asked:
            asked, self.asked = self.asked, []
            self.answer(asked)

    def commit(self) -> None:
        group = self.world.group
        ends = [Committed(u.index, u.durable_end, *u.durable_point) for u in group.units]
        self.world.commit(ends=ends)
        self.world.settle()

    def sent(self) -> list[tuple[int, int]]:
        """Give the chunks that are in the writelogs: LDSU and number."""
        found: set[tuple[int, int]] = set()
        for unit in self.world.group.units:
            for one in unit.writelog.reader(unit.writelog.superblock.tail):
                if one.header.kind != ENTRIES:
                    continue
                for offset, length, kind, _ in entries(one.header, one.frame):
                    if kind in (REFRESH, REFRESH_ZEROES):
                        last = offset + length
                        found |= {(unit.index, at // CHUNK) for at in range(offset, last, CHUNK)}
        return sorted(found)

    def done(self) -> list[int]:
        """Give how far, by LDSU, a crash would find the refresh."""
        self.world.settle(5)
        states = [durable_superblock(self.world.log(i).durable()).refresh for i in range(2)]
        return [state["done"] if state else -1 for state in states]

    # -- what is sent ---------------------------------------------------------------------------

    def test_what_differs_and_nothing_else(self) -> None:
        self.begin()
        for ldsu, chunk in ((0, 0), (0, 1), (0, 9), (1, 15)):
            self.differ(ldsu, chunk)
        self.link("connected")
        self.refresh()
        self.answer_all()
        self.assertEqual(self.sent(), [(0, 0), (0, 1), (0, 9), (1, 15)])
        for _ in range(3):
            self.commit()
        self.assertTrue(self.world.group.coherent)

    def test_by_chunks_of_the_configured_size(self) -> None:
        self.begin(chunk_size=4 * KIB)
        self.differ(0, 3)
        self.link("connected")
        self.refresh()
        self.assertEqual({question.chunk for question in self.asked}, {4 * KIB})
        self.answer_all()
        (unit, _) = self.world.group.units
        placed = [
            entry[:2]
            for one in unit.writelog.reader(unit.writelog.superblock.tail)
            if one.header.kind == ENTRIES
            for entry in entries(one.header, one.frame)
        ]
        self.assertEqual(placed, [(3 * CHUNK, 4 * KIB)])

    def test_another_size_counts_for_what_is_not_yet_compared(self) -> None:
        self.patch(compare, "COMPARE_SPAN_BYTES", MIB)
        self.patch(compare, "COMPARE_SPANS_MAX", 1)
        self.begin(size=4 * MIB, log=4 * MIB)
        self.differ(0, 3)
        self.differ(0, 63)
        self.link("connected")
        self.refresh()
        self.successResultOf(self.world.group.set_live('{"chunk_size": "1M"}'))
        self.answer_all()
        self.assertEqual(self.sent(), [(0, 3), *((0, 48 + at) for at in range(16))])

    def test_it_is_the_default(self) -> None:
        self.begin()
        begun = self.world.group.refresh("auto")
        self.world.settle()
        self.assertEqual(self.successResultOf(begun)["kind"], "smart")

    def test_unequal_ends_of_devices(self) -> None:
        self.begin(size=CHUNK + 512)
        self.differ(1, 0)
        self.mirrors[0].corrupt(CHUNK, b"z")
        self.link("connected")
        self.refresh()
        self.answer_all()
        self.assertEqual(self.sent(), [(0, 1), (1, 0)])

    def test_what_neither_can_read_is_sent(self) -> None:
        self.begin()
        self.link("connected")
        self.refresh()
        first, *others = self.asked
        self.asked = []
        self.say(first, b"", "I/O error")
        self.answer(others)
        self.assertEqual(self.sent(), [(0, chunk) for chunk in range(16)])
        self.assertIn("I/O error", self.world.group.notes[-1])

    def test_nothing_is_compared_with_a_mirror_that_lags_behind_the_beginning(self) -> None:
        """A bypass may have written what an older write is to change again."""
        self.begin()
        self.link("connected")
        begun = self.world.group.refresh("smart")
        self.world.settle()
        self.successResultOf(begun)
        self.assertEqual(self.asked, [])
        self.world.commit(self.world.group.durable_gsn - 1, ends=[])
        self.world.settle()
        self.assertEqual(self.asked, [])
        self.commit()
        self.assertEqual(len(self.asked), 2)

    # -- asking -----------------------------------------------------------------------------------

    def test_nothing_is_asked_before_there_is_a_link(self) -> None:
        self.begin()
        self.refresh()
        self.assertEqual(self.asked, [])
        self.link("connected")
        self.assertEqual(len(self.asked), 2)

    def test_a_lost_link_is_asked_again(self) -> None:
        self.begin(size=2 * COMPARE_SPAN_BYTES)
        self.differ(0, 3)
        self.link("connected")
        self.refresh()
        lost, self.asked = self.asked, []
        self.link("connecting", reason="cut")
        self.answer(lost)
        self.assertEqual((self.asked, self.sent()), ([], []))
        self.link("connected")
        self.assertEqual([q[1:] for q in self.asked], [q[1:] for q in lost])
        self.answer_all()
        self.assertEqual(self.sent(), [(0, 3)])

    def test_answers_in_any_order(self) -> None:
        self.begin(size=4 * COMPARE_SPAN_BYTES)
        self.differ(0, 0)
        self.differ(0, 70)
        self.link("connected")
        self.refresh()
        self.assertEqual(len(self.asked), COMPARE_SPANS_MAX)
        asked, self.asked = self.asked, []
        self.answer(asked[1:])
        self.assertEqual(self.sent(), [])
        self.answer(asked[:1])
        self.assertEqual(self.sent(), [(0, 0), (0, 70)])

    # -- what counts ------------------------------------------------------------------------------

    def test_an_equal_chunk_counts_once_what_was_hashed_is_durable(self) -> None:
        """rules.md 14: a crash would bring back what the mirror does not hold."""
        self.begin(stepped=True)
        self.world.data().corrupt(0, b"what the mirror does not hold")
        self.refresh()
        unit = self.world.group.units[0]
        # The trim is framed, and so it is hashed; it is not durable yet.
        unit.syncing.go_on = lambda: None  # type: ignore[method-assign]
        self.world.client.ask(unit, nbd.CMD_TRIM, 0, CHUNK)
        self.link("connected")
        self.answer_all()
        self.commit()
        self.assertEqual(self.done()[0], 0)
        del unit.syncing.go_on
        unit.syncing.hasten()
        self.world.settle()
        self.assertEqual(self.sent(), [])
        self.commit()
        self.assertTrue(self.world.group.coherent)

    def test_a_crash_goes_on_where_it_was(self) -> None:
        self.begin(size=2 * COMPARE_SPAN_BYTES)
        self.link("connected")
        self.refresh()
        job = self.world.group.refresh_job
        assert job is not None
        self.answer(self.asked[:1])
        self.assertEqual(self.done(), [COMPARE_SPAN_BYTES, 0])
        self.world.crash(nothing)
        self.start()
        again = self.world.group.refresh_job
        assert again is not None
        self.assertEqual(again.id, job.id)
        self.link("connected")
        self.assertEqual(
            [(q.ldsu, q.offset) for q in self.asked],
            [(0, COMPARE_SPAN_BYTES), (1, 0), (1, COMPARE_SPAN_BYTES)],
        )
        self.answer_all()
        for _ in range(3):
            self.commit()
        self.assertTrue(self.world.group.coherent)

    # -- for whom ---------------------------------------------------------------------------------

    def test_no_other_secondary_may_begin_at_the_cut_once_it_compares(self) -> None:
        self.begin()
        self.refresh()
        job = self.world.group.refresh_job
        assert job is not None
        self.assertIsNotNone(job.announcement())
        self.link("connected")
        self.assertEqual(len(self.asked), 2)
        self.assertIsNone(job.announcement())
        self.world.crash(nothing)
        self.start()
        again = self.world.group.refresh_job
        assert again is not None
        self.assertEqual(again.id, job.id)
        self.assertIsNone(again.announcement())

    def test_another_secondary_is_compared_from_the_start(self) -> None:
        self.begin()
        self.link("connected")
        self.refresh()
        job = self.world.group.refresh_job
        assert job is not None
        self.answer(self.asked[:1])
        self.link("refused", code=4, reason="another history", diverged=True)
        again = self.world.group.refresh_job
        assert again is not None
        self.assertNotEqual(again.id, job.id)
        self.assertIsNotNone(again.announcement())
        # It is told again and again while it is refused: that is no reason to begin anew.
        self.link("refused", code=4, reason="another history", diverged=True)
        self.assertIs(self.world.group.refresh_job, again)
        self.asked = []
        self.link("connected")
        self.assertEqual([(q.ldsu, q.offset) for q in self.asked], [(0, 0), (1, 0)])

    def test_killed_while_it_waits_for_answers(self) -> None:
        self.begin()
        self.link("connected")
        self.refresh()
        killed = self.world.group.kill_refresh()
        self.world.settle()
        self.successResultOf(killed)
        self.answer_all()
        self.assertEqual(self.sent(), [])
        self.assertFalse(self.world.group.coherent)
        self.refresh()
        self.answer_all()
        for _ in range(3):
            self.commit()
        self.assertTrue(self.world.group.coherent)


class SitesTests(TestCase):
    """Both sites, with writes that go on."""

    timeout = 300

    def fill(self, sites: Sites, ldsu: int, content: bytes) -> None:
        (sites.base / f"data{ldsu}").write_bytes(content)

    @inlineCallbacks
    def test_with_live_writes(self) -> Steps:
        sites = Sites(self, size=8 * MIB, writelog=2 * MIB)
        self.fill(sites, 0, b"".join(unique(n) for n in range(8 * MIB // 4096)))
        yield sites.start()
        yield sites.connected()
        yield sites.refresh()
        driver = sites.driver
        assert driver is not None
        before = sites.cable.passed
        yield driver.refresh("smart")
        number = 0
        while driver.refresh_job is not None:
            number += 1
            sites.write(number % 2, number * 37 % 2048 * 4096, unique(number))
            yield sites.drained()
        self.assertLess(sites.cable.passed - before, 2 * MIB + number * 8192)
        yield sites.drained()
        sites.assert_equal()
        self.assertTrue(driver.coherent)

    @inlineCallbacks
    def test_a_secondary_that_is_replaced_in_the_middle(self) -> Steps:
        sites = Sites(self, size=8 * MIB, writelog=MIB)
        self.fill(sites, 0, b"".join(unique(n) for n in range(8 * MIB // 4096)))
        yield sites.start()
        yield sites.connected()
        yield sites.refresh()
        driver = sites.driver
        assert driver is not None
        yield driver.refresh("smart")
        job = driver.refresh_job
        assert job is not None
        yield sites.until(lambda: job.compared, "the first questions")
        yield sites.stop_rmd()
        self.assertIs(driver.refresh_job, job)
        sites.initialise_journal()
        for index in range(2):
            (sites.base / f"mirror{index}").write_bytes(bytes(sites.size))
        yield sites.start_rmd()
        yield sites.until(lambda: driver.coherent, "the end of the refresh")
        yield sites.drained()
        sites.assert_equal()

    @inlineCallbacks
    def test_either_site_restarts_in_the_middle(self) -> Steps:
        sites = Sites(self, size=8 * MIB, writelog=MIB)
        self.fill(sites, 1, b"".join(unique(n) for n in range(8 * MIB // 4096)))
        yield sites.start()
        yield sites.connected()
        driver = sites.driver
        assert driver is not None
        begun = yield driver.refresh("smart")
        job = driver.refresh_job
        assert job is not None
        yield sites.until(lambda: job.status()["done_bytes"] > MIB, "some progress")
        yield sites.stop_rmd()
        yield sites.start_rmd()
        yield sites.until(lambda: job.status()["done_bytes"] > 10 * MIB, "some progress")
        yield sites.stop_driver()
        yield sites.start_driver()
        driver = sites.driver
        assert driver is not None
        if driver.refresh_job is not None:
            self.assertEqual(driver.refresh_job.id.hex(), begun["id"])
        yield sites.until(lambda: driver.coherent, "the end of the refresh")
        yield sites.drained()
        sites.assert_equal()
