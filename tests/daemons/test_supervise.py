"""Supervision on a fake clock with fake processes: back-off, fatal ends, order of stopping."""

from __future__ import annotations

import os
import select
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror import limits
from qdsmirror.core.jsontext import dump_json, parse_object
from qdsmirror.daemons.supervise import Setting, Supervisor
from qdsmirror.paths import Paths
from qdsmirror.storage.latch import FailureLatch, FailureMemory


class FakeProcess:
    """One spawned process: what it was given, what it was sent, and how it ends."""

    def __init__(self, protocol: Any, arguments: list[str], channel: socket.socket, pid: int):
        self.protocol = protocol
        self.arguments = arguments
        self.channel = channel
        self.pid = pid
        self.signals: list[str] = []
        self.alive = True
        self.memory = FailureMemory()

    def signalProcess(self, name: str) -> None:
        if not self.alive:
            raise ProcessExitedAlready
        self.signals.append(name)

    def report(self, number: int, state: str, reason: str = "", code: int = 0) -> None:
        told = {"group": number, "state": state, "reason": reason, "code": code}
        self.channel.send(dump_json(told))

    def report_failure(self, number: int, device: str, reason: str) -> None:
        self.channel.send(dump_json({"group": number, "failed": device, "reason": reason}))

    def end_handshake(self, connection: int) -> None:
        self.channel.send(dump_json({"handshake": connection}))

    def orders(self) -> list[tuple[Any, Any]]:
        found = []
        while select.select([self.channel], [], [], 0)[0]:
            data, descriptors, _, _ = socket.recv_fds(self.channel, 9999, 4)
            message = parse_object(data, "order")
            if message["order"] == "remember":
                self.memory.take(descriptors.pop())
            found.append((message["order"], message["group"]))
        return found

    def end(self, code: int = 0, signal: int | None = None) -> None:
        self.alive = False
        self.channel.close()
        how = ProcessDone(0) if code == 0 and signal is None else ProcessTerminated(code, signal)
        self.protocol.processExited(Failure(how))


