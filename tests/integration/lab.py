"""A lab of real processes for a test: made in a short directory, and gone after the test.

Everything here blocks: tests run it in a thread (``deferToThread``), never on the reactor's.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from qdsmirror.config import load_groups, load_host
from qdsmirror.paths import Paths
from qdsmirror.tools.client import ControlClient
from qdsmirror.tools.status import collect_groups
from tests.integration.commands import COMMANDS
from tests.integration.schema import keep_to_schema

REPOSITORY = Path(__file__).resolve().parents[2]
QUIET = Path(__file__).with_name("quiet")
#: How long anything may take that must happen: on a busy machine far longer than on an idle one,
#: where all of it takes some seconds.
WAIT_SECONDS = 120.0
COMMAND_SECONDS = 240.0
POLL_SECONDS = 0.05
#: For a daemon's answer, which may be late; nobody takes silence for one here.
ASK_SECONDS = 30.0
#: Memory files where they are to be had: the tests are about processes, not about disks.
_PLACES = ("/dev/shm", "/tmp")


class CommandError(AssertionError):
    """A command ended otherwise than it should."""


def in_thread(test: Callable[..., None]) -> Callable[..., Deferred[None]]:
    """Run a test's body, which may block, in a thread."""

    def run(self: TestCase) -> Deferred[None]:
        return deferToThread(test, self)

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


def draw_seed(test: TestCase) -> int:
    """Give a test's seed, ``QDS_SEED`` or a fresh one, and print it; trial keeps it in out.log."""
    seed = int(os.environ.get("QDS_SEED") or random.randrange(1 << 32))
    print(f"QDS_SEED={seed} {test.id()}", flush=True)
    return seed


def ask_patiently(path: Path) -> dict[str, Any]:
    """Ask a daemon for its status, however busy the machine is.

    :raises UnreachableError: nobody answers there.
    """
    return ControlClient(path, ASK_SECONDS).call("Status")


