"""``qdsdoctor``: find what is wrong with this host's groups, and say which command to type next."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdsmirror.paths import Paths
from qdsmirror.tools import cli

if TYPE_CHECKING:
    from qdsmirror.config import GroupConfig, HostConfig, Problem
    from qdsmirror.core.findings import Finding
    from qdsmirror.core.sizing import Recommendation
    from qdsmirror.tools.doctor_devices import Device

OUTAGE_SECONDS_DEFAULT = 3600.0
_PLURALS = {"error": "errors", "warning": "warnings", "advice": "pieces of advice"}
OUTAGE_SECONDS_MAX = 30 * 86400.0


def build_parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    made = cli.parser(
        "qdsdoctor", "Find what is wrong on this host, and what to type next.", groups=True
    )
    made.add_argument(
        "--peer", action="store_true", help="also ask the secondaries of this host's groups"
    )
    made.add_argument(
        "--bundle",
        metavar="FILE",
        type=Path,
        help="also write a support archive (tar.gz), without secrets",
    )
    made.add_argument(
        "--outage",
        metavar="TIME",
        type=_outage,
        default=OUTAGE_SECONDS_DEFAULT,
        help="recommend sizes for the secondary being away this long, e.g. 4 h (default: 1 h)",
    )
    return made


def _outage(text: str) -> float:
    from qdsmirror.configvalues import parse_seconds

    try:
        seconds = parse_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not 1 <= seconds <= OUTAGE_SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 s to {OUTAGE_SECONDS_MAX:g} s")
    return seconds


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run ``qdsdoctor``."""
    arguments = build_parser().parse_args(argv)
    from qdsmirror.core.findings import exit_code, ordered

    if arguments.bundle is not None:
        from qdsmirror.tools.doctor_bundle import refuse_existing

        refuse_existing(arguments.bundle)
    checkup = Checkup(cli.paths_of(arguments), arguments)
    checkup.run()
    findings = ordered(checkup.findings)
    told = checkup.told(findings)
    if arguments.bundle is not None:
        from qdsmirror.tools.doctor_bundle import write_bundle

        info = {"host": told["host"], "groups": checkup.status}
        kept = {"doctor": told, "info": info}
        members = write_bundle(arguments.bundle, checkup.paths, checkup.host, kept)
        told["bundle"] = {"file": str(arguments.bundle), "members": members}
    if arguments.json:
        cli.print_json(told)
    else:
        checkup.show(findings)
    return exit_code(findings)


