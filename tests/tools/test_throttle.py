"""qdsconfigtool throttle: what throttles mean, and when they would have fired; show has them."""

from __future__ import annotations

from datetime import UTC, datetime

from qdsmirror.core.samples import GroupSample, LdsuSample, header, row
from tests.tools.test_configtool import GROUP, ToolTestCase

THROTTLES = '''\
[throttles]
  [[office hours]]
  from = 08:00:00
  to = 17:00:00
  test = netkbps > 200
  actions = """
    sleep inc 15000
    syslog "over 200 KB/s"
  """
  [[night]]
  from = 17:00:00
  to = 08:00:00
  test = netkbps >= 0
  actions = sleep set 0
  [[filling]]
  test = pctwl T> 60
  actions = extend
'''
#: 07:59:40 in Berlin.
BEGIN = datetime(2026, 1, 15, 6, 59, 40, tzinfo=UTC).timestamp()


class ThrottleTestCase(ToolTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.paths.group_config(0).write_text(GROUP + THROTTLES)
        self.paths.var.mkdir()
        self.history = self.paths.var / "dsgrp000.prf"

    def record(self, rates: list[float], interval: float = 10.0, fill: float = 70.0) -> None:
        rows = [
            row(
                GroupSample(
                    BEGIN + interval * n, netkbps=rate, pctcpu=0.0, lag_seconds=0.0,
                    ldsus=(LdsuSample("qds0", pctwl=fill),),
                )
            )
            for n, rate in enumerate(rates)
        ]  # fmt: skip
        self.history.write_text("\n".join([header(["qds0"]), *rows]) + "\n")


class ExplainTests(ThrottleTestCase):
    def test_in_words(self) -> None:
        self.assertEqual(self.call("throttle", "--explain"), 0)
        said = self.out.getvalue()
        for part in (
            "dsgrp000: 3 throttles, evaluated every 10 s\n",
            "[[office hours]] from 08:00:00 to 17:00:00: at every evaluation at which the group "
            "sends more than 200 KB a second over the network:\n",
            "the pause before an entry is sent grows by 15000 microseconds\n",
            "the system's log is told: over 200 KB/s\n",
            "[[night]] from 17:00:00 to 08:00:00 of the next day",
            "[[filling]] always: once, each time that more than 60 percent of an LDSU's writelog",
        ):
            self.assertIn(part, said)

    def test_as_json(self) -> None:
        self.assertEqual(self.call("throttle", "--explain", "--json", "-g", "0"), 0)
        (group,) = self.json()["groups"]
        self.assertEqual((group["group"], group["interval"]), (0, 10.0))
        first, _, last = group["throttles"]
        self.assertEqual(
            (first["from"], first["test"], first["actions"][0]),
            ("08:00:00", "netkbps > 200", "sleep inc 15000"),
        )
        self.assertIsNone(last["from"])

    def test_every_action_has_words(self) -> None:
        actions = (
            "sleep set 1", "writesleep dec 1", "limit 5", "limit off", "extend", "free",
            "syslog a", "console b", "mail c d", "exec /e f",
        )  # fmt: skip
        text = "[throttles]\n[[x]]\ntest = lag != 1.5\nactions = '''\n" + "\n".join(actions)
        self.paths.group_config(0).write_text(f"{GROUP}{text}\n'''\n")
        self.assertEqual(self.call("throttle", "--explain"), 0)
        self.assertEqual(len(self.out.getvalue().splitlines()), 2 + len(actions))
        self.assertIn("other than 1.5 seconds", self.out.getvalue())

    def test_no_throttles(self) -> None:
        self.paths.group_config(0).write_text(GROUP)
        self.assertEqual(self.call("throttle", "--explain"), 0)
        self.assertEqual(self.out.getvalue(), "dsgrp000: no throttles\n")

    def test_errors_name_file_line_and_word(self) -> None:
        path = self.base / "dsgrp007.cfg"
        path.write_text(GROUP + THROTTLES.replace("netkbps > 200", "netkpbs > 200"))
        self.assertEqual(self.call("throttle", "--explain", "--file", str(path)), 10)
        said = self.err.getvalue()
        line = (GROUP + THROTTLES).split("netkbps > 200")[0].count("\n") + 1
        self.assertIn(f"{path}:{line}: throttles.office hours.test: column 10: ", said)
        self.assertIn('found "netkpbs"', said)
        self.assertIn('did you mean "netkbps"', said)

    def test_show_has_them(self) -> None:
        self.assertEqual(self.call("show"), 0)
        path = self.base / "dsgrp000.cfg"
        text = self.out.getvalue().split("here primary\n")[1]
        path.write_text(text)
        self.assertEqual(self.call("throttle", "--explain", "--json", "--file", str(path)), 0)
        again = self.json()
        self.assertEqual(self.call("throttle", "--explain", "--json"), 0)
        self.assertEqual(self.json(), again)


class ReplayTests(ThrottleTestCase):
    def replay(self, *more: str) -> list[tuple[str, str, int]]:
        code = self.call(
            "throttle", "--json", "--replay", str(self.history), "--zone", "Europe/Berlin", *more
        )
        self.assertEqual(code, 0, self.out.getvalue())
        return [
            (one["shown"][11:], one["throttle"], one["sleep_us"]) for one in self.json()["fired"]
        ]

    def test_when_which_would_have_fired(self) -> None:
        self.record([300, 300, 300, 100, 250])
        self.assertEqual(
            self.replay(),
            [
                ("07:59:40", "night", 0),
                ("07:59:40", "filling", 0),
                ("07:59:50", "night", 0),
                ("08:00:00", "office hours", 15000),
                ("08:00:20", "office hours", 30000),
            ],
        )

    def test_for_people(self) -> None:
        self.record([300, 300, 300])
        code = self.call("throttle", "--replay", str(self.history), "--zone", "Europe/Berlin")
        self.assertEqual(code, 0)
        lines = self.out.getvalue().splitlines()
        self.assertEqual(
            lines[-2],
            "2026-01-15 08:00:00 office hours: netkbps > 200: 300: sleep inc 15000; "
            'syslog "over 200 KB/s" -> sleep 15000',
        )
        self.assertEqual(
            lines[-1],
            "samples: 3, from 2026-01-15 07:59:40 to 2026-01-15 08:00:00; throttles: 3; firings: 4",
        )

    def test_as_often_as_they_would_have_been_evaluated(self) -> None:
        """Five samples an evaluation, whose mean counts."""
        self.record([300] * 6 + [100, 200, 100, 200, 405] + [900, 10, 20, 30, 40], interval=2.0)
        self.assertEqual(
            [one[:2] for one in self.replay()],
            [
                ("07:59:40", "night"), ("07:59:40", "filling"), ("07:59:50", "night"),
                ("08:00:00", "office hours"),
            ],
        )  # fmt: skip

    def test_a_clock_that_was_set_back(self) -> None:
        """What comes after that is evaluated as often as before, of its own samples."""
        self.record([300] * 5)
        later = self.history.read_text()
        self.record([300] * 3)
        first = self.history.read_text().splitlines()[1:]
        self.history.write_text(later + "\n".join(first) + "\n")
        times = [at for at, name, _ in self.replay() if name != "filling"]
        shown = ["07:59:40", "07:59:50", "08:00:00", "08:00:10", "08:00:20"]
        self.assertEqual(times, shown + shown[:3])

    def test_another_groups_history_and_another_file(self) -> None:
        self.record([300])
        other = self.history.rename(self.history.with_name("old"))
        self.assertEqual(self.call("throttle", "--replay", str(other)), 2)
        self.assertIn("-g", self.err.getvalue())
        self.history = other
        self.assertEqual([one[1] for one in self.replay("-g", "0")], ["night", "filling"])
        path = self.base / "dsgrp005.cfg"
        path.write_text(GROUP)
        self.assertEqual(self.replay("--file", str(path)), [])

    def test_what_cannot_be_replayed(self) -> None:
        self.assertEqual(self.call("throttle", "--replay", str(self.history)), 2)
        self.assertIn("No such file", self.err.getvalue())
        self.history.write_text("junk\n")
        self.assertEqual(self.call("throttle", "--replay", str(self.history)), 2)
        self.assertIn("no samples", self.err.getvalue())
        self.record([1])
        code = self.call("throttle", "--replay", str(self.history), "--zone", "Mars/Olympus")
        self.assertEqual(code, 2)
        self.assertIn("time zone", self.err.getvalue())
        self.assertEqual(self.call("throttle"), 2)
