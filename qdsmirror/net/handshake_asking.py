"""The asking end of a handshake: the pmd's, or a visitor's; ``net.handshake`` has the picture."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, FirstError, gatherResults
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IReactorTime
from twisted.logger import LogLevel
from twisted.protocols import amp
from twisted.python.failure import Failure

from qdsmirror.core.authentication import Role, Transcript
from qdsmirror.errors import IdentityError, ProtocolError, QdsError
from qdsmirror.net.handshake_channel import HandshakeChannel, Responders
from qdsmirror.net.handshake_checks import hint_secret
from qdsmirror.net.handshake_commands import (
    Authenticate,
    Refuse,
    error_from,
    error_text,
    internal_error,
    one_line,
)
from qdsmirror.paths import group_name

_ANSWER_SHOWN = 200


class Asking(HandshakeChannel):
    """Asks the secondary, step by step; a subclass says what, in ``converse``.

    :param reactor: for the deadline.
    :param group: number of the logical group.
    :ivar done: fires with what ``conversed`` makes of the conversation, or fails with a QdsError;
        when cancelled it aborts the connection.
    """

    #: Whoever asks tells of it, not again at each try.
    verdict_level = LogLevel.debug

    def __init__(self, reactor: IReactorTime, group: int) -> None:
        super().__init__(reactor, f"{group_name(group)} primary")
        self._group = group
        self._conversation: Deferred[Any] | None = None
        self.done: Deferred[Any] = Deferred(self._abandoned)

    async def converse(self) -> Any:
        """Ask; any error ends the connection."""
        raise NotImplementedError

    def conversed(self, result: Any) -> Any:
        """Give what ``done`` fires with, from what ``converse`` returned."""
        return result

    def secured(self) -> None:
        """Begin: the secondary's certificate was accepted."""
        self._conversation = Deferred.fromCoroutine(self.converse())
        self._conversation.addCallbacks(self._succeeded, self._failed)

    def responders(self) -> Responders:
        """Answer nothing: this end asks."""
        return {}

    def ended(self, error: QdsError) -> None:
        """Fail ``done``, and stop a conversation that is under way."""
        done, conversation = self.done, self._conversation
        if not done.called:
            done.errback(error)
        if conversation is not None and not conversation.called:
            conversation.cancel()

    async def prove(self, transcript: Transcript, secret: bytes) -> None:
        """Prove the group's secret, and have the secondary prove it.

        :raises IdentityError: either proof is wrong.
        """
        proof = await self.ask(Authenticate, mac=transcript.proof(secret, Role.PRIMARY))
        if not transcript.verify(secret, Role.SECONDARY, proof["mac"]):
            raise IdentityError(
                f"the secondary did not prove the secret of {group_name(self._group)}",
                hint=hint_secret(self._group),
            )

    def ask(self, command: type[amp.Command], *args: Any, **values: Any) -> Deferred[Any]:
        """Ask the secondary; fails with a QdsError where it answers with an error."""
        asked: Deferred[Any] = self.callRemote(command, *args, **values)  # type: ignore[no-untyped-call]
        return asked.addErrback(self._answered_error, command)

    def _answered_error(self, failure: Failure, command: type[amp.Command]) -> Any:
        error = failure.value
        if isinstance(error, QdsError):
            told = error_from(error.code, error.message)
            self.refuse(told, by_peer=True)
            raise told
        if isinstance(error, amp.RemoteAmpError | amp.UnhandledCommand):
            raise ProtocolError(one_line(f"the secondary answered: {error}"[:_ANSWER_SHOWN]))
        # An empty answer cannot be malformed: that is the stream failing after Start.
        if command.response and isinstance(error, KeyError | TypeError | ValueError):
            raise ProtocolError(f"malformed answer: {error}")
        return failure

    @staticmethod
    async def ask_all(asked: list[Deferred[Any]]) -> list[Any]:
        """Wait for several answers; the first error is raised."""
        try:
            return await gatherResults(asked, consumeErrors=True)
        except FirstError as first:
            first.subFailure.raiseException()

    def _succeeded(self, result: Any) -> None:
        self.done.callback(self.conversed(result))

    def _failed(self, failure: Failure) -> None:
        """End the connection with the error that ended the conversation, telling the peer."""
        error = failure.value
        if self.verdict is not None:
            return
        if not isinstance(error, QdsError):
            self.log.failure("{side}: handshake", failure, side=self._side)
            error = internal_error(self._side)
        self._tell(error)
        self.refuse(error)
        if not self.done.called:
            # The stream's protocol failed in the middle of the switch.
            self.done.errback(error)
            self.transport.abortConnection()

    def _tell(self, error: QdsError) -> None:
        # Nobody waits for an answer: the connection ends behind it.
        try:
            self.callRemote(Refuse, code=error.code, text=error_text(error))  # type: ignore[no-untyped-call]
        except (amp.ProtocolSwitched, ConnectionLost):
            pass

    def _abandoned(self, _: Deferred[Any]) -> None:
        self.verdict = ProtocolError("the connection attempt was given up")
        if self._conversation is not None:
            self._conversation.cancel()
        if self.transport is not None:
            self.transport.abortConnection()
