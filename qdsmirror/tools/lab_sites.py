"""A lab: a primary and a secondary on one machine, made and run by the product's own commands.

``DIR/primary`` and ``DIR/secondary`` are QDS_ROOTs with keys, certificates, configuration and
file-backed devices.  ``qdslab`` is the command around this module, ``make demo`` another user.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdsmirror import pki
from qdsmirror.config import GroupConfig, load_groups, load_host
from qdsmirror.core import ampbox
from qdsmirror.errors import ConfigError, DegradedError, QdsError, UnreachableError, UsageError
from qdsmirror.limits import (
    EXTENSIONS_PER_GROUP_MAX,
    GROUPS_MAX,
    KIB,
    LDSUS_PER_GROUP_MAX,
    MIB,
    WRITELOG_BYTES_MIN,
)
from qdsmirror.paths import Paths, group_name
from qdsmirror.pidfile import clear_stale, running_pid
from qdsmirror.tools import launch, refresh, status, wlinit
from qdsmirror.tools.orders import order

SITES = ("primary", "secondary")
DAEMONS = {"primary": ("qdsdriver", "qdspmd"), "secondary": ("qdsrmd",)}
_LAUNCHERS = {
    "primary": (launch.launchdriver, launch.launchpmds),
    "secondary": (launch.launchrmds,),
}
#: Ports are chosen below the range from which the kernel takes those of outgoing connections.
_PORTS = range(10240, 32768)
_PORT_TRIES = 100
_POLL_SECONDS = 0.1
#: A start gives up when nothing has moved for so long.
STUCK_SECONDS = 60.0
_MARK = "lab.json"
_SIZE_BYTES_MIN = 4 * KIB
_POOL_BYTES_MIN = 128 * KIB

Main = Callable[[Sequence[str] | None], int]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a lab is to have.

    :ivar groups: number of logical groups; ``ldsus`` of LDSUs in each.
    :ivar size: bytes of each LDSU; likewise ``writelog`` and ``journal``.
    :ivar port: of the rmd; ``None`` chooses a free one.
    :ivar overflow: ``on_overflow`` of every group.
    :ivar pool: number of devices in each group's extension pool, of ``pool_size`` bytes each.
    """

    groups: int = 1
    ldsus: int = 1
    size: int = 256 * MIB
    writelog: int = 64 * MIB
    journal: int = 128 * MIB
    port: int | None = None
    overflow: str = "block"
    pool: int = 0
    pool_size: int = 64 * MIB

    def check(self) -> None:
        """Look whether such a lab can be.

        :raises UsageError: a number is out of its range.
        """
        for name, value, low, high in (
            ("groups", self.groups, 1, GROUPS_MAX),
            ("ldsus", self.ldsus, 1, LDSUS_PER_GROUP_MAX),
            ("size", self.size, _SIZE_BYTES_MIN, 1 << 62),
            ("writelog", self.writelog, WRITELOG_BYTES_MIN, 1 << 62),
            ("journal", self.journal, WRITELOG_BYTES_MIN, 1 << 62),
            ("pool", self.pool, 0, EXTENSIONS_PER_GROUP_MAX),
            ("pool_size", self.pool_size, _POOL_BYTES_MIN, 1 << 62),
            ("port", self.port or 1, 1, 65535),
        ):
            if not low <= value <= high:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} {value} is not within {low} to {high}")


