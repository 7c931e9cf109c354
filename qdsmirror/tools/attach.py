"""``qdsattach`` and ``qdsdetach``: an LDSU as the block device ``/dev/qds/NAME``.

nbdfuse shows the LDSU's NBD export as a file and losetup makes a loop device of it.  Between
nbdfuse and the driver stands nbdkit with its retry filter: it opens the export again when the
driver restarts, and the device waits meanwhile instead of failing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdsmirror.config import load_groups, load_host
from qdsmirror.errors import EXIT_OK, ConfigError, DeviceError, QdsError
from qdsmirror.paths import Paths
from qdsmirror.tools import cli
from qdsmirror.tools.nbdclient import NbdClient
from qdsmirror.tools.status import nbd_uri

PROGRAMS = ("nbdfuse", "nbdkit", "losetup", "fusermount3")
DEAD_SECONDS_DEFAULT = 300
READY_SECONDS = 20.0
GONE_SECONDS = 20.0
_POLL_SECONDS = 0.02
_SECTOR_BYTES = 512


@dataclass(frozen=True)
class Attached:
    """What is known of an attached LDSU; kept in ``run/attach/NAME.json``.

    :ivar uri: of the NBD export.
    :ivar keeper: pid of nbdfuse.
    :ivar loop: the loop device, ``""`` until there is one.
    :ivar device: the symbolic link to it.
    """

    name: str
    uri: str
    keeper: int
    loop: str
    device: str


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of ``qdsattach``."""
    made = cli.parser("qdsattach", "Make LDSUs block devices: /dev/qds/NAME.", groups=True)
    made.add_argument(
        "--foreground",
        action="store_true",
        help="stay until interrupted, then detach (default: return and leave a keeper)",
    )
    made.add_argument(
        "--dead-timeout",
        metavar="S",
        type=int,
        default=DEAD_SECONDS_DEFAULT,
        help="how long the device waits for a driver that is gone before its I/O fails "
        f"(default: {DEAD_SECONDS_DEFAULT})",
    )
    return made


def build_detach_parser() -> argparse.ArgumentParser:
    """Make the parser of ``qdsdetach``."""
    return cli.parser("qdsdetach", "Take away the block devices of LDSUs.", groups=True)


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsattach``."""
    arguments = build_parser().parse_args(argv)
    _check_host("qdsattach")
    paths = cli.paths_of(arguments)
    stop = _on_signals() if arguments.foreground else None
    done = []
    for name, uri in _units(paths, arguments).items():
        done.append(attach(paths, name, uri, max(arguments.dead_timeout, 1)))
        if not arguments.json:
            print(f"{name}: {done[-1].device} -> {done[-1].loop}", flush=True)
    if arguments.json:
        cli.print_json({"attached": [asdict(one) for one in done]})
    if stop is not None:
        _stay(paths, done, stop)
    return EXIT_OK


@cli.run
def detach_main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsdetach``."""
    arguments = build_detach_parser().parse_args(argv)
    _check_host("qdsdetach")
    paths = cli.paths_of(arguments)
    known = {path.stem for path in _directory(paths).glob("*.json")}
    if arguments.names:
        wanted = set(arguments.names)
        if wanted - known:
            _units(paths, arguments)  # names that never were an LDSU's are refused
    else:
        wanted = known & set(_units(paths, arguments)) if arguments.numbers else known
    for name in sorted(wanted):
        detach(paths, name)
        if not arguments.json:
            print(f"{name}: detached")
    if arguments.json:
        cli.print_json({"detached": sorted(wanted)})
    return EXIT_OK


def attach(paths: Paths, name: str, uri: str, dead_seconds: int = DEAD_SECONDS_DEFAULT) -> Attached:
    """Make an LDSU a block device and return when it is ready; what is attached stays so.

    :param uri: of the LDSU's NBD export.
    :param dead_seconds: how long I/O waits for a driver that is gone.
    :raises UnreachableError: nobody serves the export.
    :raises DeviceError: a step failed, and the ones before it were undone; or an earlier keeper
        died and its device is still in use.
    """
    earlier = read_state(paths, name)
    if earlier is not None:
        if _is_whole(paths, earlier):
            return earlier
        detach(paths, name)
    with NbdClient.connect(uri) as client:
        block = max(client.minimum_block, _SECTOR_BYTES)
    _mount_directory(paths, name).mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        state = _write_state(paths, Attached(name, uri, 0, "", str(paths.dev / name)))
        keeper = _start_keeper(paths, name, uri, dead_seconds)
        state = _write_state(paths, Attached(name, uri, keeper, "", state.device))
        loop = _run(
            *("losetup", "--find", "--show", "--direct-io=on", f"--sector-size={block}"),
            str(_file(paths, name)),
        ).strip()
        state = _write_state(paths, Attached(name, uri, keeper, loop, state.device))
        _link(Path(state.device), loop)
    except (QdsError, OSError, KeyboardInterrupt):
        detach(paths, name)
        raise
    return state


