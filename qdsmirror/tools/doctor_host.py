"""What ``qdsdoctor`` finds of the host: files, space, clock, kernel, unit files, ports."""

from __future__ import annotations

import ctypes
import os
import platform
import pwd
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from qdsmirror.config import GroupConfig, HostConfig
from qdsmirror.core.findings import Finding, advice, error, warning
from qdsmirror.errors import EXIT_UNREACHABLE
from qdsmirror.limits import MIB
from qdsmirror.paths import Paths
from qdsmirror.pidfile import running_pid
from qdsmirror.tools import attach_fuse
from qdsmirror.tools.units import outdated

#: Logs, state and performance files need so much at least ...
SPACE_BYTES_MIN = 4 * MIB
#: ... and should have so much.
SPACE_BYTES_WARN = 64 * MIB
_INODES_MIN = 64

_DAEMONS = {"primary": ("qdsdriver", "qdspmd"), "secondary": ("qdsrmd",)}
#: Where systemd looks for units, the most telling first.
UNIT_DIRECTORIES = (
    Path("/etc/systemd/system"),
    Path("/run/systemd/system"),
    Path("/usr/local/lib/systemd/system"),
    Path("/usr/lib/systemd/system"),
    Path("/lib/systemd/system"),
)
#: It exists where systemd is the init system (sd_booted(3)).
_SYSTEMD = Path("/run/systemd/system")
_TCP_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTEN = "0A"
_SYSTEMCTL_SECONDS = 10.0

#: adjtimex(2): the clock is not synchronised.
_TIME_ERROR = 5
_STA_UNSYNC = 0x40


# -- files and space -------------------------------------------------------------------------------


def examine_files(
    paths: Paths, host: HostConfig | None, groups: list[GroupConfig]
) -> Iterator[Finding]:
    """Tell of files and directories that others may change, or that the daemons may not use."""
    configs = [paths.host_config, *(group.path for group in groups)]
    for path in (paths.etc, *configs):
        mode = _mode(path)
        if mode is not None and mode & 0o022:
            told = f"{path}: mode {stat.S_IMODE(mode):04o} lets others change it"
            yield warning("files", told, f"chmod go-w {path}")
    for key in sorted(paths.etc.glob("ca.key")):
        told = f"{key}: who has the authority's key can pass for any host; it belongs on none"
        yield warning("files", told, f"move it off this host, and: shred -u {key}")
    uid = _uid(host)
    for directory in (paths.var, paths.run):
        mode = _mode(directory)
        if mode is None:
            continue
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            told = f"{directory}: mode {stat.S_IMODE(mode):04o} lets anybody replace its files"
            yield warning("files", told, f"chmod o-w {directory}")
        if uid and directory.stat().st_uid != uid and not os.access(directory, os.W_OK):
            told = f"{directory} does not belong to {host.user if host else ''}, who is to write it"
            yield error("files", told, f"chown -R {host.user if host else ''} {directory}")


def _uid(host: HostConfig | None) -> int | None:
    try:
        return pwd.getpwnam(host.user).pw_uid if host is not None and host.user else None
    except KeyError:
        return None


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except OSError:
        return None


def examine_space(directories: Iterable[Path]) -> Iterator[Finding]:
    """Tell of file systems that are full, or nearly so; each once."""
    seen: set[int] = set()
    for directory in directories:
        try:
            device, file_system = directory.stat().st_dev, os.statvfs(directory)
        except OSError:
            continue
        if device in seen:
            continue
        seen.add(device)
        free = file_system.f_bavail * file_system.f_frsize
        inodes = file_system.f_files and file_system.f_favail < _INODES_MIN
        step = f"df -h {directory}; du -xh {directory} | sort -h | tail"
        if free < SPACE_BYTES_MIN or inodes:
            what = "inodes" if inodes and free >= SPACE_BYTES_MIN else "space"
            told = (
                f"{directory}: no {what} left ({free} bytes free): logs and the state of failed "
                "devices cannot be written"
            )
            yield error("space", told, step)
        elif free < SPACE_BYTES_WARN:
            yield warning("space", f"{directory}: only {free} bytes are free", step)


# -- clock, kernel, units --------------------------------------------------------------------------


def clock_is_synchronised() -> bool | None:
    """Ask the kernel whether something keeps its clock right; ``None``: it does not say."""
    # struct timex begins with `unsigned int modes`, then five longs' width before `int status`.
    buffer = ctypes.create_string_buffer(512)
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    if state < 0:
        return None
    status = ctypes.c_int.from_buffer(buffer, 5 * ctypes.sizeof(ctypes.c_long)).value
    return state != _TIME_ERROR and not status & _STA_UNSYNC


def examine_clock(synchronised: bool | None) -> Iterator[Finding]:
    """Tell of a clock that nothing keeps right."""
    if synchronised is False:
        told = "the clock of this host is not synchronised: logs of two hosts are hard to compare"
        yield advice("clock", told, "timedatectl set-ntp true; then: timedatectl status")


def kernel_has_nbd(
    modules: Path = Path("/sys/module"), libraries: Path = Path("/lib/modules")
) -> bool | None:
    """Tell whether the kernel has its NBD driver: loaded (``True``), to be loaded, or not."""
    if (modules / "nbd").exists():
        return True
    release = libraries / platform.release()
    names = ("modules.dep", "modules.builtin")
    for name in names:
        try:
            if "/nbd.ko" in (release / name).read_text(errors="replace"):
                return False
        except OSError:
            continue
    return None


