"""blake3 digests of a device's chunks (a guest may craft collisions of lesser hashes)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from blake3 import blake3

from qdsmirror.core.frames import Entry
from qdsmirror.core.pending import overlay
from qdsmirror.interfaces import IBlockDevice


@cache
def zeroes_digest(length: int) -> bytes:
    """Give the digest of so many zeroes."""
    return blake3(bytes(length)).digest()


def chunk_digests(
    device: IBlockDevice, offset: int, length: int, chunk: int, pending: Sequence[Entry] = ()
) -> bytes:
    """Give the digest of each chunk of a range, one after the other; blocking.

    :param chunk: bytes of a chunk; the last one may be shorter.
    :param pending: what is to count as written over the range, oldest first.
    :raises OSError: the device cannot be read.
    """
    end = offset + length
    sizes = [min(chunk, end - at) for at in range(offset, end, chunk)]
    if not pending and device.hole(offset, length) >= length:
        return b"".join(zeroes_digest(size) for size in sizes)
    data = device.pread(length, offset)
    if pending:
        written = bytearray(data)
        overlay(written, offset, pending)
        data = bytes(written)
    view = memoryview(data)
    return b"".join(
        blake3(view[at : at + size]).digest()
        for at, size in zip(range(0, length, chunk), sizes, strict=True)
    )
