"""What a service manager is told, and that its watchdog is fed by answers of the children."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import Clock
from twisted.logger import LogPublisher, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror import limits
from qdsmirror.core.jsontext import dump_json, parse_object
from qdsmirror.daemons import vigil as vigil_module
from qdsmirror.daemons.notify import Notifier
from qdsmirror.daemons.process import _environment
from qdsmirror.daemons.supervise import Setting, Supervisor
from qdsmirror.daemons.vigil import OwnVigil, Vigil, describe
from qdsmirror.errors import UnreachableError
from qdsmirror.paths import Paths
from tests.daemons.test_master import Ended
from tests.daemons.test_supervise import FakeProcess, FakeReactor
from tests.daemons.world import MASTER, WorldCase, until

WATCHDOG_SECONDS = 40.0
#: A busy machine must load a program within twice that, and a hung one is noticed in that.
SHORT_SECONDS = 10.0


class ServiceManager:
    """The receiving end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)
        self.told: deque[str] = deque()
        self._lock = threading.RLock()

    def receive(self) -> list[str]:
        """Give all lines that have come so far; they stay in ``told``."""
        with self._lock:
            while True:
                try:
                    self.told += self._socket.recv(4096).decode().splitlines()
                except BlockingIOError:
                    return list(self.told)

    def take(self) -> list[str]:
        """Give the lines that have come since the last time."""
        with self._lock:
            lines = self.receive()
            self.told.clear()
        return lines

    def close(self) -> None:
        self._socket.close()


class NotifyCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp(dir="/tmp"))
        self.addCleanup(shutil.rmtree, self.root)
        self.manager = ServiceManager(str(self.root / "notify"))
        self.addCleanup(self.manager.close)

    def notifier(self, **more: str) -> Notifier:
        notifier = Notifier({"NOTIFY_SOCKET": str(self.root / "notify"), **more})
        self.addCleanup(notifier.close)
        return notifier


class NotifierTests(NotifyCase):
    def test_messages(self) -> None:
        notifier = self.notifier()
        notifier.still_starting(1.5)
        notifier.ready()
        notifier.alive()
        notifier.stopping()
        expected = ["EXTEND_TIMEOUT_USEC=1500000", "READY=1", "WATCHDOG=1", "STOPPING=1"]
        self.assertEqual(self.manager.take(), expected)

    def test_a_reload_bears_the_time(self) -> None:
        self.notifier().reloading()
        first, second = self.manager.take()
        self.assertEqual(first, "RELOADING=1")
        self.assertGreater(int(second.removeprefix("MONOTONIC_USEC=")), 0)

    def test_status_is_a_line_and_said_once(self) -> None:
        notifier = self.notifier()
        notifier.status("one\nREADY=1")
        notifier.status("one READY=1")
        notifier.status("x" * 9999)
        limit = limits.STATUS_TEXT_CHARACTERS_MAX
        self.assertEqual(self.manager.take(), ["STATUS=one READY=1", f"STATUS={'x' * limit}"])

    def test_abstract_socket(self) -> None:
        name = f"qds-notify-{os.getpid()}"
        manager = ServiceManager(f"\0{name}")
        self.addCleanup(manager.close)
        notifier = Notifier({"NOTIFY_SOCKET": f"@{name}"})
        self.addCleanup(notifier.close)
        notifier.ready()
        self.assertEqual(manager.take(), ["READY=1"])

    def test_nobody_asks(self) -> None:
        for given in ({}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}):
            notifier = Notifier({**given, "WATCHDOG_USEC": "1000000"})
            self.assertFalse(notifier)
            self.assertEqual(notifier.watchdog_seconds, 0.0)
            notifier.ready()
            notifier.status("fine")

    def test_watchdog_of_this_process_only(self) -> None:
        usec = {"WATCHDOG_USEC": "2500000"}
        self.assertEqual(self.notifier(**usec).watchdog_seconds, 2.5)
        self.assertEqual(self.notifier(**usec, WATCHDOG_PID="1").watchdog_seconds, 0.0)
        ours = str(os.getpid())
        self.assertEqual(self.notifier(**usec, WATCHDOG_PID=ours).watchdog_seconds, 2.5)

    def test_a_service_manager_that_does_not_read_holds_nobody_up(self) -> None:
        notifier = self.notifier()
        for _ in range(10_000):
            notifier.alive()
        self.assertLess(len(self.manager.take()), 10_000)
        notifier.ready()
        self.assertEqual(self.manager.take(), ["READY=1"])
        self.manager.close()
        os.unlink(self.root / "notify")
        notifier.alive()

    def test_it_is_not_for_children(self) -> None:
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            self.patch(os, "environ", {**os.environ, name: "1"})
            self.assertNotIn(name, _environment())


