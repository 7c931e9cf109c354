"""Who asks for a change over a control socket, by the kernel's word, and what came of it."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.protocols import amp
from twisted.python.failure import Failure

from qdsmirror.core import ampbox
from qdsmirror.errors import QdsError


class Asked(NamedTuple):
    """A command that changes something, and who asks for it (unix(7), SO_PEERCRED).

    :ivar pid: 0 where that is not known; ``uid`` is the daemon's own then.
    """

    pid: int
    uid: int
    command: str
    arguments: dict[str, str]


#: Told of each such command when it arrives; what it gives is told how that ended.
Audit = Callable[[Asked], Callable[[QdsError | None], None]]

_CREDENTIALS = struct.Struct("iII")


def unnoted(_asked: Asked) -> Callable[[QdsError | None], None]:
    """Note nothing."""
    return lambda _error: None


def audited(
    audit: Audit,
    transport: object,
    name: bytes,
    respond: Callable[..., Any],
    box: dict[bytes, bytes],
) -> Deferred[Any]:
    """Respond to a command, and have it noted who asked and what came of it.

    :param transport: the connection that it came by.
    :param respond: gives the answer to ``box``.
    """
    if (name, box.get(b"to")) == (b"Checkpoint", b"list") or _changes_nothing(name, box):
        return maybeDeferred(respond, box)
    pid, uid = _peer(transport)
    arguments = {
        key.decode("ascii", "replace"): value.decode("utf-8", "replace")
        for key, value in box.items()
        if key not in (amp.COMMAND, amp.ASK)
    }
    answered = audit(Asked(pid, uid, name.decode("ascii"), arguments))

    def note(result: Any) -> Any:
        answered(_error_in(result))
        return result

    return maybeDeferred(respond, box).addBoth(note)


def _changes_nothing(name: bytes, box: dict[bytes, bytes]) -> bool:
    """Tell whether a command asks for the present settings only."""
    return name == b"Set" and box.get(b"settings") == b"{}"


def _peer(transport: object) -> tuple[int, int]:
    connection: socket.socket | None = getattr(transport, "socket", None)
    if connection is None:
        return 0, os.geteuid()
    size = _CREDENTIALS.size
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, uid, _gid = _CREDENTIALS.unpack(found)
    return pid, uid


def _error_in(result: Any) -> QdsError | None:
    """Give the error that a command ends with, if it does."""
    if not isinstance(result, Failure):
        return None
    if isinstance(result.value, amp.RemoteAmpError):
        return ampbox.decode_error(str(result.value.description).encode())
    return QdsError(result.getErrorMessage())
