"""The NBD protocol's fixed newstyle negotiation, bytes in, bytes out.

Source: the NBD project's protocol description, sections "Fixed newstyle negotiation" and "Option
types".  Nothing is opened here: the negotiation only looks names up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from struct import Struct

from qdsmirror import limits
from qdsmirror.core import nbd
from qdsmirror.errors import LimitError, ProtocolError

INIT_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
REPLY_MAGIC = 0x3E889045565A9

FLAG_FIXED_NEWSTYLE = 1 << 0
FLAG_NO_ZEROES = 1 << 1

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERR_UNSUP = (1 << 31) + 1
REP_ERR_POLICY = (1 << 31) + 2
REP_ERR_INVALID = (1 << 31) + 3
REP_ERR_UNKNOWN = (1 << 31) + 6
REP_ERR_TOO_BIG = (1 << 31) + 9

INFO_EXPORT = 0
INFO_NAME = 1
INFO_BLOCK_SIZE = 3

ALLOCATION_CONTEXT = b"base:allocation"

#: magic, option, length of its data
_OPTION = Struct(">8sII")
#: magic, option, reply type, length of its data
_REPLY = Struct(">QIII")
_EXPORT = Struct(">QH")
_INFO_EXPORT = Struct(">HQH")
_INFO_BLOCK_SIZE = Struct(">HIII")


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client is told about an export.

    :ivar name: as the client asks for it.
    :ivar size: bytes.
    :ivar minimum_block: bytes, a power of two: what offsets and lengths are multiples of.
    :ivar preferred_block: bytes, a power of two.
    :ivar multi_conn: whether a flush on one connection covers the writes of all.
    :ivar read_only: whether whatever would change it is refused.
    """

    name: str
    size: int
    minimum_block: int
    preferred_block: int
    multi_conn: bool = True
    read_only: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.size < 1 << 63:
            raise ValueError(f"{self.name}: size {self.size} does not fit in 63 bits")
        for block in (self.minimum_block, self.preferred_block):
            if block <= 0 or block & (block - 1) or block > limits.NBD_PAYLOAD_BYTES_MAX:
                raise ValueError(f"{self.name}: block size {block} is no usable power of two")

    def transmission_flags(self, structured: bool) -> int:
        """Give the 16 bits that say which commands the export takes."""
        flags = nbd.FLAG_HAS_FLAGS | nbd.FLAG_SEND_FLUSH
        if self.read_only:
            flags |= nbd.FLAG_READ_ONLY
        else:
            flags |= nbd.FLAG_SEND_FUA | nbd.FLAG_SEND_TRIM | nbd.FLAG_SEND_WRITE_ZEROES
        if structured:
            flags |= nbd.FLAG_SEND_DF
        if self.multi_conn:
            flags |= nbd.FLAG_CAN_MULTI_CONN
        return flags


class ExportClosedError(Exception):
    """The export exists, and takes no client now; its text tells why."""


class _OptionError(Exception):
    """An option that is answered with an error; the negotiation goes on."""

    def __init__(self, reply_type: int, message: str) -> None:
        super().__init__(message)
        self.reply_type = reply_type
        self.message = message


