"""Configuration files: every key, every refusal, and no text that raises anything else."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configobj import ConfigObj
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import TestCase

from qdsmirror import config, configsource, limits, pki
from qdsmirror.config import (
    GroupConfig,
    LdsuConfig,
    Problem,
    ProblemsError,
    Tunables,
    load_group,
    load_groups,
    load_host,
    load_secret,
    parse_seconds,
    parse_size,
    read_group,
    scan_groups,
)
from qdsmirror.configsafety import why_unsafe
from qdsmirror.configvalues import Listen, NetworkPath
from qdsmirror.errors import EXIT_CONFIG, ConfigError
from qdsmirror.paths import Paths

CONF = Path(__file__).resolve().parent.parent / "conf"

GROUP = """\
operation = async
[primary]
host = db1
[secondary]
host = dr1
journal_device = /dev/j0
[ldsus]
[[qds0]]
data_device = /dev/d0
writelog_device = /dev/w0
mirror_device = /dev/d0
"""
HOST = "name = db1\n"


@contextmanager
def root() -> Iterator[Paths]:
    """Give the paths of a new QDS_ROOT with its etc/."""
    base = tempfile.mkdtemp(dir="/tmp")
    paths = Paths.of(base)
    paths.etc.mkdir()
    try:
        yield paths
    finally:
        shutil.rmtree(base)


class RootedTestCase(TestCase):
    """Each test has a QDS_ROOT of its own."""

    def setUp(self) -> None:
        manager = root()
        self.paths = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)

    def group(self, text: str, number: int = 0) -> GroupConfig:
        self.paths.group_config(number).write_text(text)
        return load_group(self.paths, number)

    def problems(self, text: str) -> list[Problem]:
        self.paths.group_config(0).write_text(text)
        group, problems = read_group(self.paths.group_config(0))
        self.assertIsNone(group)
        return problems

    def one_problem(self, text: str, line: int, key: str, *parts: str) -> None:
        problems = self.problems(text)
        self.assertEqual(len(problems), 1, problems)
        self.assertEqual((problems[0].line, problems[0].key), (line, key), problems)
        for part in parts:
            self.assertIn(part, problems[0].message)


class GroupTests(RootedTestCase):
    def test_smallest(self) -> None:
        self.assertEqual(
            self.group(GROUP),
            GroupConfig(
                number=0,
                name="dsgrp000",
                path=self.paths.group_config(0),
                operation="async",
                durability="flush",
                on_overflow="bypass",
                primary_host="db1",
                primary_address="db1",
                secondary_host="dr1",
                secondary_address="dr1",
                port=575,
                journal_device="/dev/j0",
                tunables=Tunables(4096, 1.0, 48 * limits.MIB, 5.0),
                ldsus=(LdsuConfig(0, "qds0", "/dev/d0", "/dev/w0", "/dev/d0"),),
            ),
        )

    def test_every_key(self) -> None:
        text = """\
            operation = "async"   # comment
            durability = 'always'
            on_overflow = block
            [ primary ]           # comment with ] ] ]
            host = DB1.Example.com
            address = 10.0.0.1
            [secondary]
            host = dr1
            address = 2001:DB8::0001
            port = 5750
            journal_device = "/dev/a #1"
            [tunables]
            metadata_entries = 1
            metadata_seconds = 200 ms
            send_window = 64M
            reconnect_max = 2 min
            [ldsus]
            [[b]]
            data_device = /d1
            writelog_device = /w1
            mirror_device = /m,1
            [[a]]
            data_device = /d2
            writelog_device = /w2
            mirror_device = /it's
        """
        group = self.group(text, 511)
        self.assertEqual((group.number, group.name), (511, "dsgrp511"))
        self.assertEqual((group.operation, group.durability), ("async", "always"))
        self.assertEqual(
            (group.primary_host, group.primary_address), ("db1.example.com", "10.0.0.1")
        )
        self.assertEqual((group.secondary_address, group.port), ("2001:db8::1", 5750))
        self.assertEqual(group.journal_device, "/dev/a #1")
        self.assertEqual(group.tunables, Tunables(1, 0.2, 64 * limits.MIB, 120.0))
        self.assertEqual([(x.index, x.name) for x in group.ldsus], [(0, "b"), (1, "a")])
        self.assertEqual([x.mirror_device for x in group.ldsus], ["/m,1", "/it's"])

    def test_no_interpolation_no_lists(self) -> None:
        text = GROUP.replace("/dev/j0", "/dev/%(host)s,$host,x")
        self.assertEqual(self.group(text).journal_device, "/dev/%(host)s,$host,x")

    def test_line_endings_and_bom(self) -> None:
        self.paths.group_config(0).write_bytes(
            b"\xef\xbb\xbf" + GROUP.replace("\n", "\r\n").encode()
        )
        self.assertEqual(load_group(self.paths, 0).primary_host, "db1")

    def test_missing_keys(self) -> None:
        for key, section in (
            ("operation", ()),
            ("host", ("primary",)),
            ("journal_device", ("secondary",)),
            ("data_device", ("ldsus", "qds0")),
            ("writelog_device", ("ldsus", "qds0")),
            ("mirror_device", ("ldsus", "qds0")),
        ):
            text = re.sub(f"^{key} = .*\n", "", GROUP, count=1, flags=re.MULTILINE)
            lines = text.split("\n")
            marker = "[" * len(section) + (section[-1] if section else "") + "]" * len(section)
            line = lines.index(marker) + 1 if section else 1
            self.one_problem(text, line, ".".join([*section, key]), "missing")

    def test_missing_sections(self) -> None:
        text = GROUP.replace("[primary]\nhost = db1\n", "")
        self.one_problem(text, 1, "primary", "[primary] is missing", "host")
        text = GROUP.split("[ldsus]")[0]
        self.one_problem(text, 1, "ldsus", "at least one")
        self.one_problem(text + "[ldsus]\n", 7, "ldsus", "at least one")
        problems = self.problems("")
        self.assertEqual(
            {problem.key for problem in problems}, {"operation", "primary", "secondary"}
        )

    def test_all_keys_missing_in_a_section_that_is_there(self) -> None:
        self.one_problem(GROUP.replace("host = db1\n", ""), 2, "primary.host", "missing")

    def test_unknown_names(self) -> None:
        for old, new, line, key, near in (
            ("operation", "durabilty = always\noperation", 1, "durabilty", '"durability"'),
            ("host = dr1", "host = dr1\nprot = 1", 6, "secondary.prot", '"port"'),
            (
                "data_device",
                "datadevice = /x\ndata_device",
                9,
                "ldsus.qds0.datadevice",
                "data_device",
            ),
            ("[ldsus]", "[tunable]\n[ldsus]", 7, "tunable", '"tunables"'),
            ("[[qds0]]", "size = 1\n[[qds0]]", 8, "ldsus.size", "unknown key"),
            ("[ldsus]", "[DEFAULT]\nx = 1\n[ldsus]", 7, "DEFAULT", "unknown section"),
            ("[ldsus]", "[pond]\ndevices = /x\n[ldsus]", 7, "pond", "unknown section"),
            ("[ldsus]", "[secondary2]\n[ldsus]", 7, "secondary2", '"secondary"'),
            ("[ldsus]", "[[deep]]\n[ldsus]", 7, "secondary.deep", "unknown section"),
            ("[[qds0]]", "[[__many__]]\n[[qds0]]", 8, "ldsus.__many__", "unknown section"),
            ("[[qds0]]", "__many__ = 1\n[[qds0]]", 8, "ldsus.__many__", "section"),
            ("operation", "paths = a>b\noperation", 1, "paths", "unknown key"),
        ):
            self.one_problem(GROUP.replace(old, new, 1), line, key, near)

    def test_key_and_section_confused(self) -> None:
        self.one_problem("tunables = x\n" + GROUP, 1, "tunables", "[tunables]")
        text = GROUP.replace("[ldsus]", "[durability]\n[ldsus]")
        self.one_problem(text, 7, "durability", "durability = VALUE")
        text = "[operation]\n" + GROUP.replace("operation = async\n", "")
        self.assertEqual(
            [(p.line, p.key) for p in self.problems(text)],
            [(1, "operation"), (1, "operation")],
        )

    def test_later_choices_do_not_exist(self) -> None:
        for key, value, valid in (
            ("operation", "synchronous", "async, sync, near-sync"),
            ("on_disconnect", "bypass", "block, async"),
            ("durability", "none", "flush, always"),
            ("on_overflow", "drop", "bypass, block"),
        ):
            text = f"{key} = {value}\n" + re.sub(f"^{key} = .*\n", "", GROUP, flags=re.MULTILINE)
            self.one_problem(text, 1, key, f"not one of: {valid}")
        self.one_problem(GROUP.replace("= async", "= asnyc"), 1, "operation", 'mean "async"')

    def test_bad_values(self) -> None:
        for key, values in {
            "secondary.port": ["0", "65536", "-1", "5_7", "٥", "1e3", "575 576", "9" * 400],
            "secondary.journal_device": ["dev/j0", "~/j", "memory:128M", "/dev/", "/" + "x" * 4095],
            "secondary.host": ["a b", "-a", "a..b", "a" * 64, "ä", "a/b", ".".join(["abc"] * 64)],
            "secondary.address": ["10.0.0.1:575", "[::1]", "a b", "*"],
            "tunables.metadata_entries": ["0", "1000001", "1.5", "many"],
            "tunables.metadata_seconds": [
                "0",
                "99 ms",
                "61",
                "2 min",
                "1 d",
                "nan",
                "inf",
                "1 s s",
            ],
            "tunables.send_window": ["1023K", "65M", "-1M", "1.5M", "16 X", "1P", ""],
            "tunables.reconnect_max": ["0.05", "301 s", "1 h", "s"],
            "tunables.auto_refresh": ["maybe", "1", ""],
            "tunables.verify_every": ["0", "0.5 s", "367 d", "53 w", "often", "1 y", "7 d 1 h", ""],
            "tunables.verify_rate": ["63K", "17G", "0", "fast", ""],
            "tunables.chunk_size": ["2K", "2M", "65K", "0", "4095", "big", ""],
            "tunables.checkpoint_hold": ["yes", "Release", ""],
            "tunables.compression": [
                "gzip",
                "zstd:",
                "zstd:0",
                "zstd:20",
                "zstd:x",
                "lz4:1",
                "none:1",
                "zstd 3",
                "",
            ],
            "secondary.paths": [
                "10.0.0.2",
                "10.0.0.1>",
                ">10.0.0.2",
                "db1>10.0.0.2",
                "10.0.0.1>10.0.0.2>10.0.0.3",
                "10.0.0.1>10.0.0.2,",
                "10.0.0.1>10.0.0.2:0",
                "10.0.0.1>10.0.0.2:65536",
                "10.0.0.1>10.0.0.2:x",
                "10.0.0.1>fd00::2",
                "fd00::1>10.0.0.2",
                "10.0.0.1>a b",
                "fd00::1>[fd00::2",
                "fd00::1>[fd00::2]575",
                "10.0.0.1/24>10.0.0.2",
                ",".join(["10.0.0.1>10.0.0.2"] * 9),
            ],
            "tunables.before_image_bytes": ["-1", "17T", "all", ""],
            "tunables.before_images_full": ["go", "Stop", ""],
            "tunables.perf_interval": ["0", "0.9", "3601", "1 d", "never", ""],
            "tunables.prf_limit": ["15K", "65M", "0", "64 KB", ""],
        }.items():
            section, name = key.split(".")
            for value in values:
                base = GROUP if name != "host" else GROUP.replace("host = dr1\n", "")
                base = base.replace("journal_device = /dev/j0\n", "") if "journal" in name else base
                section_text = f"[{section}]\n" if section == "secondary" else "[ldsus]"
                new = f"[{section}]\n{name} = {value}\n"
                new += "" if section == "secondary" else "[ldsus]"
                text = base.replace(section_text, new, 1)
                problems = self.problems(text)
                self.assertEqual(len(problems), 1, (key, value, problems))
                self.assertEqual(problems[0].line, text.split("\n").index(f"{name} = {value}") + 1)
                self.assertLess(len(str(problems[0])), 300)

    def test_writelogs_in_memory(self) -> None:
        for value, size in (
            ("memory:192K", 192 * limits.KIB),
            ("memory:128M", 128 * limits.MIB),
            ("memory:1024G", 1024 * limits.GIB),
            ("memory:200001", 196608),
        ):
            ldsu = self.group(self.in_memory(value)).ldsus[0]
            self.assertEqual((ldsu.memory_bytes, ldsu.log_device), (size, "/dev/b0"))
        plain = self.group(GROUP)
        self.assertEqual((plain.in_memory, plain.ldsus[0].log_device), (False, "/dev/w0"))
        self.assertEqual(plain.ldsus[0].memory_bytes, 0)

    def in_memory(self, value: str, bitmap: str = "bitmap_device = /dev/b0\n") -> str:
        return GROUP.replace("writelog_device = /dev/w0\n", f"writelog_device = {value}\n{bitmap}")

    def test_wrong_writelogs_in_memory(self) -> None:
        for text, key, wrong in (
            (self.in_memory("memory:128M", ""), "writelog_device", "needs a bitmap_device"),
            (self.in_memory("memory:191K"), "writelog_device", "191K is not from 192K to 1024G"),
            (self.in_memory("memory:1025G"), "writelog_device", "is not from 192K to 1024G"),
            (self.in_memory("memory:lots"), "writelog_device", "is not a size"),
            (self.in_memory("memory:"), "writelog_device", "is not a size"),
            (self.in_memory("Memory:1M"), "writelog_device", "is not memory:SIZE"),
            (self.in_memory("memory 1M"), "writelog_device", "is not an absolute path"),
            (self.in_memory("memory:1M", "bitmap_device = b0\n"), "bitmap_device", "absolute"),
            (self.in_memory("/dev/w0"), "bitmap_device", "only a writelog in memory has one"),
            (self.in_memory("memory:1M").replace("b0", "d0"), "bitmap_device", "/dev/d0 is"),
            (
                self.in_memory("memory:1M")
                + "[[qds1]]\ndata_device = /1\nwritelog_device = /2\nmirror_device = /3\n",
                "writelog_device",
                "have all of a group's there, or none",
            ),
        ):
            (problem,) = self.problems(text)
            self.assertIn(wrong, problem.message)
            self.assertEqual(problem.key.split(".")[-1], key)

    def test_edges_of_ranges(self) -> None:
        for name, value, given_value in (
            ("metadata_entries", 1, "1"),
            ("metadata_entries", 1000000, "1000000"),
            ("metadata_seconds", 0.1, "100ms"),
            ("metadata_seconds", 60.0, "1 min"),
            ("send_window", limits.MIB, "1024K"),
            ("send_window", 64 * limits.MIB, "64 m"),
            ("reconnect_max", 0.1, "0.1"),
            ("reconnect_max", 300.0, "5min"),
            ("auto_refresh", True, "Yes"),
            ("auto_refresh", False, "no"),
            ("verify_every", 0.0, "never"),
            ("verify_every", 0.0, "Never"),
            ("verify_every", 1.0, "1"),
            ("verify_every", 12 * 3600.0, "12h"),
            ("verify_every", 7 * 86400.0, "7d"),
            ("verify_every", 14 * 86400.0, "2 w"),
            ("verify_every", 366 * 86400.0, "366 d"),
            ("verify_rate", 64 * limits.KIB, "64K"),
            ("verify_rate", 16 * limits.GIB, "16G"),
            ("chunk_size", 4 * limits.KIB, "4K"),
            ("chunk_size", limits.MIB, "1M"),
            ("checkpoint_hold", "strict", "strict"),
            ("compression", "none", "none"),
            ("compression", "lz4", "LZ4"),
            ("compression", "zstd", "zstd"),
            ("compression", "zstd:1", "zstd:1"),
            ("compression", "zstd:19", "zstd:19"),
            ("before_image_bytes", 0, "0"),
            ("before_image_bytes", 16 << 40, "16T"),
            ("before_images_full", "stop", "stop"),
            ("perf_interval", 1.0, "1000ms"),
            ("perf_interval", 3600.0, "1 h"),
            ("prf_limit", 16 * limits.KIB, "16K"),
            ("prf_limit", 64 * limits.MIB, "64M"),
        ):
            text = GROUP.replace("[ldsus]", f"[tunables]\n{name} = {given_value}\n[ldsus]")
            self.assertEqual(getattr(self.group(text).tunables, name), value)

    def test_paths(self) -> None:
        group = self.group(GROUP)
        self.assertEqual(group.paths, ())
        self.assertEqual(group.ways, (NetworkPath("", "dr1", 575),))
        text = GROUP.replace("[ldsus]", "port = 5750\npaths = %s\n[ldsus]")
        group = self.group(
            text % "10.1.0.1>10.1.0.2, 10.2.0.1 > dr1-b:5, fd00::1>[FD00::2]:6,fd00::1>fd00::2"
        )
        self.assertEqual(
            group.ways,
            (
                NetworkPath("10.1.0.1", "10.1.0.2", 5750),
                NetworkPath("10.2.0.1", "dr1-b", 5),
                NetworkPath("fd00::1", "fd00::2", 6),
                NetworkPath("fd00::1", "fd00::2", 5750),
            ),
        )
        self.assertEqual(group.identity_digest(), self.group(GROUP).identity_digest())
        shown = self.group(text % ", ".join(map(str, group.ways)))
        self.assertEqual(shown.ways, group.ways)
        self.assertEqual(str(group.paths[3]), "fd00::1>fd00::2")
        most = ",".join(["10.0.0.1>10.0.0.2"] * limits.PATHS_MAX)
        self.assertEqual(len(self.group(text % most).ways), limits.PATHS_MAX)

    def test_ldsu_names(self) -> None:
        for name in ("a", "A-b_c.9", "9", "x" * 64):
            self.assertEqual(self.group(GROUP.replace("qds0", name)).ldsus[0].name, name)
        for name in ("x" * 65, "-a", ".a", "a/b", "a b", "ä", "..", ""):
            problems = self.problems(GROUP.replace("qds0", name))
            self.assertEqual([problem.line for problem in problems], [8], name)

    def test_same_device_twice(self) -> None:
        second = "[[qds1]]\ndata_device = %s\nwritelog_device = %s\nmirror_device = %s\n"
        for values, key, other in (
            (("/dev/d0", "/w1", "/m1"), "ldsus.qds1.data_device", "ldsus.qds0.data_device"),
            (("/d1", "/dev/d0", "/m1"), "ldsus.qds1.writelog_device", "ldsus.qds0.data_device"),
            (("/dev/w0", "/w1", "/m1"), "ldsus.qds1.data_device", "ldsus.qds0.writelog_device"),
            (("/d1", "/w1", "/dev//./d0"), "ldsus.qds1.mirror_device", "ldsus.qds0.mirror_device"),
            (("/d1", "/d1", "/m1"), "ldsus.qds1.writelog_device", "ldsus.qds1.data_device"),
            (("/d1", "/w1", "//dev/j0"), "ldsus.qds1.mirror_device", "secondary.journal_device"),
        ):
            text = GROUP + second % values
            line = 13 + ["data", "writelog", "mirror"].index(key.split(".")[2].split("_")[0])
            self.one_problem(text, line, key, other)

    def test_writelogs_share_a_device(self) -> None:
        text = GROUP + "[[qds1]]\ndata_device = /d1\nwritelog_device = /dev/w0\n"
        group = self.group(text + "mirror_device = /m1\n")
        self.assertEqual([ldsu.writelog_device for ldsu in group.ldsus], ["/dev/w0"] * 2)

    def pool(self, value: str) -> str:
        return GROUP.replace("[ldsus]", f"[pool]\ndevices = {value}\n[ldsus]")

    def test_pool(self) -> None:
        self.assertEqual(self.group(GROUP).pool, ())
        self.assertEqual(self.group(GROUP.replace("[ldsus]", "[pool]\n[ldsus]")).pool, ())
        self.assertEqual(self.group(self.pool("/e0")).pool, ("/e0",))
        group = self.group(self.pool('"/e0 ,/e1,/dev/e 2"  # spare'))
        self.assertEqual(group.pool, ("/e0", "/e1", "/dev/e 2"))
        most = tuple(f"/dev/disk/by-id/wwn-{number:040d}" for number in range(128))
        self.assertEqual(self.group(self.pool(", ".join(most))).pool, most)
        # It is the primary's own business.
        self.assertEqual(group.identity_digest(), self.group(GROUP).identity_digest())

    def test_wrong_pools(self) -> None:
        for value, text in (
            ("e0", "absolute"),
            ("/e0,", "comma"),
            ("/e0, /", "directory"),
            ("/e0, /e1, /./e0", "pool.devices"),
            ("/dev/w0", "pool.devices"),
            ("/dev/d0", "pool.devices"),
            (", ".join(f"/e{number}" for number in range(129)), "more than 128"),
        ):
            (problem,) = self.problems(self.pool(value))
            self.assertIn(text, str(problem), value)
            self.assertNotEqual(problem.line, 0)

    def test_same_path_on_different_hosts(self) -> None:
        text = GROUP.replace("/dev/j0", "/dev/w0")
        self.assertEqual(self.group(text).journal_device, "/dev/w0")

    def test_one_host_cannot_be_both(self) -> None:
        self.one_problem(GROUP.replace("host = dr1", "host = DB1"), 5, "secondary.host", "primary")

    def test_too_many_ldsus(self) -> None:
        self.patch(config, "LDSUS_PER_GROUP_MAX", 1)
        second = "[[b]]\ndata_device = /1\nwritelog_device = /2\nmirror_device = /3\n"
        self.one_problem(GROUP + second, 7, "ldsus", "more than 1")

    def test_role(self) -> None:
        group = self.group(GROUP)
        self.assertEqual(
            [group.role_of(name) for name in ("db1", "dr1", "x")], ["primary", "secondary", None]
        )

    def test_frozen(self) -> None:
        with self.assertRaises(dataclasses.FrozenInstanceError):
            self.group(GROUP).port = 1  # type: ignore[misc]


class TextTests(RootedTestCase):
    def test_malformed_lines(self) -> None:
        for bad in (
            "nonsense",
            "= x",
            "a b = x",
            "port =",
            'port = ""',
            "port = # comment",
            "x = /dev/a#b",
            'x = "a" b',
            "x = 'a",
            'x = """a"""',
            "x = '''",
            'x = it\'s "it"',
            "[a",
            "[a]]",
            "[[a]",
            "[a] b",
            "[]",
            "[ [a] ]",
            "[a[b]",
            '["a"]',
            "[[[[[a]]]]]",
            "a\x00b = 1",
            "a = \x1b[31m",
            "a = b\u2028c",
            "a = " + "x" * limits.CONFIG_LINE_CHARS_MAX,
            "#" + "x" * limits.CONFIG_LINE_CHARS_MAX,
        ):
            text = GROUP.replace("host = dr1\n", f"host = dr1\n{bad}\n")
            problems = self.problems(text)
            # Without a key: refused as text, not because the configspec has no such key.
            self.assertEqual([(one.line, one.key) for one in problems], [(6, "")], bad)
            self.assertTrue(str(problems[0]).isprintable(), bad)

    def test_duplicates(self) -> None:
        text = GROUP.replace("host = dr1\n", "host = dr1\nhost = dr2\n")
        self.one_problem(text, 6, "", "duplicate keyword name")
        self.one_problem(GROUP + "[primary]\n", 12, "", "duplicate section name")
        self.one_problem(GROUP + "[[qds0]]\n", 12, "", "duplicate section name")

    def test_every_problem_is_named_in_line_order(self) -> None:
        text = GROUP.replace("host = db1", "hots = db1").replace("/dev/j0", "j0")
        text = text.replace("/dev/w0", "w0")
        self.assertEqual(
            [(p.line, p.key) for p in self.problems(text)],
            [
                (2, "primary.host"),
                (3, "primary.hots"),
                (6, "secondary.journal_device"),
                (10, "ldsus.qds0.writelog_device"),
            ],
        )

    def test_problems_are_bounded(self) -> None:
        self.assertEqual(len(self.problems("x\n" * 5000)), limits.CONFIG_PROBLEMS_MAX)

    def test_size_of_the_file(self) -> None:
        filler = "#" + "x" * 1022 + "\n"
        text = GROUP + filler * 1023
        text += "#" * (limits.CONFIG_FILE_BYTES_MAX - len(text))
        self.assertEqual(self.group(text).number, 0)
        self.one_problem(text + "#", 0, "", "larger than 1048576 bytes")
        text = GROUP + filler * 1024
        self.one_problem(text, 0, "", "larger than 1048576 bytes")

    def test_lines_that_blow_up_configobj(self) -> None:
        """ConfigObj's own expressions need up to minutes for each such line."""
        for bad in (
            "[a" + " ]" * 2000 + " x",
            "[" + " [" * 2000,
            " " * 4000 + "y",
            "x" + " " * 4000 + "y",
            "[" + " " * 4000 + "x",
            "x = " + " '" * 2000,
        ):
            self.assertEqual(len(self.problems(GROUP + bad)), 1)
        line = "[[a" + "b " * 30 + "]]\n"
        self.assertTrue(self.problems(GROUP + line * 10000))

    def test_not_utf8(self) -> None:
        self.paths.group_config(0).write_bytes(GROUP.encode() + b"# \xff\n")
        _group, problems = read_group(self.paths.group_config(0))
        self.assertEqual([(p.line, p.message) for p in problems], [(12, "not UTF-8 text")])

    def test_not_a_file(self) -> None:
        error = self.assertRaises(ConfigError, load_group, self.paths, 0)
        self.assertIn("dsgrp000.cfg: No such file", str(error))
        self.paths.group_config(1).mkdir()
        self.assertRaises(ConfigError, load_group, self.paths, 1)
        os.mkfifo(self.paths.group_config(2))
        error = self.assertRaises(ConfigError, load_group, self.paths, 2)
        self.assertIn("not a regular file", str(error))

    def test_unreadable(self) -> None:
        def refuse(*_arguments: object) -> int:
            raise PermissionError(13, "Permission denied")

        self.paths.group_config(0).write_text(GROUP)
        self.patch(configsource.os, "open", refuse)
        error = self.assertRaises(ConfigError, load_group, self.paths, 0)
        self.assertIn("dsgrp000.cfg: Permission denied", str(error))

    def test_error_names_first_problem_and_command(self) -> None:
        self.paths.group_config(0).write_text(GROUP.replace("host =", "hots ="))
        error = self.assertRaises(ProblemsError, load_group, self.paths, 0)
        self.assertEqual(error.exit_code, EXIT_CONFIG)
        self.assertEqual(len(error.problems), 4)
        self.assertIn(f"{self.paths.group_config(0)}:2: primary.host: missing", error.message)
        self.assertIn("(and 3 more)", error.message)
        self.assertEqual(error.hint, f"qdsconfigtool check --root {self.paths.root}")

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.text(alphabet=st.sampled_from("ab=[]\"'# \t\r\n/%$,_0\x00\u2028é")))
    def test_arbitrary_text(self, text: str) -> None:
        self.only_config_errors(text)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test_damaged_text(self, data: st.DataObject) -> None:
        """A good file with pieces of it replaced, repeated or taken out."""
        lines = (CONF / "dsgrp000.cfg.sample").read_text().splitlines()
        lines = [line for line in lines if line and not line.startswith("#")]
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(lines) - 1))
            other = data.draw(st.sampled_from(lines))
            new = data.draw(st.one_of(st.just(other), st.text(max_size=12), st.just("")))
            position = data.draw(st.integers(0, len(lines[at])))
            lines[at] = data.draw(st.sampled_from([new, lines[at][:position] + new]))
        self.only_config_errors("\n".join(lines))

    def only_config_errors(self, text: str) -> None:
        self.paths.group_config(0).write_bytes(text.encode("utf-8", "surrogatepass"))
        self.paths.host_config.write_bytes(text.encode("utf-8", "surrogatepass"))
        for load in (lambda: load_groups(self.paths), lambda: load_host(self.paths)):
            try:
                load()
            except ConfigError as error:
                self.assertIn(str(self.paths.etc), error.message)
                self.assertNotIn("\n", error.message)


