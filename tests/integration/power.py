"""A lab whose disks lose what is not synced when the power of their site is cut.

Everything here blocks: tests run it in a thread.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest, TestCase

from qdsmirror.errors import UnreachableError
from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import COMMAND_SECONDS, WAIT_SECONDS, console_script
from tests.integration.order import Layout, check, numbers
from tests.integration.world import SITES, World

_READ_BYTES = 1 << 20
_CONTROL_SECONDS = WAIT_SECONDS
#: So that something is under way when the power goes, and the disks' programs keep up with it.
_WRITES_PER_SECOND = 800


def need_fuse() -> None:
    """Skip the test unless it may mount a FUSE file system."""
    if os.geteuid() != 0:
        raise SkipTest("root is needed to mount")
    if not os.access("/dev/fuse", os.W_OK):
        raise SkipTest("/dev/fuse is missing")


class PowerWorld(World):
    """A lab on :mod:`tests.integration.fusedisk`.

    :ivar platters: the directory of each site's images: what survives a cut.
    """

    def __init__(self, test: TestCase, *options: str) -> None:
        need_fuse()
        super().__init__(test, *options)
        self.platters = {site: self.base / f"platters-{site}" for site in SITES}
        self._servers: dict[str, subprocess.Popen[str]] = {}

    def create(self) -> None:
        """Make the lab, and power both sites on."""
        super().create()
        for site in SITES:
            (self.directory / site / "devices").rename(self.platters[site])
            (self.directory / site / "devices").mkdir()
            self.power_on(site)

    def _mount_point(self, site: str) -> Path:
        return self.directory / site / "devices"

    def _control(self, site: str) -> Path:
        return self.base / f"control-{site}"

    def power_on(self, site: str) -> None:
        """Show a site its disks, as their platters are."""
        self._control(site).unlink(missing_ok=True)
        place = self._mount_point(site)
        self._servers[site] = self.start_program(
            [console_script("python"), "-m", "tests.integration.fusedisk"]
            + [str(place), str(self.platters[site]), str(self._control(site))]
        )
        self.until(lambda: any(place.iterdir()), f"the disks of {site}")

    def tell_disks(self, site: str, do: str, **told: Any) -> dict[str, Any]:
        """Ask the disks of a site for something: see :mod:`tests.integration.fusedisk`."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(_CONTROL_SECONDS)
            control.connect(str(self._control(site)))
            with control.makefile("rw") as stream:
                stream.write(json.dumps({"do": do, **told}) + "\n")
                stream.flush()
                return dict(json.loads(stream.readline()))

    def cut(self, sites: Sequence[str], seed: int, keep: float) -> int:
        """Cut the power of sites, and have them standing there, off, with nothing running.

        :param keep: how likely an unsynced write has reached the platter somehow.
        :returns: how many writes were unsynced.
        """
        unsynced = sum(
            self.tell_disks(site, "cut", seed=seed, keep=keep)["unsynced"] for site in sites
        )
        pids = [pid for site in sites for pid in self.daemons(site)]
        # Stopped first: none shall see another one's end, nor an I/O error of disks that are off.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        for site in sites:
            server = self._servers.pop(site)
            server.kill()
            server.communicate()
            self.run(["umount", "--lazy", str(self._mount_point(site))])
        for site in sites:
            self.until_gone(site)
        return unsynced

    def launch_driver(self) -> None:
        """Start the primary's driver alone, after a cut."""
        for left in (*self.primary.glob("run/*.ctl"), *self.primary.glob("run/*.nbd")):
            left.unlink()
        self.at("primary", "launchdriver")

    def read_exports(self, count: int, size: int) -> list[bytes]:
        """Read LDSUs as an application does."""
        images = []
        for index in range(count):
            with self.connect(f"qds{index}") as client:
                pieces = [client.read(o, _READ_BYTES) for o in range(0, size, _READ_BYTES)]
            images.append(b"".join(pieces))
        return images

    def connect(self, name: str = "qds0", number: int = 0) -> NbdClient:
        """Connect as soon as the driver serves."""

        def served() -> NbdClient | None:
            with suppress(UnreachableError):
                return NbdClient.connect(self.uri(name, number), timeout_seconds=COMMAND_SECONDS)
            return None

        return self.until(served, "the driver to serve")  # type: ignore[no-any-return]

    def recovered_mirrors(self) -> list[bytes]:
        """Replay the journal of a secondary whose daemons do not run; give its mirror devices."""
        told = json.loads(self.at("secondary", "qdsrmdreco", "--json"))
        self.test.assertTrue(told["groups"][0]["coherent"], told)
        return [path.read_bytes() for path in self.images("secondary")]


