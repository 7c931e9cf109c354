"""``make demo``: a lab mirrors real data and proves that the mirror is byte-identical.

It needs nothing but Python: no root, no kernel module, no other program.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from blake3 import blake3

from qdsmirror.config import load_group, parse_size
from qdsmirror.errors import EXIT_BROKEN, EXIT_OK, UsageError
from qdsmirror.limits import KIB, MIB
from qdsmirror.tools import cli, info, info_view
from qdsmirror.tools.lab_plan import Plan
from qdsmirror.tools.lab_sites import Lab
from qdsmirror.tools.nbdclient import NbdClient
from qdsmirror.tools.status import Group, nbd_uri

LDSUS = 2
_BLOCK_BYTES = 4 * KIB
_WRITE_BYTES_MAX = 128 * KIB
_SIZE_BYTES_MIN = MIB
_PROGRESS_SECONDS = 0.5
_DRAIN_SECONDS = 120.0
_COMPARE_BYTES = MIB


@dataclass
class Written:
    """What was written to one LDSU, and how it must read now."""

    name: str
    image: bytearray
    writes: int = 0
    zeroed: int = 0
    data_bytes: int = 0


@dataclass
class Receipt:
    """What the demo proves.

    :ivar lines: for a person, one fact each.
    :ivar equal: whether every mirror equals its data device and what was written.
    """

    lines: list[str] = field(default_factory=list)
    equal: bool = True


def build_parser() -> argparse.ArgumentParser:
    """Make the command's parser."""
    made = cli.parser(
        "qdsmirror.tools.demo", "Mirror real data between two sites on this machine and verify it."
    )
    made.add_argument(
        "--size",
        metavar="SIZE",
        default="32M",
        help=f"size of each of the {LDSUS} LDSUs (default: 32M)",
    )
    return made


@cli.run
def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo."""
    arguments = build_parser().parse_args(argv)
    size = _size(arguments.size)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _interrupt)
    directory = Path(tempfile.mkdtemp(prefix="qds-"))
    lab = Lab(directory / "lab")
    progress = Progress(arguments.json)
    try:
        receipt = demonstrate(lab, size, progress)
        progress.end()
        if arguments.json:
            cli.print_json({"equal": receipt.equal, "receipt": receipt.lines})
        else:
            print("\n".join(receipt.lines), flush=True)
        if receipt.equal and sys.stdin.isatty() and sys.stdout.isatty():
            _stay(lab)
    finally:
        # Impatience must not leave daemons behind.
        for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(ending, signal.SIG_IGN)
        progress.end()
        if lab.directory.exists():
            lab.destroy()
        shutil.rmtree(directory, ignore_errors=True)
    return EXIT_OK if receipt.equal else EXIT_BROKEN


def demonstrate(lab: Lab, size: int, progress: Progress) -> Receipt:
    """Create a lab, start it, write, wait until all is mirrored, and compare.

    :param size: bytes of each LDSU.
    """
    begun = time.monotonic()
    lab.create(Plan(ldsus=LDSUS, size=size, writelog=16 * MIB, journal=32 * MIB))
    progress.say(f"created a primary and a secondary below {lab.directory}")
    lab.start(("primary", "secondary"), progress.say)
    progress.say("both sites run, and every group is connected and coherent")
    started = time.monotonic()
    written = write(lab, size, progress)
    _, groups = info.wait(
        _looking(lab, progress), "drained", _DRAIN_SECONDS, sleep=lambda _: time.sleep(0.02)
    )
    elapsed = time.monotonic() - started
    receipt = compare(lab, written)
    gsn = groups[0]["gsn"]
    total = sum(one.data_bytes for one in written)
    receipt.lines += [
        f"last GSN        {gsn['written']} written, {gsn['committed']} committed, "
        f"{gsn['mirrored']} mirrored",
        f"mirror          {'coherent' if groups[0]['coherent'] else 'NOT COHERENT'}",
        f"elapsed         {elapsed:.1f} s for {info_view.size_text(total)} written and mirrored, "
        f"{time.monotonic() - begun:.1f} s in all",
        "result          "
        + ("every mirror is byte-identical" if receipt.equal else "THE MIRRORS DIFFER"),
    ]
    receipt.equal = receipt.equal and groups[0]["coherent"] is True
    return receipt


class Progress:
    """Lines that say how far things are; on a terminal the passing ones overwrite each other.

    :param quiet: say nothing.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._passing = info_view.is_terminal()
        self._open = False
        self._last = 0.0

    def say(self, text: str) -> None:
        """Say something that stays."""
        self.end()
        if not self._quiet:
            print(text, flush=True)

    def show(self, group: Group, now: float) -> None:
        """Show how a group is, not too often."""
        if self._quiet or now - self._last < _PROGRESS_SECONDS:
            return
        self._last = now
        gsn, lag = group["gsn"], group["lag"]
        text = (
            f"{group['name']} {group['state']}: written {gsn['written']}, "
            f"committed {gsn['committed']}, mirrored {gsn['mirrored']}, "
            f"{info_view.size_text(lag['bytes'])} on the way"
        )
        if self._passing:
            print(f"\r\x1b[K{text}", end="", flush=True)
            self._open = True
        else:
            print(text, flush=True)

    def end(self) -> None:
        """Close a line that would be overwritten."""
        if self._open:
            print(flush=True)
            self._open = False


