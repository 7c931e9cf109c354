"""The language of throttles: read, refused with a position, written as it is read."""

from __future__ import annotations

import re
from datetime import time

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import throttles
from qdsmirror.core.throttles import (
    Action,
    Throttle,
    ThrottleError,
    Window,
    parse_action,
    parse_actions,
    parse_test,
    parse_time,
    window,
)
from qdsmirror.limits import THROTTLE_ACTIONS_MAX, THROTTLE_SLEEP_USEC_MAX

#: Words as they are, nearly are, and are not.
WORDS = st.sampled_from(
    [
        *throttles.MEASURES, *throttles.RELATIONS, *throttles.TRANSITIONS, *throttles.ACTIONS,
        "set", "inc", "dec", "off", "0", "1", "200", "15000", "10000001", "1.5", "0.001", "1.2345",
        "-1", "netkb", "T", "=", "=>", "slep", "/bin/true", "bin", "root@example.com", "a@b@c",
        '"over 200 KB/s"', "'it''s'", '"', '"a\\"b"', '"\\x"', "#", "x#y", "é", "\u2028", "\x00",
    ]
)  # fmt: skip
TEXTS = st.one_of(
    st.lists(WORDS, max_size=6).map(" ".join),
    st.lists(WORDS, max_size=6).map("".join),
    st.text(max_size=40),
)


def actions() -> st.SearchStrategy[Action]:
    """Draw any action."""
    text = st.text(
        st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=30
    )  # fmt: skip
    usec = st.integers(0, THROTTLE_SLEEP_USEC_MAX)
    sleep = st.builds(
        Action, st.sampled_from(["sleep", "writesleep"]), st.sampled_from(["set", "inc", "dec"]),
        usec,
    )  # fmt: skip
    arguments = st.lists(st.one_of(text, st.just(""), st.just('"""')), max_size=3)
    return st.one_of(
        sleep,
        st.builds(Action, st.just("limit"), amount=st.one_of(st.none(), st.integers(1, 10**8))),
        st.builds(Action, st.sampled_from(["extend", "free"])),
        st.builds(Action, st.sampled_from(["syslog", "console"]), text=text),
        st.builds(Action, st.just("mail"), address=st.just("op+1@example.com"), text=text),
        st.builds(
            Action, st.just("exec"), argv=arguments.map(lambda rest: ("/opt/page me", *rest))
        ),
    )


