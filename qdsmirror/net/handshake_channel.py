"""AMP made fit for a peer that has not authenticated (security.md 4).

Stock AMP answers StartTLS, grows a box without bound, and ends in a traceback when a box is
malformed.  Here a box is bounded while it is received, only the commands that the current step
allows are answered, and whatever the peer does wrong becomes a QdsError and the connection's end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from twisted.internet.defer import Deferred, fail, maybeDeferred
from twisted.internet.interfaces import IDelayedCall, IHandshakeListener, IReactorTime
from twisted.logger import Logger, LogLevel
from twisted.protocols import amp
from twisted.python.failure import Failure
from zope.interface import implementer

from qdsmirror.errors import LimitError, ProtocolError, QdsError
from qdsmirror.limits import (
    HANDSHAKE_BOX_BYTES_MAX,
    HANDSHAKE_BOX_KEYS_MAX,
    HANDSHAKE_SECONDS,
)
from qdsmirror.net.addresses import plain_address
from qdsmirror.net.handshake_commands import internal_error, wire_error
from qdsmirror.net.tls import JudgedConnection, why_lost

_LENGTH_BYTES = 2

#: What a step allows: the command's wire name, its class, its responder.
Responder = tuple[type[amp.Command], Callable[..., Any]]
Responders = Mapping[bytes, Responder]


class _StopReceivingError(Exception):
    """The connection was refused in the middle of received data: drop the rest."""


@implementer(IHandshakeListener)
class HandshakeChannel(amp.AMP):
    """One side's AMP connection until it becomes the stream, or is refused.

    A subclass answers ``responders``, is told of the verified TLS connection by ``secured``, and
    of a refusal, once, by ``ended``.

    :param reactor: for the deadline: ``HANDSHAKE_SECONDS`` from ``connectionMade`` to
        ``authenticated``, and as long again to the switch.
    :param side: what logs call this end.
    :ivar authenticated: the peer has proven the group's secret.
    :ivar verdict: why the connection was refused, or ``None``.
    """

    log = Logger()
    #: Where verdicts are logged; a side whose group logs them has them once only in the log.
    verdict_level = LogLevel.warn
    #: A TLSMemoryBIOProtocol; AMP sets it to None when the connection is lost.
    transport: Any

    def __init__(self, reactor: IReactorTime, side: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reactor = reactor
        self._side = side
        self._deadline: IDelayedCall | None = None
        self._secured = False
        self._box_keys = 0
        self._box_bytes = 0
        self.authenticated = False
        self.verdict: QdsError | None = None

    # -- for subclasses --------------------------------------------------------------------------

    def responders(self) -> Responders:
        """Give the commands that the current step allows."""
        return {}

    def secured(self) -> None:
        """Begin: TLS is complete and the peer's certificate was accepted by this end."""

    def ended(self, error: QdsError) -> None:
        """Take the reason why there is no stream."""

    def peer_authenticated(self) -> None:
        """Note that the peer has proven the secret; the rest gets a deadline of its own."""
        self.authenticated = True
        self._set_deadline()

    def refuse(self, error: QdsError, *, by_peer: bool = False) -> None:
        """End the connection with a reason, gently: what was written is still sent."""
        if self._judge(error, by_peer):
            # The deadline stays: a peer that does not close its end is aborted then.
            self.transport.loseConnection()

    def abort(self, error: QdsError) -> None:
        """End the connection with a reason, at once."""
        if self._judge(error, by_peer=False):
            self.transport.abortConnection()

    def _judge(self, error: QdsError, by_peer: bool, *, refused: bool = True) -> bool:
        """Keep the first reason, and tell it.

        :param refused: one end said no; otherwise nothing came of it, for the network's sake.
        """
        if self.verdict is not None or self.innerProtocol is not None:
            return False
        self.verdict = error
        how = f"refused{' by the peer' if by_peer else ''}" if refused else "did not end"
        code = f" ({error.code})" if refused else ""
        self.log.emit(
            self.verdict_level,
            "{side}: handshake with {peer} {how}: {reason}{code}{hint}",
            side=self._side,
            peer=self._peer_text(),
            how=how,
            reason=error.message,
            code=code,
            hint=f"; {error.hint}" if error.hint else "",
        )
        self.ended(error)
        return True

    def _peer_text(self) -> str:
        address = self.transport.getPeer() if self.transport is not None else None
        return plain_address(f"{getattr(address, 'host', address)}")

    # -- the connection's life -------------------------------------------------------------------

    def connectionMade(self) -> None:
        """Start the deadline; it covers the TLS handshake."""
        super().connectionMade()  # type: ignore[no-untyped-call]
        self._set_deadline()

    def handshakeCompleted(self) -> None:
        """Begin, now that TLS has judged the certificates (IHandshakeListener)."""
        if self._secured or self.verdict is not None:
            return
        if not isinstance(self.transport.getHandle(), JudgedConnection):
            self.abort(ProtocolError("the connection's certificates were judged by nobody"))
            return
        self._secured = True
        self.secured()

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """End with the reason that TLS, the peer or this end had."""
        self._clear_deadline()
        if self.verdict is None and self.innerProtocol is None:
            error = why_lost(self.transport, reason)
            refused = not isinstance(error, ProtocolError)
            self._judge(error, by_peer=False, refused=refused)
        super().connectionLost(reason)  # type: ignore[no-untyped-call]

    def _set_deadline(self) -> None:
        self._clear_deadline()
        self._deadline = self._reactor.callLater(HANDSHAKE_SECONDS, self._expired)

    def _clear_deadline(self) -> None:
        deadline, self._deadline = self._deadline, None
        if deadline is not None and deadline.active():
            deadline.cancel()

    def _expired(self) -> None:
        phase = "start" if self.authenticated else "authentication"
        error = ProtocolError(f"no {phase} within {HANDSHAKE_SECONDS:g} s")
        self._judge(error, by_peer=False, refused=False)
        self.transport.abortConnection()

    def _switchTo(self, newProto: Any, clientFactory: Any = None) -> None:
        # Twisted's own seam between AMP and the protocol that follows it.
        self._clear_deadline()
        super()._switchTo(newProto, clientFactory)  # type: ignore[no-untyped-call]

    # -- receiving, bounded ----------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:
        """Take bytes from the peer: boxes, then the stream."""
        if self.innerProtocol is not None:
            self.innerProtocol.dataReceived(data)
            return
        if self.verdict is not None:
            return
        if not self._secured:
            self.abort(ProtocolError("data arrived outside of TLS"))
            return
        try:
            super().dataReceived(data)  # type: ignore[no-untyped-call]
        except _StopReceivingError:
            pass

    def proto_init(self, string: bytes) -> str:
        """Begin a box."""
        self._box_keys = self._box_bytes = 0
        return str(super().proto_init(string))  # type: ignore[no-untyped-call]

    def proto_key(self, string: bytes) -> str:
        """Count a key, and let its value be no longer than the box still may."""
        if string:
            self._box_keys += 1
            if self._box_keys > HANDSHAKE_BOX_KEYS_MAX:
                self._stop(LimitError(f"an AMP box of more than {HANDSHAKE_BOX_KEYS_MAX} keys"))
            self._count(string)
        state = str(super().proto_key(string))  # type: ignore[no-untyped-call]
        if self.verdict is not None:
            raise _StopReceivingError
        if state == "value":
            room = HANDSHAKE_BOX_BYTES_MAX - self._box_bytes - _LENGTH_BYTES
            self.MAX_LENGTH = max(0, min(self._MAX_VALUE_LENGTH, room))
        return state

    def proto_value(self, string: bytes) -> str:
        """Count a value."""
        self._count(string)
        return str(super().proto_value(string))  # type: ignore[no-untyped-call]

    def _count(self, string: bytes) -> None:
        self._box_bytes += _LENGTH_BYTES + len(string)
        if self._box_bytes > HANDSHAKE_BOX_BYTES_MAX:
            self._stop(LimitError(f"an AMP box of more than {HANDSHAKE_BOX_BYTES_MAX} bytes"))

    def lengthLimitExceeded(self, length: int) -> None:
        """Refuse a key or value before it is buffered."""
        self.abort(
            LimitError(f"an AMP key of {length} bytes, or a box above {HANDSHAKE_BOX_BYTES_MAX}")
        )

    def _stop(self, error: QdsError) -> NoReturn:
        self.abort(error)
        raise _StopReceivingError

    # -- dispatching, by the step's list ---------------------------------------------------------

    def ampBoxReceived(self, box: amp.Box) -> None:
        """Take an answer to what was asked, or a command that the step allows."""
        if amp.ANSWER in box or amp.ERROR in box:
            tag = box[amp.ANSWER] if amp.ANSWER in box else box[amp.ERROR]
            complete = amp.ANSWER in box or {amp.ERROR_CODE, amp.ERROR_DESCRIPTION} <= box.keys()
            if tag not in (self._outstandingRequests or {}) or not complete:
                self._stop(ProtocolError("an AMP answer to nothing that was asked"))
        elif amp.COMMAND not in box:
            self._stop(ProtocolError("an AMP box that is neither a command nor an answer"))
        super().ampBoxReceived(box)  # type: ignore[no-untyped-call]

    def dispatchCommand(self, box: amp.Box) -> Deferred[Any]:
        """Answer an allowed command; anything else is an error and the connection's end."""
        name = box[amp.COMMAND]
        try:
            command, responder = self._allowed(name, asks=amp.ASK in box)
            arguments = command.parseArguments(box, self)  # type: ignore[no-untyped-call]
        except ProtocolError as error:
            return self._malformed(error, box)
        except (KeyError, TypeError, ValueError) as problem:
            return self._malformed(ProtocolError(f"malformed command {name!r}: {problem}"), box)
        answer: Deferred[Any] = maybeDeferred(responder, **arguments)
        answer.addCallback(command.makeResponse, self)
        return answer.addErrback(self._responder_failed)

    def _allowed(self, name: bytes, *, asks: bool) -> Responder:
        allowed = self.responders().get(name)
        if allowed is None:
            raise ProtocolError(f"command {name[:32]!r} is not allowed at this step")
        if allowed[0].requiresAnswer and not asks:
            raise ProtocolError(f"command {name!r} asks for no answer")
        return allowed

    def _malformed(self, error: ProtocolError, box: amp.Box) -> Deferred[Any]:
        if amp.ASK not in box:
            self._stop(error)
        return self._answer_refusal(error)

    def _responder_failed(self, failure: Failure) -> Deferred[Any]:
        error = failure.value
        if not isinstance(error, QdsError):
            self.log.failure("{side}: handshake", failure, side=self._side)
            error = internal_error(self._side)
        return self._answer_refusal(error)

    def _answer_refusal(self, error: QdsError) -> Deferred[Any]:
        """Judge, and answer with the error; AMP closes once that is written (a fatal error)."""
        self._judge(error, by_peer=False)
        return fail(wire_error(error))

    def unhandledError(self, failure: Failure) -> None:
        """End the connection over what no other code took."""
        self.log.failure("{side}: handshake", failure, side=self._side)
        if self.transport is not None:
            self._judge(internal_error(self._side), by_peer=False)
            self.transport.abortConnection()
