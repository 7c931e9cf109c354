"""The throttles of a group's file: read, refused with line, column and word, written as read."""

from __future__ import annotations

from datetime import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qdsmirror.config import read_group
from qdsmirror.core.throttles import Action, Test, Throttle, Window
from qdsmirror.limits import THROTTLE_ACTIONS_MAX, THROTTLE_NAME_CHARS_MAX
from tests.core.test_throttles import TEXTS, actions
from tests.test_config import CONF, GROUP, RootedTestCase

OFFICE = '''\
[throttles]
  [[office hours]]
  from = 08:00:00                 # a comment
  to = 17:00:00
  test = netkbps > 200
  actions = """   # a comment
    sleep inc 15000

    # another
    syslog "dsgrp000 over 200 KB/s"
  """             # and one more
'''
NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_. -]{0,20}[A-Za-z0-9_])?", fullmatch=True)
TIMES = st.times().map(lambda at: at.replace(microsecond=0))


@st.composite
def throttles(draw: st.DrawFn) -> Throttle:
    """Draw any throttle."""
    measure = draw(st.sampled_from(["netkbps", "pctcpu", "pctwl", "lag"]))
    value: float = draw(st.integers(0, 100))
    if measure == "lag":
        value = draw(st.integers(0, 10**9)) / 1000
    relation = draw(st.sampled_from([">", ">=", "<", "<=", "==", "!="]))
    ends = draw(st.one_of(st.none(), st.lists(TIMES, min_size=2, max_size=2, unique=True)))
    return Throttle(
        draw(NAMES),
        Test(measure, relation, value, draw(st.booleans())),
        tuple(draw(st.lists(actions(), min_size=1, max_size=THROTTLE_ACTIONS_MAX))),
        Window(*ends) if ends else None,
    )


class FileTests(RootedTestCase):
    def one_wrong(self, old: str, new: str, line: int, key: str, *parts: str) -> None:
        """Expect one problem, counted from the line of ``[throttles]``."""
        before = GROUP.count("\n")
        self.assertIn(old, OFFICE)
        self.one_problem(GROUP + OFFICE.replace(old, new), before + line, key, *parts)

    def test_all_of_it(self) -> None:
        (one,) = self.group(GROUP + OFFICE).throttles
        self.assertEqual(
            one,
            Throttle(
                "office hours",
                Test("netkbps", ">", 200),
                (
                    Action("sleep", "inc", 15000),
                    Action("syslog", text="dsgrp000 over 200 KB/s"),
                ),
                Window(time(8), time(17)),
            ),
        )

    def test_none_and_the_least(self) -> None:
        self.assertEqual(self.group(GROUP).throttles, ())
        self.assertEqual(self.group(GROUP + "[throttles]\n").throttles, ())
        text = "[throttles]\n[[b]]\ntest = pctwl > 60\nactions = extend\n"
        text += '[[a]]\nactions = mail op "x"\ntest = lag > 1.5'
        first, second = self.group(GROUP + text).throttles
        self.assertEqual((first.name, first.window), ("b", None))
        self.assertEqual(str(second.actions[0]), 'mail op "x"')

    def test_both_kinds_of_quotes_and_line_ends(self) -> None:
        text = OFFICE.replace('"""', "'''").replace("\n", "\r\n")
        self.assertEqual(self.group(GROUP + text).throttles, self.group(GROUP + OFFICE).throttles)

    def test_what_is_wrong_is_named_by_line_column_and_word(self) -> None:
        name = "throttles.office hours"
        for old, new, line, key, *parts in (
            ("> 200", "~ 200", 5, "test", "column 18: expected a relation: one of", 'found "~"'),
            ("netkbps", "netkpbs", 5, "test", "column 10: ", 'mean "netkbps"', 'found "netkpbs"'),
            ("> 200", ">", 5, "test", "whole number", "found nothing more"),
            ("08:00:00", "8:00:00", 3, "from", "column 10: expected a time as HH:MM:SS, or --"),
            ("17:00:00", "--", 4, "to", "column 8: ", 'found "--"'),
            ("17:00:00", "08:00:00", 4, "to", "another time"),
            (
                "sleep inc",
                "sleep up",
                7,
                "actions",
                'column 11: expected set, inc or dec, found "up"',
            ),
            ("sleep inc", "slep inc", 7, "actions", "column 5: ", 'mean "sleep"', 'found "slep"'),
            ('200 KB/s"\n', "200 KB/s\n", 10, "actions", "column 12: ", "ends with"),
        ):
            self.one_wrong(old, new, line, f"{name}.{key}", *parts)
        self.one_wrong('  """  ', "  ", 6, "", 'actions: the """ that begin here are not closed')
        self.one_wrong('"""             #', '""" x #', 6, "", 'stands behind the closing """')
        self.one_wrong("sleep inc", "sleep\x07inc", 7, "", "control character (U+0007)")
        self.one_wrong("  test = netkbps > 200\n", "", 2, f"{name}.test", "missing")
        self.one_wrong("  test", "  tset = 1\n  test", 5, f"{name}.tset", 'mean "test"')
        long = "x" * (THROTTLE_NAME_CHARS_MAX + 1)
        self.one_wrong("office hours", long, 2, f"throttles.{long}", "64 characters")
        self.one_wrong("office hours", "office/hours", 2, "", "not a section's name")

    def test_each_throttle_is_complained_about(self) -> None:
        text = "[throttles]\n[[a]]\ntest = x\nactions = y\n[[b]]\ntest = lag > 1\nactions = z\n"
        problems = self.problems(GROUP + text)
        self.assertEqual([one.key for one in problems], ["throttles.a.test", "throttles.b.actions"])

    def test_only_throttles_have_names_with_blanks_and_values_of_several_lines(self) -> None:
        self.assertIn("section's name", self.problems(GROUP.replace("qds0", "qds 0"))[0].message)
        wrong = self.problems(GROUP.replace("/dev/w0", '"""/dev/w0"""'))
        self.assertIn("one line", wrong[0].message)

    def test_the_sample(self) -> None:
        text = (CONF / "throttles.sample").read_text()
        self.assertEqual(len(self.group(GROUP + text).throttles), 6)
        opened = text.replace("\n#  ", "\n  ")
        self.assertEqual(len(self.group(GROUP + opened).throttles), 13)

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(throttles())
    def test_what_is_written_is_read_as_the_same(self, one: Throttle) -> None:
        self.assertEqual(self.group(f"{GROUP}[throttles]\n{one}\n").throttles, (one,))

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test_any_text_is_read_or_refused_with_a_line(self, data: st.DataObject) -> None:
        def text(key: str, good: str) -> str:
            return f"{key} = {data.draw(st.one_of(st.just(good), TEXTS))}"

        quotes = data.draw(st.sampled_from(['"""', "'''", ""]))
        lines = [
            "[throttles]", "[[one]]", text("from", "08:00:00"), text("to", "17:00:00"),
            text("test", "lag > 1"), f"actions = {quotes}",
            *data.draw(st.lists(TEXTS, max_size=3)), quotes,
        ]  # fmt: skip
        path = self.paths.group_config(0)
        written = (GROUP + "\n".join(lines)).encode("utf-8", "surrogatepass")
        path.write_bytes(written)
        group, problems = read_group(path)
        if group is not None:
            (one,) = group.throttles
            self.assertEqual(self.group(f"{GROUP}[throttles]\n{one}").throttles, (one,))
            return
        self.assertTrue(problems)
        for problem in problems:
            self.assertTrue(1 <= problem.line <= written.count(b"\n") + 1, problem)
            self.assertEqual(problem.file, path)
