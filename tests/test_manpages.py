"""The manual is complete and says what the programs say: options, keys, codes, references."""

from __future__ import annotations

import argparse
import configparser
import importlib
import inspect
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

from twisted.python import usage
from twisted.trial.unittest import SkipTest, TestCase

from qdsmirror import errors
from qdsmirror.core.states import REFUSALS

ROOT = Path(__file__).resolve().parent.parent
MAN = ROOT / "man"
DAEMONS = {
    "qdsdriver": "qdsmirror.daemons.driver",
    "qdspmd": "qdsmirror.daemons.pmd",
    "qdsrmd": "qdsmirror.daemons.rmd",
    "qdsconsole": "qdsmirror.daemons.console",
}
#: Pages that are neither a command's nor a daemon's.
OTHERS = (
    ("qds.cfg", 5),
    ("dsgrp.cfg", 5),
    ("qdskeep", 5),
    ("qdsprf", 5),
    ("qdsthrottle", 5),
    ("qdswritelog", 5),
    ("qdsmirror", 7),
    ("qdsmirror-architecture", 7),
    ("qdsmirror-metrics", 7),
    ("qdsmirror-modes", 7),
    ("qdsmirror-protocol", 7),
    ("qdsmirror-security", 7),
    ("qdsmirror-synchronous", 7),
    ("qdsmirror-systemd", 7),
    ("qdsmirror-takeover", 7),
)
#: Other projects' pages that ours refer to.
FOREIGN = frozenset(
    {
        "awk(1)",
        "fdatasync(2)",
        "fsync(2)",
        "write(2)",
        "fio(1)",
        "inetd(8)",
        "losetup(8)",
        "modprobe(8)",
        "nbdcopy(1)",
        "nbdfuse(1)",
        "nbdinfo(1)",
        "nbd-client(8)",
        "qemu-img(1)",
        "systemd.service(5)",
        "systemd.socket(5)",
        "twistd(1)",
    }
)


def page_path(name: str, section: int) -> Path:
    """Give where a page stands."""
    return MAN / f"man{section}" / f"{name}.{section}"


def pages() -> list[Path]:
    """Find every page of ours, aliases included."""
    return sorted(path for path in MAN.glob("man[1-9]/*.[1-9]") if path.is_file())


def source(path: Path) -> str:
    """Read a page; an alias (``.so``) gives the page it stands for."""
    text = path.read_text()
    alias = re.match(r"\.so (\S+)\n", text)
    return (MAN / alias[1]).read_text() if alias else text


def commands() -> dict[str, str]:
    """Give the console scripts of setup.cfg: name to ``module:function``."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].strip().splitlines()
    return {line.split("=")[0].strip(): line.split("=")[1].strip() for line in lines}


def page_of(name: str) -> Path:
    """Find the page of a command or daemon: section 1 or 8.

    :raises AssertionError: there is none, or there are two.
    """
    found = [path for path in (page_path(name, 1), page_path(name, 8)) if path.exists()]
    assert len(found) == 1, f"{name} has {len(found)} pages"
    return found[0]


def section_of(text: str, title: str) -> str:
    """Give one section of a page."""
    match = re.search(rf"^\.Sh {title}\n(.*?)(?=^\.Sh |\Z)", text, re.MULTILINE | re.DOTALL)
    return match[1] if match else ""


def documented_options(text: str) -> set[str]:
    """Read the options that the list items of a page's OPTIONS explain."""
    options: set[str] = set()
    for line in section_of(text, "OPTIONS").splitlines():
        if line.startswith(".It "):
            for flag in re.findall(r"\bFl (\S+)", line):
                options.add(f"-{flag}")
    return options


def documented_keys(text: str) -> set[str]:
    """Read the configuration keys that a page's list items explain."""
    return set(re.findall(r"^\.It Cm (\S+)", text, re.MULTILINE))


def references(text: str) -> set[str]:
    """Find every ``name(N)`` in a page's source, by macro or in plain text."""
    found = {f"{n}({s})" for n, s in re.findall(r"\bXr ([\w.-]+) (\d)\b", text)}
    return found | set(re.findall(r"\b([\w.-]+\(\d\))", text))


