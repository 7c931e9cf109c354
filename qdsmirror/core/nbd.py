"""The NBD protocol's transmission phase as bytes: constants, the request, and the replies.

Source: the NBD project's protocol description (``doc/proto.md``), section "Transmission".  The
negotiation before it is in `qdsmirror.core.nbd_options`, the parser of requests in
`qdsmirror.core.nbd_requests`.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from struct import Struct
from typing import TYPE_CHECKING, Any

from qdsmirror import limits

if TYPE_CHECKING:
    from qdsmirror.core.latency import Begun
    from qdsmirror.interfaces import INbdConnection

REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7

CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_FLAG_DF = 1 << 2
CMD_FLAG_REQ_ONE = 1 << 3

FLAG_HAS_FLAGS = 1 << 0
FLAG_READ_ONLY = 1 << 1
FLAG_SEND_FLUSH = 1 << 2
FLAG_SEND_FUA = 1 << 3
FLAG_SEND_TRIM = 1 << 5
FLAG_SEND_WRITE_ZEROES = 1 << 6
FLAG_SEND_DF = 1 << 7
FLAG_CAN_MULTI_CONN = 1 << 8

REPLY_FLAG_DONE = 1 << 0
REPLY_TYPE_OFFSET_DATA = 1
REPLY_TYPE_BLOCK_STATUS = 5
REPLY_TYPE_ERROR = (1 << 15) + 1

#: Flags of an extent in the meta context ``base:allocation``.
STATE_HOLE = 1 << 0
STATE_ZERO = 1 << 1
#: The number by which replies name ``base:allocation``, the only context there is.
CONTEXT_ID = 1

#: magic, command flags, command, cookie, offset, length
REQUEST = Struct(">IHH8sQI")
#: magic, error; the cookie follows
_SIMPLE = Struct(">II")
_SUCCESS = _SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0)
#: magic, reply flags, type, cookie, length of what follows
_CHUNK = Struct(">IHH8sI")
#: a chunk's header and the offset of its data
_DATA_CHUNK = Struct(">IHH8sIQ")
_ERROR = Struct(">IH")
_EXTENT = Struct(">II")
_MESSAGE_BYTES_MAX = 1024

#: Python's errno numbers that NBD can say; NBD's numbers are Linux's, but fixed.
_ERRORS = {
    errno.EPERM: 1,
    errno.EACCES: 1,
    errno.EROFS: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EDQUOT: 28,
    errno.EFBIG: 28,
    errno.EOVERFLOW: 75,
    errno.ENOTSUP: 95,
    errno.ESHUTDOWN: 108,
}


class Request:
    """One request of one client.

    :ivar connection: where it is answered.
    :ivar cookie: the client's 8 bytes that name it, opaque.
    :ivar command: one of ``CMD_*``.
    :ivar flags: the ``CMD_FLAG_*`` set.
    :ivar offset: bytes from the start of the export.
    :ivar length: bytes; of a read, write, trim, zeroes or status at least one minimum block.
    :ivar payload: a write's ``length`` bytes, never changed after parsing; else ``None``.
    :ivar state: whatever the export wants to remember.
    :ivar begun: where it is measured how long it took, and since when; ``None``: nowhere.
    """

    __slots__ = (
        "begun",
        "command",
        "connection",
        "cookie",
        "flags",
        "length",
        "offset",
        "payload",
        "state",
    )

    def __init__(
        self,
        connection: INbdConnection,
        cookie: bytes,
        command: int,
        flags: int,
        offset: int,
        length: int,
        payload: memoryview | bytes | None = None,
    ) -> None:
        self.connection = connection
        self.cookie = cookie
        self.command = command
        self.flags = flags
        self.offset = offset
        self.length = length
        self.payload = payload
        self.state: Any = None
        self.begun: Begun | None = None

    def __repr__(self) -> str:
        return (
            f"<Request command={self.command} flags={self.flags:#x} offset={self.offset} "
            f"length={self.length} cookie={self.cookie.hex()}>"
        )


def request_cost(request: Request) -> int:
    """Give the bytes a request holds of the budget: a write's payload or a read's data."""
    return request.length if request.command <= CMD_WRITE else 0


def success_replies(requests: Sequence[Request]) -> bytes:
    """Encode simple replies of success, for requests whose reply has no payload.

    With structured replies negotiated these stay allowed for everything but reads.
    """
    return _SUCCESS + _SUCCESS.join([request.cookie for request in requests])


def read_header(request: Request, structured: bool) -> bytes:
    """Encode what goes before a read's data: all of it follows as one piece.

    :param structured: whether the client negotiated structured replies.
    """
    if not structured:
        return _SUCCESS + request.cookie
    return _DATA_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC,
        REPLY_FLAG_DONE,
        REPLY_TYPE_OFFSET_DATA,
        request.cookie,
        8 + request.length,
        request.offset,
    )


def error_reply(request: Request, errno_code: int, message: str, structured: bool) -> bytes:
    """Encode a reply of failure.

    :param errno_code: a Python ``errno`` number; one that NBD does not know becomes EIO.
    :param message: one line for a person; only a structured reply can carry it.
    :param structured: whether the client negotiated structured replies.
    """
    code = _ERRORS.get(errno_code, 5)
    if not structured:
        return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, code) + request.cookie
    text = message.encode("utf-8", "replace")[:_MESSAGE_BYTES_MAX]
    # A character cut in two is no UTF-8 any more.
    text = text.decode("utf-8", "ignore").replace("\0", "").encode()
    header = _CHUNK.pack(
        STRUCTURED_REPLY_MAGIC,
        REPLY_FLAG_DONE,
        REPLY_TYPE_ERROR,
        request.cookie,
        _ERROR.size + len(text),
    )
    return header + _ERROR.pack(code, len(text)) + text


def status_reply(request: Request, extents: Sequence[tuple[int, int]]) -> bytes:
    """Encode a block status of ``base:allocation``; needs structured replies.

    Neighbours with equal flags are joined, what goes beyond the request is cut off, and with
    REQ_ONE only the first extent is told; at most `limits.NBD_EXTENTS_MAX` are.

    :param extents: (length in bytes, ``STATE_*`` flags) pairs from the request's offset on.
    :raises ValueError: when they describe no byte at all.
    """
    most = 1 if request.flags & CMD_FLAG_REQ_ONE else limits.NBD_EXTENTS_MAX
    told: list[list[int]] = []
    left = request.length
    for length, flags in extents:
        length = min(length, left)
        if length <= 0:
            continue
        if told and told[-1][1] == flags:
            told[-1][0] += length
        elif len(told) == most:
            break
        else:
            told.append([length, flags])
        left -= length
    if not told:
        raise ValueError("a block status must describe at least one byte")
    body = CONTEXT_ID.to_bytes(4, "big") + b"".join(_EXTENT.pack(*extent) for extent in told)
    return (
        _CHUNK.pack(
            STRUCTURED_REPLY_MAGIC,
            REPLY_FLAG_DONE,
            REPLY_TYPE_BLOCK_STATUS,
            request.cookie,
            len(body),
        )
        + body
    )
