"""Mistakes that people make, how to make them in a lab, and the words that must name them.

Each row is one mistake: what somebody does, which command he looks with, what he must read there of
the cause, and which command he must be told to type next.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from qdsmirror import pki
from qdsmirror.paths import Paths
from tests.integration.world import World

DOCTOR = ("qdsdoctor",)
PEER = ("qdsdoctor", "--peer")
AGAINST = ("qdsconfigtool", "check", "--against-peer")
INFO = ("qdsinfo",)


class Bench:
    """The lab, and what has to be put right after a mistake."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._undo: list[Callable[[], object]] = []

    # -- places -----------------------------------------------------------------------------------

    def etc(self, name: str, site: str = "primary") -> Path:
        """Give a file of a site's configuration."""
        return self.world.directory / site / "etc" / name

    def device(self, name: str, site: str = "primary") -> Path:
        """Give a device of a site."""
        return self.world.directory / site / "devices" / name

    @property
    def port(self) -> int:
        """The secondary's port."""
        for line in self.etc("dsgrp000.cfg").read_text().splitlines():
            key, _, value = line.partition(" = ")
            if key == "port":
                return int(value)
        raise AssertionError("no port")

    # -- doing, so that it can be undone -----------------------------------------------------------

    def keep(self, path: Path) -> None:
        """Remember a file as it is."""
        if not os.path.lexists(path):
            self.later(lambda: path.unlink(missing_ok=True))
            return
        kept = path.with_name(f".{path.name}.kept")
        shutil.copy2(path, kept, follow_symlinks=False)
        self.later(lambda: os.replace(kept, path))

    def later(self, job: Callable[[], object]) -> None:
        """Do this when the mistake is to be put right, the last one first."""
        self._undo.append(job)

    def at_last(self, job: Callable[[], object]) -> None:
        """Do this when all else has been put right."""
        self._undo.insert(0, job)

    def undo(self) -> None:
        """Put everything right."""
        while self._undo:
            self._undo.pop()()

    def edit(self, path: Path, old: str, new: str) -> None:
        """Change a text in a file."""
        text = path.read_text()
        assert old in text, (path, old)
        self.keep(path)
        path.write_text(text.replace(old, new, 1))

    def write(self, path: Path, content: str | bytes, mode: int | None = None) -> None:
        """Write a file anew."""
        self.keep(path)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        if mode is not None:
            path.chmod(mode)

    def mode(self, path: Path, mode: int) -> None:
        """Change a file's mode."""
        before = path.stat().st_mode & 0o7777
        self.later(lambda: path.chmod(before))
        path.chmod(mode)

    def remove(self, path: Path) -> None:
        """Take a file away."""
        self.keep(path)
        path.unlink()

    def run(self, site: str, command: str, *arguments: str) -> None:
        """Run a command at a site."""
        self.world.at(site, command, *arguments)

    def apply(self, *sites: str) -> None:
        """Have the daemons take up what was changed, now and when it is put right."""
        for site in sites:
            # What it finds wrong is the mistake.
            self.world.ask(site, "qdsconfigtool", "apply")
            self.at_last(lambda site=site: self.world.ask(site, "qdsconfigtool", "apply"))

    def stop(self, site: str, kill: str, launch: str) -> None:
        """End a daemon, until it is put right."""
        self.run(site, kill)
        self.at_last(lambda: self.run(site, launch))

    def restart(self, site: str, kill: str, launch: str) -> None:
        """Have a daemon take up what was changed, now and when it is put right."""
        self.run(site, kill)
        # What it finds wrong is the mistake.
        self.world.ask(site, launch)
        self.later(lambda: self.run(site, kill))
        self.at_last(lambda: self.run(site, launch))

    def certificate(self, site: str, name: str, days_from: int, days: int) -> None:
        """Give a site another certificate of the lab's authority.

        :param days_from: when it was made, before now; ``days``: how long it is valid.
        """
        authority = pki.Authority.load(self.world.directory / "pki")
        made = datetime.now(UTC) - timedelta(days=days_from)
        certificate, key = authority.issue(name, days, made)
        self.write(self.etc("host.pem", site), certificate)
        self.write(self.etc("host.key", site), key, 0o600)

    def mount(self, place: Path, size: str) -> None:
        """Put a small file system over a directory, with what is in it."""
        kept = place.with_name(f".{place.name}.below")
        shutil.copytree(place, kept)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "small", str(place)], check=True
        )
        self.later(lambda: shutil.rmtree(kept))
        self.later(lambda: subprocess.run(["umount", "--lazy", str(place)], check=True))
        shutil.copytree(kept, place, dirs_exist_ok=True)