class HostTests(RootedTestCase):
    def load(self, text: str) -> Any:
        self.paths.host_config.write_text(text)
        return load_host(self.paths)

    def test_defaults(self) -> None:
        host = self.load("name = DB1.example.com\n")
        etc = self.paths.etc
        self.assertEqual(
            host,
            config.HostConfig(
                "db1.example.com",
                etc / "host.pem",
                etc / "host.key",
                etc / "ca.pem",
                "",
                8,
                console=Listen("127.0.0.1", limits.CONSOLE_PORT),
                metrics_token_file=etc / "metrics.token",
            ),
        )

    def test_every_key(self) -> None:
        host = self.load(
            "name = a\ncertificate = /c\nkey = /k\nca = /ca\nuser = qds\nchildren = 512\n"
            "console = [::1]:81\nmetrics_token_file = /t\n"
        )
        expected = config.HostConfig("a", Path("/c"), Path("/k"), Path("/ca"), "qds", 512)
        more = {"console": Listen("::1", 81), "metrics_token_file": Path("/t")}
        self.assertEqual(host, dataclasses.replace(expected, **more))  # type: ignore[arg-type]

    def test_refusals(self) -> None:
        for text, part in (
            ("", "qds.cfg:1: name: missing"),
            ("name = a\nnmae = b\n", 'qds.cfg:2: nmae: unknown key; did you mean "name"?'),
            ("name = a\nchildren = 0\n", "children: 0 is not from 1 to 512"),
            ("name = a\nkey = host.key\n", "absolute path"),
            ("name = a\nuser = a b\n", "user's name"),
            ("name = a\nconsole = 127.0.0.1\n", "write ADDRESS:PORT"),
            ("name = a\nconsole = 9575\n", "write ADDRESS:PORT"),
            ("name = a\nconsole = example.com:80\n", "write ADDRESS:PORT"),
            ("name = a\nconsole = 127.0.0.1:0\n", "0 is not from 1 to 65535"),
            ("name = a\nconsole = ::1\n", "write ADDRESS:PORT"),
            ("name = a\nconsole = unix:run/x\n", "absolute path"),
            ("name = a\nmetrics_token_file = token\n", "absolute path"),
            ("name = a\n[primary]\n", "unknown section"),
            ("name = a\nallow_exec = true\n", "allow_exec"),
            ("name = a\nmail_relay = a b\n", "not an IP address or host name"),
            ("name = a\nmail_relay = a:0\n", "0 is not from 1 to 65535"),
            ("name = a\nmail_relay = a:x\n", "is not a whole number"),
            ("name = a\nmail_relay = :25\n", "not an IP address or host name"),
        ):
            self.assertIn(part, str(self.assertRaises(ConfigError, self.load, text)))

    def test_where_the_console_listens(self) -> None:
        for text, listen, local in (
            ("127.0.0.1:80", Listen("127.0.0.1", 80), True),
            ("127.9.9.9:80", Listen("127.9.9.9", 80), True),
            ("[::1]:80", Listen("::1", 80), True),
            ("unix:/run/x.sock", Listen("", 0, "/run/x.sock"), True),
            ("0.0.0.0:80", Listen("0.0.0.0", 80), False),
            ("[::]:80", Listen("::", 80), False),
            ("10.0.0.1:80", Listen("10.0.0.1", 80), False),
        ):
            found = self.load(f"name = a\nconsole = {text}\n").console
            self.assertEqual((found, found.is_local, str(found)), (listen, local, text))

    def test_mail_and_programs(self) -> None:
        host = self.load("name = a\n")
        self.assertEqual((host.relay, host.allow_exec), (None, False))
        for text, relay in (
            ("mail.example.com", ("mail.example.com", 25)),
            ("10.0.0.1:2525", ("10.0.0.1", 2525)),
            ("[fd00::1]:2525", ("fd00::1", 2525)),
            ("fd00::1", ("fd00::1", 25)),
        ):
            host = self.load(f"name = a\nmail_relay = {text}\nallow_exec = Yes\n")
            self.assertEqual((host.relay, host.allow_exec), (relay, True))