class Application:
    """Writers, one after another, and what each was promised and may be held to.

    :ivar first: the first number of the present writer; what its LDSUs held before is ``base``.
    :ivar promised: the highest number that must be there, by (device, slot).
    """

    def __init__(self, world: PowerWorld, layout: Layout, always: bool = False) -> None:
        self.world = world
        self.layout = layout
        self.always = always
        self.first = 1
        self.base: list[bytes] = []
        self.promised: dict[tuple[int, int], int] = {}
        self._writer: subprocess.Popen[str] | None = None
        self._promises = world.base / "promises"

    def begin(self, base: Sequence[bytes] = ()) -> None:
        """Start a writer on top of what the LDSUs hold now."""
        self.base = list(base)
        self._promises.unlink(missing_ok=True)
        socket_path = str(self.world.primary / "run" / "dsgrp000.nbd")
        arguments = [console_script("python"), "-m", "tests.integration.writer", socket_path]
        arguments += [f"qds{index}" for index in range(self.layout.devices)]
        arguments += ["--slots", str(self.layout.slots), "--first", str(self.first)]
        arguments += ["--promises", str(self._promises), "--rate", str(_WRITES_PER_SECOND)]
        self._writer = self.world.start_program(arguments + ["--always"] * self.always)

    def end(self) -> dict[str, Any]:
        """Let the writer end in order; give its report."""
        assert self._writer is not None
        output, errors = self._writer.communicate(timeout=WAIT_SECONDS)
        told = f"{output}{errors}{self.world.logs()}"
        self.world.test.assertEqual(self._writer.returncode, 0, told)
        self._take_promises()
        return dict(json.loads(output))

    def die(self) -> int:
        """Kill the writer; give how many promises it leaves."""
        assert self._writer is not None
        running = self._writer.poll() is None
        self._writer.kill()
        _, errors = self._writer.communicate()
        self.world.test.assertTrue(running, f"the writer had ended: {errors}{self.world.logs()}")
        return self._take_promises()

    def promises(self) -> int:
        """Give how many promises the writer has noted so far."""
        with suppress(FileNotFoundError):
            return len(self._promises.read_bytes().split())
        return 0

    def _take_promises(self) -> int:
        noted = [int(one) for one in self._promises.read_bytes().split()]
        for number in noted:
            place = self.layout.place(number)
            self.promised[place] = max(number, self.promised.get(place, 0))
        return len(noted)

    def check_durable(self, images: Sequence[bytes]) -> None:
        """Check that what was promised is there (DURABLE)."""
        shown = numbers(images, self.layout)
        lost = sorted(n for place, n in self.promised.items() if shown[place] < n)
        self.world.test.assertEqual(lost, [], f"{len(lost)} promised writes are lost")

    def check_not_ahead(self, mirrors: Sequence[bytes], images: Sequence[bytes]) -> None:
        """Check that the mirror holds nothing that the primary has lost (NO-AHEAD)."""
        ours, theirs = numbers(images, self.layout), numbers(mirrors, self.layout)
        ahead = sorted(n for place, n in theirs.items() if ours[place] < n)
        self.world.test.assertEqual(ahead, [], "the mirror holds writes that the primary lost")

    def check_prefix(self, mirrors: Sequence[bytes]) -> int:
        """Check that the mirror is a prefix (PREFIX); give the last write that it holds."""
        return check(mirrors, self.layout, self.first, self.base)

    def advance(self) -> None:
        """Let the next writer's numbers be higher than all that this one may have used."""
        self.first += _EPOCH


#: More than one writer writes.
_EPOCH = 1 << 24
