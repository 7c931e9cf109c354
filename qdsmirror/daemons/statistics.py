"""The process for statistics and throttles beside a master's other children.

It is one for all groups of a host and role, a child like the others: supervised, relaunched after
its death, ended with its master (patent: "a separate daemon executed on the primary and secondary
computer systems").  Whatever becomes of it, the data path does not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from twisted.internet.defer import Deferred

from qdsmirror.daemons.process import CHILD_COMMAND, Setting
from qdsmirror.daemons.supervise import Supervisor
from qdsmirror.paths import Paths

#: Of the child; its groups' sockets and pid files are ``dsgrpNNN.stats``.
ROLE = "stats"


class Statistics:
    """The process of one master.

    :param log: gives the descriptor that becomes its standard output and error.
    :param command: how a child is started.
    """

    def __init__(
        self,
        reactor: Any,
        paths: Paths,
        log: Callable[[], int],
        command: tuple[str, ...] = CHILD_COMMAND,
    ) -> None:
        self._paths = paths
        self._numbers: set[int] = set()
        setting = Setting(reactor, ROLE, paths, lambda _number: None, log, command)
        self._supervisor = Supervisor(setting, 1)

    def start(self, numbers: Iterable[int]) -> None:
        """Have statistics of the first groups."""
        mine = list(numbers)
        for number in mine:
            self._forget(number)
        self._supervisor.start(mine)

    def changed(self, what: str, number: int) -> None:
        """Follow the master: a group was ``started``, ``stopped``, ``restarted``, ``retuned``."""
        if what == "started":
            self._forget(number)
            self._supervisor.add(number)
        elif what == "stopped":
            self._supervisor.remove(number)
        elif what in ("restarted", "retuned"):
            self._supervisor.restart(number)

    def retry(self) -> None:
        """Try again what has failed."""
        self._supervisor.retry()

    def ask(self) -> None:
        """Ask the process for a sign of life, and kill it if it has not given any for long."""
        self._supervisor.ask_all()

    def stop(self) -> Deferred[Any]:
        """End the process; what it has kept for a successor goes with it."""

        def forget(_: Any) -> None:
            for number in self._numbers:
                self._forget(number)

        return self._supervisor.stop().addCallback(forget)

    def status(self) -> dict[str, Any]:
        """Give ``statistics`` of the master's Status."""
        told = self._supervisor.status()
        child = next(iter(told["children"]), None)
        return {
            "pid": child["pid"] if child else None,
            "state": child["state"] if child else "stopped",
            "restarts": child["restarts"] if child else 0,
            "groups": [
                {key: one[key] for key in ("group", "name", "state", "reason")}
                for one in told["groups"]
            ],
        }

    def _forget(self, number: int) -> None:
        self._numbers.add(number)
        self._paths.statistics_file(number).unlink(missing_ok=True)
