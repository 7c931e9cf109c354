"""qdswlinit(1): initialise writelogs at the primary, the secondary journal at the secondary.

Everything is opened and checked before anything is written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from qdsmirror.config import GroupConfig, load_groups, load_host
from qdsmirror.core.records import BoundUnit, Generation, layout
from qdsmirror.errors import ConfigError, DeviceError
from qdsmirror.limits import WRITELOG_BYTES_MIN, WRITELOG_BYTES_WARN
from qdsmirror.storage.device import open_device
from qdsmirror.storage.filedevice import FileDevice
from qdsmirror.storage.identity import Identity, identify
from qdsmirror.storage.latch import FailureLatch
from qdsmirror.storage.probe import OWN_NAME, probe_signature
from qdsmirror.storage.writelog import Writelog
from qdsmirror.tools import cli


@dataclass
class _Log:
    """A log to be made: on which device, for which LDSUs."""

    group: GroupConfig
    role: str
    device: FileDevice
    units: list[BoundUnit] = field(default_factory=list)

    def check_size(self) -> None:
        """Refuse a device that is too small for its superblocks and the least ring.

        :raises DeviceError: it is.
        """
        try:
            layout(self.device.size, len(self.units), self.device.physical_block)
        except DeviceError as error:
            raise DeviceError(
                f"{self.device.role} {self.device.path}: {error.message}", hint=error.hint
            ) from error


class _Devices:
    """Opens the devices of this run, each for one use alone.

    :param opened: closes them.
    """

    def __init__(self, opened: ExitStack) -> None:
        self._opened = opened
        self._uses: dict[Identity, str] = {}

    def open(self, path: str, role: str, minimum_bytes: int = 1) -> FileDevice:
        """Open and lock a device.

        :raises DeviceError: it is missing, in use, too small, or here for something else already.
        """
        try:
            use = self._uses.get(identify(path))
        except OSError:
            use = None  # open_device says what is wrong
        if use is not None:
            raise DeviceError(
                f"{role} {path} is the same device as the {use}",
                hint="name different devices in the group files",
            )
        device = open_device(path, writable=True, role=role, minimum_bytes=minimum_bytes)
        self._opened.callback(device.close)
        self._uses[device.identity] = f"{role} {path}"
        return device


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of qdswlinit."""
    parser = cli.parser(
        "qdswlinit",
        "Initialise the writelogs (at the primary) or the journal (at the secondary) of groups.",
        groups=True,
    )
    parser.add_argument(
        "--yes",
        action="store_true",
        help="also where a device holds something already, which is lost",
    )
    return parser


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Initialise, and say what was initialised."""
    arguments = build_parser().parse_args(argv)
    paths = cli.paths_of(arguments)
    host = load_host(paths)
    groups = cli.select_groups(arguments, load_groups(paths))
    with ExitStack() as opened:
        devices = _Devices(opened)
        logs: list[_Log] = []
        for group in groups:
            if host.name == group.primary_host:
                cli.refuse_beside_daemon(paths, group, "driver")
                logs += _writelogs(group, devices, arguments.yes)
            if host.name == group.secondary_host:
                cli.refuse_beside_daemon(paths, group, "rmd")
                logs.append(_journal(group, devices, arguments.yes))
        if not logs:
            raise ConfigError(
                f"{host.name} is neither primary nor secondary of the groups selected",
                hint="compare `name` in qds.cfg with `host` in the group files",
            )
        for log in logs:
            log.check_size()
        made = _initialise(logs)
        for number in {log.group.number for log in logs}:
            FailureLatch(paths.state_file(number)).clear()
    if arguments.json:
        cli.print_json({"initialised": made})
    else:
        for one in made:
            print(f"{one['group']}: {one['role']} {one['device']} initialised, {one['size']} bytes")
    return 0


def _initialise(logs: Sequence[_Log]) -> list[dict[str, Any]]:
    for log in logs:
        # A log that runs out of space under load would fail its LDSU.
        with cli.naming(
            f"{log.device.role} {log.device.path}: cannot allocate its {log.device.size} bytes"
        ):
            log.device.preallocate()
    generations: dict[tuple[int, str], bytes] = {}
    made = []
    for log in logs:
        generation = generations.setdefault((log.group.number, log.role), os.urandom(16))
        with cli.naming(f"{log.device.role} {log.device.path}"):
            Writelog.initialise(
                log.device,
                role=log.role,
                group=log.group.number,
                units=log.units,
                # A journal is blank until a primary begins its history.
                generations=[Generation(generation, 1)] if log.role == "writelog" else [],
            )
        made.append(
            {
                "group": log.group.name,
                "role": log.role,
                "device": log.device.path,
                "size": log.device.size,
            }
        )
    return made


def _writelogs(group: GroupConfig, devices: _Devices, consent: bool) -> list[_Log]:
    logs = []
    for ldsu in group.ldsus:
        data = devices.open(ldsu.data_device, f"data device of {ldsu.name}")
        if probe_signature(data) == OWN_NAME:
            raise DeviceError(
                f"data device {data.path} of {ldsu.name} holds a writelog or journal",
                hint=f"name the right device in {group.path}",
            )
        log = devices.open(ldsu.writelog_device, f"writelog of {ldsu.name}", WRITELOG_BYTES_MIN)
        _check_unused(log, f"writelog of {ldsu.name}", consent)
        if log.size < WRITELOG_BYTES_WARN:
            print(
                f"warning: writelog {log.path} has only {log.size} bytes; "
                f"{WRITELOG_BYTES_WARN} or more are advised",
                file=sys.stderr,
            )
        unit = BoundUnit(ldsu.index, ldsu.name, data.size, ldsu.data_device)
        logs.append(_Log(group, "writelog", log, [unit]))
    return logs


def _journal(group: GroupConfig, devices: _Devices, consent: bool) -> _Log:
    units = []
    for ldsu in group.ldsus:
        mirror = devices.open(ldsu.mirror_device, f"mirror device of {ldsu.name}")
        _check_unused(mirror, f"mirror device of {ldsu.name}", consent)
        units.append(BoundUnit(ldsu.index, ldsu.name, mirror.size, ldsu.mirror_device))
    journal = devices.open(group.journal_device, f"journal of {group.name}", WRITELOG_BYTES_MIN)
    _check_unused(journal, f"journal of {group.name}", consent)
    return _Log(group, "journal", journal, units)


def _check_unused(device: FileDevice, role: str, consent: bool) -> None:
    found = probe_signature(device)
    if found is None or consent:
        return
    what = "a writelog or journal of qdsmirror" if found == OWN_NAME else f"something: {found}"
    raise DeviceError(
        f"{role} {device.path} already holds {what}",
        hint="if it may be overwritten, say so with --yes",
    )