@dataclass(frozen=True)
class Mistake:
    """One row.

    :ivar name: what was done wrong, for the test's output.
    :ivar make: does it.
    :ivar cause: words that one finding must have, and ``step`` those of its next command; each may
        have ``{lab}`` and ``{port}``.
    :ivar command: what is typed to find it; where: ``site``.
    :ivar wait: a state of ``qdsinfo --wait`` that comes of it.
    :ivar mounts: whether it takes a mount to make it.
    """

    name: str
    make: Callable[[Bench], None]
    cause: tuple[str, ...]
    step: tuple[str, ...]
    command: tuple[str, ...] = DOCTOR
    site: str = "primary"
    wait: str = ""
    mounts: bool = False


def _listen(bench: Bench, port: int) -> None:
    """Be another program that has the port."""
    listening = socket.create_server(("127.0.0.1", port))
    bench.later(listening.close)


def _other_authority(bench: Bench) -> None:
    bench.write(bench.etc("ca.pem"), pki.Authority.create().pem())


def _other_key(bench: Bench) -> None:
    authority = pki.Authority.load(bench.world.directory / "pki")
    bench.write(bench.etc("host.key"), authority.issue("primary")[1], 0o600)


def _ext4(bench: Bench) -> None:
    disk = bench.device("accounts.img")
    bench.keep(disk)
    with open(disk, "wb") as file:
        file.truncate(8 << 20)
        # An ext2 superblock's magic, state and revision: enough to be somebody's data.
        file.seek(1024 + 0x38)
        file.write(b"\x53\xef\x01\x00\x01\x00")
    bench.edit(bench.etc("dsgrp000.cfg"), "qds0.writelog", "accounts.img")


def _blank_log(bench: Bench) -> None:
    log = bench.device("qds0.writelog")
    bench.write(log, bytes(log.stat().st_size))


def _same_device(bench: Bench) -> None:
    link = bench.device("fast-disk")
    bench.keep(link)
    link.symlink_to(bench.device("qds0.data"))
    bench.edit(bench.etc("dsgrp000.cfg"), "qds0.writelog", "fast-disk")


def _full_disk(bench: Bench) -> None:
    var = bench.world.directory / "primary" / "var"
    bench.mount(var, "2m")
    with open(var / "dump", "wb") as file:
        file.write(bytes((1 << 20) + (512 << 10)))


def _failed_device(bench: Bench) -> None:
    device = bench.device("qds0.data")
    state = Paths.of(bench.world.directory / "primary").state_file(0)
    bench.write(state, f'{{"failed": {{"{device}": "fdatasync: Input/output error"}}}}')


