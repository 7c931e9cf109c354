"""A lab of several secondaries, a writer to each group, and eyes on those that must not suffer."""

from __future__ import annotations

import filecmp
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.config import GroupConfig, load_group
from qdsmirror.storage.superblock import read_superblock
from qdsmirror.tools.lab_sites import Lab
from qdsmirror.tools.status import collect_groups, failure_of
from tests.fakes import MemoryDevice
from tests.integration.lab import WAIT_SECONDS, ask_patiently
from tests.integration.order import SLOT_BYTES
from tests.integration.schema import keep_to_schema
from tests.integration.world import World

SLOTS = 128
WRITER_SECONDS = WAIT_SECONDS
#: Between two looks at groups that must not suffer.
WATCH_SECONDS = 0.25
SMALL = ("--size", "2M", "--writelog", "16M", "--journal", "4M")


class Writing:
    """A program that writes to every LDSU of a group until it is ended."""

    def __init__(self, fleet: Fleet, number: int, rate: float) -> None:
        self.fleet, self.number = fleet, number
        self._promises = fleet.base / f"promises{number}"
        self._promises.unlink(missing_ok=True)
        names = [one["name"] for one in fleet.group(number)["ldsus"]]
        socket = fleet.root(fleet.ends(number)[0]) / "run" / f"dsgrp{number:03d}.nbd"
        command = [*fleet.python("tests.integration.writer"), str(socket), *names]
        command += ["--slots", str(SLOTS), "--rate", str(rate), "--promises", str(self._promises)]
        self._program = fleet.start_program(command)

    @property
    def promised(self) -> int:
        """How much was answered for good: bytes of the list of it."""
        return self._promises.stat().st_size if self._promises.exists() else 0

    def goes_on(self) -> None:
        """Wait until more is answered than now."""
        before = self.promised
        self.fleet.until(lambda: self.promised > before, f"more writes to group {self.number}")

    def give_up(self) -> None:
        """End it as it is: it might connect again, and write on beside another."""
        self._program.kill()
        self._program.communicate(timeout=WRITER_SECONDS)

    def end(self) -> dict[str, Any]:
        """End it when all is answered; give its report."""
        output, errors = self._program.communicate(timeout=WRITER_SECONDS)
        self.fleet.test.assertTrue(output, errors)
        report: dict[str, Any] = json.loads(output)
        return report


#: What is seen of a daemon that does not answer in time.
_NO_ANSWER = str(("setup", None, None))


class Watch:
    """Looks at groups all the time: each must be connected, coherent and in the same processes."""

    def __init__(self, fleet: Fleet, numbers: Iterable[int]) -> None:
        self._fleet, self._numbers = fleet, set(numbers)
        self._first = self._seen()
        self._over = threading.Event()
        self.looks = 0
        self.wrong: list[str] = []
        fleet.test.addCleanup(self._over.set)
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _seen(self) -> dict[int, tuple[Any, ...]]:
        return {
            number: tuple(
                (group["state"], group["coherent"], group[role]["pid"])
                for group, role in zip(
                    self._fleet.both(number), ("driver", "rmd"), strict=True
                )
            )
            for number in self._numbers
        }  # fmt: skip

    def _look(self) -> None:
        while not self._over.wait(WATCH_SECONDS):
            self.looks += 1
            seen = self._seen()
            if seen != self._first and _NO_ANSWER in str(seen):
                # On a busy machine one answer may come too late; whoever is gone stays so.
                seen = self._seen()
            self.wrong += [
                f"group {number}: {self._first[number]}, then {seen[number]}"
                for number in self._numbers
                if seen[number] != self._first[number]
            ]

    def end(self) -> None:
        """Check that nothing was seen."""
        self._over.set()
        self._thread.join()
        self._fleet.test.assertEqual(self.wrong, [], self._fleet.logs())
        self._fleet.test.assertGreater(self.looks, 0)


