"""A root with configurations for daemons whose children are fake (fake_child.py)."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from qdsmirror.paths import Paths, group_name

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CHILD = (sys.executable, str(Path(__file__).with_name("fake_child.py")))
MASTER = (sys.executable, str(Path(__file__).with_name("fake_master.py")))

GROUP = """
operation = async
[primary]
host = {primary}
address = 127.0.0.1
[secondary]
host = {secondary}
address = 127.0.0.1
port = {port}
journal_device = {root}/journal{number}
[tunables]
send_window = {window}
[ldsus]
  [[qds{number}]]
  data_device = {root}/data{number}
  writelog_device = {root}/log{number}
  mirror_device = {root}/mirror{number}
"""


class World:
    """One host's root, in a short path; ``alpha`` is its name."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(dir="/tmp", prefix="qds"))
        self.paths = Paths.of(self.root)
        for directory in (self.paths.etc, self.paths.var, self.paths.run):
            directory.mkdir()

    def host(self, children: int = 8, **keys: str) -> None:
        lines = [f"name = alpha\nchildren = {children}\n"]
        lines += [f"{key} = {value}\n" for key, value in keys.items()]
        self.paths.host_config.write_text("".join(lines))

    def group(
        self, number: int, side: str = "primary", port: int = 5750, window: str = "16M"
    ) -> None:
        other = {"primary": "secondary", "secondary": "primary"}[side]
        hosts = {side: "alpha", other: "beta"}
        text = GROUP.format(root=self.root, number=number, port=port, window=window, **hosts)
        self.paths.group_config(number).write_text(text)

    def keep_in_memory(self, number: int, size: str) -> None:
        """Have a group's writelog in memory, of this size, from now on."""
        path = self.paths.group_config(number)
        text, log = path.read_text(), f"{self.root}/log{number}"
        new = f"memory:{size}\n  bitmap_device = {log}\n"
        path.write_text(text.replace(f"writelog_device = {log}\n", f"writelog_device = {new}"))

    def behave(self, number: int, behaviour: str) -> None:
        """Tell the fake group how to start: ``good``, ``fatal``, ``fail``, ``bug``."""
        (self.paths.var / f"behaviour{number}").write_text(behaviour)

    def events(self, number: int) -> list[str]:
        """What the fake group did: ``start PID``, ``stop PID``."""
        journal = self.paths.var / f"events{number}"
        return journal.read_text().splitlines() if journal.exists() else []

    def pid(self, number: int, role: str) -> int:
        return int(self.paths.pid_file(f"{group_name(number)}.{role}").read_text())

    def remove(self) -> None:
        """End what a killed master has left, which may write as long as it lives; remove all."""
        while left := [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and self._is_ours(entry)
        ]:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        shutil.rmtree(self.root)

    def _is_ours(self, entry: Path) -> bool:
        try:
            return str(self.root).encode() in (entry / "cmdline").read_bytes()
        except OSError:
            return False


class WorldCase(TestCase):
    """A test with a world, subprocesses that find the package, and SIGHUP put back."""

    timeout = 300

    def setUp(self) -> None:
        self.world = World()
        self.addCleanup(self.world.remove)
        self.addCleanup(signal.signal, signal.SIGHUP, signal.getsignal(signal.SIGHUP))
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(REPOSITORY)
        self.addCleanup(self._put_back, before)

    def _put_back(self, before: str | None) -> None:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


async def until(predicate: Callable[[], Any]) -> Any:
    """Wait for something that another process does; trial's timeout bounds it."""
    while not (found := predicate()):
        await pause(0.01)
    return found


def pause(seconds: float) -> Deferred[None]:
    """Wait for no event: to see that something does not happen, or between two pieces of data."""
    return deferLater(reactor, seconds, lambda: None)


def alive(pid: int) -> bool:
    """Tell whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
