"""The daemons as a service manager runs them: their words to it, the journal, the audit log."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import threading
from typing import Any

from twisted.trial.unittest import TestCase

from tests.daemons.test_auditing import records
from tests.daemons.test_journald import parse
from tests.daemons.test_notify import ServiceManager
from tests.integration.lab import POLL_SECONDS, WAIT_SECONDS, console_script, in_thread
from tests.integration.world import World

#: Children are asked four times within it; a busy machine shall not make one look dead.
WATCHDOG_SECONDS = 20.0


class Service:
    """A daemon in the foreground, with a service manager's sockets."""

    def __init__(self, world: World, site: str, daemon: str) -> None:
        self.world = world
        self.daemon = daemon
        self.manager = ServiceManager(str(world.base / f"{daemon}.notify"))
        world.test.addCleanup(self.manager.close)
        self._stderr, write = os.pipe()
        world.test.addCleanup(os.close, self._stderr)
        status = os.fstat(write)
        environment = {
            **world.environment(),
            "NOTIFY_SOCKET": str(world.base / f"{daemon}.notify"),
            "WATCHDOG_USEC": str(int(WATCHDOG_SECONDS * 1e6)),
            "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}",
        }
        command = [console_script("twistd"), "-n", "--pidfile="]
        command += ["--logger=qdsmirror.daemons.logs.twistd", daemon]
        command += ["--root", str(world.directory / site)]
        self.process = subprocess.Popen(command, env=environment, stderr=write, cwd="/")
        os.close(write)
        world.test.addCleanup(self.end)
        self._over = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        world.test.addCleanup(self._end_reading)

    def _read(self) -> None:
        """Read on, as service managers do: a socket holds few messages, others are lost."""
        while not self._over.wait(POLL_SECONDS):
            self.manager.receive()

    def _end_reading(self) -> None:
        self._over.set()
        self._reader.join()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def tells(self, line: str) -> None:
        """Wait until the service manager is told this."""
        self.world.until(lambda: line in self.manager.receive(), f"{self.daemon} to say {line}")


class Journal:
    """Stands for journald."""

    def __init__(self, world: World) -> None:
        self.path = world.base / "journal"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        world.test.addCleanup(self._socket.close)
        self._socket.bind(str(self.path))
        self._socket.setblocking(False)
        self.entries: list[dict[str, str]] = []
        world.customise(
            f"import qdsmirror.daemons.journald as journald\njournald.SOCKET = {str(self.path)!r}\n"
        )

    def find(self, text: str, **fields: str) -> dict[str, str] | None:
        """Find an entry that has a text in its message, and these fields."""
        while True:
            try:
                self.entries.append(parse(self._socket.recv(1 << 20)))
            except BlockingIOError:
                break
        for one in self.entries:
            if text in one["MESSAGE"] and fields.items() <= one.items():
                return one
        return None


class ServiceTests(TestCase):
    timeout = 1200

    @in_thread
    def test_of_three_daemons(self) -> None:
        world = World(self, "--size", "2M", "--writelog", "2M", "--journal", "3M")
        world.create()
        journal = Journal(world)
        services = [
            Service(world, "secondary", "qdsrmd"),
            Service(world, "primary", "qdsdriver"),
            Service(world, "primary", "qdspmd"),
        ]
        for service in services:
            service.tells("READY=1")
            service.tells("STATUS=1 group: 1 running")
            service.tells("WATCHDOG=1")
        for daemon in ("qdsdriver", "qdsrmd"):
            fields = {"SYSLOG_IDENTIFIER": daemon, "QDS_GROUP": "dsgrp000", "PRIORITY": "6"}
            world.until(lambda f=fields: journal.find("connected", **f), f"{daemon} in the journal")
        self.assertEqual(list(world.directory.glob("*/var/qds*.log")), [])

        world.at("primary", "qdsrefresh")
        world.qemu_io("write -P 5 0 64k")
        world.settle()
        world.at("primary", "qdsbypass", "on")
        told = world.until(lambda: journal.find("entering bypass"), "the bypass in the journal")
        self.assertEqual((told["PRIORITY"], told["QDS_GROUP"]), ("4", "dsgrp000"))
        self.assertGreater(int(told["QDS_SEQUENCE"]), 0)

        self.audited(world, journal)
        for service in services:
            service.manager.take()
            service.process.send_signal(signal.SIGHUP)
            service.tells("RELOADING=1")
            service.tells("READY=1")
        for service in reversed(services):
            service.process.terminate()
            # twistd ends by the signal that has ended it; to a service manager that is a clean end.
            self.assertEqual(service.process.wait(WAIT_SECONDS), -signal.SIGTERM)
            self.assertIn("STOPPING=1", service.manager.receive())

    @in_thread
    def test_of_the_console(self) -> None:
        world = World(self, "--size", "2M", "--writelog", "2M", "--journal", "3M", "--console")
        world.create()
        journal = Journal(world)
        service = Service(world, "primary", "qdsconsole")
        service.tells("READY=1")
        world.until(
            lambda: [one for one in service.manager.receive() if one.startswith("STATUS=metrics")],
            "qdsconsole to say where the metrics are",
        )
        for _ in range(2):
            service.manager.take()
            service.tells("WATCHDOG=1")
        service.manager.take()
        service.process.send_signal(signal.SIGHUP)
        service.tells("RELOADING=1")
        service.tells("READY=1")
        # Fed by answers of its own alone: now there are none.
        (world.primary / "run" / "qdsconsole.ctl").unlink()
        world.until(lambda: journal.find("our own question was not"), "the console to notice")
        service.manager.take()
        journal.entries.clear()
        world.until(lambda: journal.find("our own question was not"), "it to notice again")
        self.assertNotIn("WATCHDOG=1", service.manager.receive())
        service.process.terminate()
        self.assertEqual(service.process.wait(WAIT_SECONDS), -signal.SIGTERM)
        self.assertIn("STOPPING=1", service.manager.receive())

    def audited(self, world: World, journal: Journal) -> None:
        """Who asked for the bypass, and for what is refused, is in the audit log."""
        path = world.primary / "var" / "audit.log"
        self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o640)

        def bypasses() -> list[dict[str, Any]]:
            return [one for one in records(path) if one.get("command") == "Bypass"]

        world.until(lambda: len(bypasses()) == 2, "the command and its outcome")
        asked, done = bypasses()
        self.assertEqual((asked["event"], done["event"]), ("asked", "done"))
        self.assertEqual((done["arguments"], done["daemon"]), ({"to": "on"}, "dsgrp000.driver"))
        self.assertEqual((done["uid"], done["program"]), (os.getuid(), "qdsbypass"))
        self.assertNotEqual(world.ask("primary", "qdsverify").returncode, 0)
        world.until(
            lambda: [one for one in records(path) if one["event"] == "refused"], "the refusal"
        )
        (refused,) = [one for one in records(path) if one["event"] == "refused"]
        self.assertEqual((refused["command"], refused["program"]), ("Verify", "qdsverify"))
        self.assertNotEqual(refused["code"], 0)
        world.until(lambda: journal.find("Verify", QDS_AUDIT="1"), "the refusal in the journal")
