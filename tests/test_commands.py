"""Every console script of setup.cfg: its help, its errors as JSON, and what it imports at start.

Its manual page and its options there are held to the parser by tests/test_manpages.py, its
completion by tests/test_completion.py; here each is seen to have both.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from twisted.trial.unittest import TestCase

from qdsmirror import errors
from tests.test_manpages import ROOT, commands, page_of, source

CODES = {
    kind.code: kind.exit_code
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.QdsError)
}
#: Slow to import, and of no use before a command does its work.
HEAVY = (
    "OpenSSL",
    "asyncio",
    "crc32c",
    "cryptography",
    "jsonschema",
    "lz4",
    "pyroute2",
    "rich",
    "ssl",
    "twisted",
    "zope",
    "zstandard",
    "qdsmirror.storage",
)
#: What a command needs for its work, which on a host without a configuration it begins.
NEEDS = {
    "qdsdevinfo": {"crc32c", "qdsmirror.storage", "zope"},
}
#: Commands that do not fail without a configuration, and what is wrong with them instead.
WITHOUT_CONFIGURATION = {
    "in.pmd": ["--no-such-option"],
    "in.rmd": ["--no-such-option"],
    "killconsole": ["--no-such-option"],
    "killdriver": ["--no-such-option"],
    "killpmds": ["--no-such-option"],
    "killrmds": ["--no-such-option"],
    "qdsdetach": ["--no-such-option"],
    "qdshostinfo": ["no.such.host.invalid"],
    "qdslab create": ["x", "--groups", "0"],
}
IMPORTS = """
import importlib, io, json, os, sys
for name, entry, *words in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    if not os.fork():
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        module, _, function = entry.partition(":")
        getattr(importlib.import_module(module), function)(words)
        os.write(writer, "\\n".join(sys.modules).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as told:
        print(json.dumps([name, words, told.read().split()]))
    os.wait()
"""


class Call(NamedTuple):
    """A command, or subcommand, with its entry point and what it needs on its command line."""

    name: str
    entry: str
    words: list[str]

    @property
    def command(self) -> str:
        return self.name.split()[0]


def calls() -> list[Call]:
    """Give every command and subcommand."""
    entries, found = commands(), []
    for spec in runpy.run_path(str(ROOT / "completion" / "make.py"))["specs"]():
        if spec.commands:
            continue
        words = [
            next(iter(place.value or ()), "").removeprefix("=") or "x"
            for place in spec.places
            if not place.optional
        ]
        name, *inner = spec.name.split()
        found.append(Call(spec.name, entries[name], [*inner, *words]))
    return found


def run(entry: str, *words: str) -> tuple[int, str, str]:
    """Run a command as its console script does."""
    module, _, function = entry.partition(":")
    main = getattr(importlib.import_module(module), function)
    output, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(told):
        code = main(list(words))
    return code, output.getvalue(), told.getvalue()


class CommandTests(TestCase):
    def setUp(self) -> None:
        self.root = tempfile.mkdtemp(prefix="qds", dir="/tmp")
        self.addCleanup(os.rmdir, self.root)
        self.calls = calls()
        self.assertEqual({one.command for one in self.calls}, set(commands()))
        inside = mock.patch.dict(os.environ, {"QDS_ROOT": self.root, "COLUMNS": "80"})
        inside.start()
        self.addCleanup(inside.stop)

    def test_help(self) -> None:
        for call in self.calls:
            inner = call.name.split()[1:]
            code, output, told = run(call.entry, *inner, "--help")
            self.assertEqual((code, told), (0, ""), call.name)
            self.assertTrue(output.startswith("usage: "), call.name)
            self.assertLessEqual(max(map(len, output.splitlines())), 80, call.name)
            for option in ("--json", "--root"):
                self.assertIn(option, output, call.name)

    def test_every_argument_is_explained(self) -> None:
        specs = runpy.run_path(str(ROOT / "completion" / "make.py"))["specs"]
        for spec in specs():
            for one in (*spec.options, *spec.places):
                self.assertGreater(len(one.help), 3, (spec.name, one.names or one.metavar))
            for name, text in spec.commands.items():
                self.assertGreater(len(text), 3, (spec.name, name))

    def test_version(self) -> None:
        for name, entry in commands().items():
            code, output, told = run(entry, "--version")
            self.assertEqual((code, told), (0, ""), name)
            self.assertRegex(output, r"^\S+ \d+\.\d+\S*\n$", name)

    def test_manual_and_completion(self) -> None:
        shells = {
            folder: (ROOT / "completion" / folder / "_qdsmirror").read_text()
            for folder in ("bash", "zsh")
        }
        for call in self.calls:
            page = source(page_of(call.command))
            for word in call.name.split()[1:]:
                self.assertRegex(page, rf"\.Cm [a-z |]*\b{word}\b", call.name)
            self.assertIn(f"'{call.name}')", shells["bash"], call.name)
            for word in call.name.split():
                self.assertIn(f"({word})", shells["zsh"], call.name)

    def error_of(self, call: Call, *words: str) -> Any:
        """Run a command that fails; check all that the JSON object and the exit code promise."""
        code, output, told = run(call.entry, *words, "--json")
        where = (call.name, words, output, told)
        self.assertEqual(told, "", where)
        self.assertEqual(output.count("\n"), 1, where)
        answer = json.loads(output)
        self.assertEqual(answer["schema"], 1, where)
        self.assertEqual(set(answer["error"]), {"code", "message", "hint"}, where)
        self.assertTrue(answer["error"]["message"], where)
        self.assertEqual(code, CODES[answer["error"]["code"]], where)
        # The same in words: one line, with what to do next.
        plain_code, plain, line = run(call.entry, *words)
        self.assertEqual((plain_code, plain, line.count("\n")), (code, "", 1), (where, line))
        self.assertIn(answer["error"]["message"][:40], line, where)
        return answer["error"]

    def test_usage_error(self) -> None:
        for call in self.calls:
            found = self.error_of(call, *call.words, "--no-such-option")
            self.assertEqual(found["code"], "usage", call.name)
            self.assertIn("--help", found["hint"], call.name)

    def test_error_without_a_configuration(self) -> None:
        """Nothing is configured on this host: each says so, and what to do."""
        for call in self.calls:
            instead = WITHOUT_CONFIGURATION.get(call.name)
            words = call.words if instead is None else [*call.name.split()[1:], *instead]
            found = self.error_of(call, *words)
            self.assertTrue(found["hint"], (call.name, found))
        self.assertEqual(os.listdir(self.root), [])

    def test_what_is_imported_at_start(self) -> None:
        """Neither by ``--help`` nor before the configuration is read anything heavy."""
        table = []
        for call in self.calls:
            table.append([call.name, call.entry, *call.name.split()[1:], "--help"])
            if call.name not in WITHOUT_CONFIGURATION:
                table.append([call.name, call.entry, *call.words])
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS, json.dumps(table)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        self.assertEqual(done.stderr, "")
        heavy_at: dict[str, set[str]] = {}
        seen = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertEqual(len(seen), len(table))
        for name, words, modules in seen:
            heavy = {
                one
                for one in HEAVY
                for module in modules
                if module == one or module.startswith(one + ".")
            }
            allowed = set() if "--help" in words else NEEDS.get(name, set())
            self.assertIn("qdsmirror.tools.cli", modules, name)
            if heavy - allowed:
                heavy_at[" ".join([name, *words])] = heavy - allowed
        self.assertEqual(heavy_at, {})


class TableTests(TestCase):
    """The tables above are about what is."""

    def test_names(self) -> None:
        names = {call.name for call in calls()}
        self.assertEqual((set(NEEDS) | set(WITHOUT_CONFIGURATION)) - names, set())

    def test_heavy_is_noticed(self) -> None:
        """The check sees a module by its own name, too."""
        program = 'import json, sys; sys.argv[1:] = [json.dumps([["x", "rich:print", "a"]])]\n'
        done = subprocess.run(
            [sys.executable, "-c", program + IMPORTS], capture_output=True, text=True, timeout=60
        )
        self.assertIn('"rich"', done.stdout)
        self.assertTrue(Path(ROOT, "bench", "startup.py").exists())
