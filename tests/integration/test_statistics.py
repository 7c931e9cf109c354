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

from qdsmirror.core.evaluation import State
from qdsmirror.core.samples import GroupSample, parse
from qdsmirror.paths import Paths
from qdsmirror.tools.nbdclient import NbdClient
from tests.integration.lab import in_thread
from tests.integration.world import World

KIB = 1024


class MailRelay:
    """A relay that takes every mail.

    :ivar letters: what it was given, the texts.
    :ivar asked: set once somebody has one for it; ``answers``: while it is not set, that one waits.
    """

    def __init__(self, test: TestCase) -> None:
        self.letters: list[str] = []
        self.asked, self.answers = threading.Event(), threading.Event()
        self.answers.set()
        letters, asked, answers = self.letters, self.asked, self.answers

        class Session(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.say("220 relay")
                while line := self.rfile.readline():
                    word = line.decode().upper().split()[0] if line.strip() else ""
                    if word == "DATA":
                        asked.set()
                        answers.wait(100)
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

    def begin(
        self, *options: str, throttles: Sequence[str] = (), host: str = "", limit: str = ""
    ) -> World:
        """Start a lab that looks once a second, with throttles at the primary.

        :param throttles: ``@BASE@`` in them is the lab's directory.
        :param limit: one of qdsmirror.limits with another value, e.g. ``MAIL_END_SECONDS = 20``.
        """
        world = World(self, "--size", "4M", "--journal", "8M", *options)
        world.create()
        if limit:
            world.customise(f"from qdsmirror import limits\nlimits.{limit}\n")
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

    def row_says(self, world: World, site: Path, state: str) -> GroupSample:
        """Wait for another row, of a state: the next may have been read for before that came."""
        before = self.rows(site)[-1:]

        def said() -> GroupSample | None:
            row = self.rows(site)[-1:]
            return row[0] if row != before and row[0].state == state else None

        found: GroupSample = world.until(said, f"another row with {state}")
        return found

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
            self.row_says(world, site, "connected")
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
        self.row_says(world, world.primary, "accumulating")
        row = self.row_says(world, world.primary, "accumulating")
        self.assertEqual((row.netkbps, row.pctcpu), (0.0, 0.0))
        self.write(world, 4)
        world.until(lambda: self.rows(world.primary)[-1].ldsus[0].waiting, "entries that wait")
        world.at("primary", "launchpmds")
        world.wait("drained")
        modes = ["accumulating", "connected"]
        world.until(lambda: self.modes(world)[-2:] == modes, "the events")

        # The driver too: what it has told nobody yet is lost with it.
        victim = world.kill("dsgrp000.driver")
        world.until(lambda: world.pid("dsgrp000.driver") not in (None, victim), "another driver")
        world.wait("drained")
        self.row_says(world, world.primary, "connected")
        world.until(lambda: self.modes(world)[-4:] == modes * 2, "the events")
        self.show(world)
        world.stop()
        self.assertEqual(list((world.primary / "run").iterdir()), [])
        world.compare()

    def modes(self, world: World) -> list[str]:
        """Give the modes that the events tell of, less those while no driver ran."""
        told = [one.split()[1] for one in self.events(world.primary, "mode")]
        return [one for one in told if one != "setup"]

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
        # Ready from the start: to take up another configuration ends programs that run.
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
        # A process that is killed before it has noted that it fired does so again.
        world.until(lambda: self.noted(world, "lag T> 5"), "the note")
        victim = world.kill("dsgrp000.stats")
        world.until(lambda: world.pid("dsgrp000.stats") not in (None, victim), "another process")
        self.next_row(world, world.primary)
        world.start("secondary")
        world.until(lambda: relay.subjects().count("dsgrp000: all clear") == 2, "the all clear")
        names = ["all clear", "link lost", "all clear"]
        self.assertEqual(relay.subjects(), [f"dsgrp000: {one}" for one in names])
        # A mail may be there before the events are written.
        world.until(lambda: len(self.events(world.primary, "console")) >= 2, "both texts")
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

    def noted(self, world: World, test: str) -> bool:
        """Tell whether a successor of the process would know that a throttle's test was true."""
        kept = json.loads((world.primary / "run" / "dsgrp000.stats.json").read_text())
        true_of = State.from_json(kept["throttles"]).true_of
        return any(one.endswith(test) and subjects for one, subjects in true_of.items())

    @in_thread
    def test_a_page_under_way_when_another_configuration_is_taken_up(self) -> None:
        """It reaches the relay, which is slow; and it is not fired again."""
        relay = MailRelay(self)
        relay.answers.clear()
        self.addCleanup(relay.answers.set)
        throttle = self.throttle("page", "lag T>= 0", 'mail a@b.example "here"', 'mail c "there"')
        # The relay is this process, which may have to wait for its turn.
        world = self.begin(
            throttles=[throttle],
            host=f"mail_relay = 127.0.0.1:{relay.port}\n",
            limit="MAIL_END_SECONDS = 100.0",
        )
        world.until(relay.asked.is_set, "the first mail")
        world.edit(world.config("primary"), "perf_interval = 1 s", "perf_interval = 2 s")
        told = json.loads(world.at("primary", "qdsconfigtool", "apply", "--json"))
        self.assertEqual(told["daemons"]["qdsdriver"]["retuned"], [0])
        control = Paths.of(world.primary).control_socket("dsgrp000.stats")
        world.until(lambda: not control.exists(), "the end of those statistics")
        relay.answers.set()
        world.until(lambda: len(relay.letters) == 2, "both mails")
        for _ in range(2):
            self.next_row(world, world.primary)
        self.assertEqual(relay.subjects(), ["dsgrp000: here", "dsgrp000: there"])
        self.assertEqual(len(self.events(world.primary, "fired")), 1)
        self.assertEqual(len(self.events(world.primary, "done")), 2)
        self.assertEqual(self.events(world.primary, "failed"), [])
        world.stop()

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
            if unit["writelog"]["used_ratio"] > 0.65:
                # The next evaluation comes before the log is full, save on a busy machine.
                world.until(lambda: self.chained(world), "the first extension")
        self.assertGreaterEqual(self.chained(world), 1)
        victim = world.kill("dsgrp000.driver")
        world.until(lambda: world.pid("dsgrp000.driver") not in (None, victim), "another driver")
        world.at("primary", "launchpmds")
        world.wait("drained")
        world.until(lambda: self.states(world) == ["free", "free"], "the pool to be free again")
        for done in ('"full" extend: qds0: ', '"empty" free: qds0: '):
            # The pool may be free before who asked for that has noted it.
            world.until(lambda text=done: text in str(self.events(world.primary, "done")), done)
        world.settle()

    def chained(self, world: World) -> int:
        (unit,) = world.info()["ldsus"]
        return len(unit["writelog"]["extensions"])

    def states(self, world: World) -> list[str]:
        return [one["state"] for one in world.info()["pool"]["devices"]]