class LanguageTests(SynchronousTestCase):
    def refused(self, text: str, column: int, word: str, *, action: bool = False) -> str:
        """Expect a text to be refused at a word; give what was expected there."""
        parse = parse_action if action else parse_test
        error = self.assertRaises(ThrottleError, parse, text)
        self.assertEqual((error.column, error.word), (column, word))
        self.assertIn(f"column {column}: ", error.message)
        self.assertIn(error.expected, error.message)
        return error.expected

    def test_tests(self) -> None:
        self.assertEqual(str(parse_test("netkbps   T>200")), "netkbps T> 200")
        self.assertEqual(str(parse_test(" lag <= 1.50 ")), "lag <= 1.5")
        for measure in throttles.MEASURES:
            for operator in (*throttles.RELATIONS, *throttles.TRANSITIONS):
                text = f"{measure} {operator} 60"
                self.assertEqual(str(parse_test(text)), text)

    def test_what_is_no_test_is_refused_where_it_is_wrong(self) -> None:
        self.assertIn('did you mean "netkbps"', self.refused("netkpbs > 1", 1, "netkpbs"))
        self.assertIn("T!=", self.refused("netkbps ~ 3", 9, "~"))
        self.assertIn("0 to 100", self.refused("pctwl > 101", 9, "101"))
        self.assertIn("whole number", self.refused("pctcpu > 1.5", 10, "1.5"))
        self.assertIn("three places", self.refused("lag T> 1.2345", 8, "1.2345"))
        self.assertIn("whole number", self.refused("netkbps T>", 11, ""))
        self.assertIn("end", self.refused("netkbps > 1 or", 13, "or"))
        self.refused("netkbps => 1", 9, "=>")
        self.refused("", 1, "")

    def test_actions(self) -> None:
        for text in (
            "sleep inc 15000", "writesleep set 0", "limit 200", "limit off", "extend", "free",
            'syslog "dsgrp000 over 200 KB/s"', 'console "a \\"b\\" \\\\"', 'mail op@x.org "late"',
            'exec /opt/page "" "two words" plain',
        ):  # fmt: skip
            self.assertEqual(str(parse_action(text)), text)
        self.assertEqual(parse_action("syslog over 200 KB/s # why").text, "over 200 KB/s")
        self.assertEqual(parse_action("syslog 'C:\\dir'").text, "C:\\dir")
        self.assertEqual(parse_action("exec /bin/x 'a b' c").argv, ("/bin/x", "a b", "c"))

    def test_what_is_no_action_is_refused_where_it_is_wrong(self) -> None:
        def refused(text: str, column: int, word: str) -> str:
            return self.refused(text, column, word, action=True)

        self.assertIn('did you mean "sleep"', refused("slep inc 1", 1, "slep"))
        self.assertIn("set, inc or dec", refused("sleep up 1", 7, "up"))
        self.assertIn("microseconds", refused("sleep inc 10000001", 11, "10000001"))
        self.assertIn("microseconds", refused("sleep inc", 10, ""))
        self.assertIn("or off", refused("limit 0", 7, "0"))
        self.assertIn("absolute path", refused("exec rm -rf", 6, "rm"))
        self.assertIn("address", refused("mail a@b@c x", 6, "a@b@c"))
        self.assertIn("text", refused("mail a@b", 9, ""))
        self.assertIn("line's end", refused("extend qds0", 8, "qds0"))
        self.assertIn('ends with "', refused('syslog "a', 8, '"a'))
        self.assertIn("blank", refused('syslog a"b"', 9, '"b"'))
        self.assertIn("control", refused('syslog "a\x07"', 8, "a\x07"))
        self.assertIn("1024", refused("syslog " + "x" * 1025, 8, "x" * 1025))
        refused('syslog " "', 8, " ")

    def test_sixteen_actions_at_most_and_one_at_least(self) -> None:
        lines = ["", "# first", *["extend"] * THROTTLE_ACTIONS_MAX]
        self.assertEqual(len(parse_actions(lines)), THROTTLE_ACTIONS_MAX)
        error = self.assertRaises(ThrottleError, parse_actions, [*lines, "  free"])
        self.assertEqual((error.line, error.column, error.word), (len(lines) + 1, 3, "free"))
        error = self.assertRaises(ThrottleError, parse_actions, ["", "# none"])
        self.assertIn("an action", error.expected)
        error = self.assertRaises(ThrottleError, parse_actions, ["extend", "sleep set x"])
        self.assertEqual((error.line, error.column, error.word), (2, 11, "x"))

    def test_windows(self) -> None:
        self.assertIsNone(window(parse_time("--"), parse_time("--")))
        day = window(parse_time("08:00:00"), parse_time("17:00:00"))
        self.assertEqual(day, Window(time(8), time(17)))
        for text in ("8:00:00", "24:00:00", "08:60:00", "08:00", "", "０8:00:00"):
            self.assertRaises(ThrottleError, parse_time, text)
        self.assertRaises(ThrottleError, window, time(8), None)
        self.assertRaises(ThrottleError, window, time(8), time(8))

    def test_a_window_has_its_first_second_and_not_its_last(self) -> None:
        day, night = Window(time(8), time(17)), Window(time(22), time(6))
        shown = [time(5, 59, 59), time(6), time(8), time(16, 59, 59), time(17), time(22), time(0)]
        self.assertEqual(
            [day.shows(one) for one in shown], [False, False, True, True] + [False] * 3
        )
        self.assertEqual(
            [night.shows(one) for one in shown], [True, False, False, False, False, True, True]
        )

    @settings(max_examples=1000, deadline=None)
    @given(TEXTS)
    @example('"a\\"b"')
    def test_any_text_is_read_or_refused_with_a_position(self, text: str) -> None:
        for parse in (parse_test, parse_action):
            try:
                made = parse(text)
            except ThrottleError as error:
                self.assertTrue(1 <= error.column <= len(text) + 1, (error.column, text))
                self.assertTrue(error.expected)
                # A quoted word is told as it is meant: without its quotes and escapes.
                meant = re.sub(r'\\(["\\])', r"\1", text)
                if error.word.strip() and error.column <= len(text):
                    word = error.word.split()[0]
                    self.assertTrue(word in text or word in meant, (word, text))
            else:
                self.assertEqual(parse(str(made)), made)

    @settings(max_examples=1000, deadline=None)
    @given(st.lists(actions(), min_size=1, max_size=THROTTLE_ACTIONS_MAX))
    def test_what_is_written_is_read_as_the_same(self, wanted: list[Action]) -> None:
        throttle = Throttle("x", parse_test("lag > 1"), tuple(wanted))
        lines = throttle.lines()
        self.assertEqual(parse_actions(lines[5:-1]), tuple(wanted))