@dataclass
class Checkup:
    """One look at everything.

    :ivar host: what qds.cfg says; ``None`` where it cannot be read.
    :ivar groups: that take part here and are selected.
    :ivar status: their objects of ``qdsinfo --json``.
    """

    paths: Paths
    arguments: argparse.Namespace
    host: HostConfig | None = None
    groups: list[GroupConfig] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    status: list[dict[str, Any]] = field(default_factory=list)
    recommendations: dict[str, Recommendation] = field(default_factory=dict)

    @property
    def root(self) -> str:
        """What commands have to be told besides."""
        return " ".join(self.paths.arguments())

    def run(self) -> None:
        """Look.

        :raises UsageError: what is selected does not exist.
        :raises ConfigError: there is no directory of the configuration: nothing to look at.
        """
        self._configuration()
        self._host()
        devices = self._devices()
        self._daemons()
        self._sizes(devices)
        if self.arguments.peer:
            self._peer(devices)

    def _configuration(self) -> None:
        from qdsmirror.config import read_host, scan_groups
        from qdsmirror.tools import configcheck

        found, _ = scan_groups(self.paths)
        problems = configcheck.check_all(self.paths)
        self.findings += [self._of_problem(one) for one in problems]
        self.host, _ = read_host(self.paths.host_config)
        if found and (self.arguments.numbers or self.arguments.names):
            found = cli.select_groups(self.arguments, found)
        if self.host is not None:
            name = self.host.name
            self.groups = [group for group in found if group.role_of(name) is not None]

    def _of_problem(self, problem: Problem) -> Finding:
        from qdsmirror.core.findings import Finding, Severity
        from qdsmirror.errors import EXIT_CONFIG, EXIT_IDENTITY

        config = problem.file.suffix == ".cfg" or problem.file == self.paths.etc
        page = "qds.cfg(5)" if problem.file == self.paths.host_config else "dsgrp.cfg(5)"
        line = f" at line {problem.line}" if problem.line else ""
        where = f"{problem.file}{f':{problem.line}' if problem.line else ''}"
        key = f"{problem.key}: " if problem.key else ""
        step = problem.hint or (
            f"correct {problem.file}{line}, see {page}; then: qdsconfigtool apply"
            + f" {self.root}".rstrip()
        )
        return Finding(
            Severity(problem.severity),
            "configuration" if config else "identity",
            cli.one_line(f"{where}: {key}{problem.message}"),
            cli.one_line(step),
            code=EXIT_CONFIG if config else EXIT_IDENTITY,
        )

    def _roles(self) -> list[str]:
        name = self.host.name if self.host is not None else ""
        return list(dict.fromkeys(str(group.role_of(name)) for group in self.groups))

    def _of_role(self, role: str) -> list[GroupConfig]:
        name = self.host.name if self.host is not None else ""
        return [group for group in self.groups if group.role_of(name) == role]

    def _host(self) -> None:
        from qdsmirror.tools import doctor_host as host

        roles = self._roles()
        self.findings += host.examine_files(self.paths, self.host, self.groups)
        self.findings += host.examine_space((self.paths.var, self.paths.run, self.paths.etc))
        self.findings += host.examine_clock(host.clock_is_synchronised())
        if "primary" in roles:
            self.findings += host.examine_kernel(host.kernel_has_nbd())
        if self.paths.root is None:
            self.findings += host.examine_units(roles)
            if self.host is not None:
                self.findings += host.examine_drop_ins(self.host.name, self.groups)
        secondaries = self._of_role("secondary")
        kept = host.systemd_ports() if secondaries and self.paths.root is None else frozenset()
        self.findings += host.examine_ports(self.paths, secondaries, host.listening_ports(), kept)

    def _devices(self) -> list[Device]:
        from qdsmirror.tools import doctor_devices
        from qdsmirror.tools.doctor_disks import Disks

        if self.host is None:
            return []
        devices = doctor_devices.look(self.groups, self.host.name)
        self.findings += doctor_devices.examine(self.paths, devices, Disks())
        self.findings += doctor_devices.names_by_kernel(devices)
        return devices

    def _daemons(self) -> None:
        from qdsmirror.core.diagnosis import diagnose
        from qdsmirror.errors import QdsError
        from qdsmirror.tools.status import collect_groups

        if self.host is None or not self.groups:
            return
        try:
            self.status = collect_groups(self.paths, self.host.name, self.groups)
        except QdsError as error:
            self.findings.append(_of_error(error, "daemons", "run as root"))
            return
        for group in self.status:
            self.findings += diagnose(group, self.root)

    def _sizes(self, devices: Iterable[Device]) -> None:
        from qdsmirror.tools import doctor_sizes

        sizes = {(one.group.number, one.key): one.size for one in devices if one.trouble is None}
        outage, root = self.arguments.outage, f" {self.root}".rstrip()
        for group in self.groups:
            asked = doctor_sizes.recommended(self.paths, group, outage)
            if asked is None:
                continue
            self.recommendations[group.name] = asked
            if group in self._of_role("primary"):
                logs = {
                    ldsu.name: ldsu.memory_bytes
                    or sizes.get((group.number, ("ldsus", ldsu.name, "writelog_device")), 0)
                    for ldsu in group.ldsus
                }
                known = {name: size for name, size in logs.items() if size}
                self.findings += doctor_sizes.examine_writelogs(group, asked, outage, known, root)
            journal = sizes.get((group.number, ("secondary", "journal_device")), 0)
            self.findings += doctor_sizes.examine_journal(group, asked, outage, journal)

    def _peer(self, devices: Iterable[Device]) -> None:
        from qdsmirror.errors import QdsError
        from qdsmirror.tools import doctor_peer, doctor_sizes, progress

        primaries = self._of_role("primary")
        data = {
            (one.group.number, one.ldsu): one.size
            for one in devices
            if one.key[-1] == "data_device" and one.trouble is None
        }
        try:
            with progress.waiting(self.arguments.json, "peer", "asking the secondaries"):
                visits = doctor_peer.visit(self.paths, primaries)
        except QdsError as error:
            self.findings.append(_of_error(error, "peer", f"qdsconfigtool check {self.root}"))
            visits = {}
        for group in primaries:
            ways = visits.get(group.number, [])
            sizes = {name: size for (of, name), size in data.items() if of == group.number}
            self._add_news(doctor_peer.examine(group, ways, sizes))
            asked = self.recommendations.get(group.name)
            if asked is not None:
                journal, outage = doctor_peer.journal_bytes(ways), self.arguments.outage
                self.findings += doctor_sizes.examine_journal(group, asked, outage, journal)
        self.findings += doctor_peer.one_sided(self._of_role("secondary"))

    def _add_news(self, findings: Iterable[Finding]) -> None:
        """Add what the pmd has not said of the same link."""
        for one in findings:
            reason = one.message.partition(": ")[2] or one.message
            if not any(
                one.group == other.group and reason in other.message for other in self.findings
            ):
                self.findings.append(one)

    # -- telling -----------------------------------------------------------------------------------

    def told(self, findings: Sequence[Finding]) -> dict[str, Any]:
        """Give what ``--json`` prints, less the schema's number."""
        from qdsmirror.tools import doctor_sizes

        return {
            "host": self.host.name if self.host is not None else None,
            "groups": [group.number for group in self.groups],
            "findings": [one.to_json() for one in findings],
            "recommendations": {
                name: doctor_sizes.to_json(asked) for name, asked in self.recommendations.items()
            },
            "bundle": None,
        }

    def show(self, findings: Sequence[Finding]) -> None:
        """Print for people."""
        from qdsmirror.tools import doctor_sizes

        for one in findings:
            print(f"{one.severity.value}: {cli.one_line(one.message)}")
            print(f"  next: {cli.one_line(one.next_step)}")
        for name, asked in self.recommendations.items():
            recorded = doctor_sizes.duration(asked.recorded_seconds)
            print(f"{name}: by {recorded} of recorded rates:")
            role = next((one["role"] for one in self.status if one["name"] == name), None)
            for what, much in doctor_sizes.describe(asked, self.arguments.outage, role):
                print(f"  {what}: {much}")
        if self.arguments.bundle is not None:
            print(f"support archive without secrets: {self.arguments.bundle}")
        counts = Counter(one.severity.value for one in findings)
        told = [f"{count} {_PLURALS[one] if count > 1 else one}" for one, count in counts.items()]
        print(", ".join(told) or "nothing is wrong")
        if not self.arguments.peer and "primary" in self._roles():
            print(f"the secondary was not asked: qdsdoctor --peer {self.root}".rstrip())


def _of_error(problem: Any, check: str, otherwise: str) -> Finding:
    """Make a finding of an error that kept us from looking."""
    from qdsmirror.core.findings import error

    return error(check, problem.message, problem.hint or otherwise, code=problem.exit_code)
