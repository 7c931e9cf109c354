"""Several groups of one primary to several secondaries, and hosts that play both parts.

What happens to one group, or to one secondary, the others do not notice.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal

from twisted.trial.unittest import TestCase

from qdsmirror.errors import EXIT_BROKEN, EXIT_CONFIG, EXIT_IDENTITY, EXIT_OK
from tests.integration.fleet import Fleet, Watch
from tests.integration.lab import in_thread

ROLES = ("driver", "pmd", "rmd")


class OneToManyTests(TestCase):
    """A primary with groups to two secondaries: groups 0 and 2 to one, 1 and 3 to the other."""

    timeout = 1200
    statistics = False

    def begin(self, children: int | None = None) -> Fleet:
        fleet = Fleet(self, "--groups", "4", "--ldsus", "2", "--secondaries", "2")
        fleet.create()
        if children is not None:
            for site in fleet.lab.sites:
                with (fleet.root(site) / "etc" / "qds.cfg").open("a") as file:
                    file.write(f"children = {children}\n")
        fleet.start()
        fleet.write()
        return fleet

    @in_thread
    def test_killed_processes_of_one_group(self) -> None:
        fleet = self.begin()
        watch = Watch(fleet, (1, 2, 3))
        for role in ROLES:
            name = f"dsgrp000.{role}"
            victim = fleet.kill(name)
            fleet.go_on(1, 2, 3)
            fleet.until(lambda: fleet.pid(name) not in (None, victim), f"another {name}")  # noqa: B023
            fleet.wait_for(0, "connected")
        fleet.go_on(0, 1, 2, 3)
        watch.end()
        fleet.end_writing(0)
        fleet.drain()

    @in_thread
    def test_one_secondary_is_gone(self) -> None:
        """The other's groups go on; its own wait in their writelogs, and are mirrored later."""
        fleet = self.begin()
        watch = Watch(fleet, (0, 2))
        # The master first, or it would have them back; they follow it if they are not killed.
        fleet.kill("secondary2/qdsrmd")
        for name in ("dsgrp001.rmd", "dsgrp003.rmd"):
            with contextlib.suppress(ProcessLookupError):
                if pid := fleet.pid(name):
                    os.kill(pid, signal.SIGKILL)
        for number in (1, 3):
            fleet.wait_for(number, "accumulating")
        fleet.go_on(0, 1, 2, 3)

        def told() -> str:
            shown = fleet.ask("primary", "qdsinfo").stdout
            return shown if "dsgrp001: secondary2 does not answer" in shown else ""

        # First it is the connection that was lost; then nobody is there for another.
        self.assertNotIn("dsgrp000: ", fleet.until(told, "an attempt in vain"))
        fleet.start("secondary2")
        for number in (1, 3):
            fleet.wait_for(number, "connected")
        watch.end()
        fleet.end_writing()
        fleet.drain()

    @in_thread
    def test_corrupt_writelog_of_one_group(self) -> None:
        """Refused, with the device's name; initialised anew and refreshed, it is back."""
        fleet = self.begin()
        watch = Watch(fleet, (1, 2, 3))
        log = fleet.device_of(0, "qds0.writelog")
        fleet.crash_without_superblocks("dsgrp000.driver", log)
        fleet.refused(0, EXIT_BROKEN, str(log))
        fleet.go_on(1, 2, 3)
        watch.end()
        # Its writer has given up by now, or will never be answered.
        fleet.writings.pop(0).give_up()
        fleet.at("primary", "qdswlinit", "-g", "0", "--yes")
        watch = Watch(fleet, (1, 2, 3))
        fleet.at("primary", "qdsconfigtool", "apply")
        fleet.refused(0, EXIT_BROKEN, "another generation")
        fleet.at("primary", "qdsrefresh", "-g", "0", "--full")
        fleet.write(0)
        fleet.go_on(1, 2, 3)
        watch.end()
        fleet.end_writing()
        fleet.drain()

    @in_thread
    def test_corrupt_journal_of_one_group(self) -> None:
        """Refused at its secondary; its writes wait in the writelog."""
        fleet = self.begin()
        watch = Watch(fleet, (0, 1, 2))
        journal = fleet.device_of(3, "dsgrp003.journal")
        fleet.crash_without_superblocks("dsgrp003.rmd", journal)
        fleet.refused(3, EXIT_BROKEN, str(journal), part=1)
        fleet.wait_for(3, "accumulating")
        fleet.go_on(0, 1, 2, 3)
        fleet.at("secondary2", "qdswlinit", "-g", "3", "--yes")
        fleet.at("secondary2", "qdsconfigtool", "apply")
        fleet.until(lambda: fleet.group(3)["coherent"] is False, "the loss to be known")
        fleet.at("primary", "qdsrefresh", "-g", "3", "--full")
        watch.end()
        fleet.end_writing()
        fleet.drain()

    @in_thread
    def test_misconfigured_groups(self) -> None:
        """A file with a mistake, a wrong secret, another size: one group each; one is well."""
        fleet = self.begin()
        watch = Watch(fleet, (3,))
        config = fleet.config("primary", 0)
        right = config.read_text()
        config.write_text(right.replace("data_device", "data_devise", 1))
        done = fleet.ask("primary", "qdsconfigtool", "apply")
        self.assertEqual(done.returncode, EXIT_CONFIG, done.stderr)
        self.assertIn(str(config), done.stdout)
        done = fleet.ask("primary", "qdsinfo")
        self.assertEqual(done.returncode, EXIT_OK, done.stderr)
        self.assertIn(f"{config}:", done.stderr)
        self.assertIn("ldsus.qds0.data_device", done.stderr)

        secret = fleet.root("secondary2") / "etc" / "dsgrp001.secret"
        known = secret.read_text()
        secret.write_text(secrets.token_hex(32) + "\n")
        fleet.kill("dsgrp001.rmd")
        fleet.refused(1, EXIT_IDENTITY, "did not prove the secret")

        mirror = fleet.device_of(2, "qds4.mirror")
        with mirror.open("r+b") as file:
            file.truncate(1 << 20)
        fleet.kill("dsgrp002.rmd")
        fleet.refused(2, EXIT_CONFIG, str(mirror), part=1)
        fleet.go_on(0, 1, 2, 3)

        config.write_text(right)
        secret.write_text(known)
        with mirror.open("r+b") as file:
            file.truncate(2 << 20)
        for site in ("secondary", "secondary2", "primary"):
            fleet.at(site, "qdsconfigtool", "apply")
        for number in (0, 1, 2):
            fleet.wait_for(number, "connected")
        watch.end()
        fleet.end_writing()
        fleet.drain()

    @in_thread
    def test_misconfigured_groups_beside_others_in_one_process(self) -> None:
        """A group that is started anew and cannot be leaves those alone that share its child."""
        fleet = self.begin(children=1)
        self.assertEqual(len({fleet.group(number)["driver"]["pid"] for number in range(4)}), 1)
        self.assertEqual(len({fleet.group(number, 1)["rmd"]["pid"] for number in (0, 2)}), 1)
        watch = Watch(fleet, (2, 3))
        mirror = fleet.device_of(0, "qds0.mirror")
        with mirror.open("r+b") as file:
            file.truncate(1 << 20)
        secret = fleet.root("secondary2") / "etc" / "dsgrp001.secret"
        known = secret.read_text()
        secret.write_text(secrets.token_hex(32) + "\n")
        # A changed file has its group started anew.
        for number, site in ((0, "secondary"), (1, "secondary2")):
            changed = "[tunables]\nmetadata_entries = 999\n[ldsus]"
            fleet.edit(fleet.config(site, number), "[ldsus]", changed)
            fleet.at(site, "qdsconfigtool", "apply")
        fleet.refused(0, EXIT_CONFIG, str(mirror), part=1)
        fleet.refused(1, EXIT_IDENTITY, "did not prove the secret")
        fleet.go_on(0, 1, 2, 3)
        with mirror.open("r+b") as file:
            file.truncate(2 << 20)
        secret.write_text(known)
        for site in ("secondary", "secondary2", "primary"):
            fleet.at(site, "qdsconfigtool", "apply")
        for number in (0, 1):
            fleet.wait_for(number, "connected")
        watch.end()
        fleet.end_writing()
        fleet.drain()


