"""The console's web site: who is admitted, what is answered, what a client may not do."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.console import site as site_module
from qdsmirror.console.site import Console, make_site
from qdsmirror.errors import ConfigError, UnreachableError
from qdsmirror.limits import CONSOLE_BODY_BYTES_MAX, CONSOLE_IDLE_SECONDS

TOKEN = b"t0ken" * 10
SHOWN = b"Authorization: Bearer " + TOKEN


class Transport(StringTransport):
    """A transport that can be aborted, as HTTP does."""

    def abortConnection(self) -> None:  # noqa: N802
        self.aborting = True
        super().abortConnection()


class SiteTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.token: bytes | ConfigError = TOKEN
        self.found: Any = (b"qds_up 1\n", "text/plain; version=0.0.4")
        self.asked = 0
        self.site = make_site(Console(self._token, self._metrics), self.clock)

    def _token(self) -> bytes:
        if isinstance(self.token, ConfigError):
            raise self.token
        return self.token

    def _metrics(self) -> Deferred[Any]:
        self.asked += 1
        if isinstance(self.found, Deferred):
            return self.found
        return fail(self.found) if isinstance(self.found, Exception) else succeed(self.found)

    def connect(self) -> tuple[Any, Transport]:
        protocol = self.site.buildProtocol(None)
        transport = Transport()
        protocol.makeConnection(transport)
        return protocol, transport

    def ask(self, *lines: bytes, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """Send a request; give code, headers and body of the answer."""
        protocol, transport = self.connect()
        protocol.dataReceived(b"\r\n".join([*lines, b"Connection: close", b"", body]))
        return self.read(transport)

    def read(self, transport: Transport) -> tuple[int, dict[str, str], bytes]:
        head, _, content = transport.value().partition(b"\r\n\r\n")
        status, *headers = head.decode().split("\r\n")
        fields = dict(line.split(": ", 1) for line in headers)
        return int(status.split()[1]), fields, content

    def get(self, path: bytes = b"/metrics", *more: bytes, method: bytes = b"GET") -> Any:
        return self.ask(method + b" " + path + b" HTTP/1.1", b"Host: x", *more)

    # -- who is admitted ------------------------------------------------------------------------

    def test_with_the_token(self) -> None:
        for line in (SHOWN, b"authorization: bearer " + TOKEN):
            code, headers, content = self.get(b"/metrics", line)
            self.assertEqual((code, content), (200, b"qds_up 1\n"))
            self.assertEqual(headers["Content-Type"], "text/plain; version=0.0.4")
            self.assertEqual(headers["Cache-Control"], "no-store")

    def test_without_it(self) -> None:
        for more in (
            (),
            (b"Authorization: Bearer " + TOKEN[:-1],),
            (b"Authorization: Bearer " + TOKEN + b"x",),
            (b"Authorization: Bearer",),
            (b"Authorization: Bearer ",),
            (b"Authorization: Basic " + TOKEN,),
            (b"Authorization: " + TOKEN,),
            (SHOWN, SHOWN),
            (SHOWN, b"Authorization: Bearer x"),
            (b"Cookie: token=" + TOKEN,),
        ):
            code, headers, content = self.get(b"/metrics", *more)
            self.assertEqual(code, 401, more)
            self.assertTrue(headers["WWW-Authenticate"].startswith("Bearer"))
            self.assertNotIn(TOKEN, content)
        self.assertEqual(self.get(b"/metrics?token=" + TOKEN)[0], 401)
        self.assertEqual(self.asked, 0, "nobody is asked for those")

    def test_a_new_token_is_good_at_once(self) -> None:
        self.token = b"n3w" * 20
        self.assertEqual(self.get(b"/metrics", SHOWN)[0], 401)
        self.assertEqual(self.get(b"/metrics", b"Authorization: Bearer " + self.token)[0], 200)

    def test_while_there_is_no_token_nobody_is_admitted(self) -> None:
        self.token = ConfigError("/etc/secret/place: No such file")
        code, _, content = self.get(b"/metrics", SHOWN)
        self.assertEqual(code, 503)
        self.assertNotIn(b"/etc", content)

    # -- what is answered -----------------------------------------------------------------------

    def test_nothing_else_is_there(self) -> None:
        for path in (b"/", b"/index.html", b"/metrics/", b"/metrics/x", b"/Metrics", b"/../metrics",
                     b"//metrics", b"/%6detrics", b"/favicon.ico"):  # fmt: skip
            code, headers, _ = self.get(path, SHOWN)
            self.assertEqual(code, 404, path)
            self.assertTrue(headers["Content-Type"].startswith("text/plain"))
            self.assertNotIn("Location", headers)

    def test_only_to_be_read(self) -> None:
        for method in (b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"NONSENSE"):
            code, headers, _ = self.get(b"/metrics", SHOWN, method=method)
            self.assertEqual((code, headers["Allow"]), (405, "GET, HEAD"))
        code, headers, content = self.get(b"/metrics", SHOWN, method=b"HEAD")
        self.assertEqual((code, headers["Content-Length"], content), (200, "9", b""))

    def test_what_goes_wrong_is_in_the_log_only(self) -> None:
        self.found = UnreachableError("no permission in /run/some/place")
        code, _, content = self.get(b"/metrics", SHOWN)
        self.assertEqual(code, 503)
        self.assertNotIn(b"/run", content)
        self.found = RuntimeError("a mistake of ours in /run")
        code, _, content = self.get(b"/metrics", SHOWN)
        self.assertEqual(code, 503)
        self.assertNotIn(b"/run", content)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)

    # -- clients that are no good ---------------------------------------------------------------

    def test_one_that_is_gone_before_the_answer(self) -> None:
        waiting = self.found = Deferred()
        protocol, transport = self.connect()
        protocol.dataReceived(b"GET /metrics HTTP/1.1\r\nHost: x\r\n" + SHOWN + b"\r\n\r\n")
        protocol.connectionLost(_lost())
        waiting.callback((b"late", "text/plain"))
        self.successResultOf(waiting)
        self.assertEqual(transport.value(), b"")

    def test_one_that_brings_much(self) -> None:
        size = b"Content-Length: %d" % (CONSOLE_BODY_BYTES_MAX + 1)
        for head, chunk in (
            (size, b"x" * (CONSOLE_BODY_BYTES_MAX + 1)),
            (b"Transfer-Encoding: chunked", b"2000\r\n" + b"x" * 0x2000 + b"\r\n"),
        ):
            protocol, transport = self.connect()
            protocol.dataReceived(b"POST /metrics HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
            self.assertFalse(transport.disconnected)
            protocol.dataReceived(chunk)
            self.assertTrue(transport.disconnected or transport.disconnecting, head)

    def test_one_that_says_nothing(self) -> None:
        protocol, transport = self.connect()
        protocol.dataReceived(b"GET /metrics HTTP/1.1\r\n")
        self.clock.advance(CONSOLE_IDLE_SECONDS)
        self.assertTrue(transport.disconnecting)

    def test_too_many(self) -> None:
        self.patch(site_module, "CONSOLE_CONNECTIONS_MAX", 3)
        protocols = [self.connect()[0] for _ in range(3)]
        self.assertIsNone(self.site.buildProtocol(None))
        protocols[0].connectionLost(_lost())
        self.assertIsNotNone(self.site.buildProtocol(None))


def _lost() -> Any:
    from twisted.internet.error import ConnectionDone
    from twisted.python.failure import Failure

    return Failure(ConnectionDone())
