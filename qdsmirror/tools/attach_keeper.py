"""The keeper of one attached LDSU: it gives the kernel's device a new connection when one ends.

``python -m qdsmirror.tools.attach_keeper NAME URI``: qdsattach starts it.  It makes the device,
says so in one line on standard output, and stays until it is told to end (SIGTERM) or the device
is disconnected: by somebody else, or by itself when the driver was away for too long.  Its end
alone leaves the device as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qdsmirror.core import ampbox
from qdsmirror.core.jsontext import dump_json
from qdsmirror.errors import EXIT_OK, DeviceError, QdsError
from qdsmirror.pidfile import PidFile
from qdsmirror.tools import cli
from qdsmirror.tools.attach_netlink import Export, KernelNbd, LinkEvents
from qdsmirror.tools.attach_state import wait
from qdsmirror.tools.nbdclient import NbdClient

READY_SECONDS = 20.0
RETRY_SECONDS_MIN = 0.1
RETRY_SECONDS_MAX = 1.0
#: The kernel says that it has noticed the end of a connection well before this.
NOTICE_SECONDS = 2.0
#: A device that somebody else disconnected is found out at the latest then.
_LOOK_SECONDS = 60.0
_SECTOR_BYTES = 512
_PR_SET_IO_FLUSHER = 57
_OOM_SCORE_NEVER = -1000


def name_of(ldsu: str) -> str:
    """Give what the keeper's pid file and log are named by."""
    return f"{ldsu}.keeper"


