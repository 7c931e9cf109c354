"""Attaching without the kernel's NBD driver: nbdfuse shows the export as a file, losetup the rest.

Between nbdfuse and the device driver stands nbdkit with its retry filter: it opens the export
again when the device driver restarts, and the device waits meanwhile instead of failing.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from qdsmirror.errors import DeviceError
from qdsmirror.paths import Paths
from qdsmirror.tools.attach_state import (
    GONE_SECONDS,
    Attached,
    beside,
    directory,
    forget,
    is_linked,
    link,
    mount_points,
    refuse_in_use,
    run,
    unlink,
    wait,
    write_state,
)
from qdsmirror.tools.nbdclient import NbdClient

VIA = "fuse"
PROGRAMS = ("nbdfuse", "nbdkit", "losetup", "fusermount3")
READY_SECONDS = 20.0
_SECTOR_BYTES = 512


def missing_programs() -> list[str]:
    """Give what is not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


def attach(paths: Paths, name: str, uri: str, dead_seconds: int) -> Attached:
    """Make the device; the caller takes away what is left of it when this fails.

    :raises UnreachableError: nobody serves the export.
    :raises DeviceError: a step failed.
    """
    with NbdClient.connect(uri) as client:
        block = max(client.minimum_block, _SECTOR_BYTES)
    _mount_directory(paths, name).mkdir(mode=0o700, parents=True, exist_ok=True)
    state = write_state(paths, Attached(name, uri, VIA, 0, "", str(paths.dev / name)))
    state = write_state(paths, replace(state, keeper=_start(paths, name, uri, dead_seconds)))
    loop = run(
        *("losetup", "--find", "--show", "--direct-io=on", f"--sector-size={block}"),
        str(_file(paths, name)),
    ).strip()
    state = write_state(paths, replace(state, node=loop))
    link(Path(state.device), loop)
    return state


def detach(paths: Paths, state: Attached) -> None:
    """Take the device away; what is gone already is no error.

    :raises DeviceError: it is in use; nothing was taken away then.
    """
    name, loop = state.name, state.node
    if loop and _backed_by(loop, _file(paths, name)):
        refuse_in_use(name, loop)
        run("losetup", "--detach", loop)
        if not wait(lambda: not _backed_by(loop, _file(paths, name)), GONE_SECONDS):
            raise DeviceError(f"{name}: {loop} is still open", hint=f"fuser {loop}")
    unlink(state)
    place = _mount_directory(paths, name)
    # A mount whose nbdfuse died answers ENOTCONN to stat, so the table of mounts is asked.
    if str(place) in mount_points(Path("/proc/self/mountinfo").read_text()):
        run("fusermount3", "-u", str(place))
    if state.keeper and not wait(lambda: not is_kept(paths, state), GONE_SECONDS):
        raise DeviceError(f"{name}: nbdfuse (pid {state.keeper}) does not end", hint="qdsdetach")
    with contextlib.suppress(FileNotFoundError):
        place.rmdir()
    forget(paths, name)


def is_whole(paths: Paths, state: Attached) -> bool:
    """Tell whether nothing of the device is missing."""
    return (
        is_kept(paths, state)
        and _backed_by(state.node, _file(paths, state.name))
        and is_linked(state)
    )


def is_kept(paths: Paths, state: Attached) -> bool:
    """Tell whether the keeper is a living nbdfuse, not a zombie or a reused number."""
    try:
        text = Path(f"/proc/{state.keeper}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    command, _, rest = text.partition("(")[2].rpartition(")")
    return command == "nbdfuse" and rest.split()[0] != "Z"


def _start(paths: Paths, name: str, uri: str, dead_seconds: int) -> int:
    """Start nbdfuse in the background; return its pid once it serves."""
    ready = beside(paths, name, "pid")
    ready.unlink(missing_ok=True)
    retry = [f"retries={dead_seconds}", "retry-delay=1", "retry-exponential=no"]
    command = ["nbdfuse", "-P", str(ready), str(_file(paths, name))]
    command += ["[", "nbdkit", "--foreground", "--exit-with-parent", "--filter=retry"]
    command += ["nbd", f"uri={uri}", *retry, "]"]
    log = beside(paths, name, "log")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            start_new_session=True,
        )
    wait(lambda: process.poll() is not None or ready.exists(), READY_SECONDS)
    if process.poll() is None and ready.exists():
        return process.pid
    process.kill()
    process.wait()
    said = " ".join(log.read_text(errors="replace").split())[-300:]
    raise DeviceError(f"{name}: nbdfuse does not serve: {said}", hint=f"qdsinfo {name}")


def _mount_directory(paths: Paths, name: str) -> Path:
    return directory(paths) / name


def _file(paths: Paths, name: str) -> Path:
    return _mount_directory(paths, name) / name


def _backed_by(loop: str, file: Path) -> bool:
    """Tell whether a loop device exists and shows this file."""
    if not loop:
        return False
    try:
        shown = Path(f"/sys/block/{Path(loop).name}/loop/backing_file").read_text().rstrip("\n")
    except OSError:
        return False
    return shown.removesuffix(" (deleted)") == str(file)
