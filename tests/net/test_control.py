"""The control channel over real Unix sockets: typed commands, errors, descriptors, bounds."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred, succeed
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase, TestCase

from qdsmirror import errors, limits
from qdsmirror.core import ampbox
from qdsmirror.errors import (
    DivergedError,
    LimitError,
    ProtocolError,
    QdsError,
    UnreachableError,
    UsageError,
)
from qdsmirror.net.control import ControlServer
from qdsmirror.tools.client import ControlClient


class Handler:
    def __init__(self) -> None:
        self.answer: dict[str, Any] = {"state": "connected"}
        self.error: Exception | None = None
        self.descriptors: list[int] = []

    def status(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return self.answer

    def refresh(self, kind: str) -> Deferred[dict[str, Any]]:
        return succeed({"kind": kind})

    def kill_refresh(self) -> None:
        return None

    def attach_pmd(self) -> tuple[dict[str, Any], list[int], int]:
        if self.error is not None:
            raise self.error
        *logs, watermarks = self.descriptors
        return {"generation": "g"}, logs, watermarks


class ControlCase(TestCase):
    timeout = 300

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(dir="/tmp"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.path = self.directory / "dsgrp000.driver.ctl"
        self.handler = Handler()
        self.server = ControlServer(reactor, self.path, self.handler)
        self.server.start()
        self.addCleanup(self.server.stop)

    def call(self, command: str, timeout_seconds: float = 60, **arguments: str) -> Deferred[Any]:
        client = ControlClient(self.path, timeout_seconds)
        return deferToThread(client.call, command, **arguments)


class CommandTests(ControlCase):
    async def test_commands(self) -> None:
        self.assertEqual(await self.call("Status"), {"state": "connected"})
        self.assertEqual(await self.call("Refresh", kind="full"), {"kind": "full"})
        self.assertEqual(await self.call("KillRefresh"), {})

    async def test_long_answer(self) -> None:
        self.handler.answer = {"text": "ä" * 100_000, "list": list(range(100_000))}
        self.assertEqual(await self.call("Status"), self.handler.answer)

    async def test_too_long_answer_is_an_error(self) -> None:
        self.handler.answer = {"text": "x" * limits.CONTROL_JSON_BYTES_MAX}
        await self.assertFailure(self.call("Status"), LimitError)

    async def test_errors_keep_class_message_and_hint(self) -> None:
        self.handler.error = DivergedError("histories differ", "qdsrefresh --full")
        error = await self.assertFailure(self.call("Status"), DivergedError)
        self.assertEqual((str(error), error.hint), ("histories differ", "qdsrefresh --full"))

    async def test_our_own_faults_are_told_and_logged(self) -> None:
        self.handler.error = ZeroDivisionError("oops")
        error = await self.assertFailure(self.call("Status"), QdsError)
        self.assertIn("ZeroDivisionError: oops", str(error))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    async def test_what_a_daemon_does_not_do(self) -> None:
        await self.assertFailure(self.call("Apply"), UsageError)
        await self.assertFailure(self.call("StartTLS"), UsageError)
        self.flushLoggedErrors()

    async def test_socket_is_private_and_stale_one_replaced(self) -> None:
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)
        await self.server.stop()
        self.assertFalse(self.path.exists())
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(self.path))
        self.server.start()
        self.assertEqual(await self.call("Status"), {"state": "connected"})

    async def test_nobody_listens(self) -> None:
        await self.server.stop()
        error = await self.assertFailure(self.call("Status"), UnreachableError)
        self.assertIn("launchdriver", error.hint)
        self.path = self.directory / "qdsrmd.ctl"
        error = await self.assertFailure(self.call("Status"), UnreachableError)
        self.assertIn("launchrmds", error.hint)

    async def test_no_answer_in_time(self) -> None:
        self.handler.status = Deferred  # type: ignore[method-assign, assignment]
        error = await self.assertFailure(self.call("Status", 0.05), UnreachableError)
        self.assertIn("within 0.05 s", str(error))

    async def test_connections_are_limited(self) -> None:
        self.patch(limits, "CONTROL_CONNECTIONS_MAX", 1)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(self.path))
            await self.assertFailure(self.call("Status"), UnreachableError)

    async def test_endless_box_is_cut_off(self) -> None:
        pairs = {b"k%d" % number: b"x" * 60_000 for number in range(2)}
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.path))
            client.sendall(ampbox.encode_box(pairs)[:-2])
            self.assertEqual(await deferToThread(client.recv, 1), b"")


BOXES = st.lists(
    st.dictionaries(st.binary(min_size=1, max_size=255), st.binary(max_size=300), max_size=5)
)


class BoxTests(SynchronousTestCase):
    @settings(deadline=None)
    @given(BOXES, st.integers(1, 50))
    def test_round_trip_in_pieces(self, boxes: list[dict[bytes, bytes]], size: int) -> None:
        data = b"".join(map(ampbox.encode_box, boxes))
        decoder = ampbox.BoxDecoder()
        found = []
        for start in range(0, len(data), size):
            found += decoder.feed(data[start : start + size])
        self.assertEqual(found, boxes)

    @settings(deadline=None)
    @given(st.binary(max_size=2000))
    def test_arbitrary_bytes(self, data: bytes) -> None:
        decoder = ampbox.BoxDecoder(1000)
        try:
            decoder.feed(data)
        except ProtocolError:
            pass

    def test_bound_counts_all_of_a_box(self) -> None:
        decoder = ampbox.BoxDecoder(1000)
        data = ampbox.encode_box({b"a": b"x" * 600, b"b": b"x" * 600})
        self.assertEqual(decoder.feed(data[:700]), [])
        self.assertRaises(LimitError, decoder.feed, data[700:-2])

    def test_spread(self) -> None:
        for length in (0, 1, 65535, 65536, 200_000):
            value = os.urandom(length)
            box = ampbox.spread(b"json", value)
            self.assertEqual(ampbox.gather(b"json", box), value)
            self.assertEqual(box, {})

    def test_every_error_class_travels(self) -> None:
        kinds = [one for one in vars(errors).values() if isinstance(one, type)]
        self.assertGreater(len(kinds), 10)
        for kind in kinds:
            found = ampbox.decode_error(ampbox.encode_error(kind("message", "hint")))
            self.assertIs(type(found), kind)
            self.assertEqual((found.message, found.hint), ("message", "hint"))