class LabFixture:
    """A lab in a temporary directory.

    A test whose ``statistics`` is false has no processes for them: it is about something else.

    :ivar directory: the lab's; ``primary`` and ``secondary`` are its sites' roots.
    """

    def __init__(self, test: TestCase, *options: str) -> None:
        place = next(p for p in _PLACES if os.access(p, os.W_OK))
        self._base = Path(tempfile.mkdtemp(prefix="qds-", dir=place))
        test.addCleanup(self._remove)
        self.directory = self._base / "lab"
        self.primary = self.directory / "primary"
        self.secondary = self.directory / "secondary"
        self._options = options
        self._python_path = str(REPOSITORY)
        if not getattr(test, "statistics", True):
            self._python_path = f"{QUIET}:{REPOSITORY}"
        self._programs: list[subprocess.Popen[str]] = []

    def _remove(self) -> Deferred[None]:
        return deferToThread(self._remove_now)

    def _remove_now(self) -> None:
        for program in self._programs:
            if program.poll() is None:
                program.kill()
            program.communicate()
        self.kill_all()
        shutil.rmtree(self._base, ignore_errors=True)

    # -- commands -----------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        found = {k: v for k, v in os.environ.items() if k != "QDS_ROOT"}
        return {**found, "PYTHONPATH": self._python_path}

    def start_program(
        self, arguments: Sequence[str], output: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a program that is killed when the test ends.

        :param output: a file for all that it says: of one that nobody reads while it runs a pipe
            would fill.
        """
        said = output.open("w") if output is not None else subprocess.PIPE
        program = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            text=True,
            env=self.environment(),
            cwd=self._base,
        )
        if output is not None:
            said.close()  # type: ignore[union-attr]
        self._programs.append(program)
        return program

    def _done(
        self, arguments: Sequence[str], seconds: float, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, whatever that is."""
        if not options and COMMANDS.knows(arguments[0]):
            return COMMANDS.run(arguments, self._base, self.environment(), seconds)
        return subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment(),
            cwd=self._base,
            timeout=seconds,
            check=False,
            **options,
        )

    def run(self, arguments: Sequence[str], codes: Sequence[int] = (0,)) -> str:
        """Run a program to its end and give its output."""
        done = self._done(arguments, COMMAND_SECONDS)
        if done.returncode not in codes:
            raise CommandError(
                f"{' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}{self.logs()}"
            )
        return done.stdout

    def tool(self, command: str, *arguments: str, codes: Sequence[int] = (0,)) -> str:
        """Run one of the project's commands, e.g. ``qdsinfo``."""
        return self.run([console_script(command), *arguments], codes)

    def create(self) -> None:
        self.tool("qdslab", "create", str(self.directory), *self._options)

    def start(self, *sites: str) -> None:
        self.tool("qdslab", "start", str(self.directory), *sites)

    def stop(self, *sites: str) -> None:
        self.tool("qdslab", "stop", str(self.directory), *sites)

    def wait(self, state: str, seconds: float = WAIT_SECONDS, site: str = "primary") -> None:
        """Wait for a state of all groups."""
        self.tool(
            "qdsinfo", "--root", str(self.directory / site),
            "--wait", state, "--timeout", str(seconds),
        )  # fmt: skip

    def info(self, site: str = "primary") -> dict[str, Any]:
        """Give a site's first group as ``qdsinfo --json`` shows it."""
        return self.groups(site)[0]

    def groups(self, site: str = "primary") -> list[dict[str, Any]]:
        """Give all groups as ``qdsinfo --json`` shows them, without a process for each look."""
        paths = Paths.of(self.directory / site)
        host = load_host(paths).name
        found = collect_groups(paths, host, load_groups(paths), ask_patiently)
        keep_to_schema({"schema": 1, "host": host, "groups": found})
        return found

    # -- processes ----------------------------------------------------------------------------

    def pid_file(self, name: str) -> Path:
        """Find a daemon's pid file: ``qdsrmd``, ``dsgrp000.rmd`` ..."""
        site = self.secondary if name.endswith("rmd") else self.primary
        return site / "run" / f"{name}.pid"

    def pid(self, name: str) -> int | None:
        """Give the pid of a daemon that runs, by its pid file's name."""
        with suppress(OSError, ValueError):
            pid = int(self.pid_file(name).read_text())
            if self._is_ours(pid):
                return pid
        return None

    def _is_ours(self, pid: int) -> bool:
        with suppress(OSError):
            return str(self.directory) in Path(f"/proc/{pid}/cmdline").read_text()
        return False

    def children(self, role: str) -> list[int]:
        """Give the pids of all children of a role, with pid file or still without."""
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in filter(self._is_ours, pids) if _is_child(pid, role)]

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to a daemon; one that is being relaunched is waited for."""
        pid = self.until(lambda: self.pid(name), f"{name} to run")
        os.kill(pid, number)
        return pid

    def until(self, happened: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
        """Wait until something is true; give it."""
        deadline = time.monotonic() + seconds
        while not (found := happened()):
            if time.monotonic() > deadline:
                raise CommandError(f"waited in vain for {what}\n{self.logs()}")
            time.sleep(POLL_SECONDS)
        return found

    def kill_together(self, *names: str) -> None:
        """Kill daemons that all run, none of which shall end by itself because another has."""
        pids = [self.until(lambda name=name: self.pid(name), f"{name} to run") for name in names]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                os.kill(pid, number)
        for name, pid in zip(names, pids, strict=True):
            self.until(lambda pid=pid: not self._is_ours(pid), f"the end of {name}")

    def kill_all(self) -> None:
        """Leave no process of this lab, nor one that was made while the others were killed."""
        deadline = time.monotonic() + ASK_SECONDS
        while found := [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and self._is_ours(int(entry.name))
        ]:
            for pid in found:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_SECONDS)

    # -- looking ------------------------------------------------------------------------------

    def images(self, site: str) -> list[Path]:
        """Give a site's data or mirror devices, in the LDSUs' order."""
        kind = "data" if site == "primary" else "mirror"
        return sorted((self.directory / site / "devices").glob(f"*.{kind}"))

    def logs(self, lines: int = 15) -> str:
        """Give the ends of the daemons' logs, for a test that failed."""
        told = ""
        for log in sorted(self.directory.glob("*/var/*.log")):
            with suppress(OSError):
                said = [s for s in log.read_text().splitlines() if " connection " not in s]
                told += f"--- {log}\n" + "\n".join(said[-lines:]) + "\n"
        return told


def _is_child(pid: int, role: str) -> bool:
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        return "qdsmirror.daemons.child" in words and role in words
    return False


def console_script(name: str) -> str:
    """Give the path of an installed command."""
    return str(Path(sys.executable).parent / name)