class TokenTests(RootedTestCase):
    """The token that whoever reads the metrics must show (security.md 8, 10)."""

    def write(self, content: bytes, mode: int = 0o600) -> Path:
        path = self.paths.etc / "metrics.token"
        path.write_bytes(content)
        path.chmod(mode)
        return path

    def test_good_ones(self) -> None:
        for token in (b"a" * 32, b"A-._~+/9" * 32, b"x" * 31 + b"y=="):
            self.assertEqual(config.load_token(self.write(token + b"\n")), token)
        self.assertEqual(len(config.load_token(self.write(pki.new_secret()))), 64)

    def test_refusals(self) -> None:
        for content in (b"", b"a" * 31, b"a" * 257, b"a" * 1000, b"a b" * 20, b"a" * 32 + b"\nb"):
            error = self.assertRaises(ConfigError, config.load_token, self.write(content))
            self.assertIn("not a token of 32 to 256", error.message)
            self.assertNotIn("aaa", str(error))

    def test_open_to_others(self) -> None:
        for mode in (0o644, 0o640, 0o602):
            error = self.assertRaises(ConfigError, config.load_token, self.write(b"a" * 32, mode))
            self.assertIn("lets others read the secret", error.message)
            self.assertIn("chmod 600", error.hint)

    def test_missing(self) -> None:
        error = self.assertRaises(ConfigError, config.load_token, self.paths.etc / "none")
        self.assertIn("qdsconfigtool pki", error.hint)