def parser_options(parser: argparse.ArgumentParser) -> set[str]:
    """Collect every option of a parser and of its subcommands."""
    found: set[str] = set()
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found |= parser_options(inner)
    return found


def parser_of(name: str, entry: str) -> argparse.ArgumentParser:
    """Make a command's parser.

    ``main`` has ``build_parser()``, ``kill_main`` has ``build_kill_parser()``; a module with one
    function for each command has ``build_parser(NAME)``.
    """
    module, _, function = entry.partition(":")
    kind = function.removesuffix("main").strip("_") if function.endswith("main") else ""
    build: Any = getattr(
        importlib.import_module(module), f"build_{kind}_parser" if kind else "build_parser"
    )
    parser = build(name) if inspect.signature(build).parameters else build()
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def daemon_options(module: str) -> set[str]:
    """Collect the options of a twistd plugin, less those that every ``usage.Options`` has."""
    options: usage.Options = importlib.import_module(module).Options()
    found = set()
    for long in options.longOpt:
        found.add("--" + long.rstrip("="))
    for short in options.shortOpt.replace(":", ""):
        found.add("-" + short)
    return found


class OptionTests(TestCase):
    """A page's OPTIONS are the parser's, no more and no fewer."""

    def test_commands(self) -> None:
        for name, entry in commands().items():
            documented = documented_options(source(page_of(name)))
            self.assertEqual(documented, parser_options(parser_of(name, entry)), name)

    def test_daemons(self) -> None:
        for name, module in DAEMONS.items():
            documented = documented_options(source(page_of(name)))
            if name in commands():
                # Its page is the command's, which has more options.
                documented &= daemon_options(module)
            self.assertEqual(documented, daemon_options(module), name)


class CompletenessTests(TestCase):
    """Everything has its page, and every page is about something."""

    def test_every_page_exists_and_nothing_else(self) -> None:
        wanted = {page_of(name) for name in (*commands(), *DAEMONS)}
        wanted |= {page_path(name, section) for name, section in OTHERS}
        self.assertEqual(set(pages()), wanted)

    def test_names(self) -> None:
        """A page's NAME lists what it is found by, so that apropos and aliases work."""
        for path in pages():
            names = set(re.findall(r"^\.Nm (\S+)", section_of(source(path), "NAME"), re.MULTILINE))
            self.assertIn(path.name.rpartition(".")[0], names)

    def test_keys(self) -> None:
        for spec, page in (("qds.ini", "qds.cfg"), ("dsgrp.ini", "dsgrp.cfg")):
            text = (ROOT / "qdsmirror" / spec).read_text()
            keys = set(re.findall(r"^(\w+) = ", text, re.MULTILINE))
            self.assertGreater(len(keys), 5)
            self.assertEqual(documented_keys(page_path(page, 5).read_text()), keys, page)

    def test_exit_codes(self) -> None:
        """The table in qdsmirror(7) lists every exit code of errors.py."""
        text = section_of(page_path("qdsmirror", 7).read_text(), "EXIT STATUS")
        listed = {int(code) for code in re.findall(r"^\.It (\d+)", text, re.MULTILINE)}
        codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
        self.assertEqual(listed, codes)

    def test_dependencies(self) -> None:
        """qdsmirror-architecture(7) says of each package what it is needed for."""
        text = section_of(page_path("qdsmirror-architecture", 7).read_text(), "DEPENDENCIES")
        named = set(", ".join(re.findall(r"^\.It (.+)", text, re.MULTILINE)).split(", "))
        setup = configparser.ConfigParser(interpolation=None)
        setup.read(ROOT / "setup.cfg")
        lines = setup["options"]["install_requires"].split("\n")
        self.assertEqual({line.partition(" ")[0] for line in lines if line}, named)

    def test_readme_links(self) -> None:
        text = (ROOT / "README.md").read_text()
        links = re.findall(r"\]\(([^)#]+)\)", text)
        self.assertGreater(len(links), 5)
        for link in links:
            self.assertTrue((ROOT / link).exists(), link)


