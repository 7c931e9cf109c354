"""The blocking client against a peer that misbehaves (its ordinary use: tests/net/test_control)."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.core import ampbox
from qdsmirror.errors import ProtocolError, QdsError, UnreachableError
from qdsmirror.tools.client import ControlClient, launcher_of


class MisbehaviourTests(SynchronousTestCase):
    def setUp(self) -> None:
        directory = Path(tempfile.mkdtemp(dir="/tmp"))
        self.addCleanup(shutil.rmtree, directory)
        self.path = directory / "qdspmd.ctl"

    def answer(self, act: Callable[[socket.socket], object]) -> None:
        """Let one connection be served by ``act`` after its request has come."""
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(self.path))
        listening.listen()

        def serve() -> None:
            with listening, listening.accept()[0] as connection:
                self.request = ampbox.BoxDecoder().feed(connection.recv(10_000))[0]
                act(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        self.addCleanup(thread.join)

    def call(self) -> object:
        return ControlClient(self.path, 60).call("Refresh", kind="full")

    def test_request_and_answer_in_pieces(self) -> None:
        box = {b"_answer": b"1", **ampbox.spread(b"json", b'{"text":"' + b"x" * 70_000 + b'"}')}
        data = ampbox.encode_box(box)
        self.answer(lambda connection: (connection.sendall(data[:9]), connection.sendall(data[9:])))
        self.assertEqual(self.call(), {"text": "x" * 70_000})
        expected = {b"_ask": b"1", b"_command": b"Refresh", b"kind": b"full"}
        self.assertEqual(self.request, expected)

    def test_closed_without_an_answer(self) -> None:
        self.answer(lambda connection: None)
        error = self.assertRaises(UnreachableError, self.call)
        self.assertEqual((error.exit_code, error.hint), (11, "start it with launchpmds"))

    def test_no_amp(self) -> None:
        self.answer(lambda connection: connection.sendall(b"HTTP/1.0 400 Bad Request\r\n" * 1000))
        self.assertRaises(ProtocolError, self.call)

    def test_no_json(self) -> None:
        box = ampbox.encode_box({b"_answer": b"1", b"json": b"[1]"})
        self.answer(lambda connection: connection.sendall(box))
        self.assertRaises(ProtocolError, self.call)

    def test_an_error_of_amp_itself(self) -> None:
        box = {b"_error": b"1", b"_error_code": b"UNKNOWN", b"_error_description": b"Unknown"}
        self.answer(lambda connection: connection.sendall(ampbox.encode_box(box)))
        self.assertIn("Refresh failed", str(self.assertRaises(QdsError, self.call)))

    def test_launchers(self) -> None:
        names = ["qdsdriver.ctl", "dsgrp000.pmd.ctl", "run/dsgrp511.rmd.pid", "other.ctl"]
        found = [launcher_of(name) for name in names]
        self.assertEqual(found, ["launchdriver", "launchpmds", "launchrmds", ""])