class FakeReactor(Clock):
    """A clock with processes and readers."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[FakeProcess] = []
        self.readers: set[Any] = set()

    def addReader(self, reader: Any) -> None:
        self.readers.add(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)

    def addWriter(self, writer: Any) -> None:
        raise AssertionError("the channel is full")

    def removeWriter(self, writer: Any) -> None:
        pass

    def spawnProcess(
        self, protocol: Any, executable: str, args: list[str], env: Any, childFDs: dict[int, int]
    ) -> FakeProcess:
        channel = socket.socket(fileno=os.dup(childFDs[3]))
        process = FakeProcess(protocol, args, channel, 1000 + len(self.processes))
        named = dict(pair.split("=") for pair in args[-1].split(","))
        if "failures" in named:
            process.memory.take(os.dup(childFDs[int(named["failures"])]))
        self.processes.append(process)
        return process

    def close(self) -> None:
        """Close both ends of every channel."""
        for process in self.processes:
            process.channel.close()
        for reader in list(self.readers):
            reader.close()

    def read(self) -> None:
        """Deliver what has arrived."""
        while ready := select.select(list(self.readers), [], [], 0)[0]:
            for reader in ready:
                reader.doRead()


class SuperviseTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp(dir="/tmp"))
        self.addCleanup(shutil.rmtree, self.root)
        (self.root / "run").mkdir()
        self.reactor = FakeReactor()
        self.addCleanup(self.reactor.close)

    def make(self, *numbers: int, children: int = 8) -> Supervisor:
        setting = Setting(
            self.reactor, "pmd", Paths.of(self.root), lambda _number: None, lambda: 2, ("child",)
        )
        supervisor = Supervisor(setting, children)
        supervisor.start(numbers)
        return supervisor

    @property
    def last(self) -> FakeProcess:
        return self.reactor.processes[-1]

    def states(self, supervisor: Supervisor) -> list[str]:
        return [one["state"] for one in supervisor.status()["groups"]]

    def test_groups_get_a_child_each_while_they_are_few(self) -> None:
        self.make(0, 1, 2)
        groups = [one.arguments[one.arguments.index("--groups") + 1] for one in self.all()]
        self.assertEqual(groups, ["0", "1", "2"])

    def test_many_groups_share_children(self) -> None:
        supervisor = self.make(*range(7), children=3)
        groups = [one.arguments[one.arguments.index("--groups") + 1] for one in self.all()]
        self.assertEqual(groups, ["0,3,6", "1,4", "2,5"])
        supervisor.add(9)
        self.assertEqual(self.reactor.processes[1].orders(), [("start", 9)])

    def all(self) -> list[FakeProcess]:
        return self.reactor.processes

    def test_command_line(self) -> None:
        self.make(5)
        expected = ["child", "pmd", "--root", str(self.root), "--groups", "5", "--fds", "channel=3"]
        self.assertEqual(self.last.arguments, expected)

    def test_what_protects_a_child_is_in_the_status(self) -> None:
        supervisor = self.make(0)
        self.assertIsNone(supervisor.status()["children"][0]["memory"])
        told = {"io_flusher": False, "locked": True, "oom_score_adj": 0, "refused": ["no"]}
        self.last.channel.send(dump_json({"memory": told}))
        self.reactor.read()
        self.assertEqual(supervisor.status()["children"][0]["memory"], told)
        # Its successor has to tell for itself.
        self.last.end(1)
        self.reactor.advance(limits.CHILD_RESTART_SECONDS_MAX)
        self.assertIsNone(supervisor.status()["children"][0]["memory"])

    def test_back_off_doubles_up_to_its_bound(self) -> None:
        self.make(0)
        delay = limits.CHILD_RESTART_SECONDS_MIN
        for _ in range(10):
            count = len(self.all())
            self.last.end(code=1)
            self.reactor.advance(delay * 0.99)
            self.assertEqual(len(self.all()), count)
            self.reactor.advance(delay * 0.02)
            self.assertEqual(len(self.all()), count + 1)
            delay = min(2 * delay, limits.CHILD_RESTART_SECONDS_MAX)

    def test_back_off_starts_anew_after_a_healthy_time(self) -> None:
        self.make(0)
        for _ in range(4):
            self.last.end(signal=9)
            self.reactor.advance(limits.CHILD_RESTART_SECONDS_MAX)
        self.reactor.advance(limits.CHILD_HEALTHY_SECONDS)
        count = len(self.all())
        self.last.end(signal=9)
        self.reactor.advance(limits.CHILD_RESTART_SECONDS_MIN * 1.01)
        self.assertEqual(len(self.all()), count + 1)

    def test_last_report_before_the_end_is_the_reason(self) -> None:
        supervisor = self.make(0)
        self.last.report(0, "failed", "wrong name", 12)
        self.last.end(code=12)
        group = supervisor.status()["groups"][0]
        self.assertEqual(
            (group["state"], group["reason"], group["code"]), ("failed", "wrong name", 12)
        )

    def test_fatal_end_is_not_retried_until_asked(self) -> None:
        for code in (4, 10, 12):
            supervisor = self.make(0)
            count = len(self.all())
            self.last.end(code=code)
            self.reactor.advance(1000)
            self.assertEqual(len(self.all()), count)
            self.assertEqual(self.states(supervisor), ["failed"])
            self.assertEqual(supervisor.retry(), [0])
            self.assertEqual(len(self.all()), count + 1)

    def test_signal_is_named_and_others_are_undisturbed(self) -> None:
        supervisor = self.make(0, 1)
        for number, process in enumerate(self.all()):
            process.report(number, "running")
        self.reactor.read()
        self.assertEqual(self.states(supervisor), ["running", "running"])
        self.all()[0].end(signal=9)
        status = supervisor.status()
        self.assertEqual(status["groups"][0]["reason"], "its process was ended by SIGKILL")
        self.assertEqual(self.states(supervisor), ["retrying", "running"])
        self.assertEqual(status["groups"][0]["pid"], None)
        self.reactor.advance(10)
        self.assertEqual((len(self.all()), self.all()[1].signals), (3, []))

    def test_stop_is_orderly_then_by_force_and_waits_for_the_end(self) -> None:
        supervisor = self.make(0, 1)
        first, second = self.all()
        stopping = supervisor.stop()
        self.assertEqual((first.signals, second.signals), (["TERM"], ["TERM"]))
        first.end()
        self.reactor.advance(limits.STOP_SECONDS_MAX)
        self.assertEqual(second.signals, ["TERM", "KILL"])
        self.assertNoResult(stopping)
        second.end(signal=9)
        self.successResultOf(stopping)
        self.reactor.advance(1000)
        self.assertEqual(len(self.all()), 2)

    def test_stop_while_waiting_to_relaunch(self) -> None:
        supervisor = self.make(0)
        self.last.end(code=1)
        self.successResultOf(supervisor.stop())
        self.reactor.advance(1000)
        self.assertEqual(len(self.all()), 1)

    def test_removing_the_last_group_ends_the_child(self) -> None:
        supervisor = self.make(0, 1, children=1)
        supervisor.remove(0)
        self.assertEqual((self.last.orders(), self.last.signals), ([("stop", 0)], []))
        supervisor.remove(1)
        self.assertEqual(self.last.signals, ["TERM"])
        stopping = supervisor.stop()
        self.assertNoResult(stopping)
        self.last.end()
        self.successResultOf(stopping)
        self.assertEqual(supervisor.status(), {"children": [], "groups": []})

    def test_failed_devices_are_handed_to_every_later_process(self) -> None:
        supervisor = self.make(0, 1, children=1)
        self.assertEqual(self.last.memory.groups(), [])
        self.last.report_failure(0, "/dev/a", "fdatasync: EIO")
        self.last.report_failure(0, "/dev/a", "a later reason")
        # It is heard even if the process is gone by then.
        self.last.end(signal=9)
        failed = {"/dev/a": "fdatasync: EIO"}
        self.assertEqual(supervisor.status()["groups"][0]["failed_devices"], failed)
        self.assertEqual(supervisor.status()["groups"][1]["failed_devices"], {})
        for _ in range(2):
            self.reactor.advance(limits.CHILD_RESTART_SECONDS_MAX)
            self.assertEqual(self.last.memory.of(0), failed)
            self.last.end(signal=9)

    def test_failed_devices_outlive_the_groups_removal(self) -> None:
        supervisor = self.make(0, 1, children=1)
        self.last.report_failure(0, "/dev/a", "fdatasync: EIO")
        self.reactor.read()
        supervisor.remove(0)
        supervisor.add(0)
        self.assertEqual(self.last.orders(), [("stop", 0), ("remember", 0), ("start", 0)])
        self.assertEqual(self.last.memory.of(0), {"/dev/a": "fdatasync: EIO"})

    def test_only_the_operators_word_makes_it_forget(self) -> None:
        supervisor = self.make(0)
        self.last.report_failure(0, "/dev/a", "fdatasync: EIO")
        self.reactor.read()
        supervisor.retry()
        supervisor.restart(0)
        self.assertEqual(list(supervisor.status()["groups"][0]["failed_devices"]), ["/dev/a"])
        self.last.orders()
        self.assertEqual(supervisor.forget(0), ["/dev/a"])
        self.assertEqual(self.last.orders(), [("forget", 0)])
        self.last.end(signal=9)
        self.reactor.advance(limits.CHILD_RESTART_SECONDS_MAX)
        self.assertEqual(self.last.memory.groups(), [])

    def test_failed_devices_are_kept_in_the_state_file_at_the_end(self) -> None:
        supervisor = self.make(0)
        self.last.report_failure(0, "/dev/a", "fdatasync: EIO")
        self.reactor.read()
        paths = Paths.of(self.root)
        supervisor.keep_failures()
        self.assertEqual(len(self.flushLoggedErrors()), 0)
        self.assertFalse(paths.state_file(0).exists())
        paths.var.mkdir()
        supervisor.keep_failures()
        self.assertEqual(FailureLatch(paths.state_file(0)).failures(), {"/dev/a": "fdatasync: EIO"})

    def test_a_handshake_ends_by_the_childs_word_or_with_the_child(self) -> None:
        supervisor = self.make(0)
        ended: list[int] = []
        self.assertFalse(supervisor.adopt(0, 0, lambda: ended.append(0)))
        self.last.report(0, "running")
        self.reactor.read()
        for number in (1, 2):
            self.assertTrue(supervisor.adopt(0, 0, lambda number=number: ended.append(number)))
        for _ in range(2):
            self.last.end_handshake(1)
        self.reactor.read()
        self.assertEqual(ended, [1])
        self.last.end(signal=9)
        self.assertEqual(ended, [1, 2])