class VigilTests(NotifyCase):
    def setUp(self) -> None:
        super().setUp()
        (self.root / "run").mkdir()
        self.reactor = FakeReactor()
        self.addCleanup(self.reactor.close)

    def begin(self, *numbers: int, running: bool = True) -> Vigil:
        notifier = self.notifier(WATCHDOG_USEC=str(int(WATCHDOG_SECONDS * 1e6)))
        paths = Paths.of(self.root)
        setting = Setting(
            self.reactor, "pmd", paths, lambda _number: None, lambda: 2, ("child",),
            changed=lambda: self.vigil.look(),
        )  # fmt: skip
        self.supervisor = Supervisor(setting, 8)
        self.vigil = Vigil(self.reactor, notifier, self.supervisor)
        self.supervisor.start(numbers)
        self.vigil.begin()
        if running:
            for process, number in zip(self.reactor.processes, numbers, strict=True):
                process.report(number, "running")
            self.turn(*self.reactor.processes)
            self.manager.take()
        return self.vigil

    def answer(self, process: FakeProcess) -> None:
        """Answer what a process was asked, from its own loop."""
        process.channel.setblocking(False)
        while True:
            try:
                message = parse_object(process.channel.recv(9999), "order")
            except BlockingIOError:
                break
            if message["order"] == "ping":
                process.channel.send(dump_json({"pong": message["number"]}))
        self.reactor.read()

    def turn(self, *answering: FakeProcess) -> list[str]:
        """Let these answer, and time pass to the next question; give what was told."""
        for process in answering:
            self.answer(process)
        self.reactor.advance(WATCHDOG_SECONDS * limits.WATCHDOG_SHARE)
        return self.manager.take()

    def test_ready_when_each_group_runs_or_has_failed(self) -> None:
        self.begin(0, 3, running=False)
        self.assertEqual(self.manager.take(), ["STATUS=2 groups: 2 starting"])
        self.reactor.processes[0].report(0, "running")
        self.reactor.read()
        self.assertEqual(self.manager.take(), ["STATUS=2 groups: 1 running, 1 starting"])
        self.reactor.processes[1].report(3, "retrying", "the device\nis in use")
        self.reactor.read()
        told = "STATUS=2 groups: 1 retrying, 1 running; dsgrp003: the device is in use"
        self.assertEqual(self.manager.take(), [told, "READY=1"])
        self.reactor.processes[1].report(3, "running")
        self.reactor.read()
        self.assertEqual(self.manager.take(), ["STATUS=2 groups: 2 running"])

    def test_a_long_start_gets_its_time(self) -> None:
        self.begin(0, running=False)
        self.manager.take()
        (process,) = self.reactor.processes
        more = f"EXTEND_TIMEOUT_USEC={int(WATCHDOG_SECONDS * 1e6)}"
        self.assertEqual(self.turn(process), ["WATCHDOG=1", more])
        # One that does not answer gets none.
        self.assertEqual(self.turn(), [])

    def test_fed_while_children_answer(self) -> None:
        self.begin(0, 1)
        for _ in range(5):
            self.assertEqual(self.turn(*self.reactor.processes), ["WATCHDOG=1"])

    def test_an_answer_to_an_older_question_is_none(self) -> None:
        self.begin(0)
        (process,) = self.reactor.processes
        process.channel.send(dump_json({"pong": 0}))
        self.reactor.read()
        self.assertEqual(self.turn(), [])

    def test_a_silent_child_is_killed_and_the_others_go_on(self) -> None:
        self.begin(0, 1)
        good, silent = self.reactor.processes
        for _ in range(limits.UNANSWERED_MAX - 1):
            self.assertEqual(self.turn(good), ["WATCHDOG=1"])
        self.assertEqual(silent.signals, [])
        self.assertEqual(self.turn(good), ["WATCHDOG=1"])
        self.assertEqual(silent.signals, ["KILL"])
        # The kernel may take its time.
        self.assertEqual(self.turn(good), ["WATCHDOG=1"])
        self.assertEqual((silent.signals, good.signals), (["KILL"], []))
        silent.end(signal=9)
        self.reactor.advance(limits.CHILD_RESTART_SECONDS_MAX)
        self.assertEqual(len(self.reactor.processes), 3)

    def test_not_fed_while_nobody_answers(self) -> None:
        self.begin(0, 1)
        for _ in range(4):
            self.assertEqual(self.turn(), [])

    def test_fed_while_there_is_nobody_to_ask(self) -> None:
        self.begin(0)
        self.reactor.processes[0].end(code=10)
        self.manager.take()
        self.assertEqual(self.turn(), ["WATCHDOG=1"])

    def test_a_child_that_loads_has_longer(self) -> None:
        self.begin(0, 1, running=False)
        good, loading = self.reactor.processes
        for _ in range(limits.UNANSWERED_AT_START_MAX):
            self.assertEqual(loading.signals, [])
            self.turn(good)
        self.assertEqual(loading.signals, ["KILL"])

    def test_a_relaunched_child_begins_anew(self) -> None:
        self.begin(0)
        self.turn()
        self.reactor.processes[0].end(signal=9)
        self.reactor.advance(limits.CHILD_RESTART_SECONDS_MIN)
        self.turn(self.reactor.processes[1])
        self.turn(self.reactor.processes[1])
        self.assertEqual(self.reactor.processes[1].signals, [])

    def test_the_end(self) -> None:
        vigil = self.begin(0)
        vigil.end()
        self.assertEqual(self.manager.take(), ["STATUS=ending", "STOPPING=1"])
        self.supervisor.stop()
        self.reactor.processes[0].end()
        self.assertEqual(self.turn(), [])

    def test_a_reload_ends_ready_but_not_before_the_start(self) -> None:
        vigil = self.begin(0, running=False)
        self.manager.take()
        vigil.reloading()
        vigil.reloaded()
        self.assertEqual(self.manager.take(), [])
        self.reactor.processes[0].report(0, "running")
        self.reactor.read()
        self.manager.take()
        vigil.reloading()
        vigil.reloaded()
        self.assertEqual([line.split("=")[0] for line in self.manager.take()],
                         ["RELOADING", "MONOTONIC_USEC", "READY"])  # fmt: skip

    def test_no_groups_in_words(self) -> None:
        self.assertEqual(describe([]), "0 groups: none")


