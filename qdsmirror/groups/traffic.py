"""What a mirror daemon has moved, by LDSU, for performance tracking files and metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from qdsmirror.core.frames import ENTRIES, FrameHeader


class Traffic:
    """Counts since the daemon took the group up; they go on from session to session.

    Frames are counted as they leave the pmd, or as the rmd takes them: before compression, and
    each time that they are sent.

    :param names: of the LDSUs, by their indices.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        #: By LDSU: bytes of frames, of these the applications' data, and entries.
        self._counts = [[0, 0, 0] for _ in self._names]

    def count(self, header: FrameHeader) -> None:
        """Count a frame."""
        counts = self._counts[header.ldsu]
        counts[0] += header.frame_bytes
        if header.kind == ENTRIES:
            counts[1] += header.payload_bytes
            counts[2] += header.entry_count

    def status(self) -> dict[str, Any]:
        """Give the counts, and the processor time that this process has used, in seconds."""
        return {
            "cpu_seconds": time.process_time(),
            "ldsus": [
                {"name": name, "frame_bytes": frame_bytes, "data_bytes": data, "entries": entries}
                for name, (frame_bytes, data, entries) in zip(
                    self._names, self._counts, strict=True
                )
            ],
        }