class SafetyTests(RootedTestCase):
    """Whose file may have programs run (security.md 9)."""

    def setUp(self) -> None:
        super().setUp()
        self.file = self.paths.host_config
        self.file.write_text("")

    def test_modes(self) -> None:
        for mode in (0o400, 0o600, 0o644, 0o755):
            self.file.chmod(mode)
            self.assertEqual(why_unsafe(self.file), "")
        for mode in (0o620, 0o664, 0o602, 0o777):
            self.file.chmod(mode)
            self.assertIn(f"can be written by others (mode {mode:04o})", why_unsafe(self.file))

    def test_owners(self) -> None:
        found = self.file.stat()
        for uid, own, safe in ((0, 1000, True), (1000, 1000, True), (1001, 1000, False)):
            fields = list(found)
            fields[stat.ST_UID] = uid
            self.patch(os, "fstat", lambda _, fields=fields: os.stat_result(fields))
            self.patch(os, "geteuid", lambda own=own: own)
            self.assertEqual(not why_unsafe(self.file), safe, (uid, own))

    def test_what_is_no_file(self) -> None:
        self.assertIn("No such file", why_unsafe(self.paths.etc / "missing"))
        self.assertIn("not a regular file", why_unsafe(self.paths.etc))


class GroupsTests(RootedTestCase):
    def other(self, old: str = "", new: str = "") -> str:
        text = GROUP.replace("qds0", "qds1").replace("/dev/", "/dev/second/")
        return text.replace(old, new, 1) if old else text

    def test_none(self) -> None:
        self.assertEqual(load_groups(self.paths), [])

    def test_in_number_order(self) -> None:
        self.group(self.other(), 10)
        self.group(GROUP, 2)
        (self.paths.etc / "dsgrp003.cfg~").write_text("junk")
        (self.paths.etc / "other.cfg").write_text("junk")
        self.assertEqual([group.number for group in load_groups(self.paths)], [2, 10])

    def test_names_are_unique_on_the_host(self) -> None:
        self.group(GROUP, 0)
        self.group(self.other("qds1", "qds0"), 1)
        error = self.assertRaises(ProblemsError, load_groups, self.paths)
        self.assertIn("dsgrp001.cfg:8: ldsus.qds0: dsgrp000 has an LDSU", error.message)
        groups, problems = scan_groups(self.paths)
        self.assertEqual(([group.number for group in groups], len(problems)), ([0], 1))

    def test_devices_are_used_once_on_a_host(self) -> None:
        self.group(GROUP, 0)
        for device, path, line in (
            ("journal_device", "/dev/j0", 6),
            ("journal_device", "/dev/d0", 6),
            ("data_device", "/dev/w0", 9),
            ("writelog_device", "/dev/./w0", 10),
            ("mirror_device", "/dev/j0", 11),
        ):
            self.group(re.sub(f"{device} = .*", f"{device} = {path}", self.other()), 1)
            error = self.assertRaises(ProblemsError, load_groups, self.paths)
            self.assertEqual([problem.line for problem in error.problems], [line])
            self.assertIn("dsgrp000 uses", error.message)

    def test_other_hosts_may_use_the_same_paths(self) -> None:
        self.group(GROUP, 0)
        text = GROUP.replace("qds0", "qds1").replace("db1", "db2").replace("dr1", "dr2")
        self.group(text, 1)
        self.assertEqual(len(load_groups(self.paths)), 2)

    def test_one_bad_file_does_not_hide_the_others(self) -> None:
        self.group(self.other(), 1)
        self.paths.group_config(0).write_text("nonsense")
        self.paths.group_config(2).mkdir()
        for name in ("dsgrp3.cfg", "dsgrp512.cfg", "dsgrp00٣.cfg"):
            (self.paths.etc / name).write_text(GROUP)
        groups, problems = scan_groups(self.paths)
        self.assertEqual([group.number for group in groups], [1])
        self.assertEqual(
            {problem.file.name for problem in problems},
            {"dsgrp000.cfg", "dsgrp002.cfg", "dsgrp3.cfg", "dsgrp512.cfg", "dsgrp00٣.cfg"},
        )

    def test_no_directory(self) -> None:
        self.paths.etc.rmdir()
        error = self.assertRaises(ConfigError, load_groups, self.paths)
        self.assertIn(str(self.paths.etc), error.message)


