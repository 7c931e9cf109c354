"""A host whose devices are files below its root, for the commands that run without a daemon."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from twisted.trial.unittest import TestCase

from qdsmirror.core.frames import Entry
from qdsmirror.core.superblock import Superblock
from qdsmirror.errors import DeviceFailedError
from qdsmirror.paths import Paths
from qdsmirror.pidfile import PidFile
from qdsmirror.storage.device import open_device
from qdsmirror.storage.identity import stable_identity
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.superblock import read_superblock
from qdsmirror.storage.writelog import Writelog
from qdsmirror.tools import wlinit
from tests.storage.logworld import KIB, FrameMaker, append, write
from tests.tools.sites import captured

#: Enough for a journal, and not so large that comparing it takes long.
LOG = 2560 * KIB
DATA = 64 * KIB

_HEAD = """\
operation = async
[primary]
host = alpha
[secondary]
host = beta
journal_device = {d}/journal{g}
[ldsus]
"""
_LDSU = """\
  [[qds{n}]]
  data_device = {d}/data{n}
  writelog_device = {d}/log{n}
  mirror_device = {d}/mirror{n}
"""


class Site:
    """A root, its configuration and its devices; every group has as many LDSUs.

    :param name: ``alpha`` is the primary, ``beta`` the secondary.
    """

    def __init__(
        self, test: TestCase, name: str = "alpha", *, groups: int = 1, ldsus: int = 2
    ) -> None:
        self.test = test
        self.directory = Path(tempfile.mkdtemp(prefix="qds-", dir="/tmp"))
        test.addCleanup(shutil.rmtree, self.directory)
        self.paths = Paths.of(self.directory)
        for one in (self.paths.etc, self.paths.var, self.paths.run, self.paths.dev):
            one.mkdir()
        self.be(name)
        self.devices = self.directory / "d"
        self.devices.mkdir()
        for group in range(groups):
            text = _HEAD.format(d=self.devices, g=group)
            self.make(f"journal{group}", LOG)
            for number in range(group * ldsus, (group + 1) * ldsus):
                text += _LDSU.format(d=self.devices, n=number)
                for kind, size in (("data", DATA), ("mirror", DATA), ("log", LOG)):
                    self.make(f"{kind}{number}", size)
            self.paths.group_config(group).write_text(text)

    def be(self, name: str) -> None:
        """Give this host another name."""
        self.paths.host_config.write_text(f"name = {name}\n")

    # -- devices ------------------------------------------------------------------------------

    def device(self, name: str) -> Path:
        return self.devices / name

    def make(self, name: str, size: int) -> Path:
        """Make a sparse file, or give it another size."""
        path = self.device(name)
        with open(path, "ab") as file:
            file.truncate(size)
        return path

    def put(self, name: str, offset: int, data: bytes) -> None:
        with open(self.device(name), "r+b") as file:
            file.seek(offset)
            file.write(data)

    def content(self) -> dict[str, bytes]:
        """Give the bytes of every device."""
        return {path.name: path.read_bytes() for path in sorted(self.devices.iterdir())}

    def superblock(self, name: str) -> Superblock:
        device = open_device(self.device(name), writable=False, exclusive=False)
        try:
            return read_superblock(device)
        finally:
            device.close()

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold a device as another process of ours does."""
        with open(self.device(name), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    @contextmanager
    def daemon(self, name: str) -> Iterator[None]:
        """Run, as far as its pid file tells, a group's daemon."""
        pid_file = PidFile(self.paths.pid_file(name))
        pid_file.acquire()
        pid_file.write()
        try:
            yield
        finally:
            pid_file.release()

    def latch(self, name: str, group: int = 0) -> FailureLatch:
        """Record a failed sync."""
        latch = FailureLatch(self.paths.state_file(group))
        latch.record(str(self.device(name)), DeviceFailedError("fdatasync: EIO"))
        return latch

    @contextmanager
    def failing_sync(self, name: str) -> Iterator[None]:
        """Have every sync of a device fail meanwhile; afterwards the kernel calls them good."""
        inner, failing = os.fdatasync, str(self.device(name))

        def fdatasync(fd: int) -> None:
            if os.readlink(f"/proc/self/fd/{fd}") == failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            inner(fd)

        with mock.patch("os.fdatasync", fdatasync):
            yield

    # -- logs ---------------------------------------------------------------------------------

    def initialise(self) -> None:
        code, _, errors = self.run(wlinit.main, "--yes")
        self.test.assertEqual((code, errors), (0, ""))

    def maker(self, name: str) -> FrameMaker:
        """Make frames of the history of a log."""
        return FrameMaker(self.superblock(name).generation)

    @contextmanager
    def log(self, name: str) -> Iterator[Writelog]:
        """Open a log as its daemon would; what was appended is durable afterwards."""
        device = open_device(self.device(name), writable=True)
        try:
            yield Writelog.open(device)
            device.fdatasync()
        finally:
            device.close()

    def append(self, name: str, frames: Sequence[bytes]) -> list[int]:
        """Append frames to a fresh log; give the offset of each in the device."""
        with self.log(name) as log:
            return [log.ring.physical(append(log, frame)).offset for frame in frames]

    # -- commands -----------------------------------------------------------------------------

    def run(self, main: Callable[[list[str]], int], *argv: str) -> tuple[int, str, str]:
        return captured(self.test, main, "--root", str(self.directory), *argv)

    def refused(
        self, main: Callable[[list[str]], int], code: int, *parts: str, argv: Sequence[str] = ()
    ) -> None:
        """Run a command that must fail with one line, and change no byte and no allocation."""
        before = self.content()
        blocks = {name: os.stat(self.device(name)).st_blocks for name in before}
        got, output, errors = self.run(main, *argv)
        self.test.assertEqual((got, output), (code, ""), errors)
        lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
        self.test.assertEqual(len(lines), 1, errors)
        for part in parts:
            self.test.assertIn(part, lines[0])
        after = self.content()
        for name, content in before.items():
            self.test.assertTrue(after[name] == content, f"{name} was written")
            self.test.assertEqual(os.stat(self.device(name)).st_blocks, blocks[name], name)


def stable_of(path: str) -> str:
    """Give what a device's path stands for under any other (storage.identity)."""
    with open(path, "rb") as file:
        return stable_identity(file.fileno())


def json_error(test: TestCase, output: str) -> dict[str, Any]:
    """Give the error of the one object that a command printed."""
    told = json.loads(output)
    test.assertEqual(told["schema"], 1)
    error = told["error"]
    assert isinstance(error, dict)
    test.assertEqual(set(error), {"code", "message", "hint"})
    return error


def entry(offset: int, number: int, length: int = 512) -> Entry:
    """Write bytes that only this number gives."""
    return write(offset, bytes([number]) * length)