#: No daemon runs.
OFFLINE = (
    Mistake(
        "a key of a group's file is mistyped",
        lambda b: b.edit(b.etc("dsgrp000.cfg"), "operation", "opreation"),
        ("dsgrp000.cfg:1", "opreation", "unknown key", '"operation"'),
        ("correct", "dsgrp000.cfg at line 1", "qdsconfigtool apply"),
    ),
    Mistake(
        "a value is mistyped, seen by qdsinfo",
        lambda b: b.edit(b.etc("dsgrp000.cfg"), "async", "assync"),
        ("dsgrp000.cfg:1", "operation", 'did you mean "async"'),
        ("qdsconfigtool check",),
        INFO,
    ),
    Mistake(
        "a port that is none",
        lambda b: b.edit(b.etc("dsgrp000.cfg"), "port = ", "port = 9"),
        ("secondary.port", "is not from"),
        ("correct", "dsgrp000.cfg"),
    ),
    Mistake(
        "an LDSU's name is mistyped",
        lambda _: None,
        ("no LDSU is named 'qsd0'",),
        ("did you mean qds0", "qdsinfo"),
        (*INFO, "qsd0"),
    ),
    Mistake(
        "qds.cfg is missing",
        lambda b: b.remove(b.etc("qds.cfg")),
        ("qds.cfg", "No such file"),
        ("write it, see qds.cfg(5)", "qdsconfigtool check"),
    ),
    Mistake(
        "the host's name is mistyped",
        lambda b: b.edit(b.etc("qds.cfg"), "primary", "prmary"),
        ("dsgrp000.cfg", 'is this host "prmary"'),
        ("compare name in", "qds.cfg", "qdsconfigtool show"),
    ),
    Mistake(
        "the daemons' user does not exist",
        lambda b: b.write(b.etc("qds.cfg"), "name = primary\nuser = qdsmiror\n"),
        ('there is no user "qdsmiror"',),
        ("useradd --system qdsmiror",),
    ),
    Mistake(
        "a data device's path is mistyped",
        lambda b: b.edit(b.etc("dsgrp000.cfg"), "qds0.data", "qds0.daat"),
        ("data device", "qds0.daat does not exist"),
        ("correct the path", "ls -l {lab}/primary/devices/qds0.daat"),
    ),
    Mistake(
        "a writelog was not initialised",
        _blank_log,
        ("writelog of qds0", "is not initialised"),
        ("qdswlinit --root {lab}/primary -g 0",),
    ),
    Mistake(
        "a writelog's path leads to somebody's file system",
        _ext4,
        ("writelog of qds0", "holds ext2"),
        ("qdsdevinfo {lab}/primary/devices/accounts.img", "qdswlinit"),
    ),
    Mistake(
        "data device and writelog are one, by two paths",
        _same_device,
        ("fast-disk is data device of qds0", "by another path"),
        ("correct one of the two", "ls -lL"),
    ),
    Mistake(
        "the key may be read by others",
        lambda b: b.mode(b.etc("host.key"), 0o644),
        ("host.key", "mode 0644 lets others read the key"),
        ("chmod 600 {lab}/primary/etc/host.key",),
    ),
    Mistake(
        "the group's secret may be read by others",
        lambda b: b.mode(b.etc("dsgrp000.secret"), 0o640),
        ("dsgrp000.secret", "mode 0640 lets others read the secret"),
        ("chmod 600 {lab}/primary/etc/dsgrp000.secret",),
    ),
    Mistake(
        "the group's secret was copied in part",
        lambda b: b.write(b.etc("dsgrp000.secret"), "0123456789abcdef\n", 0o600),
        ("dsgrp000.secret", "not a secret of 64 hexadecimal digits"),
        ("qdsconfigtool pki", "both hosts"),
    ),
    Mistake(
        "the group's secret is missing",
        lambda b: b.remove(b.etc("dsgrp000.secret")),
        ("dsgrp000.secret", "No such file"),
        ("qdsconfigtool pki", "both hosts"),
    ),
    Mistake(
        "the certificate has expired",
        lambda b: b.certificate("primary", "primary", 10, 5),
        ("host.pem", "expired at"),
        ("renew it", "qdsconfigtool pki --overwrite"),
    ),
    Mistake(
        "the certificate is about to expire",
        lambda b: b.certificate("primary", "primary", 10, 16),
        ("host.pem", "expires in 5 days"),
        ("renew it", "qdsconfigtool pki --overwrite"),
    ),
    Mistake(
        "the certificate is another host's",
        lambda b: b.certificate("primary", "elsewhere", 0, 30),
        ("host.pem", "bears elsewhere", 'this host is "primary"'),
        ("correct name in", "qdsconfigtool pki"),
    ),
    Mistake(
        "the key is another certificate's",
        _other_key,
        ("host.key", "not the key of"),
        ("copy host.pem, host.key and ca.pem together",),
    ),
    Mistake(
        "the authority is another one",
        _other_authority,
        ("host.pem", "not issued by an authority of"),
        ("copy host.pem, host.key and ca.pem together",),
    ),
    Mistake(
        "the authority's key was left on the host",
        lambda b: b.write(b.etc("ca.key"), "x\n", 0o600),
        ("ca.key", "can pass for any host"),
        ("shred -u {lab}/primary/etc/ca.key",),
    ),
    Mistake(
        "anybody may change the configuration",
        lambda b: b.mode(b.etc("dsgrp000.cfg"), 0o666),
        ("dsgrp000.cfg: mode 0666 lets others change it",),
        ("chmod go-w {lab}/primary/etc/dsgrp000.cfg",),
    ),
    Mistake(
        "the disk of the logs is full",
        _full_disk,
        ("{lab}/primary/var: no space left",),
        ("df -h {lab}/primary/var", "du -xh"),
        mounts=True,
    ),
    Mistake(
        "a disk lost what it was to keep",
        _failed_device,
        ("qds0.data has failed", "Input/output error"),
        ("replace it", "qdswlinit --root {lab}/primary -g 0 --yes", "qdsrefresh"),
    ),
    Mistake(
        "another program has the secondary's port",
        lambda b: _listen(b, b.port),
        ("port {port} is in use, and not by qdsrmd",),
        ("ss -ltnp sport = {port}", "launchrmds"),
        DOCTOR,
        "secondary",
    ),
    Mistake(
        "nobody started the driver, seen by qdsdoctor",
        lambda _: None,
        ("dsgrp000: driver not running",),
        ("launchdriver --root {lab}/primary",),
    ),
    Mistake(
        "nobody started the rmd",
        lambda _: None,
        ("dsgrp000: rmd not running",),
        ("launchrmds --root {lab}/secondary",),
        DOCTOR,
        "secondary",
    ),
    Mistake(
        "the secondary is down, and so is its network service",
        lambda _: None,
        ("secondary does not answer at 127.0.0.1 port {port}", "refused"),
        ("on secondary: launchrmds", "qdsdoctor"),
        PEER,
    ),
)


