"""Whoever makes a mistake reads what is wrong, and what to type next; a table of real ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time

from twisted.trial.unittest import SkipTest, TestCase

from tests.integration.lab import POLL_SECONDS, WAIT_SECONDS, CommandError, in_thread
from tests.integration.mistakes import DOCTOR, LIVE, OFFLINE, Bench, Mistake
from tests.integration.world import SITES, World
from tests.test_manpages import commands

#: What a next step may have one type: our commands, and those of every host.
COMMANDS = {
    *commands(),
    *("chmod", "chown", "df", "ls", "scp", "shred", "ss", "systemctl", "timedatectl", "useradd"),
}
#: Until a mistake made on running sites is all that is told.
SETTLE_SECONDS = 90.0
SMALL = ("--size", "8M", "--writelog", "8M", "--journal", "8M")


def advised(output: str, command: tuple[str, ...]) -> list[tuple[str, str]]:
    """Give what a command's output says to be wrong, each with its next step."""
    if command[0] != DOCTOR[0]:
        return [(line, line) for line in output.splitlines()] + [(output, output)]
    found = []
    lines = output.splitlines()
    for line, below in zip(lines, lines[1:], strict=False):
        if below.startswith("  next: "):
            found.append((line, below))
    return found


class MistakeTests(TestCase):
    """One lab for each half of the table; every row that fails is told, with what was said."""

    timeout = 1200

    def look(self, world: World, mistake: Mistake, live: bool) -> str:
        """Make a mistake, look as told, put it right; give what is missing."""
        bench = Bench(world)
        try:
            mistake.make(bench)
            if mistake.wait:
                world.wait(mistake.wait, site=mistake.site)
            # A link that was just lost is not yet known to be out of reach.
            deadline = time.monotonic() + (SETTLE_SECONDS if live else 0.0)
            while (missing := self.missing(world, bench, mistake)) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            return missing
        finally:
            bench.undo()

    @staticmethod
    def missing(world: World, bench: Bench, mistake: Mistake) -> str:
        """Look; give what is missing."""
        name, *options = mistake.command
        done = world.ask(mistake.site, name, *options)
        output = done.stdout + done.stderr
        places = {"lab": str(world.directory), "port": bench.port}
        cause = [word.format(**places) for word in mistake.cause]
        step = [word.format(**places) for word in mistake.step]
        for message, below in advised(output, mistake.command):
            if all(word in message for word in cause) and all(word in below for word in step):
                typed = set(re.findall(r"[a-z.]+", below)) & COMMANDS
                return "" if typed else f"{mistake.name}: no command to type: {below}"
        return (
            f"{mistake.name}: {' '.join(mistake.command)} does not say {cause} and {step}, "
            f"but (exit code {done.returncode}):\n{output}"
        )

    def look_at_all(self, world: World, rows: tuple[Mistake, ...], live: bool) -> None:
        wanted = os.environ.get("QDS_MISTAKE", "")
        missing = []
        for mistake in rows:
            if wanted in mistake.name:
                missing.append(self.look(world, mistake, live))
                if live:
                    self.mended(world, mistake)
        told = [one for one in missing if one]
        if told:
            raise CommandError("\n".join(told))

    def mended(self, world: World, mistake: Mistake) -> None:
        """Wait until nothing is left of a mistake."""
        # A link that was refused is tried again at once.
        world.ask("primary", "qdsconfigtool", "apply")
        for site in SITES:
            world.taken_up(site)

        def well() -> bool:
            group = world.info()
            return group["state"] == "connected" and group["coherent"] is True

        # One that was refused may be tried again as late as it has been refused for.
        seconds = WAIT_SECONDS + SETTLE_SECONDS
        world.until(well, f"all to be well after: {mistake.name}", seconds)

    @in_thread
    def test_while_nothing_runs(self) -> None:
        self.offline(mounts=False)

    @in_thread
    def test_of_a_full_file_system(self) -> None:
        if os.geteuid() != 0 or not can_mount():
            raise SkipTest("needs root, who may mount")
        self.offline(mounts=True)

    def offline(self, *, mounts: bool) -> None:
        rows = tuple(one for one in OFFLINE if one.mounts == mounts)
        self.assertTrue(rows)
        world = World(self, *SMALL)
        world.create()
        self.look_at_all(world, rows, live=False)

    @in_thread
    def test_while_both_sites_run(self) -> None:
        world = World(self, *SMALL)
        world.create()
        world.start()
        self.look_at_all(world, LIVE, live=True)

    def test_how_many(self) -> None:
        """The promise is of 25."""
        names = [one.name for one in (*OFFLINE, *LIVE)]
        self.assertEqual(len(names), len(set(names)))
        self.assertGreaterEqual(len(names), 25)


def can_mount() -> bool:
    """Tell whether this process may mount a file system."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    command = [unshare, "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