class Lab:
    """The lab in a directory.

    :param directory: DIR; it need not exist yet.
    :raises UsageError: the path is too long for the sockets below it.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory).absolute()
        self.paths = {site: Paths.of(self.directory / site) for site in SITES}

    # -- create and destroy ------------------------------------------------------------------------

    def create(self, plan: Plan) -> int:
        """Make both sites, with initialised writelogs and journals.

        :returns: the rmd's port.
        :raises QdsError: the directory is not empty, or something cannot be made; then nothing
            is left.
        """
        plan.check()
        if self.directory.exists() and any(self.directory.iterdir()):
            raise UsageError(
                f"{self.directory} is not empty", hint=f"qdslab destroy {self.directory} --yes"
            )
        port = plan.port or _free_port()
        existed = self.directory.exists()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._make(plan, port)
        except BaseException:
            self._remove(keep_directory=existed)
            raise
        return port

    def destroy(self) -> None:
        """Stop what runs, and remove the whole lab.

        :raises QdsError: an LDSU is still attached, or the directory holds no lab.
        """
        self._must_be()
        attached = sorted((self.paths["primary"].run / "attach").glob("*.json"))
        if attached:
            names = " ".join(path.stem for path in attached)
            root = self.paths["primary"].root
            raise QdsError(f"{names}: still attached", hint=f"qdsdetach --root {root} {names}")
        self.stop(SITES)
        self._remove(keep_directory=False)

    def _make(self, plan: Plan, port: int) -> None:
        _write(self.directory / _MARK, json.dumps({"schema": 1, "port": port}) + "\n")
        authority = self.directory / "pki"
        pki.make_hosts(authority, SITES, range(plan.groups))
        for site, paths in self.paths.items():
            for directory in (paths.etc, paths.var, paths.run, paths.dev, self.devices(site)):
                directory.mkdir(mode=0o700, parents=True)
            for made in sorted((authority / site).iterdir()):
                shutil.copy2(made, paths.etc / made.name)
            _write(paths.host_config, f"name = {site}\n")
        for number in range(plan.groups):
            names = [f"qds{number * plan.ldsus + index}" for index in range(plan.ldsus)]
            self._make_devices(plan, number, names)
            text = self._group_file(number, names, port, plan)
            for paths in self.paths.values():
                _write(paths.group_config(number), text)
        for paths in self.paths.values():
            _command(wlinit.main, paths)

    def devices(self, site: str) -> Path:
        """Give the directory of a site's devices."""
        return self.directory / site / "devices"

    def _make_devices(self, plan: Plan, number: int, names: Sequence[str]) -> None:
        near, far = self.devices("primary"), self.devices("secondary")
        _sparse(far / f"{group_name(number)}.journal", plan.journal)
        for spare in self._pool(number, plan):
            _sparse(spare, plan.pool_size)
        for name in names:
            _sparse(near / f"{name}.data", plan.size)
            _sparse(near / f"{name}.writelog", plan.writelog)
            _sparse(far / f"{name}.mirror", plan.size)

    def _pool(self, number: int, plan: Plan) -> list[Path]:
        near = self.devices("primary")
        return [near / f"{group_name(number)}.pool{index}" for index in range(plan.pool)]

    def _group_file(self, number: int, names: Sequence[str], port: int, plan: Plan) -> str:
        near, far = self.devices("primary"), self.devices("secondary")
        lines = ["operation = async", f"on_overflow = {plan.overflow}"]
        lines += ["[primary]", "host = primary", "address = 127.0.0.1"]
        lines += ["[secondary]", "host = secondary", "address = 127.0.0.1", f"port = {port}"]
        lines += [f"journal_device = {_quoted(far / (group_name(number) + '.journal'))}"]
        if plan.pool:
            spares = ", ".join(map(str, self._pool(number, plan)))
            lines += ["[pool]", f'devices = "{spares}"']
        lines += ["[ldsus]"]
        for name in names:
            lines += [
                f"  [[{name}]]",
                f"  data_device = {_quoted(near / (name + '.data'))}",
                f"  writelog_device = {_quoted(near / (name + '.writelog'))}",
                f"  mirror_device = {_quoted(far / (name + '.mirror'))}",
            ]
        return "\n".join(lines) + "\n"

    def _remove(self, keep_directory: bool) -> None:
        for name in (*SITES, "pki"):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        (self.directory / _MARK).unlink(missing_ok=True)
        if not keep_directory:
            with contextlib.suppress(OSError):
                self.directory.rmdir()

    def _must_be(self) -> None:
        if not (self.directory / _MARK).is_file():
            raise ConfigError(
                f"{self.directory} holds no lab", hint=f"qdslab create {self.directory}"
            )

    # -- start and stop ----------------------------------------------------------------------------

    def start(self, sites: Sequence[str], tell: Tell = lambda text: None) -> None:
        """Start the daemons of sites; with both running then, wait for coherent mirrors.

        What runs already is left alone; what a kill -9 left behind is cleared.  A group that
        never had a mirror gets its first full refresh.

        :param tell: told, in a line, how it goes.
        :raises QdsError: a daemon does not start, or a group does not become coherent.
        """
        self._must_be()
        for site in ("secondary", "primary"):
            if site in sites:
                self._launch(site)
        if set(sites) == set(SITES) or all(self._runs(site) for site in SITES):
            self.wait_coherent(tell)

    def stop(self, sites: Sequence[str]) -> None:
        """End the daemons of sites in order; what does not run is no error."""
        self._must_be()
        if "primary" in sites:
            _command(launch.killpmds, self.paths["primary"])
            _command(launch.killdriver, self.paths["primary"])
        if "secondary" in sites:
            _command(launch.killrmds, self.paths["secondary"])

    def _launch(self, site: str) -> None:
        self._clear(site)
        for main in _LAUNCHERS[site]:
            _command(main, self.paths[site])

    def _runs(self, site: str) -> bool:
        return all(self.pids(site).values())

    def _clear(self, site: str) -> None:
        """Remove pid files and sockets that killed daemons left."""
        if any(self.pids(site).values()):
            return
        run = self.paths[site].run
        for pid_file in run.glob("*.pid"):
            clear_stale(pid_file)
        for place in [*run.glob("*.ctl"), *run.glob("*.nbd")]:
            place.unlink(missing_ok=True)

    def wait_coherent(self, tell: Tell = lambda text: None) -> None:
        """Wait until every group is connected and coherent; begin its first refresh if needed.

        :raises QdsError: the link is refused, or nothing has moved for STUCK_SECONDS.
        """
        configs = load_groups(self.paths["primary"])
        show = refresh.lines(write=tell)
        moved, before = time.monotonic(), ""
        while True:
            groups = self.groups("primary")
            for group in groups:
                show(group)
            if all(_is_ready(group) for group in groups):
                return
            for group in groups:
                self._help(group, configs)
            for site in SITES:
                # One that was killed a moment ago may have looked alive when it was started.
                if not self._runs(site):
                    self._launch(site)
            now = json.dumps([[one["gsn"], one["refresh"], one["modes"]] for one in groups])
            if now != before:
                moved, before = time.monotonic(), now
            elif time.monotonic() - moved > STUCK_SECONDS:
                name = next(one["name"] for one in groups if not _is_ready(one))
                raise DegradedError(
                    f"{name} has not become connected and coherent",
                    hint=f"qdsinfo --root {self.paths['primary'].root}",
                )
            time.sleep(_POLL_SECONDS)

    def _help(self, group: status.Group, configs: Sequence[GroupConfig]) -> None:
        """Do what a group needs that is not ready: its first refresh.  Raise if it is refused."""
        status.raise_failure(group)
        linked = "connected" in group["modes"]
        if linked and group["coherent"] is False and group["refresh"] is None:
            config = next(one for one in configs if one.number == group["group"])
            with contextlib.suppress(DegradedError, UnreachableError):
                order(self.paths["primary"], config, "Refresh", kind="full")

    # -- looking -----------------------------------------------------------------------------------

    def pids(self, site: str) -> dict[str, int | None]:
        """Give the pids of a site's masters by name, ``None`` for one that does not run."""
        run = self.paths[site]
        return {name: running_pid(run.pid_file(name)) for name in DAEMONS[site]}

    def groups(self, site: str) -> list[status.Group]:
        """Give a site's group objects, as ``qdsinfo --json`` shows them."""
        paths = self.paths[site]
        return status.collect_groups(paths, load_host(paths).name, load_groups(paths))

    def report(self) -> dict[str, Any]:
        """Give what ``qdslab status --json`` prints, less the schema's number."""
        self._must_be()
        return {
            "lab": str(self.directory),
            "sites": [
                {
                    "site": site,
                    "root": str(self.paths[site].root),
                    "daemons": self.pids(site),
                    "groups": self.groups(site),
                }
                for site in SITES
            ],
        }


def _is_ready(group: status.Group) -> bool:
    return "connected" in group["modes"] and group["coherent"] is True and not group["refresh"]


def _command(main: Main, paths: Paths) -> None:
    """Run one of the product's commands on a site, quietly.

    :raises QdsError: what it reported.
    """
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main(["--json", *paths.arguments()])
    if code:
        try:
            told = json.loads(output.getvalue())["error"]
        except (ValueError, KeyError):
            raise QdsError(f"a command failed with exit code {code}: {output.getvalue()}") from None
        raise ampbox.decode_error(ampbox.dump_json(told))


def _free_port() -> int:
    """Choose a TCP port that nobody listens on.

    :raises QdsError: none was found.
    """
    for _ in range(_PORT_TRIES):
        port = random.choice(_PORTS)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    raise QdsError(f"no free TCP port found in {_PORT_TRIES} tries", hint="give one: --port PORT")


def _sparse(path: Path, size: int) -> None:
    with open(path, "xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(size)


def _write(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)


def _quoted(path: Path) -> str:
    return f'"{path}"'
