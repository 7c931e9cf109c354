"""Holds what real daemons say to the published schema of ``qdsinfo --json``."""

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
def validator(closed: bool = False) -> jsonschema.Draft202012Validator:
    """Give the validator.

    :param closed: a key that the schema does not know is an error: it is undocumented.
    """
    schema = json.loads(schema_text())
    return jsonschema.Draft202012Validator(_closed(schema) if closed else schema)


def keep_to_schema(told: dict[str, Any], *, closed: bool = False) -> None:
    """Check an object that ``qdsinfo --json`` has printed, or would.

    :param closed: as for :func:`validator`.
    :raises AssertionError: it is not what the schema says.
    """
    for error in validator(closed).iter_errors(told):
        where = "/".join(map(str, error.absolute_path))
        raise AssertionError(f"qdsinfo --json: {where}: {error.message[:500]}")