class FormTests(TestCase):
    """Pages render, and what they refer to exists."""

    def test_references(self) -> None:
        ours = {f"{p.name.rpartition('.')[0]}({p.suffix[1:]})" for p in pages()}
        for path in pages():
            unknown = references(source(path)) - ours - FOREIGN
            self.assertEqual(unknown, set(), path.name)

    def test_mandoc_lint(self) -> None:
        if shutil.which("mandoc") is None:
            raise SkipTest("no mandoc")
        for path in pages():
            if path.read_text().startswith(".so "):
                continue
            result = subprocess.run(
                ["mandoc", "-T", "lint", "-W", "warning", path],
                capture_output=True,
                text=True,
                timeout=240,
            )
            self.assertEqual((result.returncode, result.stdout), (0, ""), path.name)

    def test_man_renders(self) -> None:
        if shutil.which("man") is None or shutil.which("groff") is None:
            raise SkipTest("no man-db or groff")
        for path in pages():
            result = subprocess.run(
                ["man", "-E", "UTF-8", "-l", path],
                cwd=MAN,
                env={"MANWIDTH": "80", "PATH": "/usr/bin:/bin", "MANPAGER": "cat", "LC_ALL": "C"},
                capture_output=True,
                text=True,
                timeout=240,
            )
            self.assertEqual((result.returncode, result.stderr), (0, ""), path.name)
            self.assertIn("NAME", re.sub(".\b", "", result.stdout), path.name)

    def test_plain_characters(self) -> None:
        """Pages are ASCII: every roff renders them alike."""
        for path in pages():
            self.assertTrue(path.read_text().isascii(), path.name)


class ModesPageTests(TestCase):
    """The page that is made from the tables of the state machine."""

    def test_is_up_to_date(self) -> None:
        made = runpy.run_path(str(MAN / "modes.py"))
        self.assertEqual(made["PAGE"], page_path("qdsmirror-modes", 7))
        text = page_path("qdsmirror-modes", 7).read_text()
        self.assertEqual(text, made["render"](), "make man")

    def test_ways_out_exist(self) -> None:
        """What a refusal names as the next command is one."""
        named = {
            word
            for one in REFUSALS
            for word in re.findall(r"\b(?:qds|launch|kill)[a-z]+\b", one.hint)
        }
        self.assertGreater(len(named), 5)
        self.assertEqual(named - set(commands()), set())

    def test_pictures_fit(self) -> None:
        """A terminal of 80 columns shows them without breaking lines."""
        made = runpy.run_path(str(MAN / "modes.py"))
        for name in ("lower_picture", "upper_picture"):
            self.assertLessEqual(max(len(line) for line in made[name]()), 73, name)

    def test_a_picture(self) -> None:
        draw = runpy.run_path(str(MAN / "modes.py"))["picture"]
        lines = draw(["a", "bb\ncc"], 8, [(0, 1, ["go"]), (1, 0, ["come", "back"]), (1, 1, ["x"])])
        self.assertEqual(
            lines,
            [
                "         bb",
                "  a      cc",
                "  |       |",
                "  | go    |",
                "  +------>|",
                "  |       |",
                "  | come  |",
                "  | back  |",
                "  |<------+",
                "  |       |",
                "  |       +--. x",
                "  |       |<-'",
                "  |       |",
            ],
        )


class CheckerTests(TestCase):
    """The checks above see what they are there for."""

    PAGE = (
        ".Sh NAME\n.Nm thing\n.Sh OPTIONS\n.Bl -tag\n.It Fl g , Fl -group Ar N\n"
        "Not .Fl x here.\n.It Fl -json\n.El\n.Sh SEE ALSO\n.Xr qdsinfo 1 ,\n.Xr nowhere 3\n"
        "and plain(7)\n"
    )

    def test_documented_options(self) -> None:
        self.assertEqual(documented_options(self.PAGE), {"-g", "--group", "--json"})

    def test_references(self) -> None:
        self.assertEqual(references(self.PAGE), {"qdsinfo(1)", "nowhere(3)", "plain(7)"})

    def test_parser_options_of_subcommands(self) -> None:
        parser = argparse.ArgumentParser()
        inner = parser.add_subparsers().add_parser("create")
        inner.add_argument("--groups")
        inner.add_argument("--secret", help=argparse.SUPPRESS)
        self.assertEqual(parser_options(parser), {"-h", "--help", "--groups"})

    def test_keys(self) -> None:
        text = ".It Cm port\n.It Cm address Ar x\n.It Fl -not\n"
        self.assertEqual(documented_keys(text), {"port", "address"})
