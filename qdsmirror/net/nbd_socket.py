"""Listening Unix sockets for NBD clients: mode 0660, and never open to others in between."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from qdsmirror.limits import NBD_CONNECTIONS_MAX

_MODE = 0o660


def bind_nbd(path: Path) -> socket.socket:
    """Listen on a path; a socket found there is replaced.

    :raises OSError: the socket cannot be made.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o777 & ~_MODE)
    try:
        path.unlink(missing_ok=True)
        listening.bind(os.fspath(path))
        # Not every kernel minds the umask here; nobody can connect before we listen.
        path.chmod(_MODE)
        listening.listen(NBD_CONNECTIONS_MAX)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(mask)
    return listening
