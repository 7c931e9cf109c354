"""What qdsinfo prints about real daemons, in mode after mode, on both sites: as its schema says."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from twisted.trial.unittest import TestCase

from qdsmirror.core.states import Mode
from qdsmirror.errors import EXIT_INTERRUPTED, EXIT_OK
from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import WAIT_SECONDS, console_script, in_thread
from tests.integration.schema import keep_to_schema
from tests.integration.world import World
from tests.tools.terminal import on_terminal, screen

BLOCK = 4096


class QdsinfoTests(TestCase):
    timeout = 1200

    def look(self, *sites: str, states: tuple[str, ...] = ()) -> dict[str, Any]:
        """Run the command at each site; give the last one's group."""
        for site in sites or ("secondary", "primary"):
            told = json.loads(self.world.at(site, "qdsinfo", "--json"))
            keep_to_schema(told, closed=True)
            (group,) = told["groups"]
            self.seen.add((group["role"], group["state"]))
            for state in states:
                self.assertIn(state, group["modes"], (site, group))
        return dict(group)

    def until(self, condition: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        """Look at the primary until something is so."""
        found: dict[str, Any] = {}

        def is_so() -> bool:
            found.update(self.look("primary"))
            return bool(condition(found))

        self.world.until(is_so, what)
        return found

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write slowly meanwhile."""
        over = Event()

        def write() -> None:
            with NbdClient.connect(self.world.uri()) as client:
                while not over.wait(0.05):
                    client.write(self.source.randrange(1024) * BLOCK, self.source.randbytes(BLOCK))

        thread = Thread(target=write)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @in_thread
    def test_every_mode(self) -> None:
        self.source = random.Random(5)
        self.seen: set[tuple[str, str]] = set()
        world = self.world = World(
            self, "--size", "16M", "--writelog", "4M", "--journal", "8M", "--overflow", "bypass",
            "--pool", "1", "--pool-size", "2M",
        )  # fmt: skip
        world.create()
        self.look(states=("setup",))
        world.at("primary", "launchdriver")
        world.at("primary", "launchpmds")
        self.look(states=())
        with self.writing():
            told = self.until(
                lambda group: group["ldsus"][0]["writelog"]["seconds_to_full"],
                "the time until the writelog is full",
            )
        log = told["ldsus"][0]["writelog"]
        # Some 20 records of 8 KiB each second: far from now, and not for ever.
        self.assertTrue(5 < log["seconds_to_full"] < 3600, log)
        self.assertGreater(told["lag"]["entries"], 0)
        self.assertGreater(told["lag"]["bytes"], told["lag"]["entries"] * BLOCK)
        self.assertGreater(told["lag"]["seconds"], 1)
        table = world.at("primary", "qdsinfo")
        self.assertIn("FULL IN", table)
        world.start()
        world.settle()
        told = self.look(states=("connected",))
        self.assertEqual(told["lag"], {"entries": 0, "bytes": 0, "seconds": 0.0})
        self.modes_with_a_link()
        self.modes_without_one()
        roles = {"primary": set(Mode), "secondary": set()}
        for role, state in self.seen:
            roles[role].discard(Mode(state)) if role == "primary" else roles[role].add(Mode(state))
        self.assertEqual(roles["primary"] - {Mode.BACKFRESH}, set(), "not reached")
        self.assertEqual(
            roles["secondary"] & {Mode.SETUP, Mode.CONNECTED, Mode.ACCUMULATING, Mode.BYPASS},
            {Mode.SETUP, Mode.CONNECTED, Mode.ACCUMULATING, Mode.BYPASS},
        )

    def modes_with_a_link(self) -> None:
        world = self.world
        world.at("secondary", "qdscheckpoint", "on", "--name", "nightly")
        with self.writing():
            self.until(lambda group: group["checkpoint"], "the checkpoint to be known")
            self.assertTrue(self.look("secondary")["checkpoint"]["nbd_uris"])
        world.at("secondary", "qdscheckpoint", "off")
        world.at("primary", "qdsverify")
        self.assertEqual(self.look()["verify"]["result"], "equal")
        world.settle()
        world.at("primary", "qdsbackfresh", "--dry-run")
        self.assertEqual(self.look()["backfresh"]["state"], "counted")
        world.at("primary", "qdsextend", "qds0")
        self.assertEqual(self.look()["pool"]["used"], 1)
        for operation in ("sync", "near-sync"):
            world.at("primary", "qdsset", f"operation={operation}")
            self.until(lambda group: (group["synchronous"] or {}).get("kept"), "answers to wait")
            self.look()
        world.at("primary", "qdsset", "operation=async")
        world.at("primary", "qdsbypass", "on")
        with self.writing():
            self.until(lambda group: group["bypass"]["dirty_bytes"], "dirty blocks")
        world.until(lambda: self.look("secondary")["bypass"], "the secondary to know")
        self.look(states=("bypass",))
        world.at("primary", "qdsbypass", "off")
        self.until(lambda group: group["coherent"] and not group["refresh"], "its end")

    def modes_without_one(self) -> None:
        world = self.world
        world.stop("secondary")
        self.until(lambda group: group["state"] == "accumulating", "the link's end")
        world.at("primary", "launchrefresh", "--full")
        told = self.look("primary", states=("refresh", "accumulating"))
        self.assertGreater(told["refresh"]["remaining_bytes"], 0)
        world.at("primary", "killpmds")
        world.at("secondary", "launchrmds")
        self.look("secondary", states=("accumulating",))
        self.look("primary")
        world.kill("dsgrp000.driver", signal.SIGKILL)
        self.look("primary")

    @in_thread
    def test_watch_and_errors(self) -> None:
        self.source = random.Random(6)
        self.seen = set()
        world = self.world = World(self, "--size", "8M", "--writelog", "2M", "--journal", "8M")
        world.create()
        world.start()
        root = str(world.directory / "primary")
        command = [console_script("qdsinfo"), "--root", root, "--watch", "--interval", "0.1"]
        with subprocess.Popen(
            [*command, "--json"], stdout=subprocess.PIPE, text=True, env=world.environment()
        ) as watch:
            assert watch.stdout is not None
            for _ in range(3):
                keep_to_schema(json.loads(watch.stdout.readline()), closed=True)
            watch.send_signal(signal.SIGINT)
            self.assertEqual(watch.wait(WAIT_SECONDS), EXIT_INTERRUPTED)
        for columns in (80, 120):
            shown = on_terminal(
                lambda: os.execve(command[0], command, {**world.environment(), **os.environ}),
                columns,
                until=lambda text: text.count("every 0.1 s") >= 3,
            )
            lines = screen(shown.partition("\x1b[?1049l")[2])
            text = "\n".join(lines)
            self.assertLessEqual(max(map(len, lines)), columns)
            for told in ("dsgrp000", "connected", "qds0", "LOG USED", "none"):
                self.assertIn(told, text)
            self.assertNotIn("Traceback", text)
        self.errors(Path(root))

    def errors(self, root: Path) -> None:
        """A broken file is told beside the groups that are not; and alone, where there are none."""
        good = (root / "etc" / "dsgrp000.cfg").read_text()
        (root / "etc" / "dsgrp001.cfg").write_text("[primary\n")
        done = self.world.ask("primary", "qdsinfo", "--json")
        told = json.loads(done.stdout)
        keep_to_schema(told, closed=True)
        self.assertEqual((done.returncode, len(told["groups"])), (EXIT_OK, 1))
        self.assertEqual(told["error"]["code"], "configuration")
        (root / "etc" / "dsgrp000.cfg").write_text("")
        told = json.loads(self.world.ask("primary", "qdsinfo", "--json").stdout)
        keep_to_schema(told, closed=True)
        self.assertNotIn("groups", told)
        (root / "etc" / "dsgrp000.cfg").write_text(good)
        (root / "etc" / "dsgrp001.cfg").unlink()
