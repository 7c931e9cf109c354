"""A network between the sites that delays, cuts, truncates, and swallows: a TCP proxy.

It runs in a thread of its own; its attributes may be changed from any thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress

from twisted.trial.unittest import TestCase

PASS, SWALLOW, REFUSE = "pass", "swallow", "refuse"
_CHUNK_BYTES = 1 << 16


class Proxy:
    """Passes connections on to a port of this host.

    :ivar port: where it listens.
    :ivar mode: ``PASS``; ``SWALLOW``: what arrives from either side vanishes, and nobody is told;
        ``REFUSE``: connections are accepted and ended at once.
    :ivar delay: how long each piece is held back, in seconds.
    :ivar budget: all connections are cut when so many more bytes have passed, both ways together;
        the last piece is truncated.  ``None`` again then.
    :ivar made: when each connection was made, in monotonic seconds.
    """

    def __init__(self, test: TestCase, target: int) -> None:
        self.target = target
        self.port = 0
        self.mode = PASS
        self.delay = 0.0
        self.budget: int | None = None
        self.made: list[float] = []
        self.passed = 0
        self._transports: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait()
        test.addCleanup(self._stop)

    def cut(self) -> None:
        """End every connection at once (RST)."""
        self._loop.call_soon_threadsafe(self._abort)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        self._abort()
        ours = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not ours]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _abort(self) -> None:
        for writer in self._transports:
            writer.transport.abort()
        self._transports.clear()

    async def _connected(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        self.made.append(time.monotonic())
        try:
            if self.mode == REFUSE:
                back.transport.abort()
                return
            far, forth = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            back.transport.abort()
            return
        self._transports |= {back, forth}
        with suppress(asyncio.CancelledError):
            await asyncio.gather(self._pump(near, forth), self._pump(far, back))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if self.mode == SWALLOW:
                    continue
                await self._pass_on(writer, data)
        if self.mode != SWALLOW:
            writer.close()

    async def _pass_on(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        last = self.budget is not None and self.budget <= len(data)
        if self.budget is not None:
            data = data[: self.budget]
            self.budget -= len(data)
        self.passed += len(data)
        writer.write(data)
        await writer.drain()
        if last:
            # What was passed on arrives; nothing after it does.
            self._transports.discard(writer)
            writer.close()
            self._abort()
            self.budget = None
