"""A real child whose syncs of the devices named in ``var/faulty`` fail, as long as that exists.

Its channel, which is the reactor's, ends it when another thread sends.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

from twisted.python.threadable import isInIOThread

from qdsmirror.daemons import child
from qdsmirror.daemons.channel import Channel

_send = Channel.send
_fdatasync = os.fdatasync


def fdatasync(descriptor: int) -> None:
    path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    faulty = path.parent / "var" / "faulty"
    if faulty.exists() and path.name in faulty.read_text().split():
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    _fdatasync(descriptor)


def send(channel: Channel, *args: Any) -> bool:
    if not isInIOThread():  # type: ignore[no-untyped-call]
        os._exit(99)
    return _send(channel, *args)


if __name__ == "__main__":
    Channel.send = send  # type: ignore[method-assign]
    os.fdatasync = fdatasync
    sys.exit(child.main())
