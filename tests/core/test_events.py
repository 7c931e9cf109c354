"""Lines of events, one line each whatever is in them; what a process leaves to its successor."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.evaluation import Fired, State
from qdsmirror.core.events import DONE, Seen, action_line, event_line, fired_line, mode_lines
from qdsmirror.core.rates import Reading
from qdsmirror.limits import EVENT_LINE_CHARS_MAX
from tests.core.test_evaluation import throttle


class LineTests(SynchronousTestCase):
    @given(st.text(max_size=60))
    @settings(max_examples=200, deadline=None)
    def test_one_line_of_ascii(self, text: str) -> None:
        line = event_line(1.5, "console", text)
        self.assertTrue(line.startswith("1.500 console"))
        self.assertEqual(len(line.encode("ascii").splitlines()), 1)
        self.assertTrue(line.isprintable())

    def test_not_too_long(self) -> None:
        self.assertEqual(len(event_line(1.0, "console", "x" * 10_000)), EVENT_LINE_CHARS_MAX)

    def test_what_fired(self) -> None:
        one = throttle("pctwl > 60", "extend", 'syslog "fills: up"', name='the "log"')
        fired = Fired(one, 61.4, ("qds0", "qds1"), ("qds0", "qds1"))
        self.assertEqual(
            fired_line(12.0, fired),
            r'12.000 fired "the \"log\"" pctwl > 60: 61 (qds0 qds1): extend; syslog "fills: up"',
        )
        self.assertEqual(
            action_line(12.0, DONE, one, one.actions[0], "qds0: /x\nis chained"),
            r'12.000 done "the \"log\"" extend: qds0: /x is chained',
        )


class ModeTests(SynchronousTestCase):
    def test_more_changes_than_are_kept(self) -> None:
        """What the driver does not know any more is left out; its numbers go on."""
        change = {"number": 40, "time": 7.0, "modes": ["connected"], "reason": "up"}
        said = {"modes": ["connected"], "driver": {"pid": 5}, "changes": [change]}
        seen, lines = mode_lines(Seen(5, 3, ()), Reading(9.0, 9.0, driver=said), "primary")
        self.assertEqual((seen, lines), (Seen(5, 40, ("connected",)), ["7.000 mode connected up"]))
        self.assertEqual(mode_lines(seen, Reading(9.0, 9.0, driver=said), "primary"), (seen, []))

    def test_a_daemon_that_does_not_answer_is_no_news(self) -> None:
        for role in ("primary", "secondary"):
            self.assertEqual(mode_lines(Seen(), Reading(9.0, 9.0), role), (Seen(), []))


class SuccessorTests(SynchronousTestCase):
    @given(
        st.builds(
            State,
            st.integers(0, 10**7),
            st.integers(0, 10**7),
            st.dictionaries(st.text(max_size=5), st.integers(1, 10**8), max_size=3),
            st.dictionaries(st.text(max_size=5), st.frozensets(st.text(max_size=5)), max_size=3),
        ),
        st.builds(Seen, st.integers(0), st.integers(0), st.tuples(st.text(), st.text())),
    )
    @settings(max_examples=100, deadline=None)
    def test_what_is_kept_is_taken_up(self, state: State, seen: Seen) -> None:
        self.assertEqual(State.from_json(json.loads(json.dumps(state.to_json()))), state)
        self.assertEqual(Seen.from_json(json.loads(json.dumps(seen.to_json()))), seen)