class DigestTests(RootedTestCase):
    def changed(self, old: str, new: str, number: int = 0) -> bool:
        before = self.group(GROUP, 0).identity_digest()
        self.assertEqual(len(before), 32)
        return self.group(GROUP.replace(old, new, 1), number).identity_digest() != before

    def test_identity(self) -> None:
        for old, new in (
            ("db1", "db2"),
            ("dr1", "dr2"),
            ("/dev/j0", "/dev/j1"),
            ("qds0", "qds1"),
            ("mirror_device = /dev/d0", "mirror_device = /dev/d1"),
        ):
            self.assertTrue(self.changed(old, new), new)
        self.assertTrue(self.changed("", "", 1))

    def test_not_identity(self) -> None:
        for old, new in (
            ("db1", "DB1"),
            ("[secondary]", "address = 10.0.0.1\n[secondary]"),
            ("host = dr1", "host = dr1\nport = 9\naddress = x"),
            ("[ldsus]", "[tunables]\nsend_window = 1M\n[ldsus]"),
            ("operation", "durability = always\noperation"),
            ("data_device = /dev/d0", "data_device = /dev/dx"),
            ("/dev/w0", "/dev/wx"),
        ):
            self.assertFalse(self.changed(old, new), new)

    def test_order_and_boundaries(self) -> None:
        group = self.group(GROUP)
        one = LdsuConfig(0, "a", "/d", "/w", "/bc")
        two = LdsuConfig(1, "a/b", "/d", "/w", "c")
        digests = {
            dataclasses.replace(group, ldsus=ldsus).identity_digest()
            for ldsus in ((one, two), (two, one), (one,), (two,))
        }
        self.assertEqual(len(digests), 4)

    def test_is_stable(self) -> None:
        """The two systems may run different releases: the digest is part of the protocol."""
        self.assertEqual(
            self.group(GROUP).identity_digest().hex(),
            "185d3b515fcdc6da17a3366bcd5b89aec0cade70d4a95ec4539ecc42d93d2f77",
        )


