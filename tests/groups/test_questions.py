"""Questions to the secondary, through the pmd: answered, or failed when the link is."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from blake3 import blake3
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.trial.unittest import SynchronousTestCase, TestCase

from qdsmirror.core.questions import (
    HASHES,
    READ,
    Answer,
    Question,
    pack_answer,
    pack_question,
    parse_answer,
    parse_question,
)
from qdsmirror.errors import DegradedError, ProtocolError, QdsError
from qdsmirror.groups.questions import Questions
from qdsmirror.groups.replies import Replies
from qdsmirror.limits import KIB, QUESTIONS_MAX
from qdsmirror.storage.hashing import chunk_digests
from qdsmirror.storage.journal import Mirror
from tests.fakes import ImmediateWorker, MemoryDevice
from tests.groups.site import Sites, Steps

CHUNK = 64 * KIB


class FakePmd:
    """A link that keeps what is asked."""

    def __init__(self) -> None:
        self.is_connected = True
        self.asked: list[bytes] = []
        self.end = self

    def ask(self, question: bytes) -> None:
        self.asked.append(question)


class QuestionsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.pmd = FakePmd()
        self.questions = Questions(self.pmd)  # type: ignore[arg-type]

    def ask(self) -> tuple[int, Deferred[bytes]]:
        waiting = self.questions.ask(READ, 0, 0, 3)
        return parse_question(self.pmd.asked[-1]).id, waiting

    def test_each_gets_its_own_answer(self) -> None:
        (first, one), (second, other) = self.ask(), self.ask()
        self.questions.answered(pack_answer(Answer(second, b"two")))
        self.questions.answered(pack_answer(Answer(first, b"one")))
        self.assertEqual([self.successResultOf(one), self.successResultOf(other)], [b"one", b"two"])

    def test_what_the_secondary_says_of_itself(self) -> None:
        number, waiting = self.ask()
        self.questions.answered(pack_answer(Answer(number, b"", "its disk is gone")))
        failure = self.failureResultOf(waiting, QdsError)
        self.assertIn("its disk is gone", failure.getErrorMessage())

    def test_an_answer_of_another_length(self) -> None:
        number, waiting = self.ask()
        with self.assertRaises(ProtocolError):
            self.questions.answered(pack_answer(Answer(number, b"long")))
        self.failureResultOf(waiting, DegradedError)

    def test_a_lost_link_fails_what_waits_and_its_answer_is_dropped(self) -> None:
        number, waiting = self.ask()
        self.questions.fail_all("cut")
        self.failureResultOf(waiting, DegradedError)
        self.questions.answered(pack_answer(Answer(number, b"one")))

    def test_bounded(self) -> None:
        waiting = [self.ask()[1] for _ in range(QUESTIONS_MAX)]
        self.assertFalse(self.questions.has_room)
        self.failureResultOf(self.questions.ask(READ, 0, 0, 3), DegradedError)
        self.questions.fail_all("the end")
        for one in waiting:
            self.failureResultOf(one, DegradedError)

    def test_nobody_is_asked_without_a_link(self) -> None:
        self.pmd.is_connected = False
        self.failureResultOf(self.questions.ask(READ, 0, 0, 3), DegradedError)
        self.assertEqual(self.pmd.asked, [])


class HashingTests(SynchronousTestCase):
    def test_a_hole_counts_as_zeroes_and_the_last_chunk_may_be_short(self) -> None:
        device = MemoryDevice(4 * CHUNK)
        device.pwritev([b"x" * 512], CHUNK)
        expected = b"".join(
            blake3(part).digest()
            for part in (bytes(CHUNK), b"x" * 512 + bytes(CHUNK - 512), bytes(512))
        )
        self.assertEqual(chunk_digests(device, 0, 2 * CHUNK + 512, CHUNK), expected)
        self.assertEqual(
            chunk_digests(device, 2 * CHUNK, CHUNK, CHUNK), blake3(bytes(CHUNK)).digest()
        )


class RepliesTests(SynchronousTestCase):
    def test_of_a_device_that_has_failed(self) -> None:
        """Its failed sync may have taken away what it was asked for."""
        device = MemoryDevice(CHUNK)
        self.addCleanup(device.close)
        mirror = cast(Any, SimpleNamespace(devices=[device]))
        mirror.check_read = partial(Mirror.check_read, mirror)
        replies = Replies(mirror, ImmediateWorker(), lambda _: self.fail())
        told: list[bytes] = []
        for kind in (READ, HASHES):
            replies.take(
                pack_question(Question(1, kind, 0, 0, CHUNK, CHUNK * (kind == HASHES))), told.append
            )
        self.assertEqual([parse_answer(one).error for one in told], ["", ""])
        device.latch("fdatasync: Input/output error")
        for kind in (READ, HASHES):
            replies.take(
                pack_question(Question(1, kind, 0, 0, CHUNK, CHUNK * (kind == HASHES))), told.append
            )
        for one in told[2:]:
            self.assertIn("fdatasync", parse_answer(one).error)


class RelayTests(TestCase):
    """Both sites over TLS."""

    timeout = 300

    @inlineCallbacks
    def test_asked_over_the_link(self) -> Steps:
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        sites.write(1, CHUNK, b"x" * 4096)
        yield sites.drained()
        driver = sites.driver
        assert driver is not None
        ask = driver.pmd.questions.ask
        digests, data = yield gatherResults(
            [ask(HASHES, 1, 0, 2 * CHUNK, CHUNK), ask(READ, 1, CHUNK, 8192)]
        )
        mirror = sites.mirror(1)
        self.assertEqual(data, mirror[CHUNK : CHUNK + 8192])
        self.assertEqual(data[:1], b"x")
        expected = [blake3(mirror[at : at + CHUNK]).digest() for at in (0, CHUNK)]
        self.assertEqual(digests, b"".join(expected))

    @inlineCallbacks
    def test_a_question_about_what_is_not_there_ends_the_link(self) -> Steps:
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        driver = sites.driver
        assert driver is not None
        made = sites.cable.made
        yield self.assertFailure(driver.pmd.questions.ask(READ, 7, 0, 512), DegradedError)
        yield sites.until(lambda: sites.cable.made > made, "another connection")
        yield sites.connected()

    @inlineCallbacks
    def test_reports_reach_who_listens(self) -> Steps:
        sites = Sites(self)
        yield sites.start()
        yield sites.connected()
        driver, rmd = sites.driver, sites.rmd
        assert driver is not None and rmd is not None
        heard: list[dict[str, Any]] = []
        driver.pmd.listeners["weather"] = heard.append
        rmd.report({"about": "nobody's business"})
        rmd.report({"about": "weather", "rain": True})
        yield sites.until(lambda: heard, "the report")
        self.assertEqual(heard, [{"about": "weather", "rain": True}])