def examine_kernel(nbd: bool | None) -> Iterator[Finding]:
    """Tell how LDSUs become block devices here."""
    if nbd is False:
        told = "the kernel's nbd driver is there, but not loaded; qdsattach loads it"
        step = "modprobe nbd; at boot: echo nbd > /etc/modules-load.d/nbd.conf"
        yield advice("kernel", told, step)
    elif nbd is None:
        missing = attach_fuse.missing_programs()
        told = "this kernel has no nbd driver: LDSUs become block devices through FUSE, slower"
        step = "modprobe nbd; or take a kernel that has it (CONFIG_BLK_DEV_NBD)"
        if missing:
            told = (
                f"this kernel has no nbd driver, and {', '.join(missing)} are not installed: "
                "qdsattach cannot make block devices of LDSUs"
            )
            step = "modprobe nbd; or on Debian: apt install nbdkit nbdfuse fuse3 mount"
        yield advice("kernel", told, step)


def examine_units(
    roles: Iterable[str], directories: Iterable[Path] = UNIT_DIRECTORIES, booted: bool | None = None
) -> Iterator[Finding]:
    """Tell of daemons that nothing starts at boot.

    :param roles: ``primary``, ``secondary``.
    :param booted: whether systemd runs this host; default: look.
    """
    if not (_SYSTEMD.is_dir() if booted is None else booted):
        return
    places = list(directories)
    for name in dict.fromkeys(one for role in roles for one in _DAEMONS[role]):
        units = [place / f"{name}.service" for place in places]
        if not any(unit.exists() for unit in units):
            told = f"{name}.service is not installed: nothing starts {name} at boot"
            step = (
                f"install conf/systemd/{name}.* of the distribution to /etc/systemd/system, "
                f"then: systemctl enable --now {name}"
            )
            yield advice("units", told, step)
        elif not any(list(place.glob(f"*.wants/{name}.*")) for place in places):
            told = f"{name}.service is not enabled: nothing starts {name} at boot"
            yield warning("units", told, f"systemctl enable --now {name}")


def examine_drop_ins(
    host: str,
    groups: Iterable[GroupConfig],
    directories: Iterable[Path] = UNIT_DIRECTORIES,
    booted: bool | None = None,
) -> Iterator[Finding]:
    """Tell of devices that a unit does not let its daemon open.

    :param host: this host's name.
    :param directories: as for :func:`examine_units`; likewise ``booted``.
    """
    if not (_SYSTEMD.is_dir() if booted is None else booted):
        return
    for service, path in outdated(host, groups, directories):
        told = f"{service}.service does not let {service} use {path}"
        step = "qdsconfigtool units --out /etc/systemd/system && systemctl daemon-reload, then "
        yield warning("units", told, f"{step}systemctl restart {service}")


# -- ports -----------------------------------------------------------------------------------------


def listening_ports(tables: Iterable[Path] = _TCP_TABLES) -> frozenset[int]:
    """Give the TCP ports that somebody listens on, on any address."""
    found = set()
    for table in tables:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            # sl local_address rem_address st ...
            fields = line.split()
            if len(fields) > 3 and fields[3] == _LISTEN:
                found.add(int(fields[1].rpartition(":")[2], 16))
    return frozenset(found)


def systemd_ports() -> frozenset[int]:
    """Ask systemd which TCP ports it holds for qdsrmd (qdsrmd.socket); none where it is not up."""
    if not _SYSTEMD.is_dir():
        return frozenset()
    try:
        told = subprocess.run(
            ["systemctl", "show", "--property=ActiveState,Listen", "qdsrmd.socket"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SYSTEMCTL_SECONDS,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return ports_of_socket(told)


def ports_of_socket(told: str) -> frozenset[int]:
    """Give the TCP ports of a socket unit that is active, as ``systemctl show`` tells them."""
    if "ActiveState=active" not in told.splitlines():
        return frozenset()
    return frozenset(int(port) for port in re.findall(r"^Listen=\S*?(\d+) \(Stream\)$", told, re.M))


def examine_ports(
    paths: Paths,
    groups: Iterable[GroupConfig],
    listening: frozenset[int],
    kept: frozenset[int] = frozenset(),
) -> Iterator[Finding]:
    """Tell of ports of secondary groups that the rmd does not listen on, or cannot.

    :param groups: those whose secondary this host is.
    :param kept: ports that systemd holds for the rmd.
    """
    runs = running_pid(paths.pid_file("qdsrmd")) is not None
    root = " ".join(["", *paths.arguments()])
    for port in sorted({group.port for group in groups}):
        if runs and port not in listening:
            told = f"qdsrmd runs, but nobody listens on port {port}"
            yield error("link", told, f"qdsconfigtool apply{root}", code=EXIT_UNREACHABLE)
        elif not runs and port in listening & kept:
            told = f"systemd holds port {port} for qdsrmd, which does not run"
            step = "systemctl start qdsrmd; why it ended: journalctl -u qdsrmd"
            yield error("link", told, step, code=EXIT_UNREACHABLE)
        elif not runs and port in listening:
            told = f"port {port} is in use, and not by qdsrmd, which does not run"
            step = f"ss -ltnp sport = {port}; end that program, then: launchrmds{root}"
            yield error("link", told, step, code=EXIT_UNREACHABLE)


def programs() -> dict[str, str | None]:
    """Find the programs that commands of ours use, for the archive."""
    names = (*attach_fuse.PROGRAMS, "modprobe", "systemctl")
    return {name: shutil.which(name) for name in names}