class Keeper:
    """Makes a device of an export, or takes over one that is there, and keeps it connected.

    :param uri: of the NBD export.
    :param dead_seconds: how long the device waits for a new connection.
    :param say: is told what an administrator may want to read.
    :param sleep: waits for some seconds between two tries.
    :param monotonic: the time in seconds.
    """

    def __init__(
        self,
        kernel: KernelNbd,
        uri: str,
        dead_seconds: int,
        say: Callable[[str], None],
        sleep: Callable[[float], None] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kernel = kernel
        self._uri = uri
        self._dead_seconds = dead_seconds
        self._say = say
        self._sleep = sleep
        self._monotonic = monotonic
        # Before the device is there, so that no end of its connection is missed.
        self._events: LinkEvents = kernel.watch()
        self._connection: socket.socket | None = None
        self._export: Export | None = None
        self.index = -1

    def close(self) -> None:
        """Let go of the connection; the kernel keeps its own hold on it."""
        self._events.close()
        if self._connection is not None:
            self._connection.close()

    def attach(self) -> None:
        """Make the device and wait until it is ready.

        :raises UnreachableError: nobody serves the export.
        :raises DeviceError: the kernel refuses.
        """
        connection, export = self._negotiate()
        self.index = self._kernel.connect(connection, export, self._dead_seconds)
        self._hold(connection, export)
        self._kernel.resend_soon(self.index)
        if not wait(lambda: self._kernel.is_ready(self.index, export.size), READY_SECONDS):
            self._kernel.disconnect(self.index)
            raise DeviceError(
                f"{self._kernel.node(self.index)} does not come up",
                hint="see what the kernel says: dmesg; or use qdsattach --via fuse",
            )
        self._say(f"{self._kernel.node(self.index)} made")

    def adopt(self, index: int) -> None:
        """Take over a device that has lost its keeper; its connection may be dead or alive.

        :raises UnreachableError: nobody serves the export.
        :raises DeviceError: the kernel refuses.
        """
        self.index = index
        self._offer()
        self._say(f"{self._kernel.node(index)} taken over")

    def keep(self) -> None:
        """Replace connections as they end; return when the device is no more."""
        while self._kernel.is_connected(self.index):
            if self._wait_for_end(_LOOK_SECONDS) and not self._reconnect():
                break
        self._say(f"{self._kernel.node(self.index)} is disconnected")

    def _wait_for_end(self, seconds: float) -> bool:
        """Wait until a connection ends, and until the kernel has noticed; tell whether one did.

        Before it has, it would not take another one, and would not say so.
        """
        assert self._connection is not None
        poller = select.poll()
        poller.register(self._connection, select.POLLRDHUP)
        poller.register(self._events, select.POLLIN)
        ready = dict(poller.poll(1000 * seconds))
        if self._is_told():
            return True
        if self._connection.fileno() not in ready:
            return False
        deadline = time.monotonic() + NOTICE_SECONDS
        noticing = select.poll()
        noticing.register(self._events, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            noticing.poll(1000 * left)
            if self._is_told():
                break
        return True

    def _is_told(self) -> bool:
        ended = self._events.ended()
        return ended is None or self.index in ended

    def _reconnect(self) -> bool:
        """Try until the device has a new connection, or is no more; tell which."""
        self._say("the connection to the device driver has ended")
        begun = self._monotonic()
        pause = RETRY_SECONDS_MIN
        said = ""
        stuck = True
        while self._kernel.is_connected(self.index):
            try:
                self._offer()
            except QdsError as error:
                if error.message != said:
                    said = error.message
                    self._say(said)
            else:
                self._say(f"connected again after {self._monotonic() - begun:.1f} s")
                return True
            # The kernel itself fails what has come since, after this time; but what was under way
            # already would wait for ever.
            stuck = stuck and self._kernel.is_under_way(self.index)
            if stuck and self._monotonic() - begun >= self._dead_seconds:
                self._say(f"no connection for {self._dead_seconds} s: requests under way fail now")
                self._kernel.disconnect(self.index)
                return False
            self._sleep(pause)
            pause = min(2 * pause, RETRY_SECONDS_MAX)
        return False

    def _offer(self) -> None:
        """Negotiate a connection and hand it over."""
        connection, export = self._negotiate()
        try:
            same = self._export is None or export == self._export
            if not (same and self._kernel.is_ready(self.index, export.size)):
                raise DeviceError(
                    f"{self._uri} is not what {self._kernel.node(self.index)} was made of",
                    hint="qdsdetach, then qdsattach",
                )
            self._kernel.reconfigure(self.index, connection, self._uri, self._dead_seconds)
        except QdsError:
            connection.close()
            raise
        self._hold(connection, export)

    def _hold(self, connection: socket.socket, export: Export) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = connection
        self._export = export

    def _negotiate(self) -> tuple[socket.socket, Export]:
        client = NbdClient.connect(self._uri)
        block = max(client.minimum_block, _SECTOR_BYTES)
        return client.release(), Export(self._uri, client.size, client.flags, block)


def build_parser() -> cli.Parser:
    """Make the keeper's parser."""
    made = cli.parser("attach_keeper", "Keep an attached LDSU; qdsattach starts it.")
    made.add_argument("--dead-timeout", type=int, required=True, metavar="S")
    made.add_argument("--adopt", type=int, metavar="INDEX", help="take over this device")
    made.add_argument("name", metavar="LDSU")
    made.add_argument("uri", metavar="URI")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Be a keeper; returns an exit code."""
    arguments = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _end)
    claim = PidFile(cli.paths_of(arguments).pid_file(name_of(arguments.name)))
    try:
        claim.acquire()
        claim.write()
        _survive_memory_shortage()
        with contextlib.closing(KernelNbd()) as kernel:
            keeper = Keeper(kernel, arguments.uri, arguments.dead_timeout, _say)
            if arguments.adopt is None:
                keeper.attach()
            else:
                keeper.adopt(arguments.adopt)
            _report({"index": keeper.index})
            keeper.keep()
    except QdsError as error:
        _say(error.message)
        _report({"error": ampbox.encode_error(error).decode()})
        return error.exit_code
    finally:
        claim.release()
    return EXIT_OK


def _end(number: int, frame: Any) -> None:
    sys.exit(EXIT_OK)


def _report(told: dict[str, Any]) -> None:
    """Tell qdsattach, once: it has gone when there is more to say."""
    with contextlib.suppress(OSError):
        os.write(1, dump_json(told) + b"\n")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}", file=sys.stderr, flush=True)


def _survive_memory_shortage() -> None:
    """Keep going when memory is short because the device waits for a connection (rules.md 20)."""
    with contextlib.suppress(OSError):  # in a container
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_NEVER))
    ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