class _Fields:
    """An option's data, taken apart from its start."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def take(self, length: int) -> bytes:
        """Take the next ``length`` bytes."""
        end = self._position + length
        if end > len(self._data):
            raise _OptionError(REP_ERR_INVALID, "the option's data is too short")
        piece = self._data[self._position : end]
        self._position = end
        return piece

    def number(self, size: int) -> int:
        """Take an unsigned number of ``size`` bytes."""
        return int.from_bytes(self.take(size), "big")

    def string(self) -> bytes:
        """Take a string: its length in 32 bits, then its bytes."""
        length = self.number(4)
        if length > limits.NBD_NAME_BYTES_MAX:
            raise _OptionError(
                REP_ERR_TOO_BIG, f"a string of {length} bytes is over {limits.NBD_NAME_BYTES_MAX}"
            )
        return self.take(length)

    def end(self) -> None:
        """Require that nothing is left."""
        if self._position != len(self._data):
            raise _OptionError(REP_ERR_INVALID, "the option's data is too long")


class Negotiation:
    """The server's side of one client's handshake.

    :param names: gives the names of all exports, for LIST.
    :param find: gives the export of a name, or ``None``; may raise ExportClosedError.

    :ivar export: the export chosen; until then ``None``.
    :ivar structured: whether structured replies were negotiated.
    :ivar block_status: whether ``base:allocation`` was selected for ``export``.
    :ivar finished: transmission begins; what the client sent beyond is in `rest`.
    :ivar aborted: the client is leaving; send what there is and close.
    """

    def __init__(
        self,
        names: Callable[[], Iterable[str]],
        find: Callable[[str], ExportInfo | None],
    ) -> None:
        self._names = names
        self._find = find
        self._buffer = b""
        self._client_flags: int | None = None
        self._options = 0
        self._context_of: bytes | None = None
        self.export: ExportInfo | None = None
        self.structured = False
        self.block_status = False
        self.finished = False
        self.aborted = False

    @property
    def rest(self) -> bytes:
        """What was received and not used."""
        return self._buffer

    def greeting(self) -> bytes:
        """Give what the server says first."""
        flags = FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES
        return INIT_MAGIC + OPTION_MAGIC + flags.to_bytes(2, "big")

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the client, give the bytes to send.

        :raises ProtocolError: the client speaks something else; close the connection.
        :raises LimitError: it asks for more than `limits` allows; close the connection.
        """
        self._buffer += data
        replies = []
        while not (self.finished or self.aborted):
            reply = self._next()
            if reply is None:
                break
            replies.append(reply)
        return b"".join(replies)

    def _next(self) -> bytes | None:
        if self._client_flags is None:
            if len(self._buffer) < 4:
                return None
            return self._take_client_flags(int.from_bytes(self._cut(4), "big"))
        if len(self._buffer) < _OPTION.size:
            return None
        magic, option, length = _OPTION.unpack_from(self._buffer)
        if magic != OPTION_MAGIC:
            raise ProtocolError(f"NBD option magic is {magic.hex()}")
        if length > limits.NBD_OPTION_BYTES_MAX:
            raise LimitError(f"NBD option {option} announces {length} bytes of data")
        if len(self._buffer) < _OPTION.size + length:
            return None
        self._options += 1
        if self._options > limits.NBD_OPTIONS_MAX:
            raise LimitError(f"more than {limits.NBD_OPTIONS_MAX} NBD options on one connection")
        return self._answer(option, self._cut(_OPTION.size + length)[_OPTION.size :])

    def _cut(self, length: int) -> bytes:
        piece = self._buffer[:length]
        self._buffer = self._buffer[length:]
        return piece

    def _take_client_flags(self, flags: int) -> bytes:
        if flags & ~(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
            raise ProtocolError(f"unknown NBD client flags {flags:#x}")
        self._client_flags = flags
        return b""

    def _answer(self, option: int, data: bytes) -> bytes:
        if option == OPT_EXPORT_NAME:
            return self._export_name(data)
        known = {
            OPT_ABORT: self._abort,
            OPT_LIST: self._list,
            OPT_INFO: self._info,
            OPT_GO: self._go,
            OPT_STRUCTURED_REPLY: self._structured_reply,
            OPT_LIST_META_CONTEXT: self._list_meta_context,
            OPT_SET_META_CONTEXT: self._set_meta_context,
        }
        try:
            if option not in known:
                raise _OptionError(REP_ERR_UNSUP, f"option {option} is not supported")
            replies = known[option](data)
        except _OptionError as error:
            return _reply(option, error.reply_type, error.message.encode())
        return b"".join(
            [_reply(option, kind, body) for kind, body in replies] + [_reply(option, REP_ACK)]
        )

    # Each option gives the replies that go before the final acknowledgement.

    def _export_name(self, data: bytes) -> bytes:
        # This option's reply has no room for an error.
        try:
            export = self._look_up(data) if len(data) <= limits.NBD_NAME_BYTES_MAX else None
        except ExportClosedError as closed:
            raise ProtocolError(str(closed)) from None
        if export is None:
            raise ProtocolError(f"no NBD export has the name {_shown(data)}")
        self._choose(export, data)
        reply = _EXPORT.pack(export.size, export.transmission_flags(self.structured))
        assert self._client_flags is not None
        return reply if self._client_flags & FLAG_NO_ZEROES else reply + bytes(124)

    def _abort(self, data: bytes) -> list[tuple[int, bytes]]:
        self.aborted = True
        return []

    def _list(self, data: bytes) -> list[tuple[int, bytes]]:
        _Fields(data).end()
        names = [name.encode() for name in self._names()]
        return [(REP_SERVER, len(name).to_bytes(4, "big") + name) for name in names]

    def _info(self, data: bytes) -> list[tuple[int, bytes]]:
        return self._infos(data)[2]

    def _go(self, data: bytes) -> list[tuple[int, bytes]]:
        export, name, replies = self._infos(data)
        self._choose(export, name)
        return replies

    def _infos(self, data: bytes) -> tuple[ExportInfo, bytes, list[tuple[int, bytes]]]:
        fields = _Fields(data)
        name = fields.string()
        wanted = [fields.number(2) for _ in range(fields.number(2))]
        fields.end()
        export = self._known(name)
        replies = [
            _INFO_EXPORT.pack(INFO_EXPORT, export.size, export.transmission_flags(self.structured)),
            _INFO_BLOCK_SIZE.pack(
                INFO_BLOCK_SIZE,
                export.minimum_block,
                export.preferred_block,
                limits.NBD_PAYLOAD_BYTES_MAX,
            ),
        ]
        if INFO_NAME in wanted:
            replies.append(INFO_NAME.to_bytes(2, "big") + name)
        return export, name, [(REP_INFO, reply) for reply in replies]

    def _structured_reply(self, data: bytes) -> list[tuple[int, bytes]]:
        _Fields(data).end()
        if self.structured:
            raise _OptionError(REP_ERR_INVALID, "structured replies were negotiated already")
        self.structured = True
        return []

    def _list_meta_context(self, data: bytes) -> list[tuple[int, bytes]]:
        _, queries = self._queries(data)
        told = not queries or b"base:" in queries or ALLOCATION_CONTEXT in queries
        return [(REP_META_CONTEXT, bytes(4) + ALLOCATION_CONTEXT)] if told else []

    def _set_meta_context(self, data: bytes) -> list[tuple[int, bytes]]:
        self._context_of = None
        name, queries = self._queries(data)
        if ALLOCATION_CONTEXT not in queries:
            return []
        self._context_of = name
        return [(REP_META_CONTEXT, nbd.CONTEXT_ID.to_bytes(4, "big") + ALLOCATION_CONTEXT)]

    def _queries(self, data: bytes) -> tuple[bytes, list[bytes]]:
        if not self.structured:
            raise _OptionError(REP_ERR_INVALID, "negotiate structured replies first")
        fields = _Fields(data)
        name = fields.string()
        queries = [fields.string() for _ in range(fields.number(4))]
        fields.end()
        self._known(name)
        return name, queries

    def _known(self, name: bytes) -> ExportInfo:
        try:
            export = self._look_up(name)
        except ExportClosedError as closed:
            raise _OptionError(REP_ERR_POLICY, str(closed)) from None
        if export is None:
            raise _OptionError(REP_ERR_UNKNOWN, f"no export has the name {_shown(name)}")
        return export

    def _look_up(self, name: bytes) -> ExportInfo | None:
        try:
            return self._find(name.decode())
        except UnicodeDecodeError:
            return None

    def _choose(self, export: ExportInfo, name: bytes) -> None:
        self.export = export
        # A context selected for another export is void.
        self.block_status = self._context_of == name
        self.finished = True


def _reply(option: int, reply_type: int, data: bytes = b"") -> bytes:
    return _REPLY.pack(REPLY_MAGIC, option, reply_type, len(data)) + data


def _shown(name: bytes) -> str:
    """Give a client's name for a message: cut short, and nothing a terminal would act on."""
    text = ascii(name[:64].decode("utf-8", "replace"))
    return text if len(name) <= 64 else f"{text}... ({len(name)} bytes)"
