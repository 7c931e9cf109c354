"""When a pmd tries a refused link again."""

from __future__ import annotations

from typing import Any
from unittest import mock

from twisted.internet.defer import CancelledError, ensureDeferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.errors import IdentityError
from qdsmirror.groups.primary import PrimaryGroup
from qdsmirror.groups.retry import Retry
from qdsmirror.limits import REFUSED_RETRY_SECONDS, REFUSED_RETRY_SECONDS_MIN


class RefusedRetryTests(SynchronousTestCase):
    """The pauses, without a link."""

    def pauses(self, group: Any, count: int) -> list[float]:
        return [group._retry.refused_seconds() for _ in range(count)]

    def group(self) -> Any:
        group = PrimaryGroup.__new__(PrimaryGroup)
        group._retry = Retry(Clock(), 1.0)
        group._outdated = False
        group.link_state = {"state": "connecting"}
        return group

    def test_doubling_up_to_the_most(self) -> None:
        self.assertEqual(
            self.pauses(self.group(), 9), [1, 2, 4, 8, 16, 32, *[REFUSED_RETRY_SECONDS] * 3]
        )

    def test_no_pause_is_longer_than_what_has_passed(self) -> None:
        passed = REFUSED_RETRY_SECONDS_MIN
        for pause in self.pauses(self.group(), 20):
            self.assertLessEqual(pause, passed)
            passed += pause

    def test_apply_begins_anew(self) -> None:
        group = self.group()
        self.pauses(group, 6)
        # Also in the midst of an attempt, whose refusal then is of no long consequence.
        group.retry()
        self.assertEqual(self.pauses(group, 2), [1, 2])


class OutdatedTests(SynchronousTestCase):
    """An attempt that began before somebody has acted."""

    def test_its_refusal_says_nothing(self) -> None:
        clock = Clock()
        group: Any = PrimaryGroup.__new__(PrimaryGroup)
        group.name, group._driver, group._ways = "dsgrp000", None, mock.Mock()
        group.config = mock.Mock()
        group._retry = Retry(clock, 1.0)
        for act in (group.retry, group.try_again, None):
            for state in ("connecting", "refused"):
                group.link_state = {"state": state, "reason": "", "code": 0, "hint": ""}

                async def connect(_driver: Any, act: Any = act) -> Any:
                    if act is not None:
                        act()
                    raise IdentityError("another secret", "mend it")

                group._connect = connect
                session = ensureDeferred(group._session(mock.Mock()))
                if act is None:
                    # As ever: it is told, and tried again after a pause.
                    self.assertNoResult(session)
                    self.assertEqual(group.link_state["state"], "refused")
                    clock.advance(REFUSED_RETRY_SECONDS)
                else:
                    self.assertEqual(group.link_state["state"], "connecting")
                self.successResultOf(session)
                self.assertEqual(clock.getDelayedCalls(), [])


class StoppedTests(SynchronousTestCase):
    def test_no_attempt_follows_the_stop(self) -> None:
        """Also where the one under way fails for being ended: no timer is left behind."""
        clock = Clock()
        retry = Retry(clock, 1.0)
        retry.stop()
        self.failureResultOf(ensureDeferred(retry.pause()), CancelledError)
        self.assertEqual(clock.getDelayedCalls(), [])

    def test_nor_one_that_was_to_follow_at_once(self) -> None:
        """Somebody acts while an attempt is under way, and the pmd stops before it is refused."""
        clock = Clock()
        group: Any = PrimaryGroup.__new__(PrimaryGroup)
        group.name, group._driver, group._ways = "dsgrp000", None, mock.Mock()
        group.link_state = {"state": "connecting", "reason": "", "code": 0, "hint": ""}
        group._retry = Retry(clock, 1.0)

        async def connect(_driver: Any) -> Any:
            group.retry()
            group._retry.stop()
            raise IdentityError("another secret", "mend it")

        group._connect = connect
        session = ensureDeferred(group._session(mock.Mock()))
        self.failureResultOf(session, CancelledError)
        self.assertEqual(clock.getDelayedCalls(), [])
