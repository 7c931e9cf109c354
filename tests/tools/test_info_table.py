"""qdsinfo on a terminal: as wide as that is, in colour where that is welcome, once and live."""

from __future__ import annotations

import re
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.tools import info, info_view
from qdsmirror.tools.status import Group
from tests.tools.sites import driver_status
from tests.tools.terminal import on_terminal, screen

MIB = 1 << 20
SINCE = 1790000000.0
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m|\x1b\[[0-9;]*9[0-7][0-9;]*m")


def unit(number: int, **log: Any) -> dict[str, Any]:
    writelog = {"used_ratio": 0.43, "entries": 12, "seconds_to_full": None, **log}
    return {
        "name": f"qds{number}",
        "size": 256 * MIB,
        "data_device": f"/dev/vg0/data{number}",
        "mirror_device": f"/dev/vg0/mirror{number}",
        "device": None if number % 2 else f"/dev/qds/qds{number}",
        "errors": [],
        "writelog": writelog,
    }


def groups() -> list[Group]:
    """One that is well, one in trouble, one without a link, one at the secondary."""
    refresh = {"kind": "full", "id": "ab", "done_bytes": 50 * MIB, "remaining_bytes": 50 * MIB}
    bypass = {"id": "cd", "since": SINCE, "reason": "the writelog of qds2 is full"}
    connecting = {"pid": 12, "state": "connecting", "code": 0}
    connecting["reason"] = "no connection to beta.example.com:575 (Connection refused)" + 60 * " x"
    far = unit(9)
    del far["writelog"]
    return [
        driver_status(ldsus=[unit(0), unit(1)], lag={"entries": 12, "bytes": 49152, "seconds": 2}),
        driver_status(
            1,
            state="refresh",
            modes=["refresh", "bypass", "connected"],
            coherent=False,
            refresh={**refresh, "rate": 5.0 * MIB, "eta_seconds": 10.0, "started": SINCE},
            bypass={**bypass, "dirty_bytes": 123456, "lost": False},
            lag={"entries": 1234567, "bytes": 12345678901, "seconds": 1234.5},
            ldsus=[
                unit(2, used_ratio=0.91, seconds_to_full=42.0, entries=1234567),
                unit(3, used_ratio=1.0, seconds_to_full=0.0),
            ],
        ),
        driver_status(2, state="accumulating", modes=["accumulating"], pmd=connecting),
        driver_status(
            3,
            role="secondary",
            gsn={"written": None, "committed": 5, "mirrored": 4},
            lag={"entries": 1, "bytes": 4096, "seconds": None},
            journal={"used_ratio": 0.65, "entries": 1, "seconds_to_full": 3000.0},
            ldsus=[far],
        ),
    ]


def shown(columns: int, **environment: str) -> str:
    found = groups()
    found[2]["ldsus"] = [unit(4, used_ratio=0.7)]
    return on_terminal(lambda: info_view.show(found), columns, **environment)


class WidthTests(TestCase):
    def test_nothing_is_wider_than_the_terminal(self) -> None:
        for columns in (60, 80, 100, 120, 200):
            lines = screen(shown(columns))
            self.assertLessEqual(max(map(len, lines)), columns)
            text = "\n".join(lines)
            for told in ("dsgrp003", "qds9", "42 s", "FULL", "91.0 %", "NO", "refresh+bypass"):
                self.assertIn(told, text, columns)

    def test_less_where_there_is_less_room(self) -> None:
        """What is left out first is what can be done without; in the widest nothing is."""
        for columns, there, gone in (
            (160, ("ROLE", "GSN", "COMMITTED", "MIRRORED", "SIZE", "ENTRIES"), ()),
            (120, ("ROLE", "GSN", "COMMITTED"), ("MIRRORED",)),
            (80, ("STATE", "SINCE", "COHERENT", "LAG", "SIZE"), ("GSN", "COMMITTED", "MIRRORED")),
            (60, ("STATE", "LAG", "LOG USED", "FULL IN", "DEVICE"), ("ROLE", "SIZE", "GSN")),
        ):
            heads = [line for line in screen(shown(columns)) if line.startswith("GROUP")]
            for heading in there:
                self.assertIn(heading, " ".join(heads), columns)
            for heading in gone:
                self.assertNotIn(heading, " ".join(heads), columns)

    def test_long_remarks_stay_beside_their_group(self) -> None:
        lines = screen(shown(80))
        first = next(n for n, line in enumerate(lines) if "no connection to beta" in line)
        self.assertTrue(lines[first].startswith("dsgrp002  "))
        self.assertRegex(lines[first + 1], r"^ {10}\S")


class ColourTests(TestCase):
    def test_on_a_terminal(self) -> None:
        output = shown(120)
        self.assertIn("\x1b[32mconnected", output)
        self.assertIn("\x1b[1;31mFULL", output)

    def test_not_where_it_is_not_welcome(self) -> None:
        output = shown(120, NO_COLOR="1")
        self.assertIsNone(COLOUR.search(output))
        self.assertIn("dsgrp001", output)
        # That has no more than letters.
        output = shown(120, TERM="dumb")
        self.assertNotIn("\x1b", output)
        self.assertIn("MIRRORED", output)


class WatchTests(TestCase):
    def output(self, looks: int) -> str:
        def work() -> None:
            seen = iter(range(looks))

            def look() -> tuple[str, list[Group]]:
                if next(seen, None) is None:
                    raise KeyboardInterrupt
                return "alpha", groups()[:1]

            try:
                info.watch(look, 0.5, False, lambda seconds: None)
            except KeyboardInterrupt:
                print("interrupted")

        return on_terminal(work, 80)

    def test_the_whole_terminal_and_the_last_one_stays(self) -> None:
        output = self.output(3)
        live, _, rest = output.partition("\x1b[?1049l")
        self.assertIn("\x1b[?1049h", live)
        self.assertEqual(live.count("every 0.5 s"), 3)
        self.assertIn("alpha", live)
        lines = [line for line in screen(rest) if line]
        self.assertTrue(lines[0].startswith("GROUP"), lines)
        self.assertEqual(lines[-1], "interrupted")

    def test_lines_where_there_is_no_terminal(self) -> None:
        from tests.tools.sites import captured

        def main(argv: list[str]) -> int:
            looks = iter([groups()[:1], groups()[:1]])
            look = lambda: ("alpha", next(looks))  # noqa: E731
            self.assertRaises(StopIteration, info.watch, look, 0.5, False, lambda seconds: None)
            return 0

        output = captured(self, main)[1]
        self.assertEqual(output.count("\nGROUP     LDSU"), 2)
        self.assertNotIn("\x1b", output)
