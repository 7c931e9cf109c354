"""A TCP proxy that holds back everything for half a round trip, each way, at any bandwidth.

A process of its own: ``python bench/delay.py TARGET-PORT ROUND-TRIP-SECONDS`` prints its port.
What waits in it stands for what is on its way in a long cable: it takes as much as the ends send.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time

_READ_BYTES = 1 << 18


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float
) -> None:
    """Pass on one direction."""
    cable: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due, data = await cable.get()
            wait = due - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()

    delivering = asyncio.create_task(deliver())
    try:
        while data := await reader.read(_READ_BYTES):
            cable.put_nowait((time.monotonic() + seconds, data))
    except OSError:
        pass
    cable.put_nowait((time.monotonic() + seconds, b""))
    await asyncio.gather(delivering, return_exceptions=True)


async def serve(target: int, round_trip: float) -> None:
    """Proxy connections to a port of the loopback until the process is ended."""

    async def accept(near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        try:
            far, forth = await asyncio.open_connection("127.0.0.1", target, limit=_READ_BYTES)
        except OSError:
            back.close()
            return
        for writer in (back, forth):
            plain = writer.get_extra_info("socket")
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.gather(_carry(near, forth, round_trip / 2), _carry(far, back, round_trip / 2))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=_READ_BYTES)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2])))
