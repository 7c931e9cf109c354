"""What a mirror daemon has moved, by LDSU, for performance tracking files and metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from qdsmirror.core import frames
from qdsmirror.core.frames import ENTRY, HEADER_BYTES, Buffer, FrameHeader

_OF_REFRESH = frozenset((frames.REFRESH, frames.REFRESH_ZEROES))
#: Where a frame says of which kind its first entry is: behind that entry's offset and length.
_KIND_AT = HEADER_BYTES + ENTRY.size - 4


class Traffic:
    """Counts since the daemon took the group up; they go on from session to session.

    Frames are counted as they leave the pmd, or as the rmd takes them: before compression, and
    each time that they are sent.

    :param names: of the LDSUs, by their indices.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        #: By LDSU: bytes of frames, of these data, and entries; of the data what a refresh sent
        #: of blocks as they are; and of the frames hashes of a verify.
        self._counts = [[0, 0, 0, 0, 0] for _ in self._names]

    def count(self, header: FrameHeader, frame: Buffer) -> None:
        """Count a frame; a refresh's entries have frames of their own."""
        counts = self._counts[header.ldsu]
        counts[0] += len(frame)
        if header.kind == frames.ENTRIES:
            counts[1] += header.payload_bytes
            counts[2] += header.entry_count
            if frame[_KIND_AT] in _OF_REFRESH:
                counts[3] += header.payload_bytes
        elif header.kind == frames.VERIFY:
            counts[4] += header.payload_bytes

    def status(self) -> dict[str, Any]:
        """Give the counts, and the processor time that this process has used, in seconds."""
        return {
            "cpu_seconds": time.process_time(),
            "ldsus": [
                {
                    "name": name,
                    "frame_bytes": of_frames,
                    "data_bytes": of_data,
                    "entries": entries,
                    "refresh_bytes": of_refresh,
                    "verify_bytes": of_verify,
                }
                for name, (of_frames, of_data, entries, of_refresh, of_verify) in zip(
                    self._names, self._counts, strict=True
                )
            ],
        }
