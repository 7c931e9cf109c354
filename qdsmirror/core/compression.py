"""Compression of frames on the wire (patent: "simple compression of data streams").

Only on the wire: a frame is unwrapped before anything of it is looked at, and then it is the same
bytes as in writelog and journal, under the same checksums.  What a message holds is one or more
whole frames.  The peer's declared length is bounded before anything is unpacked, and is what
unpacking may give, no more (security.md 5).  The format is in man page qdsmirror-protocol(7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from struct import Struct
from typing import Any, NamedTuple

from qdsmirror.core import stream
from qdsmirror.core.frames import HEADER_BYTES, Buffer, parse_header
from qdsmirror.errors import CorruptError, LimitError, ProtocolError
from qdsmirror.limits import (
    COMPRESSION_BACKOFF_BYTES_MAX,
    COMPRESSION_BACKOFF_BYTES_MIN,
    COMPRESSION_SAMPLE_BYTES,
    COMPRESSION_SAMPLES,
    COMPRESSION_SHARE_SAVED,
    FRAME_BYTES_MAX,
    KIB,
    MIB,
    ZSTD_LEVEL_DEFAULT,
)


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


# A host where one of them is missing does without that one: nothing else depends on it.
lz4 = _module("lz4.block")
zstandard = _module("zstandard")

NONE = "none"
#: By name, the number that stands for an algorithm in a message.
ALGORITHMS = {"lz4": 1, "zstd": 2}

# algorithm zero length
_WRAP = Struct(">B3xI")
#: A level above needs too long for even a few frames to be done on the way.
_QUICK_LEVEL_MAX = 3
_ZSTD_WINDOW_BYTES_MAX = 8 * MIB


class Method(NamedTuple):
    """An algorithm with its level; ``none`` and ``lz4`` have level 0."""

    name: str = NONE
    level: int = 0

    @classmethod
    def of(cls, text: str) -> Method:
        """Read the tunable ``compression``, which was checked: ``none``, ``lz4``, ``zstd:3``."""
        name, _, level = text.partition(":")
        if name == "zstd":
            return cls(name, int(level or ZSTD_LEVEL_DEFAULT))
        return cls(name)

    def __str__(self) -> str:
        return f"{self.name}:{self.level}" if self.level else self.name

    @property
    def is_quick(self) -> bool:
        """Whether a few KiB are compressed in less time than a thread needs to wake up."""
        return self.level <= _QUICK_LEVEL_MAX


def known(wanted: str) -> str:
    """Give what this end can use of what is wanted: that, or none."""
    found = {"lz4": lz4, "zstd": zstandard}.get(wanted)
    return wanted if found is not None else NONE


class Packer:
    """Makes the messages that carry frames; to be used by one thread at a time.

    What does not shrink is sent as it is.  Larger blocks are judged by a sample; while blocks do
    not shrink, more and more of them are not even looked at.

    :param method: the algorithm that was agreed on.
    """

    def __init__(self, method: Method) -> None:
        self._number = ALGORITHMS.get(method.name, 0)
        self._compress: Callable[[Buffer], bytes] | None = None
        if method.name == "lz4":
            self._compress = _lz4
        elif method.name == "zstd":
            self._compress = zstandard.ZstdCompressor(
                level=method.level, write_content_size=False, write_checksum=False
            ).compress
        self._backoff = 0
        self._skip = 0

    def pack(self, frames: Sequence[Buffer]) -> bytes:
        """Give the bytes of the messages for some frames; the last one asks for an ACK."""
        if self._compress is None:
            return stream.pack_frames(frames, ack=True)
        blocks = list(_blocks(frames))
        last = len(blocks) - 1
        return b"".join(self._packed(block, i == last) for i, block in enumerate(blocks))

    def _packed(self, frames: Sequence[Buffer], ack: bool) -> bytes:
        size = sum(map(len, frames))
        if self._skip >= size:
            self._skip -= size
            return stream.pack_frames(frames, ack)
        block = frames[0] if len(frames) == 1 else b"".join(frames)
        packed = self._shrunk(block)
        if packed is None:
            self._backoff = min(
                max(2 * self._backoff, COMPRESSION_BACKOFF_BYTES_MIN), COMPRESSION_BACKOFF_BYTES_MAX
            )
            self._skip = self._backoff
            return stream.pack_frames(frames, ack)
        self._backoff = self._skip = 0
        return stream.pack_compressed(_WRAP.pack(self._number, size), packed, ack)

    def _shrunk(self, block: Buffer) -> bytes | None:
        """Compress a block, unless that is not worth while."""
        assert self._compress is not None
        samples = COMPRESSION_SAMPLES * COMPRESSION_SAMPLE_BYTES
        if len(block) > 2 * samples:
            sample = _sample(memoryview(block))
            if not _saves(len(sample), len(self._compress(sample))):
                return None
        packed = self._compress(block)
        return packed if _saves(len(block), len(packed)) else None


def _saves(before: int, after: int) -> bool:
    return after + _WRAP.size <= before * (1 - COMPRESSION_SHARE_SAVED)


def _sample(block: memoryview) -> bytes:
    """Take pieces from all over a block."""
    apart = (len(block) - COMPRESSION_SAMPLE_BYTES) // COMPRESSION_SAMPLES
    # Not its very beginning, which is the header and the entry table of a frame.
    starts = range(apart, apart * COMPRESSION_SAMPLES + 1, apart)
    return b"".join(block[start : start + COMPRESSION_SAMPLE_BYTES] for start in starts)


def _lz4(block: Buffer) -> bytes:
    packed: bytes = lz4.compress(block, mode="fast", acceleration=1, store_size=False)
    return packed


def _blocks(frames: Sequence[Buffer]) -> Iterator[Sequence[Buffer]]:
    """Divide frames so that what a message declares stays within FRAME_BYTES_MAX."""
    first = size = 0
    for index, frame in enumerate(frames):
        if size and size + len(frame) > FRAME_BYTES_MAX:
            yield frames[first:index]
            first, size = index, 0
        size += len(frame)
    if first < len(frames):
        yield frames[first:]


# -- the other end --------------------------------------------------------------------------------


def declared_bytes(payload: Buffer) -> int:
    """Give what a compressed message says that it holds.

    :raises ProtocolError: it is too short to say so.
    :raises LimitError: that is more than a message may hold.
    """
    if len(payload) < _WRAP.size:
        raise ProtocolError(f"compressed message of {len(payload)} bytes")
    length: int = _WRAP.unpack_from(payload)[1]
    if length > FRAME_BYTES_MAX:
        raise LimitError(
            f"compressed message declares {length} bytes, over the limit of {FRAME_BYTES_MAX}"
        )
    if length < HEADER_BYTES:
        raise ProtocolError(f"compressed message declares {length} bytes: less than a frame")
    return length


def unpack(payload: Buffer, name: str) -> list[memoryview]:
    """Give the frames of a compressed message; they are not checked but for their headers.

    :param name: the algorithm that was agreed on.
    :raises ProtocolError: it is damaged, of another algorithm, or not what it declares.
    :raises LimitError: see :func:`declared_bytes`.
    """
    length = declared_bytes(payload)
    number = _WRAP.unpack_from(payload)[0]
    if number != ALGORITHMS.get(name):
        raise ProtocolError(f"message compressed by algorithm {number}, agreed was {name}")
    packed = memoryview(payload)[_WRAP.size :]
    block = _unlz4(packed, length) if name == "lz4" else _unzstd(packed, length)
    if len(block) != length:
        raise ProtocolError(f"compressed message holds {len(block)} bytes, not {length}")
    return list(_frames(memoryview(block)))


def _unlz4(packed: memoryview, length: int) -> bytes:
    try:
        found: bytes = lz4.decompress(packed, length)
    except (lz4.LZ4BlockError, ValueError, MemoryError) as error:
        raise ProtocolError(f"damaged compressed message: {error}") from error
    return found


def _unzstd(packed: memoryview, length: int) -> bytes:
    try:
        # A length that the data itself declares would be believed, and allocated.
        said = zstandard.frame_content_size(packed)
        if said not in (-1, length):
            raise ProtocolError(f"compressed message declares {length} bytes, and {said} inside")
        unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES_MAX)
        found: bytes = unpacker.decompress(packed, max_output_size=length, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError, MemoryError) as error:
        raise ProtocolError(f"damaged compressed message: {error}") from error
    return found


def _frames(block: memoryview) -> Iterator[memoryview]:
    position = 0
    while position < len(block):
        try:
            size = parse_header(block, position).frame_bytes
        except CorruptError as error:
            raise ProtocolError(f"damaged frame in a compressed message: {error.message}") from None
        if position + size > len(block):
            raise ProtocolError("a compressed message ends within a frame")
        yield block[position : position + size]
        position += size


#: Frames of so many bytes together are (un)compressed where they arrive, not in a thread.
INLINE_BYTES_MAX = 16 * KIB