def _other_secret(bench: Bench) -> None:
    bench.write(bench.etc("dsgrp000.secret"), "ab" * 32 + "\n", 0o600)
    bench.restart("primary", "killpmds", "launchpmds")


def _small_mirror(bench: Bench) -> None:
    mirror = bench.device("qds0.mirror", "secondary")
    bench.run("secondary", "killrmds")
    bench.keep(mirror)
    os.truncate(mirror, mirror.stat().st_size // 2)
    bench.restart("secondary", "killrmds", "launchrmds")


def _plain_service(bench: Bench) -> None:
    """Put something else that listens, and speaks no TLS, where the secondary should be."""
    service = subprocess.Popen(
        ["python3", "-c",
         "import socket; s = socket.create_server(('127.0.0.1', 0));"
         "print(s.getsockname()[1], flush=True)\n"
         "while True:\n c, _ = s.accept(); c.sendall(b'220 mail ESMTP\\r\\n')"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert service.stdout is not None
    port = service.stdout.readline().strip()
    service.stdout.close()
    bench.later(service.wait)
    bench.later(service.kill)
    bench.edit(bench.etc("dsgrp000.cfg"), f"port = {bench.port}", f"port = {port}")
    bench.apply("primary")


def _skewed_clock(bench: Bench) -> None:
    bench.world.customise("import time\nreal = time.time\ntime.time = lambda: real() + 90\n")
    bench.restart("secondary", "killrmds", "launchrmds")
    customised, bench.world.customised = bench.world.customised, None
    assert customised is not None
    bench.later(lambda: shutil.rmtree(customised))


def _bypass(bench: Bench) -> None:
    bench.run("primary", "qdsbypass", "on")
    bench.later(lambda: bench.run("primary", "qdsbypass", "off"))


def _checkpoint(bench: Bench) -> None:
    bench.run("secondary", "qdscheckpoint", "on")
    bench.later(lambda: bench.run("secondary", "qdscheckpoint", "off"))


def _far_edit(bench: Bench, old: str, new: str) -> None:
    bench.edit(bench.etc("dsgrp000.cfg", "secondary"), old, new)
    bench.apply("secondary")


def _near_edit(bench: Bench, old: str, new: str) -> None:
    bench.edit(bench.etc("dsgrp000.cfg"), old, new)
    bench.apply("primary")


def _no_group_there(bench: Bench) -> None:
    path = bench.etc("dsgrp000.cfg", "secondary")
    bench.remove(path)
    bench.apply("secondary")


def _expired_there(bench: Bench) -> None:
    bench.certificate("secondary", "secondary", 10, 5)
    bench.restart("secondary", "killrmds", "launchrmds")


#: Both sites run, and are connected before and after each.
LIVE = (
    Mistake(
        "the rmd was ended",
        lambda b: b.stop("secondary", "killrmds", "launchrmds"),
        ("dsgrp000: no link to secondary", "does not answer at 127.0.0.1 port {port}"),
        ("on secondary: launchrmds",),
        wait="accumulating",
    ),
    Mistake(
        "the pmd was ended",
        lambda b: b.stop("primary", "killpmds", "launchpmds"),
        ("dsgrp000: pmd not running",),
        ("launchpmds --root {lab}/primary",),
    ),
    Mistake(
        "the secondary's address is mistyped",
        lambda b: _near_edit(
            b, "host = secondary\naddress = 127.0.0.1", "host = secondary\naddress = dr1.invalid"
        ),
        ("secondary does not answer at dr1.invalid",),
        ("qdshostinfo dr1.invalid", "correct address in {lab}/primary/etc/dsgrp000.cfg"),
        PEER,
    ),
    Mistake(
        "the port is another service's",
        _plain_service,
        ("secondary does not speak TLS",),
        ("check `port` and `address`", "ss -ltnp"),
        PEER,
    ),
    Mistake(
        "the secrets of the two hosts differ",
        _other_secret,
        ("did not prove the secret of dsgrp000",),
        ("compare dsgrp000.secret on both hosts", "qdsconfigtool pki"),
        PEER,
    ),
    Mistake(
        "the mirror device is mistyped on the secondary",
        lambda b: _far_edit(b, "qds0.mirror", "qds0.miror"),
        ("ldsus.qds0.mirror_device is", 'qds0.miror" on secondary'),
        ("make [ldsus] the same in", "qdsconfigtool apply"),
        PEER,
    ),
    Mistake(
        "the two group files name different hosts",
        lambda b: _far_edit(b, "host = primary", "host = primry"),
        (
            "secondary refuses our certificate (for primary)",
            "not for the host its group file names",
        ),
        ("compare `host` in the group's file on both hosts", "qdsconfigtool show"),
        PEER,
    ),
    Mistake(
        "the secondary has no such group",
        _no_group_there,
        ("{lab}/secondary/etc", "no group's file (dsgrp000.cfg) here yet"),
        ("write one", "scp", "dsgrp.cfg(5)", "qdsconfigtool apply"),
        DOCTOR,
        "secondary",
    ),
    Mistake(
        "the secondary's certificate has expired",
        _expired_there,
        ("the certificate that secondary shows", "expired on"),
        ("qdsconfigtool check",),
        PEER,
    ),
    Mistake(
        "the mirror device is too small",
        _small_mirror,
        ("qds0.mirror has 4194304 bytes", "it was initialised with 8388608"),
        ("mend it on secondary", "qdsconfigtool apply"),
        PEER,
    ),
    Mistake(
        "the clocks of the two hosts differ",
        _skewed_clock,
        ("the clock of secondary is", "ahead of this host's"),
        ("timedatectl set-ntp true",),
        PEER,
    ),
    Mistake(
        "a tunable differs between the two hosts",
        lambda b: _far_edit(b, "operation = async", "operation = async\ndurability = always"),
        ('durability is "flush" here and "always" on secondary', "the primary's counts"),
        ("make it the same in", "qdsconfigtool apply"),
        PEER,
    ),
    Mistake(
        "the operation was changed on one of the two hosts, seen by qdsconfigtool",
        lambda b: _far_edit(b, "operation = async", "operation = sync"),
        ('operation is "async" here and "sync" on secondary', "the primary's counts"),
        ("make it the same in", "qdsconfigtool apply"),
        AGAINST,
    ),
    Mistake(
        "a bypass was forgotten",
        _bypass,
        ("dsgrp000: in bypass",),
        ("qdsbypass --root {lab}/primary -g 0 off",),
    ),
    Mistake(
        "a checkpoint was forgotten",
        _checkpoint,
        ("holds the mirror at GSN",),
        ("qdscheckpoint off -g 0",),
        DOCTOR,
        "secondary",
    ),
    Mistake(
        "the driver was ended, seen by qdsinfo",
        lambda b: b.stop("primary", "killdriver", "launchdriver"),
        ("driver not running",),
        ("launchdriver",),
        INFO,
    ),
)