class OwnVigilTests(NotifyCase):
    """A daemon without children asks itself."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.asked: list[Deferred[Any]] = []
        self.seconds = WATCHDOG_SECONDS * limits.WATCHDOG_SHARE

    def begin(self, **more: str) -> OwnVigil:
        made = OwnVigil(self.clock, self.notifier(**more), self.ask)
        made.begin()
        return made

    def ask(self, seconds: float) -> Deferred[Any]:
        self.assertEqual(seconds, self.seconds)
        self.asked.append(Deferred())
        return self.asked[-1]

    def test_fed_by_answers_alone(self) -> None:
        vigil = self.begin(WATCHDOG_USEC=str(int(WATCHDOG_SECONDS * 1e6)))
        for number in range(3):
            self.assertEqual(self.manager.take(), [])
            self.asked[number].callback({"name": "qdsconsole"})
            self.assertEqual(self.manager.take(), ["WATCHDOG=1"])
            self.clock.advance(self.seconds)
        said: list[Any] = []
        self.patch(vigil_module._log, "observer", LogPublisher(said.append))
        self.asked[3].errback(UnreachableError("nobody answers"))
        (event,) = said
        self.assertEqual(formatEvent(event), "our own question was not answered: nobody answers")
        self.clock.advance(self.seconds)
        self.assertEqual(self.manager.take(), [])
        vigil.end()
        self.asked[4].callback({})
        self.clock.advance(self.seconds)
        self.assertEqual((self.manager.take(), len(self.asked)), ([], 5))

    def test_nobody_wants_to_know(self) -> None:
        self.begin().end()
        self.assertEqual((self.asked, self.clock.getDelayedCalls()), ([], []))


class DaemonTests(WorldCase):
    """A master process with a service manager above it, and children that are processes too."""

    timeout = 300

    async def ended(self, process: Any, protocol: Ended) -> None:
        """Leave no process behind when the test has failed."""
        if process.pid is not None:
            process.signalProcess("KILL")
            await protocol.ended

    async def test_a_stopped_child_does_not_take_the_others_along(self) -> None:
        self.world.host()
        for number in (0, 1):
            self.world.group(number)
        manager = ServiceManager(str(self.world.root / "notify"))
        self.addCleanup(manager.close)
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(self.world.root / "notify"),
            "WATCHDOG_USEC": str(int(SHORT_SECONDS * 1e6)),
        }
        protocol = Ended()
        process: Any = reactor.spawnProcess(  # type: ignore[attr-defined]
            protocol, MASTER[0], [*MASTER, "driver", str(self.world.root)], env=environment
        )
        self.addCleanup(lambda: ensureDeferred(self.ended(process, protocol)))
        await until(lambda: "READY=1" in manager.receive())
        self.assertIn("STATUS=2 groups: 2 running", manager.take())
        await until(lambda: "WATCHDOG=1" in manager.take())
        good, bad = (self.world.pid(number, "driver") for number in (0, 1))
        os.kill(bad, signal.SIGSTOP)
        await until(lambda: len(self.world.events(1)) == 2)
        self.assertEqual(self.world.events(0), [f"start-good {good}"])
        manager.take()
        await until(lambda: "WATCHDOG=1" in manager.take())
        process.signalProcess("HUP")
        await until(lambda: "RELOADING=1" in manager.receive() and "READY=1" in manager.receive())
        process.signalProcess("TERM")
        await protocol.ended
        self.assertIn("STOPPING=1", manager.take())
