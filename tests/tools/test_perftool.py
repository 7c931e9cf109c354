"""qdsperftool: charts of what the files have, and the same as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core.samples import GroupSample, LdsuSample, header, row
from qdsmirror.paths import Paths
from qdsmirror.tools import charts, perftool
from tests.daemons.world import GROUP

START = 1_790_000_000.0


def sample(number: int, kbps: float, fill: float = 10.0, state: str = "connected") -> GroupSample:
    ldsu = LdsuSample("qds0", kbps, kbps / 2, 5.0, 3, 100, fill, 0.5)
    return GroupSample(START + 10 * number, 1.5, 0, state, (ldsu,), kbps, 0.5, 0, 0)


class ToolTests(SynchronousTestCase):
    def setUp(self) -> None:
        base = Path(tempfile.mkdtemp(dir="/tmp", prefix="qdsc"))
        self.addCleanup(shutil.rmtree, base)
        self.paths = Paths.of(base)
        for one in (self.paths.etc, self.paths.var):
            one.mkdir()
        self.paths.host_config.write_text("name = alpha\n")
        text = GROUP.format(
            root=base, number=0, port=5750, window="16M", primary="alpha", secondary="beta"
        )
        self.paths.group_config(0).write_text(text)
        before = os.environ.get("TZ")
        os.environ["TZ"] = "UTC"
        time.tzset()
        self.addCleanup(self.put_back, before)

    def put_back(self, zone: str | None) -> None:
        del os.environ["TZ"]
        if zone is not None:
            os.environ["TZ"] = zone
        time.tzset()

    def write(self, *samples: GroupSample, generation: str = "") -> None:
        path = self.paths.var / f"dsgrp000.prf{generation}"
        path.write_text("\n".join([header(["qds0"]), *map(row, samples), ""]))

    def call(self, *argv: str) -> tuple[int, str, str]:
        out = io.TextIOWrapper(io.BytesIO(), "utf-8")
        err = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = perftool.main([*argv, "--root", str(self.paths.root)])
        out.seek(0)
        return code, out.read(), err.getvalue()

    def test_charts(self) -> None:
        self.write(*(sample(n, 10.0 * n) for n in range(30)), generation=".1")
        self.write(*(sample(n, 10.0 * n, state="accumulating") for n in range(30, 60)))
        code, out, _ = self.call("--print")
        self.assertEqual(code, 0)
        lines = out.splitlines()
        self.assertEqual(lines[0], "dsgrp000: 60 samples")
        self.assertEqual(lines[1], "state: c connected, a accumulating")
        self.assertRegex(lines[2], r"^ {11}c{34,35}a{34,35}$")
        self.assertEqual(lines[3], "netkbps (KB/s on the wire): last 590, mean 295, most 590")
        # From nothing at the left to the most at the right.
        self.assertRegex(lines[4], r"^ {5}1000 ┤$")
        bottom = lines[9].partition("┤")[2]
        self.assertEqual((lines[9][:11], bottom[0], bottom[-1]), ("        0 ┤", " ", "█"))
        heights = [sum(row_[at : at + 1] == "█" for row_ in lines[5:10]) for at in range(11, 80)]
        self.assertEqual(heights, sorted(heights))
        self.assertIn("qds0.pctwl (% of the log in use): last 10, mean 10, most 10", lines)
        self.assertRegex(lines[-1], r"^ {11}14:13:20 +14:23:10$")
        self.assertTrue(all(len(line) <= 80 for line in lines), out)

    def test_what_is_chosen(self) -> None:
        self.write(*(sample(n, 100.0) for n in range(60)))
        code, out, _ = self.call(
            "--print", "--chart", "data_kbps", "--chart", "age_s", "--since", "100 s", "qds0"
        )
        titles = [line.partition(" ")[0] for line in out.splitlines() if re.match(r"\w", line)]
        self.assertEqual((code, titles), (0, ["dsgrp000:", "qds0.data_kbps", "qds0.age_s"]))
        self.assertIn("11 samples", out)

    def test_json(self) -> None:
        self.write(sample(0, 100.0), generation=".1")
        self.write(sample(1, 200.0))
        with open(self.paths.tracking_file(0), "a") as file:
            file.write("1790000020.000 1.5\n1790000030.0")
        code, out, _ = self.call("--print", "--json")
        (group,) = json.loads(out)["groups"]
        self.assertEqual((code, group["group"], group["damaged_lines"]), (0, 0, 1))
        self.assertEqual([one["netkbps"] for one in group["samples"]], [100.0, 200.0])
        self.assertEqual(group["samples"][0]["state"], "connected")
        self.assertEqual(group["samples"][1]["ldsus"][0]["data_kbps"], 100.0)
        self.assertEqual(group["files"], [f"{self.paths.var}/dsgrp000.prf{n}" for n in (".1", "")])

    def test_nothing_yet(self) -> None:
        code, out, _ = self.call("--print")
        self.assertEqual(code, 0)
        self.assertIn("dsgrp000: no samples yet", out)
        self.write()
        self.assertIn("no samples yet", self.call("--print")[1])
        self.assertEqual(json.loads(self.call("--print", "--json")[1])["groups"][0]["samples"], [])

    def test_wrong_use(self) -> None:
        for argv, part in (
            ([], "qdsperftool --print"),
            (["--print", "--since", "long"], "is not a time"),
            (["--print", "--chart", "kbps"], "invalid choice"),
            (["--print", "qds7"], "no LDSU"),
        ):
            code, _, err = self.call(*argv)
            self.assertEqual(code, 2)
            self.assertIn(part, err)

    def test_a_generation_that_changes_meanwhile(self) -> None:
        """Neither twice nor not at all: what became the previous one while it was read."""
        self.write(sample(0, 1.0), generation=".1")
        self.write(sample(1, 1.0))
        original, turns = perftool._lines, []

        def reading(path: Path) -> Any:
            found = original(path)
            if not turns:
                turns.append(path)
                os.replace(self.paths.tracking_file(0), self.paths.var / "dsgrp000.prf.1")
                self.write(sample(2, 1.0))
            return found

        self.patch(perftool, "_lines", reading)
        samples = json.loads(self.call("--print", "--json")[1])["groups"][0]["samples"]
        self.assertEqual([one["epoch"] - START for one in samples], [10.0, 20.0])

    def test_an_output_without_such_letters(self) -> None:
        self.write(*(sample(n, 10.0 * n) for n in range(10)))
        self.patch(perftool, "_has_letters", lambda: False)
        self.call("--print")[1].encode("ascii")


class ChartTests(SynchronousTestCase):
    @given(
        st.lists(
            st.tuples(st.floats(0, 1e9), st.none() | st.floats(0, 1e15)), min_size=1, max_size=60
        ),
        st.integers(1, 200),
        st.booleans(),
    )
    @settings(max_examples=150, deadline=None)
    def test_any_values(
        self, points: list[tuple[float, float | None]], width: int, plain: bool
    ) -> None:
        points = sorted(points, key=lambda one: one[0])
        frame = charts.Frame(points[0][0], points[-1][0], width, plain=plain)
        lines = charts.chart("x", points, frame)[1:]
        lines += charts.strip("x", [(when, "word") for when, _ in points], frame)[1:]
        self.assertTrue(all(len(line) <= max(width, 19) for line in lines))

    def test_scales(self) -> None:
        for most, end in (
            (0, 1),
            (5e-324, 1),
            (0.03, 0.05),
            (1, 1),
            (1.01, 2),
            (60, 100),
            (199, 200),
        ):
            self.assertEqual(charts.top([None, most]), end)

    def test_numbers(self) -> None:
        for value, text in (
            (0.0, "0"), (0.123, "0.123"), (12.34, "12.3"), (999, "999"), (1234, "1234"),
            (12345, "12.35k"), (2.5e6, "2.5M"), (1e9, "1G"),
        ):  # fmt: skip
            self.assertEqual(charts.number(value), text)

    def test_a_time_without_samples_stays_empty(self) -> None:
        points = [(float(n), 5.0) for n in [*range(50), *range(150, 200)]]
        frame = charts.Frame(0.0, 199.0, 111)
        found = charts.columns([(when, value) for when, value in points], frame, False)
        self.assertEqual(set(found[26:74]), {None})
        self.assertEqual(set(found[:25]), {5.0})
