"""A lab: sites on one machine, made and run by the product's own commands.

``DIR/primary``, ``DIR/secondary`` (and ``DIR/secondary2`` ...) are QDS_ROOTs with keys,
certificates, configuration and file-backed devices.  ``qdslab`` is the command around this module,
``make demo`` another user.
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
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from qdsmirror.config import load_group, load_groups, load_host
from qdsmirror.core import ampbox
from qdsmirror.core.jsontext import dump_json
from qdsmirror.errors import ConfigError, DegradedError, QdsError, UnreachableError, UsageError
from qdsmirror.limits import MIB
from qdsmirror.paths import Paths, group_name
from qdsmirror.pidfile import clear_stale, running_pid
from qdsmirror.tools import launch, progress, status, wlinit
from qdsmirror.tools.lab_plan import CONSOLE, PRIMARY, Layout, Plan
from qdsmirror.tools.orders import order

#: In the order in which daemons are started: those that are connected to come first.
_LAUNCHERS = {
    "qdsrmd": launch.launchrmds,
    "qdsdriver": launch.launchdriver,
    "qdspmd": launch.launchpmds,
    CONSOLE: launch.launchconsole,
}
#: The driver first: what is in memory only is still sent then.
_KILLERS = {
    "qdsdriver": launch.killdriver,
    "qdspmd": launch.killpmds,
    "qdsrmd": launch.killrmds,
    CONSOLE: launch.killconsole,
}
#: Ports are chosen below the range from which the kernel takes those of outgoing connections.
_PORTS = range(10240, 32768)
_PORT_TRIES = 100
_POLL_SECONDS = 0.1
#: A start gives up when nothing has moved for so long.
STUCK_SECONDS = 120.0
_MARK = "lab.json"
#: Of the bitmap device of a writelog in memory.
_BITMAP_BYTES = MIB

Main = Callable[[Sequence[str] | None], int]
Tell = Callable[[str], None]


class Lab:
    """The lab in a directory.

    :param directory: DIR; it need not exist yet.
    :ivar layout: which sites it has.
    :ivar paths: the sites' places, by name.
    :ivar ports: the rmds' TCP ports, by site; ``consoles``: likewise the consoles'.
    :raises UsageError: the path is too long for the sockets below it.
    :raises ConfigError: the lab is not one that this version made.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory).absolute()
        self.ports: dict[str, int] = {}
        self.consoles: dict[str, int] = {}
        self._lay_out(Layout())
        if self._is():
            try:
                words = json.loads((self.directory / _MARK).read_text(encoding="utf-8"))
                self.ports = dict(words["ports"])
                self.consoles = dict(words.get("consoles", {}))
                self._lay_out(Layout.from_json(words))
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"{self.directory / _MARK} is not this version's",
                    hint=f"end its daemons, remove {self.directory}, and create it again",
                ) from None

    def _lay_out(self, layout: Layout) -> None:
        self.layout = layout
        self.paths = {site: Paths.of(self.directory / site) for site in layout.sites}

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites."""
        return self.layout.sites

    # -- create and destroy ------------------------------------------------------------------------

    def create(self, plan: Plan) -> int:
        """Make all sites, with initialised writelogs and journals.

        :returns: the first rmd's port.
        :raises QdsError: the directory is not empty, or something cannot be made; then nothing
            is left.
        """
        plan.check()
        if self.directory.exists() and any(self.directory.iterdir()):
            raise UsageError(
                f"{self.directory} is not empty", hint=f"qdslab destroy {self.directory} --yes"
            )
        self._lay_out(Layout.of(plan))
        listening = [site for site in self.sites if "qdsrmd" in self.layout.daemons(site)]
        # The secondary's is the first.
        listening.sort(key=lambda site: site == PRIMARY)
        self.ports = dict(zip(listening, _ports(plan.port, len(listening)), strict=True))
        if plan.console:
            self.consoles = dict(zip(self.sites, _ports(None, len(self.sites)), strict=True))
        existed = self.directory.exists()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._make(plan)
        except BaseException:
            self._remove(keep_directory=existed)
            raise
        return self.ports[listening[0]]

    def used_bytes(self) -> int:
        """Give how much room the lab's files take.

        :raises QdsError: the directory holds no lab.
        """
        self._must_be()
        files = (path for path in self.directory.rglob("*") if not path.is_symlink())
        return sum(path.stat().st_blocks * 512 for path in files if path.is_file())

    def destroy(self) -> None:
        """Stop what runs, and remove the whole lab.

        :raises QdsError: an LDSU is still attached, or the directory holds no lab.
        """
        self._must_be()
        for paths in self.paths.values():
            attached = sorted((paths.run / "attach").glob("*.json"))
            if attached:
                names = " ".join(path.stem for path in attached)
                hint = f"qdsdetach --root {paths.root} {names}"
                raise QdsError(f"{names}: still attached", hint=hint)
        self.stop(self.sites)
        self._remove(keep_directory=False)

    def _make(self, plan: Plan) -> None:
        ports = {"ports": self.ports, "consoles": self.consoles}
        words = {"schema": 1, **ports, **self.layout.to_json()}
        _write(self.directory / _MARK, json.dumps(words) + "\n")
        from qdsmirror import pki

        authority = self.directory / "pki"
        pki.make_hosts(authority, self.sites, [])
        for number in range(plan.groups):
            # Each host has the secrets of its own groups only.
            pki.make_hosts(authority, self.layout.ends(number), [number])
        for site, paths in self.paths.items():
            for directory in (paths.etc, paths.var, paths.run, paths.dev, self.devices(site)):
                directory.mkdir(mode=0o700, parents=True)
            for made in sorted((authority / site).iterdir()):
                shutil.copy2(made, paths.etc / made.name)
            _write(paths.host_config, self._host_file(site))
        for number in range(plan.groups):
            names = [f"qds{number * plan.ldsus + index}" for index in range(plan.ldsus)]
            self._make_devices(plan, number, names)
            text = self._group_file(number, names, plan)
            for site in self.layout.ends(number):
                _write(self.paths[site].group_config(number), text)
        for paths in self.paths.values():
            _command(wlinit.main, paths)

    def _host_file(self, site: str) -> str:
        lines = [f"name = {site}"]
        if self.layout.console:
            lines += [f"console = 127.0.0.1:{self.consoles[site]}"]
        return "\n".join(lines) + "\n"

    def devices(self, site: str) -> Path:
        """Give the directory of a site's devices."""
        return self.directory / site / "devices"

    def _make_devices(self, plan: Plan, number: int, names: Sequence[str]) -> None:
        near, far = map(self.devices, self.layout.ends(number))
        _sparse(far / f"{group_name(number)}.journal", plan.journal)
        for spare in self._pool(number, plan):
            _sparse(spare, plan.pool_size)
        for name in names:
            _sparse(near / f"{name}.data", plan.size)
            if plan.memory:
                _sparse(near / f"{name}.bitmap", _BITMAP_BYTES)
            else:
                _sparse(near / f"{name}.writelog", plan.writelog)
            _sparse(far / f"{name}.mirror", plan.size)

    def _pool(self, number: int, plan: Plan) -> list[Path]:
        near = self.devices(self.layout.ends(number)[0])
        return [near / f"{group_name(number)}.pool{index}" for index in range(plan.pool)]

    def _group_file(self, number: int, names: Sequence[str], plan: Plan) -> str:
        primary, secondary = self.layout.ends(number)
        near, far, port = self.devices(primary), self.devices(secondary), self.ports[secondary]
        lines = [f"operation = {plan.mode}", f"on_overflow = {plan.overflow}"]
        lines += ["[primary]", f"host = {primary}", "address = 127.0.0.1"]
        lines += ["[secondary]", f"host = {secondary}", "address = 127.0.0.1", f"port = {port}"]
        lines += [f"journal_device = {_quoted(far / (group_name(number) + '.journal'))}"]
        if plan.pool:
            spares = ", ".join(map(str, self._pool(number, plan)))
            lines += ["[pool]", f'devices = "{spares}"']
        lines += ["[ldsus]"]
        for name in names:
            lines += [
                f"  [[{name}]]",
                f"  data_device = {_quoted(near / (name + '.data'))}",
                *_writelog(near, name, plan),
                f"  mirror_device = {_quoted(far / (name + '.mirror'))}",
            ]
        return "\n".join(lines) + "\n"

    def _remove(self, keep_directory: bool) -> None:
        for name in (*self.sites, "pki"):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        (self.directory / _MARK).unlink(missing_ok=True)
        if not keep_directory:
            with contextlib.suppress(OSError):
                self.directory.rmdir()

    def _is(self) -> bool:
        return (self.directory / _MARK).is_file()

    def _must_be(self) -> None:
        if not self._is():
            raise ConfigError(
                f"{self.directory} holds no lab", hint=f"qdslab create {self.directory}"
            )

    # -- start and stop ----------------------------------------------------------------------------

    def start(
        self,
        sites: Sequence[str],
        tell: Tell = lambda text: None,
        show: progress.Show | None = None,
    ) -> None:
        """Start the daemons of sites; wait for coherent mirrors of groups with both sites running.

        What runs already is left alone; what a kill -9 left behind is cleared.  A group that
        never had a mirror gets its first full refresh.

        :param tell: told, in a line, how it goes.
        :param show: shows instead how far the groups are.
        :raises QdsError: a daemon does not start, or a group does not become coherent.
        """
        self._must_be()
        self._launch(sites)
        # One that was killed a moment ago may have looked alive.
        running = [one for one in self.sites if one in sites or self._runs(one)]
        self.wait_coherent(running, show or progress.group_lines(write=tell))

    def stop(self, sites: Sequence[str]) -> None:
        """End the daemons of sites in order; what does not run is no error."""
        self._must_be()
        for name, killer in _KILLERS.items():
            for site in sites:
                if name in self.layout.daemons(site):
                    _command(killer, self.paths[site])

    def _launch(self, sites: Sequence[str]) -> None:
        for site in sites:
            self._clear(site)
        for name, launcher in _LAUNCHERS.items():
            for site in sites:
                if name in self.layout.daemons(site):
                    _command(launcher, self.paths[site])

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

    def wait_coherent(self, sites: Sequence[str], show: progress.Show) -> None:
        """Wait until every group of these sites alone is connected and coherent.

        A group that never had a mirror gets its first full refresh, a master that is gone is
        started again.

        :raises QdsError: a link is refused, or nothing has moved for STUCK_SECONDS.
        """
        numbers = {
            number
            for number in range(self.layout.groups)
            if set(self.layout.ends(number)) <= set(sites)
        }
        moved, before = time.monotonic(), ""
        while numbers:
            groups = self._mirrored(sites, numbers)
            for _, group in groups:
                show(group)
            waiting = [(site, group) for site, group in groups if not _is_ready(group)]
            if not waiting:
                return
            for site, group in groups:
                self._help(site, group)
            self._launch([site for site in sites if not self._runs(site)])
            now = json.dumps([[one["gsn"], one["refresh"], one["modes"]] for _, one in groups])
            if now != before:
                moved, before = time.monotonic(), now
            elif time.monotonic() - moved > STUCK_SECONDS:
                site, group = waiting[0]
                raise DegradedError(
                    f"{group['name']} has not become connected and coherent",
                    hint=f"qdsinfo --root {self.paths[site].root}",
                )
            time.sleep(_POLL_SECONDS)

    def _mirrored(
        self, sites: Sequence[str], numbers: Container[int]
    ) -> list[tuple[str, status.Group]]:
        """Give groups with their primary's site, as that sees them."""
        return [
            (site, group)
            for site in sites
            for group in self.groups(site)
            if group["role"] == PRIMARY and group["group"] in numbers
        ]

    def _help(self, site: str, group: status.Group) -> None:
        """Do what a group needs that is not ready, or raise if it is refused.

        That is its first refresh, or one after its writelogs in memory were lost.
        """
        bypass = group.get("bypass")
        if bypass is not None and bypass["lost"]:
            paths = self.paths[site]
            with contextlib.suppress(DegradedError, UnreachableError):
                order(paths, load_group(paths, group["group"]), "Refresh", kind="auto")
            return
        status.raise_failure(group)
        linked = "connected" in group["modes"]
        if linked and group["coherent"] is False and group["refresh"] is None:
            paths = self.paths[site]
            with contextlib.suppress(DegradedError, UnreachableError):
                order(paths, load_group(paths, group["group"]), "Refresh", kind="full")

    # -- looking -----------------------------------------------------------------------------------

    def pids(self, site: str) -> dict[str, int | None]:
        """Give the pids of a site's masters by name, ``None`` for one that does not run."""
        run = self.paths[site]
        return {name: running_pid(run.pid_file(name)) for name in self.layout.daemons(site)}

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
                for site in self.sites
            ],
        }


def _writelog(near: Path, name: str, plan: Plan) -> list[str]:
    if not plan.memory:
        return [f"  writelog_device = {_quoted(near / (name + '.writelog'))}"]
    return [
        f"  writelog_device = memory:{plan.writelog}",
        f"  bitmap_device = {_quoted(near / (name + '.bitmap'))}",
    ]


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
        raise ampbox.decode_error(dump_json(told))


def _ports(first: int | None, count: int) -> list[int]:
    """Choose TCP ports: from the first on, or such that nobody listens on.

    :raises UsageError: there are not so many from the first on.
    :raises QdsError: none was found.
    """
    if first is not None:
        if first + count > 1 << 16:
            raise UsageError(f"--port {first} leaves no room for {count} ports")
        return list(range(first, first + count))
    chosen: list[int] = []
    for _ in range(_PORT_TRIES + count):
        port = random.choice(_PORTS)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            chosen += [port] if port not in chosen else []
        if len(chosen) == count:
            return chosen
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
