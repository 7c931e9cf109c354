"""The completion for the shells: made from the parsers as they are, and doing what it should."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest, TestCase

ROOT = Path(__file__).resolve().parent.parent
COMPLETION = ROOT / "completion"
GROUP = '''
[primary]
host = a
[ldsus]
  [[ accounts ]]
  data_device = /dev/x
  [[letters]]   # of the office
[throttles]
  [[office]]
  test = netkbps > 200
  # actions = limit 3
  actions = sleep inc 5
  [[ on weekends ]]   # slowly
  actions = """
    syslog "as the limit is"
    limit 250
  """
  [[once]]
  actions = limit off
[other]
  [[onions]]
'''
BASH = """
cd "$1" && . {completion}/bash/_qdsmirror
compopt() {{ :; }}
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_qdsmirror
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = r"""
PROMPT= RPROMPT=
fpath=($COMPLETION/zsh $fpath)
autoload -U compinit && compinit -u -d $QDS_ROOT/dump
bindkey '^I' complete-word
cd $QDS_ROOT
# What is offered is written down, whatever it looks like; how long it is looked for is our test's.
compadd() {
    if [[ " ${(j: :)@[1,(i)(-|--)]}" != *' -'(O|A|D)' '* ]]; then
        local -a offered
        builtin compadd -A offered "$@"
        print -rl -- $offered >>$QDS_ROOT/offered
    fi
    builtin compadd "$@"
}
finish() { exit }
comppostfuncs=(finish)
"""
DRIVE = r"""
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell '. $QDS_ROOT/rc'
zpty -w -n shell "$1"$'\t'
while zpty -r shell line; do :; done
"""


def made() -> dict[str, Any]:
    return runpy.run_path(str(COMPLETION / "make.py"))


class FilesTests(TestCase):
    def test_current(self) -> None:
        """They are what the parsers say now, and nothing else is there."""
        files: dict[Path, str] = made()["files"]()
        found = {path for folder in ("bash", "zsh") for path in (COMPLETION / folder).iterdir()}
        self.assertEqual(found, set(files))
        for path, text in files.items():
            self.assertEqual(path.read_text(), text, f"{path}: make completion")

    def test_syntax(self) -> None:
        checked = 0
        for shell in ("bash", "zsh"):
            if shutil.which(shell) is not None:
                file = str(COMPLETION / shell / "_qdsmirror")
                done = subprocess.run([shell, "-n", file], capture_output=True, timeout=240)
                self.assertEqual((done.returncode, done.stderr), (0, b""))
                checked += 1
        if not checked:
            raise SkipTest("no bash, no zsh")


class ShellTestCase(TestCase):
    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="qdsc", dir="/tmp"))
        self.addCleanup(shutil.rmtree, self.root)
        (self.root / "etc").mkdir()
        (self.root / "etc" / "dsgrp000.cfg").write_text(GROUP)
        other = GROUP.replace("accounts", "mail").replace("letters", "files")
        (self.root / "etc" / "dsgrp012.cfg").write_text(other)
        (self.root / "a file").write_text("")
        (self.root / "a folder").mkdir()


