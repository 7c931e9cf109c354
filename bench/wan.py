"""What a long link and a narrow one cost: a round trip of 100 ms, and one path or two of 20 MB/s.

Each figure is the rate of a full refresh of incompressible data, from the command to its durable
end.  ``delay`` goes through a proxy that holds everything back (bench/delay.py), with and without a
round trip.  ``paths`` has the sites in two network namespaces, with as many cables between them as
there are paths, each with a token bucket (tc-tbf(8)); it needs root.  ``compression`` is over one
such path, of numbers as text.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fio
from systems import MIB, Lab, MissingError, need

from qdsmirror.tools.nbdclient import NbdClient

FILL = fio.Job("fill", "write", "1M", 4, False)
NETWORK = "10.79"
#: Of the ratios, the first aim and the goal.
AIMS = {"delay": (0.8, 0.95), "two paths": (1.8, 1.95), "zstd:1": (1.0, 3.0)}


class Site:
    """A lab of which the primary's file can be changed, and whose sites may be in namespaces.

    :ivar inside: by site, what its daemons are started by.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self.lab = Lab(directory, size, 128 * MIB)
        self.size = size
        self.inside: dict[Path, list[str]] = {}
        self._config = self.lab.primary / "etc" / "dsgrp000.cfg"
        self._text = self._config.read_text()
        self.port = next(
            line.split("=")[1].strip()
            for line in self._text.splitlines()
            if line.startswith("port")
        )

    def launch(self, site: Path, command: str) -> None:
        """Start a daemon where its site is."""
        program = str(Path(sys.executable).parent / command)
        inside = [*self.inside.get(site, []), program, "--root", str(site)]
        subprocess.run(inside, check=True, capture_output=True)

    def start(self) -> None:
        """Start all daemons."""
        self.launch(self.lab.secondary, "launchrmds")
        self.launch(self.lab.primary, "launchdriver")
        self.launch(self.lab.primary, "launchpmds")
        self.lab.uri = str(self.lab.group()["ldsus"][0]["nbd_uri"])

    def go_over(self, paths: list[str], compression: str = "none") -> None:
        """Name the paths for the next start."""
        lines = [f"paths = {', '.join(paths)}", "[tunables]", f"compression = {compression}"]
        self._config.write_text(self._text.replace("[ldsus]", "\n".join([*lines, "[ldsus]"])))

    def use(self, paths: list[str], compression: str = "none") -> None:
        """Go over these paths from now on."""
        self.go_over(paths, compression)
        self.lab.at(self.lab.primary, "killpmds")
        self.launch(self.lab.primary, "launchpmds")
        deadline = time.monotonic() + 30
        while not self.is_up(len(paths)):
            if time.monotonic() > deadline:
                raise MissingError(f"not all paths are up: {self.lab.group()['wire']}")

    def is_up(self, paths: int) -> bool:
        """Tell whether the group is connected over so many paths."""
        wire: dict[str, Any] = self.lab.group()["wire"] or {"paths": []}
        return [path["state"] for path in wire["paths"]].count("connected") == paths

    def rate(self) -> float:
        """Give MB (10^6 bytes) per second of a full refresh; nothing else is under way."""
        self.lab.settle()
        started = time.monotonic()
        self.lab.at(self.lab.primary, "qdsrefresh", "--full")
        return self.size / 1e6 / (time.monotonic() - started)