def detach(paths: Paths, name: str) -> None:
    """Take an LDSU's block device away; what is gone already is no error.

    :raises DeviceError: it is mounted or otherwise in use; nothing was taken away then.
    """
    state = read_state(paths, name)
    if state is None:
        return
    device = Path(state.device)
    if state.loop and _backed_by(state.loop, _file(paths, name)):
        refuse_in_use(name, state.loop)
        _run("losetup", "--detach", state.loop)
        if not _wait(lambda: not _backed_by(state.loop, _file(paths, name)), GONE_SECONDS):
            raise DeviceError(f"{name}: {state.loop} is still open", hint=f"fuser {state.loop}")
    if device.is_symlink() and os.readlink(device) == state.loop:
        device.unlink()
    directory = _mount_directory(paths, name)
    # A mount whose nbdfuse died answers ENOTCONN to stat, so the table of mounts is asked.
    if str(directory) in mount_points(Path("/proc/self/mountinfo").read_text()):
        _run("fusermount3", "-u", str(directory))
    if state.keeper and not _wait(lambda: not _is_keeper(state.keeper), GONE_SECONDS):
        raise DeviceError(f"{name}: nbdfuse (pid {state.keeper}) does not end", hint="qdsdetach")
    with contextlib.suppress(FileNotFoundError):
        directory.rmdir()
    for suffix in ("pid", "log", "json"):
        _beside(paths, name, suffix).unlink(missing_ok=True)


