"""The master primary mirror daemon as a twistd plugin: ``twistd -n qdspmd [--root DIR]``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdsmirror.daemons.master import Master
from qdsmirror.daemons.service import Options, make_service


class PmdMaster(Master):
    """Supervises the children that ship the writelogs of this host's primary groups."""

    daemon = "qdspmd"
    role = "pmd"
    side = "primary"
    has_certificate = True

    def depends_on(self, number: int) -> list[Path]:
        """Name the group's secret: a new one takes effect by apply."""
        return [self.paths.group_secret(number)]


def makeService(options: Any) -> PmdMaster:  # noqa: N802
    """Make the service for twistd."""
    return make_service(PmdMaster, options)


__all__ = ["Options", "PmdMaster", "makeService"]
