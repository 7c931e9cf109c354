"""The control channel: AMP commands on Unix sockets of mode 0600.

It stands where the patent has "private ioctl calls" between daemons, tools and driver.  Answers
are JSON objects, spread over several AMP values where they are long (core.ampbox).  Nothing but
the commands below is answered; the stock StartTLS responder is out of reach (security.md 4).
"""

# Twisted's amp has few annotations.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NoReturn

from twisted.internet import defer
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IAddress, IListeningPort, IReactorUNIX
from twisted.internet.protocol import Factory, connectionDone
from twisted.logger import Logger
from twisted.protocols import amp
from twisted.python.failure import Failure

from qdsmirror import limits
from qdsmirror.core import ampbox
from qdsmirror.core.jsontext import dump_json
from qdsmirror.errors import LimitError, QdsError, UsageError
from qdsmirror.net.control_audit import Audit, audited, unnoted

_log = Logger()

#: What a driver's answer to AttachPmd holds: information, writelogs, watermark socket.
Attachment = tuple[dict[str, Any], list[int], int]


class Spread(amp.Argument):
    """Bytes, up to CONTROL_JSON_BYTES_MAX, spread over as many keys as they need."""

    def toBox(  # noqa: N802
        self, name: bytes, strings: dict[bytes, bytes], objects: dict[str, Any], proto: object
    ) -> None:
        """Put the value named ``name`` into the box."""
        strings.update(ampbox.spread(name, objects[name.decode("ascii")]))

    def fromBox(  # noqa: N802
        self, name: bytes, strings: dict[bytes, bytes], objects: dict[str, Any], proto: object
    ) -> None:
        """Take the value out of the box."""
        objects[name.decode("ascii")] = ampbox.gather(name, strings)


class Descriptors(amp.Argument):
    """File descriptors, in order (what ``amp.ListOf(amp.Descriptor())`` cannot do)."""

    _one = amp.Descriptor()

    def toStringProto(self, descriptors: list[int], proto: object) -> bytes:  # noqa: N802
        """Send the descriptors; give their ordinals on this connection."""
        return b" ".join(self._one.toStringProto(one, proto) for one in descriptors)

    def fromStringProto(self, ordinals: bytes, proto: object) -> list[int]:  # noqa: N802
        """Claim the descriptors that were received under these ordinals."""
        return [self._one.fromStringProto(one, proto) for one in ordinals.split()]


class RemoteError(Exception):
    """A QdsError on its way; its text is ``core.ampbox.encode_error``'s."""

    def __str__(self) -> str:
        return str(self.args[0])


_JSON: list[tuple[bytes, amp.Argument]] = [(b"json", Spread())]


class _Command(amp.Command):
    """What all commands have: their errors, and most their answer."""

    response: ClassVar[list[tuple[bytes, amp.Argument]]] = _JSON
    errors: ClassVar[dict[type[Exception], bytes]] = {RemoteError: ampbox.QDS_ERROR}


class Status(_Command):
    """What the daemon, or the group, is doing."""


class Refresh(_Command):
    """Begin a refresh of the kind given; answered once it has durably begun."""

    arguments: ClassVar[list[tuple[bytes, amp.Argument]]] = [(b"kind", amp.Unicode())]


class Verify(_Command):
    """Begin a verify (``compare``, ``repair``) or end it (``stop``); answered once durable."""

    arguments: ClassVar[list[tuple[bytes, amp.Argument]]] = [(b"how", amp.Unicode())]


class Bypass(_Command):
    """Enter (``on``) or leave (``off``) bypass; answered once that is durable."""

    arguments: ClassVar[list[tuple[bytes, amp.Argument]]] = [(b"to", amp.Unicode())]


class Extend(_Command):
    """Extend an LDSU's writelog by a device (empty: any); answered once that is durable."""

    arguments: ClassVar[list[tuple[bytes, amp.Argument]]] = [
        (b"ldsu", amp.Unicode()),
        (b"device", amp.Unicode()),
    ]


class Free(Extend):
    """Begin to free a device of an LDSU's writelog (empty: any); answered once that is durable."""


class Checkpoint(_Command):
    """Take (``on``), release (``off``) or ``list`` the checkpoint of a group (rmd only)."""

    arguments: ClassVar[list[tuple[bytes, amp.Argument]]] = [
        (b"to", amp.Unicode()),
        (b"name", amp.Unicode()),
        (b"hold", amp.Unicode()),
    ]


class Mark(_Command):
    """Put a mark into the group's order; answered once it is durable (driver only)."""

    arguments: ClassVar[list[tuple[bytes, amp.Argument]]] = [(b"name", amp.Unicode())]


class KillRefresh(_Command):
    """End the refresh that is running."""


class Backfresh(_Command):
    """Begin a backfresh; answered once it has durably begun."""

    arguments: ClassVar[list[tuple[bytes, amp.Argument]]] = [
        (b"options", amp.Unicode()),
        (b"keep", amp.Unicode()),
    ]


class KillBackfresh(_Command):
    """End the backfresh that is running; answered once that is durable."""

    arguments: ClassVar[list[tuple[bytes, amp.Argument]]] = [(b"options", amp.Unicode())]