@contextmanager
def site(size: int) -> Iterator[Site]:
    """Make a lab in tmpfs, and remove it."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    directory = Path(tempfile.mkdtemp(prefix="qdsbench", dir=place))
    made = Site(directory, size)
    try:
        yield made
    finally:
        made.lab.stop()
        shutil.rmtree(directory, ignore_errors=True)


def fill(made: Site) -> None:
    """Have random data on the device."""
    fio.run(FILL, made.lab.uri, made.size, 0, "--refill_buffers")


def delay(made: Site, round_trip: float) -> dict[str, float]:
    """Measure once without a round trip and once with it, through the same kind of proxy."""
    found = {}
    for name, seconds in (("undelayed", 0.0), ("delayed", round_trip)):
        program = str(Path(__file__).with_name("delay.py"))
        command = [sys.executable, program, made.port, str(seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
            assert proxy.stdout is not None
            try:
                made.use([f"127.0.0.1>127.0.0.1:{proxy.stdout.readline().strip()}"])
                found[name] = made.rate()
            finally:
                proxy.terminate()
    return found


@contextmanager
def cables(made: Site, count: int, rate: int) -> Iterator[list[str]]:
    """Put the sites into namespaces with narrow cables between them; give the paths."""
    ip, tc = need("ip"), need("tc")
    spaces = [f"qb{os.getpid()}n{number}" for number in (1, 2)]
    try:
        for space in spaces:
            subprocess.run([ip, "netns", "add", space], check=True)
            subprocess.run([ip, "-n", space, "link", "set", "lo", "up"], check=True)
        for cable in range(count):
            ends = [f"qb{cable}a", f"qb{cable}b"]
            pair = ["link", "add", ends[0], "type", "veth", "peer", "name", ends[1]]
            subprocess.run([ip, "-n", spaces[0], *pair, "netns", spaces[1]], check=True)
            for number, (space, end) in enumerate(zip(spaces, ends, strict=True), 1):
                address = ["address", "add", f"{NETWORK}.{cable}.{number}/24", "dev", end]
                for change in (address, ["link", "set", end, "up"]):
                    subprocess.run([ip, "-n", space, *change], check=True)
                shape = ["tbf", "rate", f"{rate}bps", "burst", "256kb", "latency", "50ms"]
                add = ["qdisc", "add", "dev", end, "root", *shape]
                subprocess.run([tc, "-n", space, *add], check=True)
        sites = (made.lab.primary, made.lab.secondary)
        for place, space in zip(sites, spaces, strict=True):
            made.inside[place] = [ip, "netns", "exec", space]
        yield [f"{NETWORK}.{cable}.1>{NETWORK}.{cable}.2" for cable in range(count)]
    finally:
        made.lab.tool("qdslab", "stop", str(made.lab.directory), check=False)
        for space in spaces:
            subprocess.run([ip, "netns", "del", space], check=False)


def write_rows(uri: str, size: int) -> None:
    """Write numbers, as text."""
    chance = random.Random(1)
    with NbdClient.connect(uri) as client:
        for offset in range(0, size, MIB):
            rows = b"".join(b"%06d,%012.4f\n" % (n, chance.random()) for n in range(52_500))
            client.write(offset, rows[:MIB].ljust(MIB))
        client.flush()


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure all of one round: rates, by part."""
    found: dict[str, dict[str, float]] = {}
    if "delay" in options.only:
        with site(options.size * MIB) as made:
            made.lab.start()
            fill(made)
            found["delay"] = delay(made, options.round_trip)
    if "paths" in options.only:
        with site(options.narrow_size * MIB) as made, cables(made, 2, options.rate * 10**6) as ways:
            made.go_over(ways[:1])
            made.start()
            fill(made)
            made.lab.at(made.lab.primary, "qdsrefresh", "--full")
            found["paths"] = {}
            for name, some in (("one path", ways[:1]), ("two paths", ways)):
                made.use(some)
                found["paths"][name] = made.rate()
            write_rows(made.lab.uri, made.size)
            made.use(ways[:1])
            found["paths"]["none"] = made.rate()
            made.use(ways[:1], "zstd:1")
            found["paths"]["zstd:1"] = made.rate()
    return found


def ratios(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Give what is aimed at."""
    pairs = (
        ("delay", "delay", "delayed", "undelayed"),
        ("two paths", "paths", "two paths", "one path"),
        ("zstd:1", "paths", "zstd:1", "none"),
    )
    return {
        name: found[part][one] / found[part][other]
        for name, part, one, other in pairs
        if part in found
    }


def main() -> int:
    """Print each round's figures, and the medians of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB, of delay")
    parser.add_argument("--narrow-size", type=int, default=256, help="MiB, of paths")
    parser.add_argument("--round-trip", type=float, default=0.1, help="seconds")
    parser.add_argument("--rate", type=int, default=20, help="MB (10^6 bytes) per second, a path")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("delay", "paths"), action="append")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.only = options.only or ["delay", "paths"]
    rounds = []
    for _ in range(options.rounds):
        found = measure(options)
        rounds.append(found)
        for rates in found.values():
            for name, rate in rates.items():
                print(f"{name:10} {rate:8.1f} MB/s", flush=True)
    for name in ratios(rounds[0]):
        median = statistics.median(ratios(found)[name] for found in rounds)
        first, goal = AIMS[name]
        print(f"{name:10} {median:8.2f}   (first {first}, goal {goal})")
    if options.json:
        options.json.write_text(json.dumps(rounds, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
