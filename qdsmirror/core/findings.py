"""The findings of ``qdsdoctor``: what is wrong, where, how badly, which command to type next."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qdsmirror.errors import EXIT_DEGRADED, EXIT_FAILED, EXIT_OK


class Severity(StrEnum):
    """How badly something is wrong; in the order in which findings are told."""

    ERROR = "error"
    WARNING = "warning"
    ADVICE = "advice"


#: What is looked at, in the order in which it is told: a cause before what follows from it.
CHECKS = (
    "configuration",
    "identity",
    "files",
    "devices",
    "space",
    "clock",
    "kernel",
    "units",
    "daemons",
    "link",
    "state",
    "peer",
    "sizes",
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or could be better.

    :ivar check: what was looked at, of CHECKS.
    :ivar message: what is wrong and where, in a line.
    :ivar next_step: the next command to type, or what to change.
    :ivar group: number of the group that it is about; ``None``: the host.
    :ivar code: the exit code that goes with an error (errors.py).
    """

    severity: Severity
    check: str
    message: str
    next_step: str
    group: int | None = None
    code: int = EXIT_FAILED

    def __post_init__(self) -> None:
        assert self.check in CHECKS, self.check
        assert self.message and self.next_step, self.message

    def to_json(self) -> dict[str, Any]:
        """Give it as ``qdsdoctor --json`` shows it."""
        return {
            "severity": self.severity.value,
            "check": self.check,
            "group": self.group,
            "message": self.message,
            "next": self.next_step,
        }


def error(
    check: str, message: str, next_step: str, group: int | None = None, code: int = EXIT_FAILED
) -> Finding:
    """Make a finding that keeps something from working."""
    return Finding(Severity.ERROR, check, message, next_step, group, code)


def warning(check: str, message: str, next_step: str, group: int | None = None) -> Finding:
    """Make a finding that will do harm, or makes another fault do so."""
    return Finding(Severity.WARNING, check, message, next_step, group)


def advice(check: str, message: str, next_step: str, group: int | None = None) -> Finding:
    """Make a finding that something could be better."""
    return Finding(Severity.ADVICE, check, message, next_step, group)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Give findings as they are told: the worst first, causes before effects, each once."""
    ranks = {severity: rank for rank, severity in enumerate(Severity)}
    distinct = dict.fromkeys(findings)
    return sorted(distinct, key=lambda one: (ranks[one.severity], CHECKS.index(one.check)))


def exit_code(findings: Iterable[Finding]) -> int:
    """Give the exit code: that of the first error, 3 where there are only warnings, else 0."""
    told = ordered(findings)
    if told and told[0].severity is Severity.ERROR:
        return told[0].code
    return EXIT_DEGRADED if told and told[0].severity is Severity.WARNING else EXIT_OK
