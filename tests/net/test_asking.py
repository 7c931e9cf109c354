"""A process with a reactor asks a daemon: answers, descriptors, errors, nobody there, no answer."""

from __future__ import annotations

import os
import socket
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.trial.unittest import SynchronousTestCase

from qdsmirror.errors import DegradedError, ProtocolError, UnreachableError, UsageError
from qdsmirror.net.asking import NobodyThereError, ask, attach_to_driver, why_unconnected
from qdsmirror.net.control import Apply, Refresh, Status
from tests.net.test_control import ControlCase


class AskTests(ControlCase):
    def ask(self, command: Any = Status, seconds: float = 10.0, **arguments: str) -> Deferred[Any]:
        answer: Deferred[Any] = ask(reactor, self.path, command, seconds, **arguments)
        return answer

    async def test_answers(self) -> None:
        self.assertEqual(await self.ask(), {"state": "connected"})
        self.assertEqual(await self.ask(Refresh, kind="full"), {"kind": "full"})

    async def test_a_long_answer(self) -> None:
        self.handler.answer = {"long": "x" * 300_000}
        self.assertEqual(await self.ask(), self.handler.answer)

    async def test_what_the_daemon_says(self) -> None:
        self.handler.error = DegradedError("not now", "later")
        error = await self.assertFailure(self.ask(), DegradedError)
        self.assertEqual((error.message, error.hint), ("not now", "later"))
        await self.assertFailure(self.ask(Apply), UsageError)

    async def test_nobody_is_there(self) -> None:
        await self.server.stop()
        error = await self.assertFailure(self.ask(), NobodyThereError)
        self.assertIn("No such file", error.message)
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(self.path))
        error = await self.assertFailure(self.ask(), NobodyThereError)
        self.assertIn("refused", error.message)

    async def test_no_answer_in_time(self) -> None:
        self.handler.answer = Deferred()  # type: ignore[assignment]
        error = await self.assertFailure(self.ask(seconds=0.05), UnreachableError)
        self.assertNotIsInstance(error, NobodyThereError)

    async def test_who_listens_and_says_nonsense(self) -> None:
        await self.server.stop()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(self.path))
            other.listen()
            asked = self.ask(seconds=0.2)
            error = await self.assertFailure(asked, UnreachableError, ProtocolError)
        self.assertNotIsInstance(error, NobodyThereError)


class AttachTests(ControlCase):
    def make_descriptors(self, count: int) -> None:
        for number in range(count):
            path = self.directory / f"log{number}"
            path.write_text(f"log {number}")
            self.handler.descriptors.append(os.open(path, os.O_RDONLY))

    async def test_descriptors_arrive_in_order(self) -> None:
        self.make_descriptors(40)
        information, logs, watermarks = await attach_to_driver(reactor, self.path)
        self.assertEqual(information, {"generation": "g"})
        texts = [os.read(one, 20).decode() for one in [*logs, watermarks]]
        self.assertEqual(texts, [f"log {number}" for number in range(40)])
        self.assertFalse(any(map(os.get_inheritable, logs)))
        for one in [*logs, watermarks]:
            os.close(one)
        await self.call("Status")
        # Numbers are used again at once by others: what counts is the files.
        open_files = {
            os.path.realpath(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd")
        }
        left = [one for one in open_files if one.startswith(str(self.directory / "log"))]
        self.assertEqual(left, [])

    async def test_refused(self) -> None:
        self.handler.error = DegradedError("not recovered yet")
        await self.assertFailure(attach_to_driver(reactor, self.path), DegradedError)

    async def test_no_driver(self) -> None:
        await self.server.stop()
        error = await self.assertFailure(attach_to_driver(reactor, self.path), UnreachableError)
        self.assertIn("launchdriver", error.hint)

    async def test_no_answer(self) -> None:
        self.handler.attach_pmd = Deferred  # type: ignore[method-assign, assignment]
        attaching = attach_to_driver(reactor, self.path, timeout_seconds=0.05)
        await self.assertFailure(attaching, UnreachableError)


class WordsTests(SynchronousTestCase):
    def test_a_connection_not_made_is_told_in_the_systems_words(self) -> None:
        for error, words in (
            (ConnectionRefusedError(111, "x"), "Connection refused"),
            (FileNotFoundError(2, "x"), "No such file or directory"),
            (ConnectError(2, "x"), "No such file or directory"),
            (DNSLookupError("no such host."), "DNS lookup failed: no such host"),
        ):
            self.assertEqual(why_unconnected(error), words)
