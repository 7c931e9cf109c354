"""The installed wheel: what a user gets, beside what the checkout has."""

from __future__ import annotations

import atexit
import configparser
import functools
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from twisted.trial.unittest import SkipTest, TestCase

ROOT = Path(__file__).resolve().parent.parent
DAEMONS = ("qdsdriver", "qdspmd", "qdsrmd", "qdsconsole")
#: What pip says when there is no package index to be reached, or no venv to be made.
NO_NETWORK = ("No matching distribution", "connection", "Connection", "Temporary failure", "HTTP")


def run(*command: str | Path, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a command outside the checkout's environment."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "QDS_ROOT", "VIRTUAL_ENV")
    }
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def scripts() -> dict[str, str]:
    """Give the console scripts of setup.cfg: name to ``module:function``."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].strip().splitlines()
    return dict(
        (part.strip() for part in line.split("=", 1))  # type: ignore[misc]
        for line in lines
    )


class Installation:
    """An sdist of the checkout, a wheel built from it, and an environment with that wheel."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="qdswheel", dir="/tmp"))
        atexit.register(shutil.rmtree, self.directory, ignore_errors=True)
        self.problem = self._build()

    def bin(self, name: str) -> Path:
        """Give a program of the environment in which the wheel is installed."""
        return self.directory / "installed" / "bin" / name

    @property
    def sdist(self) -> Path:
        return next(self.directory.glob("qdsmirror-*.tar.gz"))

    @property
    def wheel(self) -> Path:
        return next(self.directory.glob("qdsmirror-*.whl"))

    def _build(self) -> str:
        """Build and install; give what went wrong, empty for nothing."""
        source = self.directory / "source"
        litter = shutil.ignore_patterns(
            *(".git", ".venv", "build", "dist", "*.egg-info", "_trial_temp*"),
            *("__pycache__", ".*_cache", ".hypothesis", "demo"),
        )
        shutil.copytree(ROOT, source, ignore=litter)
        hook = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
        pip = ("-m", "pip", "-q", "--disable-pip-version-check")
        for step, *command in (
            ("sdist", sys.executable, "-c", hook, self.directory),
            ("wheel", sys.executable, *pip, "wheel", "--no-deps", "-w", self.directory, None),
            ("venv", sys.executable, "-m", "venv", self.directory / "installed"),
            ("install", self.bin("python"), *pip, "install", None),
        ):
            if command[-1] is None:
                command[-1] = self.sdist if step == "wheel" else self.wheel
            done = run(*(str(part) for part in command), cwd=source)
            if done.returncode:
                return f"{step}: {done.stdout}{done.stderr}"
        return ""


@functools.cache
def installation() -> Installation:
    """Build once for all tests."""
    return Installation()


class InstalledWheelTests(TestCase):
    """What the wheel installs works without the checkout."""

    timeout = 900

    def setUp(self) -> None:
        self.installed = installation()
        self.directory = self.installed.directory
        self.bin = self.installed.bin
        problem = self.installed.problem
        if problem and "CI" not in os.environ:
            if any(word in problem for word in NO_NETWORK):
                raise SkipTest("no package index within reach (the wheel's dependencies)")
            if "ensurepip" in problem:
                raise SkipTest("no python3-venv")
        self.assertEqual(problem, "")

    def test_twistd_lists_the_daemons(self) -> None:
        result = run(self.bin("twistd"), "--help", cwd=self.directory)
        self.assertEqual(result.returncode, 0, result.stderr)
        listed = {line.split()[0] for line in result.stdout.splitlines() if line.strip()}
        self.assertEqual(set(DAEMONS) - listed, set(), result.stdout)

    def test_daemons_have_their_options(self) -> None:
        for daemon in DAEMONS:
            result = run(self.bin("twistd"), daemon, "--help", cwd=self.directory)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertIn("--root", result.stdout, daemon)

    def test_every_command_starts(self) -> None:
        """Each console script is installed, and its module is in the wheel."""
        for name in scripts():
            result = run(self.bin(name), "--version", cwd=self.directory)
            self.assertEqual(result.returncode, 0, f"{name}: {result.stderr}")
            self.assertIn("0.", result.stdout, name)

    def test_wheel_has_the_package_and_nothing_beside(self) -> None:
        source = self.directory / "source"
        names = set(zipfile.ZipFile(self.installed.wheel).namelist())
        wanted = {
            str(path.relative_to(source))
            for pattern in ("*.py", "*.ini", "*.json")
            for path in (source / "qdsmirror").rglob(pattern)
        } | {"twisted/plugins/qdsmirror_plugins.py"}
        self.assertEqual(wanted - names, set())
        code = {name for name in names if ".dist-info/" not in name and ".data/" not in name}
        self.assertEqual(code - wanted, set())

    def test_manual_is_installed(self) -> None:
        """Where man looks when the environment's bin is in the path."""
        pages = {str(p.relative_to(ROOT / "man")) for p in (ROOT / "man").glob("man*/*")}
        share = self.directory / "installed" / "share" / "man"
        self.assertEqual({str(p.relative_to(share)) for p in share.glob("man*/*")}, pages)

    def test_completion_is_installed(self) -> None:
        """Where bash-completion and zsh look, below the environment's share."""
        share = self.directory / "installed" / "share"
        for folder, place in (
            ("bash", share / "bash-completion" / "completions"),
            ("zsh", share / "zsh" / "site-functions"),
        ):
            ours = {path.name for path in (ROOT / "completion" / folder).iterdir()}
            self.assertGreater(len(ours), 0)
            self.assertEqual({path.name for path in place.iterdir()}, ours)

    def test_sdist_is_complete(self) -> None:
        with tarfile.open(self.installed.sdist) as archive:
            names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        for wanted in ("Makefile", "README.md", "LICENSE", "man/man1/qdsinfo.1", ".ci/run"):
            self.assertIn(wanted, names)
        for folder in ("conf", "bench", "tests"):
            self.assertTrue(any(name.startswith(f"{folder}/") for name in names), folder)


class CheckoutTests(TestCase):
    """What setup.cfg promises exists in the checkout."""

    def test_packages_are_all_listed(self) -> None:
        """A package that setup.cfg does not list would be missing from the wheel only."""
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        listed = set(setup["options"]["packages"].split())
        found = {
            ".".join(path.parent.relative_to(ROOT).parts)
            for path in (ROOT / "qdsmirror").rglob("__init__.py")
        }
        self.assertEqual(listed - {"twisted.plugins"}, found)

    def test_plugins_directory_is_no_package(self) -> None:
        """An ``__init__.py`` there would hide the plugins of Twisted itself, or ours."""
        for folder in (ROOT / "twisted", ROOT / "twisted" / "plugins"):
            self.assertFalse((folder / "__init__.py").exists(), folder)
