"""The numbers of throttles that may change while their group runs (``qdsset``).

Their keys are ``NAME.value``, the number that a throttle's test compares with (the patent's "Value"
field), and ``NAME.limit``, that of its ``limit`` action: KB a second, or ``off``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from qdsmirror.configvalues import nearest, shown
from qdsmirror.core.throttles import (
    LIMIT,
    OFF,
    Throttle,
    ThrottleError,
    parse_action,
    parse_test,
)
from qdsmirror.errors import UsageError

VALUE = "value"
_NUMBER = re.compile(r"[0-9]{1,10}(\.[0-9]{1,3})?", re.ASCII)


def is_key(key: str) -> bool:
    """Tell whether a key is one of a throttle's numbers, as far as it can be seen without it."""
    name, _, which = key.rpartition(".")
    return bool(name) and which in (VALUE, LIMIT)


def check(key: str, text: str) -> None:
    """Check what can be checked of a number without its throttle.

    :raises UsageError: it is none.
    """
    if key.rpartition(".")[2] == LIMIT:
        _read_limit(key, text)
    elif not _NUMBER.fullmatch(text):
        raise UsageError(f"{key}: {shown(text)} is not a number", hint="see qdsthrottle(5)")


def turned(throttles: Iterable[Throttle], key: str, text: str) -> tuple[Throttle, ...]:
    """Give throttles of which one has another number.

    :raises UsageError: there is no such throttle, it has no such number, or it may not be that.
    """
    name, _, which = key.rpartition(".")
    known = {one.name: one for one in throttles}
    if name not in known:
        raise UsageError(
            f"there is no throttle {shown(name)}{nearest(name, known)}",
            hint="qdsconfigtool throttle --explain names them",
        )
    known[name] = (_limited if which == LIMIT else _compared)(known[name], key, text)
    return tuple(known.values())


def _compared(throttle: Throttle, key: str, text: str) -> Throttle:
    before = throttle.test
    mark = "T" if before.transition else ""
    try:
        test = parse_test(f"{before.measure} {mark}{before.relation} {text}")
    except ThrottleError as error:
        raise _refused(key, text, error) from None
    return dataclasses.replace(throttle, test=test)


def _limited(throttle: Throttle, key: str, text: str) -> Throttle:
    if throttle.limit is None:
        raise UsageError(
            f"{key}: the throttle {shown(throttle.name)} has no action {LIMIT}",
            hint="give it one in the group's file, then qdsconfigtool apply",
        )
    amount = _read_limit(key, text)
    actions = tuple(
        dataclasses.replace(one, amount=amount) if one.kind == LIMIT else one
        for one in throttle.actions
    )
    return dataclasses.replace(throttle, actions=actions)


def _read_limit(key: str, text: str) -> int | None:
    try:
        return parse_action(f"{LIMIT} {text}").amount
    except ThrottleError as error:
        raise _refused(key, text, error) from None


def _refused(key: str, text: str, error: ThrottleError) -> UsageError:
    return UsageError(
        f"{key}: expected {error.expected}, found {shown(text)}", hint="see qdsthrottle(5)"
    )


def numbers(throttles: Iterable[Throttle]) -> dict[str, str | float]:
    """Give the present numbers by their keys."""
    found: dict[str, str | float] = {}
    for one in throttles:
        found[f"{one.name}.{VALUE}"] = one.test.value
        if one.limit is not None:
            found[f"{one.name}.{LIMIT}"] = OFF if one.limit.amount is None else one.limit.amount
    return found
