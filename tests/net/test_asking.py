"""A process with a reactor asks a daemon: answers, errors, nobody there, no answer in time."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred

from qdsmirror.errors import DegradedError, ProtocolError, UnreachableError, UsageError
from qdsmirror.net.asking import NobodyThereError, ask
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