def write(lab: Lab, size: int, progress: Progress) -> list[Written]:
    """Write Python's own library, then random and zeroed ranges, to every LDSU by turns."""
    group = load_group(lab.paths["primary"], 0)
    uris = {one.name: nbd_uri(lab.paths["primary"], group, one) for one in group.ldsus}
    clients = {name: NbdClient.connect(uri) for name, uri in uris.items()}
    written = [Written(name, bytearray(size)) for name in clients]
    look = _looking(lab, progress)
    try:
        shown = time.monotonic()
        for one, offset, data in workload(written, size):
            _put(clients[one.name], one, offset, data)
            if time.monotonic() - shown >= _PROGRESS_SECONDS:
                look()
                shown = time.monotonic()
        for client in clients.values():
            client.flush()
    finally:
        for client in clients.values():
            client.close()
    return written


def workload(written: Sequence[Written], size: int) -> Iterator[tuple[Written, int, bytes | int]]:
    """Give (LDSU, offset, data) in the order to write; a number as data is a length of zeroes."""
    text = _library(size // 2)
    for offset in range(0, len(text), _WRITE_BYTES_MAX):
        for one in written:
            yield one, offset, text[offset : offset + _WRITE_BYTES_MAX]
    chance = random.Random()
    for _ in range(size // _WRITE_BYTES_MAX):
        for one in written:
            length = _BLOCK_BYTES * chance.randint(1, _WRITE_BYTES_MAX // _BLOCK_BYTES)
            offset = _BLOCK_BYTES * chance.randint(0, (size - length) // _BLOCK_BYTES)
            yield one, offset, length if chance.random() < 0.1 else chance.randbytes(length)


def _put(client: NbdClient, one: Written, offset: int, data: bytes | int) -> None:
    if isinstance(data, int):
        if one.zeroed % 2:
            client.trim(offset, data)
        else:
            client.zeroes(offset, data)
        one.image[offset : offset + data] = bytes(data)
        one.zeroed += 1
        return
    client.write(offset, data, fua=one.writes % 16 == 0)
    one.image[offset : offset + len(data)] = data
    one.writes += 1
    one.data_bytes += len(data)


def compare(lab: Lab, written: Sequence[Written]) -> Receipt:
    """Compare each data device with its mirror device, and with what was written."""
    receipt = Receipt()
    for one in written:
        data = lab.devices("primary") / f"{one.name}.data"
        mirror = lab.devices("secondary") / f"{one.name}.mirror"
        wanted = blake3(one.image).hexdigest()
        differs = first_difference(data, mirror)
        found = blake3(mirror.read_bytes()).hexdigest()
        equal = differs is None and found == wanted
        receipt.equal = receipt.equal and equal
        receipt.lines += [
            f"{one.name:<15} {one.writes} writes, {info_view.size_text(one.data_bytes)}; "
            f"{one.zeroed} zeroed or trimmed ranges",
            f"  written       blake3 {wanted}",
            f"  data device   blake3 {blake3(data.read_bytes()).hexdigest()}",
            f"  mirror device blake3 {found} {'equal' if equal else 'DIFFERENT'}",
        ]
        if differs is not None:
            receipt.lines.append(f"  data and mirror device differ first at byte {differs}")
    return receipt


def first_difference(one: Path, other: Path) -> int | None:
    """Give the offset of the first byte in which two files differ, ``None`` if they are equal."""
    position = 0
    with open(one, "rb") as left, open(other, "rb") as right:
        while True:
            mine, its = left.read(_COMPARE_BYTES), right.read(_COMPARE_BYTES)
            if mine != its:
                pairs = enumerate(zip(mine, its, strict=False))
                return position + next(
                    (at for at, (a, b) in pairs if a != b), min(len(mine), len(its))
                )
            if not mine:
                return None
            position += len(mine)


def _library(size: int) -> bytes:
    """Give the text of Python's library, one module after another, in whole blocks."""
    text = bytearray()
    for path in sorted(Path(random.__file__).parent.glob("*.py")):
        text += path.read_bytes()
    return bytes(text[: min(size, len(text)) // _BLOCK_BYTES * _BLOCK_BYTES])


def _looking(lab: Lab, progress: Progress) -> Callable[[], tuple[str, list[Group]]]:
    def look() -> tuple[str, list[Group]]:
        groups = lab.groups("primary")
        progress.show(groups[0], time.monotonic())
        return "primary", groups

    return look


def _stay(lab: Lab) -> None:
    print(f"\nThe lab runs until Ctrl-C.  Look at it: qdslab status {lab.directory}", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise UsageError(f"--size: {error}") from None
    if size < _SIZE_BYTES_MIN or size % _BLOCK_BYTES:
        raise UsageError(f"--size {text}: at least 1M and a multiple of {_BLOCK_BYTES} bytes")
    return size


if __name__ == "__main__":
    sys.exit(main())
