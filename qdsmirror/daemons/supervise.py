"""The children of a master, and which groups each of them hosts (rules.md 18)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, gatherResults
from twisted.logger import Logger

from qdsmirror.daemons.process import CHILD_COMMAND, Child, GroupState, Setting
from qdsmirror.errors import QdsError
from qdsmirror.paths import group_name
from qdsmirror.storage.latch import FailureLatch

_log = Logger()


class Supervisor:
    """All children of a master and which groups they host.

    :param setting: what the children have in common.
    :param children_max: processes; more groups than that share them (rules.md 18).
    """

    def __init__(self, setting: Setting, children_max: int) -> None:
        self.children_max = children_max
        self.children: list[Child] = []
        self._setting = setting
        self._ending: set[Child] = set()

    def child_of(self, number: int) -> Child | None:
        """Find the child that hosts a group."""
        return next((child for child in self.children if number in child.groups), None)

    def start(self, numbers: Iterable[int]) -> None:
        """Assign the first groups evenly and start their children."""
        fresh: list[Child] = []
        for place, number in enumerate(sorted(numbers)):
            if place < self.children_max:
                fresh.append(Child(self._setting))
            fresh[place % self.children_max].groups[number] = GroupState()
        self.children += fresh
        for child in fresh:
            child.spawn()

    def add(self, number: int) -> None:
        """Host a new group: in a child of its own, or where the fewest are."""
        if len(self.children) < self.children_max:
            child = Child(self._setting)
            self.children.append(child)
        else:
            child = min(self.children, key=lambda one: len(one.groups))
        child.add(number)

    def remove(self, number: int) -> None:
        """Stop hosting a group."""
        child = self.child_of(number)
        if child is None:
            return
        child.remove(number)
        if not child.groups:
            self.children.remove(child)
            self._ending.add(child)
            child.stop().addCallback(lambda _: self._ending.discard(child))

    def restart(self, number: int) -> None:
        """Let one group take up its changed files."""
        child = self.child_of(number)
        if child is not None:
            child.restart(number)

    def retry(self) -> list[int]:
        """Try again every group that has failed or waits; give their numbers.

        The others are told, so that one whose link was refused tries that again.
        """
        numbers = []
        for child in self.children:
            ill = [n for n, group in child.groups.items() if group.state in ("failed", "retrying")]
            numbers += ill
            if child.pid is None:
                child.kick()
            else:
                for number in child.groups:
                    if number in ill:
                        child.restart(number)
                    else:
                        child.hint(number)
        return sorted(numbers)

    def reload(self) -> None:
        """Have every child begin sessions with the host's certificate as it is now."""
        for child in self.children:
            child.reload()

    def ask_all(self) -> None:
        """Ask every child for a sign of life, and kill those that have not given any for long."""
        for child in self.children:
            child.ask()

    def answers(self) -> bool:
        """Tell whether any child has answered, or none had to."""
        answers = [child.answered for child in self.children if child.answered is not None]
        return not answers or any(answers)

    def has_failed(self, number: int) -> bool:
        """Tell whether a group's start has failed for good."""
        child = self.child_of(number)
        return child is not None and child.groups[number].state == "failed"

    def is_starting(self, number: int) -> bool:
        """Tell whether a group is being started, with no verdict yet."""
        child = self.child_of(number)
        return child is not None and child.groups[number].state == "starting"

    def adopt(self, number: int, descriptor: int, ended: Callable[[], None]) -> bool:
        """Pass an accepted connection to the child that hosts a group; as :meth:`Child.adopt`."""
        child = self.child_of(number)
        return child is not None and child.adopt(number, descriptor, ended)

    def forget(self, number: int) -> list[str]:
        """Forget a group's failed devices, on the operator's word; give them."""
        child = self.child_of(number)
        if child is not None:
            child.forget(number)
        return self._setting.memory.forget(number)

    def keep_failures(self) -> None:
        """Put what no state file could take so far into them: our memory is about to end."""
        memory = self._setting.memory
        for number in memory.groups():
            path = self._setting.paths.state_file(number)
            try:
                FailureLatch(path, partial(memory.of, number)).keep()
            except QdsError as error:
                _log.error(
                    "{error}: that {devices} of {name} failed is forgotten; clear it with "
                    "qdswlinit, or do not use it",
                    error=error.message,
                    devices=", ".join(memory.of(number)),
                    name=group_name(number),
                )

    def stop(self) -> Deferred[Any]:
        """End all children in order; done when they are reaped."""
        return gatherResults([child.stop() for child in [*self.children, *self._ending]])

    def status(self) -> dict[str, Any]:
        """Give ``children`` and ``groups`` of the master's Status."""
        groups = {
            number: {
                "group": number,
                "name": group_name(number),
                "state": group.state,
                "reason": group.reason,
                "code": group.code,
                "pid": child.pid,
                "failed_devices": self._setting.memory.of(number),
            }
            for child in self.children
            for number, group in child.groups.items()
        }
        children = [
            {
                "pid": child.pid,
                "state": child.state,
                "restarts": child.restarts,
                "groups": sorted(child.groups),
                "memory": child.memory,
            }
            for child in self.children
        ]
        return {"children": children, "groups": [groups[number] for number in sorted(groups)]}


__all__ = ["CHILD_COMMAND", "Setting", "Supervisor"]
