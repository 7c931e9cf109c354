"""The frame of the commands: options, selection, errors, exit codes."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from twisted.trial.unittest import TestCase

import qdsmirror
from qdsmirror.config import GroupConfig, LdsuConfig, Tunables
from qdsmirror.errors import (
    BrokenError,
    ConfigError,
    DegradedError,
    IdentityError,
    QdsError,
    UnreachableError,
    UsageError,
)
from qdsmirror.paths import Paths
from qdsmirror.pidfile import PidFile
from qdsmirror.tools import cli


def group(number: int, *names: str) -> GroupConfig:
    ldsus = (LdsuConfig(i, name, f"/d{name}", f"/w{name}", "/m") for i, name in enumerate(names))
    return GroupConfig(
        number,
        f"dsgrp{number:03d}",
        Path("/x"),
        "async",
        "flush",
        "block",
        "p",
        "p",
        "s",
        "s",
        575,
        "/j",
        Tunables(),
        tuple(ldsus),
    )


class CommandTestCase(TestCase):
    def setUp(self) -> None:
        self.out = io.StringIO()
        self.err = io.StringIO()
        self.patch(sys, "stdout", self.out)
        self.patch(sys, "stderr", self.err)

    def call(self, body: Callable[[argparse.Namespace], int], *argv: str) -> int:
        @cli.run
        def main(argv: Sequence[str] | None = None) -> int:
            return body(cli.parser("qdstest", "Test.", groups=True).parse_args(argv))

        return main(argv)


class RunTests(CommandTestCase):
    def raising(self, error: BaseException) -> Callable[[argparse.Namespace], int]:
        def body(_arguments: argparse.Namespace) -> int:
            raise error

        return body

    def test_success(self) -> None:
        self.assertEqual(self.call(lambda _arguments: 3), 3)
        self.assertEqual(self.out.getvalue() + self.err.getvalue(), "")

    def test_every_error_has_its_exit_code(self) -> None:
        for kind, code in (
            (QdsError, 1),
            (UsageError, 2),
            (DegradedError, 3),
            (BrokenError, 4),
            (ConfigError, 10),
            (UnreachableError, 11),
            (IdentityError, 12),
        ):
            self.assertEqual(self.call(self.raising(kind("wrong"))), code)

    def test_error_is_one_line(self) -> None:
        self.call(self.raising(ConfigError("a:\n b\x1b[1m is wrong", "run this\nnow")))
        self.assertEqual(self.err.getvalue(), "a: b [1m is wrong; run this now\n")
        self.assertEqual(self.out.getvalue(), "")

    def test_error_without_hint(self) -> None:
        self.call(self.raising(ConfigError("wrong")))
        self.assertEqual(self.err.getvalue(), "wrong\n")

    def test_error_as_json(self) -> None:
        error = UnreachableError("no driver", "launchdriver")
        self.assertEqual(self.call(self.raising(error), "--json"), 11)
        self.assertEqual(self.err.getvalue(), "")
        self.assertEqual(
            json.loads(self.out.getvalue()),
            {
                "schema": 1,
                "error": {"code": "unreachable", "message": "no driver", "hint": "launchdriver"},
            },
        )

    def test_usage_error(self) -> None:
        self.assertEqual(self.call(lambda _arguments: 0, "--nonsense"), 2)
        self.assertIn("--nonsense; qdstest --help\n", self.err.getvalue())
        self.assertEqual(self.err.getvalue().count("\n"), 1)

    def test_usage_error_as_json(self) -> None:
        self.assertEqual(self.call(lambda _arguments: 0, "--nonsense", "--json"), 2)
        self.assertEqual(json.loads(self.out.getvalue())["error"]["code"], "usage")

    def test_json_after_a_double_dash_is_a_name(self) -> None:
        self.assertEqual(self.call(self.raising(ConfigError("wrong")), "--", "--json"), 10)
        self.assertEqual(self.out.getvalue(), "")

    def test_no_abbreviations(self) -> None:
        self.assertEqual(self.call(lambda _arguments: 0, "--js"), 2)

    def test_interrupt(self) -> None:
        self.assertEqual(self.call(self.raising(KeyboardInterrupt())), 130)
        self.assertEqual(self.out.getvalue(), "")

    def test_os_error(self) -> None:
        error = PermissionError(13, "Permission denied", "/etc/x")
        self.assertEqual(self.call(self.raising(error)), 1)
        self.assertEqual(self.err.getvalue(), "/etc/x: Permission denied\n")

    def test_our_own_fault_keeps_its_traceback(self) -> None:
        self.assertRaises(ZeroDivisionError, self.call, self.raising(ZeroDivisionError()))

    def test_broken_pipe(self) -> None:
        self.assertEqual(self.call(self.raising(BrokenPipeError(32, "Broken pipe"))), 1)
        self.assertEqual(self.err.getvalue(), "")

    def test_broken_pipe_in_a_process(self) -> None:
        program = (
            "import sys\nfrom qdsmirror.tools import cli\n"
            "@cli.run\ndef main(argv=None):\n    print('x' * 100)\n    return 0\n"
            "sys.stdin.read()\nsys.exit(main([]))\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            process.stdout.close()
            process.stdout = None
            _out, err = process.communicate(timeout=240)
        self.assertEqual((process.returncode, err), (1, b""))

    def test_help_and_version(self) -> None:
        self.assertEqual(self.call(lambda _arguments: 9, "--help"), 0)
        for option in ("--json", "--root DIR", "--version", "-g N", "LDSU"):
            self.assertIn(option, self.out.getvalue())
        self.assertEqual(self.call(lambda _arguments: 9, "--version"), 0)
        self.assertIn(f"qdstest {qdsmirror.__version__}\n", self.out.getvalue())

    def test_json_output_has_the_schema_first(self) -> None:
        cli.print_json({"a": 1}, indent=None)
        self.assertEqual(self.out.getvalue(), '{"schema": 1, "a": 1}\n')


class SubcommandTests(TestCase):
    def parse(self, *argv: str) -> argparse.Namespace:
        top = cli.parser("qdstest", "Test.")
        commands = cli.subcommands(top)
        cli.subcommand(commands, "go", "Go.", groups=True)
        return top.parse_args(argv)

    def test_common_options_on_either_side(self) -> None:
        for argv in (("--json", "--root", "/r", "go"), ("go", "--root", "/r", "--json")):
            arguments = self.parse(*argv)
            self.assertEqual((arguments.json, arguments.root), (True, "/r"))
        arguments = self.parse("go")
        self.assertEqual((arguments.json, arguments.root, arguments.command), (False, None, "go"))

    def test_a_command_is_needed_and_must_exist(self) -> None:
        self.assertRaises(UsageError, self.parse)
        self.assertRaises(UsageError, self.parse, "come")
        self.assertRaises(UsageError, self.parse, "go", "--nonsense")

    def test_root(self) -> None:
        self.assertEqual(cli.paths_of(self.parse("--root", "/r", "go")).etc, Path("/r/etc"))
        long = self.parse("--root", "/" + "r" * 100, "go")
        self.assertRaises(UsageError, cli.paths_of, long)


class SelectionTests(TestCase):
    groups = (group(0, "qds0", "qds1"), group(7, "qds2"))

    def select(self, *argv: str) -> list[int]:
        arguments = cli.parser("qdstest", "Test.", groups=True).parse_args(argv)
        return [one.number for one in cli.select_groups(arguments, self.groups)]

    def test_selection(self) -> None:
        for argv, numbers in (
            ((), [0, 7]),
            (("-g", "7"), [7]),
            (("-g", "7", "-g", "0", "-g", "7"), [0, 7]),
            (("qds1",), [0]),
            (("qds2", "qds0", "qds1"), [0, 7]),
        ):
            self.assertEqual(self.select(*argv), numbers)

    def test_refusals(self) -> None:
        for argv, part in (
            (("-g", "0", "qds0"), "not both"),
            (("-g", "1"), "dsgrp001 is not configured"),
            (("-g", "512"), "not a group's number"),
            (("-g", "-1"), "-g"),
            (("-g", "x"), "not a group's number"),
            (("qsd1",), "'qsd1'"),
        ):
            self.assertIn(part, str(self.assertRaises(UsageError, self.select, *argv)))
        error = self.assertRaises(UsageError, self.select, "qsd1")
        self.assertEqual(error.hint, "did you mean qds1? qdsinfo lists the LDSUs")

    def test_nothing_configured(self) -> None:
        arguments = cli.parser("qdstest", "Test.", groups=True).parse_args([])
        self.assertRaises(ConfigError, cli.select_groups, arguments, [])


class LiveDaemonTests(TestCase):
    def test_devices_of_a_live_daemon_are_refused(self) -> None:
        paths = Paths.of(tempfile.mkdtemp(dir="/tmp"))
        assert paths.root is not None
        self.addCleanup(shutil.rmtree, paths.root)
        paths.run.mkdir(parents=True)
        cli.refuse_beside_daemon(paths, group(3), "driver")
        held = PidFile(paths.pid_file("dsgrp003.driver"))
        held.acquire()
        self.addCleanup(held.release)
        held.write()
        cli.refuse_beside_daemon(paths, group(3), "rmd")
        cli.refuse_beside_daemon(paths, group(2), "driver")
        with self.assertRaises(QdsError) as caught:
            cli.refuse_beside_daemon(paths, group(3), "driver")
        self.assertIn(f"dsgrp003: its driver runs (pid {os.getpid()})", str(caught.exception))
        self.assertIn("killdriver --root", caught.exception.hint)
