"""Who asked for which change, when, and what came of it (security.md 12)."""

from __future__ import annotations

import io
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.logger import LogPublisher, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase, TestCase

from qdsmirror import audit
from qdsmirror.daemons import auditing, logs
from qdsmirror.daemons.auditing import Auditor, AuditWriter
from qdsmirror.errors import DegradedError, LimitError, UsageError
from qdsmirror.limits import AUDIT_TEXT_CHARACTERS_MAX
from qdsmirror.net.control import ControlServer
from qdsmirror.net.control_audit import Asked
from qdsmirror.paths import Paths
from qdsmirror.tools.client import ControlClient
from tests.daemons.test_master import MasterCase
from tests.daemons.world import until


def records(path: Path) -> list[dict[str, Any]]:
    """Read the records that are there as yet: a daemon's thread writes them."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Handler:
    """Does some of what groups do."""

    def status(self) -> dict[str, Any]:
        return {}

    def switch_bypass(self, to: str) -> None:
        if to == "off":
            raise DegradedError("the secondary is away", "wait")

    def switch_checkpoint(self, to: str, name: str, hold: str) -> None:
        pass

    def set_live(self, settings: str) -> None:
        pass

    def refresh(self, kind: str) -> None:
        raise ZeroDivisionError(kind)


class ControlAuditTests(TestCase):
    """Commands over a real socket."""

    timeout = 300

    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp(dir="/tmp"))
        self.addCleanup(shutil.rmtree, self.root)
        self.paths = Paths.of(self.root)
        self.told: list[dict[str, Any]] = []
        auditor = Auditor(self.paths, "dsgrp004.driver", self.told.append)  # type: ignore[arg-type]
        path = self.root / "ctl"
        self.server = ControlServer(reactor, path, Handler(), auditor)  # type: ignore[arg-type]
        self.server.start()
        self.addCleanup(self.server.stop)

    def call(self, command: str, **arguments: str) -> Deferred[Any]:
        return deferToThread(ControlClient(self.root / "ctl", 120).call, command, **arguments)

    async def test_done(self) -> None:
        await self.call("Bypass", to="on")
        asked, done = self.told
        for one, event in ((asked, "asked"), (done, "done")):
            self.assertEqual(one["event"], event)
            self.assertEqual((one["uid"], one["pid"]), (os.getuid(), os.getpid()))
            self.assertEqual(one["program"], Path("/proc/self/comm").read_text().strip())
            self.assertEqual(one["daemon"], "dsgrp004.driver")
            self.assertEqual((one["command"], one["arguments"]), ("Bypass", {"to": "on"}))
        self.assertEqual(asked["id"], done["id"])
        self.assertLessEqual(asked["time"], done["time"])
        self.assertEqual((done["code"], done["message"]), (0, ""))
        self.assertGreaterEqual(done["seconds"], 0)
        self.assertNotIn("code", asked)

    async def test_refused(self) -> None:
        await self.assertFailure(self.call("Bypass", to="off"), DegradedError)
        outcome = self.told[-1]
        self.assertEqual((outcome["event"], outcome["code"]), ("refused", 3))
        self.assertEqual(outcome["message"], "the secondary is away")

    async def test_not_known_here(self) -> None:
        await self.assertFailure(self.call("Apply"), UsageError)
        self.assertEqual((self.told[-1]["event"], self.told[-1]["code"]), ("refused", 2))

    async def test_our_own_fault(self) -> None:
        with self.assertRaises(Exception):  # noqa: B017
            await self.call("Refresh", kind="full")
        self.flushLoggedErrors(ZeroDivisionError)
        self.assertEqual(self.told[-1]["event"], "refused")
        self.assertIn("ZeroDivisionError", self.told[-1]["message"])

    async def test_who_only_looks_is_not_noted(self) -> None:
        await self.call("Status")
        await self.call("Checkpoint", to="list", name="", hold="")
        await self.call("Set", settings="{}")
        self.assertEqual(self.told, [])
        await self.call("Checkpoint", to="off", name="", hold="")
        self.assertEqual(len(self.told), 2)
        await self.call("Set", settings='{"operation": "sync"}')
        self.assertEqual(len(self.told), 4)

    async def test_the_outcome_is_in_the_log(self) -> None:
        output = io.StringIO()
        observer = logs.observer("driver", output)
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        await self.call("Bypass", to="on")
        self.assertIn(f"Bypass to=on, asked for by uid {os.getuid()} (", output.getvalue())
        self.assertTrue(output.getvalue().endswith("): done\n"))


class FileTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp(dir="/tmp"))
        self.addCleanup(shutil.rmtree, self.root)
        self.path = self.root / "audit.log"
        self.writer = AuditWriter(self.path)

    def write(self, **fields: Any) -> None:
        self.writer.record(fields)
        self.assertTrue(self.writer.finish(120))

    def test_mode_and_names(self) -> None:
        self.write(event="asked", uid=0, login_uid=os.getuid())
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o640)
        (found,) = records(self.path)
        self.assertEqual(found["user"], "root")
        self.assertEqual(found["login"], pwd.getpwuid(os.getuid()).pw_name)

    def test_a_record_is_a_line_whatever_it_holds(self) -> None:
        self.write(event="asked", arguments={"to": 'on\n{"event": "done"}', "x": "\udcff"})
        self.write(event="done", message="x" * 99_999)
        first, second = records(self.path)
        self.assertEqual(first["arguments"]["to"], 'on\n{"event": "done"}')
        self.assertEqual(len(second["message"]), AUDIT_TEXT_CHARACTERS_MAX)

    def test_rotated_by_renaming(self) -> None:
        self.write(event="one")
        self.path.rename(self.root / "audit.log.1")
        self.write(event="two")
        self.assertEqual([one["event"] for one in records(self.path)], ["two"])

    def test_what_could_not_be_written_is_counted(self) -> None:
        output = io.StringIO()
        self.patch(auditing._log, "observer", LogPublisher(logs.observer("driver", output)))
        self.path.mkdir()
        self.write(event="one")
        self.write(event="two")
        self.assertEqual(output.getvalue().count("nothing can be written into the audit log"), 1)
        self.path.rmdir()
        self.write(event="three")
        self.writer.finish(120)
        first, second = records(self.path)
        self.assertEqual((first["event"], second["event"]), ("three", "lost"))
        self.assertEqual(second["records"], 2)

    def test_no_link_is_followed(self) -> None:
        self.path.symlink_to(self.root / "other")
        self.assertRaises(OSError, audit.append, self.path, b"x\n")
        self.assertFalse((self.root / "other").exists())

    def test_many_processes_share_it(self) -> None:
        program = (
            "import sys; from pathlib import Path; from qdsmirror import audit\n"
            "for n in range(50):\n"
            "    audit.append(Path(sys.argv[1]), audit.encode({'n': n, 'x': 'y' * 900}))\n"
        )
        command = [sys.executable, "-c", program, str(self.path)]
        running = [subprocess.Popen(command) for _ in range(3)]
        self.assertEqual([one.wait(240) for one in running], [0, 0, 0])
        self.assertEqual(len(records(self.path)), 150)

    def test_of_a_root_the_file_is_the_daemons(self) -> None:
        if os.geteuid() != 0:
            self.skipTest("root is needed to give files away")
        os.chown(self.root, 1234, 4321)
        audit.append(self.path, b"{}\n")
        found = self.path.stat()
        self.assertEqual((found.st_uid, found.st_gid), (1234, 4321))

    def test_a_process_that_is_gone(self) -> None:
        told: list[Any] = []
        Auditor(Paths.of(self.root), "qdspmd", told.append)(Asked(2**22 + 1, 7, "Apply", {}))
        self.assertEqual((told[0]["uid"], told[0]["pid"]), (7, 2**22 + 1))
        self.assertNotIn("program", told[0])

    def test_a_users_command_without_a_daemon(self) -> None:
        paths = Paths.of(self.root)
        paths.var.mkdir()
        audit.append_own(paths, "qdswlinit", {"group": 0}, 0)
        audit.append_own(paths, "qdswlinit", {}, LimitError.exit_code, "too small")
        done, refused = records(paths.audit_log)
        self.assertEqual((done["event"], done["uid"], done["command"]),
                         ("done", os.getuid(), "qdswlinit"))  # fmt: skip
        self.assertEqual((refused["event"], refused["message"]), ("refused", "too small"))


class MasterAuditTests(MasterCase):
    async def test_configurations(self) -> None:
        """Start, apply and SIGHUP say what is in effect, and what that has changed."""
        self.world.host()
        self.world.group(0)
        master = self.begin()
        await self.running(master, 0)
        path = self.world.paths.audit_log
        await until(lambda: path.exists() and records(path))
        (start,) = records(path)
        self.assertEqual((start["event"], start["daemon"]), ("start", "qdsdriver"))
        self.assertEqual(start["roles"], {"dsgrp000": "primary"})
        self.assertEqual(set(start["files"]), {"qds.cfg", "dsgrp000.cfg"})
        self.world.group(1)
        await self.call("qdsdriver", "Apply")
        await until(lambda: len(records(path)) == 4)
        asked, applied, done = records(path)[1:]
        events = [one["event"] for one in (asked, applied, done)]
        self.assertEqual(events, ["asked", "apply", "done"])
        self.assertEqual((asked["command"], asked["pid"]), ("Apply", os.getpid()))
        self.assertEqual(applied["changes"], {"started": [1]})
        self.assertEqual(applied["files"]["dsgrp000.cfg"], start["files"]["dsgrp000.cfg"])
        self.assertIn("dsgrp001.cfg", applied["files"])
        self.world.group(0, window="8M")
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: len(records(path)) == 5)
        last = records(path)[-1]
        self.assertEqual((last["event"], last["changes"]), ("apply", {"restarted": [0]}))
        self.assertNotEqual(last["files"]["dsgrp000.cfg"], start["files"]["dsgrp000.cfg"])
        await self.running(master, 0, 1)

    async def test_a_group(self) -> None:
        self.world.host()
        self.world.group(0)
        master = self.begin()
        await self.running(master, 0)
        with self.assertRaises(UsageError):
            await self.call("dsgrp000.driver", "KillRefresh")
        path = self.world.paths.audit_log
        await until(lambda: len(records(path)) == 3)
        asked, refused = records(path)[1:]
        self.assertEqual((asked["daemon"], asked["command"]), ("dsgrp000.driver", "KillRefresh"))
        self.assertEqual((refused["event"], refused["uid"]), ("refused", os.getuid()))
