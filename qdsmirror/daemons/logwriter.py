"""Writes log lines from a thread of its own, so that a log that blocks blocks nothing else.

Standard error may be a pipe whose reader stands still, or a file on a disk that hangs.  What does
not fit the queue is dropped, and the next line that gets through says how many were (rules.md 20).
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque

from qdsmirror.limits import LOG_END_SECONDS, LOG_QUEUE_BYTES


class LogWriter:
    """A text file for Twisted's FileLogObserver.

    :param descriptor: written to by the thread alone; it stays the caller's.
    :param limit_bytes: what may wait; a line more is dropped.
    :ivar dropped: lines that are not yet told to be lost.
    """

    def __init__(self, descriptor: int, limit_bytes: int = LOG_QUEUE_BYTES) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._limit = limit_bytes
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        os.register_at_fork(after_in_child=self._forked)

    def write(self, text: str) -> None:
        """Queue a line, or drop it; never waits."""
        self.put(text.encode(errors="backslashreplace"))

    def put(self, data: bytes) -> None:
        """Queue what is written as one, or drop it; never waits."""
        with self._changed:
            if self._bytes + len(data) > self._limit:
                self.dropped += 1
                return
            self._queue(data)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Do nothing: the thread is at it."""

    def finish(self, seconds: float = LOG_END_SECONDS) -> bool:
        """Wait until all is written, but no longer than this; tell whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._bytes, seconds)

    def _queue(self, data: bytes) -> None:
        self._waiting.append(data)
        self._bytes += len(data)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                data = self._waiting.popleft()
            lost = not self._put(data)
            with self._changed:
                self._bytes -= len(data)
                self.dropped += lost
                if self.dropped and not lost:
                    line = self._loss(self.dropped)
                    self.dropped = 0
                    self._waiting.appendleft(line)
                    self._bytes += len(line)
                self._changed.notify_all()

    def _put(self, data: bytes) -> bool:
        """Write a line, however long that takes; ``False`` where it is refused."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._descriptor, view) :]
            except BlockingIOError:
                select.select((), (self._descriptor,), ())
            except OSError:
                return False
        return True

    def _loss(self, count: int) -> bytes:
        """Make the line that tells of lost ones."""
        return f"\t({count} lines of the log before this one were lost)\n".encode()

    def _forked(self) -> None:
        """Begin anew after a fork: our thread is not there, and our parent has the lines."""
        self._changed = threading.Condition()
        self._waiting.clear()
        self._bytes = self.dropped = 0
        self._thread = None
