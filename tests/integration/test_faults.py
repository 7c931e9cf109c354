"""Devices that fail, one group each: what the failure table of qdsmirror-architecture(7) says.

One lab for all: so it is seen, too, that no group's failure touches another of the same process.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from twisted.trial.unittest import TestCase

from tests.integration.lab import WAIT_SECONDS, in_thread
from tests.integration.power import PowerWorld

BLOCK = 4096
SIZE = 1 << 20
LOG = 2 << 20
READ_AT = SIZE // 2
FAILED = 1
BROKEN = 4
CHILDREN = 2


@dataclass(frozen=True)
class Case:
    """A group and what happens to one of its devices.

    :ivar kind: ``data``, ``writelog``, ``mirror`` or ``journal``.
    :ivar operation: which one fails; empty for none.
    :ivar how: as the disks are told.
    """

    number: int
    kind: str
    operation: str
    how: dict[str, int] = field(default_factory=dict)

    @property
    def site(self) -> str:
        return "primary" if self.kind in ("data", "writelog") else "secondary"

    @property
    def device(self) -> str:
        name = f"dsgrp{self.number:03d}" if self.kind == "journal" else f"qds{self.number}"
        return f"{name}.{self.kind}"

    @property
    def is_harmless(self) -> bool:
        return not self.operation or "short" in self.how or self.operation == "read"

    @property
    def is_latched(self) -> bool:
        return self.operation == "fsync"


EIO = {"errno": errno.EIO}
ENOSPC = {"errno": errno.ENOSPC}
ONCE = {"errno": errno.EIO, "times": 1}
SHORT = {"short": 1536}
WHAT = (
    ("data", "write", EIO),
    ("data", "write", ENOSPC),
    ("data", "write", SHORT),
    ("data", "fsync", ONCE),
    ("data", "read", ONCE),
    ("writelog", "write", EIO),
    ("writelog", "write", ENOSPC),
    ("writelog", "write", SHORT),
    ("writelog", "fsync", ONCE),
    ("mirror", "write", EIO),
    ("mirror", "fsync", ONCE),
    ("journal", "write", ENOSPC),
    ("journal", "write", SHORT),
    ("journal", "fsync", ONCE),
    ("data", "", {}),
)
CASES = tuple(Case(number, *what) for number, what in enumerate(WHAT))
#: Its writelog is a sparse file in a file system that is too small for it.
FULL = Case(len(CASES), "writelog", "", {})


class FaultTests(TestCase):
    timeout = 1200

    def start(self) -> PowerWorld:
        world = PowerWorld(
            self, "--groups", str(len(CASES) + 1), "--size", "1M", "--writelog", "2M",
            "--journal", "3M",
        )  # fmt: skip
        world.create()
        for site in ("primary", "secondary"):
            with open(world.directory / site / "etc" / "qds.cfg", "a") as file:
                file.write(f"children = {CHILDREN}\n")
        self.cramp(world)
        world.start()
        return world

    def cramp(self, world: PowerWorld) -> None:
        """Move a writelog into a file system that has not got the space for all of it."""
        small = world.mount("small", "-t", "tmpfs", "-o", "size=1M")
        log = small / FULL.device
        shutil.copyfile(world.device("primary", FULL.device), world.base / "log")
        with open(log, "wb") as file:
            file.truncate(LOG)
        world.edit_both(str(world.device("primary", FULL.device)), str(log), FULL.number)
        done = world.ask("primary", "qdswlinit", "-g", str(FULL.number), "--yes")
        self.assertEqual(done.returncode, FAILED, done.stderr)
        self.assertIn(str(log), done.stderr)
        self.assertIn(os.strerror(errno.ENOSPC), done.stderr)
        with open(log, "wb") as file:
            file.truncate(LOG)
        world.run(["cp", "--sparse=always", str(world.base / "log"), str(log)])
        self.assertLess(log.stat().st_blocks * 512, LOG)

    def attempt(self, world: PowerWorld, case: Case, block: int = 0) -> Iterator[int]:
        """Write and flush, and so on; give what each is answered with, 0 for success."""
        with world.connect(f"qds{case.number}", case.number) as client:
            for operation in (
                lambda: client.write(block * BLOCK, bytes([case.number + 1]) * 2 * BLOCK, True),
                client.flush,
                lambda: client.read(READ_AT, BLOCK),
            ):
                try:
                    operation()
                    yield 0
                except OSError as error:
                    yield error.errno or errno.EIO

    def status(self, world: PowerWorld, case: Case, site: str) -> dict[str, Any]:
        told = world.groups(site)[case.number]
        self.assertEqual(told["group"], case.number)
        return told

    def assert_loud(self, world: PowerWorld, case: Case, site: str, code: int) -> None:
        """The device is named, with a since-when, in state, log and exit code."""
        path = str(world.device(case.site, case.device))
        role = "driver" if site == "primary" else "rmd"

        def is_told() -> bool:
            return path in str(self.status(world, case, site)["reason"])

        world.until(is_told, f"{case} at the {site}")
        told = self.status(world, case, site)
        self.assertIn(told[role]["state"], ("failed", "refused"), (case, told))
        self.assertEqual(told[role]["code"], code, (case, told))
        self.assertIn(path, told[role]["reason"], case)
        world.logged(f"qds{role}", path)
        if case.kind == "data" and code == FAILED:
            return  # the mirror gets all the same, so a wait for that ends well (rules.md 16)
        awaited = "drained" if site == "primary" else "connected"
        done = world.ask(site, "qdsinfo", "-g", str(case.number), "--wait", awaited)
        self.assertEqual(done.returncode, code, (case, done.stderr))
        self.assertIn(path, done.stderr, case)

    def fail_at_primary(self, world: PowerWorld, case: Case) -> None:
        """EIO where it must be, at once or once it is known; what is journaled goes on."""
        first = list(self.attempt(world, case))
        self.assertTrue(set(first) <= {0, errno.EIO}, (case, first))
        path = str(world.device(case.site, case.device))
        world.until(
            lambda: path in str(self.status(world, case, "primary")["reason"]), f"{case} to be told"
        )
        if case.kind == "writelog" and first[0] == 0:
            self.go_on_without_log(world, case)
            return
        if case.kind == "writelog":
            self.assertEqual(first[0], errno.EIO, (case, first))
        elif case.operation != "fsync":
            # A data device's failure comes after the answer to the first write.  A checkpoint may
            # sync before it, though.
            self.assertEqual(first[0], 0, (case, first))
        self.assertEqual(list(self.attempt(world, case)), [errno.EIO] * 3, case)
        self.assert_loud(world, case, "primary", FAILED)
        self.assertGreater(self.status(world, case, "primary")["since"], self.begun)
        if case.kind == "data":
            if not first[0]:
                world.until(lambda: self.is_mirrored(world, case), f"{case} to be mirrored")
        else:
            gsn = self.status(world, case, "primary")["gsn"]
            self.assertLess(gsn["durable"], gsn["written"], case)

    def go_on_without_log(self, world: PowerWorld, case: Case) -> None:
        """In bypass nothing more is mirrored, and the application notices nothing."""
        self.assertEqual(list(self.attempt(world, case)), [0] * 3, case)
        told = self.status(world, case, "primary")
        self.assertEqual(told["state"], "bypass", case)
        self.assertGreater(told["since"], self.begun, case)
        world.logged("qdsdriver", case.device)
        self.assertFalse(self.is_mirrored(world, case), case)
        data = world.device("primary", f"qds{case.number}.data").read_bytes()
        self.assertEqual(data[: 2 * BLOCK], bytes([case.number + 1]) * 2 * BLOCK, case)

    def is_mirrored(self, world: PowerWorld, case: Case) -> bool:
        with open(world.device("secondary", f"qds{case.number}.mirror"), "rb") as file:
            return file.read(2 * BLOCK) == bytes([case.number + 1]) * 2 * BLOCK

    def fail_at_secondary(self, world: PowerWorld, case: Case) -> None:
        """The application notices nothing; nothing is acknowledged."""
        self.assertEqual(list(self.attempt(world, case)), [0] * 3, case)
        self.assert_loud(world, case, "secondary", FAILED)
        self.assertEqual(list(self.attempt(world, case)), [0] * 3, case)
        path = str(world.device(case.site, case.device))
        world.until(
            lambda: path in str(self.status(world, case, "primary")["reason"]), f"{case} to be told"
        )
        told = self.status(world, case, "primary")
        self.assertEqual(told["state"], "accumulating", case)
        self.assertLess(told["gsn"]["committed"], told["gsn"]["written"], case)

    def fill(self, world: PowerWorld) -> None:
        """Fill the file system under a sparse writelog: real short writes, then no space."""
        answers: list[int] = []
        for block in range(0, 192, 2):
            answers += self.attempt(world, FULL, block)
            if answers[-3]:
                break
        told = self.status(world, FULL, "primary")
        if told["state"] != "bypass":
            self.assertEqual(answers[-3:], [errno.EIO] * 3)
            self.assertEqual(set(answers[:-3]), {0})
        else:
            self.assertEqual(set(answers), {0})
        self.assertGreater(len(answers), 100)
        self.assertIn(os.strerror(errno.ENOSPC), told["reason"])
        self.assertIn(FULL.device, told["reason"])

    def relaunch(self, world: PowerWorld) -> None:
        """Heal the disks, and have every driver and rmd child started anew."""
        for site in ("primary", "secondary"):
            world.tell_disks(site, "heal")
        for name in ("driver", "rmd"):
            for number in range(CHILDREN):
                victim = world.kill(f"dsgrp{number:03d}.{name}")
                world.until(
                    lambda v=victim, n=f"dsgrp{number:03d}.{name}": world.pid(n) not in (None, v),
                    f"another {name}",
                )

    def restarted(self, world: PowerWorld, case: Case) -> dict[str, Any] | None:
        """Give the status of a group once its new child serves it, or has given it up."""
        told = self.status(world, case, case.site)
        role = "driver" if case.site == "primary" else "rmd"
        return told if told["state"] != "setup" or told[role].get("state") == "failed" else None

    def assert_settled(self, world: PowerWorld, case: Case) -> None:
        """What has failed at the primary stays so, a failed sync is latched; the rest is good."""
        told = world.until(lambda: self.restarted(world, case), f"{case} to be told")
        if case.site == "primary" and told["state"] == "bypass":
            self.assertIn(case.device, told["reason"], case)
            return
        if case.kind == "data" and not case.is_harmless:
            self.assertIn(case.device, told["reason"], case)
            self.assertEqual(told["driver"]["state"], "failed", case)
            self.assertEqual(list(self.attempt(world, case)), [errno.EIO] * 3, case)
            return
        if case.is_latched:
            self.assert_loud(world, case, case.site, BROKEN)
            return
        number = str(case.number)
        wait = ("qdsinfo", "-g", number, "--wait", "drained", "--timeout", str(WAIT_SECONDS))
        world.at("primary", *wait)
        data = world.device("primary", f"qds{number}.data").read_bytes()
        mirror = world.device("secondary", f"qds{number}.mirror").read_bytes()
        self.assertTrue(data == mirror, case)
        if case.kind != "writelog" or case.is_harmless:
            self.assertEqual(data[: 2 * BLOCK], bytes([case.number + 1]) * 2 * BLOCK, case)

    @in_thread
    def test_what_each_failure_looks_like(self) -> None:
        world = self.start()
        self.begun = max(group["since"] for group in world.groups())
        for case in CASES:
            if case.operation:
                world.tell_disks(
                    case.site, "fault", file=case.device, operation=case.operation, **case.how
                )
        for case in CASES:
            if case.operation == "read":
                self.assertEqual(list(self.attempt(world, case)), [0, 0, errno.EIO], case)
                world.logged("qdsdriver", f"read at {READ_AT}")
            if case.is_harmless:
                self.assertEqual(list(self.attempt(world, case)), [0] * 3, case)
            elif case.site == "primary":
                self.fail_at_primary(world, case)
            else:
                self.fail_at_secondary(world, case)
        self.fill(world)
        self.relaunch(world)
        for case in CASES:
            self.assert_settled(world, case)
        world.stop()
