"""Asks a daemon of this host over its control socket, from a process that has a reactor."""

# Twisted's amp and endpoints have few annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any

from twisted.internet import endpoints
from twisted.internet.defer import inlineCallbacks
from twisted.internet.error import ConnectError, ConnectionClosed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.protocols import amp
from twisted.python.failure import Failure

from qdsmirror.core import ampbox
from qdsmirror.core.jsontext import parse_object
from qdsmirror.errors import UnreachableError
from qdsmirror.net.control import AttachPmd, BoundedAmp, RemoteError

#: What connecting says where nobody listens.
_NOBODY = (errno.ENOENT, errno.ECONNREFUSED)


class NobodyThereError(UnreachableError):
    """Nobody listens on the socket: the daemon does not run, or does not host the group now."""


class _Asker(BoundedAmp):
    """Our end: answers nothing, and takes a whole answer."""

    box_bytes_max = ampbox.BOX_BYTES_MAX

    def locateResponder(self, name: bytes) -> None:  # noqa: N802
        """Answer nothing: nobody has anything to ask of us."""


class _Attacher(_Asker):
    """The pmd's end: descriptors that were not claimed are closed with the connection."""

    def fileDescriptorReceived(self, descriptor: int) -> None:  # noqa: N802
        """Keep a received descriptor from processes started later."""
        os.set_inheritable(descriptor, False)
        super().fileDescriptorReceived(descriptor)

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: N802
        """Close descriptors of an answer that never became complete."""
        super().connectionLost(reason)
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


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
    :param timeout_seconds: for connecting, and again for the answer.
    :raises NobodyThereError: nobody listens there.
    :raises UnreachableError: no answer came in time.
    :raises QdsError: what the daemon said.
    """
    answer = yield _call(reactor, path, _Asker(), command, timeout_seconds, arguments)
    return parse_object(answer["json"], "the answer")


@inlineCallbacks
def attach_to_driver(
    reactor: Any, path: str | os.PathLike[str], timeout_seconds: float = 5.0
) -> Any:
    """Attach a pmd to a group's driver.

    :param reactor: provides IReactorUNIX and IReactorTime.
    :param path: the group's driver control socket.
    :param timeout_seconds: for connecting, and again for the answer.
    :returns: a Deferred of ``(information, [writelog descriptors], watermark descriptor)``; the
        descriptors belong to the caller.
    :raises NobodyThereError: nobody listens there.
    :raises UnreachableError: the answer did not come in time.
    :raises QdsError: what the driver said.
    """
    answer = yield _call(
        reactor, path, _Attacher(), AttachPmd, timeout_seconds, {},
        whom="driver", hint="start it with launchdriver",
    )  # fmt: skip
    return parse_object(answer["json"], "the answer"), answer["logs"], answer["watermarks"]


@inlineCallbacks
def _call(
    reactor: Any,
    path: str | os.PathLike[str],
    protocol: _Asker,
    command: type[amp.Command],
    timeout_seconds: float,
    arguments: Mapping[str, str],
    whom: str = "daemon",
    hint: str = "see qdsinfo",
) -> Any:
    """Connect, run one command and disconnect.

    :param whom: who listens there, for errors; ``hint``: where nobody does.
    """
    where = os.fspath(path)
    endpoint = endpoints.UNIXClientEndpoint(reactor, where, timeout=timeout_seconds)
    try:
        connection: Any = yield endpoints.connectProtocol(endpoint, protocol)
    except (ConnectError, OSError) as error:
        kind = NobodyThereError if _error_number(error) in _NOBODY else UnreachableError
        raise kind(f"no {whom} answers on {where}: {why_unconnected(error)}", hint=hint) from None
    clock: IReactorTime = reactor
    timer = clock.callLater(timeout_seconds, connection.transport.abortConnection)
    try:
        answer = yield connection.callRemote(command, **arguments)
    except RemoteError as error:
        raise ampbox.decode_error(str(error).encode()) from None
    except (ConnectionClosed, amp.AmpError) as error:
        raise UnreachableError(
            f"the {whom} on {where} did not answer: {error}",
            hint=f"qdsdoctor; then look into the {whom}'s log",
        ) from None
    finally:
        if timer.active():
            timer.cancel()
        connection.transport.loseConnection()
    return answer


def why_unconnected(error: Exception) -> str:
    """Tell in the system's own words why a connection could not be made."""
    number = _error_number(error)
    return str(error).rstrip(".") if number is None else os.strerror(number)


def _error_number(error: Exception) -> int | None:
    """Give the ``errno`` of an attempt to connect, where Twisted or the system says one."""
    number = getattr(error, "osError", None) or getattr(error, "errno", None)
    return number if isinstance(number, int) else None
