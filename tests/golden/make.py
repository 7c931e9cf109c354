"""The golden images: a writelog and a journal of format version 1, always the same bytes.

``python -m tests.golden.make DIRECTORY`` writes them; those in this directory are never made anew
for a version, so that later code is held to reading them.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

from qdsmirror.core import frames
from qdsmirror.core.frames import (
    REFRESH,
    REFRESH_BEGIN,
    REFRESH_END,
    REFRESH_ZEROES,
    TRIM,
    VOID,
    ZEROES,
    Entry,
)
from qdsmirror.core.records import Cursor
from qdsmirror.limits import WRITELOG_BYTES_MIN
from qdsmirror.storage.bitmap import empty_bitmap, write_blocks
from tests.fakes import MemoryDevice
from tests.storage.logworld import FrameMaker, append, initialise, write

DATA_BYTES = 64 * 1024
REFRESH_ID = bytes(range(0xA0, 0xB0))


def writelog() -> bytes:
    """A writelog after a turn of its ring: a pad, both superblocks, every kind of frame, a mark."""
    device = MemoryDevice(WRITELOG_BYTES_MIN)
    log = initialise(device, sizes=(DATA_BYTES,))
    maker = FrameMaker()
    for number in range(3):
        append(log, maker.make(0, [write(0, bytes([number]) * 24_000)], durable=maker.gsn - 1))
    done = Cursor(log.head, maker.gsn, dict(maker.points))
    log.update(tail=done, applied=done, head=done, durable_gsn=3)
    for number in range(3):
        entries = [
            write(4096 * number, bytes([0x40 + number]) * 20_000),
            Entry(1024, 512, ZEROES, None),
        ]
        append(log, maker.make(0, entries, durable=3), durable=done.position)
    append(log, maker.make(0, kind=VOID, gsns=5, durable=9), control=True, durable=log.head)
    durable = log.head
    log.update(
        both=True, coherent=False, reason="a refresh is in progress",
        refresh={"id": REFRESH_ID.hex()},
    )  # fmt: skip
    begin = maker.make(0, kind=REFRESH_BEGIN, control=REFRESH_ID, durable=14)
    append(log, begin, control=True, durable=durable)
    durable = log.head
    entries = [
        Entry(8192, 512, REFRESH, b"R" * 512),
        Entry(8704, 4096, REFRESH_ZEROES, None),
        write(512, b"W" * 512),
        Entry(60_000, 1000, TRIM, None),
    ]
    append(log, maker.make(0, entries, durable=15), durable=durable)
    end = maker.make(0, kind=REFRESH_END, control=REFRESH_ID, durable=19)
    append(log, end, control=True, durable=log.head)
    dirty = empty_bitmap(log.superblock)
    write_blocks(device, dirty.area, dirty.blocks(dirty.mark([(4096, 512)])))
    return device.content()


def journal() -> bytes:
    """A journal of two LDSUs with a refresh that has not come to its end."""
    device = MemoryDevice(WRITELOG_BYTES_MIN)
    log = initialise(device, role="journal", sizes=(DATA_BYTES, 4096))
    maker = FrameMaker()
    for ldsu in (0, 1, 1):
        append(log, maker.make(ldsu, [write(512 * ldsu, bytes([ldsu + 1]) * 3000)]))
    done = Cursor(log.head, maker.gsn, dict(maker.points))
    log.update(tail=done, applied=done, head=done, durable_gsn=3)
    append(log, maker.make(1, kind=VOID, gsns=2, durable=3), durable=done.position)
    begin = maker.make(0, kind=REFRESH_BEGIN, control=REFRESH_ID, durable=5)
    append(log, begin, durable=log.head)
    durable = log.head
    append(log, maker.make(1, [Entry(0, 512, REFRESH, b"r" * 512)], durable=6), durable=durable)
    append(log, maker.make(0, [write(9000, b"w" * 700)], durable=6), durable=durable)
    return device.content()


IMAGES = {
    f"writelog-{frames.VERSION}.img.gz": writelog,
    f"journal-{frames.VERSION}.img.gz": journal,
}

if __name__ == "__main__":
    for name, make in IMAGES.items():
        Path(sys.argv[1], name).write_bytes(gzip.compress(make(), 9, mtime=0))