class SecretTests(RootedTestCase):
    def write(self, content: bytes, mode: int = 0o600) -> None:
        path = self.paths.group_secret(0)
        path.write_bytes(content)
        path.chmod(mode)

    def test_good(self) -> None:
        self.write(b"0a" * 32 + b"\n")
        self.assertEqual(load_secret(self.paths, 0), b"\x0a" * 32)
        self.write(b"0A" * 32, 0o400)
        self.assertEqual(load_secret(self.paths, 0), b"\x0a" * 32)

    def test_open_to_others(self) -> None:
        for mode in (0o640, 0o604, 0o660, 0o620, 0o601):
            self.write(b"0a" * 32, mode)
            error = self.assertRaises(ConfigError, load_secret, self.paths, 0)
            self.assertIn(f"mode {mode:04o}", error.message)
            self.assertIn("chmod 600", error.hint)

    def test_malformed_and_never_shown(self) -> None:
        for content in (b"", b"5ec" * 21, b"5e" * 31, b"5e" * 33, b"5g" * 32, b"\xff" * 64):
            self.write(content)
            error = self.assertRaises(ConfigError, load_secret, self.paths, 0)
            # (A temporary directory has any name.)
            told = f"{error.message} {error.hint}".replace(str(self.paths.etc), "")
            self.assertNotIn("5e", told)

    def test_missing_or_strange(self) -> None:
        error = self.assertRaises(ConfigError, load_secret, self.paths, 0)
        self.assertIn("dsgrp000.secret: No such file", error.message)
        os.mkfifo(self.paths.group_secret(1), 0o600)
        error = self.assertRaises(ConfigError, load_secret, self.paths, 1)
        self.assertIn("not a regular file", error.message)

    def test_of_another_user(self) -> None:
        self.write(b"0a" * 32)
        owner = self.paths.group_secret(0).stat().st_uid
        if owner == 0:
            os.chown(self.paths.group_secret(0), 12345, 0)
        self.patch(config.os, "geteuid", lambda: 54321)
        error = self.assertRaises(ConfigError, load_secret, self.paths, 0)
        self.assertIn("another user", error.message)


