"""A group's performance tracking file and its events, written without ever waiting for the disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from qdsmirror.interfaces import IWorker
from qdsmirror.limits import TRACKING_LINES_MAX
from qdsmirror.storage.tracking import GrowingFile, replace_file


class Tracking:
    """Has lines appended by a worker, so that a file system that hangs holds up nobody.

    :param group: its name, for what is logged.
    :param worker: may block; stopped with this.
    :ivar error: why lines are missing; empty while none is.
    """

    log = Logger()

    def __init__(self, group: str, worker: IWorker) -> None:
        self.error = ""
        self._group = group
        self._worker = worker
        self._waiting = 0
        self._lost = 0
        self._stopped = False
        self._replacing = False
        self._newest: dict[Path, tuple[str, list[Deferred[None]]]] = {}

    def replace(self, path: Path, text: str) -> Deferred[None]:
        """Give a file another content, all or nothing of it; that it fails is told.

        While the worker has one, of those that wait for the same file only the newest is kept.

        :returns: fires, and never fails, when that was tried with this content or a newer one.
        """
        tried: Deferred[None] = Deferred()
        _, waiting = self._newest.pop(path, ("", []))
        self._newest[path] = text, [*waiting, tried]
        if not self._replacing:
            self._replace_next()
        return tried

    def _replace_next(self) -> None:
        if not self._newest:
            return
        path, (text, waiting) = self._newest.popitem()
        self._replacing = True

        def done(_result: None, error: BaseException | None) -> None:
            self._replacing = False
            if error is not None:
                self._fail(f"{path.name}: {error}")
            if not self._stopped:
                self._replace_next()
            for one in waiting:
                one.callback(None)

        self._worker.run(partial(replace_file, path, text), done)

    def write(self, file: GrowingFile, lines: Sequence[str]) -> None:
        """Append lines, in the order of the calls; what does not fit is dropped and told."""
        if not lines or self._stopped:
            return
        if self._waiting + len(lines) > TRACKING_LINES_MAX:
            self._lost += len(lines)
            self._fail(f"{file.name}: the disk does not take {self._waiting} lines")
            return
        self._waiting += len(lines)

        def done(_result: None, error: BaseException | None) -> None:
            self._waiting -= len(lines)
            if error is None:
                self._mended()
            else:
                self._lost += len(lines)
                why = error.strerror if isinstance(error, OSError) else str(error)
                self._fail(f"{file.name}: {why}")

        self._worker.run(lambda: file.write(lines), done)

    def _fail(self, why: str) -> None:
        if not self.error:
            self.log.error(
                "{group}: {why}; statistics and events are lost until that is mended",
                group=self._group, why=why,
            )  # fmt: skip
        self.error = why

    def _mended(self) -> None:
        if self.error:
            self.log.info(
                "{group}: statistics and events are written again; {count} lines were lost",
                group=self._group, count=self._lost,
            )  # fmt: skip
        self.error, self._lost = "", 0

    def stop(self, *files: GrowingFile) -> Deferred[None]:
        """Write what waits, and close the files; what comes from here on is dropped."""
        self._stopped = True
        while self._newest:
            self._replace_next()
        for file in files:
            self._worker.run(file.close, lambda _result, _error: None)
        return self._worker.stop()
