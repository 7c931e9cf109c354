"""The systems that are measured side by side: each serves one NBD export and can be settled."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent


class MissingError(Exception):
    """A program or a part of the product that this measurement needs is not there."""


class System(Protocol):
    """A running system under measurement."""

    name: str
    uri: str

    def start(self) -> None:
        """Serve."""

    def settle(self) -> None:
        """Wait until everything written has reached the copy, so that nothing runs on."""

    def stop(self) -> None:
        """End, leaving nothing."""


def need(program: str) -> str:
    """Find a program.

    :raises MissingError: it is not installed.
    """
    found = shutil.which(program)
    if found is None:
        raise MissingError(f"no {program} (make install-deps)")
    return found


def make_image(path: Path, size: int) -> Path:
    """Make a file of real, allocated zeroes."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return path


def wait_for(what: str, ready: Any, seconds: float = 30.0) -> Any:
    """Poll until ``ready()`` gives something true, and give that.

    :raises TimeoutError: it did not within the time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := ready():
            return value
        time.sleep(0.02)
    raise TimeoutError(f"{what} did not happen within {seconds:g} s")


class Nbdkit:
    """nbdkit's file plugin: one write to one file, no mirror, in C."""

    name = "nbdkit file"

    def __init__(self, directory: Path, size: int) -> None:
        self._program = need("nbdkit")
        self._image = make_image(directory / "nbdkit.img", size)
        self._socket = directory / "nbdkit.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"nbd+unix:///?socket={self._socket}"

    def start(self) -> None:
        """Serve the file."""
        command = [self._program, "-f", "-U", str(self._socket), "file", str(self._image)]
        self._process = subprocess.Popen(command)
        wait_for("nbdkit's socket", self._socket.exists)

    def settle(self) -> None:
        """Nothing to wait for."""

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)


class QemuMirror:
    """qemu-storage-daemon with a mirror job to a second file.

    :param copy_mode: ``background`` (asynchronous) or ``write-blocking`` (synchronous).
    """

    def __init__(self, directory: Path, size: int, copy_mode: str) -> None:
        self._program = need("qemu-storage-daemon")
        self._mode = copy_mode
        self.name = f"qemu {copy_mode}"
        base = directory / f"qemu-{copy_mode}"
        self._images = [make_image(Path(f"{base}.{part}"), size) for part in ("src", "dst")]
        self._socket = Path(f"{base}.sock")
        self._monitor = Path(f"{base}.qmp")
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"nbd+unix:///x?socket={self._socket}"

    def start(self) -> None:
        """Export the source and start the job; returns when the mirror is in sync."""
        command = [self._program]
        for node, image in zip(("src", "dst"), self._images, strict=True):
            command += ["--blockdev", f"driver=file,node-name={node},filename={image}"]
        command += [
            *("--nbd-server", f"addr.type=unix,addr.path={self._socket}"),
            *("--export", "type=nbd,id=e,node-name=src,name=x,writable=on"),
            *("--chardev", f"socket,id=c,path={self._monitor},server=on,wait=off"),
            *("--monitor", "chardev=c"),
        ]
        self._process = subprocess.Popen(command)
        wait_for("qemu's monitor", self._monitor.exists)
        self._ask(
            "blockdev-mirror",
            **{"job-id": "m", "device": "src", "target": "dst", "sync": "full"},
            **{"copy-mode": self._mode},
        )
        wait_for("qemu's first mirror", lambda: self._job()["ready"], 120)

    def settle(self) -> None:
        """Wait until the job has copied what is dirty."""
        wait_for("qemu's mirror", lambda: self._job()["offset"] == self._job()["len"], 120)

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)

    def _job(self) -> dict[str, Any]:
        jobs = self._ask("query-block-jobs")
        if not jobs:
            raise MissingError("qemu's mirror job ended by itself")
        return dict(jobs[0])

    def _ask(self, command: str, **arguments: str) -> Any:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._monitor))
            with connection.makefile("rw") as lines:
                lines.readline()
                for name, values in (("qmp_capabilities", {}), (command, arguments)):
                    lines.write(json.dumps({"execute": name, "arguments": values}) + "\n")
                    lines.flush()
                    while "event" in (answer := json.loads(lines.readline())):
                        pass
                    if "error" in answer:
                        raise MissingError(f"qemu: {name}: {answer['error']['desc']}")
        return answer["return"]


class Lab:
    """qdsmirror: a lab of two sites on this machine, mirroring live over TLS.

    :param writelog: bytes; a benchmark that fills it measures the drain rate.
    :param overflow: what a full writelog leads to, ``block`` or ``bypass``.
    :param mode: its operation: ``async``, ``sync`` or ``near-sync``.
    """

    name = "qdsmirror"

    def __init__(
        self,
        directory: Path,
        size: int,
        writelog: int,
        name: str = "lab",
        overflow: str = "block",
        mode: str = "async",
    ) -> None:
        if mode != "async":
            self.name = f"{Lab.name} {mode}"
        self.directory = directory / name
        self.primary = self.directory / "primary"
        self.secondary = self.directory / "secondary"
        self._bin = Path(sys.executable).parent
        if not (self._bin / "qdslab").exists():
            raise MissingError("no qdslab beside this Python (make venv)")
        sizes = {"--size": size, "--writelog": writelog, "--journal": max(writelog, 128 * MIB)}
        options = [text for key, value in sizes.items() for text in (key, f"{value // MIB}M")]
        options += ["--overflow", overflow, "--mode", mode]
        self.tool("qdslab", "create", str(self.directory), *options)
        self.uri = ""

    def tool(self, name: str, *arguments: str, check: bool = True) -> str:
        """Run one of the product's commands and give what it printed.

        :raises MissingError: it failed (with its own words).
        """
        done = subprocess.run(
            [str(self._bin / name), *arguments], capture_output=True, text=True, timeout=900
        )
        if check and done.returncode:
            raise MissingError(f"{name} {' '.join(arguments)}: {done.stderr or done.stdout}")
        return done.stdout

    def at(self, site: Path, name: str, *arguments: str) -> str:
        """Run a command at one site."""
        return self.tool(name, *arguments, "--root", str(site))

    def group(self, site: Path | None = None) -> dict[str, Any]:
        """Give what qdsinfo says of the group at a site (default: the primary)."""
        answer = json.loads(self.at(site or self.primary, "qdsinfo", "--json"))
        return dict(answer["groups"][0])

    def start(self) -> None:
        """Start both sites; the mirror is made on return."""
        self.tool("qdslab", "start", str(self.directory))
        self.uri = str(self.group()["ldsus"][0]["nbd_uri"])

    def settle(self) -> None:
        """Wait until the mirror device has everything."""
        self.at(self.primary, "qdsinfo", "--wait", "drained", "--timeout", "300")

    def stop(self) -> None:
        """End and remove the lab."""
        self.tool("qdslab", "stop", str(self.directory), check=False)
        self.tool("qdslab", "destroy", str(self.directory), "--yes", check=False)


def processes(site: Path, names: Sequence[str]) -> dict[str, int]:
    """Give the pids that a site's pid files name, for those that run."""
    found = {}
    for name in names:
        path = site / "run" / f"{name}.pid"
        if path.exists() and (pid := int(path.read_text().split()[0])):
            found[name] = pid
    return found


def memory(pid: int) -> tuple[int, int]:
    """Give the resident memory of a process and its peak, in bytes (0: it is gone)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in status.splitlines())
    if "VmRSS" not in fields:
        return 0, 0  # It is ending.
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
