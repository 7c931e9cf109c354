"""What both ways of attaching share: the record of a device, its link, and who uses it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from qdsmirror.errors import DeviceError, QdsError
from qdsmirror.paths import Paths

GONE_SECONDS = 20.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Attached:
    """What is known of an attached LDSU; kept in ``run/attach/NAME.json``.

    :ivar uri: of the NBD export.
    :ivar via: ``nbd``, the kernel's driver, or ``fuse``: nbdfuse and a loop device.
    :ivar keeper: pid of what keeps the device: our keeper, or nbdfuse; 0 until there is one.
    :ivar node: the block device, ``""`` until there is one.
    :ivar device: the symbolic link to it.
    """

    name: str
    uri: str
    via: str
    keeper: int
    node: str
    device: str


def directory(paths: Paths) -> Path:
    """Give where the records are."""
    # Resolved, because the kernel tells backing files and mount points by their real paths.
    return Path(os.path.realpath(paths.run)) / "attach"


def beside(paths: Paths, name: str, suffix: str) -> Path:
    """Give a file that belongs to an attached LDSU; ``json`` is its record."""
    return directory(paths) / f"{name}.{suffix}"


def read_state(paths: Paths, name: str) -> Attached | None:
    """Give what is recorded of an LDSU, ``None`` when it is not attached.

    :raises QdsError: the record cannot be read.
    """
    where = beside(paths, name, "json")
    try:
        return Attached(**json.loads(where.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise QdsError(f"{where}: not a state of ours: {error}", hint=f"rm {where}") from None


def write_state(paths: Paths, state: Attached) -> Attached:
    """Record what is known of an LDSU; give it back."""
    where = beside(paths, state.name, "json")
    where.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = where.with_suffix(".new")
    new.write_text(json.dumps(asdict(state)) + "\n")
    os.replace(new, where)
    return state


def forget(paths: Paths, name: str) -> None:
    """Remove the record and what belongs to it."""
    for suffix in ("pid", "log", "json"):
        beside(paths, name, suffix).unlink(missing_ok=True)


# -- the link --------------------------------------------------------------------------------------


def link(device: Path, node: str) -> None:
    """Make the symbolic link; one that is left over is replaced.

    :raises DeviceError: something else is there.
    """
    device.parent.mkdir(parents=True, exist_ok=True)
    if device.exists() and not device.is_symlink():
        raise DeviceError(f"{device} exists and is not ours", hint=f"move {device} away")
    device.unlink(missing_ok=True)
    device.symlink_to(node)


def is_linked(state: Attached) -> bool:
    """Tell whether the symbolic link is there and leads to the device."""
    device = Path(state.device)
    return bool(state.node) and device.is_symlink() and os.readlink(device) == state.node


def unlink(state: Attached) -> None:
    """Remove the symbolic link unless it leads elsewhere."""
    if is_linked(state):
        Path(state.device).unlink()


# -- who uses it -----------------------------------------------------------------------------------


def refuse_in_use(name: str, node: str) -> None:
    """Make sure that a device is not mounted, not swap and not part of another device.

    :raises DeviceError: it is; the message names where.
    """
    number = os.stat(node).st_rdev
    text = Path("/proc/self/mountinfo").read_text()
    for place in mount_points(text, f"{os.major(number)}:{os.minor(number)}", node):
        raise DeviceError(f"{name}: {node} is mounted on {place}", hint=f"umount {place}")
    holders = sorted(os.listdir(f"/sys/block/{Path(node).name}/holders"))
    if holders:
        raise DeviceError(
            f"{name}: {node} is in use by {', '.join(holders)}", hint="take that down first"
        )
    if any(line.split()[0] == node for line in Path("/proc/swaps").read_text().splitlines()):
        raise DeviceError(f"{name}: {node} is swap space", hint=f"swapoff {node}")


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


# -- steps -----------------------------------------------------------------------------------------


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is true; tell whether it became so."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def run(*command: str) -> str:
    """Run a program; give its output.

    :raises DeviceError: it failed, with what it said.
    """
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        said = " ".join(result.stderr.split()) or f"exit status {result.returncode}"
        raise DeviceError(f"{command[0]}: {said}", hint="qdsdetach, then try again")
    return result.stdout
