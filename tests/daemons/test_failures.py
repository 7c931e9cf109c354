"""rules.md 4: a failed sync is latched in the master too, for when no state file can be written."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from qdsmirror.daemons.driver import DriverMaster
from qdsmirror.tools.nbdclient import NbdClient
from tests.daemons.test_master import MasterCase
from tests.daemons.world import until

FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_child.py")))
_MEBIBYTE = 1 << 20
_WRITE, _FUA, _BLOCK = 1, 1, 4096


def write_durably(path: str, export: str) -> int:
    """Write a block with FUA; give the NBD error that it is answered with, or 0."""
    client = NbdClient.connect(path, export, 240)
    with client._socket as connection:
        connection.sendall(struct.pack(">IHHQQI", 0x25609513, _FUA, _WRITE, 7, 0, _BLOCK))
        connection.sendall(bytes(_BLOCK))
        reply = b""
        while len(reply) < 16:
            more = connection.recv(64)
            assert more, "the connection was closed"
            reply += more
        error: int = struct.unpack_from(">IIQ", reply)[1]
        return error


class FailureTests(MasterCase):
    timeout = 300

    async def site(self) -> Any:
        """Real devices, and a master whose state files cannot be written."""
        self.world.host(children=1)
        for number in (0, 1):
            self.world.group(number)
            for name in (f"data{number}", f"log{number}"):
                with open(self.world.root / name, "wb") as file:
                    file.truncate(4 * _MEBIBYTE)
        await self.tool("qdswlinit")
        for number in (0, 1):
            self.blocker(number).mkdir()
        master = DriverMaster(reactor, self.world.paths, FAULTY)
        master.prepare()
        return master

    def blocker(self, number: int) -> Path:
        """What stands where a state file is first written: it takes root's permission too."""
        return self.world.paths.state_file(number).with_suffix(".state.new")

    def serve(self, master: Any) -> None:
        master.startService()
        self.addCleanup(lambda: master.running and master.stopService())

    def faulty(self, *names: str) -> None:
        path = self.world.paths.var / "faulty"
        path.write_text(" ".join(names))
        if not names:
            path.unlink()

    async def tool(self, command: str, *arguments: str) -> Any:
        done = await deferToThread(
            subprocess.run,
            [Path(sys.executable).with_name(command), "--root", self.world.root, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if command == "qdswlinit":
            self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def group(self, master: Any, number: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = master.status()["groups"][number]
        return found

    async def test_a_child_after_the_next_refuses_the_device_until_it_is_made_anew(self) -> None:
        master = await self.site()
        self.serve(master)
        await self.running(master, 0, 1)
        log = str(self.world.root / "log0")
        self.faulty("log0")
        socket = str(self.world.paths.nbd_socket(0))
        self.assertNotEqual(await deferToThread(write_durably, socket, "qds0"), 0)
        self.faulty()
        await until(lambda: self.group(master)["failed_devices"])
        self.assertEqual(list(self.group(master)["failed_devices"]), [log])
        self.assertFalse(self.world.paths.state_file(0).exists())
        # One process hosts both; only the one with the failed device is refused ...
        os.kill(self.world.pid(0, "driver"), signal.SIGKILL)
        await until(lambda: self.states(master) == {0: "failed", 1: "running"})
        self.assertEqual(self.group(master)["code"], 4)
        # ... and stays so when the operator only asks to try again.
        master.apply()
        await until(lambda: self.group(master)["state"] == "failed")
        told = json.loads((await self.tool("qdsinfo", "--json")).stdout)["groups"][0]
        self.assertEqual((told["driver"]["state"], told["driver"]["code"]), ("failed", 4))
        self.assertIn(f"{log} has failed: ", told["reason"])
        self.assertIn("fdatasync", told["reason"])
        waited = await self.tool("qdsinfo", "-g", "0", "--wait", "connected", "--timeout", "20")
        self.assertEqual(waited.returncode, 4)
        # The log is initialised anew, by the operator: now it may be used.
        await self.tool("qdswlinit", "-g", "0", "--yes")
        self.assertEqual(self.group(master)["failed_devices"], {})
        self.assertEqual(self.group(master)["state"], "failed")
        master.apply()
        await self.running(master, 0, 1)
        self.assertEqual(await deferToThread(write_durably, socket, "qds0"), 0)

    async def test_a_sync_that_fails_at_the_start_is_not_tried_again(self) -> None:
        master = await self.site()
        self.faulty("data1")
        self.serve(master)
        await until(lambda: self.group(master, 1)["failed_devices"])
        self.faulty()
        await until(lambda: self.states(master) == {0: "running", 1: "failed"})
        self.assertIn("data1 has failed: ", self.group(master, 1)["reason"])

    async def test_written_after_all_before_the_master_ends(self) -> None:
        master = await self.site()
        self.faulty("log0")
        self.serve(master)
        await until(lambda: self.group(master)["failed_devices"])
        self.faulty()
        self.blocker(0).rmdir()
        await master.stopService()
        self.assertIn("log0", self.world.paths.state_file(0).read_text())
