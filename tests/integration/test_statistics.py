"""Real daemons: rows and events, and throttles that page, run programs, extend and free."""

from __future__ import annotations

import json
import os
import shutil
import socketserver
import threading
from collections.abc import Sequence
from pathlib import Path

from twisted.trial.unittest import TestCase

from qdsmirror.core.samples import GroupSample, parse
from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import in_thread
from tests.integration.world import World

KIB = 1024


class MailRelay:
    """A relay that takes every mail.

    :ivar letters: what it was given, the texts.
    """

    def __init__(self, test: TestCase) -> None:
        self.letters: list[str] = []
        letters = self.letters

        class Session(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.say("220 relay")
                while line := self.rfile.readline():
                    word = line.decode().upper().split()[0] if line.strip() else ""
                    if word == "DATA":
                        self.say("354 go on")
                        text = b"".join(iter(self.rfile.readline, b".\r\n"))
                        letters.append(text.decode())
                    self.say("221 bye" if word == "QUIT" else "250 ok")
                    if word == "QUIT":
                        return

            def say(self, text: str) -> None:
                self.wfile.write(f"{text}\r\n".encode())

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Session)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        test.addCleanup(self._end)

    def _end(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def subjects(self) -> list[str]:
        lines = [line for text in self.letters for line in text.splitlines()]
        return [line.removeprefix("Subject: ") for line in lines if line.startswith("Subject: ")]


class StatisticsCase(TestCase):
    timeout = 1200

    def begin(self, *options: str, throttles: Sequence[str] = (), host: str = "") -> World:
        """Start a lab that looks once a second, with throttles at the primary.

        :param throttles: ``@BASE@`` in them is the lab's directory.
        """
        world = World(self, "--size", "4M", "--journal", "8M", *options)
        world.create()
        intervals = "[tunables]\nperf_interval = 1 s\nthrottle_interval = 1 s\n"
        world.edit_both("[ldsus]", f"{intervals}[ldsus]")
        if throttles:
            text = "\n".join(["", "[throttles]", *throttles, ""])
            text = text.replace("@BASE@", str(world.base))
            with open(world.config("primary"), "a") as file:
                file.write(text)
        with open(world.primary / "etc" / "qds.cfg", "a") as file:
            file.write(host)
        world.start()
        return world

    def throttle(self, name: str, test: str, *actions: str) -> str:
        lines = "\n".join(actions)
        return f'[[{name}]]\ntest = {test}\nactions = """\n{lines}\n"""'

    def rows(self, site: Path) -> list[GroupSample]:
        found: list[GroupSample] = []
        for name in ("dsgrp000.prf.1", "dsgrp000.prf"):
            path = site / "var" / name
            if path.exists():
                table = parse(path.read_text().splitlines())
                self.assertEqual(table.damaged, [])
                found += table.samples
        return found

    def events(self, site: Path, *words: str) -> list[str]:
        """Give the events that begin with one of some words, less their times."""
        lines = (site / "var" / "dsgrp000.evt").read_text().splitlines()[1:]
        texts = [line.partition(" ")[2] for line in lines]
        return [text for text in texts if not words or text.split()[0] in words]

    def next_row(self, world: World, site: Path) -> GroupSample:
        """Wait for another row."""
        before = self.rows(site)[-1:]
        world.until(lambda: self.rows(site)[-1:] != before, "another row")
        return self.rows(site)[-1]

    def write(self, world: World, count: int, first: int = 0, size: int = 64 * KIB) -> None:
        with NbdClient.connect(world.uri()) as client:
            for number in range(first, first + count):
                client.write(number * size % (4 * KIB * KIB), bytes([number % 251 + 1]) * size)
            client.flush()


class ProcessTests(StatisticsCase):
    @in_thread
    def test_rows_and_events_whatever_dies(self) -> None:
        world = self.begin("--writelog", "8M")
        for site in (world.primary, world.secondary):
            self.assertEqual(self.next_row(world, site).state, "connected")
        self.write(world, 16)
        world.until(lambda: self.moved(world.primary) >= 1024, "what was sent in the rows")
        world.until(lambda: self.moved(world.secondary) >= 1024, "what has arrived in the rows")

        # The process for statistics: relaunched, and nothing is told twice.
        modes = self.events(world.primary, "mode")
        driver = world.pid("dsgrp000.driver")
        victim = world.kill("dsgrp000.stats")
        world.until(lambda: world.pid("dsgrp000.stats") not in (None, victim), "another process")
        self.next_row(world, world.primary)
        self.assertEqual(self.events(world.primary, "mode"), modes)
        self.assertEqual(world.pid("dsgrp000.driver"), driver)

        # The pmd is down: rows go on, and say that nothing is sent.
        world.at("primary", "killpmds")
        self.next_row(world, world.primary)
        row = self.next_row(world, world.primary)
        self.assertEqual((row.state, row.netkbps, row.pctcpu), ("accumulating", 0.0, 0.0))
        self.write(world, 4)
        world.until(lambda: self.rows(world.primary)[-1].ldsus[0].waiting, "entries that wait")
        world.at("primary", "launchpmds")
        world.wait("drained")
        self.next_row(world, world.primary)

        # The driver too: what it has told nobody yet is lost with it.
        victim = world.kill("dsgrp000.driver")
        world.until(lambda: world.pid("dsgrp000.driver") not in (None, victim), "another driver")
        world.wait("drained")
        self.next_row(world, world.primary)
        self.assertEqual(self.rows(world.primary)[-1].state, "connected")
        told = [one.split()[1] for one in self.events(world.primary, "mode")]
        tail = [one for one in told if one != "setup"][-4:]
        self.assertEqual(tail, ["accumulating", "connected"] * 2, told)
        self.show(world)
        world.stop()
        self.assertEqual(list((world.primary / "run").iterdir()), [])
        world.compare()

    def moved(self, site: Path) -> float:
        """Give the KB of data that the rows amount to."""
        rows = self.rows(site)
        pairs = zip(rows, rows[1:], strict=False)
        return sum((b.ldsus[0].data_kbps or 0) * (b.epoch - a.epoch) for a, b in pairs) * 1.01

    def show(self, world: World) -> None:
        """Both ways to read the file: our tool's, and awk's."""
        output = world.at("primary", "qdsperftool", "--print", "--chart", "data_kbps", "qds0")
        self.assertIn("qds0.data_kbps", output)
        count = len(self.rows(world.primary))
        answer = json.loads(world.at("primary", "qdsperftool", "--print", "--json"))
        self.assertGreaterEqual(len(answer["groups"][0]["samples"]), count)
        if shutil.which("awk"):
            program = '!/^#/ { n++; if ($4 != "") s = $4 } END { print n, s }'
            path = str(world.primary / "var" / "dsgrp000.prf")
            self.assertIn("connected", world.run(["awk", program, path]))


class PagingTests(StatisticsCase):
    @in_thread
    def test_a_link_that_fails_and_returns(self) -> None:
        """One page, one all clear, though the process is killed in between; programs as allowed."""
        relay = MailRelay(self)
        # Ready from the start: to take up another configuration ends the process that mails.
        program = "exec /bin/sh @BASE@/page 'a b'"
        world = self.begin(
            "--writelog", "8M",
            throttles=[
                self.throttle("lost", "lag T> 5", 'mail a@b.example "link lost"', program),
                self.throttle("back", "lag T<= 5", 'mail pager "all clear"', 'console "all clear"'),
            ],
            host=f"mail_relay = 127.0.0.1:{relay.port}\nallow_exec = yes\n",
        )  # fmt: skip
        line = f'echo "$QDS_GROUP $QDS_THROTTLE $QDS_TEST" >>{world.base}/paged\n'
        (world.base / "page").write_text(line)
        # Before the first evaluation nothing was so: all is clear now.
        world.until(lambda: relay.subjects() == ["dsgrp000: all clear"], "the first all clear")
        world.stop("secondary")
        self.write(world, 4)
        world.until(lambda: "dsgrp000: link lost" in relay.subjects(), "the page")
        world.until(lambda: self.paged(world) == ["dsgrp000 lost lag T> 5"], "the program")
        victim = world.kill("dsgrp000.stats")
        world.until(lambda: world.pid("dsgrp000.stats") not in (None, victim), "another process")
        self.next_row(world, world.primary)
        world.start("secondary")
        world.until(lambda: relay.subjects().count("dsgrp000: all clear") == 2, "the all clear")
        names = ["all clear", "link lost", "all clear"]
        self.assertEqual(relay.subjects(), [f"dsgrp000: {one}" for one in names])
        self.assertEqual(self.events(world.primary, "console"), ["console all clear"] * 2)
        self.assertEqual(len(self.events(world.primary, "fired")), 3)

        # Others could write the file that allows programs: it allows none.
        os.chmod(world.primary / "etc" / "qds.cfg", 0o666)
        world.stop("secondary")
        self.write(world, 4)
        world.until(lambda: self.events(world.primary, "failed"), "the refusal")
        (line,) = self.events(world.primary, "failed")
        self.assertIn("allow_exec is not honoured", line)
        self.assertEqual(len(self.paged(world)), 1)
        world.start("secondary")
        world.settle()

    def paged(self, world: World) -> list[str]:
        path = world.base / "paged"
        return path.read_text().splitlines() if path.exists() else []


class ExtensionTests(StatisticsCase):
    @in_thread
    def test_extended_before_the_overflow_and_freed_after_a_crash(self) -> None:
        """The pmd is down; between ``extend`` and ``free`` the driver is killed."""
        world = self.begin(
            "--writelog", "2M", "--pool", "2", "--pool-size", "2M", "--overflow", "bypass",
            throttles=[
                self.throttle("full", "pctwl > 60", "extend", 'syslog "the writelog fills"'),
                self.throttle("empty", "pctwl < 20", "free"),
            ],
        )  # fmt: skip
        world.at("primary", "killpmds")
        number = 0
        # Against the size of one log, 0.94 MiB less than two.
        while number < 48:
            self.write(world, 4, number)
            number += 4
            before = self.next_row(world, world.primary)
            self.assertNotEqual(before.state, "bypass")
        (unit,) = world.info()["ldsus"]
        chained = len(unit["writelog"]["extensions"])
        self.assertGreaterEqual(chained, 1)
        victim = world.kill("dsgrp000.driver")
        world.until(lambda: world.pid("dsgrp000.driver") not in (None, victim), "another driver")
        world.at("primary", "launchpmds")
        world.wait("drained")
        world.until(lambda: self.states(world) == ["free", "free"], "the pool to be free again")
        done = self.events(world.primary, "done")
        self.assertGreaterEqual(sum('"full" extend: qds0: ' in one for one in done), 1, done)
        self.assertGreaterEqual(sum('"empty" free: qds0: ' in one for one in done), 1, done)
        world.settle()

    def states(self, world: World) -> list[str]:
        return [one["state"] for one in world.info()["pool"]["devices"]]
