"""``qdsattach`` and ``qdsdetach``: an LDSU as the block device ``/dev/qds/NAME``.

By the kernel's NBD driver where there is one, else by nbdfuse and a loop device.  Either way a
keeper stays, and the device waits while the device driver restarts instead of failing.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from qdsmirror.errors import DeviceError, QdsError
from qdsmirror.paths import Paths
from qdsmirror.tools import attach_fuse, attach_nbd, cli, progress
from qdsmirror.tools.attach_state import Attached, directory, read_state
from qdsmirror.tools.orders import primaries
from qdsmirror.tools.status import nbd_uri

DEAD_SECONDS_DEFAULT = 300
_WAYS: dict[str, Any] = {attach_nbd.VIA: attach_nbd, attach_fuse.VIA: attach_fuse}


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of ``qdsattach``."""
    made = cli.parser("qdsattach", "Make LDSUs block devices: /dev/qds/NAME.")
    cli.add_selection(made, "only these LDSUs")
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
    made.add_argument(
        "--via",
        choices=sorted(_WAYS),
        help="nbd: the kernel's NBD driver; fuse: nbdfuse and a loop device (default: nbd where "
        "the kernel has it)",
    )
    return made


def build_detach_parser() -> argparse.ArgumentParser:
    """Make the parser of ``qdsdetach``."""
    made = cli.parser("qdsdetach", "Take away the block devices of LDSUs.")
    cli.add_selection(made, "only these LDSUs")
    return made


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsattach``."""
    arguments = build_parser().parse_args(argv)
    _check_root("qdsattach")
    paths = cli.paths_of(arguments)
    units, failed = _units(paths, arguments)
    via = _way(arguments.via)
    stop = _on_signals() if arguments.foreground else None
    done = []
    for name, uri in units.items():
        try:
            with progress.waiting(arguments.json, name, "waiting until its device is ready"):
                done.append(attach(paths, name, uri, max(arguments.dead_timeout, 1), via))
        except QdsError as error:
            # The other devices are needed no less.
            failed.append(error)
            continue
        if not arguments.json:
            print(f"{name}: {done[-1].device} -> {done[-1].node}", flush=True)
    if arguments.json:
        cli.print_json({"attached": [asdict(one) for one in done], **cli.errors_json(failed)})
    code = cli.report_all(failed, arguments.json)
    if stop is not None and done:
        _stay(paths, done, stop)
    return code


@cli.run
def detach_main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsdetach``."""
    arguments = build_detach_parser().parse_args(argv)
    _check_root("qdsdetach")
    paths = cli.paths_of(arguments)
    known = {path.stem for path in directory(paths).glob("*.json")}
    failed: list[QdsError] = []
    if arguments.names:
        wanted = set(arguments.names)
        if wanted - known:
            _units(paths, arguments)  # names that never were an LDSU's are refused
    elif arguments.numbers:
        units, failed = _units(paths, arguments)
        wanted = known & set(units)
    else:
        wanted = known
    done = []
    for name in sorted(wanted):
        try:
            with progress.waiting(arguments.json, name, "waiting until its device is free"):
                detach(paths, name)
        except QdsError as error:
            failed.append(error)
            continue
        done.append(name)
        if not arguments.json:
            print(f"{name}: detached")
    if arguments.json:
        cli.print_json({"detached": done, **cli.errors_json(failed)})
    return cli.report_all(failed, arguments.json)


def attach(
    paths: Paths,
    name: str,
    uri: str,
    dead_seconds: int = DEAD_SECONDS_DEFAULT,
    via: str = attach_fuse.VIA,
) -> Attached:
    """Make an LDSU a block device and return when it is ready; what is attached stays so.

    A device of the kernel's NBD driver that has lost its keeper gets a new one.

    :param uri: of the LDSU's NBD export.
    :param dead_seconds: how long I/O waits for a driver that is gone.
    :param via: ``nbd`` or ``fuse``.
    :raises UnreachableError: nobody serves the export.
    :raises DeviceError: a step failed, and the ones before it were undone; or an earlier keeper
        died and its device is still in use.
    """
    earlier = read_state(paths, name)
    if earlier is not None:
        if _WAYS[earlier.via].is_whole(paths, earlier):
            return earlier
        if not earlier.via == via == attach_nbd.VIA:
            detach(paths, name)
            earlier = None
    try:
        made: Attached = _WAYS[via].attach(paths, name, uri, dead_seconds)
    except (QdsError, OSError, KeyboardInterrupt):
        # A device that only lacks its keeper may be mounted: it stays for the next try.
        if earlier is None:
            detach(paths, name)
        raise
    return made


def detach(paths: Paths, name: str) -> None:
    """Take an LDSU's block device away; what is gone already is no error.

    :raises DeviceError: it is mounted or otherwise in use; nothing was taken away then.
    """
    state = read_state(paths, name)
    if state is not None:
        _WAYS[state.via].detach(paths, state)


# -- the steps -------------------------------------------------------------------------------------


def _stay(paths: Paths, attached: list[Attached], stop: Callable[[], bool]) -> None:
    """Wait for a signal, then detach."""
    while not stop():
        for one in attached:
            if not _WAYS[one.via].is_kept(paths, one):
                raise DeviceError(f"{one.name}: its keeper has ended", f"qdsdetach {one.name}")
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


def _check_root(command: str) -> None:
    """Refuse early where a device cannot be made.

    :raises QdsError: not root.
    """
    if os.geteuid() != 0:
        raise QdsError(f"{command} makes block devices and needs root", hint=f"sudo {command} ...")


def _way(wanted: str | None) -> str:
    """Choose how to attach.

    :raises QdsError: this host has nothing to do it with.
    """
    if wanted != attach_fuse.VIA and attach_nbd.is_there():
        return attach_nbd.VIA
    if wanted == attach_nbd.VIA:
        raise QdsError("this kernel has no nbd driver, or shows none here", hint="modprobe nbd")
    missing = attach_fuse.missing_programs()
    if missing:
        raise QdsError(
            f"qdsattach needs the kernel's nbd module, or else {', '.join(missing)}, "
            "not found in PATH",
            hint="modprobe nbd; or on Debian: apt install nbdkit nbdfuse fuse3 mount",
        )
    return attach_fuse.VIA


def _units(paths: Paths, arguments: argparse.Namespace) -> tuple[dict[str, str], list[QdsError]]:
    """Give the NBD URIs of the selected LDSUs by name; here an LDSU selects itself only.

    :returns: and an error for each selected group whose file is broken.
    """
    groups, broken = primaries(paths, arguments)
    found = {
        ldsu.name: nbd_uri(paths, group, ldsu)
        for group in groups
        for ldsu in group.ldsus
        if not arguments.names or ldsu.name in arguments.names
    }
    return found, broken