class Set(_Command):
    """Change settings (a JSON object of texts) until the next start; answered once they hold."""

    arguments: ClassVar[list[tuple[bytes, amp.Argument]]] = [(b"settings", amp.Unicode())]


class SetKnobs(_Command):
    """Hold back what is sent (pmd) or answered (driver) by what throttles say: a JSON object."""

    arguments: ClassVar[list[tuple[bytes, amp.Argument]]] = [(b"knobs", amp.Unicode())]


class Apply(_Command):
    """Take up changed, new and removed group files (masters only)."""


class ForgetFailures(_Command):
    """Forget a group's failed devices: its logs were initialised anew (masters only)."""

    arguments: ClassVar[list[tuple[bytes, amp.Argument]]] = [(b"group", amp.Unicode())]


class AttachPmd(_Command):
    """Hand the pmd the writelogs, read-only, and the watermark socket (driver only)."""

    response: ClassVar[list[tuple[bytes, amp.Argument]]] = [
        *_JSON,
        (b"logs", Descriptors()),
        (b"watermarks", amp.Descriptor()),
    ]


class BoundedAmp(amp.AMP):
    """AMP whose boxes are bounded: a stock peer can be grown without limit."""

    box_bytes_max = ampbox.REQUEST_BYTES_MAX
    _box_bytes = 0

    def makeConnection(self, transport: Any) -> None:  # noqa: N802
        """Connect without AMP's line in the log: tools ask several times a second."""
        self._transportPeer = self._transportHost = None
        amp.BinaryBoxProtocol.makeConnection(self, transport)

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: N802
        """Disconnect likewise."""
        amp.BinaryBoxProtocol.connectionLost(self, reason)
        self.transport = None

    def proto_key(self, string: bytes) -> str:
        """Take a key; the end of a box ends its count."""
        self._box_bytes = self._box_bytes + len(string) if string else 0
        return str(super().proto_key(string))

    def proto_value(self, string: bytes) -> str:
        """Take a value, unless the box is too long."""
        self._box_bytes += len(string)
        if self._box_bytes > self.box_bytes_max:
            _log.error("a control connection sent too long a box, over {n}", n=self.box_bytes_max)
            if self.transport is not None:
                self.transport.loseConnection()
        return str(super().proto_value(string))


class _ControlProtocol(BoundedAmp):
    """One connection to a daemon."""

    def __init__(self, server: ControlServer) -> None:
        super().__init__()
        self._server = server
        self._passed: list[int] = []

    def locateResponder(self, name: bytes) -> Callable[..., Any] | None:  # noqa: N802
        """Find the responder of a command; only this module's commands have one."""
        if name not in _ALLOWED:
            return None
        found: Callable[..., Any] | None = amp.CommandLocator.locateResponder(self, name)
        if found is None or name in _UNNOTED:
            return found
        return partial(audited, self._server.audit, self.transport, name, found)

    def _run(
        self, method: str, *arguments: str, answer: Callable[[Any], dict[str, Any]] | None = None
    ) -> Deferred[dict[str, Any]]:
        """Call the handler; whatever fails travels as a QdsError."""
        call = getattr(self._server.handler, method, None)
        if call is None:
            error = UsageError(f"the daemon on {self._server.path} does not do {method}")
            return defer.fail(RemoteError(ampbox.encode_error(error).decode()))
        running = maybeDeferred(call, *arguments).addCallback(answer or self._answer)
        return running.addErrback(self._failed, method)

    def _failed(self, failure: Failure, method: str) -> NoReturn:
        error = failure.value
        if not isinstance(error, QdsError):
            _log.failure("{method} failed", failure, method=method)
            error = QdsError(
                f"{method} failed inside the daemon: {type(error).__name__}: {error}",
                hint="qdsdoctor; then look into the daemon's log",
            )
        raise RemoteError(ampbox.encode_error(error).decode())

    def _answer(self, result: dict[str, Any] | None) -> dict[str, Any]:
        text = dump_json(result or {})
        if len(text) > limits.CONTROL_JSON_BYTES_MAX:
            raise LimitError(f"the answer's {len(text)} bytes exceed the control channel's bound")
        return {"json": text}

    @Status.responder
    def _status(self) -> Deferred[dict[str, Any]]:
        return self._run("status")

    @Refresh.responder
    def _refresh(self, kind: str) -> Deferred[dict[str, Any]]:
        return self._run("refresh", kind)

    @Verify.responder
    def _verify(self, how: str) -> Deferred[dict[str, Any]]:
        return self._run("verify", how)

    @Bypass.responder
    def _bypass(self, to: str) -> Deferred[dict[str, Any]]:
        return self._run("switch_bypass", to)

    @Extend.responder
    def _extend(self, ldsu: str, device: str) -> Deferred[dict[str, Any]]:
        return self._run("extend", ldsu, device)

    @Free.responder
    def _free(self, ldsu: str, device: str) -> Deferred[dict[str, Any]]:
        return self._run("free", ldsu, device)

    @Checkpoint.responder
    def _checkpoint(self, to: str, name: str, hold: str) -> Deferred[dict[str, Any]]:
        return self._run("switch_checkpoint", to, name, hold)

    @Mark.responder
    def _mark(self, name: str) -> Deferred[dict[str, Any]]:
        return self._run("mark", name)

    @KillRefresh.responder
    def _kill_refresh(self) -> Deferred[dict[str, Any]]:
        return self._run("kill_refresh")

    @Backfresh.responder
    def _backfresh(self, options: str, keep: str) -> Deferred[dict[str, Any]]:
        return self._run("begin_backfresh", options, keep)

    @KillBackfresh.responder
    def _kill_backfresh(self, options: str) -> Deferred[dict[str, Any]]:
        return self._run("kill_backfresh", options)

    @Set.responder
    def _set(self, settings: str) -> Deferred[dict[str, Any]]:
        return self._run("set_live", settings)

    @SetKnobs.responder
    def _set_knobs(self, knobs: str) -> Deferred[dict[str, Any]]:
        return self._run("set_knobs", knobs)

    @Apply.responder
    def _apply(self) -> Deferred[dict[str, Any]]:
        return self._run("apply")

    @ForgetFailures.responder
    def _forget_failures(self, group: str) -> Deferred[dict[str, Any]]:
        return self._run("forget_failures", group)

    @AttachPmd.responder
    def _attach_pmd(self) -> Deferred[dict[str, Any]]:
        return self._run("attach_pmd", answer=self._hand_over)

    def _hand_over(self, attachment: Attachment) -> dict[str, Any]:
        information, logs, watermarks = attachment
        # They leave with the answer's bytes, after this returns; the client closes the
        # connection when it has them, and only then are ours of no more use.
        self._passed += [*logs, watermarks]
        return {**self._answer(information), "logs": logs, "watermarks": watermarks}

    def connectionLost(self, reason: Failure = connectionDone) -> None:  # noqa: N802
        """Close what was passed, and what was sent here unasked."""
        super().connectionLost(reason)
        self._server.forget(self)
        for descriptor in [*self._passed, *self._descriptors.values()]:
            os.close(descriptor)
        self._passed = []
        self._descriptors.clear()


