"""How throttles hold a group in real time, by the bytes that a proxy on the network counts.

``patent``: those of the patent's Figure 10 (conf/throttles.sample) under a load of 800 KB a second,
of writes of 8 KiB; they should hold it at 200 to 300 KB a second until their window ends, and then
let go within one evaluation.  ``limit``: ``limit 250`` should hold within 5 percent.  The first
evaluations of each, in which a control loop has yet to close, are shown and not judged.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from systems import MIB, Lab, need, wait_for

KB = 1024
LOAD_KBPS = 800
LIMIT_KBPS = 250
#: Evaluations until the patent's throttles hold: 15 ms at first, then 5 more each.
CLOSING = 6
_READ_BYTES = 1 << 16
#: Both sites are started within.
_START_SECONDS = 40.0


class Counter:
    """A proxy to a port of the loopback that counts what the primary sends.

    :ivar sent: bytes, of all connections.
    """

    def __init__(self, target: int) -> None:
        self.sent = 0
        self._target = target
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                for one in (near, far):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for ends in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, to: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(_READ_BYTES):
                if counted:
                    self.sent += len(data)
                to.sendall(data)
        for one in (source, to):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no more connections."""
        self._server.close()


class Held:
    """A lab whose primary sends through a counter.

    :param interval: seconds between evaluations.
    """

    def __init__(self, directory: Path, interval: float) -> None:
        self.lab = Lab(directory, 64 * MIB, 128 * MIB)
        self.interval = interval
        self._config = self.lab.primary / "etc" / "dsgrp000.cfg"
        self._text = self._config.read_text()
        lines = (line.partition("=") for line in self._text.splitlines())
        port = next(value for key, _, value in lines if key.strip() == "port")
        self.counter = Counter(int(port))

    def use(self, throttles: str) -> None:
        """Start, or start again, with these throttles."""
        more = [
            f"paths = 127.0.0.1>127.0.0.1:{self.counter.port}",
            "[tunables]",
            f"throttle_interval = {self.interval:g}",
            "[ldsus]",
        ]
        text = self._text.replace("[ldsus]", "\n".join(more))
        self.lab.tool("qdslab", "stop", str(self.lab.directory))
        self._config.write_text(f"{text}\n[throttles]\n{throttles}")
        self.lab.start()

    def rates(self, seconds: float) -> list[float]:
        """Give the KB a second on the wire for each interval."""
        found = []
        for _ in range(round(seconds / self.interval)):
            before, begun = self.counter.sent, time.monotonic()
            time.sleep(self.interval)
            passed = time.monotonic() - begun
            found.append((self.counter.sent - before) / passed / KB)
        return found

    def load(self, seconds: float) -> subprocess.Popen[bytes]:
        """Have fio write for so long."""
        job = ["--rw=randwrite", "--bs=8k", "--iodepth=1", f"--rate={LOAD_KBPS}k"]
        return subprocess.Popen(
            [
                need("fio"), "--name=load", "--ioengine=nbd", f"--uri={self.lab.uri}", *job,
                f"--size={64 * MIB}", "--norandommap", f"--runtime={seconds}", "--time_based",
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip


def figure_10(start: datetime, stop: datetime) -> str:
    """Give the patent's throttles for a window of now."""
    sample = Path(__file__).resolve().parent.parent / "conf" / "throttles.sample"
    text = sample.read_text().partition("[throttles]")[2]
    for sampled, now in (("08:00:00", start), ("17:00:00", stop)):
        text = text.replace(sampled, f"{now:%H:%M:%S}")
    return text


def patent(held: Held, seconds: float) -> list[float]:
    """Measure the patent's throttles, and what becomes of the rate at the end of their window."""
    after = 3 * held.interval
    # Starting both sites takes a while, which counts for the window.
    held.use("")
    now = datetime.now()
    begun = now + timedelta(seconds=_START_SECONDS)
    held.use(figure_10(now - timedelta(hours=1), begun + timedelta(seconds=seconds)))
    with held.load(_START_SECONDS + seconds + after) as fio:
        wait_for("the load", lambda: datetime.now() >= begun, 60)
        found = held.rates(seconds + after)
        fio.terminate()
    return found


def limited(held: Held, seconds: float) -> list[float]:
    """Measure a limit."""
    held.use(f"[[limit]]\ntest = netkbps >= 0\nactions = limit {LIMIT_KBPS}\n")
    with held.load(seconds + 5) as fio:
        found = held.rates(seconds)
        fio.terminate()
    return found


def show(name: str, rates: Sequence[float], judged: Sequence[float], good: bool) -> None:
    """Print rates, and what is thought of them."""
    print(f"{name}: KB/s on the wire: {' '.join(f'{rate:.0f}' for rate in rates)}")
    mean = sum(judged) / len(judged)
    print(f"{name}: mean {mean:.1f}, from {min(judged):.0f} to {max(judged):.0f}", end="")
    print(f": {'as it should be' if good else 'NOT as it should be'}")


def main() -> int:
    """Measure both, and judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="under the patent's throttles")
    parser.add_argument("--limit-seconds", type=float, default=120.0, help="under the limit")
    parser.add_argument("--interval", type=float, default=10.0, help="of the evaluations")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.seconds < (CLOSING + 4) * options.interval:
        parser.error(f"--seconds must be {CLOSING + 4} intervals at least")
    if options.limit_seconds < 4 * options.interval:
        parser.error("--limit-seconds must be 4 intervals at least")
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    directory = Path(tempfile.mkdtemp(prefix="qdsbench", dir=place))
    held = Held(directory, options.interval)
    try:
        found = {
            "patent": patent(held, options.seconds),
            "limit": limited(held, options.limit_seconds),
        }
    finally:
        held.lab.stop()
        held.counter.close()
        shutil.rmtree(directory, ignore_errors=True)
    in_window = round(options.seconds / options.interval) - 1
    judged = found["patent"][CLOSING:in_window]
    mean = sum(judged) / len(judged)
    lifted = found["patent"][in_window + 2 :]
    kept = 200 <= mean <= 300 and min(judged) >= 180 and max(judged) <= 320
    patent_good = kept and min(lifted) > 2 * mean
    limit_judged = found["limit"][2:]
    limit_mean = sum(limit_judged) / len(limit_judged)
    limit_good = abs(limit_mean / LIMIT_KBPS - 1) <= 0.05
    show("patent", found["patent"], judged, patent_good)
    show("limit", found["limit"], limit_judged, limit_good)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if patent_good and limit_good else 1


if __name__ == "__main__":
    sys.exit(main())
