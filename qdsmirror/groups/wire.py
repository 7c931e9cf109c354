"""What the stream of a group has cost, before and after compression, for ``qdsinfo``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qdsmirror.core.compression import NONE


@dataclass
class Wire:
    """Counts since the daemon took the group up; they go on from session to session.

    :ivar wanted: the compression that is configured.
    :ivar compression: the one in use; empty while there is no session.
    :ivar frame_bytes: of frames, as they are in the log.
    :ivar wire_bytes: of the messages that carried them; without TLS, with what was sent twice.
    """

    wanted: str = NONE
    compression: str = ""
    frame_bytes: int = 0
    wire_bytes: int = 0

    def status(self, paths: list[dict[str, Any]]) -> dict[str, Any]:
        """Describe it, with the paths as they are."""
        return {
            "compression": self.compression or None,
            "wanted": self.wanted,
            "frame_bytes": self.frame_bytes,
            "wire_bytes": self.wire_bytes,
            "paths": paths,
        }
