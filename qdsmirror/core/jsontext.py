"""JSON texts that processes and hosts send each other: made compact, read with distrust."""

from __future__ import annotations

import json
from typing import Any

from qdsmirror.errors import ProtocolError, QdsError


def dump_json(value: object) -> bytes:
    """Give the compact JSON text of a value."""
    return json.dumps(value, separators=(",", ":")).encode()


def parse_object(
    text: str | bytes, what: str, error: type[QdsError] = ProtocolError
) -> dict[str, Any]:
    """Parse a JSON object that came from another process or host.

    :param what: what the text is, for the error.
    :raises ProtocolError: it is no JSON object; or another ``error``.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{what} is not JSON: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{what} is not a JSON object")
    return value
