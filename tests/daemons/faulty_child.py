"""A real child whose syncs of the devices named in ``var/faulty`` fail, as long as that exists."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from qdsmirror.daemons import child

_fdatasync = os.fdatasync


def fdatasync(descriptor: int) -> None:
    path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    faulty = path.parent / "var" / "faulty"
    if faulty.exists() and path.name in faulty.read_text().split():
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    _fdatasync(descriptor)


if __name__ == "__main__":
    os.fdatasync = fdatasync
    sys.exit(child.main())