class UnitTests(TestCase):
    def test_sizes(self) -> None:
        for text, size in (
            ("0", 0),
            ("64K", 65536),
            ("16 m", 16 << 20),
            ("1G", 1 << 30),
            ("2T", 2 << 40),
        ):
            self.assertEqual(parse_size(text), size)
        for text in ("", "K", "1.5M", "-1", "1KB", "0x10", "1 2", "9" * 16, "٣"):
            self.assertRaises(ValueError, parse_size, text)

    def test_times(self) -> None:
        for text, seconds in (
            ("5 s", 5.0),
            ("5", 5.0),
            ("0.5", 0.5),
            ("200ms", 0.2),
            ("2 min", 120.0),
            ("1 h", 3600.0),
        ):
            self.assertAlmostEqual(parse_seconds(text), seconds)
        for text in ("", "s", "-5", "5 m", "1e9", "inf", "5s s", ".5"):
            self.assertRaises(ValueError, parse_seconds, text)


class SampleTests(RootedTestCase):
    def test_host(self) -> None:
        shutil.copy(CONF / "qds.cfg.sample", self.paths.host_config)
        self.assertEqual(load_host(self.paths).name, "db1.example.com")

    def test_group(self) -> None:
        shutil.copy(CONF / "dsgrp000.cfg.sample", self.paths.group_config(0))
        [group] = load_groups(self.paths)
        self.assertEqual([ldsu.name for ldsu in group.ldsus], ["qds0", "qds1"])

    def test_what_is_commented_out_is_the_default(self) -> None:
        for sample, target, load in (
            ("qds.cfg.sample", self.paths.host_config, lambda: load_host(self.paths)),
            ("dsgrp000.cfg.sample", self.paths.group_config(0), lambda: load_groups(self.paths)),
        ):
            text = (CONF / sample).read_text()
            target.write_text(text)
            plain = load()
            opened, count = re.subn(r"^# ([a-z_]+ = .*)$", r"\1", text, flags=re.MULTILINE)
            self.assertGreaterEqual(count, 2)
            # These have no default that can be written.
            opened = re.sub(r"^(user|mail_relay) = .*\n", "", opened, flags=re.MULTILINE)
            target.write_text(opened)
            self.assertEqual(load(), plain)

    def test_every_key_of_the_configspecs_and_no_other(self) -> None:
        for spec, sample in (("qds.ini", "qds.cfg.sample"), ("dsgrp.ini", "dsgrp000.cfg.sample")):
            inspec = ConfigObj(
                str(Path(config.__file__).with_name(spec)),
                interpolation=False,
                list_values=False,
                _inspec=True,
            )
            wanted: set[str] = set()
            inspec.walk(lambda section, key, found=wanted: found.add(key))
            text = (CONF / sample).read_text()
            keys = set(re.findall(r"^\s*(?:# )?([a-z_]+) = ", text, flags=re.MULTILINE))
            self.assertEqual(keys, wanted)

    def test_every_tunable_has_unit_range_and_default(self) -> None:
        text = (CONF / "dsgrp000.cfg.sample").read_text()
        for tunable in dataclasses.fields(Tunables):
            comment = text.split(f"# {tunable.name} = ")[0].split("\n\n")[-1]
            for word in ("Unit:", "Range:", "Default:"):
                self.assertIn(word, comment, tunable.name)


