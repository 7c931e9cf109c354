"""A small blocking NBD client over a Unix socket, with nothing but the standard library.

It speaks the fixed newstyle handshake with ``NBD_OPT_GO`` and simple replies, one request at a
time (NBD protocol, "Fixed newstyle negotiation" and "Transmission phase").
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

from qdsmirror.errors import ProtocolError, UnreachableError, UsageError
from qdsmirror.limits import KIB, NBD_PAYLOAD_BYTES_MAX

_GREETING = struct.Struct(">QQH")
_OPTION = struct.Struct(">QII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE_REPLY = struct.Struct(">IIQ")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")

_NBDMAGIC = 0x4E42444D41474943
_IHAVEOPT = 0x49484156454F5054
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REQUEST_MAGIC = 0x25609513
_SIMPLE_REPLY_MAGIC = 0x67446698

_FIXED_NEWSTYLE_NO_ZEROES = 3
_OPT_GO = 7
_REP_ACK = 1
_REP_INFO = 3
_REP_ERROR = 1 << 31
_INFO_KIND_EXPORT = 0
_INFO_KIND_BLOCK_SIZE = 3
_FLAG_FUA = 1
_FLAG_NO_HOLE = 2
_READ, _WRITE, _DISC, _FLUSH, _TRIM, _ZEROES = 0, 1, 2, 3, 4, 6
_REPLY_BYTES_MAX = 64 * KIB
_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class NbdAddress:
    """Where an export is.

    :ivar socket_path: the server's Unix socket.
    :ivar export: the export's name, e.g. ``qds0``.
    """

    socket_path: Path
    export: str

    @classmethod
    def parse(cls, uri: str) -> NbdAddress:
        """Take ``nbd+unix:///EXPORT?socket=PATH`` (the NBD URI specification).

        :raises UsageError: it is not such a URI.
        """
        parts = urlsplit(uri)
        found = parse_qs(parts.query).get("socket")
        if parts.scheme != "nbd+unix" or not found:
            raise UsageError(f"{uri!r} is not an nbd+unix:///EXPORT?socket=PATH")
        return cls(Path(found[0]), unquote(parts.path[1:]))


class NbdClient:
    """One connection to one export.

    :ivar size: the export's bytes.
    :ivar flags: the transmission flags.
    :ivar minimum_block: bytes that offsets and lengths are multiples of.
    """

    def __init__(self, connection: socket.socket, export: str) -> None:
        """Negotiate over a connected socket; use :meth:`connect` to have one made.

        :raises ProtocolError: the server refuses the export or breaks the protocol.
        """
        self._socket = connection
        self._cookie = 0
        self.size = 0
        self.flags = 0
        self.minimum_block = 1
        self._negotiate(export)

    @classmethod
    def connect(
        cls,
        target: str | os.PathLike[str],
        export: str | None = None,
        timeout_seconds: float = _TIMEOUT_SECONDS,
    ) -> NbdClient:
        """Connect to an NBD URI, or to a socket's path and an export's name.

        :param timeout_seconds: how long any one answer may take.
        :raises UnreachableError: nobody listens there.
        :raises ProtocolError: see :class:`NbdClient`.
        """
        where = (
            NbdAddress.parse(os.fspath(target))
            if export is None
            else NbdAddress(Path(target), export)
        )
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout_seconds)
        try:
            connection.connect(os.fspath(where.socket_path))
            return cls(connection, where.export)
        except OSError as error:
            connection.close()
            raise UnreachableError(
                f"no NBD server answers at {where.socket_path}: {error.strerror or error}",
                hint="start the driver: launchdriver",
            ) from error
        except ProtocolError:
            connection.close()
            raise

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes.

        :raises OSError: the server answers with an error.
        """
        return self._ask(_READ, offset, length)

    def write(self, offset: int, data: bytes, fua: bool = False) -> None:
        """Write ``data``; with ``fua`` it is durable when this returns.

        :raises OSError: the server answers with an error.
        """
        self._ask(_WRITE, offset, len(data), _FLAG_FUA if fua else 0, data)

    def flush(self) -> None:
        """Make every answered write durable."""
        self._ask(_FLUSH, 0, 0)

    def trim(self, offset: int, length: int, fua: bool = False) -> None:
        """Give up the range's content; afterwards it reads as zeroes (here, by promise)."""
        self._ask(_TRIM, offset, length, _FLAG_FUA if fua else 0)

    def zeroes(self, offset: int, length: int, fua: bool = False, hole: bool = True) -> None:
        """Make the range read as zeroes; ``hole`` allows to free its space."""
        flags = (_FLAG_FUA if fua else 0) | (0 if hole else _FLAG_NO_HOLE)
        self._ask(_ZEROES, offset, length, flags)

    def close(self) -> None:
        """Tell the server, and hang up."""
        try:
            self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISC, 0, 0, 0))
        except OSError:
            pass  # it is gone already, which is all that was wanted
        self._socket.close()

    def release(self) -> socket.socket:
        """Give the connection to somebody else, the kernel for instance; it is not ours any more.

        Nothing has been read ahead of what was asked for.
        """
        self._socket.settimeout(None)
        return self._socket

    def _negotiate(self, export: str) -> None:
        magic, ihaveopt, handshake_flags = _GREETING.unpack(self._receive(_GREETING.size))
        if (magic, ihaveopt) != (_NBDMAGIC, _IHAVEOPT) or handshake_flags & 3 != 3:
            raise ProtocolError("the server is no fixed newstyle NBD server")
        name = export.encode()
        payload = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, _INFO_KIND_BLOCK_SIZE)
        self._socket.sendall(
            struct.pack(">I", _FIXED_NEWSTYLE_NO_ZEROES)
            + _OPTION.pack(_IHAVEOPT, _OPT_GO, len(payload))
            + payload
        )
        while self._option_reply(export) != _REP_ACK:
            pass

    def _option_reply(self, export: str) -> int:
        magic, _, kind, length = _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))
        if magic != _OPTION_REPLY_MAGIC or length > _REPLY_BYTES_MAX:
            raise ProtocolError("the NBD server breaks the protocol in negotiation")
        data = self._receive(length)
        if kind & _REP_ERROR:
            text = data.decode(errors="replace") or f"error {kind:#x}"
            raise ProtocolError(f"the NBD server refuses export {export!r}: {text}")
        if kind == _REP_INFO:
            self._info(data)
        return int(kind)

    def _info(self, data: bytes) -> None:
        info_kind = int.from_bytes(data[:2], "big")
        if info_kind == _INFO_KIND_EXPORT and len(data) == _INFO_EXPORT.size:
            _, self.size, self.flags = _INFO_EXPORT.unpack(data)
        elif info_kind == _INFO_KIND_BLOCK_SIZE and len(data) == _INFO_BLOCK_SIZE.size:
            _, self.minimum_block, _, _ = _INFO_BLOCK_SIZE.unpack(data)

    def _ask(self, kind: int, offset: int, length: int, flags: int = 0, data: bytes = b"") -> bytes:
        if kind in (_READ, _WRITE) and length > NBD_PAYLOAD_BYTES_MAX:
            raise UsageError(f"{length} bytes are more than one NBD request may carry")
        self._cookie += 1
        head = _REQUEST.pack(_REQUEST_MAGIC, flags, kind, self._cookie, offset, length)
        self._socket.sendall(head + data)
        magic, code, cookie = _SIMPLE_REPLY.unpack(self._receive(_SIMPLE_REPLY.size))
        if (magic, cookie) != (_SIMPLE_REPLY_MAGIC, self._cookie):
            raise ProtocolError("the NBD server answers what was not asked")
        if code:
            raise OSError(code, os.strerror(code))
        return self._receive(length) if kind == _READ else b""

    def _receive(self, length: int) -> bytes:
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionError("the NBD server hung up")
            view = view[count:]
        return bytes(buffer)