class CrossedTests(TestCase):
    """Each host is primary of one group and secondary of the other."""

    timeout = 1200
    statistics = False

    @in_thread
    def test_both_parts_on_each_host(self) -> None:
        fleet = Fleet(self, "--groups", "2", "--ldsus", "2", "--crossed")
        fleet.create()
        fleet.start()
        fleet.write()
        for site in ("primary", "secondary"):
            roles = {group["role"] for group in fleet.groups(site)}
            self.assertEqual(roles, {"primary", "secondary"})
        # What ends on a host is its part in one group; the other goes on in the same place.
        for hurt, well in ((0, 1), (1, 0)):
            watch = Watch(fleet, (well,))
            for role in ROLES:
                name = f"dsgrp00{hurt}.{role}"
                victim = fleet.kill(name)
                fleet.go_on(well)
                fleet.until(lambda: fleet.pid(name) not in (None, victim), f"another {name}")  # noqa: B023
                fleet.wait_for(hurt, "connected")
            fleet.go_on(hurt)
            watch.end()
        # A host's drivers end while its rmd goes on, and the other way round.
        for site in ("primary", "secondary"):
            for command in ("killpmds", "launchpmds", "killrmds", "launchrmds"):
                fleet.at(site, command)
                fleet.go_on(0, 1)
        fleet.end_writing(0, 1)
        fleet.drain()
        for site in ("primary", "secondary"):
            fleet.at(site, "qdsinfo", "--is", "drained")