class Fleet(World):
    """A lab of more sites than two, or of sites that play both parts."""

    def __init__(self, test: TestCase, *options: str) -> None:
        super().__init__(test, *SMALL, *options)
        self.writings: dict[int, Writing] = {}
        self._configs: dict[tuple[int, int], GroupConfig] = {}
        self._reading = threading.Lock()

    def create(self) -> None:
        super().create()
        self.lab = Lab(self.directory)

    def root(self, site: str) -> Path:
        return self.directory / site

    def ends(self, number: int) -> tuple[str, str]:
        """Give the sites that are primary and secondary of a group."""
        return self.lab.layout.ends(number)

    def pid_file(self, name: str) -> Path:
        """Find a pid file: of ``dsgrp001.rmd``, or of a site's master, ``secondary2/qdsrmd``."""
        site, _, master = name.rpartition("/")
        if not site:
            number, _, role = name.removeprefix("dsgrp").partition(".")
            site, master = self.ends(int(number))[role == "rmd"], name
        return self.root(site) / "run" / f"{master}.pid"

    def group(self, number: int, part: int = 0) -> dict[str, Any]:
        """Give a group as its primary (or secondary: ``part`` 1) shows it."""
        paths = self.lab.paths[self.ends(number)[part]]
        with self._reading:
            # A file that is broken later is none of this one's business.
            if (number, part) not in self._configs:
                self._configs[number, part] = load_group(paths, number)
            config = self._configs[number, part]
        host = self.ends(number)[part]
        found = collect_groups(paths, host, [config], ask_patiently)
        keep_to_schema({"schema": 1, "host": host, "groups": found})
        return found[0]

    def both(self, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.group(number), self.group(number, 1)

    def numbers(self) -> range:
        return range(self.lab.layout.groups)

    # -- writers and watchers -------------------------------------------------------------------

    def write(self, *numbers: int, rate: float = 30.0) -> None:
        """Begin to write to groups (to all), and wait until it goes."""
        for number in numbers or self.numbers():
            self.writings[number] = Writing(self, number, rate)
        for number in numbers or self.numbers():
            self.writings[number].goes_on()

    def go_on(self, *numbers: int) -> None:
        """Wait until more is written to each of these groups."""
        for number in numbers:
            self.writings[number].goes_on()

    def end_writing(self, *hurt: int) -> None:
        """End all writers; only those of hurt groups may have had to connect again, or failed."""
        for number, writing in self.writings.items():
            report = writing.end()
            if number not in hurt:
                told = (number, report, self.logs())
                self.test.assertEqual((report["error"], report["reconnects"]), ("", 0), told)
            self.test.assertGreater(report["writes"], 0)
        self.writings.clear()

    def drain(self, *numbers: int) -> None:
        """Wait until groups (all) are drained, and compare their mirrors, byte by byte."""
        for number in numbers or self.numbers():
            self.wait_for(number, "coherent")
            self.wait_for(number, "drained")
            for one in self.group(number)["ldsus"]:
                data, mirror = one["data_device"], one["mirror_device"]
                same = filecmp.cmp(data, mirror, shallow=False)
                self.test.assertTrue(same, f"{mirror} differs from {data}\n{self.logs()}")
                self.test.assertTrue(any(Path(data).read_bytes()[: SLOTS * SLOT_BYTES]))

    def wait_for(self, number: int, state: str, codes: tuple[int, ...] = (0,)) -> str:
        """Wait at the primary until a group is in a state, or is known not to come there."""
        site = self.ends(number)[0]
        return self.tool(
            "qdsinfo", "--root", str(self.root(site)), "-g", str(number),
            "--wait", state, "--timeout", str(WAIT_SECONDS), codes=codes,
        )  # fmt: skip

    def refused(self, number: int, code: int, *reasons: str, part: int = 0) -> None:
        """Check that qdsinfo at one end names a group as failed, with this code and reasons."""
        site = self.ends(number)[part]
        # Whoever was at the other end of a daemon that was killed learns of it in its own time.
        self.until(lambda: failure_of(self.group(number, part)), f"group {number} to be refused")
        wait = ("--wait", "connected", "--timeout", str(WAIT_SECONDS))
        done = self.ask(site, "qdsinfo", "-g", str(number), *wait)
        told = (site, number, done.returncode, done.stderr, self.logs())
        self.test.assertEqual(done.returncode, code, told)
        for reason in (f"dsgrp{number:03d}", *reasons):
            self.test.assertTrue(re.search(reason, done.stderr), (reason, told))

        def shown(reason: str) -> list[str]:
            lines = self.ask(site, "qdsinfo").stdout.splitlines()
            return [line for line in lines if re.search(reason, line)]

        for reason in reasons:
            lines = self.until(lambda one=reason: shown(one), f"qdsinfo to tell {reason!r}")
            self.test.assertTrue(all(f"dsgrp{number:03d}" in line for line in lines), lines)

    # -- damage ---------------------------------------------------------------------------------

    def crash_without_superblocks(self, daemon: str, device: Path) -> None:
        """Overwrite a log's superblocks behind a daemon's back, and kill -9 the daemon."""
        pid = self.kill(daemon, signal.SIGSTOP)
        content = device.read_bytes()
        slot_bytes = read_superblock(MemoryDevice(len(content), content=content)).slot_bytes
        with device.open("r+b") as file:
            file.write(os.urandom(2 * slot_bytes))
        os.kill(pid, signal.SIGKILL)

    def device_of(self, number: int, name: str) -> Path:
        """Find a device of a group: ``qds1.data``, ``dsgrp000.journal`` ..."""
        part = name.endswith((".mirror", ".journal"))
        return self.device(self.ends(number)[part], name)

    def python(self, module: str) -> list[str]:
        """Give the command that runs a module of ours."""
        return [sys.executable, "-m", module]
