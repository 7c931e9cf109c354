"""The import rule: which package may see which, read from the source and tried in a process."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from twisted.trial.unittest import TestCase

PACKAGE = Path(__file__).resolve().parent.parent / "qdsmirror"

#: What the pure core may not have, wherever in the module it is imported.
IMPURE = frozenset(
    {
        "asyncio",
        "fcntl",
        "multiprocessing",
        "os",
        "pathlib",
        "random",
        "secrets",
        "select",
        "selectors",
        "shutil",
        "signal",
        "socket",
        "ssl",
        "subprocess",
        "tempfile",
        "threading",
        "time",
        "twisted",
        "zope",
    }
)

#: Rooms (and modules beside them) of the package, and which other rooms each may import.
BASE = frozenset({"errors", "limits"})
#: Small modules beside the rooms, that need no reactor.
PLAIN = BASE | {
    "paths",
    "config",
    "configsafety",
    "configsource",
    "configvalues",
    "configlive",
    "pidfile",
    "audit",
    "core",
}
SHARED = PLAIN | {"interfaces"}
RULES: dict[str, frozenset[str]] = {
    "": frozenset(),
    "errors": frozenset(),
    "limits": frozenset(),
    "paths": BASE,
    "pidfile": BASE | {"paths"},
    "audit": BASE | {"paths"},
    "interfaces": BASE | {"core"},
    "configvalues": BASE,
    "configmodel": BASE | {"configvalues", "core"},
    "configsafety": frozenset(),
    "configsource": BASE | {"configvalues"},
    "configlive": BASE | {"configmodel", "configvalues", "livethrottles"},
    "livethrottles": BASE | {"configvalues", "core"},
    "configthrottles": BASE | {"configsource", "core"},
    "config": BASE
    | {"paths", "configmodel", "configsource", "configthrottles", "configvalues", "core"},
    "pki": PLAIN,
    "core": BASE,
    "storage": SHARED,
    "net": SHARED | {"pki"},
    "groups": SHARED | {"storage", "net", "pki"},
    "daemons": SHARED | {"storage", "net", "groups", "pki", "console"},
    # The control client only: net.asking, and what makes the answers what qdsinfo shows.
    "console": PLAIN | {"net", "pki", "tools"},
    "tools": PLAIN | {"pki", "storage"},
}


#: A command imports these when it starts, and Twisted would make it slow.
NO_TWISTED_AT_START = frozenset(
    {
        "tools",
        "config",
        "configmodel",
        "configsource",
        "configthrottles",
        "configvalues",
        "configlive",
        "livethrottles",
        "pki",
        "paths",
        "pidfile",
        "audit",
    }  # fmt: skip
)


@dataclass(frozen=True)
class Import:
    """One imported module, with where it stands."""

    target: str
    line: int
    at_module_level: bool
    typing_only: bool


def imports(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Find every import of a module, relative ones resolved, also inside functions.

    What stands under ``if TYPE_CHECKING:`` is never executed and so is not at module level.
    """
    parts = module.split(".")
    package = parts if is_package else parts[:-1]

    def targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            return
        base = package[: len(package) - node.level + 1] if node.level else []
        prefix = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            yield f"{prefix}.{alias.name}" if prefix else alias.name

    def walk(node: ast.AST, top: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                for target in targets(child):
                    yield Import(target, child.lineno, top and not typing, typing)
            deeper = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from walk(child, top and not deeper, typing or guarded)

    yield from walk(ast.parse(source), True, False)


def room_of(module: str) -> str:
    """Give the room of a dotted name below ``qdsmirror``; ``""`` is the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Check one module's source; give one line for each import that breaks the rule."""
    room = room_of(module)
    if room not in RULES:
        return [f"{module}: the import rule does not know the room {room!r}"]
    found = []
    for one in imports(source, module, is_package):
        top = one.target.split(".")[0]
        where = f"{module}:{one.line}"
        if top == "qdsmirror":
            seen = room_of(one.target)
            if seen in ("", "__version__") or seen == room or seen in RULES[room]:
                continue
            if one.typing_only and seen == "interfaces":
                continue  # A name for annotations brings nothing in when the code runs.
            found.append(f"{where}: {room or 'the package'} may not import {one.target}")
        elif room == "core" and top in IMPURE:
            found.append(f"{where}: core is pure and may not import {one.target}")
        elif room in NO_TWISTED_AT_START and top == "twisted" and one.at_module_level:
            found.append(f"{where}: imports Twisted at start-up: {one.target}")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    """Find every module of the package with its dotted name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE.parent).with_suffix("")
        parts = [part for part in relative.parts if part != "__init__"]
        yield ".".join(parts), path


class ImportRuleTests(TestCase):
    """The package keeps the rule."""

    def test_every_module_keeps_the_rule(self) -> None:
        found: list[str] = []
        checked = 0
        for name, path in modules():
            found += violations(path.read_text(), name, path.name == "__init__.py")
            checked += 1
        self.assertEqual(found, [], "\n".join(found))
        self.assertGreater(checked, 10)

    def import_all(self, room: str) -> None:
        """Import a room's modules in a process of its own: with all that they bring, no Twisted."""
        program = (
            "import importlib, sys\n"
            "for name in sys.argv[1:]:\n"
            "    importlib.import_module(name)\n"
            "    if 'twisted' in sys.modules:\n"
            "        sys.exit(name)\n"
        )
        result = subprocess.run(
            [
                sys.executable,
                "-c",
                program,
                *(name for name, _ in modules() if room_of(name) == room),
            ],
            cwd=PACKAGE.parent,
            capture_output=True,
            text=True,
            timeout=240,
        )
        self.assertEqual((result.returncode, result.stderr), (0, ""))

    def test_tools_start_without_twisted(self) -> None:
        """Commands start fast."""
        self.import_all("tools")

    def test_core_runs_without_twisted(self) -> None:
        """Nothing impure comes in by a detour."""
        self.import_all("core")


class CheckerTests(TestCase):
    """The checker catches what it is there for."""

    def caught(self, source: str, module: str, is_package: bool = False) -> int:
        return len(violations(source, module, is_package))

    def test_impure_core(self) -> None:
        for module in sorted(IMPURE):
            self.assertEqual(self.caught(f"import {module}", "qdsmirror.core.frames"), 1, module)
        self.assertEqual(self.caught("from os import path", "qdsmirror.core.frames"), 1)
        self.assertEqual(self.caught("import os.path as p", "qdsmirror.core.frames"), 1)
        self.assertEqual(
            self.caught("def f():\n    from twisted.internet import task", "qdsmirror.core.x"), 1
        )

    def test_interfaces_for_annotations_only(self) -> None:
        line = "from qdsmirror.interfaces import INbdConnection"
        self.assertEqual(self.caught(line, "qdsmirror.core.nbd"), 1)
        self.assertEqual(self.caught(f"if TYPE_CHECKING:\n    {line}", "qdsmirror.core.nbd"), 0)
        other = "from qdsmirror.net import link"
        self.assertEqual(self.caught(f"if TYPE_CHECKING:\n    {other}", "qdsmirror.core.nbd"), 1)

    def test_pure_core(self) -> None:
        source = "import struct\nfrom qdsmirror import limits\nfrom qdsmirror.core import frames\n"
        self.assertEqual(self.caught(source, "qdsmirror.core.records"), 0)

    def test_upward_imports(self) -> None:
        for module, upward in (
            ("qdsmirror.core.frames", "qdsmirror.storage.device"),
            ("qdsmirror.storage.writelog", "qdsmirror.net.link"),
            ("qdsmirror.storage.writelog", "qdsmirror.groups.driver"),
            ("qdsmirror.net.link", "qdsmirror.storage.device"),
            ("qdsmirror.net.link", "qdsmirror.groups.driver"),
            ("qdsmirror.groups.driver", "qdsmirror.daemons.child"),
            ("qdsmirror.tools.info", "qdsmirror.net.control"),
            ("qdsmirror.tools.info", "qdsmirror.groups.driver"),
            ("qdsmirror.tools.info", "qdsmirror.daemons.child"),
            ("qdsmirror.errors", "qdsmirror.paths"),
        ):
            self.assertEqual(self.caught(f"import {upward}", module), 1, (module, upward))
            package, _, name = upward.rpartition(".")
            self.assertEqual(self.caught(f"from {package} import {name}", module), 1, upward)

    def test_package_and_relative_forms(self) -> None:
        self.assertEqual(self.caught("from qdsmirror import daemons", "qdsmirror.tools.info"), 1)
        self.assertEqual(self.caught("from ..net import link", "qdsmirror.core.frames"), 1)
        self.assertEqual(self.caught("from .. import net", "qdsmirror.core.frames"), 1)
        self.assertEqual(self.caught("from . import frames", "qdsmirror.core.records"), 0)
        self.assertEqual(self.caught("from ..net import x", "qdsmirror.core", True), 1)

    def test_downward_imports(self) -> None:
        for module, downward in (
            ("qdsmirror.storage.writelog", "qdsmirror.core.frames"),
            ("qdsmirror.groups.driver", "qdsmirror.net.nbd"),
            ("qdsmirror.daemons.child", "qdsmirror.groups.driver"),
            ("qdsmirror.tools.wlscan", "qdsmirror.storage.device"),
        ):
            self.assertEqual(self.caught(f"import {downward}", module), 0, (module, downward))

    def test_twisted_at_start_up_of_a_tool(self) -> None:
        at_top = "from twisted.internet import reactor"
        self.assertEqual(self.caught(at_top, "qdsmirror.tools.info"), 1)
        self.assertEqual(self.caught(f"try:\n    {at_top}\nfinally: 1", "qdsmirror.tools.x"), 1)
        self.assertEqual(self.caught(f"class A:\n    {at_top}", "qdsmirror.tools.x"), 1)
        self.assertEqual(self.caught(f"def main():\n    {at_top}", "qdsmirror.tools.x"), 0)
        self.assertEqual(self.caught(f"if TYPE_CHECKING:\n    {at_top}", "qdsmirror.tools.x"), 0)

    def test_unknown_room(self) -> None:
        self.assertEqual(self.caught("", "qdsmirror.helpers.things"), 1)
