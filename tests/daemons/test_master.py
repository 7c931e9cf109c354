"""Masters with real child processes (whose groups are fake)."""

from __future__ import annotations

import io
import os
import pwd
import signal
import socket
import stat
import sys
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.threads import deferToThread

from qdsmirror.daemons import master as master_module
from qdsmirror.daemons import service as service_module
from qdsmirror.daemons.driver import DriverMaster
from qdsmirror.daemons.pmd import PmdMaster
from qdsmirror.errors import EXIT_CONFIG, ConfigError, QdsError
from qdsmirror.pidfile import running_pid
from qdsmirror.tools.client import ControlClient
from tests.daemons.world import CHILD, MASTER, WorldCase, alive, until


def greeting(path: str) -> bytes:
    """Connect to a fake driver and read its greeting; waits as long as the backlog does."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(120)
        client.connect(path)
        return client.recv(100)


class Ended(ProcessProtocol):
    """Tells when a process has ended."""

    def __init__(self) -> None:
        self.ended: Deferred[None] = Deferred()

    def processEnded(self, reason: Any) -> None:
        self.ended.callback(None)


class MasterCase(WorldCase):
    def setUp(self) -> None:
        super().setUp()
        # The children's log would mix with trial's output.
        self.patch(master_module, "_log_for_children", self.open_log)

    def open_log(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def begin(self, kind: Any = DriverMaster) -> Any:
        master = kind(reactor, self.world.paths, CHILD)
        master.prepare()
        master.startService()
        self.addCleanup(master.stopService)
        return master

    def states(self, master: Any) -> dict[int, str]:
        return {one["group"]: one["state"] for one in master.status()["groups"]}

    async def running(self, master: Any, *numbers: int) -> None:
        await until(lambda: self.states(master) == dict.fromkeys(numbers, "running"))

    async def call(self, name: str, command: str) -> dict[str, Any]:
        client = ControlClient(self.world.paths.control_socket(name), 60)
        answer: dict[str, Any] = await deferToThread(client.call, command)
        return answer


class SupervisionTests(MasterCase):
    async def test_children_serve_and_end_in_order(self) -> None:
        self.world.host()
        self.world.group(0)
        self.world.group(3)
        master = DriverMaster(reactor, self.world.paths, CHILD)
        master.prepare()
        master.startService()
        await self.running(master, 0, 3)
        status = await self.call("qdsdriver", "Status")
        self.assertEqual(status["pid"], os.getpid())
        self.assertEqual([one["groups"] for one in status["children"]], [[0], [3]])
        for one in status["children"]:
            self.assertEqual(
                sorted(one["memory"]), ["io_flusher", "locked", "oom_score_adj", "refused"]
            )
        group = await self.call("dsgrp003.driver", "Status")
        self.assertEqual(group["group"], 3)
        pids = [self.world.pid(0, "driver"), self.world.pid(3, "driver")]
        self.assertEqual([one["pid"] for one in status["groups"]], pids)
        command = Path(f"/proc/{pids[0]}/cmdline").read_text().split("\0")
        self.assertEqual(command[command.index("--root") + 1], str(self.world.root))
        mode = stat.S_IMODE(self.world.paths.nbd_socket(0).stat().st_mode)
        self.assertEqual(mode, 0o660)

        await master.stopService()
        self.assertEqual(self.world.events(0), [f"start-good {pids[0]}", f"stop {pids[0]}"])
        self.assertFalse(any(map(alive, pids)))
        self.assertEqual(list(self.world.paths.run.iterdir()), [])

    async def test_killed_child_is_relaunched_and_clients_wait(self) -> None:
        self.world.host()
        self.world.group(0)
        self.world.group(1)
        master = self.begin()
        await self.running(master, 0, 1)
        first, other = self.world.pid(0, "driver"), self.world.pid(1, "driver")
        path = str(self.world.paths.nbd_socket(0))
        self.assertEqual(await deferToThread(greeting, path), b"hello from %d" % first)
        os.kill(first, signal.SIGKILL)
        second = int((await deferToThread(greeting, path)).split()[-1])
        self.assertNotEqual(second, first)
        await self.running(master, 0, 1)
        self.assertEqual(self.world.pid(0, "driver"), second)
        self.assertEqual(self.world.pid(1, "driver"), other)
        restarts = {tuple(one["groups"]): one["restarts"] for one in master.status()["children"]}
        self.assertEqual(restarts, {(0,): 1, (1,): 0})

    async def test_fatal_failure_is_reported_and_retried_on_apply_only(self) -> None:
        self.world.host()
        self.world.group(0)
        self.world.group(1)
        self.world.behave(0, "fatal")
        master = self.begin()
        await until(lambda: self.states(master) == {0: "failed", 1: "running"})
        group = master.status()["groups"][0]
        self.assertEqual((group["reason"], group["code"]), ("the log is broken; look", 4))
        await until(lambda: master.status()["children"][0]["state"] == "failed")
        self.assertEqual(len(self.world.events(0)), 1)
        self.world.behave(0, "good")
        result = await self.call("qdsdriver", "Apply")
        self.assertEqual(result["retried"], [0])
        await self.running(master, 0, 1)
        self.assertEqual(len(self.world.events(1)), 1)

    async def test_other_failure_is_retried(self) -> None:
        self.world.host()
        self.world.group(0)
        self.world.behave(0, "fail")
        master = self.begin()
        await until(lambda: len(self.world.events(0)) >= 2)
        await until(lambda: master.status()["groups"][0]["reason"] == "the device is in use; wait")
        self.world.behave(0, "good")
        await self.running(master, 0)

    async def unpaired(self, children: int) -> None:
        """It is tried again by itself, though it is the configuration that is wrong."""
        self.world.host(children=children)
        self.world.group(0)
        self.world.group(1)
        self.world.behave(0, "unpaired")
        master = self.begin()
        await until(lambda: len(self.world.events(0)) >= 2)
        reason = "not the key of the certificate; wait"
        await until(lambda: master.status()["groups"][0]["reason"] == reason)
        self.assertEqual(master.status()["groups"][0]["code"], EXIT_CONFIG)
        self.world.behave(0, "good")
        await self.running(master, 0, 1)

    async def test_a_start_while_certificate_and_key_are_replaced(self) -> None:
        await self.unpaired(children=2)

    async def test_a_shared_child_starts_while_they_are_replaced(self) -> None:
        await self.unpaired(children=1)

    async def test_shared_child_retries_one_group_and_keeps_the_other(self) -> None:
        self.world.host(children=1)
        self.world.group(0)
        self.world.group(1)
        self.world.behave(1, "bug")
        master = self.begin()
        await until(lambda: self.states(master) == {0: "running", 1: "retrying"})
        self.assertIn("ZeroDivisionError: oops", master.status()["groups"][1]["reason"])
        self.world.behave(1, "good")
        await self.running(master, 0, 1)
        self.assertEqual(len(self.world.events(0)), 1)
        self.assertEqual(self.world.pid(0, "driver"), self.world.pid(1, "driver"))
        self.assertEqual(
            await deferToThread(greeting, str(self.world.paths.nbd_socket(1))),
            b"hello from %d" % self.world.pid(0, "driver"),
        )


class StatisticsTests(MasterCase):
    """The process for statistics is a child like the others, and nobody else notices it."""

    def watched(self, number: int) -> list[str]:
        journal = self.world.paths.var / f"watched{number}"
        return journal.read_text().split() if journal.exists() else []

    async def test_it_is_one_for_all_groups_and_relaunched(self) -> None:
        self.world.host()
        self.world.group(0)
        self.world.group(1)
        master = self.begin()
        await self.running(master, 0, 1)
        await until(lambda: (self.watched(0), self.watched(1)) == (["10.0"], ["10.0"]))
        status = master.status()["statistics"]
        pids = {self.world.pid(0, "stats"), self.world.pid(1, "stats"), status["pid"]}
        self.assertEqual((len(pids), status["restarts"]), (1, 0))
        drivers = [self.world.pid(0, "driver"), self.world.pid(1, "driver")]
        os.kill(status["pid"], signal.SIGKILL)
        await until(lambda: len(self.watched(1)) == 2)
        self.assertEqual(master.status()["statistics"]["restarts"], 1)
        self.assertEqual(drivers, [self.world.pid(0, "driver"), self.world.pid(1, "driver")])

    async def test_what_only_it_goes_by_disturbs_nobody_else(self) -> None:
        self.world.host()
        self.world.group(0)
        master = self.begin()
        await self.running(master, 0)
        await until(lambda: self.watched(0) == ["10.0"])
        path = self.world.paths.group_config(0)
        path.write_text(path.read_text().replace("[tunables]", "[tunables]\nperf_interval = 1 s"))
        result = await self.call("qdsdriver", "Apply")
        self.assertEqual((result["retuned"], result["restarted"]), ([0], []))
        await until(lambda: self.watched(0) == ["10.0", "1.0"])
        self.assertEqual(len(self.world.events(0)), 1)
        self.assertEqual((await self.call("qdsdriver", "Apply"))["retuned"], [])

    async def test_the_pmds_master_has_none(self) -> None:
        self.world.host()
        self.world.group(0)
        master = self.begin(PmdMaster)
        await self.running(master, 0)
        self.assertIsNone(master.status()["statistics"])
        self.assertEqual(self.watched(0), [])


class ApplyTests(MasterCase):
    async def check_apply(self, children: int) -> None:
        self.world.host(children=children)
        for number in (0, 1, 2):
            self.world.group(number)
        master = self.begin()
        await self.running(master, 0, 1, 2)
        self.world.paths.group_config(1).unlink()
        self.world.group(2, window="8M")
        self.world.group(5)
        path = self.world.paths.group_config(0)
        path.write_text(path.read_text().replace("[tunables]", "[tunables]\nperf_interval = 1 s"))
        result = master.apply()
        self.assertEqual(
            result,
            {
                "started": [5],
                "stopped": [1],
                "restarted": [2],
                "retuned": [0],
                "retried": [],
                "renewed": [],
                "errors": [],
            },
        )
        await until(lambda: len(self.world.events(1)) == 2 and len(self.world.events(2)) == 3)
        await self.running(master, 0, 2, 5)
        self.assertEqual(len(self.world.events(0)), 1)
        self.assertFalse(self.world.paths.nbd_socket(1).exists())
        status = await self.call("dsgrp002.driver", "Status")
        self.assertEqual(status["window"], 8 << 20)
        pid = self.world.pid(5, "driver")
        answer = await deferToThread(greeting, str(self.world.paths.nbd_socket(5)))
        self.assertEqual(answer, b"hello from %d" % pid)

    async def test_child_per_group(self) -> None:
        await self.check_apply(children=8)

    async def test_shared_child(self) -> None:
        await self.check_apply(children=1)

    async def test_broken_file_leaves_its_group_running(self) -> None:
        self.world.host()
        self.world.group(0)
        self.world.group(1)
        master = self.begin()
        await self.running(master, 0, 1)
        self.world.paths.group_config(1).write_text("nonsense = 1\n")
        result = master.apply()
        self.assertEqual((result["stopped"], result["restarted"]), ([], []))
        self.assertIn("dsgrp001.cfg", result["errors"][0])
        self.assertEqual(self.states(master), {0: "running", 1: "running"})
        self.assertIn("dsgrp001.cfg", master.status()["errors"][0])
        self.world.paths.host_config.write_text("name =\n")
        self.assertRaises(ConfigError, master.apply)

    async def test_new_secret_restarts_a_pmd(self) -> None:
        self.world.host()
        self.world.group(0)
        master = self.begin(PmdMaster)
        await self.running(master, 0)
        self.assertEqual(master.apply()["restarted"], [])
        self.world.paths.group_secret(0).write_text("new")
        self.assertEqual(master.apply()["restarted"], [0])

    async def test_new_throttles_disturb_nobody(self) -> None:
        self.world.host()
        self.world.group(0)
        master = self.begin()
        await self.running(master, 0)
        path = self.world.paths.group_config(0)
        text = path.read_text()
        path.write_text(f"{text}[throttles]\n[[one]]\ntest = lag > 1\nactions = extend\n")
        result = master.apply()
        self.assertEqual((result["restarted"], result["errors"]), ([], []))
        path.write_text(f"{text}[throttles]\n[[one]]\ntest = lug > 1\nactions = extend\n")
        self.assertIn('found "lug"', master.apply()["errors"][0])

    async def test_hang_up_applies(self) -> None:
        self.world.host()
        self.world.group(0)
        master = self.begin()
        await self.running(master, 0)
        self.world.group(7)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: self.states(master) == {0: "running", 7: "running"})


class ClaimTests(MasterCase):
    async def test_second_master_is_refused(self) -> None:
        self.world.host()
        self.world.group(0)
        self.begin()
        second = DriverMaster(reactor, self.world.paths, CHILD)
        error = self.assertRaises(QdsError, second.prepare)
        self.assertIn(f"qdsdriver is already running (pid {os.getpid()})", str(error))
        self.assertEqual(error.exit_code, 1)

    def test_nothing_to_run(self) -> None:
        self.world.host()
        self.world.group(0, side="secondary")
        master = DriverMaster(reactor, self.world.paths, CHILD)
        error = self.assertRaises(ConfigError, master.prepare)
        self.assertIn("names alpha as its primary host", str(error))
        self.assertIsNone(running_pid(self.world.paths.pid_file("qdsdriver")))

    async def test_becomes_the_configured_user_when_root_starts_it(self) -> None:
        became: list[tuple[int, int]] = []
        given: list[str] = []
        self.patch(service_module, "switchUID", lambda uid, gid: became.append((uid, gid)))
        self.patch(os, "geteuid", lambda: 0)
        self.patch(os, "chown", lambda path, uid, gid: given.append(Path(path).name))
        self.world.host(user="nobody")
        self.world.group(0)
        master = self.begin()
        user = pwd.getpwnam("nobody")
        self.assertEqual(became, [(user.pw_uid, user.pw_gid)])
        self.assertEqual(given, ["run", "var", "qdsdriver.pid"])
        await self.running(master, 0)

    def test_unknown_user(self) -> None:
        self.patch(os, "geteuid", lambda: 0)
        self.world.host(user="no-such-user")
        self.world.group(0)
        master = DriverMaster(reactor, self.world.paths, CHILD)
        master.prepare()
        told = io.StringIO()
        self.patch(sys, "stderr", told)
        end = self.assertRaises(SystemExit, master.startService)
        self.assertIn("no such user no-such-user", told.getvalue())
        self.assertEqual(end.code, 10)

    async def test_killed_master_takes_its_children_along(self) -> None:
        self.world.host()
        self.world.group(0)
        protocol = Ended()
        process = reactor.spawnProcess(
            protocol, MASTER[0], [*MASTER, "driver", str(self.world.root)], env=None
        )
        pid_file = self.world.paths.pid_file("dsgrp000.driver")
        child = await until(lambda: running_pid(pid_file))
        os.kill(process.pid, signal.SIGKILL)
        await protocol.ended
        await until(lambda: not alive(child))
        # Stale files and sockets are in nobody's way.
        master = self.begin()
        await self.running(master, 0)

    async def test_term_ends_master_and_children(self) -> None:
        self.world.host()
        self.world.group(0)
        protocol = Ended()
        process = reactor.spawnProcess(
            protocol, MASTER[0], [*MASTER, "driver", str(self.world.root)], env=None
        )
        await until(lambda: len(self.world.events(0)) == 1)
        child = await until(lambda: running_pid(self.world.paths.pid_file("dsgrp000.driver")))
        await until(self.world.paths.control_socket("dsgrp000.driver").exists)
        process.signalProcess("TERM")
        await protocol.ended
        self.assertFalse(alive(child))
        self.assertEqual(self.world.events(0)[1:], [f"stop {child}"])
        self.assertEqual(list(self.world.paths.run.iterdir()), [])