class BashTests(ShellTestCase):
    def setUp(self) -> None:
        if shutil.which("bash") is None:
            raise SkipTest("no bash")
        super().setUp()

    def offered(self, *words: str, root: bool = True) -> list[str]:
        """Give what is offered for the last of the words."""
        environment = {key: value for key, value in os.environ.items() if key != "QDS_ROOT"}
        if root:
            environment["QDS_ROOT"] = str(self.root)
        done = subprocess.run(
            ["bash", "-c", BASH.format(completion=COMPLETION), "-", str(self.root), *words],
            capture_output=True,
            text=True,
            timeout=240,
            env=environment,
        )
        self.assertEqual(done.stderr, "", words)
        return sorted(line for line in done.stdout.splitlines() if line)

    def test_options_of_every_command(self) -> None:
        """Those of its parser; of subcommands theirs."""
        for spec in made()["specs"]():
            wanted = sorted(name for option in spec.options for name in option.names)
            self.assertEqual(self.offered(*spec.name.split(), "-"), wanted, spec.name)

    def test_what_is_offered(self) -> None:
        ldsus = ["accounts", "files", "letters", "mail"]
        for words, expected in (
            ("qdsinfo --wai", ["--wait"]),
            ("qdsinfo --wait co", ["coherent", "connected"]),
            ("qdsinfo --wait = co", ["coherent", "connected"]),
            ("qdsinfo --wait =", None),
            ("/usr/bin/qdsinfo ", ldsus),
            ("qdsinfo mail ", ldsus),
            ("qdsinfo --json a", ["accounts"]),
            ("qdsinfo -g ", ["0", "12"]),
            ("qdsinfo -g 1", ["12"]),
            ("qdsinfo -g 0 l", ["letters"]),
            ("qdsinfo -- -", []),
            ("qdsinfo --timeout ", []),
            ("qdsbypass ", ["off", "on"]),
            ("qdsbypass on ", ldsus),
            ("qdsbypass --json on m", ["mail"]),
            ("qdscheckpoint ", sorted([*ldsus, "list", "off", "on"])),
            ("qdsset on_d", ["on_disconnect="]),
            ("qdsset of", ["office.value="]),
            ("qdsset on_disconnect=async once.", ["once.limit=", "once.value="]),
            ("qdslab ", ["create", "destroy", "start", "status", "stop"]),
            ("qdslab --json st", ["start", "status", "stop"]),
            ("qdslab start a", ["a folder"]),
            ("qdslab start dir ", ["primary", "secondary"]),
            ("qdslab create --mode ", ["async", "near-sync", "sync"]),
            ("qdsbackfresh --keep a", ["a file", "a folder"]),
            ("qdsdevinfo a", ["a file", "a folder"]),
            ("qdsinfo --json > a", ["a file", "a folder"]),
            ("qdsinfo --root a", ["a folder"]),
        ):
            found = self.offered(*words.split(" "))
            if expected is None:
                self.assertIn("coherent", found)
                self.assertNotIn("-h", found)
            else:
                self.assertEqual(found, expected, words)

    def test_throttles(self) -> None:
        """Names with spaces as the shell takes them."""
        weekends = ["on\\ weekends.limit=", "on\\ weekends.value="]
        self.assertEqual(self.offered("qdsset", "on\\ w"), weekends)
        found = self.offered("qdsset", "on")
        wanted = ["on_disconnect=", "on_overflow=", "once.limit=", "once.value=", *weekends]
        self.assertEqual(found, sorted(wanted))

    def test_root(self) -> None:
        """What ``--root`` says counts before the environment."""
        self.assertEqual(self.offered("qdsinfo", "-g", "", root=False), [])
        given = self.offered("qdsinfo", "--root", str(self.root), "-g", "", root=False)
        self.assertEqual(given, ["0", "12"])
        given = self.offered("qdsinfo", "--root", "=", str(self.root), "m", root=False)
        self.assertEqual(given, ["mail"])

    def test_every_command_is_found(self) -> None:
        """By the file that bash-completion looks for."""
        for spec in made()["specs"]():
            if " " not in spec.name:
                program = f". {COMPLETION}/bash/{spec.name}; complete -p {spec.name}"
                done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
                self.assertEqual((done.returncode, done.stderr), (0, ""), spec.name)
                self.assertIn("_qdsmirror", done.stdout)


class ZshTests(ShellTestCase):
    def setUp(self) -> None:
        if shutil.which("zsh") is None:
            raise SkipTest("no zsh")
        super().setUp()
        (self.root / "rc").write_text(ZSH)

    def offered(self, line: str) -> set[str]:
        """Give what is offered when somebody presses the key behind a line."""
        (self.root / "offered").write_text("")
        environment = {**os.environ, "QDS_ROOT": str(self.root), "COMPLETION": str(COMPLETION)}
        environment |= {"TERM": "dumb", "HOME": str(self.root)}
        command = ["zsh", "-f", "-c", DRIVE, "-", line]
        subprocess.run(command, capture_output=True, timeout=240, env=environment)
        return set((self.root / "offered").read_text().split("\n")) - {""}

    def test_what_is_offered(self) -> None:
        for line, expected in (
            ("qdsinfo --wai", {"--wait"}),
            ("qdsinfo --wait co", {"coherent", "connected"}),
            ("qdsinfo --wait=co", {"coherent", "connected"}),
            ("qdsinfo --is coherent --wa", set()),
            ("qdsinfo ", {"accounts", "files", "letters", "mail"}),
            ("qdsinfo mail le", {"letters"}),
            ("qdsinfo -g ", {"0", "12"}),
            ("qdsbypass ", {"off", "on"}),
            ("qdsbypass on l", {"letters"}),
            ("qdscheckpoint o", {"off", "on"}),
            ("qdscheckpoint off a", {"accounts"}),
            ("qdsset on_d", {"on_disconnect="}),
            ("qdsset of", {"office.value="}),
            ("qdsset on\\ w", {"on\\ weekends.limit=", "on\\ weekends.value="}),
            ("qdslab st", {"start", "status", "stop"}),
            ("qdslab start dir s", {"secondary"}),
            ("qdslab create --mo", {"--mode"}),
            ("qdslab create --mode ", {"async", "near-sync", "sync"}),
            ("qdsdevinfo a", {"a\\ file", "a\\ folder"}),
        ):
            self.assertEqual(self.offered(line), expected, line)
