"""Settings that change while a group runs: ``qdsset`` at each of its daemons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.logger import Logger

from qdsmirror.config import GroupConfig
from qdsmirror.configlive import changed, differing, values
from qdsmirror.core.jsontext import parse_object
from qdsmirror.errors import UsageError


class Configured(Protocol):
    """A group that goes by its configuration."""

    name: str
    config: GroupConfig


class LiveSettings:
    """What is set at one daemon's group until its next start.

    :param daemon: ``driver``, ``pmd``, ``rmd`` or ``stats``.
    :param apply: goes by the group's new ``config`` from now on; may give a Deferred that fires
        when it does so durably.
    :param role: of this host, where the daemon runs on both.
    :ivar texts: what was set, by key.
    """

    log = Logger()

    def __init__(
        self,
        group: Configured,
        daemon: str,
        apply: Callable[[], Deferred[None] | None],
        role: str = "",
    ) -> None:
        self.texts: dict[str, str] = {}
        self._group = group
        self._daemon = daemon
        self._role = role
        self._apply = apply
        self._started_with = group.config

    @inlineCallbacks
    def set(self, settings: str) -> Any:
        """Change settings, all or none; fires with their present values.

        :param settings: a JSON object of texts by key.
        :raises UsageError: a key or value that may not be.
        """
        group = self._group
        wanted = _read(settings)
        if wanted:
            self.go_by(wanted)
            text = ", ".join(f"{key} = {value}" for key, value in wanted.items())
            self.log.info("{group}: set: {text}", group=group.name, text=text)
            applied = self._apply()
            if applied is not None:
                yield applied
        return {"settings": values(group.config, self._daemon, self._role)}

    def go_by(self, wanted: Mapping[str, str]) -> None:
        """Change the configuration, without having it applied.

        :raises UsageError: as :meth:`set`; nothing is changed.
        """
        self._group.config = changed(self._group.config, wanted, self._daemon)
        self.texts |= wanted

    def status(self) -> dict[str, Any]:
        """Give what differs from the file as it was read at the start."""
        return differing(self._group.config, self._started_with, self._daemon, self._role)


def _read(settings: str) -> dict[str, str]:
    wanted = parse_object(settings, "what is to be set", UsageError)
    if not all(isinstance(one, str) for one in wanted.values()):
        raise UsageError("what is to be set are not texts")
    return wanted