def _never_or(text: str) -> float:
    return 0.0 if text == "never" else float(text)


#: By key with a range: how its numbers are read, and the least, the greatest and the default one.
RANGES: dict[str, tuple[Callable[[str], float], float, float, float]] = {
    "children": (int, 1, limits.GROUPS_MAX, limits.CHILDREN_DEFAULT),
    "port": (int, 1, 65535, limits.DEFAULT_PORT),
    "near_sync_entries": (int, 1, limits.NEAR_SYNC_ENTRIES_MAX, limits.NEAR_SYNC_ENTRIES_DEFAULT),
    "metadata_entries": (
        int,
        limits.METADATA_ENTRIES_MIN,
        limits.METADATA_ENTRIES_MAX,
        limits.METADATA_ENTRIES_DEFAULT,
    ),
    "metadata_seconds": (
        parse_seconds,
        limits.METADATA_SECONDS_MIN,
        limits.METADATA_SECONDS_MAX,
        limits.METADATA_SECONDS_DEFAULT,
    ),
    "send_window": (
        parse_size,
        limits.SEND_WINDOW_BYTES_MIN,
        limits.SEND_WINDOW_BYTES_MAX,
        limits.SEND_WINDOW_BYTES,
    ),
    "reconnect_max": (
        parse_seconds,
        limits.RECONNECT_MAX_SECONDS_MIN,
        limits.RECONNECT_MAX_SECONDS_MAX,
        limits.RECONNECT_SECONDS_MAX,
    ),
    "verify_every": (
        _never_or,
        limits.VERIFY_EVERY_SECONDS_MIN,
        limits.VERIFY_EVERY_SECONDS_MAX,
        0.0,
    ),
    "verify_rate": (
        parse_size,
        limits.VERIFY_RATE_BYTES_MIN,
        limits.VERIFY_RATE_BYTES_MAX,
        limits.VERIFY_RATE_BYTES,
    ),
    "chunk_size": (
        parse_size,
        limits.COMPARE_CHUNK_BYTES_MIN,
        limits.COMPARE_CHUNK_BYTES_MAX,
        limits.COMPARE_CHUNK_BYTES,
    ),
    "before_image_bytes": (
        parse_size,
        0,
        limits.BEFORE_IMAGE_BYTES_MAX,
        limits.BEFORE_IMAGE_BYTES_DEFAULT,
    ),
    "perf_interval": (
        parse_seconds,
        limits.PERF_INTERVAL_SECONDS_MIN,
        limits.PERF_INTERVAL_SECONDS_MAX,
        limits.PERF_INTERVAL_SECONDS,
    ),
    "prf_limit": (
        parse_size,
        limits.PRF_LIMIT_BYTES_MIN,
        limits.PRF_LIMIT_BYTES_MAX,
        limits.PRF_LIMIT_BYTES,
    ),
    "throttle_interval": (
        parse_seconds,
        limits.THROTTLE_INTERVAL_SECONDS_MIN,
        limits.THROTTLE_INTERVAL_SECONDS_MAX,
        limits.THROTTLE_INTERVAL_SECONDS,
    ),
}


class SpecTests(TestCase):
    """The configspecs' numbers are those of limits.py."""

    def setUp(self) -> None:
        place = Path(config.__file__)
        self.text = "".join(place.with_name(name).read_text() for name in ("dsgrp.ini", "qds.ini"))

    def test_ranges(self) -> None:
        check = r"(?:whole_number|seconds|byte_size|power_of_two|interval)"
        found = re.findall(
            rf'^(\w+) = {check}\((\S+), (\S+), default="(.*)"\)', self.text, re.MULTILINE
        )
        self.assertEqual({key for key, *_ in found}, RANGES.keys())
        for key, *numbers in found:
            read, *expected = RANGES[key]
            self.assertEqual([read(number) for number in numbers], expected, key)

    def test_other_bounds(self) -> None:
        least, most = limits.MEMORY_LOG_BYTES_MIN // 1024, limits.MEMORY_LOG_BYTES_MAX >> 30
        self.assertIn(f"writelog_device = writelog({least}K, {most}G)", self.text)
        self.assertIn(f"paths = network_paths({limits.PATHS_MAX}, ", self.text)
        self.assertIn(f"compression = compression(1, {limits.ZSTD_LEVEL_MAX}, ", self.text)

    def test_defaults_of_the_dataclass(self) -> None:
        with root() as paths:
            paths.group_config(0).write_text(GROUP)
            self.assertEqual(load_group(paths, 0).tunables, Tunables())
