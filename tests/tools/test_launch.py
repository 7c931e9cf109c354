"""Launch and kill commands: sanity checks, start, idempotence; units and init scripts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from qdsmirror import limits
from qdsmirror.daemons.routing import ALERT_UNRECOGNIZED_NAME
from qdsmirror.pidfile import running_pid
from qdsmirror.tools import launch, progress
from tests.daemons.test_rmd import exchange, free_port, hello
from tests.daemons.world import MASTER, REPOSITORY, WorldCase, alive

CONF = REPOSITORY / "conf"
DAEMONS = ("qdsdriver", "qdspmd", "qdsrmd")


class LaunchCase(WorldCase):
    def setUp(self) -> None:
        super().setUp()
        self.world.host()
        self.world.group(0)
        for name in ("data0", "log0"):
            (self.world.root / name).write_bytes(b"\0" * 4096)
        self.patch(launch, "_command", self.fake_command)
        # How long it takes is a matter of the machine: nothing is told of that.
        self.patch(progress, "LINE_SECONDS", 1e6)
        self.addCleanup(self.kill_rest)

    def fake_command(self, daemon: Any, paths: Any, *options: str) -> list[str]:
        return [*MASTER, daemon.role, str(paths.root), *options]

    def kill_rest(self) -> None:
        for name in DAEMONS:
            pid = running_pid(self.world.paths.pid_file(name))
            if pid is not None and pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
                while alive(pid):
                    time.sleep(0.01)

    def run_command(self, function: Any, *arguments: str) -> tuple[int, str, str]:
        """Run a command; give its exit code, output and errors."""
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = function(["--root", str(self.world.root), *arguments])
        return code, output.getvalue(), errors.getvalue()


class LaunchTests(LaunchCase):
    def test_life(self) -> None:
        code, output, errors = self.run_command(launch.launchdriver)
        self.assertEqual((code, output, errors), (0, "qdsdriver runs with 1 group\n", ""))
        pid = running_pid(self.world.paths.pid_file("qdsdriver"))
        assert pid is not None
        self.assertEqual(os.getsid(pid), pid)
        self.assertEqual(len(self.world.events(0)), 1)
        code, output, _ = self.run_command(launch.launchdriver, "--json")
        self.assertEqual((code, json.loads(output)["pid"]), (0, pid))
        self.assertEqual(len(self.world.events(0)), 1)

        code, output, _ = self.run_command(launch.killdriver)
        self.assertEqual((code, output), (0, "qdsdriver has ended\n"))
        self.assertFalse(alive(pid))
        self.assertEqual(len(self.world.events(0)), 2)
        self.assertEqual(list(self.world.paths.run.iterdir()), [])
        code, output, _ = self.run_command(launch.killdriver)
        self.assertEqual((code, output), (0, "qdsdriver is not running\n"))

    def test_a_broken_file_stops_its_own_group_only(self) -> None:
        self.world.paths.group_config(5).write_text("operation = nonsense\n")
        code, output, errors = self.run_command(launch.launchdriver)
        self.assertEqual((code, output), (10, "qdsdriver runs with 1 group\n"), errors)
        self.assertIn("dsgrp005.cfg", errors)
        self.assertEqual(self.run_command(launch.killdriver)[0], 0)

    def test_group_that_fails_ends_with_its_code(self) -> None:
        self.world.behave(0, "fatal")
        code, _, errors = self.run_command(launch.launchdriver)
        self.assertEqual(code, 4)
        self.assertIn("dsgrp000: the log is broken", errors)

    def test_group_that_is_retried_in_vain(self) -> None:
        self.patch(limits, "LAUNCH_RETRY_SECONDS_MAX", 0.5)
        self.world.behave(0, "fail")
        code, _, errors = self.run_command(launch.launchdriver)
        self.assertEqual(code, 1)
        self.assertIn("dsgrp000: the device is in use", errors)

    def test_master_that_ends_at_once(self) -> None:
        program = "import sys; print('port 575: busy', file=sys.stderr); sys.exit(10)"
        self.patch(launch, "_command", lambda *_: [sys.executable, "-c", program])
        code, _, errors = self.run_command(launch.launchdriver)
        self.assertEqual(code, 10)
        self.assertIn("qdsdriver did not start: port 575: busy", errors)


class CheckTests(LaunchCase):
    """What is missing is named before anything is started."""

    def refused(self, function: Any, code: int, text: str) -> None:
        self.patch(launch, "_command", lambda *_: self.fail("it was started"))
        found, _, errors = self.run_command(function)
        self.assertIn(text, errors)
        self.assertEqual(found, code)
        self.assertEqual(errors.count("\n"), 1)

    def identity(self) -> None:
        for name in ("host.pem", "host.key", "ca.pem"):
            (self.world.paths.etc / name).write_text("pem")

    def test_no_host_file(self) -> None:
        self.world.paths.host_config.unlink()
        self.refused(launch.launchdriver, 10, "qds.cfg")

    def test_wrong_group_file(self) -> None:
        self.world.paths.group_config(0).write_text("operation = sync\n")
        self.refused(launch.launchdriver, 10, "dsgrp000.cfg")

    def test_no_group_of_this_side(self) -> None:
        self.refused(launch.launchrmds, 10, "names alpha as its secondary host")

    def test_missing_device(self) -> None:
        (self.world.root / "log0").unlink()
        self.refused(launch.launchdriver, 1, "ldsus.qds0.writelog_device")

    def test_missing_key(self) -> None:
        self.identity()
        (self.world.paths.etc / "host.key").unlink()
        self.refused(launch.launchpmds, 10, "host.key: No such file")

    def test_missing_secret(self) -> None:
        self.identity()
        self.refused(launch.launchpmds, 10, "dsgrp000.secret")

    def test_port_in_use(self) -> None:
        self.identity()
        with socket.create_server(("", 0)) as other:
            self.world.group(0, side="secondary", port=other.getsockname()[1])
            secret = self.world.paths.group_secret(0)
            secret.write_text("0" * 64)
            secret.chmod(0o600)
            for name in ("mirror0", "journal0"):
                (self.world.root / name).touch()
            self.refused(launch.launchrmds, 1, f"port {other.getsockname()[1]}: Address already")


class ForegroundTests(WorldCase):
    """The real plugins, by twistd and as the launch commands start them."""

    def test_configuration_error_exits_10(self) -> None:
        self.world.host()
        twistd = Path(sys.executable).with_name("twistd")
        for command in ([str(twistd), "-n"], [sys.executable, "-P", "-m", "qdsmirror.daemons.run"]):
            ran = subprocess.run(
                [*command, "qdsdriver", "--root", str(self.world.root)],
                capture_output=True,
                text=True,
                cwd=self.world.root,
            )
            self.assertEqual(ran.returncode, 10, ran.stderr)
            self.assertIn("names alpha as its primary host", ran.stderr)
            self.assertNotIn("Traceback", ran.stderr)
            self.assertFalse((self.world.root / "twistd.pid").exists())

    async def test_in_rmd_takes_a_service_managers_socket(self) -> None:
        port = free_port()
        self.world.host()
        self.world.group(0, side="secondary", port=port)
        program = (
            "import os, sys; os.dup2(int(sys.argv.pop(1)), 3); "
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); "
            "from qdsmirror.tools.launch import in_rmd; sys.exit(in_rmd())"
        )
        with socket.create_server(("127.0.0.1", port)) as listening:
            process = subprocess.Popen(
                [sys.executable, "-c", program, str(listening.fileno())]
                + ["--root", str(self.world.root)],
                pass_fds=[listening.fileno()],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        try:
            answer = await deferToThread(exchange, port, hello("dsgrp001.qdsmirror"))
            self.assertEqual(answer[-1], ALERT_UNRECOGNIZED_NAME)
            self.assertEqual(running_pid(self.world.paths.pid_file("qdsrmd")), process.pid)
        finally:
            process.terminate()
            process.wait()

    async def test_in_rmd_takes_over_inetds_socket(self) -> None:
        port = free_port()
        self.world.host()
        self.world.group(0, side="secondary", port=port)
        program = "import sys; from qdsmirror.tools.launch import in_rmd; sys.exit(in_rmd())"
        with socket.create_server(("127.0.0.1", port)) as listening:
            process = subprocess.Popen(
                [sys.executable, "-c", program, "--root", str(self.world.root)],
                stdin=listening,
                stdout=listening,
                stderr=listening,
            )
        try:
            # No group of ours, and told so: the master has the socket.
            answer = await deferToThread(exchange, port, hello("dsgrp001.qdsmirror"))
            self.assertEqual(answer[-1], ALERT_UNRECOGNIZED_NAME)
            self.assertEqual(running_pid(self.world.paths.pid_file("qdsrmd")), process.pid)
            log = self.world.paths.log_file("qdsrmd")
            # A thread of the daemon's writes it.
            while "dsgrp001 takes no connection" not in log.read_text():
                await deferLater(reactor, 0.05)
        finally:
            process.terminate()
            process.wait()


class UnitTests(WorldCase):
    def test_init_scripts_parse(self) -> None:
        for name in DAEMONS:
            script = CONF / "init.d" / name
            self.assertTrue(os.access(script, os.X_OK), name)
            subprocess.run(["sh", "-n", str(script)], check=True)

    def test_init_script_actions(self) -> None:
        """The scripts call the launch and kill commands and judge the pid file."""
        script = str(CONF / "init.d" / "qdsdriver")
        pid_file = self.world.paths.pid_file("qdsdriver")
        environment = {**os.environ, "QDS_ROOT": str(self.world.root)}

        def code(action: str) -> int:
            ran = subprocess.run([script, action], env=environment, capture_output=True)
            return ran.returncode

        self.assertEqual(code("nonsense"), 2)
        self.assertEqual(code("status"), 3)
        with subprocess.Popen(
            ["sh", "-c", "read end; exit", "qdsdriver"], stdin=subprocess.PIPE
        ) as running:
            pid_file.write_text(f"{running.pid}\n")
            self.assertEqual(code("status"), 0)
        pid_file.write_text(f"{os.getppid()}\n")
        self.assertEqual(code("status"), 1)
        pid_file.write_text("4194305\n")
        self.assertEqual(code("status"), 1)

    def test_units_verify(self) -> None:
        analyze = shutil.which("systemd-analyze")
        if analyze is None:
            self.skipTest("systemd-analyze is missing")
        units = [str(one) for one in sorted((CONF / "systemd").iterdir())]
        self.assertEqual(len(units), 7)
        ran = subprocess.run(
            [analyze, "verify", "--man=no", *units], capture_output=True, text=True
        )
        self.assertEqual((ran.returncode, ran.stderr), (0, ""))
