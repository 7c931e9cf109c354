"""The web site of the console daemon: ``/metrics``, for whoever shows the token.

A request is answered out of this process's own memory, however slowly its client takes it; there
are bounds on what a client may send, and on how many there are.
"""

# Twisted's web has few annotations.
# mypy: disable-error-code="no-untyped-call,misc"

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.protocols.policies import WrappingFactory
from twisted.python.failure import Failure
from twisted.web import http
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

from qdsmirror import __version__
from qdsmirror.errors import QdsError
from qdsmirror.limits import (
    CONSOLE_BODY_BYTES_MAX,
    CONSOLE_CONNECTIONS_MAX,
    CONSOLE_IDLE_SECONDS,
)

_log = Logger()

METRICS = b"/metrics"
_PLAIN = "text/plain; charset=utf-8"
_SCHEME = b"bearer "


class BoundedRequest(Request):
    """A request that brings no more than a little behind its headers."""

    _brought = 0

    def gotLength(self, length: int | None) -> None:  # noqa: N802
        """Learn how much comes; ``None`` in chunks."""
        super().gotLength(min(length or 0, CONSOLE_BODY_BYTES_MAX))

    def handleContentChunk(self, data: bytes) -> None:  # noqa: N802
        """Take some of it; whoever sends more than he may is cut off."""
        self._brought += len(data)
        if self._brought > CONSOLE_BODY_BYTES_MAX:
            self.channel.forceAbortClient()
        else:
            super().handleContentChunk(data)

    def process(self) -> None:
        """Answer it, unless its client was cut off."""
        if self._brought <= CONSOLE_BODY_BYTES_MAX:
            super().process()


class Console(Resource):
    """Answers every request.

    :param token: gives the token of now; raises a ConfigError where there is none.
    :param metrics: gives a Deferred of the metrics and their content type.
    """

    isLeaf = True

    def __init__(
        self, token: Callable[[], bytes], metrics: Callable[[], Deferred[tuple[bytes, str]]]
    ) -> None:
        super().__init__()
        self._token = token
        self._metrics = metrics

    def render(self, request: Request) -> Any:
        """Answer a request (IResource)."""
        request.setHeader(b"Server", f"qdsmirror/{__version__}".encode("ascii"))
        request.setHeader(b"Cache-Control", b"no-store")
        request.setHeader(b"X-Content-Type-Options", b"nosniff")
        if request.path != METRICS:
            return _say(request, http.NOT_FOUND, "nothing here; metrics are at /metrics")
        if request.method not in (b"GET", b"HEAD"):
            request.setHeader(b"Allow", b"GET, HEAD")
            return _say(request, http.NOT_ALLOWED, "only to be read")
        try:
            admitted = self._admits(request)
        except QdsError as error:
            _log.error("{error}", error=error)
            return _say(request, http.SERVICE_UNAVAILABLE, "there is no token to compare with")
        if not admitted:
            request.setHeader(b"WWW-Authenticate", b'Bearer realm="qdsmirror metrics"')
            return _say(request, http.UNAUTHORIZED, "show the token of metrics_token_file")
        gone: list[Failure] = []
        request.notifyFinish().addErrback(gone.append)
        self._metrics().addCallbacks(_answer, _fail, (request, gone), {}, (request, gone), {})
        return NOT_DONE_YET

    def _admits(self, request: Request) -> bool:
        """Tell whether a request shows the token (RFC 6750 section 2.1)."""
        shown = request.requestHeaders.getRawHeaders(b"Authorization") or []
        if len(shown) != 1 or shown[0][: len(_SCHEME)].lower() != _SCHEME:
            return False
        return hmac.compare_digest(shown[0][len(_SCHEME) :].strip(), self._token())


class BoundedFactory(WrappingFactory):
    """Takes so many clients and no more."""

    noisy = False

    def buildProtocol(self, addr: Any) -> Any:  # noqa: N802
        """Make the protocol for a client, unless there are too many (IProtocolFactory)."""
        if len(self.protocols) >= CONSOLE_CONNECTIONS_MAX:
            return None
        return super().buildProtocol(addr)


def make_site(console: Console, reactor: Any) -> BoundedFactory:
    """Make the site.

    :param reactor: provides IReactorTime.
    """
    site = Site(
        console, requestFactory=BoundedRequest, timeout=CONSOLE_IDLE_SECONDS, reactor=reactor
    )
    site.displayTracebacks = False
    site.noisy = False
    return BoundedFactory(site)


def _say(request: Request, code: int, text: str) -> bytes:
    request.setResponseCode(code)
    request.setHeader(b"Content-Type", _PLAIN.encode("ascii"))
    return f"{text}\n".encode()


def _answer(found: tuple[bytes, str], request: Request, gone: list[Failure]) -> None:
    content, kind = found
    if not gone:
        request.setHeader(b"Content-Type", kind.encode("ascii"))
        request.setHeader(b"Content-Length", str(len(content)).encode("ascii"))
        request.write(content)
        request.finish()


def _fail(failure: Failure, request: Request, gone: list[Failure]) -> None:
    if failure.check(QdsError):
        _log.error("metrics: {error}", error=failure.value)
    else:
        _log.failure("metrics", failure)
    if not gone:
        # What is wrong is in the log: it may name files.
        request.write(_say(request, http.SERVICE_UNAVAILABLE, "not now; see the console's log"))
        request.finish()
