"""Where things are on a host: the patent's paths, or everything below one root (QDS_ROOT)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qdsmirror.errors import QdsError, UsageError

#: A Unix socket's path holds at most this many bytes (sun_path less its final NUL).
SOCKET_PATH_BYTES_MAX = 107


def group_name(number: int) -> str:
    """Give the patent's name of a logical group: ``dsgrp000`` for 0."""
    return f"dsgrp{number:03d}"


def file_identity(path: Path) -> tuple[int, ...] | None:
    """Give what changes when a file is replaced or written anew; ``None``: there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Paths:
    """The directories of one host.

    :ivar root: the QDS_ROOT, or ``None`` for the patent's default paths.
    """

    root: Path | None
    etc: Path
    var: Path
    run: Path
    dev: Path

    @classmethod
    def of(cls, root: str | os.PathLike[str] | None = None) -> Paths:
        """Find the paths for ``--root`` (else ``$QDS_ROOT``, else the defaults).

        :raises UsageError: the root is too long for the Unix sockets below it.
        """
        chosen = root if root is not None else os.environ.get("QDS_ROOT") or None
        if chosen is None:
            return cls(
                None,
                Path("/etc/opt/QLIXds"),
                Path("/var/opt/QLIXds"),
                Path("/run/qdsmirror"),
                Path("/dev/qds"),
            )
        base = Path(chosen).absolute()
        paths = cls(base, base / "etc", base / "var", base / "run", base / "dev")
        longest = len(os.fsencode(paths.control_socket("dsgrp000.driver")))
        if longest > SOCKET_PATH_BYTES_MAX:
            raise UsageError(
                f"root {base} is too long: its sockets' paths take {longest} bytes, "
                f"a Unix socket's path holds {SOCKET_PATH_BYTES_MAX}",
                hint="choose a shorter directory",
            )
        return paths

    def arguments(self) -> list[str]:
        """Give the command-line arguments that make another process of ours use these paths."""
        return [] if self.root is None else ["--root", str(self.root)]

    @property
    def host_config(self) -> Path:
        """``qds.cfg``."""
        return self.etc / "qds.cfg"

    def group_config(self, number: int) -> Path:
        """``dsgrpNNN.cfg``."""
        return self.etc / f"{group_name(number)}.cfg"

    def group_secret(self, number: int) -> Path:
        """The group's 256-bit secret, 64 hexadecimal digits, mode 0600."""
        return self.etc / f"{group_name(number)}.secret"

    def pid_file(self, name: str) -> Path:
        """``NAME.pid``, e.g. for ``qdsdriver`` or ``dsgrp000.driver``."""
        return self.run / f"{name}.pid"

    def control_socket(self, name: str) -> Path:
        """``NAME.ctl``: the control socket of a master or of one group in a child."""
        return self.run / f"{name}.ctl"

    def nbd_socket(self, number: int) -> Path:
        """The Unix socket on which the LDSUs of one group are exported."""
        return self.run / f"{group_name(number)}.nbd"

    def mirror_socket(self, number: int) -> Path:
        """The Unix socket on which a checkpoint of the group's mirror devices is exported."""
        return self.run / f"{group_name(number)}.mirror.nbd"

    @property
    def audit_log(self) -> Path:
        """Who asked for which change (qdsmirror.audit)."""
        return self.var / "audit.log"

    def log_file(self, name: str) -> Path:
        """Where a daemon started in the background writes its log."""
        return self.var / f"{name}.log"

    def state_file(self, number: int) -> Path:
        """The host state file of a group: latched device failures (rules.md 4)."""
        return self.var / f"{group_name(number)}.state"

    def tracking_file(self, number: int) -> Path:
        """``dsgrpNNN.prf``: the performance tracking file of a group (qdsprf(5))."""
        return self.var / f"{group_name(number)}.prf"

    def event_file(self, number: int) -> Path:
        """``dsgrpNNN.evt``: what has happened to a group (qdsprf(5))."""
        return self.var / f"{group_name(number)}.evt"

    def statistics_file(self, number: int) -> Path:
        """What the process for statistics of a group leaves to its successor."""
        return self.run / f"{group_name(number)}.stats.json"

    @property
    def console(self) -> Path:
        """The host's console device; below a root a file of this name, if there is one."""
        return Path("/dev/console") if self.root is None else self.dev / "console"


def make_directories(paths: Paths) -> None:
    """Make the directories that a daemon writes to.

    :raises QdsError: that is not possible.
    """
    for directory in (paths.run, paths.var):
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise QdsError(
                f"{directory}: {error.strerror}", hint="create it, or run as root"
            ) from None
