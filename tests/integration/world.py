"""More of a lab than :mod:`tests.integration.lab`: real clients, changed files, block devices.

Everything here blocks: tests run it in a thread.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SkipTest, TestCase

from qdsmirror.paths import Paths
from tests.integration.lab import (
    COMMAND_SECONDS,
    QUIET,
    WAIT_SECONDS,
    LabFixture,
    ask_patiently,
    console_script,
)

SITES = ("primary", "secondary")
MASTERS = {"primary": ("qdsdriver", "qdspmd"), "secondary": ("qdsrmd",)}
#: One that hangs shall not hold the suite.
PROGRAM_SECONDS = COMMAND_SECONDS
STRAY_SECONDS = 10.0
#: Run first where ip(8) has made a mount namespace: what other tests have mounted is in there too,
#: and would stay in use as long as it lives, however often they unmount it.  $1: what to leave.
FORGET_MOUNTS = """
    for place in $(cut -d' ' -f2 /proc/self/mounts); do
        case $place in
            "$1"/*) ;;
            /dev/shm/*|/tmp/*|/var/tmp/*) umount --lazy "$place" ;;
        esac
    done 2>/dev/null
"""


def need(*programs: str) -> None:
    """Skip the test, by name, when a program is missing."""
    for program in programs:
        if shutil.which(program) is None:
            raise SkipTest(f"{program} is not installed")


def need_root() -> None:
    """Skip the test unless it may make loop devices and mount."""
    if os.geteuid() != 0:
        raise SkipTest("root is needed for loop devices and mounts")
    if not os.path.exists("/dev/loop-control"):
        raise SkipTest("/dev/loop-control is missing")


def need_attached_ext4() -> None:
    """Skip the test unless an LDSU can be attached through FUSE, with ext4 on it."""
    need_root()
    need("nbdfuse", "nbdkit", "losetup", "mkfs.ext4", "e2fsck", "mount", "fusermount3")
    if not os.path.exists("/dev/fuse"):
        raise SkipTest("/dev/fuse is missing")


class World(LabFixture):
    """A lab, and what the tests of this directory do with it.

    :ivar base: a directory for the test's own files.
    """

    def __init__(self, test: TestCase, *options: str) -> None:
        super().__init__(test, *options)
        self.base = self._base
        self.test = test
        self.customised: Path | None = None
        self._loops: list[str] = []
        self._mounts: list[Path] = []
        test.addCleanup(self._untangle)

    def _untangle(self) -> Deferred[None]:
        return deferToThread(self.untangle)

    def untangle(self) -> None:
        """Take away mounts and loop devices; what serves them is killed, so nothing hangs."""
        self.kill_all()
        for place in reversed(self._mounts):
            _try("umount", "--lazy", str(place))
        listed = _try("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE")
        strays = [line.split()[0] for line in listed.splitlines() if str(self.base) in line]
        for loop in {*strays, *self._loops}:
            _try("losetup", "--detach", loop)
        # After the loop devices: these no longer know their files' paths without the mounts.
        for line in Path("/proc/self/mounts").read_text().splitlines():
            place_text = line.split(" ")[1]
            if place_text.startswith(str(self.base)):
                _try("umount", "--lazy", place_text)

    # -- commands -----------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """Give the environment of commands, and of the daemons that they start."""
        found = super().environment()
        if self.customised is not None:
            found["PYTHONPATH"] = f"{self.customised}:{found['PYTHONPATH']}"
        return found

    def customise(self, text: str) -> None:
        """Have every daemon that is started from now on run this first (site(3))."""
        self.customised = self.base / "customised"
        self.customised.mkdir(exist_ok=True)
        if not getattr(self.test, "statistics", True):
            # Of two modules of one name Python takes the first alone.
            text += f"import runpy\nrunpy.run_path({str(QUIET / 'sitecustomize.py')!r})\n"
        (self.customised / "sitecustomize.py").write_text(text)

    def ended(
        self, *arguments: str, seconds: float = PROGRAM_SECONDS, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program, whatever its exit code."""
        return self._done(arguments, seconds, **options)

    def start_in(self, near: str, far: str) -> None:
        """Start all daemons, the primary's in one network namespace, the secondary's in another."""
        for space, site, command in (
            (far, "secondary", "launchrmds"),
            (near, "primary", "launchdriver"),
            (near, "primary", "launchpmds"),
        ):
            inside = ["ip", "netns", "exec", space, "sh", "-c", f'{FORGET_MOUNTS} shift; exec "$@"']
            inside += ["sh", str(self.base), console_script(command)]
            self.run([*inside, "--root", str(self.directory / site)])

    def ask(
        self, site: str, command: str, *arguments: str, seconds: float = PROGRAM_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run one of our commands on a site, whatever its exit code."""
        root = str(self.directory / site)
        return self.ended(console_script(command), "--root", root, *arguments, seconds=seconds)

    def at(self, site: str, command: str, *arguments: str) -> str:
        """Run one of our commands on a site; it must succeed."""
        return self.tool(command, "--root", str(self.directory / site), *arguments)

    def insist_at(self, site: str, command: str) -> None:
        """Launch daemons: while their killed ones are not quite gone, that may fail."""
        self.until(lambda: not self.ask(site, command).returncode, f"{command} to be done")

    def taken_up(self, site: str) -> None:
        """Wait until the groups of a site go by the files that ``apply`` has just taken up.

        It answers when each group's process was told so; until that reads it, its group is there
        as it was.
        """
        paths = Paths.of(self.directory / site)
        masters = [paths.control_socket(name) for name in MASTERS[site]]

        def run() -> bool:
            told = [ask_patiently(path)["groups"] for path in masters]
            return all(group["state"] == "running" for groups in told for group in groups)

        self.until(run, f"the groups of {site} to run")

    def launch(self) -> None:
        """Start all daemons without waiting for the groups to be connected."""
        self.at("secondary", "launchrmds")
        self.at("primary", "launchdriver")
        self.at("primary", "launchpmds")

    def log(self, daemon: str) -> str:
        """Give the whole log of ``qdsdriver``, ``qdspmd`` or ``qdsrmd``."""
        site = "secondary" if daemon == "qdsrmd" else "primary"
        return (self.directory / site / "var" / f"{daemon}.log").read_text()

    def logged(self, daemon: str, text: str) -> None:
        """Check that a daemon's log has something, or comes to have it.

        A line may come after what it tells of: a slow log never holds up a daemon.
        """
        self.until(lambda: text in self.log(daemon), f"{text!r} in the log of {daemon}")

    # -- files ----------------------------------------------------------------------------------

    def config(self, site: str, number: int = 0) -> Path:
        """Give a site's group file."""
        return self.directory / site / "etc" / f"dsgrp{number:03d}.cfg"

    def edit(self, path: Path, old: str, new: str, count: int = 1) -> None:
        """Change a file; the text to be changed must be there."""
        text = path.read_text()
        self.test.assertGreaterEqual(text.count(old), 1, f"{old!r} is not in {path}")
        path.write_text(text.replace(old, new, count))

    def edit_both(self, old: str, new: str, number: int = 0) -> None:
        """Change a group's file on both sites."""
        for site in SITES:
            self.edit(self.config(site, number), old, new)

    def device(self, site: str, name: str) -> Path:
        """Give the path of a file-backed device, e.g. ``qds0.data``."""
        return self.directory / site / "devices" / name

    # -- block devices --------------------------------------------------------------------------

    def loop(self, file: Path, sector_bytes: int = 512, *options: str) -> str:
        """Make a file a loop device until the test ends."""
        device = self.run(
            ["losetup", "--find", "--show", f"--sector-size={sector_bytes}", *options, str(file)]
        ).strip()
        self._loops.append(device)
        return device

    def mount(self, device: str | Path, *options: str) -> Path:
        """Mount a file system until the test ends."""
        place = self.base / f"mnt{len(self._mounts)}"
        place.mkdir()
        self.run(["mount", *options, str(device), str(place)])
        self._mounts.append(place)
        return place

    def mount_new(self, device: Path) -> Path:
        """Make ext4 on a device and mount it."""
        self.run(["mkfs.ext4", "-q", "-F", str(device)])
        return self.mount(device)

    def unmount(self, place: Path) -> None:
        self.run(["umount", str(place)])

    def contents(self) -> dict[Path, bytes]:
        """Give a digest of the bytes of every device of both sites."""
        return {
            path: hashlib.sha256(path.read_bytes()).digest()
            for path in sorted(self.directory.glob("*/devices/*"))
        }

    # -- mirrors --------------------------------------------------------------------------------

    def uri(self, name: str = "qds0", number: int = 0) -> str:
        """Give the URI of an LDSU's export."""
        return f"nbd+unix:///{name}?socket={self.primary}/run/dsgrp{number:03d}.nbd"

    def qemu_io(self, *commands: str, name: str = "qds0", number: int = 0) -> str:
        """Run qemu-io's commands on an LDSU; each must succeed."""
        need("qemu-io")
        options = [part for command in commands for part in ("-c", command)]
        output = self.run(["qemu-io", "-f", "raw", *options, self.uri(name, number)])
        for bad in ("failed", "error", "mismatch"):
            self.test.assertNotIn(bad, output)
        return output

    def settle(self, seconds: float = WAIT_SECONDS) -> None:
        """Wait until everything is mirrored, and compare every mirror with its data device."""
        self.wait("drained", seconds)
        self.compare()

    def compare(self) -> None:
        """Compare every mirror device with its data device, byte by byte."""
        pairs = [
            (str(one["data_device"]), str(one["mirror_device"]))
            for group in self.groups()
            for one in group["ldsus"]
        ]
        self.test.assertTrue(pairs)
        for data, mirror in pairs:
            if Path(data).is_block_device():
                same = not self.ended("cmp", data, mirror).returncode
            else:
                same = filecmp.cmp(data, mirror, shallow=False)
            self.test.assertTrue(same, f"{mirror} differs from {data}\n{self.logs()}")


def attempts(log: str, pattern: str) -> int:
    """Count the lines of a log that match."""
    return sum(1 for line in log.splitlines() if re.search(pattern, line))


def digests(place: Path) -> dict[str, str]:
    """Give the contents of all files below a directory, each as a hash."""
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


def pattern_file(path: Path, length: int, seed: int = 1) -> bytes:
    """Write a file that is not compressible and has no two equal sectors."""
    import random

    data = random.Random(seed).randbytes(length)
    path.write_bytes(data)
    return data


def _try(*arguments: Sequence[str] | str) -> str:
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [str(one) for one in arguments],
            capture_output=True,
            text=True,
            timeout=STRAY_SECONDS,
            check=False,
        )
        return done.stdout
    return ""
