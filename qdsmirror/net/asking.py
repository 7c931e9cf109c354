"""Asks a daemon of this host over its control socket, from a process that has a reactor."""

# Twisted's amp and endpoints have few annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import errno
import os
from typing import Any

from twisted.internet import endpoints
from twisted.internet.defer import CancelledError, inlineCallbacks
from twisted.internet.error import ConnectError, ConnectionClosed
from twisted.internet.interfaces import IReactorTime
from twisted.protocols import amp

from qdsmirror.core import ampbox
from qdsmirror.errors import UnreachableError
from qdsmirror.net.control import BoundedAmp, RemoteError, why_unconnected

#: What connecting says where nobody listens.
_NOBODY = (errno.ENOENT, errno.ECONNREFUSED)


class NobodyThereError(UnreachableError):
    """Nobody listens on the socket: the daemon does not run, or does not host the group now."""


class _Asker(BoundedAmp):
    """Our end: answers nothing, and takes a whole answer."""

    box_bytes_max = ampbox.BOX_BYTES_MAX

    def locateResponder(self, name: bytes) -> None:  # noqa: N802
        """Answer nothing: nobody has anything to ask of us."""


@inlineCallbacks
def ask(
    reactor: Any,
    path: str | os.PathLike[str],
    command: type[amp.Command],
    timeout_seconds: float,
    **arguments: str,
) -> Any:
    """Run a command of a daemon; gives a Deferred of its answer, a dict.

    :param reactor: provides IReactorUNIX and IReactorTime.
    :param path: of the control socket.
    :param command: of :mod:`qdsmirror.net.control`.
    :param timeout_seconds: for the whole.
    :raises NobodyThereError: nobody listens there.
    :raises UnreachableError: no answer came in time.
    :raises QdsError: what the daemon said.
    """
    where = os.fspath(path)
    endpoint = endpoints.UNIXClientEndpoint(reactor, where, timeout=timeout_seconds)
    try:
        protocol = yield endpoints.connectProtocol(endpoint, _Asker())
    except (ConnectError, OSError) as error:
        number = getattr(error, "osError", None) or getattr(error, "errno", None)
        kind = NobodyThereError if number in _NOBODY else UnreachableError
        raise kind(
            f"no daemon answers on {where}: {why_unconnected(error)}", hint="see qdsinfo"
        ) from None
    clock: IReactorTime = reactor
    timer = clock.callLater(timeout_seconds, protocol.transport.abortConnection)
    try:
        answer = yield protocol.callRemote(command, **arguments)
    except RemoteError as error:
        raise ampbox.decode_error(str(error).encode()) from None
    except (ConnectionClosed, CancelledError, amp.AmpError) as error:
        raise UnreachableError(
            f"the daemon on {where} did not answer: {error}",
            hint="qdsdoctor; then look into its log",
        ) from None
    finally:
        if timer.active():
            timer.cancel()
        protocol.transport.loseConnection()
    return ampbox.load_json(answer["json"])
