"""Holds what real daemons say to the published schema of ``qdsinfo --json``, and to no more."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jsonschema

from qdsmirror.tools.info import schema_text


def _closed(node: Any) -> Any:
    """Give a schema that allows no key but those it names, wherever it names any."""
    if isinstance(node, list):
        return [_closed(one) for one in node]
    if not isinstance(node, dict):
        return node
    made = {key: _closed(value) for key, value in node.items()}
    # What is said below "then" is of an object that is described above.
    if "object" in str(node.get("type")) and "properties" in node and "required" in node:
        made.setdefault("additionalProperties", False)
    return made


@cache
def validator() -> jsonschema.Draft202012Validator:
    """Give the validator; a key that the schema does not know is an error: it is undocumented."""
    return jsonschema.Draft202012Validator(_closed(json.loads(schema_text())))


def keep_to_schema(told: dict[str, Any]) -> None:
    """Check an object that ``qdsinfo --json`` has printed, or would.

    :raises AssertionError: it is not what the schema says.
    """
    for error in validator().iter_errors(told):
        where = "/".join(map(str, error.absolute_path))
        raise AssertionError(f"qdsinfo --json: {where}: {error.message[:500]}")