def read_state(paths: Paths, name: str) -> Attached | None:
    """Give what is recorded of an LDSU, ``None`` when it is not attached."""
    try:
        return Attached(**json.loads(_beside(paths, name, "json").read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        where = _beside(paths, name, "json")
        raise QdsError(f"{where}: not a state of ours: {error}", hint=f"rm {where}") from None


def refuse_in_use(name: str, loop: str) -> None:
    """Make sure that a device is not mounted, not swap and not part of another device.

    :raises DeviceError: it is; the message names where.
    """
    number = os.stat(loop).st_rdev
    text = Path("/proc/self/mountinfo").read_text()
    for place in mount_points(text, f"{os.major(number)}:{os.minor(number)}", loop):
        raise DeviceError(f"{name}: {loop} is mounted on {place}", hint=f"umount {place}")
    holders = sorted(os.listdir(f"/sys/block/{Path(loop).name}/holders"))
    if holders:
        raise DeviceError(
            f"{name}: {loop} is in use by {', '.join(holders)}", hint="take that down first"
        )
    if any(line.split()[0] == loop for line in Path("/proc/swaps").read_text().splitlines()):
        raise DeviceError(f"{name}: {loop} is swap space", hint=f"swapoff {loop}")


def mount_points(mountinfo: str, number: str | None = None, source: str = "") -> Iterator[str]:
    """Give the mount points in the text of /proc/self/mountinfo (proc_pid_mountinfo(5)).

    :param number: only those of this MAJOR:MINOR, or of ``source`` or a partition of it.
    """
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        mounted = fields[fields.index("-") + 2]
        ours = number is None or fields[2] == number
        if ours or (source and (mounted == source or mounted.startswith(source + "p"))):
            yield fields[4].encode("latin-1").decode("unicode_escape")


# -- the steps -------------------------------------------------------------------------------------


def _start_keeper(paths: Paths, name: str, uri: str, dead_seconds: int) -> int:
    """Start nbdfuse in the background; return its pid once it serves."""
    ready = _beside(paths, name, "pid")
    ready.unlink(missing_ok=True)
    retry = [f"retries={dead_seconds}", "retry-delay=1", "retry-exponential=no"]
    command = ["nbdfuse", "-P", str(ready), str(_file(paths, name))]
    command += ["[", "nbdkit", "--foreground", "--exit-with-parent", "--filter=retry"]
    command += ["nbd", f"uri={uri}", *retry, "]"]
    log = _beside(paths, name, "log")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            start_new_session=True,
        )
    _wait(lambda: process.poll() is not None or ready.exists(), READY_SECONDS)
    if process.poll() is None and ready.exists():
        return process.pid
    process.kill()
    process.wait()
    said = " ".join(log.read_text(errors="replace").split())[-300:]
    raise DeviceError(f"{name}: nbdfuse does not serve: {said}", hint=f"qdsinfo {name}")


def _link(device: Path, loop: str) -> None:
    device.parent.mkdir(parents=True, exist_ok=True)
    if device.exists() and not device.is_symlink():
        raise DeviceError(f"{device} exists and is not ours", hint=f"move {device} away")
    device.unlink(missing_ok=True)
    device.symlink_to(loop)


def _stay(paths: Paths, attached: list[Attached], stop: Callable[[], bool]) -> None:
    """Wait for a signal, then detach."""
    while not stop():
        for one in attached:
            if not _is_keeper(one.keeper):
                raise DeviceError(f"{one.name}: nbdfuse has ended", hint=f"qdsdetach {one.name}")
        time.sleep(0.2)
    for one in attached:
        detach(paths, one.name)


def _on_signals() -> Callable[[], bool]:
    """Catch SIGINT and SIGTERM from now on; give what tells whether one came."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return lambda: bool(came)


# -- looking ---------------------------------------------------------------------------------------


def _check_host(command: str) -> None:
    """Refuse early where a device cannot be made.

    :raises QdsError: not root, or a program is missing.
    """
    if os.geteuid() != 0:
        raise QdsError(f"{command} makes block devices and needs root", hint=f"sudo {command} ...")
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise QdsError(
            f"{command} needs {', '.join(missing)}, not found in PATH",
            hint="on Debian: apt install nbdkit nbdfuse fuse3 mount",
        )


def _units(paths: Paths, arguments: argparse.Namespace) -> dict[str, str]:
    """Give the NBD URIs of the selected LDSUs by name; here an LDSU selects itself only."""
    host = load_host(paths)
    found = {}
    for group in cli.select_groups(arguments, load_groups(paths)):
        if group.role_of(host.name) == "primary":
            for ldsu in group.ldsus:
                if not arguments.names or ldsu.name in arguments.names:
                    found[ldsu.name] = nbd_uri(paths, group, ldsu)
        elif arguments.names or arguments.numbers:
            raise ConfigError(
                f"host {host.name} is not the primary of {group.name}",
                hint=f"run this on {group.primary_host}",
            )
    return found


def _directory(paths: Paths) -> Path:
    # Resolved, because the kernel tells backing files and mount points by their real paths.
    return Path(os.path.realpath(paths.run)) / "attach"


def _mount_directory(paths: Paths, name: str) -> Path:
    return _directory(paths) / name


def _file(paths: Paths, name: str) -> Path:
    return _mount_directory(paths, name) / name


def _beside(paths: Paths, name: str, suffix: str) -> Path:
    return _directory(paths) / f"{name}.{suffix}"


def _write_state(paths: Paths, state: Attached) -> Attached:
    where = _beside(paths, state.name, "json")
    new = where.with_suffix(".new")
    new.write_text(json.dumps(asdict(state)) + "\n")
    os.replace(new, where)
    return state


def _is_whole(paths: Paths, state: Attached) -> bool:
    device = Path(state.device)
    return (
        bool(state.loop)
        and _is_keeper(state.keeper)
        and _backed_by(state.loop, _file(paths, state.name))
        and device.is_symlink()
        and os.readlink(device) == state.loop
    )


def _is_keeper(pid: int) -> bool:
    """Tell whether a process is a living nbdfuse, not a zombie or a reused number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    command, _, rest = text.partition("(")[2].rpartition(")")
    return command == "nbdfuse" and rest.split()[0] != "Z"


def _backed_by(loop: str, file: Path) -> bool:
    """Tell whether a loop device exists and shows this file."""
    try:
        shown = Path(f"/sys/block/{Path(loop).name}/loop/backing_file").read_text().rstrip("\n")
    except OSError:
        return False
    return shown.removesuffix(" (deleted)") == str(file)


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        said = " ".join(result.stderr.split()) or f"exit status {result.returncode}"
        raise DeviceError(f"{command[0]}: {said}", hint="qdsdetach, then try again")
    return result.stdout