_ALLOWED = {
    command.commandName
    for command in (
        *(Status, Bypass, Refresh, KillRefresh, Verify, Extend, Free),
        *(Checkpoint, Mark),
        *(Backfresh, KillBackfresh, Set, SetKnobs, Apply, ForgetFailures, AttachPmd),
    )
}


#: What changes nothing; and what throttles set again and again, and themselves keep a record of.
_UNNOTED = {command.commandName for command in (Status, AttachPmd, SetKnobs)}


class _ControlFactory(Factory):
    """Makes protocols up to the connection limit."""

    noisy = False

    def __init__(self, server: ControlServer) -> None:
        self._server = server

    def buildProtocol(self, addr: IAddress | None) -> _ControlProtocol | None:  # noqa: N802
        """Take a connection, or refuse it (by closing) when there are too many."""
        return self._server.accept()


class ControlServer:
    """A control socket and what it serves.

    :param reactor: provides IReactorUNIX.
    :param path: of the socket; a stale one is replaced.
    :param handler: an object with any of the methods that the responders above name, e.g.
        ``status()`` and ``refresh(kind)``; each gives a dict, or a Deferred of one, or ``None``.
        ``attach_pmd()`` gives ``(dict, [log descriptors], watermark descriptor)``, or a Deferred
        of it; the descriptors belong to the server then and are closed when sent.
    :param audit: told of commands that change something.
    """

    def __init__(
        self,
        reactor: IReactorUNIX,
        path: str | os.PathLike[str],
        handler: object,
        audit: Audit = unnoted,
    ) -> None:
        self.path = os.fspath(path)
        self.handler = handler
        self.audit = audit
        self._reactor = reactor
        self._port: IListeningPort | None = None
        self._connections: set[_ControlProtocol] = set()

    def start(self) -> None:
        """Listen; whoever calls holds the lock that makes a socket found here a stale one."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        mask = os.umask(0o177)
        try:
            self._port = self._reactor.listenUNIX(self.path, _ControlFactory(self), mode=0o600)
        finally:
            os.umask(mask)

    def accept(self) -> _ControlProtocol | None:
        """Make the protocol of a new connection, ``None`` over the limit."""
        if len(self._connections) >= limits.CONTROL_CONNECTIONS_MAX:
            return None
        protocol = _ControlProtocol(self)
        self._connections.add(protocol)
        return protocol

    def forget(self, protocol: _ControlProtocol) -> None:
        """Drop a connection that is gone."""
        self._connections.discard(protocol)

    def stop(self) -> Deferred[None]:
        """Stop listening, remove the socket and end the connections."""
        port, self._port = self._port, None
        for protocol in list(self._connections):
            if protocol.transport is not None:
                protocol.transport.loseConnection()
        if port is None:
            return defer.succeed(None)
        return maybeDeferred(port.stopListening).addCallback(lambda _: None)
