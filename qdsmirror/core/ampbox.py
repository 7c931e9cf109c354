"""AMP boxes as bytes: the codec of the control channel, shared by daemons and blocking tools.

A box is a sequence of key/value pairs, each string under a 16-bit big-endian length, ended by
an empty key (the AMP specification, "Asynchronous Messaging Protocol").  A value holds at most
65,535 bytes, so a longer one is *spread* over the keys ``json``, ``json.1``, ``json.2`` ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from struct import Struct

from qdsmirror import errors, limits
from qdsmirror.core.jsontext import dump_json, parse_object
from qdsmirror.errors import LimitError, ProtocolError, QdsError

_LENGTH = Struct(">H")

KEY_BYTES_MAX = 255
VALUE_BYTES_MAX = 65535
#: What a box around the largest spread value may take: the value, its keys and the others.
BOX_BYTES_MAX = limits.CONTROL_JSON_BYTES_MAX + 64 * limits.KIB
#: A request carries a command's name and a few short arguments.
REQUEST_BYTES_MAX = 64 * limits.KIB
#: Longer texts are cut before they travel as an error.
ERROR_TEXT_CHARACTERS_MAX = 4000

COMMAND = b"_command"
ASK = b"_ask"
ANSWER = b"_answer"
ERROR = b"_error"
ERROR_CODE = b"_error_code"
ERROR_DESCRIPTION = b"_error_description"
#: The error code under which a QdsError travels.
QDS_ERROR = b"QDS"


def encode_box(box: Mapping[bytes, bytes]) -> bytes:
    """Give the bytes of one box.

    :raises LimitError: a key or a value is longer than AMP allows.
    """
    pieces = []
    for key, value in box.items():
        if not 0 < len(key) <= KEY_BYTES_MAX or len(value) > VALUE_BYTES_MAX:
            raise LimitError(f"AMP key {key[:32]!r} or its value has an impossible length")
        pieces += [_LENGTH.pack(len(key)), key, _LENGTH.pack(len(value)), value]
    pieces.append(b"\0\0")
    return b"".join(pieces)


class BoxDecoder:
    """Cuts received bytes into boxes.

    :param box_bytes_max: a longer box is refused before it is buffered whole.
    """

    def __init__(self, box_bytes_max: int = BOX_BYTES_MAX) -> None:
        self._limit = box_bytes_max
        self._buffer = bytearray()
        self._box: dict[bytes, bytes] = {}
        self._key: bytes | None = None
        self._used = 0

    def feed(self, data: bytes) -> list[dict[bytes, bytes]]:
        """Take received bytes; give the boxes they complete, in order.

        :raises LimitError: the box is longer than allowed.
        :raises ProtocolError: these bytes are not AMP.
        """
        self._buffer += data
        boxes = []
        for string in self._strings():
            if self._key is not None:
                self._box[self._key] = string
                self._key = None
            elif string:
                if len(string) > KEY_BYTES_MAX:
                    raise ProtocolError("the peer on the control socket does not speak AMP")
                self._key = string
            else:
                boxes.append(self._box)
                self._box = {}
                self._used = 0
        if self._used + len(self._buffer) > self._limit:
            raise LimitError(f"a box on the control socket exceeds {self._limit} bytes")
        return boxes

    def _strings(self) -> Iterator[bytes]:
        """Give each complete string of the buffer, and leave there what follows."""
        position = 0
        while len(self._buffer) - position >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, position)
            end = position + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            self._used += end - position
            yield bytes(self._buffer[position + _LENGTH.size : end])
            position = end
        del self._buffer[:position]


def spread(name: bytes, value: bytes) -> dict[bytes, bytes]:
    """Give the pairs that carry a long value: ``name``, ``name.1``, ...

    :raises LimitError: the value exceeds CONTROL_JSON_BYTES_MAX.
    """
    if len(value) > limits.CONTROL_JSON_BYTES_MAX:
        raise LimitError(
            f"an answer of {len(value)} bytes exceeds the control channel's "
            f"{limits.CONTROL_JSON_BYTES_MAX}"
        )
    pairs = {name: value[:VALUE_BYTES_MAX]}
    for index, start in enumerate(range(VALUE_BYTES_MAX, len(value), VALUE_BYTES_MAX), 1):
        pairs[b"%s.%d" % (name, index)] = value[start : start + VALUE_BYTES_MAX]
    return pairs


def gather(name: bytes, box: dict[bytes, bytes]) -> bytes:
    """Take a spread value out of a box, whose pairs of it are removed.

    :raises ProtocolError: the box has no such value.
    """
    if name not in box:
        raise ProtocolError(f"an AMP box lacks {name.decode('ascii', 'replace')}")
    pieces = [box.pop(name)]
    while (piece := box.pop(b"%s.%d" % (name, len(pieces)), None)) is not None:
        pieces.append(piece)
    return b"".join(pieces)


def _classes() -> dict[str, type[QdsError]]:
    """Map every stable error code to its class in the tree."""
    return {
        kind.code: kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, QdsError)
    }


_CLASSES = _classes()


def encode_error(error: QdsError) -> bytes:
    """Give the description with which an error travels."""
    return dump_json(
        {
            "code": error.code,
            "message": error.message[:ERROR_TEXT_CHARACTERS_MAX],
            "hint": error.hint[:ERROR_TEXT_CHARACTERS_MAX],
        }
    )


def decode_error(description: bytes) -> QdsError:
    """Make the error that travelled, of the same class; unknown codes become QdsError."""
    try:
        fields = parse_object(description, "the description of an error")
    except ProtocolError:
        return QdsError(description.decode("utf-8", "replace")[:ERROR_TEXT_CHARACTERS_MAX])
    kind = _CLASSES.get(str(fields.get("code")), QdsError)
    return kind(str(fields.get("message", "")), str(fields.get("hint", "")))
