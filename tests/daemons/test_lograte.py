"""A log that repeats itself is cut short, and says by how much."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock
from twisted.logger import LogEvent, Logger, LogPublisher, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.daemons.lograte import RateLimit
from qdsmirror.limits import (
    LOG_ALIKE_LINES_MAX,
    LOG_KINDS_MAX,
    LOG_LINES_MAX,
    LOG_PERIOD_SECONDS,
)


class RateLimitTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.events: list[LogEvent] = []
        self.limit = self.make(self.clock.callLater)

    def make(self, later: Any) -> RateLimit:
        limit = RateLimit(self.events.append, later, self.clock.seconds)
        self.log = Logger("qdsmirror.groups", observer=LogPublisher(limit))
        return limit

    def texts(self) -> list[str]:
        found = [formatEvent(event) for event in self.events]
        self.events.clear()
        return found

    def storm(self, count: int, name: str = "qds0") -> None:
        for number in range(count):
            self.log.error("{group}: {unit}: {n} failed", group="dsgrp000", unit=name, n=number)

    def test_few_pass(self) -> None:
        self.storm(LOG_ALIKE_LINES_MAX)
        self.clock.advance(LOG_PERIOD_SECONDS * 3)
        self.assertEqual(len(self.texts()), LOG_ALIKE_LINES_MAX)

    def test_many_are_counted_when_the_period_is_over(self) -> None:
        self.storm(LOG_ALIKE_LINES_MAX + 100)
        self.assertEqual(len(self.texts()), LOG_ALIKE_LINES_MAX)
        self.clock.advance(LOG_PERIOD_SECONDS)
        (event,) = self.events
        self.assertEqual(event["suppressed_lines"], 100)
        self.assertEqual((event["group"], event["unit"]), ("dsgrp000", "qds0"))
        last = f"dsgrp000: qds0: {LOG_ALIKE_LINES_MAX + 99} failed"
        expected = [f"(100 lines like this one were suppressed) {last}"]
        self.assertEqual(self.texts(), expected)
        # Then it begins anew, and nothing is told where nothing was left out.
        self.storm(1)
        self.clock.advance(LOG_PERIOD_SECONDS * 2)
        self.assertEqual(self.texts(), ["dsgrp000: qds0: 0 failed"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_storm_that_goes_on(self) -> None:
        for _ in range(100):
            self.storm(LOG_ALIKE_LINES_MAX)
            self.clock.advance(LOG_PERIOD_SECONDS / 10)
        self.clock.advance(LOG_PERIOD_SECONDS)
        counts = [event["suppressed_lines"] for event in self.events if "suppressed_lines" in event]
        self.assertGreaterEqual(len(counts), 9)
        passed = len(self.events) - len(counts)
        self.assertEqual(passed + sum(counts), 100 * LOG_ALIKE_LINES_MAX)

    def test_what_is_about_another_is_not_alike(self) -> None:
        for number in range(LOG_ALIKE_LINES_MAX * 2):
            self.storm(1, f"qds{number}")
        self.log.info("dsgrp000: connected")
        self.assertEqual(len(self.texts()), LOG_ALIKE_LINES_MAX * 2 + 1)

    def test_all_together_are_bounded(self) -> None:
        self.flood(LOG_LINES_MAX + 50)
        self.assertEqual(len(self.texts()), LOG_LINES_MAX)
        self.clock.advance(LOG_PERIOD_SECONDS)
        (text,) = self.texts()
        self.assertIn("(50 lines of many kinds were suppressed)", text)

    def flood(self, count: int) -> None:
        for number in range(count):
            self.log.warn("dsgrp000: {unit}: slow", unit=f"qds{number}")

    def test_a_new_failure_passes_behind_many_others(self) -> None:
        self.flood(LOG_LINES_MAX + 1)
        self.texts()
        self.storm(LOG_ALIKE_LINES_MAX + 2)
        self.log.critical("dsgrp000: a bug")
        self.assertEqual(len(self.texts()), LOG_ALIKE_LINES_MAX + 1)
        self.clock.advance(LOG_PERIOD_SECONDS)
        counts = {event["suppressed_which"]: event["suppressed_lines"] for event in self.events}
        self.assertEqual(counts, {"like this one": 2, "of many kinds": 1})

    def test_failures_take_no_room_from_other_lines(self) -> None:
        for number in range(LOG_LINES_MAX):
            self.storm(1, f"qds{number}")
        self.texts()
        self.log.info("dsgrp000: connected")
        self.assertEqual(self.texts(), ["dsgrp000: connected"])

    def test_outcomes_of_commands_pass_always(self) -> None:
        """The log has each of them: qdsmirror-security(7)."""
        self.flood(LOG_LINES_MAX + 1)
        self.texts()
        for _ in range(LOG_ALIKE_LINES_MAX * 2):
            self.log.info("dsgrp000.driver: Bypass to=on: done", audit=True)
        self.assertEqual(len(self.texts()), LOG_ALIKE_LINES_MAX * 2)

    def test_memory_is_bounded(self) -> None:
        for number in range(LOG_KINDS_MAX * 2):
            self.log.info("{text}", text=f"kind{number}")
        self.assertLessEqual(len(self.limit._periods), LOG_KINDS_MAX)

    def test_without_a_timer_the_next_event_tells(self) -> None:
        self.make(None)
        self.storm(LOG_ALIKE_LINES_MAX + 3)
        self.clock.advance(LOG_PERIOD_SECONDS)
        self.texts()
        self.log.info("something else")
        first, second = self.texts()
        self.assertIn("(3 lines like this one", first)
        self.assertEqual(second, "something else")

    def test_the_end_of_the_process(self) -> None:
        self.storm(LOG_ALIKE_LINES_MAX + 3)
        self.texts()
        self.limit.flush()
        (text,) = self.texts()
        self.assertIn("(3 lines like this one", text)

    def test_a_failure_is_told_of_without_its_traceback(self) -> None:
        for _ in range(LOG_ALIKE_LINES_MAX + 1):
            try:
                raise ZeroDivisionError
            except ZeroDivisionError:
                self.log.failure("dsgrp000: a bug")
        self.texts()
        self.limit.flush()
        (event,) = self.events
        self.assertNotIn("log_failure", event)
        self.assertEqual(
            formatEvent(event), "(1 lines like this one were suppressed) dsgrp000: a bug"
        )
