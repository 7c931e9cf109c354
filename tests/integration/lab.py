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
from qdsmirror.pidfile import running_pid
from qdsmirror.tools.client import ControlClient
from qdsmirror.tools.status import collect_groups
from tests.integration.commands import COMMANDS
from tests.integration.schema import keep_to_schema

REPOSITORY = Path(__file__).resolve().parents[2]
QUIET = Path(__file__).with_name("quiet")
#: How long anything may take that must happen: on a busy machine far longer than on an idle one,
#: where all of it takes some seconds.
WAIT_SECONDS = 120.0
COMMAND_SECONDS = 600.0
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
        """Give the pid of a daemon that runs, by its pid file's name.

        One that was killed runs until it holds nothing any more, which is after the kernel has
        forgotten its command line.
        """
        return running_pid(self.pid_file(name))

    def _is_ours(self, pid: int) -> bool:
        with suppress(OSError):
            return str(self.directory) in Path(f"/proc/{pid}/cmdline").read_text()
        return False

    def daemons(self, site: str) -> list[int]:
        """Give the pids of a site's masters and children, with pid file or still without."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                command = (entry / "cmdline").read_text() if entry.name.isdigit() else ""
                if str(self.directory / site) in command and "qdsmirror.daemons." in command:
                    found.append(int(entry.name))
        return found

    def until_gone(self, site: str) -> None:
        """Wait until no daemon of a site is left, nor holds anything on its way out."""

        def gone() -> bool:
            held = map(running_pid, (self.directory / site / "run").glob("*.pid"))
            return not self.daemons(site) and not any(held)

        self.until(gone, f"the end of {site}")

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to a daemon; one that is being relaunched is waited for."""
        pid: int = self.until(lambda: self._living(name), f"{name} to run")
        os.kill(pid, number)
        return pid

    def _living(self, name: str) -> int | None:
        """Give the pid of a daemon that is not about to end."""
        pid = self.pid(name)
        return pid if pid is not None and self._is_ours(pid) else None

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
        pids = [
            self.until(lambda name=name: self._living(name), f"{name} to run") for name in names
        ]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                os.kill(pid, number)
        for name in names:
            self.until(lambda name=name: self.pid(name) is None, f"the end of {name}")

    def kill_all(self) -> None:
        """Leave no process of this lab, nor one that was made while the others were killed.

        What they held is free then.
        """
        deadline = time.monotonic() + ASK_SECONDS
        killed: set[int] = set()
        while time.monotonic() < deadline:
            found = [int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit()]
            ours = {pid for pid in found if self._is_ours(pid)}
            for pid in ours:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            killed |= ours
            if not ours and all(map(_has_ended, killed)):
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


def _has_ended(pid: int) -> bool:
    """Tell whether a process holds nothing any more: it, and all its threads, are gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX" and len(os.listdir(f"/proc/{pid}/task")) <= 1
    except OSError:
        return True


def console_script(name: str) -> str:
    """Give the path of an installed command."""
    return str(Path(sys.executable).parent / name)
