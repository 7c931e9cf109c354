"""Numbered writes over several devices, and a checker that decides what prefix of them stands.

Write ``n`` (from 1) goes to one slot of one device, which follow from ``n`` alone, and carries
``n`` and the numbers that were unanswered when it was issued: every other lower number had been
answered, so it comes before ``n`` in the order that PREFIX speaks of.  The writer never has two
unanswered writes to one slot.

What a set of images holds is decided by what each slot shows: the writes of a slot are in order,
so those up to the shown one are there and those after it are not.  The set is a prefix if no
write is there that comes after one that is not.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

SLOT_BYTES = 4096
_MAGIC = b"QDSORDER"
#: magic, number, count of unanswered numbers, CRC of all that follows this header
_HEAD = struct.Struct(">8sQII")
CONCURRENT_MAX = (SLOT_BYTES - _HEAD.size) // 8


class NotAPrefixError(Exception):
    """The images are no prefix of the order, or hold something that was never written."""


@dataclass(frozen=True)
class Layout:
    """Where write ``n`` goes: round-robin over the devices, each time to another slot.

    :ivar devices: how many there are.
    :ivar slots: on each, a power of two: the stride between them must not divide it.
    """

    devices: int
    slots: int

    def place(self, number: int) -> tuple[int, int]:
        """Give the device and slot of a write."""
        turn, device = divmod(number - 1, self.devices)
        return device, turn * 7 % self.slots

    @property
    def period(self) -> int:
        """The write after this many goes to the same slot again."""
        return self.devices * self.slots


def payload(number: int, unanswered: Collection[int]) -> bytes:
    """Make what write ``number`` carries, one slot long."""
    body = struct.pack(f">{len(unanswered)}Q", *sorted(unanswered))
    body += number.to_bytes(8, "big") * ((SLOT_BYTES - _HEAD.size - len(body)) // 8)
    return _HEAD.pack(_MAGIC, number, len(unanswered), crc32(body)) + body


def parse(block: bytes) -> tuple[int, set[int]] | None:
    """Read a slot: the number and what was unanswered; ``None`` for one never written.

    :raises NotAPrefixError: it is neither, e.g. torn.
    """
    if not any(block):
        return None
    magic, number, count, crc = _HEAD.unpack_from(block)
    body = block[_HEAD.size :]
    if magic != _MAGIC or count > CONCURRENT_MAX or crc32(body) != crc:
        raise NotAPrefixError("a slot holds what nobody wrote")
    return number, set(struct.unpack_from(f">{count}Q", body))


def check(
    images: Sequence[bytes], layout: Layout, first: int = 1, base: Sequence[bytes] = ()
) -> int:
    """Decide whether the images are a prefix of the order of writes.

    :param first: the order begins anew with this number, on top of ``base``: once one of its
        writes is there, everything in ``base`` is, save where it was overwritten since.
    :returns: the highest number that stands, ``first - 1`` while none of the order does.
    :raises NotAPrefixError: they are not; says which two writes contradict each other.
    """
    shown: dict[tuple[int, int], int] = {}
    unanswered: dict[int, set[int]] = {}
    older: list[tuple[int, int]] = []
    for device, image in enumerate(images):
        for slot in range(layout.slots):
            found = parse(_slot(image, slot))
            if found is not None and layout.place(found[0]) != (device, slot):
                raise NotAPrefixError(f"write {found[0]} stands on device {device}, slot {slot}")
            if found is None or found[0] < first:
                older.append((device, slot))
                continue
            number, concurrent = found
            shown[device, slot] = number
            unanswered[number] = concurrent
    top = max(unanswered, default=first - 1)
    if unanswered and base:
        for device, slot in older:
            if _slot(images[device], slot) != _slot(base[device], slot):
                raise NotAPrefixError(f"write {top} stands, but not all of what was before {first}")
    missing = sorted(_missing(shown, layout, first, top))
    for number, concurrent in unanswered.items():
        for lost in missing[: bisect_left(missing, number)]:
            if lost not in concurrent:
                raise NotAPrefixError(
                    f"write {number} stands, but {lost} does not, which was answered before it"
                )
    return top


def numbers(images: Sequence[bytes], layout: Layout) -> dict[tuple[int, int], int]:
    """Give the number that each slot shows, by device and slot; 0 for none.

    :raises NotAPrefixError: one shows what nobody wrote.
    """
    return {
        (device, slot): (parse(_slot(image, slot)) or (0,))[0]
        for device, image in enumerate(images)
        for slot in range(layout.slots)
    }


def _slot(image: bytes, slot: int) -> bytes:
    return image[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]


def _missing(
    shown: dict[tuple[int, int], int], layout: Layout, first: int, top: int
) -> Iterable[int]:
    """Give the writes up to ``top`` that are not there: newer than what their slot shows."""
    for start in range(first, first + layout.period):
        number = shown.get(layout.place(start), start - layout.period) + layout.period
        yield from range(number, top + 1, layout.period)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="order", description="Check images for PREFIX.")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--slots", type=int, required=True)
    chosen = parser.parse_args(arguments)
    images = [image.read_bytes() for image in chosen.images]
    print(json.dumps({"top": check(images, Layout(len(images), chosen.slots))}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
