"""The ``[throttles]`` of a group's file: what is wrong names line, column and word."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from qdsmirror.configsource import Source
from qdsmirror.core.throttles import (
    Throttle,
    ThrottleError,
    parse_actions,
    parse_test,
    parse_time,
    window,
)
from qdsmirror.limits import THROTTLE_NAME_CHARS_MAX

_SECTION = "throttles"
_T = TypeVar("_T")


class _WrongError(Exception):
    """Something was complained about."""


def read_throttles(source: Source) -> tuple[Throttle, ...]:
    """Read the throttles of a group's file, in their order; what is wrong is complained about."""
    throttles = []
    for name, values in source.values[_SECTION].items():
        if len(name) > THROTTLE_NAME_CHARS_MAX:
            most = f"a throttle's name has at most {THROTTLE_NAME_CHARS_MAX} characters"
            source.complain((_SECTION, name), most)
            continue
        try:
            throttles.append(_throttle(source, name, values))
        except _WrongError:
            pass
    return tuple(throttles)


def _throttle(source: Source, name: str, values: dict[str, str]) -> Throttle:
    start = _read(source, name, "from", lambda: parse_time(values["from"]))
    stop = _read(source, name, "to", lambda: parse_time(values["to"]))
    return Throttle(
        name,
        window=_read(source, name, "to", lambda: window(start, stop)),
        test=_read(source, name, "test", lambda: parse_test(values["test"])),
        actions=_read(
            source, name, "actions", lambda: parse_actions(values["actions"].split("\n"))
        ),
    )


def _read(source: Source, name: str, key: str, parse: Callable[[], _T]) -> _T:
    path = (_SECTION, name, key)
    try:
        return parse()
    except ThrottleError as error:
        line = source.lines.get(path)
        if line is not None:
            line += error.line - 1
        before = source.columns.get(path, 0) if error.line == 1 else 0
        source.complain(path, error.at(error.column + before), line)
        raise _WrongError from None
